//! Two sidecars and an application in network namespaces, behind the rules of `istio-iptables`: mTLS between them, policy
//! in front of the application, configuration that changes while they serve. Numbers (`T31`) are those of the behaviours
//! that `seed_rules` asks without sockets; here one of each kind is seen on the wire.

mod support;

use std::path::Path;

use support::shop::{mtls, pod, service};
use support::{
    Killed, LIMIT, Machine, Machines, Proxy, access_log, certificates, crowd, curl, folder, give_to_proxy, privileged,
    public_binary, replace, serve_as_app, start_app, talk, wait_for,
};

const CLIENT: &str = "10.77.0.1";
const SERVER: &str = "10.77.0.2";
const OUTSIDER: &str = "10.77.0.3";
const SERVICE: &str = "10.96.77.1";
const DATABASE: &str = "10.96.77.2:5432";

/// Besides what every shop has.
const MORE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec:
  clusterIP: 10.96.77.2
  selector: {app: web}
  ports: [{name: postgres, port: 5432}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: db, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]
    to: [{operation: {ports: ['5432']}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: db, namespace: shop}
spec:
  host: db
  trafficPolicy: {connectionPool: {tcp: {maxConnections: 20}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec:
  host: web
  subsets:
  - {name: stable, labels: {app: web}}
  - {name: canary, labels: {runtime: vm}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web]
  http:
  - match: [{headers: {x-canary: {exact: 'true'}}}]
    route: [{destination: {host: web, subset: canary}}]
  - route: [{destination: {host: web, subset: stable}}]
";

fn objects() -> String {
    let pods = [pod("web", SERVER), pod("client", CLIENT)].concat();
    [&service(SERVICE, 80, 8080), &pods, &mtls("STRICT"), MORE].concat()
}

fn policy(path: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: web, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  action: ALLOW
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/shop/sa/client]}}}}]
    to: [{{operation: {{methods: [GET], paths: ['{path}']}}}}]
"
    )
}

/// The application's process; nothing in a normal run.
#[test]
fn application() {
    serve_as_app();
}

struct Mesh {
    client: Machine,
    server: Machine,
    outsider: Machine,
    // Processes go before their namespaces.
    client_proxy: Proxy,
    _server_proxy: Proxy,
    _apps: [Killed; 3],
    _machines: Machines,
    dir: tempfile::TempDir,
}

impl Mesh {
    fn start() -> Self {
        let dir = folder(&[]);
        let config = dir.path().join("config");
        std::fs::create_dir(&config).expect("a folder");
        std::fs::write(config.join("mesh-objects.yaml"), objects()).expect("a file");
        std::fs::write(config.join("policy.yaml"), policy("/allowed")).expect("a file");
        let id = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");
        let stranger = "spiffe://evil.local/ns/shop/sa/client";
        certificates(dir.path(), &[("client", &id("client")), ("web", &id("web")), ("stranger", stranger)]);
        // Somebody else's root signs the right name.
        let other = dir.path().join("other");
        std::fs::create_dir(&other).expect("a folder");
        certificates(&other, &[("client", &id("client"))]);
        let binary = public_binary(dir.path());
        give_to_proxy(dir.path());
        let mut machines = Machines::new(&format!("test-{}", std::process::id())).expect("namespaces");
        let mut machine = |name: &str, ip: &str| machines.space(name, &[&format!("{ip}/8")]).expect("a namespace");
        let (client, server, outsider) =
            (machine("client", CLIENT), machine("server", SERVER), machine("outsider", OUTSIDER));
        for sidecar in [&client, &server] {
            // As the injector calls it: everything is captured but the proxy's own ports.
            let flags = ["istio-iptables", "-i", "*", "-b", "*", "-d", "15090,15021,15020"];
            let rules = sidecar.command(&binary.to_string_lossy()).args(flags).output().expect("it runs");
            assert!(rules.status.success(), "{}", String::from_utf8_lossy(&rules.stderr));
        }
        let apps = ["0.0.0.0:8080", "tcp:0.0.0.0:5432", "tcp:0.0.0.0:9187"].map(|at| start_app(&server, at));
        let client_proxy = sidecar(&client, dir.path(), ("client", "client-1", CLIENT));
        let server_proxy = sidecar(&server, dir.path(), ("web", "web-1", SERVER));
        Self {
            client,
            server,
            outsider,
            client_proxy,
            _server_proxy: server_proxy,
            _apps: apps,
            _machines: machines,
            dir,
        }
    }

