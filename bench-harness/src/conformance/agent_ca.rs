//! Recorded conversations with a CA. A recording is read as a world — which token, which files, what the CA did with each
//! request — the binary is put into that world, and what it sends and leaves on disk is compared.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use x509_parser::prelude::{
    FromDer, GeneralName, ParsedCriAttribute, ParsedExtension, X509CertificationRequest, parse_x509_pem,
};

use super::agent_run::{Agent, Workload, mode};
use super::agent_said::{metadata, recorded_metadata};
use super::tally::{Difference, Tally};
use super::{Bench, Set, cases};
use crate::istiod::ca::Asked;
use crate::istiod::{Answer, Ca, Istiod, Setup};

/// Calls that are compared when they fail again and again.
const ENOUGH_FAILURES: usize = 6;
/// Recorded time after which further calls are not waited for.
const ENOUGH_MS: u64 = 31_000;
/// Times that are not about waiting.
const PROMPT: Duration = Duration::from_secs(30);
/// Times may be ten times what was recorded.
const SLOWER: u64 = 10;
/// Lifetimes below this are kept exactly; longer ones get istiod's allowance for clocks.
const SHORT_LIVED: i64 = 3600;
const TOKEN: &str = "var/run/secrets/tokens/istio-token";
const CREATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// One recorded call.
#[derive(Debug, Clone)]
struct Call {
    at_ms: u64,
    metadata: Value,
    request: Value,
    client_chain: u64,
    answer: Answer,
}

/// What the recording tells.
struct World {
    calls: Vec<Call>,
    /// No handshake of the server was accepted.
    impostor: bool,
    /// The first connection came late: nobody was there before.
    late: bool,
}

/// Runs the cases.
///
/// # Errors
/// When a file of the set cannot be read, or the binary cannot be run.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    for case in cases(set) {
        let name = case["name"].as_str().unwrap_or_default();
        if !bench.wants(name) {
            continue;
        }
        let folder = set.folder.join(name);
        let read = |file: &str| fs::read_to_string(folder.join(file));
        let said: Value = serde_json::from_str(&read("case.json").with_context(|| format!("{name}: case.json"))?)?;
        let Ok(conversation) = read("conversation.jsonl") else {
            tally.unsupported("a recording without its conversation");
            continue;
        };
        let events: Vec<Value> = conversation.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let world = World::of(&events);
        let content = json!({"case": said, "calls": world.calls.len()});
        let found = runtime.block_on(replay(bench, &said, &world)).with_context(|| name.to_owned())?;
        tally.judge(bench.rules, name, &content, found);
    }
    Ok(tally)
}

impl World {
    fn of(events: &[Value]) -> Self {
        let mut chains: HashMap<u64, u64> = HashMap::new();
        let (mut calls, mut streams) = (Vec::new(), HashMap::new());
        let (mut accepted, mut refused, mut first) = (0, 0, None);
        let mut connection = 0;
        for event in events {
            let stream = event["stream_n"].as_u64();
            match event["ev"].as_str().unwrap_or_default() {
                "tls" => {
                    accepted += 1;
                    first = first.or_else(|| event["t_ms"].as_u64());
                    let length = event["client_cert"]["chain_len"].as_u64().unwrap_or(0);
                    chains.insert(event["conn"].as_u64().unwrap_or(0), length);
                }
                "tls_handshake_failed" => refused += 1,
                "h2" if event["frame"] == "HEADERS" && is_create(&event["headers"]) => {
                    connection = event["conn"].as_u64().unwrap_or(0);
                }
                "stream_open" if event["method"] == CREATE => {
                    streams.insert(stream, calls.len());
                    calls.push(Call {
                        at_ms: event["t_ms"].as_u64().unwrap_or(0),
                        metadata: event["metadata"].clone(),
                        request: Value::Null,
                        client_chain: chains.get(&connection).copied().unwrap_or(0),
                        answer: Answer::Hang,
                    });
                }
                _ => {}
            }
            if let Some(call) = streams.get(&stream).and_then(|at| calls.get_mut(*at)) {
                call.take(event);
            }
        }
        Self { calls, impostor: accepted == 0 && refused > 0, late: first.is_some_and(|ms| ms > 5_000) }
    }

