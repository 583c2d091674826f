//! Where it is measured: two namespaces, the measured proxies alone on the first core, load and service on the second.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::case::{A, B, Case, HOSTS, PORT, PRINCIPAL, SERVER, host, vip};
use super::idle::Held;
use super::load::Measured;
use super::{envoy, haproxy, own};
use crate::child::Running;
use crate::netns::{Lab, Space, wait_for};

/// The measured proxies' core.
const PROXY_CORE: &str = "0";
/// Everything else's.
const LOAD_CORE: &str = "1";
/// More answers than this, in a hundred, must have status 200.
const MOST_ERRORS_PERCENT: u64 = 1;

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Peer {
    /// No proxy.
    Direct,
    /// The reference.
    Envoy,
    /// A C proxy known to be quick.
    Haproxy,
    /// Ours.
    IstioProxy,
}

/// The programs, and how long a run takes.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    /// Ours.
    pub(super) proxy: PathBuf,
    /// The reference.
    pub(super) envoy: PathBuf,
    /// Seconds that count.
    pub(super) seconds: f64,
    /// Connections of the load.
    pub(super) connections: usize,
}

/// What one run came to.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Run {
    /// Case.
    pub(super) case: &'static str,
    /// Who.
    pub(super) peer: Peer,
    /// Raw.
    pub(super) measured: Measured,
    /// CPU time of the proxies for a request, microseconds.
    pub(super) cpu_us: f64,
    /// Requests a second.
    pub(super) rps: f64,
    /// Resident memory of the proxies at the end.
    pub(super) rss_bytes: u64,
}

/// One case made ready: dropping it takes everything away.
pub(super) struct Rig<'a> {
    case: &'a Case,
    programs: &'a Programs,
    a: Space,
    b: Space,
    _backend: Running,
    _lab: Lab,
    folder: tempfile::TempDir,
}

