//! Recorded conversations of an agent with istiod. The binary is started as the agent was, against a control plane of ours
//! that plays istiod's half as it was recorded: same answers under the same nonces, same ends of streams. What the binary
//! says is compared with what the agent said: who it is, what vouches for it, what it asks for, how it answers.
//!
//! The recordings hold the names of Envoy's resources and not their content. Which clusters want endpoints, which listeners
//! name route tables and discovered filters follows from what the recorded Envoy asked for when it had them.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use istio_proxy::xds::{HEALTH, Kind, Request};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tonic::Code;

use super::agent_recording::{Act, Recording};
use super::agent_run::{Agent, Workload};
use super::agent_said::{Said, metadata, node, request};
use super::tally::{Difference, Tally};
use super::{Bench, Set, cases, vm};
use crate::istiod::ads::{self, Ads, Heard};
use crate::istiod::{Answer, Istiod, Setup};

/// Stands for the recorded address, which this machine does not have.
const OWN: &str = "127.0.0.5";
/// Streams that are compared when they are refused again and again.
const ENOUGH: usize = 6;
/// Least time that a message may take, and how much longer than recorded.
const PROMPT: Duration = Duration::from_secs(30);
const SLOWER: u32 = 3;
const TOKEN: &str = "var/run/secrets/tokens/istio-token";

/// Runs the cases, all at once: they spend their time waiting.
///
/// # Errors
/// When a file of the set cannot be read, or the binary cannot be run.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    thread::scope(|scope| -> Result<()> {
        let mut running = Vec::new();
        for case in cases(set) {
            let name = case["name"].as_str().unwrap_or_default().to_owned();
            if !bench.wants(&name) {
                continue;
            }
            let folder = set.folder.join(&name);
            let runtime = &runtime;
            running.push((name, scope.spawn(move || replay(bench, runtime, &folder))));
        }
        for (name, thread) in running {
            let done = thread.join().map_err(|_| anyhow::anyhow!("{name}: the case panicked"))?;
            let (content, found) = done.with_context(|| name.clone())?;
            tally.judge(bench.rules, &name, &content, found);
        }
        Ok(())
    })?;
    Ok(tally)
}

/// A case with what the rules may look at, and what differed.
fn replay(bench: &Bench<'_>, runtime: &Runtime, folder: &Path) -> Result<(Value, Vec<Difference>)> {
    let read = |file: &str| fs::read_to_string(folder.join(file)).with_context(|| file.to_owned());
    let case: Value = serde_json::from_str(&read("case.json")?)?;
    let fails_open = read("agent.log")?.contains("applying allow RBAC filter");
    let recording = Recording::read(&read("conversation.jsonl")?, fails_open)?;
    let content = json!({"case": case, "proxy": read("envoy-argv.txt")?, "kinds": recording.kinds()});
    let found = runtime.block_on(async {
        let ads = Arc::new(Ads::default());
        // Nothing is answered but what was recorded.
        Kind::ALL.into_iter().for_each(|kind| ads.hold(kind));
        let services = vec![(ads::SERVICE, Arc::clone(&ads) as _)];
        let istiod = Istiod::start(Setup { services, ..Setup::default() }).await?;
        istiod.ca.otherwise(if recording.signed { Answer::Sign } else { Answer::Status(Code::Unauthenticated) });
        let mut agent = prepare(folder, &case, &recording, &istiod)?;
        let mut found = Vec::new();
        let mut told = Told::default();
        for (at, run) in recording.runs.iter().enumerate() {
            let mut player = Player { istiod: &istiod, ads: &ads, recording: &recording, found: &mut found, told };
            player.prepare(run);
            agent.start(bench)?;
            let played = player.play(run, at > 0, &mut agent).await;
            told = player.told;
            let last = agent.last_line();
            agent.stop();
            if let Err(e) = played {
                found.push(Difference::new(format!("run[{at}]"), "as recorded", format!("{e:#}: {last}")));
                break;
            }
        }
        anyhow::Ok(found)
    })?;
    Ok((content, found))
}

