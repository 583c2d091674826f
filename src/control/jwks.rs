//! Keys that are fetched: which, when, and what an answer changes.
//!
//! [`Store`] decides and knows no I/O; [`Fetches`] asks. Keys reach the workers as part of the next snapshot. What was good
//! stays until something better comes; a token with an unknown key asks again, but nobody is asked more than once in
//! [`FLOOR`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proxy_config::model::{HttpFilter, JwksSource, JwtProvider, Listener, NetworkFilter};
use proxy_config::{Model, Name, Reject, Severity};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::last_good::Keys;
use crate::dns::Resolver;
use crate::jwks::{self, Ask, Door, SYSTEM_ROOTS, Way};
use crate::snapshot::{Snapshot, Transport, check_jwks};

/// Limit on a fetch that says none.
const LIMIT: Duration = Duration::from_secs(5);
/// How long keys are good that say nothing.
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// Nobody is asked more often for the sake of unknown keys.
const FLOOR: Duration = Duration::from_secs(30);
/// Pause after the first failure; it doubles.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after failures: istiod's.
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// What is fetched: URI, and the cluster that leads there (empty: straight).
type Source = (Name, Name);

/// What is known of all sources.
pub(super) struct Store {
    sources: BTreeMap<Source, State>,
    floor: Duration,
    /// Keys of an earlier life, for sources that are not known yet.
    kept: BTreeMap<Source, Arc<str>>,
}

struct State {
    keys: Option<Arc<str>>,
    trouble: Option<String>,
    limit: Duration,
    refresh: Duration,
    failures: u32,
    due: Instant,
    started: Option<Instant>,
    running: bool,
}

impl Default for Store {
    fn default() -> Self {
        Self { sources: BTreeMap::new(), floor: FLOOR, kept: BTreeMap::new() }
    }
}

impl Store {
    /// Takes in which sources there are; new ones are due at once.
    fn follow(&mut self, model: &Model, now: Instant) {
        let mut wanted: BTreeMap<Source, (Duration, Duration)> = BTreeMap::new();
        for provider in model.listeners.values().flat_map(|listener| providers(listener)) {
            if let JwksSource::Remote { uri, cluster, timeout, cache, .. } = &provider.jwks {
                let of = |said: &Option<Duration>, default| said.filter(|d| !d.is_zero()).unwrap_or(default);
                let times = (of(timeout, LIMIT), of(cache, REFRESH));
                wanted.insert((uri.as_str().into(), Arc::clone(cluster)), times);
            }
        }
        self.sources.retain(|source, _| wanted.contains_key(source));
        for (source, (limit, refresh)) in wanted {
            let fresh = State {
                keys: self.kept.remove(&source),
                trouble: None,
                limit,
                refresh,
                failures: 0,
                due: now,
                started: None,
                running: false,
            };
            let state = self.sources.entry(source).or_insert(fresh);
            (state.limit, state.refresh) = (limit, refresh);
        }
    }

    /// What to ask now, with its limit.
    fn due(&mut self, now: Instant) -> Vec<(Source, Duration)> {
        let mut out = Vec::new();
        for (source, state) in &mut self.sources {
            if !state.running && state.due <= now {
                (state.running, state.started) = (true, Some(now));
                out.push((source.clone(), state.limit));
            }
        }
        out
    }

    /// When something will be due.
    fn next(&self) -> Option<Instant> {
        self.sources.values().filter(|state| !state.running).map(|state| state.due).min()
    }

    /// A token asked for a key that is not there.
    fn asked(&mut self, source: &Source, now: Instant) {
        let floor = self.floor;
        if let Some(state) = self.sources.get_mut(source) {
            let soonest = state.started.map_or(now, |started| now.max(started + floor));
            state.due = state.due.min(soonest);
        }
    }