impl<'a> Rig<'a> {
    /// Namespaces, certificates, configurations, the service.
    ///
    /// # Errors
    /// When something cannot be made or started.
    pub(super) fn new(case: &'a Case, programs: &'a Programs) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("istio-bench-").tempdir()?;
        let root = folder.path();
        let proxy = root.join("istio-proxy");
        fs::copy(&programs.proxy, &proxy).with_context(|| format!("cannot copy {}", programs.proxy.display()))?;
        fs::copy(&programs.envoy, root.join("envoy"))
            .with_context(|| format!("cannot copy {}", programs.envoy.display()))?;
        let certs = root.join("certs");
        for (name, id) in [("a", PRINCIPAL), ("b", SERVER)] {
            let mut command = Command::new(&proxy);
            command.args(["ca", "--id", &format!("spiffe://{id}"), "--root"]).arg(root.join("ca"));
            succeed(command.arg("--dir").arg(certs.join(name)))?;
        }
        own::write(case, &root.join("config"))?;
        envoy::write(case, root, &certs)?;
        haproxy::write(case, root, &certs)?;
        succeed(Command::new("chown").args(["-R", "1337:1337"]).arg(root))?;
        let mut lab = Lab::new("bench")?;
        let a = lab.space("a", &[&format!("{A}/8")])?;
        let b = lab.space("b", &[&format!("{B}/8")])?;
        redirect(case, &a, &b, &proxy)?;
        let mut command = b.command("taskset");
        command.args(["-c", LOAD_CORE]).arg(std::env::current_exe()?);
        command.args(["bench-backend", "--listen", &format!("{B}:{PORT}")]);
        let backend = Running::start(command, &root.join("backend.log"))?;
        wait_for("a service that listens", Duration::from_secs(5), || b.listens(PORT))?;
        Ok(Self { case, programs, a, b, _backend: backend, _lab: lab, folder })
    }

    /// One run with fresh proxies.
    ///
    /// # Errors
    /// When a proxy does not start or answers wrongly.
    pub(super) fn run(&self, peer: Peer) -> Result<Run> {
        let mut proxies = Vec::new();
        if peer != Peer::Direct {
            proxies.push(self.start(peer, "b", &self.b)?);
            if self.case.pair {
                proxies.push(self.start(peer, "a", &self.a)?);
            }
        }
        if peer != Peer::Direct {
            let status = self.refused()?;
            ensure!(status == "403", "{}: {peer:?} answers {status} where policy refuses", self.case.name);
        }
        let pids: Vec<u32> = proxies.iter().map(Running::pid).collect();
        let measured = self.load(peer, &pids).with_context(|| {
            let printed: Vec<String> = proxies.iter().map(Running::printed).collect();
            format!("{} with {peer:?}, which printed:\n{}", self.case.name, printed.join("\n"))
        })?;
        let rss_bytes = proxies.iter().map(Running::resident_bytes).sum();
        let cpu: f64 = measured.cpu_seconds.iter().sum();
        Ok(Run {
            case: self.case.name,
            peer,
            cpu_us: cpu * 1e6 / measured.requests as f64,
            rps: measured.requests as f64 / measured.seconds,
            rss_bytes,
            measured,
        })
    }

    fn start(&self, peer: Peer, side: &str, space: &Space) -> Result<Running> {
        let root = self.folder.path();
        let mut command = space.command_as_proxy("taskset");
        command.args(["-c", PROXY_CORE]);
        let port = if side == "a" { 15001 } else { 15006 };
        match peer {
            Peer::Direct => bail!("no proxy to start"),
            Peer::Envoy => {
                command.arg(root.join("envoy")).args([
                    "--concurrency",
                    "1",
                    "--use-dynamic-base-id",
                    "-l",
                    "error",
                    "-c",
                ]);
                command.arg(root.join(format!("envoy-{side}.json")));
            }
            Peer::Haproxy => {
                command.args(["haproxy", "-db", "-f"]).arg(root.join(format!("haproxy-{side}.cfg")));
            }
            Peer::IstioProxy => own_command(&mut command, root, &root.join("config"), side),
        }
        let mut running = Running::start(command, &root.join(format!("{side}.log")))?;
        let ready = wait_for("readiness", Duration::from_secs(20), || {
            !running.is_alive() || (space.listens(port) && (peer != Peer::IstioProxy || is_ready(space)))
        });
        ensure!(running.is_alive(), "{peer:?} ended:\n{}", running.printed());
        ready.with_context(|| format!("{peer:?} printed:\n{}", running.printed()))?;
        Ok(running)
    }

    /// Where calls come from, and where they go.
    fn way(&self) -> Result<(&Space, SocketAddr)> {
        let (from, address) = if self.case.pair { (&self.a, vip(0)) } else { (&self.b, B.to_owned()) };
        Ok((from, SocketAddr::new(address.parse::<Ipv4Addr>()?.into(), PORT)))
    }

    /// The caller's own certificate, where it speaks TLS itself.
    fn client_certs(&self) -> Option<PathBuf> {
        (self.case.mtls && !self.case.pair).then(|| self.folder.path().join("certs").join("a"))
    }

    /// Status of a request that no policy allows.
    fn refused(&self) -> Result<String> {
        let (from, target) = self.way()?;
        let mut command = from.command("curl");
        command.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "5", "--http1.1", "-H"]);
        command.arg(format!("host: {}", host(0)));
        let certs = self.client_certs();
        if let Some(certs) = &certs {
            command.arg("-k").arg("--cert").arg(certs.join("cert-chain.pem")).arg("--key").arg(certs.join("key.pem"));
        }
        let scheme = if certs.is_some() { "https" } else { "http" };
        let out = command.arg(format!("{scheme}://{target}/for-nobody")).output().context("cannot run curl")?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// What each of so many silent connections takes of a fresh proxy.
    ///
    /// # Errors
    /// When the proxy does not start or a connection is not served.
    pub(super) fn hold(&self, peer: Peer, connections: usize, mute: bool) -> Result<Held> {
        let proxy = self.start(peer, "b", &self.b)?;
        let (from, target) = self.way()?;
        let files = format!("--nofile={}:", connections + 1_000);
        let mut command = from.command("prlimit");
        command.args([&files, "taskset", "-c", LOAD_CORE]).arg(std::env::current_exe()?);
        command.args(["bench-load", "--hold", "--target", &target.to_string(), "--host", &host(0)]);
        command.args(["--connections", &connections.to_string(), "--pid", &proxy.pid().to_string()]);
        if mute {
            command.arg("--mute");
        }
        if let Some(certs) = self.client_certs() {
            command.arg("--certs").arg(certs);
        }
        let out = command.output().context("cannot start the load")?;
        let told = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "{peer:?}: {}; it printed:\n{}", told.trim(), proxy.printed());
        serde_json::from_slice(&out.stdout).context("what the load printed")
    }

    fn load(&self, peer: Peer, pids: &[u32]) -> Result<Measured> {
        let (from, target) = self.way()?;
        // The redirect leaves the proxy's own user alone.
        let mut command = if peer == Peer::Direct { from.command_as_proxy("taskset") } else { from.command("taskset") };
        command.args(["-c", LOAD_CORE]).arg(std::env::current_exe()?).args(["bench-load", "--target"]);
        command.arg(target.to_string()).args(["--host", &host(0)]);
        command.args(["--seconds", &self.programs.seconds.to_string()]);
        command.args(["--connections", &self.programs.connections.to_string()]);
        if let Some(certs) = self.client_certs() {
            command.arg("--certs").arg(certs);
        }
        for pid in pids {
            command.args(["--pid", &pid.to_string()]);
        }
        let out = command.output().context("cannot start the load")?;
        let told = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "the load ended: {}", told.trim());
        let measured: Measured = serde_json::from_slice(&out.stdout).context("what the load printed")?;
        let errors = measured.errors * 100 > measured.requests * MOST_ERRORS_PERCENT;
        ensure!(!errors, "{} answers, {} failures: {}", measured.requests, measured.errors, told.trim());
        Ok(measured)
    }

    /// Resident bytes of our proxy without configuration, 5 s after it is ready.
    ///
    /// # Errors
    /// When it does not start.
    pub(super) fn rss_empty(&self) -> Result<u64> {
        let root = self.folder.path();
        let empty = root.join("empty");
        own::write_empty(&empty)?;
        let mut command = self.a.command_as_proxy("taskset");
        command.args(["-c", PROXY_CORE]);
        own_command(&mut command, root, &empty, "a");
        let mut running = Running::start(command, &root.join("empty.log"))?;
        let ready = wait_for("readiness", Duration::from_secs(20), || !running.is_alive() || is_ready(&self.a));
        ensure!(running.is_alive() && ready.is_ok(), "without configuration it printed:\n{}", running.printed());
        std::thread::sleep(Duration::from_secs(5));
        Ok(running.resident_bytes())
    }
}

