//! Real workers on loopback: connections are spread exactly, sockets follow the configuration, goodbyes come in order.

#[path = "support/tcp.rs"]
mod tcp;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use istio_proxy::drain::{Drain, Phase};
use istio_proxy::proxy::Node;
use istio_proxy::snapshot::{self, Snapshot};
use istio_proxy::telemetry::{LogOptions, Logs, NodeLabels, Telemetry};
use istio_proxy::tls::Secrets;
use istio_proxy::worker::{Settings, Workers};
use proxy_config::Model;
use proxy_config::model::{Direction, Transport};
use tcp::{cluster, echo, free, listener};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

/// How long an event may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);

fn compiled(app: SocketAddr, listeners: &[(SocketAddr, Direction)]) -> Arc<Snapshot> {
    let mut model = Model::default();
    model.clusters.insert("app".into(), Arc::new(cluster("app", app, Transport::Raw)));
    for (address, direction) in listeners {
        let listener = listener(*address, *direction, "app", None);
        model.listeners.insert(Arc::clone(&listener.name), Arc::new(listener));
    }
    let (snapshot, rejects) = snapshot::compile(None, &model, &Secrets::new());
    assert!(rejects.is_empty(), "{rejects:?}");
    Arc::new(snapshot)
}

struct Proxy {
    workers: Workers,
    snapshots: watch::Sender<Arc<Snapshot>>,
    drain: Drain,
    telemetry: Arc<Telemetry>,
}

fn start(count: usize, snapshot: &Arc<Snapshot>) -> Proxy {
    limited(count, snapshot, None)
}

/// With a number of connections that are enough.
fn limited(count: usize, snapshot: &Arc<Snapshot>, refuse_above: Option<usize>) -> Proxy {
    let (drain, leaving) = Drain::new();
    let (snapshots, receiver) = watch::channel(Arc::clone(snapshot));
    let telemetry = Telemetry::new(NodeLabels::default());
    let logs = Arc::new(Logs::start(LogOptions::default(), &telemetry).expect("a thread"));
    let settings = Settings {
        snapshots: receiver,
        drain: leaving,
        node: Node::default(),
        telemetry: Arc::clone(&telemetry),
        logs,
        connections: usize::MAX,
        refuse_above,
    };
    let mut workers = Workers::start(count, &settings).expect("threads");
    let failed = workers.sockets(snapshot);
    assert!(failed.is_empty(), "{failed:?}");
    Proxy { workers, snapshots, drain, telemetry }
}

impl Proxy {
    fn active(&self) -> Vec<usize> {
        self.workers.handles().iter().map(|worker| worker.load().active.load(Ordering::Relaxed)).collect()
    }
}

async fn speak(client: &mut TcpStream) -> std::io::Result<()> {
    client.write_all(b"x").await?;
    client.read_exact(&mut [0]).await.map(drop)
}

/// A connection that has been served.
async fn connected(to: SocketAddr) -> TcpStream {
    let mut client = timeout(LIMIT, TcpStream::connect(to)).await.expect("in time").expect("accepted");
    timeout(LIMIT, speak(&mut client)).await.expect("in time").expect("echoed");
    client
}

#[tokio::test]
async fn few_long_connections_are_spread_exactly() {
    let (app, at) = (echo().await, free().await);
    let proxy = start(3, &compiled(app, &[(at, Direction::Inbound)]));
    let mut open = Vec::new();
    for round in 1..=3 {
        for _ in 0..3 {
            open.push(connected(at).await);
        }
        assert_eq!(proxy.active(), [round; 3]);
    }
    drop(open);
    timeout(LIMIT, proxy.drain.wait_for_zero()).await.expect("all connections end");
    assert_eq!(proxy.active(), [0; 3]);
}

#[tokio::test]
async fn connections_above_a_limit_are_closed_at_once_and_counted() {
    let (app, at) = (echo().await, free().await);
    let proxy = limited(2, &compiled(app, &[(at, Direction::Inbound)]), Some(3));
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(connected(at).await);
    }
    let refused = |n: u64| {
        let samples = proxy.telemetry.samples();
        let count = samples.iter().filter(|sample| sample.name == "downstream_global_cx_overflow");
        assert_eq!(count.map(|sample| format!("{:?}", sample.value)).collect::<Vec<_>>(), [format!("Counter({n})")]);
    };
    for n in 1..=2 {
        let mut one_more = TcpStream::connect(at).await.expect("the kernel accepts");
        let end = timeout(LIMIT, one_more.read(&mut [0])).await.expect("in time");
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        refused(n);
    }
    assert_eq!(proxy.active().iter().sum::<usize>(), 3);
    // One goes, one comes.
    open.pop();
    let comes = async {
        loop {
            let Ok(mut client) = TcpStream::connect(at).await else { continue };
            if speak(&mut client).await.is_ok() {
                return client;
            }
        }
    };
    open.push(timeout(LIMIT, comes).await.expect("there is room again"));
}

#[tokio::test]
async fn sockets_follow_the_configuration() {
    let (app, first, second) = (echo().await, free().await, free().await);
    let mut proxy = start(2, &compiled(app, &[(first, Direction::Inbound)]));
    let mut kept = connected(first).await;
    let moved = compiled(app, &[(second, Direction::Inbound)]);
    proxy.snapshots.send_replace(Arc::clone(&moved));
    assert!(proxy.workers.sockets(&moved).is_empty());
    connected(second).await;
    let closed = async {
        while TcpStream::connect(first).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, closed).await.expect("the old socket is closed");
    speak(&mut kept).await.expect("open connections stay");
}

#[tokio::test]
async fn a_port_that_somebody_has_is_told() {
    let app = echo().await;
    let (_drain, leaving) = Drain::new();
    let snapshot = compiled(app, &[(app, Direction::Inbound)]);
    let (_snapshots, receiver) = watch::channel(Arc::clone(&snapshot));
    let telemetry = Telemetry::new(NodeLabels::default());
    let logs = Arc::new(Logs::start(LogOptions::default(), &telemetry).expect("a thread"));
    let settings = Settings {
        snapshots: receiver,
        drain: leaving,
        node: Node::default(),
        telemetry,
        logs,
        connections: usize::MAX,
        refuse_above: None,
    };
    let failed = Workers::start(2, &settings).expect("threads").sockets(&snapshot);
    assert_eq!(failed.len(), 1);
    assert_eq!((failed[0].0, failed[0].1.kind()), (app, std::io::ErrorKind::AddrInUse));
}

#[tokio::test]
async fn goodbyes_come_in_order() {
    let (app, inbound, outbound) = (echo().await, free().await, free().await);
    let mut proxy = start(2, &compiled(app, &[(inbound, Direction::Inbound), (outbound, Direction::Outbound)]));
    let mut open = connected(inbound).await;

    proxy.drain.enter(Phase::Lame);
    connected(inbound).await;

    proxy.drain.enter(Phase::Closing);
    let refused = async {
        while TcpStream::connect(inbound).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, refused).await.expect("peers are refused");
    connected(outbound).await;
    speak(&mut open).await.expect("what is open is served on");

    proxy.drain.enter(Phase::Gone);
    timeout(LIMIT, proxy.workers.all_ended()).await.expect("workers end");
    assert!(speak(&mut open).await.is_err(), "what was left is cut");
}
