//! A large mesh, ten services of which get traffic: memory, and the time from the start of a process until it is ready.
//!
//! The mesh comes over the discovery stream: for ours with TLS, a token and a certificate that the test CA signs, for Envoy in
//! plaintext with secrets on the same stream. A recorded mesh can be given as well (`--recording`); it has listeners that only
//! Istio's builds take, so ours alone is measured with it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use istio_proxy::xds::Kind;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::Instant;

use super::mesh::{self, ENDPOINTS, For, PORTS, Place, USED};
use super::rig::{Peer, Programs};
use super::{backend, table};
use crate::child::{Running, cpu_of, peak_bytes, resident_bytes};
use crate::istiod::resources::any;
use crate::istiod::{Istiod, NAME, Server, Setup, ads};

/// Name for `--case`.
pub(super) const CASE: &str = "scale";
/// Most of Envoy's memory, and of its time to be ready.
const MOST_OF_ENVOY: f64 = 0.2;
/// Requests to each service that gets some.
const REQUESTS: usize = 20;
/// Long enough for allocators to give back what only the start needed.
const SETTLE: Duration = Duration::from_secs(15);
/// Envoy with the largest mesh on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);
/// Pushes of one load assignment whose cost is taken.
const PUSHES: u8 = 20;

/// What was measured of one process.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Scaled {
    peer: Peer,
    /// Services, or the recording's folder.
    mesh: String,
    /// From the start of the process until it is ready and serves the first request.
    ready_seconds: f64,
    /// CPU time until then, all threads.
    ready_cpu_seconds: f64,
    /// Resident when it became ready.
    rss_ready: u64,
    /// Resident after traffic and some quiet.
    rss: u64,
    /// Most that was ever resident.
    rss_peak: u64,
    /// CPU time for a push of one load assignment with one other endpoint, microseconds; the median of some.
    push_us: Option<f64>,
}

/// Runs all meshes; `recording` is a folder for `--xds-dir`.
///
/// # Errors
/// When a process does not become ready, or a request is not served.
pub(super) fn run(
    programs: &Programs,
    services: &[usize],
    recording: Option<&Path>,
    wanted: impl Fn(Peer) -> bool,
) -> Result<Vec<Scaled>> {
    let mut all = Vec::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    if let Some(folder) = recording {
        let one = recorded(programs, &runtime, folder)?;
        eprintln!("{}", line(&one));
        all.push(one);
    }
    for services in services {
        for peer in [Peer::Envoy, Peer::IstioProxy].into_iter().filter(|peer| wanted(*peer)) {
            let one = Subject::new(peer, programs, &runtime, *services)?.measure(*services)?;
            eprintln!("{}", line(&one));
            all.push(one);
        }
    }
    Ok(all)
}

/// A control plane, a backend, and where a proxy is to listen.
struct Subject<'a> {
    peer: Peer,
    programs: &'a Programs,
    runtime: &'a Runtime,
    place: Place,
    /// Admin, readiness, metrics.
    ports: [u16; 3],
    ads: Arc<ads::Ads>,
    /// Ends when dropped.
    plane: Plane,
    folder: tempfile::TempDir,
}

/// What says the mesh.
enum Plane {
    Istiod(Istiod),
    Plain(Server),
}

impl<'a> Subject<'a> {
    fn new(peer: Peer, programs: &'a Programs, runtime: &'a Runtime, services: usize) -> Result<Self> {
        let [a, b, admin, ready, metrics] = free_ports()?;
        let local = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let backend = runtime.block_on(serve_backend())?;
        let place = Place { entries: [local(a), local(b)], backend };
        let ads = Arc::new(ads::Ads::default());
        let whose = if peer == Peer::Envoy { For::Envoy } else { For::Istio };
        mesh::fill(&ads, services, whose, place);
        let plane = runtime.block_on(plane(whose, &ads))?;
        let folder = tempfile::Builder::new().prefix("istio-scale-").tempdir()?;
        Ok(Self { peer, programs, runtime, place, ports: [admin, ready, metrics], ads, plane, folder })
    }

