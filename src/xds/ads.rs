//! The aggregated discovery stream as a value: messages in, messages out. No I/O, no clock of its own.
//!
//! It decides what is asked for, acknowledged and refused, and never what is served; see [`super::warm`]. Subscriptions
//! follow from what is held: listeners name route tables, clusters name load assignments and secrets. Rules:
//!
//! - Types are asked for in Envoy's order: clusters, their endpoints, then listeners with everything that hangs on them.
//!   A stream that is not the first asks for all at once and says which names it holds.
//! - Every response is answered once, with its own nonce, and subscriptions travel in requests of their own: istiod ignores
//!   those that come with a stale nonce, and takes a subscription inside an acknowledgement for a mistake.
//! - What was not asked for is passed over; naming it on the next stream would subscribe to it again.
//! - The application's health goes out after the listeners were asked for, on every stream: istiod takes a VM out of
//!   everybody's endpoints until it hears of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use proxy_config::{Name, Reject};
use tokio::time::Instant;

use super::check::Checks;
use super::kind::{KINDS, Kind};
use super::messages::{DeltaDiscoveryRequest, DiscoveryRequest, Request, Response};
use super::received::Received;
use super::refs;
use super::store::{Push, Store, Verdict};
use super::warm::{Update, Warm};
use super::wire::{self, Batch};

/// Longest wait for endpoints before listeners are asked for; Envoy's default for a first fetch.
const FIRST_FETCH: Duration = Duration::from_secs(15);
/// A stream on which a question stays open for this long is given up: whoever is there has other troubles than us.
const SILENCE: Duration = Duration::from_secs(30);

/// What the stream is told at start-up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Only changes go over the stream; Istio's default.
    pub delta: bool,
    /// An encoded `envoy.config.core.v3.Node`.
    pub node: Bytes,
    /// Whether the mesh's names are wanted: where DNS is captured.
    pub names: bool,
    /// Whether the proxy's own settings are wanted (`PROXY_CONFIG_XDS_AGENT`): further CAs that the mesh trusts.
    pub proxy_config: bool,
    /// What could not be enforced is refused.
    pub checks: Checks,
}

/// Health of the application, as istiod is to hear of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Whether peers may call.
    pub healthy: bool,
    /// Why not.
    pub message: String,
}

/// What a response did.
#[derive(Debug, Default)]
pub struct Step {
    /// To be sent now, in this order.
    pub send: Vec<Request>,
    /// Something that is held says something else.
    pub changed: bool,
    /// What was refused.
    pub refused: Vec<Reject>,
}

/// One type on the stream.
#[derive(Default)]
struct Watch {
    /// Names that we need; not used for wildcard types.
    wanted: Arc<BTreeSet<Name>>,
    /// Names that this stream's server was told: nearly always the same object, so that a push of one resource does not
    /// compare thousands of names.
    told: Arc<BTreeSet<Name>>,
    /// Asked for on this stream.
    opened: bool,
    /// Answered on this stream.
    answered: bool,
    /// Answered on any stream.
    known: bool,
    /// The next response is everything there is.
    complete: bool,
    /// Since when an answer is due.
    open_since: Option<Instant>,
    /// Last nonce and accepted version; for state-of-the-world requests.
    nonce: String,
    version: String,
}

/// The stream's state, across reconnections.
pub struct Ads {
    options: Options,
    watches: [Watch; KINDS],
    store: Store,
    warm: Warm,
    health: Option<Health>,
    connected: bool,
    node_sent: bool,
    health_due: bool,
    /// When listeners are asked for even if no endpoints came.
    listeners_by: Option<Instant>,
}

impl Ads {
    /// Nothing yet.
    pub fn new(options: Options) -> Self {
        Self {
            store: Store::new(options.checks),
            options,
            watches: Default::default(),
            warm: Warm::default(),
            health: None,
            connected: false,
            node_sent: false,
            health_due: false,
            listeners_by: None,
        }
    }

    /// Whether the stream is a delta stream.
    pub fn is_delta(&self) -> bool {
        self.options.delta
    }