/// The agent's folder and variables.
fn prepare(folder: &Path, case: &Value, recording: &Recording, istiod: &Istiod) -> Result<Agent> {
    let id: Vec<&str> = recording.id.split('~').collect();
    let [_, _, name, domain] = id[..] else { bail!("{} is no node id", recording.id) };
    let (pod, namespace) = name.split_once('.').context("a name with its namespace")?;
    let account = recording.account.clone();
    let who = Workload { trust_domain: "cluster.local".to_owned(), namespace: namespace.to_owned(), account };
    let mut agent = Agent::new(istiod, &who)?;
    // Keys of RSA take their time; what is asked of the CA is another set's affair.
    agent.set("ECC_SIGNATURE_ALGORITHM", "ECDSA");
    if let Some(token) = &recording.token {
        agent.write(TOKEN, token.trim_start_matches("Bearer "))?;
    }
    let address = format!("localhost:{}", istiod.address().port());
    let near = folder.parent().and_then(Path::parent).context("sets stand beside each other")?.join("bootstrap");
    let file = |path: &str| fs::read_to_string(near.join(path)).with_context(|| path.to_owned());
    if case["env"].as_object().is_some_and(|env| !env.is_empty()) {
        agent.set_all(&case["env"]);
        agent.write("var/run/secrets/istio/root-cert.pem", &istiod.roots())?;
        agent.write("etc/istio/pod/labels", &file("pod/pod-labels.txt")?)?;
        agent.write("etc/istio/pod/annotations", &file("pod/pod-annotations.txt")?)?;
        agent.set("PROXY_CONFIG", &format!("{{\"discoveryAddress\": \"{address}\"}}"));
        agent.arguments(&["--domain", domain]);
    } else {
        let bundle = if recording.registers { "vm" } else { "vm-no-dns" };
        let variables = vm::start_script(vm::cluster_env(&file(&format!("{bundle}/cluster.env"))?), pod);
        agent.variables(variables);
        agent.write("etc/certs/root-cert.pem", &istiod.roots())?;
        let mesh = file(&format!("{bundle}/mesh.yaml"))?;
        agent.write("etc/istio/config/mesh", &mesh.replace("istiod.istio-system.svc:15012", &address))?;
    }
    agent.set("CA_ADDR", &address);
    agent.set("INSTANCE_IP", OWN);
    // A fact that only the recording tells.
    agent.set("ISTIO_META_ISTIO_VERSION", &recording.version);
    Ok(agent)
}

/// How much of what the control plane has heard was looked at.
#[derive(Debug, Clone, Copy, Default)]
struct Told {
    streams: usize,
    refused: usize,
    connections: usize,
}

/// Plays istiod's half.
struct Player<'a> {
    istiod: &'a Istiod,
    ads: &'a Ads,
    recording: &'a Recording,
    found: &'a mut Vec<Difference>,
    told: Told,
}