    /// Takes an answer; whether anything changed. `draw` is uniform over 0..1: a fleet does not ask all at once.
    fn done(&mut self, source: &Source, answer: Result<String, String>, now: Instant, draw: f64) -> bool {
        let Some(state) = self.sources.get_mut(source) else { return false };
        state.running = false;
        let checked = answer.and_then(|text| check_jwks(&text).map(|()| text));
        match checked {
            Ok(text) => {
                state.failures = 0;
                state.due = now + state.refresh.mul_f64(1.0 - draw / 10.0);
                let same = state.keys.as_deref() == Some(&*text);
                if !same {
                    state.keys = Some(text.into());
                }
                state.trouble.take().is_some() || !same
            }
            Err(why) => {
                state.failures = state.failures.saturating_add(1);
                let pause = FIRST_PAUSE.saturating_mul(1 << (state.failures - 1).min(16));
                state.due = now + pause.min(LAST_PAUSE);
                state.trouble.replace(why.clone()).is_none_or(|before| before != why)
            }
        }
    }

    /// The model with the keys that are known.
    fn fill(&self, model: &Arc<Model>) -> Arc<Model> {
        if self.sources.values().all(|state| state.keys.is_none()) {
            return Arc::clone(model);
        }
        let mut filled = (**model).clone();
        for listener in filled.listeners.values_mut() {
            let has = |provider: &JwtProvider| matches!(provider.jwks, JwksSource::Remote { .. });
            if providers(listener).any(has) {
                self.fill_listener(Arc::make_mut(listener));
            }
        }
        Arc::new(filled)
    }

    fn fill_listener(&self, listener: &mut Listener) {
        let chains = listener.filter_chains.iter_mut().chain(&mut listener.default_filter_chain);
        for filter in chains.flat_map(|chain| &mut chain.filters) {
            let NetworkFilter::Http(manager) = filter else { continue };
            for filter in &mut manager.filters {
                let HttpFilter::JwtAuthn(jwt) = filter else { continue };
                for provider in jwt.providers.values_mut() {
                    if let JwksSource::Remote { uri, cluster, keys, .. } = &mut provider.jwks {
                        let source = (uri.as_str().into(), Arc::clone(cluster));
                        *keys = self.sources.get(&source).and_then(|state| state.keys.clone());
                    }
                }
            }
        }
    }

    /// Which keys did not come, and what that means.
    fn rejects(&self) -> impl Iterator<Item = Reject> {
        self.sources.iter().filter_map(|((uri, _), state)| {
            let why = state.trouble.as_ref()?;
            let means = if state.keys.is_some() {
                "the last good keys stay"
            } else {
                "tokens that need these keys are refused"
            };
            Some(Reject {
                resource: format!("JWKS {uri}"),
                place: None,
                field: String::new(),
                reason: format!("{why}; {means}"),
                severity: Severity::Warning,
                code: None,
            })
        })
    }
}

fn providers(listener: &Listener) -> impl Iterator<Item = &JwtProvider> {
    let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
    let managers = chains.flat_map(|chain| &chain.filters).filter_map(|filter| match filter {
        NetworkFilter::Http(manager) => Some(manager),
        _ => None,
    });
    let filters = managers.flat_map(|manager| &manager.filters).filter_map(|filter| match filter {
        HttpFilter::JwtAuthn(jwt) => Some(jwt),
        _ => None,
    });
    filters.flat_map(|jwt| jwt.providers.values())
}

/// The store with the questions that are under way.
pub(super) struct Fetches {
    store: Store,
    /// SDS name of the roots of https servers.
    roots: Arc<str>,
    running: JoinSet<(Source, Result<String, String>)>,
    resolver: Option<Resolver>,
}

impl Fetches {
    /// Nothing yet; `roots` is a PEM file, the system's when absent.
    pub(super) fn new(roots: Option<PathBuf>) -> Self {
        let roots = roots.map_or_else(|| SYSTEM_ROOTS.into(), |file| format!("file-root:{}", file.display()).into());
        Self { store: Store::default(), roots, running: JoinSet::new(), resolver: None }
    }

