//! A recorded conversation between an agent and istiod, as acts that can be played again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use base64::prelude::{BASE64_STANDARD, Engine};
use bytes::Bytes;
use istio_proxy::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, Kind, Request, Resource};
use prost::Message;
use proxy_config::xds::Any;
use serde_json::Value;
use tonic::{Code, Status};

use super::agent_ca::code;
use super::agent_said::{node, recorded_metadata};
use crate::istiod::resources;

/// What one side does.
#[derive(Debug, Clone)]
pub(super) enum Act {
    /// The agent opens a stream.
    Open {
        /// Its metadata, without what the library says by itself.
        metadata: Value,
        /// It showed a certificate.
        certified: bool,
        /// istiod refused before it read a message.
        refused: Option<Status>,
    },
    /// The agent says something.
    Says {
        /// The message.
        message: Request,
        /// How long after what was before it.
        waited: Duration,
    },
    /// istiod answers.
    Answers {
        /// The message; resources by name alone are made up.
        response: Box<DeltaDiscoveryResponse>,
    },
    /// istiod ends the stream; without a status it is done.
    Ends {
        /// Why.
        status: Option<Status>,
    },
    /// The connection ends.
    HangsUp,
    /// istiod is gone.
    Leaves,
    /// istiod is back.
    Returns,
}

/// A conversation.
pub(super) struct Recording {
    /// Starts of the agent, each with what happened until the next.
    pub(super) runs: Vec<Vec<Act>>,
    /// The node's id.
    pub(super) id: String,
    /// The version that the agent was built as.
    pub(super) version: String,
    /// The node's service account.
    pub(super) account: String,
    /// What the agent showed as its token.
    pub(super) token: Option<String>,
    /// The machine registers itself.
    pub(super) registers: bool,
    /// The CA signed.
    pub(super) signed: bool,
    /// istiod answered a question.
    pub(super) served: bool,
}

/// What is known of a stream while events are read.
#[derive(Default)]
struct Open {
    /// Where its opening stands in the run.
    at: usize,
    delta: bool,
    spoke: bool,
    over: bool,
    last_ms: u64,
}

#[derive(Default)]
struct Reader {
    runs: Vec<Vec<Act>>,
    /// Lengths of client chains by connection.
    chains: HashMap<u64, u64>,
    /// Connections of discovery streams, and where these were opened, both in their order.
    connections: Vec<u64>,
    openings: Vec<(usize, usize)>,
    streams: HashMap<u64, Open>,
    signed: bool,
    /// Who the agent said it is.
    node: Option<Value>,
    /// Answers whose resources are to be made up, by run and act.
    answers: Vec<(usize, usize)>,
}

impl Recording {
    /// Reads the events. `fails_open`: plug-ins that cannot be had let traffic pass.
    pub(super) fn read(text: &str, fails_open: bool) -> Result<Self> {
        let mut reader = Reader::default();
        for line in text.lines() {
            reader.event(&serde_json::from_str(line)?)?;
        }
        reader.certify();
        let Reader { mut runs, signed, answers, node, .. } = reader;
        for run in &mut runs {
            // What the end of the process did.
            while matches!(run.last(), Some(Act::HangsUp)) {
                run.pop();
            }
        }
        MadeUp::of(&runs).fill(&mut runs, &answers, fails_open);
        let acts = || runs.iter().flatten();
        let first = node.context("no message with a node")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let token = acts().find_map(|act| match act {
            Act::Open { metadata, .. } => metadata["authorization"][0].as_str().map(str::to_owned),
            _ => None,
        });
        Ok(Self {
            id: text(&first["id"]),
            version: text(&first["metadata"]["ISTIO_VERSION"]),
            account: text(&first["metadata"]["SERVICE_ACCOUNT"]),
            registers: first["metadata"]["AUTO_REGISTER_GROUP"].is_string(),
            served: acts().any(|act| matches!(act, Act::Answers { .. })),
            runs,
            token,
            signed,
        })
    }

    /// Types that were answered.
    pub(super) fn kinds(&self) -> BTreeSet<String> {
        let url = |act: &Act| match act {
            Act::Answers { response } => Some(response.type_url.rsplit('.').next()?.to_owned()),
            _ => None,
        };
        self.runs.iter().flatten().filter_map(url).collect()
    }
}