    fn measure(&self, services: usize) -> Result<Scaled> {
        let command = match &self.plane {
            Plane::Istiod(istiod) => self.own(istiod)?,
            Plane::Plain(server) => self.envoy(server.address())?,
        };
        let began = Instant::now();
        let mut running = Running::start(command, &self.folder.path().join("proxy.log"))?;
        self.until_ready(&mut running).with_context(|| running.printed())?;
        let ready = self.until_served(&mut running).with_context(|| running.printed())?;
        let pid = running.pid();
        let (ready_cpu_seconds, rss_ready) = (cpu_of(pid).as_secs_f64(), resident_bytes(pid));
        let ready_seconds = ready.duration_since(began).as_secs_f64();
        self.runtime.block_on(self.traffic()).with_context(|| running.printed())?;
        std::thread::sleep(SETTLE);
        // Allocators give back when they are asked for something.
        self.runtime.block_on(self.traffic())?;
        let rss = resident_bytes(pid);
        let push_us = self.push(pid);
        let mesh = format!("{services} services");
        Ok(Scaled {
            peer: self.peer,
            mesh,
            ready_seconds,
            ready_cpu_seconds,
            rss_ready,
            rss,
            rss_peak: peak_bytes(pid),
            push_us: Some(push_us),
        })
    }

