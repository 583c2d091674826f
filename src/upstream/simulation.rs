//! One seeded simulation of everything in this module together: servers that misbehave, clients that leave, host sets that
//! change, under a virtual clock. After each step the accounts must be right; in the end nothing may be left.
//!
//! `SIMULATION_SEED=n` repeats a run, `SIMULATION_ROUNDS=n` makes it longer.
#![cfg(test)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::BodyExt;
use proxy_config::model::{Cluster, Endpoints, OutlierDetection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

use super::fixture::{cluster, endpoint, group, joined, shared};
use super::*;
use crate::error::Kind;
use crate::snapshot::action::RetryOn;

const HOSTS: usize = 6;
const STEPS: usize = 400;
const MAX_CONNECTIONS: u32 = 8;
const MAX_PENDING: u32 = 6;
const MAX_REQUESTS: u32 = 10;
const MAX_RETRIES: u32 = 3;

/// How often each request that may not be repeated was read by a server.
type Seen = Arc<std::sync::Mutex<HashMap<u64, u32>>>;

struct Servers {
    rng: fastrand::Rng,
    seen: Seen,
    running: Vec<(SocketAddr, Option<JoinHandle<()>>)>,
}

impl Servers {
    async fn start(rng: &mut fastrand::Rng) -> Self {
        let mut servers = Self { rng: rng.fork(), seen: Seen::default(), running: Vec::new() };
        for _ in 0..HOSTS {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            servers.running.push((address, None));
            let at = servers.running.len() - 1;
            servers.run(at, listener);
        }
        servers
    }

    fn run(&mut self, at: usize, listener: TcpListener) {
        let (mut rng, seen) = (self.rng.fork(), Arc::clone(&self.seen));
        let task = tokio::spawn(async move {
            // What a listener accepted dies with it.
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(misbehave(stream, rng.fork(), Arc::clone(&seen)));
            }
        });
        self.running[at].1 = Some(task);
    }

    /// Stops a running server or starts a stopped one.
    async fn toggle(&mut self) {
        let at = self.rng.usize(..HOSTS);
        if let Some(task) = self.running[at].1.take() {
            task.abort();
            let _ = task.await;
            return;
        }
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.running[at].0).unwrap();
        self.run(at, socket.listen(64).unwrap());
    }

    /// Some of the hosts, on two priorities.
    fn hosts(&mut self) -> Endpoints {
        let mut levels = [Vec::new(), Vec::new()];
        for (address, _) in &self.running {
            match self.rng.u8(..4) {
                0 => {}
                1 => levels[1].push(endpoint(*address, self.rng.u32(1..3))),
                _ => levels[0].push(endpoint(*address, self.rng.u32(1..3))),
            }
        }
        let groups = (0..).zip(levels).map(|(priority, hosts)| group(priority, None, hosts));
        Endpoints { localities: groups.collect(), ..Endpoints::default() }
    }
}

async fn misbehave(mut stream: TcpStream, mut rng: fastrand::Rng, seen: Seen) {
    loop {
        let mut request = Vec::new();
        let mut chunk = [0; 512];
        while !request.ends_with(b"\r\n\r\n") && !request.ends_with(b"!") {
            match stream.read(&mut chunk).await {
                Ok(0) | Err(_) => return,
                Ok(n) => request.extend_from_slice(&chunk[..n]),
            }
        }
        let text = String::from_utf8(request).unwrap();
        if let Some(id) = text.lines().find_map(|line| line.strip_prefix("x-once: ")) {
            *seen.lock().unwrap().entry(id.parse().unwrap()).or_default() += 1;
        }
        let pause = Duration::from_millis(rng.u64(..300));
        let reply: &[u8] = match rng.u8(..16) {
            0 => return,
            1 | 2 => b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n",
            3 => b"HTTP/1.1 500 No\r\ncontent-length: 3\r\n\r\nbad",
            4 => b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
            5 => b"HTTP/1.1 2",
            6 => b"\x16\x03\x01",
            7 => b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
            _ => b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        };
        if rng.bool() {
            sleep(pause).await;
        }
        if stream.write_all(reply).await.is_err() {
            return;
        }
        match rng.u8(..10) {
            // Half an answer, or a quiet goodbye at the moment when the connection becomes idle or a while later.
            0 => return,
            1 => {
                sleep(pause).await;
                return;
            }
            2 => sleep(Duration::from_secs(rng.u64(..5))).await,
            _ => {}
        }
    }
}

