//! The real binary as a VM under istiod: started with the variables and files of a bundle, as the unchanged start script
//! starts it. Everything is on loopback.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bench_harness::istiod::ads::{self, Ads};
use bench_harness::istiod::{Answer, Ca, Istiod, Setup, resources};
use istio_proxy::xds::{DeltaDiscoveryRequest, HEALTH, Kind, Request};
use prost::Message;
use support::{BINARY, LIMIT, Proxy, free_ports, http};

const TOKEN: &str = "token-of-the-vm";
/// What is logged when a stream ends.
const ALONE: &str = "what was received is served on";

/// `cluster.env` as `istioctl x workload entry configure` writes it, and what the start script adds to it.
fn environment(istiod: SocketAddr) -> Vec<(&'static str, String)> {
    let bundle = [
        ("CANONICAL_REVISION", "v1"),
        ("CANONICAL_SERVICE", "pay"),
        ("ISTIO_INBOUND_PORTS", "*"),
        ("ISTIO_LOCAL_EXCLUDE_PORTS", "22,15090,15021,15020"),
        ("ISTIO_METAJSON_LABELS", r#"{"app":"pay","version":"v1"}"#),
        ("ISTIO_META_AUTO_REGISTER_GROUP", "pay"),
        ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
        ("ISTIO_META_MESH_ID", ""),
        ("ISTIO_META_NETWORK", "vm-network"),
        ("ISTIO_META_WORKLOAD_NAME", "pay"),
        ("ISTIO_NAMESPACE", "payments"),
        ("ISTIO_SERVICE", "pay.payments"),
        ("POD_NAMESPACE", "payments"),
        ("SERVICE_ACCOUNT", "pay-sa"),
        ("TRUST_DOMAIN", "cluster.local"),
    ];
    let script = [
        ("INSTANCE_IP", "127.0.0.1"),
        ("POD_NAME", "vm-1"),
        ("PROV_CERT", "./etc/certs"),
        ("OUTPUT_CERTS", "./etc/certs"),
        // An RSA key takes its time in a debug build.
        ("ECC_SIGNATURE_ALGORITHM", "ECDSA"),
    ];
    let mut all: Vec<_> = bundle.into_iter().chain(script).map(|(name, value)| (name, value.to_owned())).collect();
    all.push(("CA_ADDR", format!("localhost:{}", istiod.port())));
    all.push(("PROXY_CONFIG", "\nserviceCluster: pay.payments\ncontrolPlaneAuthPolicy: MUTUAL_TLS\n".to_owned()));
    all
}

/// Files where an operator puts them.
fn lay_out(folder: &Path, istiod: &Istiod, app: SocketAddr) {
    let write = |path: &str, text: &str| {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, text).expect("a file");
    };
    write("etc/certs/root-cert.pem", &istiod.roots());
    write("var/run/secrets/tokens/istio-token", &format!("{TOKEN}\n"));
    let mesh = format!(
        "defaultConfig:\n  discoveryAddress: localhost:{}\n  proxyMetadata: {{ISTIO_META_NETWORK: vm-network}}\n  \
         readinessProbe:\n    periodSeconds: 1\n    httpGet: {{path: /health, port: {}}}\n",
        istiod.address().port(),
        app.port()
    );
    write("etc/istio/config/mesh", &mesh);
}

/// An application that echoes on one port, and tells its health when asked by HTTP on another.
struct App {
    echo: SocketAddr,
    health: SocketAddr,
    well: Arc<AtomicBool>,
}

impl App {
    fn start() -> Self {
        let well = Arc::new(AtomicBool::new(true));
        let is_well = Arc::clone(&well);
        let health = serve(move |socket| {
            let mut request = [0; 2048];
            let _ = socket.read(&mut request);
            let status = if is_well.load(Ordering::Relaxed) { 200 } else { 503 };
            let _ = write!(socket, "HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        });
        let echo = serve(|socket| {
            let mut said = [0; 64];
            while let Ok(n @ 1..) = socket.read(&mut said) {
                if socket.write_all(&said[..n]).is_err() {
                    return;
                }
            }
        });
        Self { echo, health, well }
    }
}

fn serve(answer: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = listener.local_addr().expect("bound");
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || answer(&mut socket));
        }
    });
    at
}

/// Whether a connection to the proxy's listener reaches the application.
fn echoes(at: SocketAddr) -> bool {
    let exchange = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(at)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(b"hello")?;
        let mut back = [0; 5];
        stream.read_exact(&mut back)?;
        Ok(&back == b"hello")
    };
    exchange().unwrap_or(false)
}

