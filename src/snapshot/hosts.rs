//! A cluster's hosts, compiled when somebody first asks for them.
//!
//! A large mesh has thousands of clusters of which a proxy calls a few. A host costs about 2 KB with its statistics, what was
//! said of it a tenth of that: so nothing is made of what nobody uses. What is used is compiled where the configuration is,
//! never on a worker; only the first request to a cluster pays for its hosts.

use std::sync::{Arc, OnceLock, PoisonError};

use proxy_config::model;

use super::host::{Breakers, HostSet};

/// The hosts of a cluster in one version of it.
#[derive(Debug)]
pub struct Hosts {
    pub(super) said: Option<Arc<model::Endpoints>>,
    /// Its sockets are chosen among by the hosts' labels.
    config: Arc<model::Cluster>,
    /// Knows the hosts of the other versions, so that statistics go on.
    breakers: Arc<Breakers>,
    set: OnceLock<Arc<HostSet>>,
}

impl Hosts {
    /// Hosts that nobody has asked for yet.
    pub(super) fn new(
        said: Option<Arc<model::Endpoints>>,
        config: &Arc<model::Cluster>,
        breakers: &Arc<Breakers>,
    ) -> Self {
        Self { said, config: Arc::clone(config), breakers: Arc::clone(breakers), set: OnceLock::new() }
    }

    /// All of them.
    pub fn get(&self) -> &HostSet {
        self.set.get_or_init(|| {
            let mut known = self.breakers.known_hosts.lock().unwrap_or_else(PoisonError::into_inner);
            let set = Arc::new(self.build(known.upgrade().as_deref()));
            *known = Arc::downgrade(&set);
            set
        })
    }

    /// All of them if anybody uses them.
    pub fn used(&self) -> Option<&HostSet> {
        self.set.get().map(|set| &**set)
    }

    /// Shows them to somebody who does not use them.
    pub fn look<R>(&self, at: impl FnOnce(&HostSet) -> R) -> R {
        match self.used() {
            Some(set) => at(set),
            None => at(&self.build(None)),
        }
    }

    fn build(&self, known: Option<&HostSet>) -> HostSet {
        let none = model::Endpoints::default();
        let said = self.said.as_deref().unwrap_or(&none);
        HostSet::build(said, known, |endpoint| transport_of(&self.config, endpoint))
    }
}

/// The socket of an endpoint: the first match whose labels it has all, else the default, which is the last.
fn transport_of(config: &model::Cluster, endpoint: &model::Endpoint) -> usize {
    let labels = &endpoint.transport_labels;
    let fits = |wanted: &model::TransportMatch| wanted.labels.iter().all(|(key, value)| labels.get(key) == Some(value));
    config.transport_matches.iter().position(fits).unwrap_or(config.transport_matches.len())
}