    fn has_certificate(&self) -> bool {
        self.calls.iter().any(|call| matches!(call.answer, Answer::Sign | Answer::SignFor(_)))
    }

    /// Calls to wait for and to compare.
    fn compared(&self) -> &[Call] {
        let certificate = self.has_certificate();
        let many = |at: usize, call: &Call| at > 0 && (call.at_ms > ENOUGH_MS || !certificate && at >= ENOUGH_FAILURES);
        let count = self.calls.iter().enumerate().position(|(at, call)| many(at, call));
        &self.calls[..count.unwrap_or(self.calls.len())]
    }

    fn workload(&self) -> Workload {
        let csr = self.calls.first().and_then(|call| describe(call.request["csr"].as_str()?).ok());
        let id = csr.as_ref().and_then(|csr| csr["names"].as_str()).and_then(Workload::of);
        id.unwrap_or_else(|| Workload {
            trust_domain: "cluster.local".to_owned(),
            namespace: "default".to_owned(),
            account: "default".to_owned(),
        })
    }
}

fn is_create(headers: &Value) -> bool {
    headers.as_array().into_iter().flatten().any(|pair| pair[0] == ":path" && pair[1] == CREATE)
}

impl Call {
    fn take(&mut self, event: &Value) {
        let code = |name: &str| code(name).map(Answer::Status);
        match (event["ev"].as_str().unwrap_or_default(), event["from"].as_str()) {
            ("msg", Some("agent")) => self.request = event["json"].clone(),
            ("msg", Some("istiod")) => {
                let seconds = seconds(&self.request["validity_duration"]);
                let exact = Answer::SignFor(Duration::from_secs(seconds.unsigned_abs()));
                self.answer = if seconds < SHORT_LIVED { exact } else { Answer::Sign };
            }
            ("inject", _) => match event["mode"].as_str().unwrap_or_default() {
                "hang" => self.answer = Answer::Hang,
                "chain1" => self.answer = Answer::OneElement,
                mode => self.answer = code(mode).unwrap_or_else(|| self.answer.clone()),
            },
            ("stream_end", _) if event["by"] != "agent" && self.answer == Answer::Hang => {
                self.answer = event["code"].as_str().and_then(code).unwrap_or(Answer::Hang);
            }
            _ => {}
        }
    }
}

/// A gRPC code by its name in any case.
pub(super) fn code(name: &str) -> Option<tonic::Code> {
    let plain = |text: &str| text.to_ascii_lowercase().replace(['_', ' '], "").replace("cancelled", "canceled");
    (1..17).map(tonic::Code::from).find(|code| plain(&format!("{code:?}")) == plain(name))
}

fn seconds(value: &Value) -> i64 {
    value.as_i64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
}

async fn replay(bench: &Bench<'_>, said: &Value, world: &World) -> Result<Vec<Difference>> {
    let server_ca = if world.impostor { Some(Arc::new(Ca::new("impostor")?)) } else { None };
    let istiod = Istiod::start(Setup { server_ca, ..Setup::default() }).await?;
    let calls = world.compared();
    istiod.ca.then(calls.iter().map(|call| call.answer.clone()));
    istiod.ca.otherwise(calls.last().map_or(Answer::Sign, |call| call.answer.clone()));
    let mut agent = prepare(said, world, &istiod)?;
    istiod.server.set_down(world.late);
    agent.start(bench)?;
    let mut found = Vec::new();
    if said["exit"].as_i64().is_some_and(|code| code != 0) {
        let code = agent.ended(PROMPT).await;
        differ(&mut found, "exit", &said["exit"], &json!(code));
        differ(&mut found, "calls", &json!(0), &json!(istiod.ca.calls().len()));
        return Ok(found);
    }
    if world.late {
        // Long enough for the first attempts to fail.
        sleep(Duration::from_secs(2)).await;
        istiod.server.set_down(false);
    }
    if world.impostor {
        let tried = timeout(PROMPT, istiod.server.connections().reach(2)).await;
        differ(
            &mut found,
            "connections",
            &json!("several, refused"),
            &json!(match tried {
                Ok(all) if all.iter().all(|c| c.error.is_some()) => "several, refused",
                Ok(_) => "accepted",
                Err(_) => "none",
            }),
        );
    }
    follow(&mut agent, &istiod, world, &mut found).await?;
    // The last of the three that are written.
    let last = "etc/certs/root-cert.pem";
    if world.has_certificate() && !said["files_after"][last].is_null() && !agent.sees_new(last, PROMPT).await {
        found.push(Difference::new("files", last, agent.last_line()));
    }
    compare_files(said, &agent, world.has_certificate(), &mut found);
    if agent.is_over() {
        found.push(Difference::new("exit", "it goes on", agent.last_line()));
    }
    Ok(found)
}

