//! Connections of one worker to one host.
//!
//! LIFECYCLE. A request takes an idle HTTP/1 connection (the one used last: it is the least likely to be closed by the
//! peer) or a stream of an HTTP/2 connection with room; otherwise it waits, which the breaker counts, and a connection is
//! opened for it within the limits. Connections are opened by tasks of their own, so a request that is given up does not
//! waste them, and whichever connection is free first serves the request that waits longest. A [`Lease`] is the right to
//! use a connection for one request: dropped after a whole response it puts the connection back, dropped early it closes
//! an HTTP/1 connection and resets an HTTP/2 stream. The driver task of a connection tells the pool when it has ended.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::body::Body;
use super::breaker::{Connected, Permit};
use super::conn::{self, Failure, Line, Place, Sender};
use super::idle::{Habit, LOOK_AGAIN};
use super::lease::{Held, Lease};
use crate::error::{Error, Kind, Limit};
use crate::snapshot::{AlpnRewrite, Breakers};

/// Envoy's idle timeout of connections when configuration does not say.
const IDLE: Duration = Duration::from_secs(3600);

/// What connections of one pool have in common beside the host.
#[derive(Debug, Clone, Default)]
pub(super) struct Key {
    pub(super) h2: bool,
    /// The client speaks HTTP/1.0, which the offered protocols show.
    pub(super) http10: bool,
    pub(super) alpn: Option<Arc<AlpnRewrite>>,
    pub(super) sni: Option<Box<str>>,
    pub(super) client: Option<(SocketAddr, SocketAddr)>,
}

impl Key {
    /// Protocols to offer; `None`: what the cluster says.
    pub(super) fn alpn(&self) -> Option<&[String]> {
        let rewrite = self.alpn.as_deref()?;
        Some(match (self.h2, self.http10) {
            (true, _) => &rewrite.http2,
            (false, true) => &rewrite.http10,
            (false, false) => &rewrite.http11,
        })
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        let same_alpn = match (&self.alpn, &other.alpn) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
            _ => false,
        };
        same_alpn
            && self.h2 == other.h2
            && self.http10 == other.http10
            && self.sni == other.sni
            && self.client == other.client
    }
}

/// Why there is no lease.
#[derive(Debug)]
pub(super) enum Refusal {
    /// A limit.
    Overflow(Error),
    /// No connection.
    Failed(Failure),
}

/// The connections with one key.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) key: Key,
    pub(super) place: Place,
    breakers: Arc<Breakers>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// HTTP/1, the one used last at the end.
    idle: Vec<Idle>,
    /// HTTP/2.
    shared: Vec<Shared>,
    waiting: VecDeque<oneshot::Sender<Result<Lease, Failure>>>,
    connecting: usize,
    open: usize,
    retired: bool,
    habit: Habit,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (idle, shared, waiting) = (self.idle.len(), self.shared.len(), self.waiting.len());
        write!(f, "{idle} idle, {shared} shared, {waiting} waiting, {} connecting, {} open", self.connecting, self.open)
    }
}

struct Idle {
    sender: http1::SendRequest<Body>,
    line: Arc<Line>,
    served: u32,
}

struct Shared {
    sender: http2::SendRequest<Body>,
    line: Arc<Line>,
    active: u32,
    served: u32,
}

impl Pool {
    pub(super) fn new(key: Key, place: Place, breakers: &Arc<Breakers>) -> Arc<Self> {
        Arc::new(Self { key, place, breakers: Arc::clone(breakers), inner: Mutex::default() })
    }

