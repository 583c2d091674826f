//! Filter chains: what happens to a connection once it is known what it is.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use proxy_config::model;

use super::cluster::WeightedClusters;
use super::{Jwt, Name, PeerMetadata, Rbac, RouteTable, TcpExchange};
use crate::telemetry::{AccessLogs, Stats, Tracer};
use crate::tls::ServerTls;

/// A filter chain.
#[derive(Clone)]
pub struct Chain {
    /// Name; may repeat inside a listener.
    pub name: Name,
    /// TLS termination; `None` is plaintext.
    pub tls: Option<ServerTls>,
    /// Network filters in order, without the terminal one.
    pub l4: Box<[Filter]>,
    /// Where it ends.
    pub terminal: Terminal,
    /// Nothing may pass (503, gRPC 14, TCP closed after the handshake): a security object that selects this chain, or
    /// the chain's certificate, cannot be used. Says why.
    pub unusable: Option<Name>,
    /// Limit on the TLS handshake.
    pub handshake_timeout: Option<Duration>,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain").field("name", &self.name).field("tls", &self.tls.is_some()).finish_non_exhaustive()
    }
}

/// A network filter that is not terminal.
#[derive(Debug, Clone)]
pub enum Filter {
    /// Policy on the connection.
    Rbac(Arc<Rbac>),
    /// `istio.metadata_exchange`.
    MetadataExchange(Arc<TcpExchange>),
    /// Changes or refuses traffic and is not done: connections are refused. Its name.
    Unsupported(Name),
}

/// Where a chain ends.
#[derive(Debug, Clone)]
pub enum Terminal {
    /// Bytes.
    Tcp(Arc<TcpChain>),
    /// HTTP.
    Http(Arc<HttpChain>),
    /// Nowhere: connections are refused; says why.
    Refuse(Name),
}

/// A TCP proxy.
#[derive(Debug)]
pub struct TcpChain {
    /// Statistics prefix.
    pub stat_prefix: Name,
    /// Where to.
    pub clusters: WeightedClusters,
    /// Idle limit; `None` is off.
    pub idle_timeout: Option<Duration>,
    /// Longest life of a connection; `None` is unlimited.
    pub max_duration: Option<Duration>,
    /// Hash of the source address chooses the host.
    pub hash_source_ip: bool,
    /// Access logs.
    pub access_log: Arc<AccessLogs>,
    /// `istio.stats`; `None`: nothing asks for it.
    pub stats: Option<Arc<Stats>>,
}

/// An HTTP connection manager.
#[derive(Debug)]
pub struct HttpChain {
    /// Filters in configured order; the router is last and implied.
    pub filters: Box<[HttpFilter]>,
    /// Everything else.
    pub options: HttpOptions,
    /// Where routes come from; ask [`super::Snapshot::route_table`].
    pub(super) routes: Routes,
}

/// Where routes come from.
#[derive(Debug)]
pub(super) enum Routes {
    Rds(Name),
    Inline(Arc<RouteTable>),
}

impl HttpChain {
    /// The RDS name, or the inline table's name.
    pub fn route_config(&self) -> &Name {
        match &self.routes {
            Routes::Rds(name) => name,
            Routes::Inline(table) => &table.name,
        }
    }
}

/// An HTTP filter.
#[derive(Debug)]
pub enum HttpFilter {
    /// Policy.
    Rbac(Arc<Rbac>),
    /// Tokens.
    JwtAuthn(Arc<Jwt>),
    /// Fault injection, from the route.
    Fault,
    /// CORS, from the route.
    Cors,
    /// ALPN lists by upstream protocol.
    Alpn(Arc<AlpnRewrite>),
    /// Peer metadata by headers.
    PeerMetadata(Arc<PeerMetadata>),
    /// `istio.stats`.
    Stats(Arc<Stats>),
    /// gRPC statistics.
    GrpcStats,
    /// gRPC-Web.
    GrpcWeb,
    /// Changes or refuses traffic and is not done: 501, for a security filter 503.
    Unsupported {
        /// Filter name.
        name: Name,
        /// It decides who may pass.
        security: bool,
    },
}