/// Waits for one call after the other, does in between what was done to the recorded agent, and compares.
async fn follow(agent: &mut Agent, istiod: &Istiod, world: &World, found: &mut Vec<Difference>) -> Result<()> {
    let calls = world.compared();
    let mut last = Instant::now();
    for (at, call) in calls.iter().enumerate() {
        if at > 0 && token(&calls[at - 1]).is_some() && token(call).is_none() {
            fs::remove_file(agent.at(TOKEN)).context("the token goes")?;
        }
        let before = if at == 0 { 0 } else { calls[at - 1].at_ms };
        let limit = PROMPT.max(Duration::from_millis((call.at_ms - before) * SLOWER));
        let reached = timeout(limit, istiod.ca.calls().reach(at + 1)).await;
        let Ok(asked) = reached else {
            let waited = format!("none within {:?}: {}", last.elapsed(), agent.last_line());
            found.push(Difference::new(format!("calls[{at}]"), "a call", waited));
            return Ok(());
        };
        last = Instant::now();
        compare_call((at, world.late), call, &asked[at], found);
    }
    Ok(())
}

/// The folder as it was before the recording began.
fn prepare(said: &Value, world: &World, istiod: &Istiod) -> Result<Agent> {
    let mut agent = Agent::new(istiod, &world.workload())?;
    let files = &said["files_after"];
    let outputs = files["etc/certs"].is_object();
    if outputs {
        agent.set("PROV_CERT", "./etc/certs");
        agent.set("OUTPUT_CERTS", "./etc/certs");
    }
    if !files["etc/certs/root-cert.pem"].is_null() {
        // As a user copies it: the same certificate, not the same text, so that it is written anew.
        agent.write("etc/certs/root-cert.pem", &format!("{}\n", istiod.roots()))?;
    }
    let pod_root = "var/run/secrets/istio/root-cert.pem";
    if !files[pod_root].is_null() || !outputs {
        agent.write(pod_root, &istiod.roots())?;
    }
    let first = world.calls.first();
    match first.and_then(token) {
        Some(token) => agent.write(TOKEN, token.trim_start_matches("Bearer "))?,
        None if !files[TOKEN].is_null() => agent.write(TOKEN, "")?,
        None => {}
    }
    // Certificates that were there before, and were shown, or were not because they had expired.
    let shown = first.is_some_and(|call| call.client_chain > 0);
    let expired = !world.has_certificate() && !files["etc/certs/cert-chain.pem"].is_null();
    if shown || expired {
        let who = world.workload();
        let id = format!("spiffe://{}/ns/{}/sa/{}", who.trust_domain, who.namespace, who.account);
        let (now, hour) = (time::OffsetDateTime::now_utc(), time::Duration::hours(1));
        let until = if shown { now + hour } else { now - hour };
        let (chain, key) = istiod.ca.issue(&id, now - hour * 2, until)?;
        // As the agent writes it, with the root twice at the end.
        agent.write("etc/certs/cert-chain.pem", &format!("{chain}{0}{0}", istiod.roots()))?;
        agent.write("etc/certs/key.pem", &key)?;
    }
    agent.set_all(&said["env"]);
    Ok(agent)
}

