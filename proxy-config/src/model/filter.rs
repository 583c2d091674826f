//! Network and HTTP filters as closed enums, in configured order; access logs and tracing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::{HeaderMatcher, JwtAuthn, Name, Rbac, RouteTable, StringMatcher};

/// A network filter of a chain.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs, reason = "a variant's line tells its fields")]
pub enum NetworkFilter {
    /// `istio.metadata_exchange` on TCP; the ALPN name that switches it on.
    MetadataExchange(MetadataExchange),
    /// `envoy.filters.network.rbac`.
    Rbac(Rbac),
    /// `istio.stats` on TCP.
    IstioStats(IstioStats),
    /// `envoy.filters.network.tcp_proxy` (terminal).
    TcpProxy(TcpProxy),
    /// `envoy.filters.network.http_connection_manager` (terminal).
    Http(Box<HttpConnectionManager>),
    /// A filter that is known, harmless and does nothing here (`mongo_proxy` statistics, say).
    Inert { name: String, type_url: String },
    /// A filter that changes or refuses traffic and that we do not do: connections through it are refused.
    Unsupported { name: String, type_url: String },
}

/// Peer metadata on TCP, of a chain or of a cluster's connections.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct MetadataExchange {
    /// The ALPN name that switches it on.
    pub protocol: String,
    /// Peers may be looked up by address.
    pub enable_discovery: bool,
    /// Labels that are told and kept besides the standard ones.
    pub additional_labels: Vec<String>,
}

/// `envoy.filters.network.tcp_proxy`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TcpProxy {
    /// Statistics prefix.
    pub stat_prefix: String,
    /// Where to; weights are relative to their sum.
    pub clusters: Vec<WeightedName>,
    /// Idle time after which the connection is closed; `None` is Envoy's default (1 h), zero is off.
    pub idle_timeout: Option<Duration>,
    /// Longest life of a connection; `None` is unlimited.
    pub max_downstream_connection_duration: Option<Duration>,
    /// Hash of the source address chooses the host.
    pub hash_source_ip: bool,
    /// HTTP CONNECT tunnelling: host name, and POST instead of CONNECT. Not served yet.
    pub tunneling: Option<(String, bool)>,
    /// Access logs.
    pub access_log: Vec<AccessLog>,
}

/// A cluster with its weight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WeightedName {
    /// Cluster name.
    pub cluster: Name,
    /// Relative weight.
    pub weight: u32,
}