    /// Sockets may open a moment after readiness was told.
    fn until_served(&self, running: &mut Running) -> Result<Instant> {
        let began = Instant::now();
        while running.is_alive() && began.elapsed() < LIMIT {
            let status = self.runtime.block_on(get(self.place.entries[0], &mesh::host(0), "/"));
            if matches!(status, Ok(200)) {
                return Ok(Instant::now());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        anyhow::bail!("it is ready and does not serve")
    }

    fn until_ready(&self, running: &mut Running) -> Result<Instant> {
        let (port, path) = match self.peer {
            Peer::Envoy => (self.ports[0], "/ready"),
            _ => (self.ports[1], "/healthz/ready"),
        };
        until_ready(self.runtime, running, port, path)
    }

    /// Some requests to each service that gets any.
    async fn traffic(&self) -> Result<()> {
        for service in 0..USED {
            for _ in 0..REQUESTS {
                let status = get(self.place.entries[0], &mesh::host(service), "/").await?;
                ensure!(status == 200, "service {service}: status {status}");
            }
        }
        Ok(())
    }

    /// CPU time of the process for one push, the pushes being far enough apart to be told apart.
    fn push(&self, pid: u32) -> f64 {
        let before = cpu_of(pid);
        for turn in 1..=PUSHES {
            let (name, any) = mesh::moved(0, self.place.backend, turn);
            self.ads.set(Kind::Endpoints, &name, any);
            self.ads.push_some(Kind::Endpoints, &[&name]);
            std::thread::sleep(Duration::from_millis(300));
        }
        (cpu_of(pid) - before).as_secs_f64() * 1e6 / f64::from(PUSHES)
    }

    /// As an agent is started in a pod.
    fn own(&self, istiod: &Istiod) -> Result<Command> {
        let root = self.folder.path();
        for (name, text) in [
            ("var/run/secrets/istio/root-cert.pem", istiod.roots()),
            ("var/run/secrets/tokens/istio-token", "token".to_owned()),
        ] {
            let file = root.join(name);
            fs::create_dir_all(file.parent().context("a file has a folder")?)?;
            fs::write(file, text)?;
        }
        let [admin, ready, metrics] = self.ports.map(|port| port.to_string());
        let mut command = Command::new(fs::canonicalize(&self.programs.proxy)?);
        command.args(["proxy", "sidecar", "--concurrency", "2", "--admin-port", &admin, "--status-port", &ready]);
        command.args(["--metrics-port", &metrics]).current_dir(root);
        let discovery = format!("{{\"discoveryAddress\": \"{}\"}}", istiod.address());
        let variables = [
            ("POD_NAME", "client-1"),
            ("POD_NAMESPACE", "app"),
            ("SERVICE_ACCOUNT", "client"),
            ("TRUST_DOMAIN", "cluster.local"),
            ("INSTANCE_IP", "127.0.0.1"),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            ("ISTIOD_SAN", NAME),
            ("PROXY_CONFIG", &*discovery),
        ];
        command.envs(variables);
        Ok(command)
    }

    fn envoy(&self, control_plane: SocketAddr) -> Result<Command> {
        let source = json!({"ads": {}, "resource_api_version": "V3"});
        let at = crate::envoy::address("127.0.0.1", control_plane.port());
        let http2 = crate::envoy::options(&json!({"explicit_http_config": {"http2_protocol_options": {}}}));
        let cluster = json!({"name": "xds", "type": "STATIC", "typed_extension_protocol_options": http2,
            "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at}}]}]}});
        let bootstrap: Value = json!({
            "node": {"id": "sidecar~127.0.0.1~client-1.app~app.svc.cluster.local", "cluster": "client.app"},
            "admin": {"address": crate::envoy::address("127.0.0.1", self.ports[0])},
            "static_resources": {"clusters": [cluster]},
            "dynamic_resources": {"cds_config": source, "lds_config": source, "ads_config": {
                "api_type": "DELTA_GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]}}});
        let file = self.folder.path().join("envoy.json");
        fs::write(&file, bootstrap.to_string())?;
        let mut command = Command::new(&self.programs.envoy);
        command.args(["--concurrency", "2", "--use-dynamic-base-id", "-l", "error", "-c"]).arg(file);
        Ok(command)
    }
}

async fn plane(whose: For, ads: &Arc<ads::Ads>) -> Result<Plane> {
    let services = vec![(ads::SERVICE, Arc::clone(ads) as _)];
    let istiod = Istiod::start(Setup { services: services.clone(), ..Setup::default() }).await?;
    if whose == For::Istio {
        return Ok(Plane::Istiod(istiod));
    }
    let now = time::OffsetDateTime::now_utc();
    let id = "spiffe://cluster.local/ns/app/sa/client";
    let (chain, key) = istiod.ca.issue(id, now - time::Duration::HOUR, now + time::Duration::DAY)?;
    let inline = |text: String| core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineString(text)),
        ..Default::default()
    };
    let certificate = tls::TlsCertificate {
        certificate_chain: Some(inline(chain)),
        private_key: Some(inline(key)),
        ..Default::default()
    };
    let roots = tls::CertificateValidationContext { trusted_ca: Some(inline(istiod.roots())), ..Default::default() };
    for (name, of) in [
        ("default", tls::secret::Type::TlsCertificate(certificate)),
        ("ROOTCA", tls::secret::Type::ValidationContext(roots)),
    ] {
        ads.set(Kind::Secret, name, any(&tls::Secret { name: name.to_owned(), r#type: Some(of) }));
    }
    Ok(Plane::Plain(Server::start(None, services).await?))
}

/// Ours with recorded responses; nothing is called, as nothing is redirected.
fn recorded(programs: &Programs, runtime: &Runtime, recording: &Path) -> Result<Scaled> {
    let [admin, ready, metrics, ..] = free_ports()?.map(|port| port.to_string());
    let folder = tempfile::Builder::new().prefix("istio-scale-").tempdir()?;
    let proxy = fs::canonicalize(&programs.proxy)?;
    let certs = folder.path().join("certs");
    let mut ca = Command::new(&proxy);
    ca.args(["ca", "--id", "spiffe://cluster.local/ns/app/sa/client", "--dir"]).arg(&certs);
    ensure!(ca.output()?.status.success(), "no certificates for {}", recording.display());
    let mut command = Command::new(&proxy);
    command.args(["proxy", "sidecar", "--concurrency", "2", "--admin-port", &admin, "--status-port", &ready]);
    command.args(["--metrics-port", &metrics, "--certs"]).arg(&certs).arg("--xds-dir").arg(recording);
    let node = recording.join("node.json");
    if node.is_file() {
        command.arg("--node").arg(node);
    }
    let began = Instant::now();
    let mut running = Running::start(command, &folder.path().join("proxy.log"))?;
    let at = until_ready(runtime, &mut running, ready.parse()?, "/healthz/ready").with_context(|| running.printed())?;
    let pid = running.pid();
    let (ready_cpu_seconds, rss_ready) = (cpu_of(pid).as_secs_f64(), resident_bytes(pid));
    std::thread::sleep(SETTLE);
    Ok(Scaled {
        peer: Peer::IstioProxy,
        mesh: recording.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        ready_seconds: at.duration_since(began).as_secs_f64(),
        ready_cpu_seconds,
        rss_ready,
        rss: resident_bytes(pid),
        rss_peak: peak_bytes(pid),
        push_us: None,
    })
}

fn until_ready(runtime: &Runtime, running: &mut Running, port: u16, path: &str) -> Result<Instant> {
    let at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let began = Instant::now();
    while running.is_alive() && began.elapsed() < LIMIT {
        if matches!(runtime.block_on(get(at, "localhost", path)), Ok(200)) {
            return Ok(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    anyhow::bail!("it did not become ready")
}

/// Status of a request on a connection of its own.
async fn get(at: SocketAddr, host: &str, path: &str) -> Result<u16> {
    let mut stream = TcpStream::connect(at).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let status = answer.get(9..12).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default();
    status.parse().with_context(|| String::from_utf8_lossy(&answer).into_owned())
}

/// The bench's service on every address of the loopback.
async fn serve_backend() -> Result<u16> {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(backend::accept(listener));
    Ok(port)
}

/// Ports that nobody has now.
fn free_ports() -> Result<[u16; 5]> {
    let mut held = Vec::new();
    for _ in 0..5 {
        held.push(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?);
    }
    let ports: Vec<u16> = held.iter().map(|l| Ok(l.local_addr()?.port())).collect::<Result<_>>()?;
    ports.try_into().ok().context("five ports")
}

fn line(one: &Scaled) -> String {
    let push = one.push_us.map_or_else(|| "-".to_owned(), |us| format!("{us:.0}"));
    format!(
        "{:<16} {:<12} {:>7.2} {:>7.2} {:>9.1} {:>9.1} {:>9.1} {push:>8}",
        one.mesh,
        table::name(one.peer),
        one.ready_seconds,
        one.ready_cpu_seconds,
        table::megabytes(one.rss_ready),
        table::megabytes(one.rss),
        table::megabytes(one.rss_peak),
    )
}

/// The lines of the table.
pub(super) fn text(all: &[Scaled]) -> String {
    if all.is_empty() {
        return String::new();
    }
    let head = format!(
        "{:<16} {:<12} {:>7} {:>7} {:>9} {:>9} {:>9} {:>8}\n",
        "mesh", "proxy", "ready_s", "cpu_s", "rss_ready", "rss_mb", "peak_mb", "push_us"
    );
    let shape = format!("of {} ports with {ENDPOINTS} endpoints each, traffic to {USED}\n", PORTS.len());
    let lines: Vec<String> = all.iter().map(|one| line(one) + "\n").collect();
    head + &lines.concat() + &shape
}

/// Goals that were missed: memory and time of ours beside Envoy's with the same mesh.
pub(super) fn missed(all: &[Scaled]) -> Vec<String> {
    let mut missed = Vec::new();
    for ours in all.iter().filter(|one| one.peer == Peer::IstioProxy) {
        let Some(envoy) = all.iter().find(|one| one.peer == Peer::Envoy && one.mesh == ours.mesh) else { continue };
        for (what, share) in [
            ("memory", ours.rss as f64 / envoy.rss as f64),
            ("time to ready", ours.ready_seconds / envoy.ready_seconds),
        ] {
            if share > MOST_OF_ENVOY {
                missed.push(format!("{}: {share:.2} of Envoy's {what}, at most {MOST_OF_ENVOY}", ours.mesh));
            }
        }
    }
    missed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(peer: Peer, ready_seconds: f64, rss: u64) -> Scaled {
        Scaled {
            peer,
            mesh: "m".to_owned(),
            ready_seconds,
            ready_cpu_seconds: 0.0,
            rss_ready: rss,
            rss,
            rss_peak: rss,
            push_us: None,
        }
    }

    #[test]
    fn a_fifth_of_envoy_is_the_limit() {
        let envoy = one(Peer::Envoy, 10.0, 100);
        assert!(missed(&[envoy.clone(), one(Peer::IstioProxy, 2.0, 20)]).is_empty());
        let dear = missed(&[envoy, one(Peer::IstioProxy, 2.1, 21)]);
        assert_eq!(dear.len(), 2, "{dear:?}");
        assert!(missed(&[one(Peer::IstioProxy, 2.1, 21)]).is_empty(), "nothing to compare with");
    }
}
