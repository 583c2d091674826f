//! Limits and ejection of the guide's DestinationRules (Y14, Y15): one worker's upstream side against servers on loopback
//! that stand for the guide's machines.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Request, StatusCode};
use http_body_util::BodyExt;
use istio_proxy::error::{Flags, Kind, Limit};
use istio_proxy::upstream::{self, Body, Call, ClusterLocal, TcpCall, TcpUpstream, Trace, View};
use proxy_config::model::{Address, Endpoint, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::world::{POD2, Who, World, Yaml, closed};

const PAYMENT: &str = "outbound|8080||payment-service.payments.svc.cluster.local";
const CANARY: &str = "outbound|8080|vm-version|payment-service.payments.svc.cluster.local";
const DATABASE: &str = "outbound|5432||legacy-database.hybrid-app.svc.cluster.local";

/// A server that answers every request with one status, once its gate is open.
struct Server {
    address: SocketAddr,
    /// Requests of each connection.
    requests: Arc<Mutex<Vec<u32>>>,
    gate: watch::Sender<bool>,
}

impl Server {
    async fn start(status: u16, open: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (gate, opened) = watch::channel(open);
        let seen = Arc::clone(&requests);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let number = {
                    let mut all = seen.lock().expect("no panic");
                    all.push(0);
                    all.len() - 1
                };
                tokio::spawn(answer(stream, status, number, Arc::clone(&seen), opened.clone()));
            }
        });
        Self { address, requests, gate }
    }

    fn connections(&self) -> Vec<u32> {
        self.requests.lock().expect("no panic").clone()
    }
}