impl Reader {
    fn event(&mut self, event: &Value) -> Result<()> {
        let number = |name: &str| event[name].as_u64();
        match event["ev"].as_str().unwrap_or_default() {
            "mark" => self.runs.push(Vec::new()),
            "tls" => {
                let length = event["client_cert"]["chain_len"].as_u64().unwrap_or(0);
                self.chains.insert(number("conn").unwrap_or(0), length);
            }
            "h2" if is_discovery(&event["headers"]) => self.connections.push(number("conn").unwrap_or(0)),
            "stream_open" => self.opens(event),
            "msg" if event["json"]["cert_chain"].is_array() => self.signed = true,
            "msg" => return self.message(event),
            "inject" => {
                let status = event["code"].as_str().and_then(code).map(|code| Status::new(code, "recorded"));
                self.ends(event, |_| Act::Ends { status });
            }
            "stream_end" if event["by"] == "istiod" => match event["code"].as_str().and_then(code) {
                // What the agent or the relay did.
                Some(Code::Cancelled) => self.ends(event, |_| Act::HangsUp),
                Some(code) => {
                    let status = Status::new(code, event["err"].as_str().unwrap_or_default());
                    self.ends(event, |_| Act::Ends { status: Some(status) });
                }
                None => self.ends(event, |_| Act::Ends { status: None }),
            },
            "relay_down" => {
                self.streams.values_mut().for_each(|stream| stream.over = true);
                self.act(Act::Leaves);
            }
            "relay_up" => self.act(Act::Returns),
            _ => {}
        }
        Ok(())
    }

    /// A stream's opening and its first frame come in either order.
    fn certify(&mut self) {
        for ((run, at), connection) in self.openings.iter().zip(&self.connections) {
            let shown = self.chains.get(connection).is_some_and(|length| *length > 0);
            if let Some(Act::Open { certified, .. }) = self.runs.get_mut(*run).and_then(|run| run.get_mut(*at)) {
                *certified = shown;
            }
        }
    }

    fn act(&mut self, act: Act) {
        if let Some(run) = self.runs.last_mut() {
            run.push(act);
        }
    }

    fn opens(&mut self, event: &Value) {
        let method = event["method"].as_str().unwrap_or_default();
        if !method.ends_with("AggregatedResources") {
            return;
        }
        let at = self.runs.last().map_or(0, Vec::len);
        self.openings.push((self.runs.len().saturating_sub(1), at));
        let last_ms = event["t_ms"].as_u64().unwrap_or(0);
        let open = Open { at, delta: method.contains("Delta"), last_ms, ..Open::default() };
        self.streams.insert(event["stream_n"].as_u64().unwrap_or(0), open);
        self.act(Act::Open { metadata: recorded_metadata(&event["metadata"]), certified: false, refused: None });
    }

    fn message(&mut self, event: &Value) -> Result<()> {
        let Some(stream) = event["stream_n"].as_u64().and_then(|n| self.streams.get_mut(&n)) else { return Ok(()) };
        let now = event["t_ms"].as_u64().unwrap_or(0);
        let waited = Duration::from_millis(now.saturating_sub(stream.last_ms));
        let (delta, over) = (stream.delta, stream.over);
        (stream.last_ms, stream.spoke) = (now, !over || stream.spoke);
        let bytes = event["pb"].as_str().map(|text| BASE64_STANDARD.decode(text)).transpose()?.map(Bytes::from);
        if event["from"] == "agent" {
            let bytes = bytes.context("a message of the agent without its bytes")?;
            let message = match delta {
                true => Request::Delta(DeltaDiscoveryRequest::decode(bytes)?),
                false => Request::Sotw(DiscoveryRequest::decode(bytes)?),
            };
            self.node = self.node.take().or_else(|| node(&message));
            // An end may overtake what was said before it.
            if !over {
                self.act(Act::Says { message, waited });
            }
            return Ok(());
        }
        let response = match bytes {
            Some(bytes) if delta => DeltaDiscoveryResponse::decode(bytes)?,
            Some(_) => bail!("a whole answer of the state of the world"),
            None => {
                let run = self.runs.len().checked_sub(1).ok_or_else(|| anyhow!("an answer before the first mark"))?;
                self.answers.push((run, self.runs[run].len()));
                named(event)
            }
        };
        self.act(Act::Answers { response: Box::new(response) });
        Ok(())
    }

    fn ends(&mut self, event: &Value, how: impl FnOnce(()) -> Act) {
        let stream = event["stream_n"].as_u64().and_then(|n| self.streams.get_mut(&n));
        let Some(stream) = stream.filter(|stream| !stream.over) else { return };
        stream.over = true;
        let (at, spoke) = (stream.at, stream.spoke);
        let act = how(());
        if let (false, Act::Ends { status: Some(status) }) = (spoke, &act) {
            let opening = self.runs.last_mut().and_then(|run| run.get_mut(at));
            if let Some(Act::Open { refused, .. }) = opening {
                *refused = Some(status.clone());
            }
            return;
        }
        self.act(act);
    }
}

fn is_discovery(headers: &Value) -> bool {
    let is = |pair: &Value| pair[0] == ":path" && pair[1].as_str().is_some_and(|p| p.ends_with("AggregatedResources"));
    headers.as_array().into_iter().flatten().any(is)
}