    /// One worker's lock: never contended, and never held across a wait.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection for one request. `fresh` wants none that may have gone stale.
    pub(super) async fn checkout(self: &Arc<Self>, fresh: bool) -> Result<Lease, Refusal> {
        if !fresh {
            while let Some((lease, age)) = self.take_free() {
                if age < LOOK_AGAIN || lease.is_alive_after_a_look().await {
                    return Ok(lease);
                }
            }
        }
        let metrics = &self.place.metrics;
        let pending = Permit::take(&self.breakers, Limit::Pending).map_err(|error| {
            metrics.rq_pending_overflow.inc();
            Refusal::Overflow(error)
        })?;
        metrics.rq_pending_total.inc();
        metrics.rq_pending_active.inc();
        let (give, take) = oneshot::channel();
        let mut wait = Waiting { pool: self, answered: false, _pending: pending };
        {
            let mut inner = self.inner();
            inner.waiting.push_back(give);
            self.open_more(&mut inner);
        }
        let given = take.await;
        wait.answered = true;
        drop(wait);
        match given {
            Ok(Ok(lease)) => Ok(lease),
            Ok(Err(failure)) => {
                metrics.rq_pending_failure_eject.inc();
                Err(Refusal::Failed(failure))
            }
            // A pool answers everybody who waits; it cannot go away while it is borrowed here.
            Err(_) => Err(Refusal::Overflow(Error::local(Kind::Internal))),
        }
    }

    /// A connection that is free now, and how long it has been idle.
    fn take_free(self: &Arc<Self>) -> Option<(Lease, Duration)> {
        if self.key.h2 { self.take_stream() } else { self.take_idle() }
    }

    fn take_idle(self: &Arc<Self>) -> Option<(Lease, Duration)> {
        let mut inner = self.inner();
        if inner.idle.is_empty() {
            return None;
        }
        let now = Instant::now();
        let mut busy = Vec::new();
        let found = loop {
            let Some(idle) = inner.idle.pop() else { break None };
            if idle.sender.is_closed() || idle.line.closing.load(Relaxed) {
                continue;
            }
            let age = idle.line.idle_from().map_or(Duration::ZERO, |from| now.duration_since(from));
            if age >= self.usable_idle(&inner.habit, &idle.line) {
                idle.line.closing.store(true, Relaxed);
                continue;
            }
            if !idle.sender.is_ready() {
                // Its driver has not finished the last exchange yet.
                busy.push(idle);
                continue;
            }
            inner.habit.survived(age);
            break Some((idle, age));
        };
        inner.idle.append(&mut busy);
        drop(inner);
        let (Idle { sender, line, served }, age) = found?;
        line.set_idle(None);
        Some((Lease::h1(self, line, sender, served), age))
    }

    /// How long a connection may have been idle to be used again: as the peer announced, as it is known to do, or as
    /// configuration says, whichever is shortest.
    fn usable_idle(&self, habit: &Habit, line: &Line) -> Duration {
        let configured = self.idle_timeout().unwrap_or(Duration::MAX);
        let announced = match line.keep_alive.load(Relaxed) {
            0 => Duration::MAX,
            millis => Duration::from_millis(millis),
        };
        configured.min(announced).min(habit.usable())
    }

    fn take_stream(self: &Arc<Self>) -> Option<(Lease, Duration)> {
        let most = self.streams_at_once();
        let mut inner = self.inner();
        let shared = inner.shared.iter_mut().find(|s| s.has_room(most))?;
        let idle_from = shared.line.idle_from();
        let lease = self.lease_stream(shared);
        drop(inner);
        Some((lease, idle_from.map_or(Duration::ZERO, |from| from.elapsed())))
    }

    fn lease_stream(self: &Arc<Self>, shared: &mut Shared) -> Lease {
        let reused = shared.served > 0;
        shared.active += 1;
        shared.served += 1;
        if shared.served >= self.requests_per_connection() {
            shared.line.closing.store(true, Relaxed);
            self.place.metrics.cx_max_requests.inc();
        }
        shared.line.set_idle(None);
        Lease::h2(self, Arc::clone(&shared.line), shared.sender.clone(), reused)
    }

    fn streams_at_once(&self) -> u32 {
        self.place.config.http.http2.max_concurrent_streams.unwrap_or(u32::MAX).max(1)
    }

    pub(super) fn requests_per_connection(&self) -> u32 {
        match self.place.config.http.max_requests_per_connection {
            None | Some(0) => u32::MAX,
            Some(most) => most,
        }
    }

    fn idle_timeout(&self) -> Option<Duration> {
        Some(self.place.config.http.idle_timeout.unwrap_or(IDLE)).filter(|limit| !limit.is_zero())
    }