/// The Node of a first request, as far as it is looked at.
#[derive(Clone, PartialEq, Message)]
struct Node {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    cluster: String,
    #[prost(string, tag = "6")]
    user_agent: String,
}

/// A control plane whose one listener hands connections to the application.
async fn plane(front: SocketAddr, app: SocketAddr) -> (Istiod, Arc<Ads>) {
    let ads = Arc::new(Ads::default());
    ads.set(Kind::Cluster, "app", resources::eds_cluster("app", 1));
    ads.set(Kind::Endpoints, "app", resources::assignment("app", &[app]));
    ads.set(Kind::Listener, "front", resources::tcp_listener("front", front, "app"));
    let services = vec![(ads::SERVICE, Arc::clone(&ads) as _)];
    let istiod = Istiod::start(Setup { services, ..Setup::default() }).await.expect("a control plane");
    (istiod, ads)
}

/// The binary as the start script starts it.
fn start(folder: &Path, istiod: &Istiod, ready: u16) -> Proxy {
    start_with(folder, istiod, ready, &[])
}

/// The same with more variables.
fn start_with(folder: &Path, istiod: &Istiod, ready: u16, more: &[(&str, &str)]) -> Proxy {
    let mut command = Command::new(BINARY);
    command.args(["proxy", "sidecar", "--proxyLogLevel=warning", "--log_output_level=default:info"]);
    command.args(["--admin-port", "0", "--metrics-port", "0", "--concurrency", "1"]);
    command.args(["--status-port", &ready.to_string()]);
    command.current_dir(folder).env_clear().envs(environment(istiod.address())).envs(more.iter().copied());
    Proxy::spawn(command)
}

