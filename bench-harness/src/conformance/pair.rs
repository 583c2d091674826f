//! One or two real proxies on the loopback, configured by resources of ours, with a client and an application of ours.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use prost::Message;
use serde_json::{Value, json};

use super::resources::{self, Leg};
use crate::child::Running;
use crate::netns::wait_for;

const LIMIT: Duration = Duration::from_secs(10);

/// Who the two proxies are, for certificates.
const IDENTITIES: [(&str, &str); 2] = [
    ("client", "spiffe://cluster.local/ns/default/sa/client"),
    ("server", "spiffe://cluster.local/ns/default/sa/server"),
];

/// Proxies under test.
pub(super) struct Pair {
    case: Value,
    entry: SocketAddr,
    metrics: BTreeMap<&'static str, SocketAddr>,
    /// Whoever serves or was started lives as long.
    _running: Vec<Running>,
    _folder: tempfile::TempDir,
}

/// What is still open after the traffic.
pub(super) struct Traffic {
    pub(super) client_port: String,
    _open: Option<TcpStream>,
}

/// What the two ends of one request saw.
pub(super) struct Seen {
    pub(super) request: BTreeMap<String, String>,
    pub(super) response: BTreeMap<String, String>,
    pub(super) downstream: Option<BTreeMap<String, String>>,
    pub(super) upstream: Option<BTreeMap<String, String>>,
    pub(super) id: String,
}

impl Pair {
    /// A client's proxy and a server's proxy, as a case of `metrics` says.
    ///
    /// # Errors
    /// When a proxy does not start, or the case speaks a protocol that the runner does not.
    pub(super) fn start(proxy: &Path, case: &Value) -> Result<Self> {
        let input = &case["input"];
        let protocol = input["protocol"].as_str().unwrap_or_default();
        let tcp = protocol == "tcp";
        ensure!(tcp || protocol == "http/1.1", "{protocol} is not spoken by the runner");
        let folder = tempfile::Builder::new().prefix("istio-telemetry-").tempdir()?;
        let [app, server, client, server_metrics, client_metrics] = free_ports()?;
        let at_once = input["traffic"]["eachSends"].is_null() && input["traffic"]["note"].is_null();
        if tcp {
            serve_tcp(app, at_once)?
        } else {
            serve_http(app)?
        }
        let tls = input["tls"].is_string().then(|| alpn(input));
        let leg = |inbound: bool, listen: u16, to: u16| Leg {
            inbound,
            listen,
            to,
            tcp,
            tls: tls.clone(),
            stats: Some(stats(input, inbound)),
            exchange: exchange(input, inbound, tcp),
            services: input["clusterServices"].clone(),
            endpoint: input["endpointMetadata"]["istio"]["workload"].as_str().unwrap_or_default().to_owned(),
            cluster: Value::Null,
        };
        let mut running = Vec::new();
        for (name, leg, metrics) in
            [("server", leg(true, server, app), server_metrics), ("client", leg(false, client, server), client_metrics)]
        {
            let node = node(&input["nodes"][name]["metadata"], name, input);
            running.push(start(proxy, folder.path(), (name, &node), &leg, metrics)?);
        }
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Ok(Self {
            case: case.clone(),
            entry: address(client),
            metrics: [("client", address(client_metrics)), ("server", address(server_metrics))].into(),
            _running: running,
            _folder: folder,
        })
    }

    /// Sends what the case says.
    ///
    /// # Errors
    /// When something is not answered.
    pub(super) fn traffic(&mut self) -> Result<Traffic> {
        let (input, said) = (&self.case["input"], &self.case["input"]["traffic"]);
        let mut open = None;
        if input["protocol"] == "tcp" {
            let sends = said["eachSends"].as_str();
            let expected = said["eachReceives"].as_str().unwrap_or_default().len();
            for _ in 0..said["connections"].as_u64().unwrap_or(0) {
                converse(self.entry, sends.unwrap_or_default(), expected)?;
            }
            if said["connections"].is_null() {
                let mut stream = connect(self.entry)?;
                stream.write_all(b"world\n")?;
                stream.read_exact(&mut [0; 12])?;
                open = Some(stream);
            }
        } else {
            for _ in 0..said["requests"].as_u64().unwrap_or(0) {
                request(self.entry, said["path"].as_str().unwrap_or("/"), &[])?;
            }
            if let Some(seconds) = said["thenWaitSeconds"].as_u64() {
                std::thread::sleep(Duration::from_secs(seconds));
            }
        }
        Ok(Traffic { client_port: self.entry.port().to_string(), _open: open })
    }