    /// Speaks the other protocol from the next stream on.
    pub fn set_delta(&mut self, delta: bool) {
        self.options.delta = delta;
    }

    /// Everything as it came.
    pub fn bytes(&self) -> Arc<Received> {
        Arc::clone(&self.store.received)
    }

    /// A new stream; what to send first.
    pub fn connected(&mut self, now: Instant) -> Vec<Request> {
        for watch in &mut self.watches {
            watch.told = Arc::default();
            watch.nonce.clear();
            (watch.opened, watch.answered, watch.complete, watch.open_since) = (false, false, false, None);
        }
        (self.connected, self.node_sent, self.health_due) = (true, false, self.health.is_some());
        self.listeners_by = None;
        let mut send = Vec::new();
        self.advance(&mut send, now);
        send
    }

    /// The stream is over.
    pub fn disconnected(&mut self) {
        self.connected = false;
    }

    /// What the application is like now; what to send.
    pub fn report(&mut self, health: Option<Health>) -> Vec<Request> {
        self.health_due = self.connected && health.is_some();
        self.health = health;
        let mut send = Vec::new();
        self.report_due(&mut send);
        send
    }

    /// Time has passed; what to send.
    pub fn tick(&mut self, now: Instant) -> Vec<Request> {
        let mut send = Vec::new();
        if self.connected {
            self.advance(&mut send, now);
        }
        send
    }

    /// When [`Ads::tick`] or [`Ads::update`] have something to do although nothing came.
    pub fn wake(&self) -> Option<Instant> {
        let hold = self.listeners_by.filter(|_| self.connected && !self.watch(Kind::Listener).opened);
        hold.into_iter().chain(self.warm.wake()).min()
    }

    /// When the stream is to be given up, should nothing come.
    pub fn patience(&self) -> Option<Instant> {
        self.watches.iter().filter_map(|watch| watch.open_since).min().map(|since| since + SILENCE)
    }

    /// What is to be served now; `None`: nothing new, or not complete yet.
    pub fn update(&mut self, now: Instant) -> Option<Update> {
        let started = [Kind::Cluster, Kind::Listener].into_iter().all(|kind| self.watch(kind).known);
        self.warm.update(&mut self.store, started, now)
    }

    /// Asks for the endpoints of clusters again, as if they had never come.
    pub fn resubscribe(&mut self, names: &[Name]) -> Vec<Request> {
        let watch = &self.watches[Kind::Endpoints.index()];
        let names: BTreeSet<Name> = names.iter().filter(|name| watch.told.contains(*name)).cloned().collect();
        if names.is_empty() || !self.connected || !self.options.delta {
            return Vec::new();
        }
        wire::changes(Kind::Endpoints, &names, &names)
    }

    /// Takes in a response. `wall` is kept beside what is received.
    pub fn received(&mut self, response: Response, now: Instant, wall: SystemTime) -> Step {
        let mut step = Step::default();
        let url = match &response {
            Response::Delta(response) => &response.type_url,
            Response::Sotw(response) => &response.type_url,
        };
        // Refusing a type that is not watched makes istiod stumble.
        let Some(kind) = Kind::of(url).filter(|kind| self.watch(*kind).opened) else {
            tracing::debug!("a response of type {url} was not asked for");
            return step;
        };
        let batch = Batch::of(kind, response, self.watch(kind).complete);
        let watch = &mut self.watches[kind.index()];
        (watch.answered, watch.complete, watch.open_since) = (true, false, None);
        if kind.is_single() && batch.resources.is_empty() {
            return step;
        }
        let names = self.take_in(kind, &batch, wall, &mut step);
        self.answer(kind, &batch, &step.refused, &mut step.send);
        self.follow(kind, names);
        self.advance(&mut step.send, now);
        step
    }