fn config(rng: &mut fastrand::Rng) -> Cluster {
    let mut config = cluster("simulated");
    config.limits.max_connections = MAX_CONNECTIONS;
    config.limits.max_pending_requests = MAX_PENDING;
    config.limits.max_requests = MAX_REQUESTS;
    config.limits.max_retries = MAX_RETRIES;
    config.connect_timeout = Some(Duration::from_millis(200));
    config.http.idle_timeout = Some(Duration::from_millis(700));
    config.http.max_requests_per_connection = rng.bool().then(|| rng.u32(1..8));
    config.http.max_connection_duration = rng.bool().then_some(Duration::from_secs(3));
    config.outlier = Some(OutlierDetection {
        consecutive_5xx: Some(rng.u32(1..4)),
        interval: Some(Duration::from_millis(500)),
        base_ejection_time: Some(Duration::from_secs(1)),
        max_ejection_percent: Some(50),
        ..OutlierDetection::default()
    });
    config
}

fn policy(rng: &mut fastrand::Rng) -> RetryPolicy {
    RetryPolicy {
        on: RetryOn::SERVER_ERROR.and(RetryOn::CONNECT_FAILURE),
        retries: rng.u32(1..4),
        per_try_timeout: rng.bool().then_some(Duration::from_millis(120)),
        statuses: Box::default(),
        avoid_previous_hosts: rng.bool(),
        host_selection_attempts: 5,
        previous_priorities: rng.bool().then_some(2),
        backoff_base: Duration::from_millis(25),
        backoff_max: Duration::from_millis(250),
    }
}

/// One request, whatever becomes of it. Without a policy a POST must never be read twice.
async fn client(local: Arc<ClusterLocal>, mut rng: fastrand::Rng, id: u64) {
    let policy = rng.bool().then(|| policy(&mut rng));
    let call =
        Call { retry: policy.as_ref(), timeout: rng.bool().then_some(Duration::from_millis(400)), ..Call::new(&local) };
    let post = rng.bool();
    let mut request = Request::builder().uri("/").header("host", "simulated");
    if post && policy.is_none() {
        request = request.header("x-once", id);
    }
    let method = if post { Method::POST } else { Method::GET };
    let body = if post { Body::full(Bytes::from_static(b"body!")) } else { Body::empty() };
    let parts = request.method(method).body(()).unwrap().into_parts().0;
    let mut trace = Trace::default();
    match send(&call, parts, body, &mut trace).await {
        Ok(answer) => {
            if rng.u8(..5) != 0 {
                let _ = answer.body.collect().await;
            }
        }
        Err(error) => {
            assert_ne!(error.kind, Kind::Internal);
            assert!(!trace.flags.is_empty(), "{error}");
        }
    }
    assert!(trace.attempts <= 1 + policy.map_or(0, |p| p.retries));
}

struct World {
    rng: fastrand::Rng,
    servers: Servers,
    local: Arc<ClusterLocal>,
    clients: Vec<JoinHandle<()>>,
    next_id: u64,
}