impl Player<'_> {
    /// The first stream of a run may have to be refused before it begins.
    fn prepare(&self, run: &[Act]) {
        self.ads.refuse(
            run.iter()
                .find_map(|act| match act {
                    Act::Open { refused, .. } => Some(refused.clone()),
                    _ => None,
                })
                .flatten(),
        );
    }

    async fn play(&mut self, run: &[Act], again: bool, agent: &mut Agent) -> Result<()> {
        let mut said = Said::default();
        let mut streams = 0;
        for (at, act) in run.iter().enumerate() {
            match act {
                Act::Open { metadata: recorded, certified, refused } => {
                    streams += 1;
                    if streams > ENOUGH && !self.recording.served {
                        break;
                    }
                    self.ends(&said);
                    said = Said::new(self.told.streams + 1);
                    let headers = self.opens(refused.is_some()).await?;
                    self.differ(&said, "metadata", recorded, &metadata(&headers));
                    // A first stream of a machine without a certificate does not wait for one, nor need it be first.
                    said.certified = (streams > 1 || again).then_some(*certified);
                    if refused.is_some() {
                        self.prepare(&run[at + 1..]);
                    }
                }
                Act::Says { message, waited } => self.hears(&mut said, message, *waited, agent).await?,
                Act::Answers { response } => self.ads.say(response.as_ref().clone()),
                Act::Ends { status } => {
                    self.prepare(&run[at + 1..]);
                    self.ads.end(status.clone());
                }
                Act::HangsUp => self.istiod.server.hang_up(),
                Act::Leaves => {
                    self.told.connections = self.istiod.server.connections().len();
                    self.istiod.server.set_down(true);
                }
                Act::Returns => {
                    // It is tried meanwhile.
                    self.istiod.server.connections().reach(self.told.connections + 1).await;
                    self.istiod.server.set_down(false);
                }
            }
        }
        self.ends(&said);
        Ok(())
    }

    /// Waits for the next stream; its metadata.
    async fn opens(&mut self, refused: bool) -> Result<http::HeaderMap> {
        if refused {
            self.told.refused += 1;
            let all = timeout(PROMPT, self.ads.refused.reach(self.told.refused)).await.context("no stream")?;
            return Ok(all[self.told.refused - 1].clone());
        }
        self.told.streams += 1;
        let stream = self.told.streams;
        timeout(PROMPT, self.ads.opened.reach(stream)).await.context("no stream")?;
        let first = timeout(PROMPT, self.ads.hears(|heard| heard.stream == stream)).await.context("no message")?;
        Ok(first.metadata)
    }

    /// Waits for the next message of a type on this stream and compares it.
    async fn hears(&mut self, said: &mut Said, recorded: &Request, waited: Duration, agent: &mut Agent) -> Result<()> {
        let (stream, url) = (said.stream, recorded.type_url());
        let (count, answers) = (said.count(recorded), !recorded.nonce().is_empty());
        let limit = PROMPT.max(waited * SLOWER);
        let is = |heard: &&Heard| {
            let request = &heard.request;
            heard.stream == stream && request.type_url() == url && request.nonce().is_empty() != answers
        };
        let next = async {
            loop {
                let all = self.ads.heard.all();
                if let Some(heard) = all.iter().filter(is).nth(count) {
                    return heard.clone();
                }
                self.ads.heard.grows(all.len()).await;
            }
        };
        let field = said.field(recorded);
        let Ok(heard) = timeout(limit, next).await else {
            bail!(
                "{field} did not come within {limit:?} ({})",
                if agent.is_over() { "it has ended" } else { "it runs" }
            )
        };
        let here = format!("localhost:{}", self.istiod.address().port());
        if let (Some(expected), Some(seen)) = (node(recorded), node(&heard.request)) {
            let address = expected["metadata"]["PROXY_CONFIG"]["discoveryAddress"].as_str().unwrap_or_default();
            let own = self.recording.id.split('~').nth(1).unwrap_or_default();
            let seen = seen.to_string().replace(OWN, own).replace(&here, address);
            let seen = without_this_machine(serde_json::from_str(&seen)?)?;
            vm::differences(&format!("{field}.node"), &expected, &seen, self.found);
        }
        let own = self.recording.id.split('~').nth(1).unwrap_or_default();
        let seen = request(&heard.request).to_string().replace(OWN, own);
        vm::differences(&field, &request(recorded), &serde_json::from_str(&seen)?, self.found);
        if let Some(certified) = said.certified.take() {
            self.differ(said, "client_certificate", &json!(certified), &json!(heard.certified));
        }
        said.add(recorded);
        Ok(())
    }

    /// A stream is over: nothing was said that the agent did not say, and its questions came in the agent's order.
    fn ends(&mut self, said: &Said) {
        if said.is_empty() {
            return;
        }
        let all = self.ads.heard.all();
        let heard: Vec<&Request> = all.iter().filter(|h| h.stream == said.stream).map(|h| &h.request).collect();
        for extra in said.extra(&heard) {
            self.found.push(Difference::new(said.field(extra), "nothing", request(extra)));
        }
        let mut seen = Said::default();
        heard.iter().filter(|r| r.type_url() != HEALTH).for_each(|request| seen.add(request));
        self.differ(said, "order", &json!(said.order()), &json!(seen.order()));
    }

    fn differ(&mut self, said: &Said, field: &str, expected: &Value, seen: &Value) {
        if expected != seen {
            self.found.push(Difference::new(said.name(field), expected, seen));
        }
    }
}

/// The node without addresses that only this machine has.
fn without_this_machine(mut node: Value) -> Result<Value> {
    let own: Vec<String> = istio_proxy::net::interfaces::addresses()
        .context("this machine's addresses")?
        .iter()
        .map(|(_, ip)| ip.to_string())
        .collect();
    if let Some(ips) = node["metadata"]["INSTANCE_IPS"].as_str() {
        let left: Vec<&str> = ips.split(',').filter(|ip| !own.iter().any(|o| o == ip)).collect();
        node["metadata"]["INSTANCE_IPS"] = json!(left.join(","));
    }
    Ok(node)
}
