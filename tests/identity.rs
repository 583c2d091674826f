//! The workload's certificate against a control plane of our own: the first one, renewal under load, a CA that is away, lies
//! or moves to another root, tokens that come and go, what is left on disk.

#[path = "support/tcp.rs"]
mod tcp;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bench_harness::istiod::{Answer, Ca, Istiod, Setup};
use istio_proxy::drain::Drain;
use istio_proxy::identity::{self, News, Output, Served, Socket, Source};
use istio_proxy::proxy::Node;
use istio_proxy::snapshot::{self, Snapshot};
use istio_proxy::telemetry::{LogOptions, Logs, NodeLabels, Telemetry};
use istio_proxy::tls::{Roots, Secrets};
use istio_proxy::worker::{self, Workers};
use proxy_config::Model;
use proxy_config::bootstrap::{Ca as Said, ClientFiles, ControlPlane, KeyKind, Roots as RootsFrom};
use proxy_config::model::{CommonTls, Direction, DownstreamTls, Transport, UpstreamTls, Validation};
use tcp::{cluster, echo, free, listener};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::Code;

/// How long an event may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
/// A renewal every fifth of a second, of certificates that outlast any hiccup of the machine.
const QUICK: Answer = Answer::SignFor(Duration::from_secs(21));
const QUICK_RATIO: f64 = 0.99;

const ID: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// A workload's folder with the roots of a control plane in it.
struct Workload {
    dir: TempDir,
    said: Said,
}

impl Workload {
    fn of(istiod: &Istiod) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let root = dir.path().join("istiod-root.pem");
        std::fs::write(&root, istiod.roots()).expect("written");
        std::fs::write(dir.path().join("token"), "first\n").expect("written");
        let server = ControlPlane {
            address: istiod.address().to_string(),
            name: Some(bench_harness::istiod::NAME.to_owned()),
            roots: Some(RootsFrom::File(root)),
            client: Some(ClientFiles { chain: dir.path().join("cert-chain.pem"), key: dir.path().join("key.pem") }),
            token: dir.path().join("token"),
            headers: vec![("ClusterID".to_owned(), "Kubernetes".to_owned())],
            keepalive: (Duration::from_secs(30), Duration::from_secs(10)),
        };
        let said = Said {
            server,
            trust_domain: "cluster.local".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "web".to_owned(),
            ttl: Duration::from_secs(3600),
            rotation_ratio: 0.5,
            rotation_jitter: 0.01,
            key: KeyKind::P256,
            pkcs8: false,
            cert_signer: String::new(),
        };
        Self { dir, said }
    }

    fn at(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    fn start(&self) -> watch::Receiver<News> {
        let output = Some(Output { folder: self.dir.path().to_owned(), mode: 0o600 });
        self.start_with(output, None)
    }

    fn start_with(
        &self,
        output: Option<Output>,
        anchors: Option<watch::Receiver<Vec<String>>>,
    ) -> watch::Receiver<News> {
        identity::start(identity::Settings {
            source: Source::Ca(Box::new(self.said.clone())),
            output,
            serve: None,
            anchors,
        })
    }
}

async fn until(news: &mut watch::Receiver<News>, holds: impl FnMut(&News) -> bool) -> News {
    timeout(LIMIT, news.wait_for(holds)).await.expect("in time").expect("it goes on asking").clone()
}

fn roots_of(news: &News) -> Vec<String> {
    news.secrets.roots("ROOTCA").expect("roots").info.iter().map(|root| root.serial.clone()).collect()
}

fn serial(news: &News) -> String {
    news.secrets.identity("default").expect("a certificate").info[0].serial.clone()
}