    /// Prometheus text of a side.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) fn families(&self, side: &str) -> Result<String> {
        let at = self.metrics.get(side).context("no such side")?;
        Ok(request(*at, "/stats/prometheus", &[])?.1)
    }

    /// One request through one proxy with the filter of the case.
    ///
    /// # Errors
    /// When the proxy does not start or answer.
    pub(super) fn exchange(proxy: &Path, case: &Value) -> Result<Seen> {
        let input = &case["input"];
        let folder = tempfile::Builder::new().prefix("istio-telemetry-").tempdir()?;
        let [app, listen, metrics] = free_ports()?;
        let answer: Vec<(String, String)> = pairs(&input["responseHeaders"]);
        let heard = serve_once(app, answer)?;
        let config = &input["config"];
        let uses = |key: &str| config[key].as_array().is_some_and(|list| !list.is_empty());
        let inbound = !uses("upstream_discovery");
        let dimensions: BTreeMap<&str, String> = ["namespace", "region", "availability_zone"]
            .into_iter()
            .map(|field| {
                let peer = if inbound { "downstream_peer" } else { "upstream_peer" };
                (field, format!("filter_state.{peer}.{field}"))
            })
            .collect();
        let leg = Leg {
            inbound,
            listen,
            to: app,
            tcp: false,
            tls: None,
            stats: Some(json!({"metrics": [{"name": "requests_total", "dimensions": dimensions}]})),
            exchange: Some(config.clone()),
            services: Value::Null,
            endpoint: String::new(),
            cluster: input["upstreamClusterMetadata"]["istio"].clone(),
        };
        let said = &input["serverNode"]["metadata"];
        let node = node(if said.is_object() { said } else { &Value::Null }, "server", input);
        let id = node["id"].as_str().unwrap_or_default().to_owned();
        let _running = start(proxy, folder.path(), ("server", &node), &leg, metrics)?;
        let (head, _) = request(SocketAddr::from(([127, 0, 0, 1], listen)), "/", &pairs(&input["requestHeaders"]))?;
        let told = request(SocketAddr::from(([127, 0, 0, 1], metrics)), "/stats/prometheus", &[])?.1;
        let line = told.lines().find(|line| line.starts_with("istio_requests_total{")).context("no request counted")?;
        let label = |name: &str| {
            let after = line.split(&format!(",{name}=\"")).nth(1).unwrap_or_default();
            (name.to_owned(), after.split('"').next().unwrap_or_default().to_owned())
        };
        let peer: BTreeMap<String, String> =
            ["namespace", "region", "availability_zone"].into_iter().map(label).collect();
        let request = heard.lock().map_err(|_| anyhow::anyhow!("the application panicked"))?.clone();
        Ok(Seen {
            request: exchanged(&request),
            response: exchanged(&head),
            downstream: inbound.then(|| peer.clone()),
            upstream: (!inbound).then_some(peer),
            id,
        })
    }
}

/// Headers of the exchange in a head.
fn exchanged(head: &str) -> BTreeMap<String, String> {
    let pair = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()));
    let ours = |name: &str| matches!(name, "x-envoy-peer-metadata" | "x-envoy-peer-metadata-id" | "baggage");
    head.lines().filter_map(pair).filter(|(name, _)| ours(name)).collect()
}

fn pairs(of: &Value) -> Vec<(String, String)> {
    let fields = of.as_object().into_iter().flatten();
    fields.map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned())).collect()
}

/// What `istio.stats` is told on a side.
fn stats(input: &Value, inbound: bool) -> Value {
    let own = &input[if inbound { "serverStatsConfig" } else { "clientStatsConfig" }];
    let mut out = if own.is_object() { own.clone() } else { json!({}) };
    // One configuration for both sides of TCP, with a place for the side.
    if input["statsConfig"].is_object() {
        let side = if inbound { "downstream" } else { "upstream" };
        let text = input["statsConfig"].to_string().replace("{upstream|downstream}", side);
        out = serde_json::from_str(&text).unwrap_or_default();
    }
    out
}

/// How peers are learned of and told; `None`: not at all.
fn exchange(input: &Value, inbound: bool, tcp: bool) -> Option<Value> {
    let additional = &input["additionalMxLabels"];
    let note = input["note"].as_str().unwrap_or_default();
    if input["metadataExchange"] == "none" || inbound && note.contains("no MX filter on the server") {
        return None;
    }
    let mut config = match (tcp, inbound) {
        (true, _) => json!({"protocol": "istio-peer-exchange", "enable_discovery": true}),
        (false, true) => json!({
            "downstream_discovery": [{"istio_headers": {}}],
            "downstream_propagation": [{"istio_headers": {}}],
        }),
        (false, false) => json!({
            "upstream_discovery": [{"istio_headers": {}}],
            "upstream_propagation": [{"istio_headers": {}}],
        }),
    };
    if additional.is_array() {
        config["additional_labels"] = additional.clone();
    }
    Some(config)
}

/// ALPN of the connection between the proxies.
fn alpn(input: &Value) -> Vec<String> {
    let exchanged = input["alpn"].as_str().is_none_or(|alpn| alpn.starts_with("the MX protocol"));
    vec![if exchanged { "istio-peer-exchange" } else { "some-protocol" }.to_owned()]
}