    fn get(&self, path: &str) -> (u16, String) {
        curl(&self.client, &["-H", "host: web.shop", &format!("http://{SERVICE}{path}")])
    }

    fn log(&self, name: &str) -> Vec<serde_json::Value> {
        access_log(&self.dir.path().join(format!("{name}.jsonl")))
    }
}

fn sidecar(machine: &Machine, dir: &Path, (account, pod, ip): (&str, &str, &str)) -> Proxy {
    let mut command = machine.command_as_proxy(&dir.join("istio-proxy").to_string_lossy());
    command.args(["proxy", "--concurrency", "2", "--config"]).arg(dir.join("config"));
    command.arg("--certs").arg(dir.join(account));
    command.arg("--access-log").arg(dir.join(format!("{account}.jsonl")));
    command.env("POD_NAMESPACE", "shop").env("POD_NAME", pod).env("INSTANCE_IP", ip);
    command.env("SERVICE_ACCOUNT", account);
    let proxy = Proxy::start(command);
    wait_for("readiness", LIMIT, || curl(machine, &["http://127.0.0.1:15021/healthz/ready"]).0 == 200)
        .unwrap_or_else(|e| panic!("{e}: {:?}", curl(machine, &["http://127.0.0.1:15021/healthz/ready"])));
    proxy
}

#[test]
fn two_sidecars_speak_mtls_and_obey_policy() {
    if !privileged("two_sidecars_speak_mtls_and_obey_policy") {
        return;
    }
    let mut mesh = Mesh::start();

    let (status, seen) = mesh.get("/allowed");
    assert_eq!(status, 200, "{seen}; {:?} {:?}", mesh.log("client"), mesh.log("web"));
    let xfcc = seen.lines().find(|l| l.to_ascii_lowercase().starts_with("x-forwarded-client-cert:")).expect("mTLS");
    assert!(xfcc.contains("URI=spiffe://cluster.local/ns/shop/sa/client"), "{xfcc}");

    let (status, body) = mesh.get("/forbidden");
    assert_eq!((status, &*body), (403, "RBAC: access denied"));

    let (status, _) = curl(&mesh.outsider, &[&format!("http://{SERVER}:8080/allowed")]);
    assert_eq!(status, 0, "plaintext is refused under STRICT");

    strangers_are_turned_away(&mesh);
    logs_tell_the_same(&mesh);
    explanations_agree(&mesh);
    bytes_arrive_as_they_were(&mesh);
    connections_are_limited(&mesh);
    canaries(&mesh);
    garbage_harms_nobody(&mesh);

    // A changed policy is in force without a restart.
    replace(&mesh.dir.path().join("config/policy.yaml"), &policy("/forbidden"));
    wait_for("the new policy", LIMIT, || in_force(&mesh) == [false, true]).expect("policies are reloaded");
    // The client's proxy keeps its connections, so these requests come over ones that the old policy let in.
    wait_for("obedience", LIMIT, || served(&mesh) == [403, 200])
        .unwrap_or_else(|e| panic!("{e}: {:?}; {:?}", served(&mesh), mesh.log("web")));

    // A broken one leaves the last good one in force.
    replace(&mesh.dir.path().join("config/policy.yaml"), &policy("/forbidden").replace("ALLOW", "ALOW"));
    wait_for("the reject", LIMIT, || metrics(&mesh).contains("config_rejected{type=\"AuthorizationPolicy\"} 1"))
        .expect("counted");
    assert_eq!(in_force(&mesh), [false, true]);
    assert_eq!(served(&mesh), [403, 200]);

    mesh.client_proxy.signal("TERM");
    assert_eq!(mesh.get("/forbidden").0, 200, "leaving proxies still serve");
    assert_eq!(mesh.client_proxy.wait(), 0);
}

