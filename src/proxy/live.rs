//! Which chain answers for a connection that is open while configuration changes.
//!
//! A connection outlives the snapshot that it was accepted with. Its policy must not: every request, and every change of
//! configuration, asks the current snapshot for the chain that would take the connection now. The codec's own settings
//! (header limits, windows) stay those of the first chain.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crossbeam_utils::CachePadded;
use proxy_config::model::TransportProtocol;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::conn::{Conn, check_policy};
use super::http::HttpConn;
use super::tcp::judge;
use crate::snapshot::{Chain, ChainInput, HttpChain, Terminal};
use crate::telemetry::HttpMetrics;
use crate::upstream::View;

/// What the current configuration has for a connection.
#[derive(Debug)]
pub(super) enum Now<'a> {
    /// The chain that it has already.
    Same,
    /// Another one.
    Other(&'a Arc<Chain>),
    /// None: its listener or chain is gone, or would no longer admit this peer.
    Gone,
}

/// The chain that would take this connection now; `was` is the one it has.
pub(super) fn chain_now<'v>(view: &'v View, conn: &Conn, was: &Arc<Chain>) -> Now<'v> {
    let Some(listener) = view.snap.listener(&conn.listener.name) else { return Now::Gone };
    let chain = listener.chain(&ChainInput {
        dst: conn.destination,
        src: conn.peer,
        sni: conn.sni.as_deref(),
        transport: if conn.client_tls { TransportProtocol::Tls } else { TransportProtocol::RawBuffer },
        alpn: &conn.alpn,
    });
    let Some(chain) = chain else { return Now::Gone };
    if Arc::ptr_eq(chain, was) {
        return Now::Same;
    }
    match (&chain.tls, &conn.tls) {
        (Some(_), None) => Now::Gone,
        (Some(tls), Some(peer)) if !tls.admits(peer) => Now::Gone,
        _ => Now::Other(chain),
    }
}

/// What all requests of a connection share, whichever chain serves them.
pub(super) struct Counts {
    /// Of the chain that the connection was accepted with.
    pub(super) metrics: Arc<CachePadded<HttpMetrics>>,
    requests: AtomicU32,
    active: AtomicU32,
    /// When the last request ended, milliseconds after the connection began.
    last_end: AtomicU64,
    /// Configuration asks for an end of the connection.
    outdated: AtomicBool,
    /// No chain answers for it any more.
    barred: AtomicBool,
    /// What policy says of the connection since it changed; nothing is said that lets it be.
    denied: OnceLock<Box<str>>,
    /// Requests whose client went away at once.
    hasty: AtomicU32,
    /// Nothing is half read or half written.
    at_rest: AtomicBool,
    /// Told when the connection has had as many requests as it may.
    used_up: Notify,
}

/// As many requests are looked at before a client is judged by how many it gives up.
const JUDGED_FROM: u32 = 500;

impl Counts {
    pub(super) fn new(metrics: Arc<CachePadded<HttpMetrics>>) -> Self {
        metrics.cx_total.inc();
        metrics.cx_active.inc();
        Self {
            metrics,
            requests: AtomicU32::new(0),
            active: AtomicU32::new(0),
            last_end: AtomicU64::new(0),
            outdated: AtomicBool::new(false),
            barred: AtomicBool::new(false),
            denied: OnceLock::new(),
            hasty: AtomicU32::new(0),
            at_rest: AtomicBool::new(true),
            used_up: Notify::new(),
        }
    }

    /// The connection has had as many requests as it may.
    pub(super) fn use_up(&self) {
        self.used_up.notify_one();
    }

    /// Waits until it has.
    pub(super) async fn used_up(&self) {
        self.used_up.notified().await;
    }

    /// Says whether nothing is half read or half written.
    pub(super) fn rest(&self, is: bool) {
        self.at_rest.store(is, Ordering::Relaxed);
    }

    /// When a connection that began at `start` will have been at rest for so long, as far as can be told now.
    pub(super) fn rest_deadline(&self, start: Instant, pause: Duration) -> Instant {
        if self.at_rest.load(Ordering::Relaxed) { self.idle_deadline(start, pause) } else { Instant::now() + pause }
    }