/// What the `istio.alpn` filter offers upstream, by upstream protocol.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct AlpnRewrite {
    /// HTTP/1.0.
    pub http10: Vec<String>,
    /// HTTP/1.1.
    pub http11: Vec<String>,
    /// HTTP/2.
    pub http2: Vec<String>,
}

/// What the HTTP path needs of a connection manager. Durations: `None` is off, defaults are filled in.
#[derive(Debug)]
pub struct HttpOptions {
    /// Statistics prefix.
    pub stat_prefix: Name,
    /// Value of `server`.
    pub server_name: HeaderValue,
    /// What happens to the upstream's `server`.
    pub server_header: model::ServerHeader,
    /// XFCC handling.
    pub forward_client_cert: model::ForwardClientCert,
    /// XFCC parts.
    pub client_cert_details: model::ClientCertDetails,
    /// Trust the connection's address instead of x-forwarded-for.
    pub use_remote_address: bool,
    /// x-request-id is made when absent.
    pub generate_request_id: bool,
    /// Percent-decoding and dot segments.
    pub normalize_path: bool,
    /// `//` becomes `/`.
    pub merge_slashes: bool,
    /// `%2F` and `%5C`.
    pub escaped_slashes: model::EscapedSlashes,
    /// Stream idle limit.
    pub stream_idle_timeout: Option<Duration>,
    /// Limit on receiving a whole request.
    pub request_timeout: Option<Duration>,
    /// Limit on receiving request headers.
    pub request_headers_timeout: Option<Duration>,
    /// Connection idle limit.
    pub idle_timeout: Option<Duration>,
    /// Longest life of a client connection.
    pub max_connection_duration: Option<Duration>,
    /// Longest life of a stream.
    pub max_stream_duration: Option<Duration>,
    /// Requests after which a client connection is closed.
    pub max_requests_per_connection: Option<u32>,
    /// Between the shutdown notice and the final GOAWAY.
    pub drain_timeout: Duration,
    /// Largest request headers, bytes.
    pub max_request_headers: u32,
    /// Headers whose name has an underscore.
    pub headers_with_underscores: model::UnderscoreHeaders,
    /// `Upgrade:` values that are allowed, lower case.
    pub upgrades: Box<[Box<str>]>,
    /// HTTP/1.0 is served.
    pub accept_http_10: bool,
    /// Header case is kept.
    pub preserve_header_case: bool,
    /// x-forwarded-port is appended.
    pub append_x_forwarded_port: bool,
    /// `x-envoy-*` response headers are left out.
    pub suppress_envoy_headers: bool,
    /// HTTP/2 settings.
    pub http2: Option<model::Http2Options>,
    /// Which addresses count as internal.
    pub internal_cidrs: Box<[ipnet::IpNet]>,
    /// Access logs.
    pub access_log: Arc<AccessLogs>,
    /// Tracing.
    pub tracing: Option<model::Tracing>,
    /// Who spans are reported by; `None`: nobody.
    pub tracer: Option<Arc<Tracer>>,
}

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

impl HttpOptions {
    /// Who the client is: `peer` where its address is the one that counts, else the address that the nearest proxy saw,
    /// when the headers have one.
    pub fn client(&self, headers: &HeaderMap, peer: IpAddr) -> IpAddr {
        if self.use_remote_address { peer } else { last_forwarded(headers).unwrap_or(peer) }
    }
}

fn last_forwarded(headers: &HeaderMap) -> Option<IpAddr> {
    let last = headers.get_all(FORWARDED_FOR).iter().next_back()?.to_str().ok()?;
    last.rsplit(',').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_proxy_says_who_the_client_is() {
        for (sent, expected) in [
            (&["1.1.1.1, 2.2.2.2"][..], Some("2.2.2.2")),
            (&["1.1.1.1", "3.3.3.3"], Some("3.3.3.3")),
            (&["::1"], Some("::1")),
            (&["1.1.1.1, unknown"], None),
            (&[], None),
        ] {
            let mut headers = HeaderMap::new();
            for value in sent {
                headers.append(FORWARDED_FOR, value.parse().unwrap());
            }
            assert_eq!(last_forwarded(&headers), expected.map(|e| e.parse().unwrap()), "{sent:?}");
        }
    }
}