impl World {
    async fn step(&mut self) {
        match self.rng.u8(..20) {
            0..=8 => {
                self.next_id += 1;
                let client = client(Arc::clone(&self.local), self.rng.fork(), self.next_id);
                self.clients.push(tokio::spawn(client));
            }
            9 if !self.clients.is_empty() => {
                let one = self.rng.usize(..self.clients.len());
                self.clients.swap_remove(one).abort();
            }
            10 => self.servers.toggle().await,
            11 => {
                let hosts = self.servers.hosts();
                let next = joined(Arc::new(self.local.shared.with_hosts(&hosts)), Some(&self.local));
                self.local.retire(Some(&next));
                self.local = next;
            }
            12 => sleep(Duration::from_secs(self.rng.u64(..4))).await,
            _ => sleep(Duration::from_millis(self.rng.u64(..60))).await,
        }
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
    }

    /// What must be true at any moment.
    async fn check_invariants(&mut self) {
        let mut running = Vec::new();
        for client in std::mem::take(&mut self.clients) {
            if client.is_finished() {
                client.await.expect("a client never panics");
            } else {
                running.push(client);
            }
        }
        self.clients = running;
        let breakers = &self.local.shared.breakers;
        assert!(breakers.requests.used() <= MAX_REQUESTS);
        assert!(breakers.pending.used() <= MAX_PENDING);
        assert!(breakers.retries.used() <= MAX_RETRIES);
        // Each pool may force one connection, and there is one pool for each address that ever was.
        assert!(breakers.connections.used() <= MAX_CONNECTIONS + HOSTS as u32);
        assert!(breakers.requests.used() as usize + breakers.pending.used() as usize <= self.clients.len());
        let hosts = &self.local.shared.hosts().all;
        assert!(breakers.ejected.load(Relaxed) as usize <= HOSTS);
        for host in hosts {
            assert!(host.stats.active.load(Relaxed) <= MAX_REQUESTS);
            assert!(host.stats.totals.connections.load(Relaxed) <= MAX_CONNECTIONS + HOSTS as u32);
        }
    }

    /// Everybody leaves; then nothing may be in use, and what is idle goes in its time.
    async fn end(mut self) -> u64 {
        for client in self.clients.drain(..) {
            let abort = client.abort_handle();
            if self.rng.bool() {
                abort.abort();
            }
            // Half an answer may keep a client without a limit for ever; it has to be told.
            match tokio::time::timeout(Duration::from_secs(5), client).await {
                Ok(ended) => assert!(!ended.is_err_and(|e| e.is_panic()), "a client never panics"),
                Err(_) => abort.abort(),
            }
        }
        sleep(Duration::from_secs(1)).await;
        let shared = Arc::clone(&self.local.shared);
        let used = || {
            let b = &shared.breakers;
            (b.requests.used(), b.pending.used(), b.retries.used())
        };
        assert_eq!(used(), (0, 0, 0));
        assert!(shared.hosts().all.iter().all(|host| host.stats.active.load(Relaxed) == 0));
        sleep(Duration::from_secs(20)).await;
        assert_eq!(shared.breakers.connections.used(), 0);
        assert_eq!(shared.breakers.ejected.load(Relaxed), 0, "every ejection has an end");
        assert_eq!((self.local.connections(), self.local.metrics.cx_active.value()), (0, 0));
        assert_eq!((self.local.metrics.rq_active.value(), self.local.metrics.rq_pending_active.value()), (0, 0));
        let seen = self.servers.seen.lock().unwrap();
        assert!(seen.values().all(|times| *times == 1), "a request that must not be repeated was");
        self.local.metrics.rq_total.value()
    }
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[tokio::test(start_paused = true)]
async fn accounts_balance_whatever_happens() {
    let first = from_env("SIMULATION_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    for seed in first..first + from_env("SIMULATION_ROUNDS").unwrap_or(10) {
        println!("SIMULATION_SEED={seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut servers = Servers::start(&mut rng).await;
        let hosts = servers.hosts();
        let local = joined(shared(config(&mut rng), &hosts), None);
        let mut world = World { rng, servers, local, clients: Vec::new(), next_id: 0 };
        for _ in 0..STEPS {
            world.step().await;
            world.check_invariants().await;
        }
        assert!(world.end().await > 20, "hardly anything happened");
    }
}