    /// Opens as many connections as those that wait need, within the limit; a pool without any gets its first one in any
    /// case.
    fn open_more(self: &Arc<Self>, inner: &mut Inner) {
        let capacity = if self.key.h2 { self.streams_at_once().min(self.requests_per_connection()) } else { 1 };
        while inner.connecting.saturating_mul(capacity as usize) < inner.waiting.len() {
            let permit = match Permit::take(&self.breakers, Limit::Connections) {
                Ok(permit) => permit,
                Err(_) if inner.open + inner.connecting == 0 => Permit::force(&self.breakers, Limit::Connections),
                Err(_) => return self.place.metrics.cx_overflow.inc(),
            };
            inner.connecting += 1;
            let connected = Connected::new(permit, &self.place.host.stats, &self.place.metrics);
            tokio::spawn(Arc::clone(self).open(connected));
        }
    }

    async fn open(self: Arc<Self>, connected: Connected) {
        match conn::establish(&self, &self.key, connected).await {
            Ok((Sender::H1(sender), line)) => {
                let mut inner = self.inner();
                inner.connecting -= 1;
                inner.open += 1;
                drop(inner);
                self.put(Lease::h1(&self, line, sender, 0));
            }
            Ok((Sender::H2(sender), line)) => {
                let mut inner = self.inner();
                inner.connecting -= 1;
                inner.open += 1;
                inner.shared.push(Shared { sender, line, active: 0, served: 0 });
                drop(inner);
                self.serve_waiting();
            }
            Err(failure) => self.failed(&failure),
        }
    }

    /// Everybody who waits is told: if one connection cannot be opened the next would most likely fail too.
    fn failed(&self, failure: &Failure) {
        let mut inner = self.inner();
        inner.connecting -= 1;
        let waiting = std::mem::take(&mut inner.waiting);
        drop(inner);
        for one in waiting {
            // Whoever does not wait any more does not need to know.
            let _ = one.send(Err(failure.clone()));
        }
    }

    /// A free HTTP/1 connection: to who waits longest, or to the idle ones.
    pub(super) fn put(self: &Arc<Self>, mut lease: Lease) {
        loop {
            let mut inner = self.inner();
            let Some(waiting) = inner.waiting.pop_front() else {
                if inner.retired || lease.line.closing.load(Relaxed) {
                    drop(inner);
                    lease.held = None;
                    return;
                }
                if let Some(Held::H1 { sender, served }) = lease.held.take() {
                    lease.line.set_idle(Some(Instant::now()));
                    inner.idle.push(Idle { sender, line: Arc::clone(&lease.line), served });
                }
                return;
            };
            drop(inner);
            lease.line.set_idle(None);
            match waiting.send(Ok(lease)) {
                Err(Ok(back)) => lease = back,
                Ok(()) | Err(Err(_)) => return,
            }
        }
    }

    /// Streams for those who wait, as long as there is room.
    fn serve_waiting(self: &Arc<Self>) {
        loop {
            let mut inner = self.inner();
            if inner.waiting.is_empty() {
                return;
            }
            let most = self.streams_at_once();
            let Some(shared) = inner.shared.iter_mut().find(|s| s.has_room(most)) else {
                return self.open_more(&mut inner);
            };
            let lease = self.lease_stream(shared);
            let waiting = inner.waiting.pop_front();
            drop(inner);
            // A lease that nobody takes gives its stream back when it is dropped here, outside the lock.
            drop(waiting.map(|waiting| waiting.send(Ok(lease))));
        }
    }

    pub(super) fn end_stream(self: &Arc<Self>, line: &Arc<Line>) {
        let mut inner = self.inner();
        let retired = inner.retired;
        let mut ended = None;
        if let Some(at) = inner.shared.iter().position(|s| Arc::ptr_eq(&s.line, line)) {
            let shared = &mut inner.shared[at];
            shared.active -= 1;
            if shared.active == 0 {
                shared.line.set_idle(Some(Instant::now()));
                if retired || line.closing.load(Relaxed) {
                    ended = Some(inner.shared.swap_remove(at));
                }
            }
        }
        drop(inner);
        // The last sender says goodbye to the peer.
        drop(ended);
        self.serve_waiting();
    }