/// A sidecar's node with the case's metadata.
fn node(metadata: &Value, name: &str, input: &Value) -> Value {
    let mut metadata = metadata.clone();
    if !metadata.is_object() {
        metadata = json!({});
    }
    if input["statsEviction"].is_string() {
        metadata["ANNOTATIONS"] = json!({"sidecar.istio.io/statsEvictionInterval": "1s"});
    }
    let namespace = metadata["NAMESPACE"].as_str().unwrap_or("default").to_owned();
    let workload = metadata["NAME"].as_str().unwrap_or(name).to_owned();
    let ips = metadata["INSTANCE_IPS"].as_str().and_then(|all| all.split(',').next());
    let ip = ips.unwrap_or("127.0.0.1").to_owned();
    json!({"id": format!("sidecar~{ip}~{workload}.{namespace}~{namespace}.svc.cluster.local"), "metadata": metadata})
}

/// Starts a proxy and waits until it listens.
fn start(proxy: &Path, folder: &Path, (name, node): (&str, &Value), leg: &Leg, metrics: u16) -> Result<Running> {
    let dir = folder.join(name);
    let xds = dir.join("xds");
    fs::create_dir_all(&xds)?;
    for (file, response) in resources::responses(leg) {
        fs::write(xds.join(file), response.encode_to_vec())?;
    }
    fs::write(dir.join("node.json"), node.to_string())?;
    let mut command = Command::new(proxy);
    command.args(["proxy", "--concurrency", "1", "--admin-port", "0", "--status-port", "0"]);
    command.args(["--metrics-port", &metrics.to_string(), "--node"]).arg(dir.join("node.json"));
    command.arg("--xds-dir").arg(&xds);
    if leg.tls.is_some() {
        let identity = IDENTITIES.iter().find(|(known, _)| *known == name).map_or("", |(_, id)| id);
        let certs = dir.join("certs");
        let made = Command::new(proxy)
            .arg("ca")
            .arg("--root")
            .arg(folder.join("root"))
            .arg("--dir")
            .arg(&certs)
            .args(["--id", identity])
            .output()?;
        ensure!(made.status.success(), "certificates: {}", String::from_utf8_lossy(&made.stderr));
        command.arg("--certs").arg(certs);
    }
    let mut running = Running::start(command, &dir.join("proxy.log"))?;
    let listens = |port: u16| TcpStream::connect(("127.0.0.1", port)).is_ok();
    wait_for("readiness", LIMIT, || !running.is_alive() || listens(metrics)).with_context(|| running.printed())?;
    if !running.is_alive() {
        bail!("the proxy ended: {}", running.printed().trim());
    }
    Ok(running)
}

fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let sockets: Vec<TcpListener> = (0..N).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    let ports: Vec<u16> = sockets.iter().map(|s| s.local_addr().map(|a| a.port())).collect::<Result<_, _>>()?;
    ports.try_into().map_err(|_| anyhow::anyhow!("ports"))
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Ok(stream)
}

/// Says something, hears so many bytes, and leaves; saying nothing, waits for the end.
fn converse(to: SocketAddr, say: &str, expected: usize) -> Result<()> {
    let mut stream = connect(to)?;
    stream.write_all(say.as_bytes())?;
    let mut heard = vec![0; expected];
    stream.read_exact(&mut heard)?;
    if !say.is_empty() {
        stream.shutdown(std::net::Shutdown::Write)?;
    }
    // Who is cut off has ended too.
    stream.read_to_end(&mut heard).ok();
    Ok(())
}

/// A request on a connection of its own: head and body of the answer.
fn request(to: SocketAddr, path: &str, headers: &[(String, String)]) -> Result<(String, String)> {
    let mut stream = connect(to)?;
    let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\n{lines}\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    Ok((head.to_owned(), body.to_owned()))
}

/// Reads a head from a connection.
fn head_of(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}

fn serve_http(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                while head_of(&mut stream).is_some() {
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\nhello, world!";
                    if stream.write_all(answer).is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(())
}

/// Answers with these headers and remembers the last head.
fn serve_once(port: u16, headers: Vec<(String, String)>) -> Result<Arc<Mutex<String>>> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let heard = Arc::new(Mutex::new(String::new()));
    let of_thread = Arc::clone(&heard);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let Some(head) = head_of(&mut stream) else { continue };
            if let Ok(mut heard) = of_thread.lock() {
                *heard = head;
            }
            let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            // A client that has gone is its own business.
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n{lines}\r\n").ok();
        }
    });
    Ok(heard)
}

/// Greets each line; `at_once`: closes without a word.
fn serve_tcp(port: u16, at_once: bool) -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            if at_once {
                continue;
            }
            std::thread::spawn(move || {
                let mut line = Vec::new();
                let mut byte = [0];
                while stream.read(&mut byte).is_ok_and(|n| n > 0) {
                    line.push(byte[0]);
                    if byte[0] == b'\n' && stream.write_all(&[b"hello ", &line[..]].concat()).is_ok() {
                        line.clear();
                    }
                }
            });
        }
    });
    Ok(())
}
