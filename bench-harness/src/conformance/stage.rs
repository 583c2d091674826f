//! Where wire cases play: namespaces, redirect rules, the proxy, the two peers.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::input::Input;
use crate::child::Running;
use crate::netns::{Lab, Space, wait_for};

/// Which side of the mesh the proxy is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// Server sidecar.
    Inbound,
    /// Client sidecar.
    Outbound,
}

/// Where its configuration comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mouth {
    /// Istio YAML.
    Yaml,
    /// Recorded resources.
    Recording,
}

impl Mouth {
    /// For messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Yaml => "YAML",
            Self::Recording => "recorded",
        }
    }
}

/// A peer process inside a namespace.
struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    fn start(space: &Space, certs: &Path, from: Option<&str>) -> Result<Self> {
        let own = std::env::current_exe()?;
        let mut command = space.command(&own.to_string_lossy());
        command.arg("peer").arg("--certs").arg(certs);
        if let Some(from) = from {
            command.args(["--from", from]);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start a peer")?;
        let input = child.stdin.take().expect("a pipe was asked for");
        let output = BufReader::new(child.stdout.take().expect("a pipe was asked for"));
        Ok(Self { child, input, output })
    }

    fn ask(&mut self, command: &Value) -> Result<Value> {
        writeln!(self.input, "{command}").context("the peer is gone")?;
        self.input.flush()?;
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "the peer ended");
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A stage with its peers; the proxy comes and goes.
pub(super) struct Stage {
    side: Side,
    proxy: Option<Running>,
    told: String,
    apps: Peer,
    clients: Option<Peer>,
    server: Space,
    read_to: u64,
    folder: tempfile::TempDir,
    // Last: namespaces go after what runs inside.
    _lab: Lab,
}

impl Stage {
    /// Builds namespaces and peers.
    ///
    /// # Errors
    /// When the machine refuses.
    pub(super) fn build(tag: &str, side: Side, certs: &Path, own: &str) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("istio-wire-").tempdir()?;
        certificates(folder.path(), certs, own)?;
        let mut lab = Lab::new(tag)?;
        let certs = fs::canonicalize(certs)?;
        let (server, apps, clients) = match side {
            Side::Inbound => {
                let server = lab.space("server", &["10.0.1.5/24", "10.0.2.20/24"])?;
                let client = lab.space("client", &["10.0.1.9/24", "10.0.1.77/24", "10.0.2.9/24"])?;
                rules(&server, &["-t nat -A PREROUTING -p tcp -j REDIRECT --to-ports 15006"])?;
                let apps = Peer::start(&server, &certs, None)?;
                (server, apps, Some(Peer::start(&client, &certs, None)?))
            }
            Side::Outbound => {
                let space = lab.space("mesh", &["10.1.0.9/8"])?;
                let local = space.command("ip").args(["route", "add", "local", "10.0.0.0/8", "dev", "lo"]).output()?;
                ensure!(local.status.success(), "cannot make 10.0.0.0/8 local");
                rules(
                    &space,
                    &[
                        "-t nat -A OUTPUT -m owner --uid-owner 1337 -j RETURN",
                        "-t nat -A OUTPUT -d 127.0.0.1/32 -j RETURN",
                        "-t nat -A OUTPUT -p tcp -j REDIRECT --to-ports 15001",
                        "-A OUTPUT -d 10.1.0.250/32 -p tcp --syn -m owner --uid-owner 1337 -j DROP",
                    ],
                )?;
                (space.clone(), Peer::start(&space, &certs, Some("10.1.0.9"))?, None)
            }
        };
        Ok(Self { side, proxy: None, told: String::new(), apps, clients, server, read_to: 0, folder, _lab: lab })
    }

    fn log_file(&self) -> PathBuf {
        self.folder.path().join("log").join("access.jsonl")
    }

    /// Starts the proxy unless it runs.
    ///
    /// # Errors
    /// When it does not become ready; tells what it printed.
    pub(super) fn ensure(&mut self, proxy: &Path, mouth: Mouth, input: &Input, recording: &Path) -> Result<()> {
        if self.proxy.as_mut().is_some_and(Running::is_alive) {
            return Ok(());
        }
        let mut command = self.server.command_as_proxy(&proxy.to_string_lossy());
        command.args(["proxy", "--concurrency", "1", "--node"]).arg(&input.node);
        command.arg("--certs").arg(self.folder.path().join("certs")).arg("--access-log").arg(self.log_file());
        match mouth {
            Mouth::Recording => {
                command.arg("--xds-dir").arg(recording);
            }
            Mouth::Yaml => {
                for file in &input.files {
                    command.arg("--config").arg(file);
                }
                if let Some(mesh) = &input.mesh {
                    command.arg("--mesh").arg(mesh);
                }
                if let Some(networks) = &input.networks {
                    command.arg("--networks").arg(networks);
                }
            }
        }
        let mut running = Running::start(command, &self.folder.path().join("proxy.log"))?;
        let port = if self.side == Side::Inbound { 15006 } else { 15001 };
        let server = self.server.clone();
        wait_for("readiness", Duration::from_secs(15), || !running.is_alive() || server.listens(port))
            .with_context(|| running.printed())?;
        if !running.is_alive() {
            bail!("the proxy ended: {}", running.printed().trim());
        }
        self.proxy = Some(running);
        self.read_to = fs::metadata(self.log_file()).map_or(0, |m| m.len());
        Ok(())
    }

    /// Stops the proxy.
    pub(super) fn stop(&mut self) {
        if let Some(running) = self.proxy.take() {
            self.told.push_str(&running.printed());
        }
    }

    /// What the proxy printed about panics.
    pub(super) fn panicked(&mut self) -> Option<String> {
        self.stop();
        self.told.lines().find(|line| line.contains("panicked at")).map(str::to_owned)
    }

    /// Starts the applications of a case.
    ///
    /// # Errors
    /// When an address is taken or the peer is gone.
    pub(super) fn begin(&mut self, case: &Value) -> Result<()> {
        let (apps, defaults) = match self.side {
            Side::Inbound => (inbound_apps(&case["app"]), inbound_defaults()),
            Side::Outbound => (case["backends"].clone(), outbound_defaults()),
        };
        let answer = self.apps.ask(&json!({"do": "begin", "apps": apps, "defaults": defaults}))?;
        ensure!(answer["ok"] == true, "the applications did not start: {}", answer["error"]);
        Ok(())
    }

    /// Plays a client.
    ///
    /// # Errors
    /// When the peer is gone.
    pub(super) fn step(&mut self, step: &Value) -> Result<Value> {
        let peer = self.clients.as_mut().unwrap_or(&mut self.apps);
        peer.ask(&json!({"do": "step", "step": step}))
    }

    /// Closes the applications and tells what they saw.
    ///
    /// # Errors
    /// When the peer is gone.
    pub(super) fn end(&mut self) -> Result<Value> {
        self.apps.ask(&json!({"do": "end"}))
    }

    /// New lines of the access log, once there are as many as wanted or the time is over.
    pub(super) fn log(&mut self, wanted: usize) -> Vec<Value> {
        let mut lines = Vec::new();
        // A line that does not come is the judge's business.
        wait_for("log lines", Duration::from_millis(1500), || {
            self.write_log();
            lines = self.new_lines();
            lines.len() >= wanted
        })
        .ok();
        self.read_to = fs::metadata(self.log_file()).map_or(0, |m| m.len());
        lines
    }

    /// Has the proxy write what it has logged.
    fn write_log(&self) {
        let Some(proxy) = &self.proxy else { return };
        // One that has just ended has written it.
        Command::new("kill").args(["-USR1", &proxy.pid().to_string()]).output().ok();
        std::thread::sleep(Duration::from_millis(5));
    }

    fn new_lines(&self) -> Vec<Value> {
        let Ok(mut file) = File::open(self.log_file()) else { return Vec::new() };
        let mut text = String::new();
        if file.seek(SeekFrom::Start(self.read_to)).is_err() || file.read_to_string(&mut text).is_err() {
            return Vec::new();
        }
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

/// The proxy's certificate folder, owned by its user.
fn certificates(folder: &Path, certs: &Path, own: &str) -> Result<()> {
    let target = folder.join("certs");
    fs::create_dir_all(&target)?;
    fs::create_dir_all(folder.join("log"))?;
    for (from, to) in [
        (format!("{own}.pem"), "cert-chain.pem"),
        (format!("{own}-key.pem"), "key.pem"),
        ("root.pem".to_owned(), "root-cert.pem"),
    ] {
        fs::copy(certs.join(&from), target.join(to)).with_context(|| format!("cannot copy {from}"))?;
    }
    let out = Command::new("chown").args(["-R", "1337:1337"]).arg(folder).output()?;
    ensure!(out.status.success(), "chown: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}

fn rules(space: &Space, lines: &[&str]) -> Result<()> {
    for line in lines {
        let out = space.command("iptables").arg("-w").args(line.split(' ')).output()?;
        ensure!(out.status.success(), "iptables {line}: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

/// The standard applications with a case's deviations.
fn inbound_apps(deviations: &Value) -> Value {
    let standard = [
        (8080, "h1"),
        (8082, "h1"),
        (9091, "h1"),
        (9187, "h1"),
        (7001, "h1"),
        (9090, "h2c"),
        (5432, "tcp"),
        (7070, "auto"),
    ];
    let own = deviations.as_array().cloned().unwrap_or_default();
    let mut all: Vec<Value> = standard
        .iter()
        .filter(|(port, _)| !own.iter().any(|app| app["listen"] == *port))
        .map(|(port, protocol)| json!({"listen": port, "protocol": protocol}))
        .collect();
    all.extend(own);
    Value::Array(all)
}

fn inbound_defaults() -> Value {
    json!({
        "h1": {"send": "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nx-app: 1\r\n\r\nok\n"},
        "h2": {
            "headers": [[":status", "200"], ["content-type", "application/grpc"], ["x-app", "1"]],
            "dataBase64": "AAAAAAJvaw==",
            "trailers": [["grpc-status", "0"]],
        },
    })
}

fn outbound_defaults() -> Value {
    json!({
        "h1": {"send": "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok\n"},
        "h2": {"headers": [[":status", "200"]], "data": "ok\n"},
    })
}