/// T24, T25: no certificate, one of another domain, one of another root; and the right one, for comparison.
fn strangers_are_turned_away(mesh: &Mesh) {
    let url = format!("https://{SERVER}:8080/allowed");
    for (who, accepted) in [("client", true), ("", false), ("stranger", false), ("other/client", false)] {
        let dir = mesh.dir.path().join(who);
        let (chain, key) = (dir.join("cert-chain.pem"), dir.join("key.pem"));
        let own = ["--cert", &*chain.to_string_lossy(), "--key", &*key.to_string_lossy()];
        let own = if who.is_empty() { &[][..] } else { &own[..] };
        let (status, _) = curl(&mesh.outsider, &[own, &["-k", "--http1.1", &url]].concat());
        assert_eq!(status, if accepted { 200 } else { 0 }, "{who:?}");
    }
}

/// T50 to T52, T55, T56: what the client says first, what is large, what looks like TLS, and a half-close.
fn bytes_arrive_as_they_were(mesh: &Mesh) {
    let large: Vec<u8> = (0..1_048_576_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let hello = [&[0x16, 3, 1, 0, 0x31, 1, 0, 0, 0x2d, 3, 3][..], &[7; 43]].concat();
    for (t, said) in [
        ("T50: SSLRequest", &b"\x00\x00\x00\x08\x04\xd2\x16\x2f"[..]),
        ("T51: StartupMessage", b"\x00\x00\x00\x13\x00\x03\x00\x00user\x00jane\x00\x00"),
        ("T51: large and binary", &large),
        ("T52: a ClientHello first", &hello),
    ] {
        assert!(talk(&mesh.client, DATABASE, said) == said, "{t}");
    }
    let direct = format!("{SERVER}:5432");
    assert_eq!(talk(&mesh.outsider, &direct, b"plain text"), b"", "T55: plaintext is refused");
    assert_eq!(talk(&mesh.client, &format!("{SERVER}:9187"), b"\0 no rule"), b"", "T56: another port");
}

/// T59: of 25 at once 20 are served; one that leaves makes room.
fn connections_are_limited(mesh: &Mesh) {
    assert_eq!(crowd(&mesh.client, DATABASE, 25), (20, true));
    wait_for("the log", LIMIT, || mesh.log("client").iter().filter(|line| line["flags"] == "UO").count() >= 5)
        .unwrap_or_else(|e| panic!("{e}: {:?}", mesh.log("client")));
}

/// What nobody should send to the proxy's ports ends in a closed connection, and nothing else.
fn garbage_harms_nobody(mesh: &Mesh) {
    let noise: Vec<u8> = (0..65_536_u32).map(|i| (i.wrapping_mul(2_246_822_519) >> 13) as u8).collect();
    let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &noise[..512]].concat();
    let hello = [&[0x16, 3, 1, 0x40, 0][..], &noise[..2048]].concat();
    let header = [b"GET / HTTP/1.1\r\nx: ", &noise[..]].concat();
    let pieces =
        [&b""[..], b"\0", b"GET", b"\r\n\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", &noise, &preface, &hello, &header];
    for piece in pieces {
        for port in [15001, 15006, 15021, 15090, 8080, 5432] {
            // Answers are allowed (400, a TLS alert); what counts is that the connection ends.
            talk(&mesh.outsider, &format!("{SERVER}:{port}"), piece);
        }
        talk(&mesh.server, "127.0.0.1:15000", piece);
    }
    for machine in [&mesh.client, &mesh.server] {
        let (status, metrics) = curl(machine, &["http://127.0.0.1:15090/stats/prometheus"]);
        let panics: Vec<&str> = metrics.lines().filter(|l| l.contains("panics_total") && !l.starts_with('#')).collect();
        assert!(status == 200 && panics.iter().all(|l| l.ends_with(" 0")), "{status} {panics:?}");
    }
    assert_eq!(mesh.get("/allowed").0, 200, "they serve as before");
}

