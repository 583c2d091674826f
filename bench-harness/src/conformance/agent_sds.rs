//! Recorded exchanges on the workload's socket: the client's messages are put to the real binary, its answers compared by
//! what secrets they name and of which kind, and how streams end.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::{BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use prost::Message;
use proxy_config::xds::{self, DiscoveryRequest, DiscoveryResponse, Material, Secret, Status};
use serde_json::{Map, Value, json};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::agent_ca::differ;
use super::agent_run::{Agent, Workload, mode};
use super::tally::{Difference, Tally};
use super::{Bench, Set, cases};
use crate::istiod::{Answer, Istiod, Setup};

const SOCKET: &str = "var/run/secrets/workload-spiffe-uds/socket";
const CREDENTIALS: &str = "var/run/secrets/workload-spiffe-credentials";
const SERVICE: &str = "/envoy.service.secret.v3.SecretDiscoveryService";
/// Times may be ten times what was recorded, and not less than this.
const PROMPT: Duration = Duration::from_secs(10);
const SLOWER: u64 = 10;
/// How long nothing more must come where nothing more came.
const QUIET: Duration = Duration::from_millis(300);
/// Whose socket it is, where a case does not say.
const ID: &str = "spiffe://cluster.local/ns/frontend/sa/frontend-sa";

/// Runs the cases.
///
/// # Errors
/// When the binary cannot be run.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    for case in cases(set) {
        let name = case["name"].as_str().unwrap_or_default();
        if !bench.wants(name) {
            continue;
        }
        if case["exchange"].is_array() {
            let found = runtime.block_on(exchange(bench, case)).with_context(|| name.to_owned())?;
            tally.judge(bench.rules, name, case, found);
        } else if case["dir_mode"].is_string() {
            let found = runtime.block_on(modes(bench, case)).with_context(|| name.to_owned())?;
            tally.judge(bench.rules, name, case, found);
        } else {
            tally.unsupported("the case is a log or a start's failure, not an exchange");
        }
    }
    Ok(tally)
}

/// A control plane and an agent in the state that the case's group tells.
async fn start(bench: &Bench<'_>, case: &Value) -> Result<(Istiod, Agent)> {
    let istiod = Istiod::start(Setup::default()).await?;
    let mut agent = Agent::new(&istiod, &Workload::of(ID).context("a SPIFFE id")?)?;
    agent.write("var/run/secrets/istio/root-cert.pem", &istiod.roots())?;
    agent.write("var/run/secrets/tokens/istio-token", "token")?;
    match case["group"].as_str().unwrap_or_default() {
        "ca-unavailable" => istiod.ca.otherwise(Answer::Status(tonic::Code::Unavailable)),
        "rotation" => {
            agent.set("SECRET_TTL", "20s");
            istiod.ca.otherwise(Answer::SignFor(Duration::from_secs(20)));
        }
        "stale-socket" => {
            let path = agent.at(SOCKET);
            fs::create_dir_all(path.parent().context("a folder")?)?;
            drop(std::os::unix::net::UnixListener::bind(&path)?);
        }
        "regular-file" => agent.write(SOCKET, "not a socket")?,
        "file-identity" => {
            let (chain, key) = pair(&istiod)?;
            agent.write(&format!("{CREDENTIALS}/cert-chain.pem"), &chain)?;
            agent.write(&format!("{CREDENTIALS}/key.pem"), &key)?;
            agent.write(&format!("{CREDENTIALS}/root-cert.pem"), &istiod.roots())?;
            agent.set("XDS_ROOT_CA", "./var/run/secrets/istio/root-cert.pem");
        }
        _ => {}
    }
    agent.start(bench)?;
    Ok((istiod, agent))
}

fn pair(istiod: &Istiod) -> Result<(String, String)> {
    let (now, hour) = (time::OffsetDateTime::now_utc(), time::Duration::hours(1));
    istiod.ca.issue(ID, now - hour, now + hour)
}