    /// When the driver should look at the connection next.
    pub(super) fn deadline(&self, line: &Line) -> Option<Instant> {
        let idle = self.idle_timeout().map(|limit| line.idle_from().unwrap_or_else(Instant::now) + limit);
        let age = self.place.config.http.max_connection_duration.map(|limit| line.born + limit);
        let age = age.filter(|_| !line.closing.load(Relaxed));
        match (idle, age) {
            (Some(idle), Some(age)) => Some(idle.min(age)),
            (idle, age) => idle.or(age),
        }
    }

    /// Whether a connection's time is over and nobody uses it; then it is out of the pool.
    pub(super) fn expire(&self, line: &Arc<Line>) -> bool {
        let now = Instant::now();
        let idle_from = line.idle_from();
        let is_idle = idle_from.zip(self.idle_timeout()).is_some_and(|(from, limit)| now >= from + limit);
        let lifetime = self.place.config.http.max_connection_duration;
        let is_old = lifetime.is_some_and(|limit| now >= line.born + limit);
        if is_old {
            line.closing.store(true, Relaxed);
        }
        let over = idle_from.is_some() && (is_idle || is_old);
        if over {
            let metrics = &self.place.metrics;
            if is_old {
                metrics.cx_max_duration.inc()
            } else {
                metrics.cx_idle_timeout.inc()
            }
            self.inner().forget(line);
        }
        over
    }

    /// A connection has ended; `by_peer` if we did not end it.
    pub(super) fn closed(self: &Arc<Self>, line: &Arc<Line>, by_peer: bool) {
        let mut inner = self.inner();
        inner.open -= 1;
        let metrics = &self.place.metrics;
        let by_peer = by_peer && !line.closing.load(Relaxed);
        if by_peer {
            metrics.cx_destroy_remote.inc()
        } else {
            metrics.cx_destroy_local.inc()
        }
        if let Some(from) = line.idle_from().filter(|_| by_peer) {
            inner.habit.closed(from.elapsed());
        }
        inner.forget(line);
        self.open_more(&mut inner);
    }

    /// The host is gone or its socket has changed: nothing is kept any more, what is in use may finish.
    pub(super) fn retire(&self) {
        let mut inner = self.inner();
        inner.retired = true;
        let idle = std::mem::take(&mut inner.idle);
        for line in idle.iter().map(|idle| &idle.line).chain(inner.shared.iter().map(|shared| &shared.line)) {
            line.closing.store(true, Relaxed);
        }
        let (unused, used) = std::mem::take(&mut inner.shared).into_iter().partition(|s: &Shared| s.active == 0);
        inner.shared = used;
        drop(inner);
        drop::<(Vec<Idle>, Vec<Shared>)>((idle, unused));
    }

    /// Open connections and those being opened.
    pub(super) fn size(&self) -> usize {
        let inner = self.inner();
        inner.open + inner.connecting
    }
}

impl Inner {
    fn forget(&mut self, line: &Arc<Line>) {
        self.idle.retain(|idle| !Arc::ptr_eq(&idle.line, line));
        self.shared.retain(|shared| !Arc::ptr_eq(&shared.line, line));
    }
}

impl Shared {
    fn has_room(&self, most: u32) -> bool {
        let room = self.line.streams.load(Relaxed).min(most);
        self.active < room && !self.line.closing.load(Relaxed) && !self.sender.is_closed()
    }
}

/// Takes a request that is given up out of the queue.
struct Waiting<'a> {
    pool: &'a Pool,
    answered: bool,
    _pending: Permit,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let metrics = &self.pool.place.metrics;
        metrics.rq_pending_active.dec();
        if self.answered {
            return;
        }
        metrics.rq_cancelled.inc();
        // The receiver goes first when the future is dropped, so its sender is closed by now.
        self.pool.inner().waiting.retain(|waiting| !waiting.is_closed());
    }
}
