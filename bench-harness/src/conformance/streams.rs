//! Recorded discovery streams: the server's half is fed to the proxy's own stream state, which must end every step with
//! the recorded client's subscriptions and with the resources that the server gave it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use base64::prelude::{BASE64_STANDARD, Engine};
use bytes::Bytes;
use flate2::read::GzDecoder;
use istio_proxy::xds::{
    Ads, DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, HEALTH, Health, Kind, Options, Request,
    Response, Status,
};
use prost::Message;
use proxy_config::xds::DiscoveryResponse;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Bench;
use super::tally::{Difference, Tally};

/// A whole conversation.
///
/// # Errors
/// When the transcript cannot be read.
pub(super) fn conversation(bench: &Bench<'_>, name: &str, folder: &Path) -> Result<Tally> {
    let path = folder.join("transcript.jsonl");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let mut replay = Replay::new(&lines)?;
    for (at, line) in lines.iter().enumerate() {
        replay.line(line).with_context(|| format!("{}:{}", path.display(), at + 1))?;
        if lines.get(at + 1).is_none_or(|next| next["step"] != line["step"]) {
            replay.step_ends(line["step"].as_str().unwrap_or_default());
        }
    }
    let mut tally = Tally::default();
    tally.judge(bench.rules, name, &json!({"kind": "stream"}), replay.differences);
    Ok(tally)
}

/// A large configuration, as the answers to a client's first questions, then once more, then with one load assignment
/// changed.
///
/// # Errors
/// When the recording cannot be read.
pub(super) fn scale(bench: &Bench<'_>, name: &str, case: &Value, folder: &Path) -> Result<Tally> {
    let mut out = Vec::new();
    let now = Instant::now();
    let mut ads = Ads::new(Options {
        delta: false,
        node: Bytes::new(),
        names: true,
        proxy_config: false,
        checks: istio_proxy::control::CHECKS,
    });
    ads.connected(now);
    let mut take = |ads: &mut Ads, file: &str, changed: bool, response: DiscoveryResponse| {
        let step = ads.received(response.into(), now, SystemTime::now());
        if !step.refused.is_empty() {
            out.push(Difference::new(format!("{file}.refused"), "nothing", &step.refused[0]));
        }
        if step.changed != changed {
            out.push(Difference::new(format!("{file}.changed"), changed, step.changed));
        }
    };
    let files =
        [("cds", "cds.pb.gz"), ("eds", "eds.pb.gz"), ("lds", "lds.pb.gz"), ("nds", "nds.pb.gz"), ("rds", "rds.pb.gz")];
    for again in [false, true] {
        for (kind, file) in files {
            take(&mut ads, kind, !again, unpack(&folder.join(file))?);
        }
    }
    let served = ads.update(now);
    let mut one = unpack(&folder.join("eds.pb.gz"))?;
    one.resources.truncate(1);
    let Some(first) = one.resources.first_mut() else { bail!("no load assignments") };
    // A policy with another overprovisioning factor.
    first.value = [&first.value[..], &[0x22, 0x04, 0x1a, 0x02, 0x08, 0x64]].concat().into();
    take(&mut ads, "one", true, one);
    let news = ads.update(now).and_then(|update| update.endpoints).map(|names| names.len());
    if news != Some(1) {
        out.push(Difference::new("one.endpoints", "one load assignment", format!("{news:?}")));
    }
    for (kind, short) in
        [(Kind::Cluster, "cds"), (Kind::Endpoints, "eds"), (Kind::Listener, "lds"), (Kind::Routes, "rds")]
    {
        let expected = case["resources"][short].as_u64().unwrap_or_default() as usize;
        let held = ads.held(kind).len();
        let model = served.as_ref().map(|update| &update.model);
        let served = model.map_or(0, |model| match kind {
            Kind::Cluster => model.clusters.len(),
            Kind::Endpoints => model.endpoints.len(),
            Kind::Listener => model.listeners.len(),
            _ => model.routes.len(),
        });
        if (held, served) != (expected, expected) {
            out.push(Difference::new(format!("{short}.count"), expected, format!("held {held}, served {served}")));
        }
    }
    let mut tally = Tally::default();
    tally.judge(bench.rules, name, &json!({"kind": "scale"}), out);
    Ok(tally)
}

fn unpack(path: &Path) -> Result<DiscoveryResponse> {
    let packed = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut plain = Vec::new();
    GzDecoder::new(packed.as_slice()).read_to_end(&mut plain)?;
    DiscoveryResponse::decode(Bytes::from(plain)).with_context(|| format!("{} is no response", path.display()))
}