#[tokio::test]
async fn the_first_certificate_is_asked_for_as_the_agent_asks() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    let workload = Workload::of(&istiod);
    let mut news = workload.start();
    let first = until(&mut news, |news| news.renewals == 1).await;
    let identity = first.secrets.identity("default").expect("a certificate");
    assert_eq!(identity.info[0].sans, [ID]);
    assert!(first.trouble.is_none());
    let asked = istiod.ca.calls().all().remove(0);
    assert_eq!((asked.request.validity_duration, asked.request.signer()), (3600, Some("")));
    assert!(asked.request.csr.starts_with("-----BEGIN CERTIFICATE REQUEST-----\n"));
    let metadata = asked.metadata.into_headers();
    assert_eq!(metadata["authorization"], "Bearer first");
    assert_eq!(metadata["clusterid"], "Kubernetes");
    assert!(asked.peer.certificates.is_empty());
    assert_eq!((asked.peer.sni.as_deref(), asked.peer.alpn.as_deref()), (Some("istiod.istio-system.svc"), Some("h2")));
    for (file, blocks) in [("key.pem", 1), ("cert-chain.pem", 4), ("root-cert.pem", 1)] {
        let text = std::fs::read_to_string(workload.at(file)).expect("written");
        assert_eq!(text.matches("-----BEGIN").count(), blocks, "{file}");
        let mode = std::fs::metadata(workload.at(file)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    assert_eq!(std::fs::read_to_string(workload.at("root-cert.pem")).expect("written"), istiod.roots());
}

#[tokio::test]
async fn a_second_start_shows_the_certificate_of_the_first_and_an_expired_one_is_not_shown() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    let workload = Workload::of(&istiod);
    until(&mut workload.start(), |news| news.renewals == 1).await;
    std::fs::remove_file(workload.at("token")).expect("removed");
    until(&mut workload.start(), |news| news.renewals == 1).await;
    let calls = istiod.ca.calls().all();
    assert_eq!((calls[0].peer.certificates.len(), calls[1].peer.certificates.len()), (0, 4));
    assert!(!calls[1].metadata.clone().into_headers().contains_key("authorization"));

    let now = time::OffsetDateTime::now_utc();
    let hour = time::Duration::hours(1);
    let (chain, key) = istiod.ca.issue(ID, now - hour * 2, now - hour).expect("signed");
    std::fs::write(workload.at("cert-chain.pem"), chain).expect("written");
    std::fs::write(workload.at("key.pem"), key).expect("written");
    until(&mut workload.start(), |news| news.renewals == 1).await;
    assert!(istiod.ca.calls().all()[2].peer.certificates.is_empty());
}

#[tokio::test]
async fn a_ca_that_is_away_at_start_is_asked_until_it_is_there() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    istiod.server.set_down(true);
    let workload = Workload::of(&istiod);
    let mut news = workload.start();
    let tried = until(&mut news, |news| news.failures >= 2).await;
    assert!(tried.secrets.identity("default").is_none());
    assert!(tried.trouble.expect("told").contains(&istiod.address().to_string()));
    istiod.server.set_down(false);
    let first = until(&mut news, |news| news.renewals == 1).await;
    assert!(first.trouble.is_none());
}

#[tokio::test]
async fn a_ca_that_goes_away_later_costs_nothing() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    istiod.ca.then([QUICK]);
    let mut workload = Workload::of(&istiod);
    workload.said.rotation_ratio = QUICK_RATIO;
    istiod.ca.otherwise(Answer::Status(Code::Unavailable));
    let mut news = workload.start();
    let first = until(&mut news, |news| news.renewals == 1).await;
    let away = until(&mut news, |news| news.failures >= 1).await;
    assert_eq!(serial(&away), serial(&first));
    assert!(away.trouble.expect("told").contains("Unavailable"));
    // Five calls are one attempt, all with the same request.
    let calls = istiod.ca.calls().all();
    assert!(calls.len() >= 6 && calls[1..6].iter().all(|call| call.request == calls[1].request));
    istiod.ca.otherwise(Answer::Sign);
    let back = until(&mut news, |news| news.renewals == 2).await;
    assert!(back.trouble.is_none() && serial(&back) != serial(&first));
}

#[tokio::test]
async fn what_will_not_pass_is_not_repeated_at_once() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    istiod.ca.then([Answer::Status(Code::Unauthenticated)]);
    let workload = Workload::of(&istiod);
    let mut news = workload.start();
    let refused = until(&mut news, |news| news.failures == 1).await;
    assert!(refused.trouble.expect("told").contains("Unauthenticated"));
    until(&mut news, |news| news.renewals == 1).await;
    let calls = istiod.ca.calls().all();
    assert_eq!(calls.len(), 2);
    assert_ne!(calls[0].peer.connection, calls[1].peer.connection, "a failed attempt is followed by a new connection");
}

