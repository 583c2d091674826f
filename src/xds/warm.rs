//! From what is held to what is served: nothing enters before what it needs is there.
//!
//! A cluster waits for its endpoints, a route table for the clusters it sends to, a listener for its tables, clusters and
//! discovered filters; the version before stays meanwhile. Nothing waits longer than [`WARM`]: istiod sends a first-fetch
//! limit of 0, for ever, but a policy must not stay out because some endpoint never comes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proxy_config::model::{Endpoints, Pieces, Shared};
use proxy_config::xds::Secret;
use proxy_config::{Model, Name};
use tokio::time::Instant;

use super::kind::Kind;
use super::refs;
use super::store::Store;

/// Longest wait; Envoy's default for a first fetch.
const WARM: Duration = Duration::from_secs(15);

/// What is to be served from now on.
#[derive(Debug, Clone)]
pub struct Update {
    /// All of it; unchanged parts are the objects of the update before.
    pub model: Model,
    /// Load assignments that changed, when nothing else did.
    pub endpoints: Option<Vec<Name>>,
    /// Key material that came over the stream.
    pub secrets: Shared<BTreeMap<Name, Arc<Secret>>>,
}

/// The served model, and what does not belong to it yet.
#[derive(Default)]
pub(super) struct Warm {
    model: Model,
    secrets: Shared<BTreeMap<Name, Arc<Secret>>>,
    /// What came since the last look.
    dirty: BTreeSet<(Kind, Name)>,
    /// What waits, and until when.
    waiting: BTreeMap<(Kind, Name), Instant>,
    /// What the next update tells.
    news: News,
    /// One update was given out.
    served: bool,
}

#[derive(Default)]
struct News {
    endpoints: Vec<Name>,
    other: bool,
}

impl Warm {
    /// Something about a resource is new: its content, or that there is an answer for it.
    pub(super) fn came(&mut self, kind: Kind, name: &Name) {
        self.dirty.insert((kind, Arc::clone(name)));
    }

    /// When waiting ends by itself.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.waiting.values().min().copied()
    }

    /// Moves in what can be served. The first update waits until everything that is held can; `started`: everything that
    /// belongs to a first update was answered.
    pub(super) fn update(&mut self, store: &mut Store, started: bool, now: Instant) -> Option<Update> {
        let dirty = std::mem::take(&mut self.dirty);
        let of = |kind: Kind| dirty.iter().filter(move |(k, _)| *k == kind).map(|(_, name)| name);
        for name in of(Kind::Endpoints) {
            if assign(&mut self.model.endpoints, name, store.endpoints.get(name)) {
                self.news.endpoints.push(Arc::clone(name));
            }
        }
        for name in of(Kind::Secret) {
            self.news.other |= set(&mut self.secrets, name, store.secrets.get(name));
        }
        if of(Kind::Names).next().is_some() {
            let names = store.names.get("").map(|names| Shared::from(Arc::clone(names))).unwrap_or_default();
            self.news.other |= self.model.names != names;
            self.model.names = names;
        }
        let again = |kind: Kind| of(kind).cloned().collect::<BTreeSet<Name>>();
        self.clusters(again(Kind::Cluster), store, now);
        self.routes(again(Kind::Routes), store, now);
        self.listeners(again(Kind::Listener), store, now);
        if store.account.changed {
            self.model.rejects = store.account.rejects();
            self.model.inert.clone_from(&store.account.inert);
            self.news.other = true;
        }
        if !started || !self.served && !self.waiting.is_empty() {
            return None;
        }
        let news = std::mem::take(&mut self.news);
        if self.served && !news.other && news.endpoints.is_empty() {
            return None;
        }
        let endpoints = (self.served && !news.other).then_some(news.endpoints);
        self.served = true;
        Some(Update { model: self.model.clone(), endpoints, secrets: self.secrets.clone() })
    }

    fn clusters(&mut self, came: BTreeSet<Name>, store: &Store, now: Instant) {
        for name in self.candidates(Kind::Cluster, came) {
            let said = store.clusters.get(&name);
            let endpoints = said.and_then(|cluster| refs::endpoints(cluster));
            let warm = endpoints.is_none_or(|endpoints| store.endpoints.is_answered(endpoints));
            if self.may_enter((Kind::Cluster, &name), said.is_none() || warm, now) {
                self.news.other |= set(&mut self.model.clusters, &name, said);
            }
        }
    }

    fn routes(&mut self, came: BTreeSet<Name>, store: &Store, now: Instant) {
        for name in self.candidates(Kind::Routes, came) {
            let said = store.routes.get(&name);
            let warm = said.is_none_or(|table| !refs::table_uses(table, &|cluster| self.is_cold(cluster)));
            if self.may_enter((Kind::Routes, &name), warm, now) {
                self.news.other |= set(&mut self.model.routes, &name, said);
            }
        }
    }

    fn listeners(&mut self, came: BTreeSet<Name>, store: &Store, now: Instant) {
        for name in self.candidates(Kind::Listener, came) {
            let said = store.listeners.get(&name);
            let warm = said.is_none_or(|listener| {
                refs::routes(listener).all(|table| self.model.routes.contains_key(table))
                    && !refs::listener_uses(listener, &|cluster| self.is_cold(cluster))
                    && store.is_linked(&name)
            });
            if self.may_enter((Kind::Listener, &name), warm, now) {
                self.news.other |= set(&mut self.model.listeners, &name, said);
            }
        }
    }

    /// What is to be looked at: what came, and what has been waiting.
    fn candidates(&self, kind: Kind, mut came: BTreeSet<Name>) -> BTreeSet<Name> {
        came.extend(self.waiting.keys().filter(|(k, _)| *k == kind).map(|(_, name)| Arc::clone(name)));
        came
    }

    /// A cluster that is announced and not served in any version.
    fn is_cold(&self, cluster: &Name) -> bool {
        self.waiting.contains_key(&(Kind::Cluster, Arc::clone(cluster))) && !self.model.clusters.contains_key(cluster)
    }

    fn may_enter(&mut self, (kind, name): (Kind, &Name), warm: bool, now: Instant) -> bool {
        let key = (kind, Arc::clone(name));
        if !warm {
            let until = *self.waiting.entry(key.clone()).or_insert(now + WARM);
            if now < until {
                return false;
            }
            tracing::warn!("{} {name} is served although what it needs has not come", kind.url());
        }
        self.waiting.remove(&key);
        true
    }
}

/// As [`set`], for load assignments.
fn assign(served: &mut Pieces<Arc<Endpoints>>, name: &Name, held: Option<&Arc<Endpoints>>) -> bool {
    match (served.get(name), held) {
        (None, None) => false,
        (Some(old), Some(new)) if Arc::ptr_eq(old, new) => false,
        (_, Some(new)) => {
            served.insert(Arc::clone(name), Arc::clone(new));
            true
        }
        (Some(_), None) => served.remove(name).is_some(),
    }
}

/// Puts what is held in place of what is served; `true`: that is another object.
fn set<T>(served: &mut Shared<BTreeMap<Name, Arc<T>>>, name: &Name, held: Option<&Arc<T>>) -> bool {
    match (served.get(name), held) {
        (None, None) => false,
        (Some(old), Some(new)) if Arc::ptr_eq(old, new) => false,
        (_, Some(new)) => {
            served.insert(Arc::clone(name), Arc::clone(new));
            true
        }
        (Some(_), None) => served.remove(name).is_some(),
    }
}