    /// The client gave up a request right after it had made it, before it was answered.
    pub(super) fn given_up(&self) {
        self.hasty.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the client makes requests only to give them up (CVE-2023-44487): half of them, and of so many that it is no
    /// accident, by Envoy's measure.
    pub(super) fn is_flooded(&self) -> bool {
        let hasty = self.hasty.load(Ordering::Relaxed);
        hasty > 0 && hasty.saturating_mul(2) >= self.requests().max(JUDGED_FROM)
    }

    pub(super) fn request_begins(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.active.fetch_add(1, Ordering::Relaxed);
    }

    /// `since`: the connection's age.
    pub(super) fn request_ends(&self, since: Duration) {
        self.last_end.store(u64::try_from(since.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.active.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether no request is being answered.
    pub(super) fn is_idle(&self) -> bool {
        self.active.load(Ordering::Relaxed) == 0
    }

    /// Requests so far.
    pub(super) fn requests(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Whether configuration asks for an end.
    pub(super) fn is_outdated(&self) -> bool {
        self.outdated.load(Ordering::Relaxed)
    }

    /// Whether no chain answers for the connection any more.
    pub(super) fn is_barred(&self) -> bool {
        self.barred.load(Ordering::Relaxed)
    }

    /// Why policy would not admit the connection any more. A connection that was denied once ends, even if policy changes
    /// back before it has.
    pub(super) fn denied(&self) -> Option<&str> {
        self.denied.get().map(|details| &**details)
    }

    /// When a connection that began at `start` will have been idle for too long, as far as can be told now.
    pub(super) fn idle_deadline(&self, start: Instant, limit: Duration) -> Instant {
        if self.active.load(Ordering::Relaxed) > 0 {
            return Instant::now() + limit;
        }
        start + Duration::from_millis(self.last_end.load(Ordering::Relaxed)) + limit
    }
}

impl Drop for Counts {
    fn drop(&mut self) {
        self.metrics.cx_active.dec();
    }
}

/// An HTTP connection with the chain that serves its next request.
pub(super) struct Live {
    first: Arc<HttpConn>,
    /// The generation of configuration that was asked last.
    seen: AtomicU64,
    replaced: AtomicBool,
    /// What replaced the first one. Locked only once that has happened, and only by this connection's requests.
    other: Mutex<Option<Arc<HttpConn>>>,
}

impl Live {
    /// A connection that was just accepted. What changed meanwhile is found by its first request.
    pub(super) fn new(conn: Arc<Conn>, chain: &Arc<HttpChain>) -> Self {
        let metrics = conn.env.shard().http(&chain.options.stat_prefix);
        let counts = Arc::new(Counts::new(metrics));
        if conn.tls.is_some() {
            counts.metrics.cx_ssl_total.inc();
        }
        let whole = Arc::clone(&conn.chain);
        let first = Arc::new(HttpConn::new(conn, whole, Arc::clone(chain), counts));
        Self { first, seen: AtomicU64::new(0), replaced: AtomicBool::new(false), other: Mutex::new(None) }
    }

    /// As it was accepted.
    pub(super) fn first(&self) -> &Arc<HttpConn> {
        &self.first
    }

    /// What serves a request that comes now.
    pub(super) fn now(&self) -> Arc<HttpConn> {
        let generation = self.first.conn.env.generation();
        if self.seen.swap(generation, Ordering::Relaxed) != generation {
            self.look();
        }
        self.latest()
    }

    fn latest(&self) -> Arc<HttpConn> {
        if !self.replaced.load(Ordering::Relaxed) {
            return Arc::clone(&self.first);
        }
        Arc::clone(self.lock().as_ref().unwrap_or(&self.first))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<HttpConn>>> {
        self.other.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self) {
        let before = self.latest();
        let (conn, counts) = (&before.conn, &before.counts);
        let view = conn.env.view();
        if let Some(details) = judge(&view, conn) {
            // Whoever came first has said it.
            let _ = counts.denied.set(details.into());
        }
        let now = chain_now(&view, conn, &before.whole);
        let found = match now {
            Now::Same => Some(&before.whole),
            Now::Other(chain) => Some(chain).filter(|chain| self.replace(&before, chain)),
            Now::Gone => None,
        };
        if found.is_none_or(|chain| chain.unusable.is_some() || chain.tls.is_some() != conn.tls.is_some()) {
            counts.outdated.store(true, Ordering::Relaxed);
        }
        // Outbound nothing is decided about who may come: what was there serves until the connection has ended.
        counts.barred.store(found.is_none() && conn.is_inbound(), Ordering::Relaxed);
    }

    /// Whether the chain can serve this connection.
    fn replace(&self, before: &HttpConn, chain: &Arc<Chain>) -> bool {
        let Terminal::Http(http) = &chain.terminal else { return false };
        if check_policy(chain, &before.conn.attributes(), &before.conn.env).is_err() {
            return false;
        }
        let (conn, counts) = (Arc::clone(&before.conn), Arc::clone(&before.counts));
        *self.lock() = Some(Arc::new(HttpConn::new(conn, Arc::clone(chain), Arc::clone(http), counts)));
        self.replaced.store(true, Ordering::Relaxed);
        true
    }
}