/// An answer of which names are known.
fn named(event: &Value) -> DeltaDiscoveryResponse {
    let said = &event["summary"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let names = |value: &Value| value.as_array().into_iter().flatten().map(text).collect::<Vec<_>>();
    let bare = |name| Resource { name, ..Resource::default() };
    let version = if said["version_info"].is_string() { &said["version_info"] } else { &said["system_version_info"] };
    DeltaDiscoveryResponse {
        system_version_info: text(version),
        resources: names(&said["resources"]).into_iter().map(bare).collect(),
        type_url: text(&event["type_url"]),
        nonce: text(&said["nonce"]),
        removed_resources: names(&said["removed"]),
    }
}

/// What resources must say for the recorded Envoy to have asked for what it asked for.
#[derive(Default)]
struct MadeUp {
    /// Clusters that want endpoints.
    endpoints: BTreeSet<String>,
    /// Route tables of listeners, which are new with them; by the answer that brought the listener.
    routes: BTreeMap<usize, Vec<String>>,
    /// Discovered filters, by the answer whose listeners name them.
    filters: BTreeMap<usize, Vec<String>>,
}

impl MadeUp {
    fn of(runs: &[Vec<Act>]) -> Self {
        let mut out = Self::default();
        let mut known = BTreeSet::new();
        let mut listeners = 0;
        for act in runs.iter().flatten() {
            match act {
                Act::Answers { response } if Kind::of(&response.type_url) == Some(Kind::Listener) => listeners += 1,
                Act::Says { message, .. } => {
                    for name in subscribed(message) {
                        match Kind::of(message.type_url()) {
                            Some(Kind::Endpoints) => drop(out.endpoints.insert(name.clone())),
                            Some(Kind::Routes) if known.insert(name.clone()) => {
                                out.routes.entry(listeners).or_default().push(name.clone());
                            }
                            Some(Kind::Extension) => out.filters.entry(listeners).or_default().push(name.clone()),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        out
    }

    /// Gives the answers their resources.
    fn fill(&self, runs: &mut [Vec<Act>], answers: &[(usize, usize)], fails_open: bool) {
        let mut listeners: BTreeMap<String, (usize, Option<String>)> = BTreeMap::new();
        let mut pushes = 0;
        for (run, at) in answers {
            let Act::Answers { response } = &mut runs[*run][*at] else { continue };
            let Some(kind) = Kind::of(&response.type_url) else { continue };
            if kind == Kind::Listener {
                pushes += 1;
                self.place(pushes, response, &mut listeners);
            } else if response.resources.is_empty() {
                self.whole(kind, response);
            }
            let filters = self.filters.get(&pushes).map(Vec::as_slice).unwrap_or_default();
            for resource in &mut response.resources {
                let name = &resource.name;
                resource.resource = Some(match kind {
                    Kind::Cluster if self.endpoints.contains(name) => resources::eds_cluster(name, 1),
                    Kind::Cluster => resources::direct_cluster(name),
                    Kind::Endpoints => resources::assignment(name, &[]),
                    Kind::Listener => listener(name, listeners.get(name), filters),
                    Kind::Routes => resources::table(name, "BlackHoleCluster", 0),
                    Kind::Extension => resources::plugin_extension(name, fails_open),
                    Kind::Names | Kind::ProxyConfig | Kind::Secret => Any::default(),
                });
            }
        }
    }

    /// Gives the route tables that came with an answer to its new listeners.
    fn place(
        &self,
        push: usize,
        response: &mut DeltaDiscoveryResponse,
        listeners: &mut BTreeMap<String, (usize, Option<String>)>,
    ) {
        let mut tables = self.routes.get(&push).cloned().unwrap_or_default().into_iter();
        if response.resources.is_empty() {
            // The state of the world was recorded without names.
            let names = (0..tables.len()).map(|n| format!("listener-{n}"));
            response.resources = names.map(|name| Resource { name, ..Resource::default() }).collect();
        }
        for resource in &response.resources {
            let next = listeners.len();
            listeners.entry(resource.name.clone()).or_insert_with(|| (next, tables.next()));
        }
    }

    /// Names for an answer of the state of the world, which was recorded without them.
    fn whole(&self, kind: Kind, response: &mut DeltaDiscoveryResponse) {
        let names: Vec<&String> = match kind {
            Kind::Cluster | Kind::Endpoints => self.endpoints.iter().collect(),
            Kind::Routes => self.routes.values().flatten().collect(),
            _ => Vec::new(),
        };
        // A delta without resources says that nothing is there.
        if response.removed_resources.is_empty() && !response.nonce.is_empty() {
            let bare = |name: &String| Resource { name: name.clone(), ..Resource::default() };
            response.resources = names.into_iter().map(bare).collect();
        }
    }
}

fn listener(name: &str, placed: Option<&(usize, Option<String>)>, filters: &[String]) -> Any {
    let (number, table) = placed.cloned().unwrap_or_default();
    let [_, _, high, low] = u32::try_from(number).unwrap_or(0).to_be_bytes();
    let at = ([10, 255, high, low], 80).into();
    resources::unbound(match table {
        Some(table) => {
            let filters = filters.iter().map(|filter| resources::discovered(filter)).collect();
            resources::http_listener(name, at, &table, filters)
        }
        None => resources::tcp_listener(name, at, "BlackHoleCluster"),
    })
}

fn subscribed(message: &Request) -> &[String] {
    match message {
        Request::Delta(message) => &message.resource_names_subscribe,
        Request::Sotw(message) => &message.resource_names,
    }
}