fn own_command(command: &mut Command, root: &Path, config: &Path, side: &str) {
    command.arg(root.join("istio-proxy")).args(["proxy", "--concurrency", "1", "--config"]).arg(config);
    command.arg("--certs").arg(root.join("certs").join(side)).env("POD_NAME", side);
    let (namespace, account, address) =
        if side == "a" { ("frontend", "frontend-sa", A) } else { ("apps", "payment-sa", B) };
    command.env("POD_NAMESPACE", namespace).env("SERVICE_ACCOUNT", account).env("INSTANCE_IP", address);
}

/// Calls to the service end at the proxy's port. A pair has the rules of a mesh; a single proxy is called over the
/// loopback, so that the wire between two machines is not part of what is compared.
fn redirect(case: &Case, a: &Space, b: &Space, proxy: &Path) -> Result<()> {
    if case.pair {
        for space in [a, b] {
            let mut command = space.command(&proxy.to_string_lossy());
            command.args(["istio-iptables", "-i", "*", "-b", "*", "-d", "15020,15021,15090"]);
            succeed(&mut command)?;
        }
        return Ok(());
    }
    let mut command = b.command("iptables");
    command.args(["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", B, "--dport", &PORT.to_string()]);
    command.args(["-m", "owner", "!", "--uid-owner", "1337", "-j", "REDIRECT", "--to-ports", "15006"]);
    succeed(&mut command)
}

fn is_ready(space: &Space) -> bool {
    let url = "http://127.0.0.1:15021/healthz/ready";
    space.command("curl").args(["-s", "-f", "-m", "1", url]).output().is_ok_and(|out| out.status.success())
}

fn succeed(command: &mut Command) -> Result<()> {
    let out = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let told = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{command:?}: {}", told.trim());
    Ok(())
}

/// Longest list of virtual hosts that fits the addresses in use.
const _: () = assert!(HOSTS <= 200);