    /// Brings resources into the store; names of those that changed.
    fn take_in(&mut self, kind: Kind, batch: &Batch, wall: SystemTime, step: &mut Step) -> Vec<Name> {
        let push = Push { version: Arc::from(&*batch.version), at: wall };
        let mut changed = Vec::new();
        let mut there = BTreeSet::new();
        for (name, any) in &batch.resources {
            let name = match name {
                Ok(name) => name,
                Err(reject) => {
                    step.refused.push(reject.clone());
                    continue;
                }
            };
            there.insert(&**name);
            if !kind.is_wildcard() && !self.watch(kind).wanted.contains(name) {
                continue;
            }
            match self.store.put(kind, name, any, &push) {
                Verdict::Same => {}
                Verdict::Changed => changed.push(Arc::clone(name)),
                Verdict::Refused(reject) => step.refused.push(reject),
            }
            // Endpoints that came may be what a cluster waits for, even if they say what they said.
            self.warm.came(kind, name);
        }
        let held = if batch.complete { self.store.held(kind) } else { Vec::new() };
        let absent = held.into_iter().filter(|name| !there.contains(&**name));
        let removed: Vec<Name> = batch.removed.iter().cloned().chain(absent).collect();
        for name in removed {
            if kind.is_wildcard() {
                if self.store.remove(kind, &name) {
                    self.warm.came(kind, &name);
                    changed.push(name);
                }
            } else if self.watch(kind).wanted.contains(&name) {
                self.store.gone(kind, &name);
                self.warm.came(kind, &name);
                step.changed = true;
            }
        }
        step.changed |= !changed.is_empty() || !step.refused.is_empty();
        changed
    }

    /// Further CAs that the mesh trusts, PEM; empty: none were said.
    pub fn anchors(&self) -> Vec<String> {
        self.store.anchors.get("").map(|said| said.to_vec()).unwrap_or_default()
    }

    /// Accepts or refuses a response.
    fn answer(&mut self, kind: Kind, batch: &Batch, refused: &[Reject], send: &mut Vec<Request>) {
        let error_detail = wire::refusal(kind, refused);
        let watch = &mut self.watches[kind.index()];
        watch.nonce.clone_from(&batch.nonce);
        if error_detail.is_none() || !watch.known {
            // A first version counts as told even if parts of it were refused: the rest of it is served.
            watch.version.clone_from(&batch.version);
        }
        watch.known = true;
        let type_url = kind.url().to_owned();
        let response_nonce = batch.nonce.clone();
        send.push(if self.options.delta {
            Request::Delta(DeltaDiscoveryRequest { type_url, response_nonce, error_detail, ..Default::default() })
        } else {
            Request::Sotw(DiscoveryRequest {
                version_info: watch.version.clone(),
                resource_names: wire::texts(&watch.told),
                type_url,
                response_nonce,
                error_detail,
                node: None,
            })
        });
    }

    /// What changed resources mean for what is needed.
    fn follow(&mut self, kind: Kind, changed: Vec<Name>) {
        if changed.is_empty() {
            return;
        }
        if kind == Kind::Extension {
            for listener in self.store.relink(&changed.into_iter().collect()) {
                self.warm.came(Kind::Listener, &listener);
            }
        }
        if kind == Kind::Cluster {
            let wanted = self.store.clusters.values().filter_map(|c| refs::endpoints(c)).cloned().collect();
            self.want(Kind::Endpoints, wanted);
        }
        if kind == Kind::Listener || kind == Kind::Extension {
            let wanted = self.store.listeners.values().flat_map(|l| refs::routes(l)).cloned().collect();
            self.want(Kind::Routes, wanted);
            let wanted = self.store.wanted_extensions();
            self.want(Kind::Extension, wanted);
        }
        if kind == Kind::Listener || kind == Kind::Cluster {
            let clusters = self.store.clusters.values().flat_map(|c| refs::cluster_secrets(c));
            let listeners = self.store.listeners.values().flat_map(|l| refs::listener_secrets(l));
            let wanted = clusters.chain(listeners).cloned().collect();
            self.want(Kind::Secret, wanted);
        }
    }

    fn want(&mut self, kind: Kind, wanted: BTreeSet<Name>) {
        let wanted = Arc::new(wanted);
        let old = std::mem::replace(&mut self.watches[kind.index()].wanted, Arc::clone(&wanted));
        for name in old.difference(&wanted) {
            self.store.remove(kind, name);
            self.warm.came(kind, name);
        }
    }