    /// The model with all keys that are known, and what there is to tell.
    pub(super) fn fill(&mut self, model: &Arc<Model>) -> (Arc<Model>, Vec<Reject>) {
        self.store.follow(model, Instant::now());
        (self.store.fill(model), self.store.rejects().collect())
    }

    /// All keys that are known.
    pub(super) fn known(&self) -> Keys {
        let of = |(source, state): (&Source, &State)| {
            let keys = state.keys.as_ref()?;
            Some((Arc::clone(&source.0), Arc::clone(&source.1), Arc::clone(keys)))
        };
        self.store.sources.iter().filter_map(of).collect()
    }

    /// Keys that were good before this process began; they serve until their server is asked.
    pub(super) fn restore(&mut self, keys: Keys) {
        self.store.kept.extend(keys.into_iter().map(|(uri, cluster, keys)| ((uri, cluster), keys)));
    }

    /// Waits until keys, or what is known of their servers, have changed. Cancel-safe.
    pub(super) async fn changed(&mut self, snapshot: &Snapshot) {
        loop {
            for (source, limit) in self.store.due(Instant::now()) {
                self.ask(snapshot, source, limit);
            }
            let next = self.store.next();
            let pause = async {
                match next {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(done) = self.running.join_next() => {
                    let Ok((source, answer)) = done else { continue };
                    snapshot.key_sources().filter(|known| known.is_of(&source.0, &source.1)).for_each(|s| s.answered());
                    if self.store.done(&source, answer, Instant::now(), fastrand::f64()) {
                        return;
                    }
                }
                () = snapshot.key_bell().rung() => {
                    for asked in snapshot.key_sources().filter(|source| source.is_asked()) {
                        let source = (Arc::clone(&asked.uri), Arc::clone(&asked.cluster));
                        self.store.asked(&source, Instant::now());
                    }
                }
                () = pause => {}
            }
        }
    }

    fn ask(&mut self, snapshot: &Snapshot, source: Source, limit: Duration) {
        let way = way(snapshot, &source);
        let roots = Arc::clone(&self.roots);
        let resolver = self.resolver.get_or_insert_with(Resolver::system).clone();
        self.running.spawn(async move {
            let answer = match way {
                Ok(way) => {
                    let ask = Ask { uri: &source.0, limit, roots: &roots, way };
                    jwks::fetch(&ask, &resolver).await
                }
                Err(why) => Err(why),
            };
            (source, answer)
        });
    }
}

/// How to get to a cluster's servers: hosts that are not known to be bad first.
fn way(snapshot: &Snapshot, (uri, cluster): &Source) -> Result<Way, String> {
    if cluster.is_empty() {
        return Ok(Way::Straight);
    }
    let id = snapshot.cluster_id(cluster).ok_or_else(|| format!("there is no cluster {cluster}"))?;
    let cluster = snapshot.cluster(id);
    let mut hosts: Vec<_> = cluster.hosts().all.iter().filter(|host| host.pipe.is_none()).collect();
    hosts.sort_by_key(|host| !host.is_eligible());
    let door = |host: &&Arc<crate::snapshot::Host>| match cluster.transport(host) {
        Transport::Raw => Ok(Door { address: host.address, tls: None }),
        Transport::Tls(tls) => {
            let automatic = tls.sni().is_empty() && (tls.auto_sni() || cluster.config.http.auto_sni);
            let name = if automatic { jwks::host(uri) } else { tls.sni().to_owned() };
            Ok(Door { address: host.address, tls: Some((tls.clone(), name)) })
        }
        other => Err(format!("cluster {}: {other:?} is not spoken for keys", cluster.name)),
    };
    Ok(Way::Cluster(hosts.iter().map(door).collect::<Result<_, _>>()?))
}

#[cfg(test)]
#[path = "jwks_tests.rs"]
mod tests;
