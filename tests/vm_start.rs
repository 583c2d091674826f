//! The real binary as a VM under istiod: started with the variables and files of a bundle, as the unchanged start script
//! starts it. Everything is on loopback.

#[path = "support/discovery.rs"]
mod discovery;
mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bench_harness::istiod::{Istiod, Setup};
use discovery::{Discovery, HEALTH, SERVICE, forward};
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

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_registers_reports_its_health_and_serves_without_istiod() {
    let app = App::start();
    let [front, ready] = free_ports();
    let front: SocketAddr = ([127, 0, 0, 1], front).into();
    let discovery = Discovery::new(forward(front, app.echo));
    let istiod = Istiod::start(Setup { services: vec![(SERVICE, Arc::clone(&discovery) as _)], ..Setup::default() });
    let istiod = istiod.await.expect("a control plane");
    let folder = tempfile::tempdir().expect("a folder");
    lay_out(folder.path(), &istiod, app.health);

    let mut command = Command::new(BINARY);
    command.args(["proxy", "sidecar", "--proxyLogLevel=warning", "--log_output_level=default:info"]);
    command.args(["--admin-port", "0", "--metrics-port", "0", "--concurrency", "1"]);
    command.args(["--status-port", &ready.to_string()]);
    command.current_dir(folder.path()).env_clear().envs(environment(istiod.address()));
    let mut proxy = Proxy::spawn(command);

    // Who it is, and by what it is known.
    let first = discovery.until("the first request", |_| true).await;
    let node = Node::decode(first.request.node.expect("a node with the first message")).expect("a Node");
    assert_eq!(node.id, "sidecar~127.0.0.1~vm-1.payments~payments.svc.cluster.local");
    assert_eq!((&*node.cluster, &*node.user_agent), ("pay.payments", "envoy"));
    assert_eq!(first.authorization, format!("Bearer {TOKEN}"));
    let asked = istiod.ca.calls().reach(1).await;
    assert_eq!(asked[0].metadata.get("authorization").expect("a token"), &format!("Bearer {TOKEN}"));

    // The application is healthy, and only then is it told, after the first request for listeners.
    proxy.wait_for_line("the application is healthy");
    let healthy = discovery.until("a report", |asked| asked.request.type_url == HEALTH).await;
    assert_eq!((healthy.stream, healthy.request.error_detail), (1, None));
    assert!(healthy.request.node.is_none() && healthy.request.response_nonce.is_empty());
    assert!(folder.path().join("etc/certs/cert-chain.pem").exists(), "a VM that is ready has its certificate on disk");
    let answer =
        http(([127, 0, 0, 1], ready).into(), "GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    assert!(answer.expect("readiness").starts_with("HTTP/1.1 200"));
    assert!(echoes(front), "traffic");

    // A new stream hears of it at once, and this time a certificate vouches for it.
    istiod.server.hang_up();
    proxy.wait_for_line(ALONE);
    let again =
        discovery.until("a report on the next stream", |asked| asked.stream > 1 && asked.request.type_url == HEALTH);
    let again = again.await;
    assert_eq!(again.request.error_detail, None);
    assert!(again.certified);

    // The application falls ill: told once, with the reason.
    app.well.store(false, Ordering::Relaxed);
    let ill = discovery.until("bad news", |asked| asked.request.error_detail.is_some()).await;
    let why = ill.request.error_detail.expect("a reason");
    assert_eq!((why.code, &*why.message), (13, "status code was not from [200,400), bad code 503"));

    // Without istiod everything goes on.
    drop(istiod);
    proxy.wait_for_line(ALONE);
    assert!(echoes(front), "traffic without a control plane");
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