/// Connects as soon as somebody listens.
async fn connect(agent: &mut Agent) -> Result<UnixStream> {
    let path = agent.at(SOCKET);
    let attempt = async {
        loop {
            if let Ok(stream) = UnixStream::connect(&path).await {
                return stream;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match timeout(PROMPT, attempt).await {
        Ok(stream) => Ok(stream),
        Err(_) => Err(anyhow!("nobody serves the socket: {}", agent.last_line())),
    }
}

async fn modes(bench: &Bench<'_>, case: &Value) -> Result<Vec<Difference>> {
    let (_istiod, mut agent) = start(bench, case).await?;
    let mut found = Vec::new();
    if let Err(e) = connect(&mut agent).await {
        return Ok(vec![Difference::new("socket", "served", format!("{e:#}"))]);
    }
    let socket = agent.at(SOCKET);
    differ(&mut found, "mode", &case["mode"], &json!(mode(&socket)));
    differ(&mut found, "dir_mode", &case["dir_mode"], &json!(socket.parent().and_then(mode)));
    let proxy = agent.at("etc/istio/proxy");
    differ(&mut found, "xds_socket_mode", &case["xds_socket_mode"], &json!(mode(&proxy.join("XDS"))));
    for (name, recorded) in case["proxy_dir"].as_object().into_iter().flatten() {
        differ(&mut found, &format!("proxy_dir.{name}"), recorded, &json!(mode(&proxy.join(name))));
    }
    Ok(found)
}

async fn exchange(bench: &Bench<'_>, case: &Value) -> Result<Vec<Difference>> {
    let (istiod, mut agent) = start(bench, case).await?;
    let stream = match connect(&mut agent).await {
        Ok(stream) => stream,
        Err(e) => return Ok(vec![Difference::new("socket", "served", format!("{e:#}"))]),
    };
    let (send, connection) = h2::client::handshake(stream).await?;
    let driver = tokio::spawn(async move {
        let _ = connection.await;
    });
    let arguments = case["client_args"].as_str().unwrap_or_default();
    let method = match arguments {
        a if a.contains("-mode delta") => "DeltaSecrets",
        a if a.contains("-mode fetch") => "FetchSecrets",
        _ => "StreamSecrets",
    };
    let files = Files { folder: agent.at("rig"), readable: end(case).is_none() };
    files.make(case, &istiod)?;
    let mut client = Client::open(send, method).await?;
    let mut found = Vec::new();
    client.replay(case, &files, &mut found).await?;
    driver.abort();
    Ok(found)
}

/// The code with which the server ended the stream; `None`: it did not, or the client's patience did.
fn end(case: &Value) -> Option<String> {
    let last = case["exchange"].as_array()?.last()?;
    let text = last["end"].as_str().or_else(|| last["err"].as_str())?;
    let code = text.split("code = ").nth(1)?.split(' ').next()?;
    (code != "DeadlineExceeded").then(|| code.to_owned())
}

/// Files that a case names below a folder of the recorder.
struct Files {
    folder: std::path::PathBuf,
    /// Where the recorded agent could not read them, they are not there.
    readable: bool,
}

impl Files {
    fn local(&self, name: &str) -> String {
        name.replace("$RIG", &self.folder.display().to_string())
    }

    fn recorded(&self, name: &str) -> String {
        name.replace(&self.folder.display().to_string(), "$RIG")
    }

    fn make(&self, case: &Value, istiod: &Istiod) -> Result<()> {
        if !self.readable {
            return Ok(());
        }
        let messages = case["exchange"].as_array().into_iter().flatten();
        for name in messages.flat_map(|m| m["json"]["resource_names"].as_array().into_iter().flatten()) {
            let Some((kind, paths)) = name.as_str().and_then(|name| name.split_once(':')) else { continue };
            let paths: Vec<String> = paths.split('~').filter(|p| p.contains("$RIG")).map(|p| self.local(p)).collect();
            let (chain, key) = pair(istiod)?;
            match (kind, &*paths) {
                ("file-root", [root]) => write(root, &istiod.roots())?,
                ("file-cert", [chain_at, key_at]) => {
                    write(chain_at, &chain)?;
                    write(key_at, &key)?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn write(path: &str, text: &str) -> Result<()> {
    fs::create_dir_all(Path::new(path).parent().context("a folder")?)?;
    fs::write(path, text).with_context(|| path.to_owned())
}

/// One gRPC stream, framed by hand.
struct Client {
    send: SendStream<Bytes>,
    response: Option<ResponseFuture>,
    body: Option<RecvStream>,
    buffer: BytesMut,
    last: DiscoveryResponse,
    /// How it ended, once it has.
    ended: Option<String>,
}

/// What came.
enum Came {
    Response(DiscoveryResponse),
    End(String),
    Nothing,
}

impl Client {
    async fn open(send: SendRequest<Bytes>, method: &str) -> Result<Self> {
        let mut send = send.ready().await?;
        let request = http::Request::post(format!("http://localhost{SERVICE}/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (response, stream) = send.send_request(request, false)?;
        let last = DiscoveryResponse::default();
        Ok(Self { send: stream, response: Some(response), body: None, buffer: BytesMut::new(), last, ended: None })
    }

    async fn replay(&mut self, case: &Value, files: &Files, found: &mut Vec<Difference>) -> Result<()> {
        let exchange = case["exchange"].as_array().context("an exchange")?;
        let mut before = 0;
        for (at, entry) in exchange.iter().enumerate() {
            let ms = entry["t_ms"].as_u64().unwrap_or(before);
            let patience = PROMPT.max(Duration::from_millis(ms.saturating_sub(before) * SLOWER));
            before = ms;
            match entry["from"].as_str() {
                Some("client") => self.say(&entry["json"], files),
                Some("agent") => {
                    let recorded = named(&entry["json"]);
                    let seen = match self.next(patience).await {
                        Came::Response(response) => {
                            let seen = said(&response, files);
                            self.last = response;
                            seen
                        }
                        Came::End(code) => json!(format!("end {code}")),
                        Came::Nothing => json!("nothing"),
                    };
                    differ(found, &format!("exchange[{at}]"), &recorded, &seen);
                }
                _ => {}
            }
        }
        let ended = end(case);
        let patience = if ended.is_some() { PROMPT * 2 } else { QUIET };
        let seen = match self.next(patience).await {
            Came::Response(response) => said(&response, files).to_string(),
            Came::End(code) => code,
            Came::Nothing => "open".to_owned(),
        };
        differ(found, "end", &json!(ended.as_deref().unwrap_or("open")), &json!(seen));
        Ok(())
    }

    /// Sends a recorded request; versions and nonces are those of our own last response. What cannot be sent any more shows
    /// in the next answer.
    fn say(&mut self, json: &Value, files: &Files) {
        let text = |name: &str| json[name].as_str().unwrap_or_default().to_owned();
        let names = json["resource_names"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let id = json["node"]["id"].as_str();
        let had = |name: &str, ours: &str| if text(name).is_empty() { String::new() } else { ours.to_owned() };
        let request = DiscoveryRequest {
            version_info: had("version_info", &self.last.version_info),
            // Node: {1: id}
            node: id.map(|id| Tag { text: id.to_owned() }.encode_to_vec().into()),
            resource_names: names.map(|name| files.local(name)).collect(),
            type_url: text("type_url"),
            response_nonce: had("response_nonce", &self.last.nonce),
            error_detail: json["error_detail"].as_object().map(|_| Status {
                code: 13,
                message: json["error_detail"]["message"].as_str().unwrap_or_default().to_owned(),
            }),
        };
        let message = request.encode_to_vec();
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
        frame.put_slice(&message);
        let _ = self.send.send_data(frame.freeze(), false);
    }

    async fn next(&mut self, patience: Duration) -> Came {
        if let Some(code) = &self.ended {
            return Came::End(code.clone());
        }
        let came = timeout(patience, self.receive()).await.unwrap_or(Came::Nothing);
        if let Came::End(code) = &came {
            self.ended = Some(code.clone());
        }
        came
    }

    async fn receive(&mut self) -> Came {
        if let Some(response) = &mut self.response {
            let answered = response.await;
            self.response = None;
            match answered {
                Ok(response) => {
                    if let Some(code) = status(response.headers()) {
                        return Came::End(code);
                    }
                    self.body = Some(response.into_body());
                }
                Err(e) => return Came::End(e.to_string()),
            }
        }
        let Some(body) = &mut self.body else { return Came::End("without a response".to_owned()) };
        loop {
            if let Some(message) = message(&mut self.buffer) {
                return DiscoveryResponse::decode(message).map_or_else(|e| Came::End(e.to_string()), Came::Response);
            }
            match body.data().await {
                Some(Ok(data)) => {
                    let _ = body.flow_control().release_capacity(data.len());
                    self.buffer.put_slice(&data);
                }
                Some(Err(e)) => return Came::End(e.to_string()),
                None => {
                    let trailers = body.trailers().await.ok().flatten().unwrap_or_default();
                    return Came::End(status(&trailers).unwrap_or_else(|| "without a status".to_owned()));
                }
            }
        }
    }
}

/// A message with one text as its first field.
#[derive(Clone, PartialEq, prost::Message)]
struct Tag {
    #[prost(string, tag = "1")]
    text: String,
}

/// A whole message at the front of the buffer.
fn message(buffer: &mut BytesMut) -> Option<Bytes> {
    const HEAD: usize = 5;
    let length = u32::from_be_bytes(buffer.get(1..HEAD)?.try_into().ok()?) as usize;
    if buffer.len() < HEAD + length {
        return None;
    }
    let whole = buffer.split_to(HEAD + length).freeze();
    Some(whole.slice(HEAD..))
}

fn status(headers: &http::HeaderMap) -> Option<String> {
    let code: i32 = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    Some(format!("{:?}", tonic::Code::from(code)))
}

/// What a recorded response says of its secrets.
fn named(response: &Value) -> Value {
    let resources = response["resources"].as_array().into_iter().flatten().map(|resource| {
        let kinds: BTreeMap<&String, Vec<&String>> = resource
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| !["@type", "name"].contains(&name.as_str()))
            .map(|(name, value)| (name, value.as_object().into_iter().flatten().map(|(field, _)| field).collect()))
            .collect();
        json!({"name": resource["name"], "kinds": kinds})
    });
    json!({"type": response["type_url"], "resources": resources.collect::<Vec<_>>()})
}

/// The same of one of ours.
fn said(response: &DiscoveryResponse, files: &Files) -> Value {
    let kind = |secret: &Secret| -> Map<String, Value> {
        let (name, fields) = match &secret.material {
            Material::Certificate { .. } => ("tls_certificate", json!(["certificate_chain", "private_key"])),
            Material::Roots { revoked: None, .. } => ("validation_context", json!(["trusted_ca"])),
            Material::Roots { .. } => ("validation_context", json!(["crl", "trusted_ca"])),
            Material::Domains(_) => ("validation_context", json!(["custom_validator_config"])),
        };
        Map::from_iter([(name.to_owned(), fields)])
    };
    let resources = response.resources.iter().map(|any| match xds::secret(any).map(|read| read.value) {
        Ok(secret) => json!({"name": files.recorded(&secret.name), "kinds": kind(&secret)}),
        Err(e) => json!(e.to_string()),
    });
    json!({"type": response.type_url, "resources": resources.collect::<Vec<_>>()})
}
