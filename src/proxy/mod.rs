//! Carries one connection or request from end to end.
//!
//! It decides nothing by itself: chains, routes and policies are asked of the snapshot, hosts and retries are the
//! upstream's. What it owns is the order of things, what is written into headers and local replies, and that every
//! connection and request is accounted for exactly once, whatever happens to it.
//!
//! ```ignore
//! let env = Arc::new(Env::new(Settings { worker: 0, view, drain, node }));
//! let destination = net::original_dst(&socket)?;
//! tokio::spawn(proxy::serve(socket.into(), peer, (local, destination), listener, Arc::clone(&env), seat));
//! ```

mod body;
mod conn;
mod cors;
mod ctx;
mod exchange;
mod expiry;
mod export;
mod filters;
mod hash;
mod head;
mod headers;
mod http;
mod http1;
mod jwt;
mod late;
mod limits;
mod live;
mod mirror;
mod ops;
mod peer_metadata;
mod quiet;
mod reply;
mod request;
mod request_id;
mod respond;
mod running;
mod server_first;
mod tcp;
mod trace;
mod upgrade;
mod vars;
mod watched;
mod xfcc;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ::http::HeaderValue;
use proxy_config::peer::Workload;
use tokio::sync::watch;

pub use export::run as export;

use crate::drain::Watch;
use crate::net::Stream;
use crate::snapshot::{JwtCache, Listener, Terminal};
use crate::telemetry::{LogSink, NodeLabels, Peers, Shard, Stats, Telemetry};
use crate::upstream::View;

/// What an [`Env`] is made of.
pub struct Settings {
    /// Number of the worker.
    pub worker: usize,
    /// The configuration to begin with.
    pub view: Arc<View>,
    /// When to say goodbye.
    pub drain: Watch,
    /// Who we are.
    pub node: Node,
}

/// Who we are, as other proxies and logs are told.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// `x-envoy-peer-metadata-id`: the node's id; `None` exchanges no metadata.
    pub id: Option<HeaderValue>,
    /// Our workload, with all of its labels.
    pub workload: Arc<Workload>,
    /// `%HOSTNAME%`
    pub hostname: String,
    /// Our service in traces.
    pub service: String,
}

impl Node {
    /// Our workload as peers are told, with these labels beside the standard ones.
    fn told(&self, additional: &[String]) -> Workload {
        let mut workload = (*self.workload).clone();
        workload.labels.retain(|name, _| additional.contains(name));
        workload
    }
}

/// How requests and connections are counted where no filter says so.
#[derive(Debug, Default)]
struct DefaultStats {
    inbound: Arc<Stats>,
    outbound: Arc<Stats>,
}

/// Everything a connection may touch; one for each worker, never shared between workers.
pub struct Env {
    worker: usize,
    /// A request takes a reference of the current view, a TCP connection also waits for changes of policy. The lock
    /// inside is only ever taken on this worker's thread.
    view: watch::Sender<Arc<View>>,
    /// Counts the views.
    generation: AtomicU64,
    drain: Watch,
    node: Node,
    shard: Arc<Shard>,
    log: Option<LogSink>,
    peers: Peers,
    stats: DefaultStats,
    /// Host of HTTP/1.0 requests that name none.
    default_host: HeaderValue,
    connections: AtomicU64,
    denials: filters::Throttle,
    /// Verified tokens. The lock is only ever taken on this worker's thread.
    tokens: Mutex<JwtCache>,
    mirrors: mirror::Mirrors,
}

impl Env {
    /// An environment.
    pub fn new(settings: Settings) -> Self {
        Self {
            worker: settings.worker,
            view: watch::Sender::new(settings.view),
            generation: AtomicU64::new(1),
            drain: settings.drain,
            default_host: HeaderValue::from_str(&settings.node.hostname)
                .unwrap_or(HeaderValue::from_static("localhost")),
            node: settings.node,
            shard: Telemetry::new(NodeLabels::default()).shard(),
            log: None,
            peers: Peers::default(),
            stats: DefaultStats {
                // A client's word for where it is must not make labels of a server.
                inbound: Arc::new(Stats { disable_host_header_fallback: true, ..Stats::default() }),
                outbound: Arc::default(),
            },
            connections: AtomicU64::new(0),
            denials: filters::Throttle::default(),
            tokens: Mutex::default(),
            mirrors: mirror::Mirrors::default(),
        }
    }

    /// Where this worker counts and logs; without it, counts are not shown and nothing is logged.
    #[must_use]
    pub fn with_telemetry(self, shard: Arc<Shard>, log: LogSink) -> Self {
        Self { shard, log: Some(log), ..self }
    }

    pub(crate) fn shard(&self) -> &Shard {
        &self.shard
    }

    pub(crate) fn log(&self) -> Option<&LogSink> {
        self.log.as_ref()
    }

    /// The current configuration.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// Makes another configuration current: for new connections, for every new request, and for the policy of open TCP
    /// connections. Call it on this worker's thread.
    pub fn swap(&self, view: Arc<View>) {
        self.view.send_replace(view);
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// A number that changes whenever the configuration does.
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Number of the worker.
    pub fn worker(&self) -> usize {
        self.worker
    }

    /// When to say goodbye.
    pub fn drain(&self) -> &Watch {
        &self.drain
    }

    /// A number for a connection, unique in the process.
    fn next_connection(&self) -> u64 {
        let count = self.connections.fetch_add(1, Ordering::Relaxed);
        (self.worker as u64) << 48 | count
    }
}

/// Serves one accepted connection to its end. `local` is the address it was accepted on, `destination` the one that the
/// client wanted (the same without redirection), `listener` the one that accepted. Dropping the future ends the
/// connection at once; `keep` is dropped with it.
pub fn serve<K: Send>(
    stream: Stream,
    peer: SocketAddr,
    (local, destination): (SocketAddr, SocketAddr),
    listener: Arc<Listener>,
    env: Arc<Env>,
    keep: K,
) -> impl Future<Output = ()> + Send {
    let captured = listener.original_dst;
    let arrival = conn::Arrival { peer, local, destination, captured, listener, env };
    // Apart, so that what a handshake needs is given back while the connection is served. Made here and not inside, because
    // a future keeps room for what it was made of as long as it lives.
    let opening = Box::pin(conn::open(stream, arrival));
    async move {
        let _keep = keep;
        let Some((stream, conn, early)) = opening.await else { return };
        // The two apart from each other, because a future has room for the larger of its ways.
        match &conn.chain.terminal {
            Terminal::Tcp(chain) => Box::pin(tcp::serve(stream, &conn, chain, early)).await,
            Terminal::Http(chain) => Box::pin(http::serve(stream, Arc::clone(&conn), chain)).await,
            // Refused when the connection was opened.
            Terminal::Refuse(_) => {}
        }
    }
}