fn delta(request: &Request) -> DeltaDiscoveryRequest {
    match request {
        Request::Delta(request) => request.clone(),
        Request::Sotw(_) => panic!("a delta stream"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_registers_reports_its_health_and_serves_without_istiod() {
    let app = App::start();
    let [front, ready] = free_ports();
    let front: SocketAddr = ([127, 0, 0, 1], front).into();
    let (istiod, ads) = plane(front, app.echo).await;
    let folder = tempfile::tempdir().expect("a folder");
    lay_out(folder.path(), &istiod, app.health);

    let mut proxy = start(folder.path(), &istiod, ready);

    // Who it is, and by what it is known.
    let first = ads.hears(|_| true).await;
    let node = Node::decode(delta(&first.request).node.expect("a node with the first message")).expect("a Node");
    assert_eq!(node.id, "sidecar~127.0.0.1~vm-1.payments~payments.svc.cluster.local");
    assert_eq!((&*node.cluster, &*node.user_agent), ("pay.payments", "envoy"));
    assert_eq!(first.metadata["authorization"], format!("Bearer {TOKEN}"));
    let asked = istiod.ca.calls().reach(1).await;
    assert_eq!(asked[0].metadata.get("authorization").expect("a token"), &format!("Bearer {TOKEN}"));

    // The application is healthy, and only then is it told, after the first request for listeners.
    proxy.wait_for_line("the application is healthy");
    let healthy = ads.hears(|heard| heard.request.type_url() == HEALTH).await;
    assert_eq!((healthy.stream, healthy.request.error()), (1, None));
    assert!(delta(&healthy.request).node.is_none() && healthy.request.nonce().is_empty());
    assert!(folder.path().join("etc/certs/cert-chain.pem").exists(), "a VM that is ready has its certificate on disk");
    let answer =
        http(([127, 0, 0, 1], ready).into(), "GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    assert!(answer.expect("readiness").starts_with("HTTP/1.1 200"));
    assert!(echoes(front), "traffic");

    // A new stream hears of it at once, and this time a certificate vouches for it.
    istiod.server.hang_up();
    proxy.wait_for_line(ALONE);
    let again = ads.hears(|heard| heard.stream > 1 && heard.request.type_url() == HEALTH).await;
    assert_eq!(again.request.error(), None);
    assert!(again.certified);

    // The application falls ill: told once, with the reason.
    app.well.store(false, Ordering::Relaxed);
    let ill = ads.hears(|heard| heard.request.error().is_some()).await;
    let why = ill.request.error().expect("a reason");
    assert_eq!((why.code, &*why.message), (13, "status code was not from [200,400), bad code 503"));

    // Without istiod everything goes on.
    drop(istiod);
    proxy.wait_for_line(ALONE);
    assert!(echoes(front), "traffic without a control plane");
    proxy.signal("TERM");
    assert_eq!(proxy.wait(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn renewals_leave_the_stream_alone_and_the_next_one_shows_the_newest() {
    let app = App::start();
    let [front, ready] = free_ports();
    let front: SocketAddr = ([127, 0, 0, 1], front).into();
    let (istiod, ads) = plane(front, app.echo).await;
    // Renewed after a second, expired after two.
    istiod.ca.then([Duration::from_secs(2); 3].map(Answer::SignFor));
    let folder = tempfile::tempdir().expect("a folder");
    lay_out(folder.path(), &istiod, app.health);
    let mut proxy = start(folder.path(), &istiod, ready);
    for _ in 0..4 {
        // Logged when it is on disk.
        proxy.wait_for_line("workload certificate until");
    }
    // The stream that was opened with a token, or with a certificate that has expired since, brings news.
    ads.remove(Kind::Listener, "front");
    ads.set(Kind::Listener, "back", resources::tcp_listener("back", front, "app"));
    ads.push(Kind::Listener);
    let answers =
        |heard: &&ads::Heard| heard.request.type_url() == Kind::Listener.url() && !heard.request.nonce().is_empty();
    ads.hears(|heard| heard.stream == 1 && answers(&heard)).await;
    assert_eq!(ads.opened.len(), 1);
    istiod.server.hang_up();
    let again = ads.hears(|heard| heard.stream == 2).await;
    assert!(again.certified);
    proxy.signal("TERM");
    assert_eq!(proxy.wait(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn cas_that_istiod_names_later_are_trusted_and_renew_the_certificate() {
    let app = App::start();
    let [front, ready] = free_ports();
    let front: SocketAddr = ([127, 0, 0, 1], front).into();
    let (istiod, ads) = plane(front, app.echo).await;
    let further = Ca::new("further").expect("a CA");
    ads.set(Kind::ProxyConfig, "", resources::trusting(&[&further.root()]));
    ads.hold(Kind::ProxyConfig);
    let folder = tempfile::tempdir().expect("a folder");
    lay_out(folder.path(), &istiod, app.health);
    let mut proxy = start_with(folder.path(), &istiod, ready, &[("PROXY_CONFIG_XDS_AGENT", "true")]);
    proxy.wait_for_line("workload certificate until");
    ads.hears(|heard| heard.request.type_url() == Kind::ProxyConfig.url()).await;
    ads.release(Kind::ProxyConfig);
    proxy.wait_for_line("the mesh's roots have changed");
    proxy.wait_for_line("workload certificate until");
    assert_eq!(istiod.ca.calls().len(), 2);
    assert!(ads.heard.all().iter().all(|heard| heard.request.type_url() == HEALTH || heard.request.error().is_none()));
    proxy.signal("TERM");
    assert_eq!(proxy.wait(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_ready_listens() {
    let app = App::start();
    let ports: [u16; 301] = free_ports();
    let [ready, fronts @ ..] = ports;
    let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let (istiod, ads) = plane(at(fronts[0]), app.echo).await;
    // Sockets for so many take a moment.
    for port in &fronts[1..] {
        let name = format!("front-{port}");
        ads.set(Kind::Listener, &name, resources::tcp_listener(&name, at(*port), "app"));
    }
    let folder = tempfile::tempdir().expect("a folder");
    lay_out(folder.path(), &istiod, app.health);
    let mut proxy = start(folder.path(), &istiod, ready);
    let ask = "GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let begun = tokio::time::Instant::now();
    while !http(at(ready), ask).is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
        assert!(begun.elapsed() < LIMIT, "it becomes ready");
        tokio::task::yield_now().await;
    }
    let deaf = fronts.iter().rev().filter(|port| TcpStream::connect(at(**port)).is_err()).count();
    assert_eq!(deaf, 0, "listeners that are not open");
    proxy.signal("TERM");
    assert_eq!(proxy.wait(), 0);
}

#[test]
fn a_vm_without_the_mesh_root_does_not_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(BINARY);
    command.args(["proxy", "sidecar"]).current_dir(folder.path()).env_clear();
    command.envs(environment(([127, 0, 0, 1], 1).into()));
    let mut proxy = Proxy::spawn(command);
    proxy.wait_for_line("root certificate for discovery: ./etc/certs/root-cert.pem is not there");
    assert_eq!(proxy.wait(), 1);
}