fn token(call: &Call) -> Option<&str> {
    call.metadata["authorization"][0].as_str()
}

/// `late`: the first calls met a closed door. How many that were is the moment's affair.
fn compare_call((at, late): (usize, bool), call: &Call, asked: &Asked, found: &mut Vec<Difference>) {
    let field = |name: &str| format!("calls[{at}].{name}");
    let mut headers = asked.metadata.clone().into_headers();
    if late && at == 0 {
        headers.remove("x-retry-attempt");
    }
    let sent = metadata(&headers);
    differ(found, &field("metadata"), &recorded_metadata(&call.metadata), &sent);
    let request = &call.request;
    differ(found, &field("client_certificate"), &json!(call.client_chain), &json!(asked.peer.certificates.len()));
    if request.is_null() {
        // The recorder did not read the message of a call that it never answered.
        return;
    }
    let validity = seconds(&request["validity_duration"]);
    differ(found, &field("validity_duration"), &json!(validity), &json!(asked.request.validity_duration));
    differ(found, &field("metadata.CertSigner"), &request["metadata"]["CertSigner"], &json!(asked.request.signer()));
    let described = |csr: &str| describe(csr).unwrap_or_else(|e| json!(format!("{e:#}")));
    let recorded = described(request["csr"].as_str().unwrap_or_default());
    differ(found, &field("csr"), &recorded, &described(&asked.request.csr));
}

/// A certificate request without the key itself and its signature.
fn describe(csr: &str) -> Result<Value> {
    let (_, pem) = parse_x509_pem(csr.as_bytes())?;
    let (_, request) = X509CertificationRequest::from_der(&pem.contents)?;
    let info = &request.certification_request_info;
    let mut names = Vec::new();
    let mut extensions = Vec::new();
    for attribute in info.iter_attributes() {
        if let ParsedCriAttribute::ExtensionRequest(asked) = attribute.parsed_attribute() {
            for extension in &asked.extensions {
                extensions.push(format!("{} critical={}", extension.oid, extension.critical));
                if let ParsedExtension::SubjectAlternativeName(san) = extension.parsed_extension() {
                    names.extend(san.general_names.iter().map(|name| match name {
                        GeneralName::URI(uri) => (*uri).to_owned(),
                        other => format!("{other:?}"),
                    }));
                }
            }
        }
    }
    let bits = info.subject_pki.parsed().map(|key| key.key_size()).unwrap_or(0);
    let subject: String = info.subject.as_raw().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(json!({
        "label": pem.label,
        "subject": subject,
        "key": format!("{} {bits}", info.subject_pki.algorithm.algorithm),
        "signature": request.signature_algorithm.algorithm.to_string(),
        "extensions": extensions,
        "names": names.join(","),
    }))
}

/// Certificates on disk: modes and blocks of what was written, or that nothing was. Which text ends with an empty line
/// differs from write to write in the recordings.
fn compare_files(said: &Value, agent: &Agent, written: bool, found: &mut Vec<Difference>) {
    for (path, recorded) in said["files_after"].as_object().into_iter().flatten() {
        let Some(name) = path.strip_prefix("etc/certs/") else { continue };
        let at = agent.at(path);
        if !written {
            differ(found, &format!("files.{name}"), &json!(true), &json!(at.exists()));
            continue;
        }
        let permissions = mode(&at).map(|mode| mode.replacen("0o100", "0o", 1));
        differ(found, &format!("files.{name}.mode"), &recorded["mode"], &json!(permissions));
        differ(found, &format!("files.{name}.pem_blocks"), &recorded["pem_blocks"], &json!(blocks(&at)));
    }
}

fn blocks(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().filter(|line| line.starts_with("-----BEGIN")).map(str::to_owned).collect()
}

pub(super) fn differ(found: &mut Vec<Difference>, field: &str, expected: &Value, seen: &Value) {
    if expected != seen {
        found.push(Difference::new(field, expected, seen));
    }
}