/// `envoy.filters.network.http_connection_manager`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HttpConnectionManager {
    /// Statistics prefix (`outbound_0.0.0.0_80;`).
    pub stat_prefix: String,
    /// Where routes come from.
    pub routes: RouteSource,
    /// Filters in order; the router is last and implied.
    pub filters: Vec<HttpFilter>,
    /// Value of the `server` response header; empty is Envoy's default (`envoy`).
    pub server_name: String,
    /// What happens to the upstream's `server` header.
    pub server_header_transformation: ServerHeader,
    /// XFCC handling.
    pub forward_client_cert: ForwardClientCert,
    /// Which parts of the current peer's certificate go into XFCC.
    pub set_current_client_cert: ClientCertDetails,
    /// Trust the connection's address instead of x-forwarded-for.
    pub use_remote_address: bool,
    /// x-request-id is made when absent.
    pub generate_request_id: bool,
    /// x-request-id is packed with the trace decision.
    pub request_id_for_trace_sampling: bool,
    /// Percent-decoding and dot-segment removal before policy and routing.
    pub normalize_path: bool,
    /// `//` becomes `/`.
    pub merge_slashes: bool,
    /// `%2F` and `%5C`.
    pub escaped_slashes: EscapedSlashes,
    /// Stream idle limit; `None` is Envoy's default (5 min), zero is off.
    pub stream_idle_timeout: Option<Duration>,
    /// Limit on receiving a whole request; zero or `None` is off.
    pub request_timeout: Option<Duration>,
    /// Limit on receiving request headers; zero or `None` is off.
    pub request_headers_timeout: Option<Duration>,
    /// Connection idle limit; `None` is Envoy's default (1 h), zero is off.
    pub idle_timeout: Option<Duration>,
    /// Longest life of a client connection.
    pub max_connection_duration: Option<Duration>,
    /// Longest life of a stream.
    pub max_stream_duration: Option<Duration>,
    /// Requests after which a client connection is closed.
    pub max_requests_per_connection: Option<u32>,
    /// Time between the shutdown notice and the final GOAWAY; `None` is Envoy's default (5 s).
    pub drain_timeout: Option<Duration>,
    /// Request headers above this size get 431; `None` is Envoy's default (60 KiB).
    pub max_request_headers_kb: Option<u32>,
    /// Headers whose name has an underscore.
    pub headers_with_underscores: UnderscoreHeaders,
    /// `Upgrade:` values that are allowed, lower case (`websocket`).
    pub upgrades: Vec<String>,
    /// HTTP/1.0 requests are served.
    pub accept_http_10: bool,
    /// Absolute-form requests were said to be accepted; they always are, as HTTP/1.1 asks (RFC 9112 §3.2.2).
    pub allow_absolute_url: bool,
    /// Header case is kept end to end.
    pub preserve_header_case: bool,
    /// `Expect: 100-continue` is forwarded instead of answered; nobody reads it: the HTTP library answers.
    pub proxy_100_continue: bool,
    /// x-forwarded-port is appended.
    pub append_x_forwarded_port: bool,
    /// Router: `x-envoy-*` response headers are left out.
    pub suppress_envoy_headers: bool,
    /// HTTP/2 is configured explicitly (declared h2/gRPC ports): concurrent streams and so on.
    pub http2: Option<Http2Options>,
    /// Statistic-only: which addresses count as internal.
    pub internal_cidrs: Vec<ipnet::IpNet>,
    /// Access logs.
    pub access_log: Vec<AccessLog>,
    /// Tracing.
    pub tracing: Option<Tracing>,
}

/// Where a connection manager takes its routes from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum RouteSource {
    /// By name from [`super::Model::routes`].
    Rds(Name),
    /// Inline.
    Inline(Arc<RouteTable>),
}

/// HTTP/2 settings of a listener or cluster; `None` is the codec's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Http2Options {
    /// Concurrent streams.
    pub max_concurrent_streams: Option<u32>,
    /// Stream window, bytes.
    pub initial_stream_window_size: Option<u32>,
    /// Connection window, bytes.
    pub initial_connection_window_size: Option<u32>,
    /// Extended CONNECT.
    pub allow_connect: bool,
    /// Interval of keep-alive pings.
    pub keepalive_interval: Option<Duration>,
    /// How long a ping may stay unanswered.
    pub keepalive_timeout: Option<Duration>,
}

/// `server_header_transformation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum ServerHeader {
    /// Always ours.
    #[default]
    Overwrite,
    /// Ours if there is none.
    AppendIfAbsent,
    /// Left alone.
    PassThrough,
}

/// `forward_client_cert_details`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum ForwardClientCert {
    /// XFCC is removed.
    #[default]
    Sanitize,
    /// Kept as it came when the peer presented a certificate.
    ForwardOnly,
    /// Appended when the peer presented a certificate.
    AppendForward,
    /// Replaced when the peer presented a certificate.
    SanitizeSet,
    /// Kept as it came, always.
    AlwaysForwardOnly,
}

/// `set_current_client_cert_details`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct ClientCertDetails {
    /// `Subject=`.
    pub subject: bool,
    /// `Cert=`.
    pub cert: bool,
    /// `Chain=`.
    pub chain: bool,
    /// `DNS=`.
    pub dns: bool,
    /// `URI=`.
    pub uri: bool,
}

/// `path_with_escaped_slashes_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum EscapedSlashes {
    /// `%2F` stays.
    #[default]
    KeepUnchanged,
    /// 400.
    Reject,
    /// Decoded and redirected.
    UnescapeAndRedirect,
    /// Decoded.
    UnescapeAndForward,
}

/// `headers_with_underscores_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum UnderscoreHeaders {
    /// Allowed.
    #[default]
    Allow,
    /// 400.
    RejectRequest,
    /// Dropped.
    DropHeader,
}