#[tokio::test]
async fn answers_that_peers_would_refuse_are_not_taken() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    let bad = [Answer::OneElement, Answer::Empty, Answer::Garbage, Answer::WrongRoot, Answer::Expired];
    istiod.ca.then([QUICK].into_iter().chain(bad.clone()));
    let mut workload = Workload::of(&istiod);
    workload.said.rotation_ratio = QUICK_RATIO;
    let mut news = workload.start();
    let first = until(&mut news, |news| news.renewals == 1).await;
    let told = ["chain of 1", "chain of 0", "ertificate", "does not lead", "xpired"];
    for (failures, why) in (1..).zip(told) {
        let refused = until(&mut news, |news| news.failures >= failures).await;
        assert_eq!(serial(&refused), serial(&first));
        if refused.failures == failures {
            assert!(refused.trouble.as_ref().is_some_and(|said| said.contains(why)), "{why}: {:?}", refused.trouble);
        }
    }
    until(&mut news, |news| news.renewals == 2).await;
    assert_eq!(istiod.ca.calls().len(), 2 + bad.len());
}

#[tokio::test]
async fn whoever_is_not_the_control_plane_is_told_nothing() {
    let impostor = Arc::new(Ca::new("impostor").expect("keys"));
    let setup = Setup { server_ca: Some(impostor), ..Setup::default() };
    let istiod = Istiod::start(setup).await.expect("a control plane");
    let workload = Workload::of(&istiod);
    let mut news = workload.start();
    let refused = until(&mut news, |news| news.failures == 1).await;
    let why = refused.trouble.expect("told");
    assert!(why.contains("TLS certificate"), "{why}");
    assert!(istiod.ca.calls().is_empty());
    assert!(istiod.server.connections().all().iter().all(|connection| connection.error.is_some()));

    let other_name = Setup { names: vec!["somebody.example.com".to_owned()], ..Setup::default() };
    let istiod = Istiod::start(other_name).await.expect("a control plane");
    let workload = Workload::of(&istiod);
    let mut news = workload.start();
    let refused = until(&mut news, |news| news.failures == 1).await;
    assert!(refused.trouble.expect("told").contains("no name of the certificate is expected"));
    assert!(istiod.ca.calls().is_empty());

    let istiod = Istiod::start(Setup { expired: true, ..Setup::default() }).await.expect("a control plane");
    let workload = Workload::of(&istiod);
    let mut news = workload.start();
    let refused = until(&mut news, |news| news.failures == 1).await;
    let why = refused.trouble.expect("told");
    assert!(why.to_lowercase().contains("expired"), "{why}");
    assert!(istiod.ca.calls().is_empty());
}

#[tokio::test]
async fn tokens_are_read_anew_for_each_call() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    istiod.ca.then([Answer::Status(Code::Unauthenticated)]);
    let workload = Workload::of(&istiod);
    std::fs::remove_file(workload.at("token")).expect("removed");
    let mut news = workload.start();
    until(&mut news, |news| news.failures == 1).await;
    std::fs::write(workload.at("token"), "second").expect("written");
    until(&mut news, |news| news.renewals == 1).await;
    let tokens: Vec<_> =
        istiod.ca.calls().all().into_iter().map(|call| call.metadata.get("authorization").cloned()).collect();
    assert_eq!(tokens, [None, Some("Bearer second".parse().expect("ascii"))]);
}

#[tokio::test]
async fn pushed_anchors_are_trusted_and_renew_the_certificate() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    let other = Ca::new("other").expect("keys");
    let (push, anchors) = watch::channel(Vec::new());
    let workload = Workload::of(&istiod);
    let mut news = workload.start_with(None, Some(anchors));
    let first = until(&mut news, |news| news.renewals == 1).await;
    push.send_replace(vec![other.root()]);
    let second = until(&mut news, |news| news.renewals == 2).await;
    assert_eq!((roots_of(&first).len(), roots_of(&second).len()), (1, 2));
    assert_ne!(serial(&first), serial(&second));
}