async fn answer(
    mut stream: TcpStream,
    status: u16,
    number: usize,
    seen: Arc<Mutex<Vec<u32>>>,
    mut gate: watch::Receiver<bool>,
) {
    let mut head = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).await.is_ok_and(|n| n == 1) {
        head.push(byte[0]);
        if !head.ends_with(b"\r\n\r\n") {
            continue;
        }
        head.clear();
        seen.lock().expect("no panic")[number] += 1;
        if gate.wait_for(|open| *open).await.is_err() {
            return;
        }
        let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\nok");
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// A worker's part of a cluster whose endpoints are these addresses, in plaintext.
fn cluster(world: &World, name: &str, addresses: &[SocketAddr]) -> Arc<ClusterLocal> {
    let world = world.changed(|model| {
        let said = Arc::make_mut(model.clusters.get_mut(name).expect("the cluster"));
        said.transport_matches.clear();
        said.transport = Transport::Raw;
        if let Some(said) = model.endpoints.get_mut(name) {
            let said = Arc::make_mut(said);
            let mut group = said.localities.iter().find(|l| !l.endpoints.is_empty()).expect("an endpoint").clone();
            let like = group.endpoints.remove(0);
            group.priority = 0;
            let endpoint = |to: &SocketAddr| Endpoint { address: Address::Socket(*to), ..like.clone() };
            group.endpoints = addresses.iter().map(endpoint).collect();
            said.localities = vec![group];
        }
    });
    let view = View::new(Arc::clone(&world.snapshot), None);
    Arc::clone(view.cluster(world.snapshot.cluster_id(name).expect("the cluster")))
}

/// One request; `destination` is for inbound clusters.
async fn get(cluster: &Arc<ClusterLocal>, destination: Option<SocketAddr>) -> Result<StatusCode, (Kind, Flags)> {
    let parts = Request::get("/api/v1/x").header("host", "payment-service").body(()).expect("a request").into_parts().0;
    let mut trace = Trace::default();
    let call = Call { original_dst: destination, ..Call::new(cluster) };
    match upstream::send(&call, parts, Body::empty(), &mut trace).await {
        Ok(answer) => {
            let status = answer.head.status;
            answer.body.collect().await.expect("a whole body");
            Ok(status)
        }
        Err(error) => Err((error.kind, trace.flags)),
    }
}

/// Clusters that Y14 limits: the client's, and the one in front of the machine's own application.
fn limited() -> [(&'static str, World, &'static str); 2] {
    [
        ("T43, T45", Yaml::seed().labelled().load(Who::Frontend), CANARY),
        ("T46, T45 at the server", Yaml::seed().load(Who::Vm), "inbound|8080||"),
    ]
}

#[tokio::test]
async fn t43_t46_two_hundred_slow_requests_at_once() {
    for (t, world, name) in limited() {
        let server = Server::start(200, false).await;
        let cluster = cluster(&world, name, &[server.address]);
        let destination = Some(server.address).filter(|_| name.starts_with("inbound"));
        let mut calls = tokio::task::JoinSet::new();
        let mut call = |n: u32| {
            for _ in 0..n {
                let cluster = Arc::clone(&cluster);
                calls.spawn(async move { get(&cluster, destination).await });
            }
        };
        // While their connections are being opened requests count as waiting: first as many as there are connections.
        call(50);
        while server.connections().iter().sum::<u32>() < 50 {
            tokio::task::yield_now().await;
        }
        call(150);
        // The surplus is refused while nothing is answered yet.
        let mut refused = 0;
        while refused < 50 {
            let (kind, flags) = calls.join_next().await.expect("a call").expect("no panic").expect_err("all wait");
            assert_eq!((kind, flags), (Kind::Overflow(Limit::Pending), Flags::UO), "{t}");
            refused += 1;
        }
        assert!(server.connections().len() <= 50, "{t}");
        server.gate.send(true).expect("the server runs");
        while let Some(call) = calls.join_next().await {
            assert_eq!(call.expect("no panic"), Ok(StatusCode::OK), "{t}");
        }
        assert_eq!(server.connections().len(), 50, "{t}");
        assert_eq!(server.connections().iter().sum::<u32>(), 150, "{t}");
    }
}

#[tokio::test]
async fn t45_a_connection_serves_a_hundred_requests() {
    for (t, world, name) in limited() {
        let server = Server::start(200, true).await;
        let cluster = cluster(&world, name, &[server.address]);
        let destination = Some(server.address).filter(|_| name.starts_with("inbound"));
        for _ in 0..250 {
            assert_eq!(get(&cluster, destination).await, Ok(StatusCode::OK), "{t}");
        }
        assert_eq!(server.connections(), [100, 100, 50], "{t}");
    }
}

/// Addresses of ejected hosts with the seconds that are left.
fn ejected(cluster: &ClusterLocal) -> Vec<(SocketAddr, u64)> {
    let shared = &cluster.shared;
    let out = shared.hosts().all.iter().filter_map(|host| {
        let until = host.stats.ejection.until.load(Relaxed);
        (until != 0).then(|| (host.address, until.saturating_sub(shared.breakers.clock()).div_ceil(1000)))
    });
    out.collect()
}

#[tokio::test]
async fn t47_five_failures_in_a_row() {
    let world = Yaml::seed().without(&["Y12", "Y13"]).with("POD2", POD2).load(Who::Frontend);
    // (servers' statuses, failures among 100 requests, ejected)
    for (t, statuses, failures, out) in [
        ("T47: one fails", &[500, 200][..], 5, 1),
        ("T47: both fail, half may go", &[500, 500], 100, 1),
        ("T47: the only one stays", &[500], 100, 0),
    ] {
        let mut servers = Vec::new();
        for status in statuses {
            servers.push(Server::start(*status, true).await);
        }
        let addresses: Vec<_> = servers.iter().map(|s| s.address).collect();
        let cluster = cluster(&world, PAYMENT, &addresses);
        let mut failed = 0;
        for _ in 0..100 {
            let status = get(&cluster, None).await.expect("an answer");
            failed += u32::from(status == StatusCode::INTERNAL_SERVER_ERROR);
        }
        assert_eq!(failed, failures, "{t}");
        let ejected = ejected(&cluster);
        assert_eq!(ejected.len(), out, "{t}");
        for (address, seconds) in ejected {
            assert_eq!(seconds, 60, "{t}: baseEjectionTime");
            assert!(servers.iter().zip(statuses).any(|(s, status)| s.address == address && *status == 500), "{t}");
        }
    }
}

async fn connect(cluster: &Arc<ClusterLocal>, to: Option<SocketAddr>) -> Result<TcpUpstream, (Kind, Flags)> {
    let call = TcpCall { cluster, max_connect_attempts: 1, hash: None, original_dst: to, client: None };
    let mut trace = Trace::default();
    upstream::connect_tcp(&call, &mut trace).await.map_err(|error| (error.kind, trace.flags))
}

#[tokio::test]
async fn t59_twenty_connections() {
    let client = Yaml::seed().with("ENTRY", ENTRY).load(Who::HybridApp);
    let server = Yaml::seed().load(Who::Database);
    for (t, world, name) in [("T59", client, DATABASE), ("T59 at the server", server, "inbound|5432||")] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let cluster = cluster(&world, name, &[address]);
        let destination = Some(address).filter(|_| name.starts_with("inbound"));
        let mut open = Vec::new();
        for _ in 0..20 {
            open.push(connect(&cluster, destination).await.expect("below the limit"));
        }
        for _ in 0..5 {
            let refused = connect(&cluster, destination).await.map(|_| ());
            assert_eq!(refused, Err((Kind::Overflow(Limit::Connections), Flags::UO)), "{t}");
        }
        open.pop();
        assert!(connect(&cluster, destination).await.is_ok(), "{t}: a closed connection frees its place");
    }
}

