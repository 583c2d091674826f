//! Pick a host, get a connection, judge the outcome.
//!
//! It decides which host of a cluster serves a request, when a limit is met, what counts against a host, and whether a
//! failed try is repeated. It never decides which cluster: that is routing. What workers share about a cluster are
//! atomics in the snapshot; connections belong to one worker.
//!
//! ```ignore
//! let view = View::new(snapshot, previous.as_deref());
//! let cluster = view.cluster(id);
//! let call = Call { retry: forward.retry.as_ref(), timeout: forward.timeout, ..Call::new(cluster) };
//! let answer = upstream::send(&call, parts, Body::from_client(incoming), &mut trace).await?;
//! ```

mod answer;
mod body;
mod body_copy;
mod breaker;
mod conn;
mod edf;
mod failure;
mod hash;
mod health;
mod idle;
mod judge;
mod lb;
mod lease;
mod outlier;
mod pool;
mod retry;
mod send;
mod tcp;
mod view;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;
use tokio::time::Instant;

pub use answer::{Answer, AnswerBody};
pub use body::{Body, BodyError, Progress};
pub use hash::xx_hash;
pub use view::{ClusterLocal, View};

use crate::error::{Error, Flags};
use crate::net::Stream;
use crate::snapshot::action::RetryPolicy;
use crate::snapshot::{AlpnRewrite, Host};
use crate::tls::Peer;

/// Bytes of a request body that are kept so that a retry can send them again; Envoy's default buffer limit.
pub const REPLAY_LIMIT: usize = 1024 * 1024;

/// Everything about a request that is not the request.
#[derive(Debug, Clone)]
pub struct Call<'a> {
    /// Where to.
    pub cluster: &'a Arc<ClusterLocal>,
    /// The route's retries; `None` is none.
    pub retry: Option<&'a RetryPolicy>,
    /// Limit on the whole response, all tries included, counted from the end of the request; `None` is off.
    pub timeout: Option<Duration>,
    /// For consistent hashing; without one the choice is random.
    pub hash: Option<u64>,
    /// What the client speaks, for clusters that follow it.
    pub downstream_version: http::Version,
    /// The `istio.alpn` filter of the connection manager.
    pub alpn: Option<&'a Arc<AlpnRewrite>>,
    /// An upgrade is asked for: the connection is the request's own, and [`Answer::upgrade`] is given on 101.
    pub upgrade: bool,
    /// Where the client wanted to go, for clusters of that kind.
    pub original_dst: Option<SocketAddr>,
    /// The request's host without port, for automatic SNI.
    pub host: Option<&'a str>,
    /// `:scheme` towards HTTP/2.
    pub scheme: Scheme,
    /// The client and the address it connected to, for the PROXY protocol.
    pub client: Option<(SocketAddr, SocketAddr)>,
    /// Request body bytes that are kept for a retry.
    pub replay_limit: usize,
}

impl<'a> Call<'a> {
    /// A call without retries, limits or wishes.
    pub fn new(cluster: &'a Arc<ClusterLocal>) -> Self {
        Self {
            cluster,
            retry: None,
            timeout: None,
            hash: None,
            downstream_version: http::Version::HTTP_11,
            alpn: None,
            upgrade: false,
            original_dst: None,
            host: None,
            scheme: Scheme::HTTP,
            client: None,
            replay_limit: REPLAY_LIMIT,
        }
    }
}

/// What happened so far; filled as it goes, so that a request that is given up still has its story in the log.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// Tries so far; 1 is the first. A silent repeat on a fresh connection does not count.
    pub attempts: u32,
    /// Response flags.
    pub flags: Flags,
    /// Host of the last try.
    pub host: Option<Arc<Host>>,
    /// Our address on the last upstream connection.
    pub upstream_local: Option<SocketAddr>,
    /// Why the transport failed: the TLS or connect error's text.
    pub transport_failure: Option<String>,
    /// TLS peer of the last upstream connection.
    pub peer: Option<Arc<Peer>>,
    /// The last try began to wait for a connection.
    pub started: Option<Instant>,
    /// The last try had its connection.
    pub ready: Option<Instant>,
    /// The response head of the last try came.
    pub first_byte: Option<Instant>,
}

/// Sends a request and returns the response once its head is there; retries are done inside.
///
/// `parts.uri` may be in origin form with a `host` header, or have an authority: `send` writes what the upstream's version
/// needs. Later tries update `x-envoy-attempt-count` and `x-envoy-expected-rq-timeout-ms` where the first try has them.
/// `parts.extensions` travel along, so `hyper::ext::on_informational` works. Dropping the future gives everything back:
/// an HTTP/2 stream is reset, an HTTP/1 connection closed.
///
/// A response that the policy calls a failure is still returned when no try is left; then [`Trace::flags`] has URX.
pub async fn send(
    call: &Call<'_>,
    parts: http::request::Parts,
    body: Body,
    trace: &mut Trace,
) -> Result<Answer, Error> {
    send::send(call, parts, body, trace).await
}

/// A connection to be relayed.
#[derive(Debug, Clone)]
pub struct TcpCall<'a> {
    /// Where to.
    pub cluster: &'a Arc<ClusterLocal>,
    /// Tries until a connection stands; at least 1.
    pub max_connect_attempts: u32,
    /// For consistent hashing (of the source address).
    pub hash: Option<u64>,
    /// Where the client wanted to go.
    pub original_dst: Option<SocketAddr>,
    /// The client and the address it connected to, for the PROXY protocol.
    pub client: Option<(SocketAddr, SocketAddr)>,
}

/// An open upstream connection; dropping it settles the cluster's and the host's accounts.
#[derive(Debug)]
pub struct TcpUpstream {
    /// The bytes.
    pub stream: Stream,
    /// Whose.
    pub host: Arc<Host>,
    /// Our address.
    pub local: Option<SocketAddr>,
    /// TLS peer; its `alpn` says whether metadata is exchanged.
    pub peer: Option<Arc<Peer>>,
    _hold: tcp::TcpHold,
}

/// Connects for a TCP proxy.
pub async fn connect_tcp(call: &TcpCall<'_>, trace: &mut Trace) -> Result<TcpUpstream, Error> {
    tcp::connect(call, trace).await
}