/// Two roots with an overlap: everybody trusts both before the first certificate of the new one is signed.
#[tokio::test]
async fn the_mesh_moves_to_another_root_without_a_gap() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    let next = Ca::new("next").expect("keys");
    istiod.ca.otherwise(QUICK);
    let old_root = istiod.roots();
    let mut workload = Workload::of(&istiod);
    workload.said.rotation_ratio = QUICK_RATIO;
    let mut news = workload.start();
    let first = until(&mut news, |news| news.renewals >= 1).await;
    istiod.ca.send_roots(&format!("{old_root}{}", next.root()));
    let both = until(&mut news, |news| news.secrets.roots("ROOTCA").is_some_and(|roots| roots.info.len() == 2)).await;
    istiod.ca.sign_as(&next).expect("a copy");
    let issuer_moved = |news: &News| {
        let identity = news.secrets.identity("default").expect("a certificate");
        identity.leads_to(&Roots::from_pem(next.root().as_bytes()).expect("a root"), now()).is_ok()
    };
    let moved = until(&mut news, issuer_moved).await;
    istiod.ca.send_roots(&next.root());
    let last = until(&mut news, |news| news.secrets.roots("ROOTCA").is_some_and(|roots| roots.info.len() == 1)).await;
    // Whoever is one step behind still trusts, and is trusted.
    for (one, another) in [(&first, &both), (&both, &moved), (&moved, &last)] {
        for (who, by) in [(one, another), (another, one)] {
            let identity = who.secrets.identity("default").expect("a certificate");
            identity.leads_to(by.secrets.roots("ROOTCA").expect("roots"), now()).expect("trusted");
        }
    }
}

fn now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

// === The socket for programs beside us, and the one of somebody else ===

/// What one side serves the other side takes: first secrets, renewal, and again after the server has been away.
#[tokio::test]
async fn a_socket_serves_and_is_followed() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    let (push, anchors) = watch::channel(Vec::new());
    let workload = Workload::of(&istiod);
    let path = workload.at("uds/socket");
    let source = Source::Socket { path: path.clone(), node: vec![0x0a, 1, b'x'].into() };
    let mut taken = identity::start(identity::Settings { source, output: None, serve: None, anchors: None });
    until(&mut taken, |news| news.failures >= 1).await;

    let mut issued = workload.start_with(None, Some(anchors));
    let socket = Socket::open(&path, Served::Issued(issued.clone())).expect("a socket");
    let mode = |path: &std::path::Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().expect("a folder"))), (0o666, 0o750));
    let first = until(&mut issued, |news| news.renewals == 1).await;
    until(&mut taken, |news| news.secrets == first.secrets && news.trouble.is_none()).await;

    let other = Ca::new("other").expect("keys");
    push.send_replace(vec![other.root()]);
    let second = until(&mut issued, |news| news.renewals == 2).await;
    until(&mut taken, |news| news.secrets == second.secrets).await;

    drop(socket);
    assert!(!path.exists());
    let _back = Socket::open(&path, Served::Issued(issued.clone())).expect("a socket");
    push.send_replace(Vec::new());
    let third = until(&mut issued, |news| news.renewals == 3).await;
    until(&mut taken, |news| news.secrets == third.secrets).await;
    assert_eq!(roots_of(&third).len(), 1);
}

// === Renewal under load ===

/// Client → outbound listener ⇒ mTLS ⇒ inbound listener → application, in one set of workers.
struct Mesh {
    workers: Workers,
    entry: SocketAddr,
    _drain: Drain,
}

