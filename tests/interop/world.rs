//! Our sidecar, Envoy and the application in one network namespace.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::support::{
    Killed, LIMIT, Proxy, certificates, folder, give_to_proxy, in_own_network, public_binary, redirect, root, run,
    wait_for,
};
use super::{app, envoy};

/// Our sidecar's identity, and that of the pod with Envoy.
pub(crate) const OURS: &str = "spiffe://cluster.local/ns/shop/sa/web";
pub(crate) const REMOTE: &str = "spiffe://cluster.local/ns/shop/sa/remote";
const STRANGER: &str = "spiffe://cluster.local/ns/shop/sa/stranger";

const MESH: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.9.1, selector: {app: web}, ports: [{name: http, port: 8080}, {name: grpc, port: 9090}]}
---
apiVersion: v1
kind: Service
metadata: {name: remote, namespace: shop}
spec: {clusterIP: 10.96.9.2, selector: {app: remote}, ports: [{name: http, port: 80, targetPort: 8080}, {name: grpc, port: 9090}]}
---
apiVersion: v1
kind: Service
metadata: {name: remote-h2, namespace: shop}
spec: {clusterIP: 10.96.9.3, selector: {app: remote}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: remote-h2, namespace: shop}
spec: {host: remote-h2, trafficPolicy: {connectionPool: {http: {h2UpgradePolicy: UPGRADE}}}}
---
apiVersion: v1
kind: Service
metadata: {name: impostor, namespace: shop}
spec: {clusterIP: 10.96.9.4, selector: {app: impostor}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/remote]}}]
    to: [{operation: {paths: ['/heads*', '/echo*', /ws, '/test.Echo/*']}}]
";

fn pods() -> String {
    let mut all = String::new();
    for (name, address, account) in
        [("web", "10.9.0.1", "web"), ("remote", "10.9.0.2", "remote"), ("impostor", "10.9.0.3", "remote")]
    {
        all.push_str(&format!(
            "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}-1, namespace: shop, labels: {{app: {name}, security.istio.io/tlsMode: istio}}}}
spec: {{serviceAccountName: {account}}}
status: {{phase: Running, podIP: {address}, conditions: [{{type: Ready, status: 'True'}}]}}
"
        ));
    }
    all
}

/// What runs.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    _proxy: Proxy,
    _envoy: Killed,
}

/// Runs a test with everything started; says in a line which of the programs it wants are not there.
pub(crate) fn inside(name: &str, wants: &[&str], body: impl FnOnce(&World)) {
    for want in wants {
        if let Err(why) = program(want) {
            eprintln!("{name}: left out: {why} (make test installs it where it can)");
            return;
        }
    }
    in_own_network(name, || body(&World::start()));
}

/// Where `make test` installs a program.
pub(crate) fn program(name: &str) -> Result<PathBuf, String> {
    if name == "envoy" {
        let launcher = root().join(bench_harness::envoy::LAUNCHER);
        return bench_harness::envoy::binary(&launcher).map_err(|error| format!("no Envoy: {error:#}"));
    }
    let file = root().join("target/go").join(name);
    if file.exists() { Ok(file) } else { Err(format!("no {name} in target/go")) }
}

impl World {
    fn start() -> Self {
        for address in ["10.9.0.1/32", "10.9.0.2/32", "10.9.0.3/32"] {
            run("ip", &["address", "add", address, "dev", "lo"]);
        }
        run("ip", &["route", "add", "10.96.0.0/16", "dev", "lo"]);
        for (address, port, to) in [
            ("10.9.0.1", 8080, 15006),
            ("10.9.0.1", 9090, 15006),
            ("10.96.9.2", 80, 15001),
            ("10.96.9.2", 9090, 15001),
            ("10.96.9.3", 80, 15001),
            ("10.96.9.4", 80, 15001),
        ] {
            redirect(address, port, to);
        }
        let dir = folder(&[]);
        let config = dir.path().join("config");
        std::fs::create_dir(&config).expect("a folder");
        std::fs::write(config.join("objects.yaml"), format!("{MESH}{}", pods())).expect("a file");
        certificates(dir.path(), &[("web", OURS), ("remote", REMOTE), ("stranger", STRANGER)]);
        let other = dir.path().join("other");
        std::fs::create_dir(&other).expect("a folder");
        certificates(&other, &[("remote", REMOTE)]);
        let said = dir.path().join("envoy.json");
        std::fs::write(&said, envoy::config(dir.path())).expect("a file");
        let binary = public_binary(dir.path());
        give_to_proxy(dir.path());
        app::serve(&["10.9.0.1:8080", "127.0.0.1:7080"], &["10.9.0.1:9090", "127.0.0.1:7090"]);
        let log = std::fs::File::create(dir.path().join("envoy.log")).expect("a file");
        let mut command = Command::new(program("envoy").expect("looked for before"));
        command.args(["--concurrency", "1", "--use-dynamic-base-id", "-l", "warning", "-c"]).arg(&said);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let envoy = Killed(command.spawn().expect("Envoy starts"));
        let mut command = Command::new("setpriv");
        command.args(["--reuid=1337", "--regid=1337", "--clear-groups"]).arg(binary);
        command.args(["proxy", "--concurrency", "1", "--config"]).arg(&config);
        command.arg("--certs").arg(dir.path().join("web")).env("POD_NAMESPACE", "shop").env("POD_NAME", "web-1");
        command.arg("--access-log").arg(dir.path().join("access.jsonl"));
        command.env("INSTANCE_IP", "10.9.0.1").env("SERVICE_ACCOUNT", "web");
        let proxy = Proxy::start(command);
        let listens =
            || [envoy::TLS_TO_OURS, "127.0.0.1:15021"].iter().all(|at| std::net::TcpStream::connect(at).is_ok());
        wait_for("both proxies", LIMIT, listens).unwrap_or_else(|e| {
            panic!("{e}; Envoy said: {}", std::fs::read_to_string(dir.path().join("envoy.log")).unwrap_or_default())
        });
        Self { dir, _proxy: proxy, _envoy: envoy }
    }
}