/// The proxy's stream beside what the recorded client knew.
struct Replay {
    ads: Ads,
    delta: bool,
    /// What the recorded client asked for on its stream.
    asked: BTreeMap<Kind, BTreeSet<String>>,
    /// What the server gave it of that.
    held: BTreeMap<Kind, BTreeMap<String, Bytes>>,
    health: Option<Health>,
    differences: Vec<Difference>,
}

impl Replay {
    fn new(lines: &[Value]) -> Result<Self> {
        let Some(first) = lines.first() else { bail!("an empty transcript") };
        // Both kinds of request begin with a node; only the state of the world has a version in its answers.
        let answer = lines.iter().find(|line| line["from"] == "server").unwrap_or(first);
        let delta = answer["json"]["version_info"].is_null();
        let names = lines.iter().any(|line| line["type"] == "nds");
        let options =
            Options { delta, node: Bytes::new(), names, proxy_config: false, checks: istio_proxy::control::CHECKS };
        Ok(Self {
            ads: Ads::new(options),
            delta,
            asked: BTreeMap::new(),
            held: BTreeMap::new(),
            health: None,
            differences: Vec::new(),
        })
    }

    fn line(&mut self, line: &Value) -> Result<()> {
        let bytes = BASE64_STANDARD.decode(line["pb"].as_str().context("no pb")?)?;
        let step = line["step"].as_str().unwrap_or_default();
        match line["from"].as_str() {
            Some("client") if self.delta => self.asks(step, DeltaDiscoveryRequest::decode(bytes.as_slice())?),
            Some("client") => self.asks_world(step, &DiscoveryRequest::decode(bytes.as_slice())?),
            Some("server") => {
                let bytes = Bytes::from(bytes);
                let response: Response = if self.delta {
                    DeltaDiscoveryResponse::decode(bytes)?.into()
                } else {
                    DiscoveryResponse::decode(bytes)?.into()
                };
                self.gives(step, response);
            }
            other => bail!("from {other:?}"),
        }
        Ok(())
    }

    /// The recorded client's request.
    fn asks(&mut self, step: &str, request: DeltaDiscoveryRequest) {
        if request.node.is_some() {
            self.reconnects(step);
        }
        if request.type_url == HEALTH {
            self.reports(step, request.error_detail);
            return;
        }
        let Some(kind) = Kind::of(&request.type_url).filter(|_| request.response_nonce.is_empty()) else { return };
        let asked = self.asked.entry(kind).or_default();
        if kind.is_wildcard() {
            return;
        }
        asked.extend(request.resource_names_subscribe);
        asked.extend(request.initial_resource_versions.into_keys());
        for name in &request.resource_names_unsubscribe {
            asked.remove(name);
        }
        let asked = asked.clone();
        self.held.entry(kind).or_default().retain(|name, _| asked.contains(name));
    }

    fn asks_world(&mut self, step: &str, request: &DiscoveryRequest) {
        if request.node.is_some() {
            self.reconnects(step);
        }
        if request.type_url == HEALTH {
            self.reports(step, request.error_detail.clone());
            return;
        }
        let Some(kind) = Kind::of(&request.type_url) else { return };
        let asked: BTreeSet<String> = request.resource_names.iter().cloned().collect();
        if !kind.is_wildcard() {
            self.held.entry(kind).or_default().retain(|name, _| asked.contains(name));
        }
        self.asked.insert(kind, asked);
    }

    fn reconnects(&mut self, step: &str) {
        self.asked.clear();
        self.ads.disconnected();
        let sent = self.ads.connected(Instant::now());
        let reported = sent.iter().filter(|request| request.type_url() == HEALTH).count();
        // The last known state goes out with every stream.
        if reported != usize::from(self.health.is_some()) {
            self.differ(step, "health", usize::from(self.health.is_some()), reported);
        }
        self.no_answers(step, &sent, None);
    }

    fn reports(&mut self, step: &str, detail: Option<Status>) {
        let health =
            Health { healthy: detail.is_none(), message: detail.clone().map(|d| d.message).unwrap_or_default() };
        self.health = Some(health.clone());
        let sent = self.ads.report(Some(health));
        let same = |request: &Request| request.type_url() == HEALTH && request.error() == detail.as_ref();
        if sent.len() != 1 || !sent.iter().all(same) {
            self.differ(step, "health", format!("{detail:?}"), format!("{sent:?}"));
        }
    }