/// A machine behind the database's Service.
const ENTRY: &str = "apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: db1, namespace: hybrid-app}
spec: {address: 10.0.2.20, serviceAccount: legacy-db-sa, labels: {app: legacy-database}}
";

#[tokio::test]
async fn t61_refused_connections() {
    let world = Yaml::seed().with("ENTRY", ENTRY).load(Who::HybridApp);
    for (t, hosts, out) in [("T61: the only one stays", 1, 0), ("T61: one of ten may go", 10, 1)] {
        let (_held, addresses): (Vec<_>, Vec<_>) = (0..hosts).map(|_| closed()).unzip();
        let cluster = cluster(&world, DATABASE, &addresses);
        for _ in 0..60 {
            let refused = connect(&cluster, None).await.map(|_| ());
            assert_eq!(refused.expect_err("nobody listens").0, Kind::ConnectRefused, "{t}");
        }
        let ejected = ejected(&cluster);
        assert_eq!(ejected.len(), out, "{t}");
        assert!(ejected.iter().all(|(_, seconds)| *seconds == 30), "{t}: {ejected:?}");
    }
}

/// A host that does not answer at all: the guide's connectTimeout ends the wait.
#[tokio::test(start_paused = true)]
async fn t60_a_connection_takes_ten_seconds_at_most() {
    let world = Yaml::seed().with("ENTRY", ENTRY).load(Who::HybridApp);
    // A listener whose queue is full drops what comes, like a machine that is gone.
    let socket = socket_with_full_queue().await;
    let cluster = cluster(&world, DATABASE, &[socket.0]);
    let begin = tokio::time::Instant::now();
    let refused = connect(&cluster, None).await.map(|_| ());
    let (kind, flags) = refused.expect_err("nobody answers");
    assert_eq!((kind, flags.contains(Flags::UF)), (Kind::ConnectTimeout, true), "T60");
    assert_eq!(begin.elapsed(), Duration::from_secs(10), "T60");
}

async fn socket_with_full_queue() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let listener = socket.listen(1).expect("listening");
    let address = listener.local_addr().expect("bound");
    let mut held = Vec::new();
    // Backlog + 1 connections fit; the one after gets no answer.
    while let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_millis(50), TcpStream::connect(address)).await {
        held.push(stream);
    }
    (address, listener, held)
}