/// An HTTP filter.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs, reason = "a variant's line tells its fields")]
pub enum HttpFilter {
    /// `istio.metadata_exchange` (`io.istio.http.peer_metadata.Config`), as its canonical JSON.
    PeerMetadata(serde_json::Value),
    /// `envoy.filters.http.rbac`.
    Rbac(Rbac),
    /// `envoy.filters.http.jwt_authn`.
    JwtAuthn(Box<JwtAuthn>),
    /// `envoy.filters.http.fault`; what it does is on the route.
    Fault,
    /// `envoy.filters.http.cors`; what it does is on the route.
    Cors,
    /// `istio.alpn`: ALPN lists by upstream protocol (`http/1.0`, `http/1.1`, `h2`).
    Alpn(BTreeMap<String, Vec<String>>),
    /// `istio.stats`.
    IstioStats(IstioStats),
    /// `envoy.filters.http.grpc_stats`.
    GrpcStats,
    /// `envoy.filters.http.grpc_web`.
    GrpcWeb,
    /// Known, harmless, nothing to do.
    Inert { name: String, type_url: String },
    /// Changes or refuses traffic and is not done: requests through it get 501 (security: 503).
    Unsupported { name: String, type_url: String, security: bool },
}

/// `stats.PluginConfig`: kept as said, compiled by telemetry.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct IstioStats {
    /// Metric overrides, as their canonical JSON.
    pub config: serde_json::Value,
}

/// An access log sink.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AccessLog {
    /// Where it goes.
    pub sink: LogSink,
    /// When; all must hold.
    pub filter: Option<LogFilter>,
}

/// Where an access log goes.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs, reason = "a variant's line tells its fields")]
pub enum LogSink {
    /// A file path (`/dev/stdout`) with a format; what is absent is left out instead of written as `-`.
    File { path: String, format: LogFormat, omit_empty: bool },
    /// gRPC access log service: cluster and log name, and whether it is the TCP flavour; the rest as canonical JSON.
    Grpc { cluster: Name, log_name: String, tcp: bool, rest: serde_json::Value },
    /// OpenTelemetry: cluster and log name, the rest as canonical JSON.
    OpenTelemetry { cluster: Name, log_name: String, rest: serde_json::Value },
}

/// Format of a file access log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum LogFormat {
    /// Envoy's command operators in text.
    Text(String),
    /// A JSON object of command operators.
    Json(serde_json::Value),
    /// Envoy's default.
    Default,
}

/// `AccessLogFilter`, as far as istiod sends it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum LogFilter {
    /// A response flag is set (empty: any flag).
    ResponseFlags(Vec<String>),
    /// The status compares: operator `EQ`, `GE`, `LE`, `NE` and value.
    Status(String, u32),
    /// A CEL expression.
    Cel(String),
    /// All.
    And(Vec<Self>),
    /// One of.
    Or(Vec<Self>),
    /// A header matcher.
    Header(HeaderMatcher),
}

/// `HttpConnectionManager.Tracing`; percentages are 0 to 100.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Tracing {
    /// Client sampling.
    pub client_sampling: Option<f64>,
    /// Random sampling.
    pub random_sampling: Option<f64>,
    /// Overall sampling.
    pub overall_sampling: Option<f64>,
    /// Provider, as its canonical JSON; `None` propagates only.
    pub provider: Option<serde_json::Value>,
    /// Custom tags by name, as canonical JSON.
    pub custom_tags: BTreeMap<String, serde_json::Value>,
    /// Longest path tag.
    pub max_path_tag_length: Option<u32>,
}

/// `envoy.config.route.v3.CorsPolicy` of a route.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct CorsPolicy {
    /// Origins.
    pub allow_origins: Vec<StringMatcher>,
    /// `access-control-allow-methods`.
    pub allow_methods: String,
    /// `access-control-allow-headers`.
    pub allow_headers: String,
    /// `access-control-expose-headers`.
    pub expose_headers: String,
    /// `access-control-max-age`.
    pub max_age: String,
    /// `access-control-allow-credentials`.
    pub allow_credentials: Option<bool>,
    /// Preflights that match no origin go on to the upstream.
    pub forward_not_matching_preflights: Option<bool>,
}