/// T31, T33: a subset without endpoints, which then gets one.
fn canaries(mesh: &Mesh) {
    let url = format!("http://{SERVICE}/allowed");
    let canary = || curl(&mesh.client, &["-H", "host: web.shop", "-H", "x-canary: true", &url]);
    assert_eq!(canary(), (503, "no healthy upstream".to_owned()));
    wait_for("the log", LIMIT, || mesh.log("client").iter().any(|l| l["flags"] == "UH")).expect("UH is logged");
    let labelled = objects().replace("labels: {app: web, ", "labels: {app: web, runtime: vm, ");
    replace(&mesh.dir.path().join("config/mesh-objects.yaml"), &labelled);
    wait_for("the canary", LIMIT, || canary().0 == 200).expect("the subset has an endpoint");
}

/// The record names route and cluster, and who refused.
fn logs_tell_the_same(mesh: &Mesh) {
    let found = |name: &str, flags: &str, details: &str| {
        mesh.log(name).iter().any(|line| line["flags"] == flags && line["details"] == details)
    };
    let denied = "rbac_access_denied_matched_policy[none]";
    wait_for("both logs", LIMIT, || found("web", "-", denied) && found("client", "-", "via_upstream"))
        .unwrap_or_else(|e| panic!("{e}: {:?} {:?}", mesh.log("client"), mesh.log("web")));
}

/// What a running proxy says about a call.
fn explain(mesh: &Mesh, machine: &Machine, call: &[&str]) -> serde_json::Value {
    let mut command = machine.command(&mesh.dir.path().join("istio-proxy").to_string_lossy());
    command.args(["explain", "--json", "--admin", "http://127.0.0.1:15000"]).args(call);
    let out = command.output().expect("it runs");
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)))
}

/// Whether the server's policy lets the client have /allowed and /forbidden.
fn in_force(mesh: &Mesh) -> [bool; 2] {
    let peer = "spiffe://cluster.local/ns/shop/sa/client";
    let inbound = ["--mode", "inbound", "--address", SERVER, "--port", "8080", "--tls", "mtls", "--peer", peer];
    ["/allowed", "/forbidden"].map(|path| {
        let call = [&inbound[..], &["--host", "web.shop", "--path", path]].concat();
        let answer = explain(mesh, &mesh.server, &call);
        assert_eq!(answer["cluster"], "inbound|8080||", "{answer}");
        answer["policies"][0]["allowed"].as_bool().expect("a verdict")
    })
}

/// What the client gets for /allowed and /forbidden.
fn served(mesh: &Mesh) -> [u16; 2] {
    ["/allowed", "/forbidden"].map(|path| mesh.get(path).0)
}

/// The running proxies explain the calls as they served them.
fn explanations_agree(mesh: &Mesh) {
    let call = ["--address", SERVICE, "--port", "80", "--host", "web.shop", "--path", "/allowed"];
    let out = explain(mesh, &mesh.client, &call);
    assert_eq!(out["cluster"], "outbound|80|stable|web.shop.svc.cluster.local", "{out}");
    assert_eq!(out["endpoints"][0]["address"], format!("{SERVER}:8080"), "{out}");
    assert_eq!(in_force(mesh), [true, false]);
}

fn metrics(mesh: &Mesh) -> String {
    curl(&mesh.server, &["http://127.0.0.1:15090/stats/prometheus"]).1
}