#[tokio::test]
async fn renewal_breaks_no_connection_and_fails_no_request() {
    let istiod = Istiod::start(Setup::default()).await.expect("a control plane");
    istiod.ca.otherwise(QUICK);
    let mut workload = Workload::of(&istiod);
    workload.said.rotation_ratio = QUICK_RATIO;
    let mut news = workload.start();
    until(&mut news, |news| news.renewals >= 1).await;
    let mut mesh = Mesh::start(news.clone()).await;
    let served = Arc::new(AtomicU64::new(0));
    let (stop, stopped) = watch::channel(false);
    // Four that stay open the whole time, two that always begin anew.
    let clients: Vec<_> =
        (0..6).map(|n| tokio::spawn(client(mesh.entry, n < 4, Arc::clone(&served), stopped.clone()))).collect();
    let before = news.borrow().renewals;
    until(&mut news, |news| news.renewals >= before + 8).await;
    let during = served.load(Ordering::Relaxed);
    stop.send_replace(true);
    for client in clients {
        timeout(LIMIT, client).await.expect("in time").expect("no panic").expect("no request fails");
    }
    assert!(during > 100, "{during} requests are no load");
    // One more, with what is served now.
    let mut last = TcpStream::connect(mesh.entry).await.expect("accepted");
    speak(&mut last).await.expect("served");
    assert!(timeout(Duration::ZERO, mesh.workers.ended()).await.is_err());
}

async fn client(
    entry: SocketAddr,
    stays: bool,
    served: Arc<AtomicU64>,
    stopped: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let mut connection = TcpStream::connect(entry).await?;
    while !*stopped.borrow() {
        speak(&mut connection).await?;
        served.fetch_add(1, Ordering::Relaxed);
        if !stays {
            connection = TcpStream::connect(entry).await?;
        }
    }
    speak(&mut connection).await
}

async fn speak(client: &mut TcpStream) -> std::io::Result<()> {
    client.write_all(b"ping").await?;
    let mut answer = [0; 4];
    client.read_exact(&mut answer).await?;
    if &answer == b"ping" { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}

impl Mesh {
    async fn start(mut news: watch::Receiver<News>) -> Self {
        let (app, entry, inbound) = (echo().await, free().await, free().await);
        let model = model(app, entry, inbound);
        let mut secrets = Secrets::new().updated(&news.borrow_and_update().secrets);
        let mut current = compiled(None, &model, &secrets);
        let (snapshots, receiver) = watch::channel(Arc::clone(&current));
        let (drain, leaving) = Drain::new();
        let telemetry = Telemetry::new(NodeLabels::default());
        let logs = Arc::new(Logs::start(LogOptions::default(), &telemetry).expect("a thread"));
        let settings = worker::Settings {
            snapshots: receiver,
            drain: leaving,
            node: Node::default(),
            telemetry,
            logs,
            connections: usize::MAX,
            refuse_above: None,
        };
        let mut workers = Workers::start(2, &settings).expect("threads");
        assert!(workers.sockets(&current).is_empty());
        tokio::spawn(async move {
            while news.changed().await.is_ok() {
                secrets = secrets.updated(&news.borrow_and_update().secrets);
                current = compiled(Some(&current), &model, &secrets);
                snapshots.send_replace(Arc::clone(&current));
            }
        });
        Self { workers, entry, _drain: drain }
    }
}

fn compiled(prev: Option<&Snapshot>, model: &Model, secrets: &Secrets) -> Arc<Snapshot> {
    let (snapshot, rejects) = snapshot::compile(prev, model, secrets);
    assert!(rejects.is_empty(), "{rejects:?}");
    Arc::new(snapshot)
}

fn model(app: SocketAddr, entry: SocketAddr, inbound: SocketAddr) -> Model {
    let validation = Some(Validation { roots: Some("ROOTCA".into()), ..Validation::default() });
    let common = CommonTls { certificates: vec!["default".into()], validation, ..CommonTls::default() };
    let server = DownstreamTls { common: common.clone(), require_client_certificate: true };
    let upstream = Transport::Tls(Box::new(UpstreamTls { common, ..UpstreamTls::default() }));
    let mut model = Model::default();
    for cluster in [cluster("app", app, Transport::Raw), cluster("server", inbound, upstream)] {
        model.clusters.insert(Arc::clone(&cluster.name), Arc::new(cluster));
    }
    let listeners = [
        listener(entry, Direction::Outbound, "server", None),
        listener(inbound, Direction::Inbound, "app", Some(server)),
    ];
    for listener in listeners {
        model.listeners.insert(Arc::clone(&listener.name), Arc::new(listener));
    }
    model
}