    /// The server's message, to both.
    fn gives(&mut self, step: &str, response: Response) {
        let (url, nonce) = match &response {
            Response::Delta(r) => (r.type_url.clone(), r.nonce.clone()),
            Response::Sotw(r) => (r.type_url.clone(), r.nonce.clone()),
        };
        let Some(kind) = Kind::of(&url) else { return };
        self.remember(kind, &response);
        let outcome = self.ads.received(response, Instant::now(), SystemTime::UNIX_EPOCH);
        self.no_answers(step, &outcome.send, Some((kind, &nonce)));
    }

    fn remember(&mut self, kind: Kind, response: &Response) {
        let asked = self.asked.get(&kind).cloned().unwrap_or_default();
        let held = self.held.entry(kind).or_default();
        let wanted = |name: &str| kind.is_wildcard() || asked.contains(name);
        match response {
            Response::Delta(response) => {
                for resource in response.resources.iter().filter(|r| wanted(&r.name)) {
                    let value = resource.resource.clone().unwrap_or_default().value;
                    held.insert(resource.name.clone(), value);
                }
                for name in &response.removed_resources {
                    held.remove(name);
                }
            }
            Response::Sotw(response) => {
                if kind.is_wildcard() {
                    held.clear();
                }
                for any in &response.resources {
                    let name = if matches!(kind, Kind::Names | Kind::ProxyConfig) {
                        String::new()
                    } else {
                        name_of(&any.value)
                    };
                    if wanted(&name) {
                        held.insert(name, any.value.clone());
                    }
                }
            }
        }
    }

    /// Exactly the answer that is due, and no refusal.
    fn no_answers(&mut self, step: &str, sent: &[Request], due: Option<(Kind, &str)>) {
        if let Some(refusal) = sent.iter().find_map(Request::error).filter(|_| due.is_some()) {
            self.differ(step, "refused", "nothing", &refusal.message);
        }
        if !self.delta {
            // Subscriptions carry the last nonce too; the first of a type's requests is the answer.
            if let Some((kind, nonce)) = due
                && sent.first().is_none_or(|r| r.type_url() != kind.url() || r.nonce() != nonce)
            {
                self.differ(step, "answer", nonce, format!("{:?}", sent.first()));
            }
            return;
        }
        let answers: Vec<(&str, &str)> =
            sent.iter().filter(|r| !r.nonce().is_empty()).map(|r| (r.type_url(), r.nonce())).collect();
        let expected: Vec<(&str, &str)> = due.iter().map(|(kind, nonce)| (kind.url(), *nonce)).collect();
        if answers != expected {
            self.differ(step, "answers", format!("{expected:?}"), format!("{answers:?}"));
        }
    }

    fn step_ends(&mut self, step: &str) {
        let received = self.ads.bytes();
        for kind in Kind::ALL {
            let asked = self.asked.get(&kind).cloned().unwrap_or_default();
            let told: BTreeSet<String> = self.ads.subscribed(kind).iter().map(ToString::to_string).collect();
            if told != asked {
                self.differ(step, &format!("{kind:?}.subscribed"), format!("{asked:?}"), format!("{told:?}"));
            }
            let expected = self.held.get(&kind).cloned().unwrap_or_default();
            let held: BTreeMap<String, Bytes> = (received.of(kind).into_iter())
                .filter_map(|(name, record)| record.accepted.map(|version| (name.to_string(), version.bytes.bytes())))
                .collect();
            let names: BTreeSet<&String> = expected.keys().chain(held.keys()).collect();
            let differing: Vec<&String> = names.into_iter().filter(|n| expected.get(*n) != held.get(*n)).collect();
            if !differing.is_empty() {
                let what = |of: &BTreeMap<String, Bytes>| {
                    let one = |name: &&String| format!("{name} {:?}", of.get(*name).map(Bytes::len));
                    differing.iter().map(one).collect::<Vec<_>>().join(", ")
                };
                self.differ(step, &format!("{kind:?}.held"), what(&expected), what(&held));
            }
        }
    }

    fn differ(&mut self, step: &str, field: &str, expected: impl ToString, seen: impl ToString) {
        self.differences.push(Difference::new(format!("step[{step}].{field}"), expected, seen));
    }
}

/// Every resource but the name table begins with its name.
fn name_of(value: &[u8]) -> String {
    #[derive(Clone, PartialEq, Message)]
    struct Named {
        #[prost(string, tag = "1")]
        name: String,
    }
    Named::decode(value).map(|named| named.name).unwrap_or_default()
}
