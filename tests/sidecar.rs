//! Ways of getting traffic other than capture of IPv4: listeners of a Sidecar with sockets of their own, where nothing is
//! redirected, and capture of IPv6 by real ip6tables.

mod support;

use std::path::Path;

use support::shop::{mtls, pod, service};
use support::{
    Killed, LIMIT, Machine, Machines, Proxy, certificates, curl, folder, give_to_proxy, privileged, public_binary,
    serve_as_app, start_app, wait_for,
};

/// The application's process; nothing in a normal run.
#[test]
fn application() {
    serve_as_app();
}

/// A client and a server with their sidecars.
struct Pair {
    client: Machine,
    server: Machine,
    // Processes go before their namespaces.
    _proxies: [Proxy; 2],
    _app: Killed,
    _machines: Machines,
    _dir: tempfile::TempDir,
}

impl Pair {
    /// `name` begins the namespaces' names; addresses with prefix; where the application listens.
    fn start(name: &str, objects: &str, ips: [&str; 2], app: &str, captured: bool) -> Self {
        let dir = folder(&[]);
        let config = dir.path().join("config");
        std::fs::create_dir(&config).expect("a folder");
        let objects = objects.replace("DIR", &dir.path().display().to_string());
        std::fs::write(config.join("objects.yaml"), objects).expect("a file");
        let id = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");
        certificates(dir.path(), &[("client", &id("client")), ("web", &id("web"))]);
        let binary = public_binary(dir.path());
        give_to_proxy(dir.path());
        let mut machines = Machines::new(&format!("{name}-{}", std::process::id())).expect("namespaces");
        let [client, server] = [("client", ips[0]), ("server", ips[1])]
            .map(|(name, ip)| machines.space(name, &[ip]).expect("a namespace"));
        for machine in [&client, &server].into_iter().filter(|_| captured) {
            let flags = ["istio-iptables", "-i", "*", "-b", "*", "-d", "15090,15021,15020"];
            let rules = machine.command(&binary.to_string_lossy()).args(flags).output().expect("it runs");
            assert!(rules.status.success(), "{}", String::from_utf8_lossy(&rules.stderr));
        }
        let own = start_app(&server, app);
        let proxies = [(&client, "client", ips[0]), (&server, "web", ips[1])]
            .map(|(machine, account, ip)| sidecar(machine, dir.path(), account, (ip, captured)));
        Self { client, server, _proxies: proxies, _app: own, _machines: machines, _dir: dir }
    }
}

fn sidecar(machine: &Machine, dir: &Path, account: &str, (ip, captured): (&str, bool)) -> Proxy {
    let mut command = machine.command_as_proxy(&dir.join("istio-proxy").to_string_lossy());
    command.args(["proxy", "--concurrency", "1", "--config"]).arg(dir.join("config"));
    command.arg("--certs").arg(dir.join(account));
    command.env("POD_NAMESPACE", "shop").env("POD_NAME", format!("{account}-1")).env("SERVICE_ACCOUNT", account);
    command.env("INSTANCE_IP", ip.split('/').next().unwrap_or_default());
    if !captured {
        command.env("ISTIO_META_INTERCEPTION_MODE", "NONE");
    }
    let proxy = Proxy::start(command);
    wait_for("readiness", LIMIT, || curl(machine, &["http://127.0.0.1:15021/healthz/ready"]).0 == 200)
        .unwrap_or_else(|e| panic!("{e}: {:?}", curl(machine, &["http://127.0.0.1:15021/healthz/ready"])));
    proxy
}

/// Whether the application saw the client's identity.
fn is_mtls(seen: &str) -> bool {
    let xfcc = seen.lines().find(|l| l.to_ascii_lowercase().starts_with("x-forwarded-client-cert:"));
    xfcc.is_some_and(|l| l.contains("URI=spiffe://cluster.local/ns/shop/sa/client"))
}

/// What a shop has without capture.
const UNCAPTURED: &str = "---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  mtls: {mode: STRICT}
  portLevelMtls: {9443: {mode: DISABLE}}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: web, namespace: shop}
spec:
  workloadSelector: {labels: {app: web}}
  ingress:
  - port: {number: 9080, name: http, protocol: HTTP}
    defaultEndpoint: 127.0.0.1:8080
  - port: {number: 9443, name: https, protocol: HTTPS}
    defaultEndpoint: 127.0.0.1:8080
    tls: {mode: SIMPLE, serverCertificate: DIR/web/cert-chain.pem, privateKey: DIR/web/key.pem}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: client, namespace: shop}
spec:
  workloadSelector: {labels: {app: client}}
  egress:
  - port: {number: 3128, name: proxy, protocol: HTTP_PROXY}
    hosts: ['./*']
  - hosts: ['./*']
";

#[test]
fn without_capture_a_sidecar_listens_for_itself() {
    if !privileged("without_capture_a_sidecar_listens_for_itself") {
        return;
    }
    let pods = [pod("web", "10.80.0.2"), pod("client", "10.80.0.1")].concat();
    let objects = [&service("10.96.80.1", 8000, 9080), &pods, UNCAPTURED].concat();
    let pair = Pair::start("none", &objects, ["10.80.0.1/8", "10.80.0.2/8"], "127.0.0.1:8080", false);
    let get = |args: &[&str]| curl(&pair.client, args);

    let (status, seen) = get(&["-H", "host: web.shop", "http://127.0.0.1:8000/by-listener"]);
    assert!(status == 200 && is_mtls(&seen), "{status} {seen}");
    let (status, seen) = get(&["-x", "http://127.0.0.1:3128", "http://web.shop:8000/by-proxy"]);
    assert!(status == 200 && is_mtls(&seen), "{status} {seen}");

    let (status, _) = get(&["http://10.80.0.2:9080/"]);
    assert_eq!(status, 0, "STRICT holds on the Sidecar's own listener");
    let (status, seen) = get(&["-k", "https://10.80.0.2:9443/tls"]);
    assert!(status == 200 && seen.contains("GET /tls"), "the Sidecar's own TLS: {status} {seen}");
    assert_eq!(get(&["http://10.80.0.2:9443/"]).0, 0, "and nothing else there");

    let (status, _) = get(&["-H", "host: nobody.example", "http://127.0.0.1:8000/"]);
    assert_eq!(status, 503, "nobody said where it goes; it must not come back to the listener");
    let (status, _) = curl(&pair.server, &["http://127.0.0.1:8080/"]);
    assert_eq!(status, 200, "the application itself");
}

#[test]
fn ipv6_is_captured() {
    if !privileged("ipv6_is_captured") {
        return;
    }
    let pods = [pod("web", "fd77::2"), pod("client", "fd77::1")].concat();
    let objects = [service("fd77:96::1", 80, 8080), pods, mtls("STRICT")].concat();
    let pair = Pair::start("six", &objects, ["fd77::1/16", "fd77::2/16"], "[::]:8080", true);
    let (status, seen) = curl(&pair.client, &["-g", "-H", "host: web.shop", "http://[fd77:96::1]/six"]);
    assert!(status == 200 && is_mtls(&seen), "{status} {seen}");
    // The client's traffic to the pod is captured as well, and goes out as it came in: STRICT does not take it.
    let (status, _) = curl(&pair.client, &["-g", "http://[fd77::2]:9999/"]);
    assert_ne!(status, 200, "nothing listens there");
}