    /// Asks for whatever can be asked for now.
    fn advance(&mut self, send: &mut Vec<Request>, now: Instant) {
        self.sync(Kind::Cluster, send, now);
        self.sync(Kind::Endpoints, send, now);
        if !self.watch(Kind::Listener).opened && !self.listeners_due(now) {
            return;
        }
        self.sync(Kind::Listener, send, now);
        if self.options.names {
            self.sync(Kind::Names, send, now);
        }
        if self.options.proxy_config {
            self.sync(Kind::ProxyConfig, send, now);
        }
        self.report_due(send);
        for kind in [Kind::Routes, Kind::Extension, Kind::Secret] {
            self.sync(kind, send, now);
        }
    }

    /// Listeners wait for the endpoints of clusters, but not for ever, and not for those of a stream that was before.
    fn listeners_due(&mut self, now: Instant) -> bool {
        let endpoints = self.watch(Kind::Endpoints);
        let ready = self.watch(Kind::Cluster).answered && (endpoints.wanted.is_empty() || endpoints.answered);
        if ready || !self.store.listeners.is_empty() {
            return true;
        }
        if self.watch(Kind::Cluster).answered {
            return now >= *self.listeners_by.get_or_insert(now + FIRST_FETCH);
        }
        false
    }

    fn report_due(&mut self, send: &mut Vec<Request>) {
        let Some(health) = self.health.as_ref().filter(|_| self.health_due && self.watch(Kind::Listener).opened) else {
            return;
        };
        send.push(wire::report(health, self.options.delta));
        self.health_due = false;
    }

    /// Opens a type, or tells what changed about the names that are wanted of it.
    fn sync(&mut self, kind: Kind, send: &mut Vec<Request>, now: Instant) {
        let watch = self.watch(kind);
        let first = !watch.opened;
        if first && !kind.is_wildcard() && watch.wanted.is_empty() || !first && watch.told == watch.wanted {
            return;
        }
        let add: BTreeSet<Name> = watch.wanted.difference(&watch.told).cloned().collect();
        let remove: BTreeSet<Name> = watch.told.difference(&watch.wanted).cloned().collect();
        if self.options.delta {
            if first {
                // What has no name is asked for anew, as the agent does it.
                let held = if kind.is_single() { Vec::new() } else { self.store.held(kind) };
                let (requests, incomplete) = wire::opening(kind, self.node(), &add, &held);
                send.extend(requests);
                self.watches[kind.index()].complete = incomplete && kind.is_wildcard();
            } else {
                send.extend(wire::changes(kind, &add, &remove));
            }
        } else {
            let node = self.node();
            let watch = self.watch(kind);
            send.push(Request::Sotw(DiscoveryRequest {
                version_info: watch.version.clone(),
                node,
                resource_names: wire::texts(&watch.wanted),
                type_url: kind.url().to_owned(),
                response_nonce: watch.nonce.clone(),
                error_detail: None,
            }));
        }
        let watch = &mut self.watches[kind.index()];
        watch.opened = true;
        watch.told = Arc::clone(&watch.wanted);
        // Nobody owes an answer for secrets that may not be read, nor for names.
        let answered_always = matches!(kind, Kind::Cluster | Kind::Endpoints | Kind::Listener | Kind::Routes);
        if answered_always && (first || !add.is_empty()) {
            watch.open_since.get_or_insert(now);
        }
    }

    /// Once a stream.
    fn node(&mut self) -> Option<Bytes> {
        (!std::mem::replace(&mut self.node_sent, true)).then(|| self.options.node.clone())
    }

    fn watch(&self, kind: Kind) -> &Watch {
        &self.watches[kind.index()]
    }

    /// Names that the server was told on this stream.
    pub fn subscribed(&self, kind: Kind) -> Vec<Name> {
        self.watch(kind).told.iter().cloned().collect()
    }

    /// Names that are held.
    pub fn held(&self, kind: Kind) -> Vec<Name> {
        self.store.held(kind)
    }
}
