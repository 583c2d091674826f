//! Clusters whose endpoints all stopped working while nothing came from the control plane: what we hold may be old.
//!
//! The control plane is asked to send them again; if that brings nothing, another one is asked. Decides from the counts
//! that the data path keeps anyway, and does no I/O beside reading them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use proxy_config::Name;
use proxy_config::model::ClusterKind;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use super::Published;
use crate::snapshot::{ClusterShared, Host, Hosts, Snapshot};
use crate::xds::Ask;

/// Distance between looks.
const LOOK: Duration = Duration::from_secs(5);
/// Trouble that lasts for this many looks in a row is told.
const PATIENCE: u32 = 2;
/// Trouble that goes on for this long after that is the control plane's.
const CHANGE_AFTER: Duration = Duration::from_secs(30);
/// Least time between changes of the control plane: others have troubles too.
const CHANGE_APART: Duration = Duration::from_secs(300);

/// What was seen of clusters in trouble.
#[derive(Default)]
pub(super) struct Healer {
    seen: HashMap<Name, Seen>,
    changed: Option<Instant>,
}

struct Seen {
    /// The endpoints that it is about.
    hosts: Arc<Hosts>,
    counts: Counts,
    looks: u32,
    told: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Counts {
    failures: u64,
    opened: u64,
}

impl Healer {
    /// Looks at everything; what to ask for.
    pub(super) fn look(&mut self, snapshot: &Snapshot, now: Instant) -> Vec<Ask> {
        let mut names = Vec::new();
        let mut change = false;
        let mut seen = HashMap::new();
        for cluster in snapshot.clusters() {
            let ClusterKind::Eds(service) = &cluster.config.kind else { continue };
            let counts = counts(cluster);
            if counts.failures == 0 {
                continue;
            }
            let old = self.seen.remove(&cluster.name).filter(|old| Arc::ptr_eq(&old.hosts, &cluster.hosts));
            let mut next = Seen { hosts: Arc::clone(&cluster.hosts), counts, looks: 0, told: None };
            if let Some(old) = old
                && counts.failures > old.counts.failures
                && counts.opened == old.counts.opened
                && open(cluster) == 0
            {
                (next.looks, next.told) = (old.looks + 1, old.told);
                if next.looks == PATIENCE {
                    names.push(Arc::clone(service));
                    next.told = Some(now);
                }
                change |= next.told.is_some_and(|told| now.duration_since(told) >= CHANGE_AFTER);
            }
            seen.insert(Arc::clone(&cluster.name), next);
        }
        self.seen = seen;
        let mut asks = Vec::new();
        if !names.is_empty() {
            asks.push(Ask::Resubscribe(names));
        }
        if change && self.changed.is_none_or(|at| now.duration_since(at) >= CHANGE_APART) {
            self.changed = Some(now);
            self.seen.clear();
            asks.push(Ask::ChangeServer);
        }
        asks
    }
}

/// Looks again and again, until nobody publishes or listens any more.
pub async fn run(published: watch::Receiver<Arc<Published>>, asks: mpsc::Sender<Ask>) {
    let mut healer = Healer::default();
    while !asks.is_closed() && published.has_changed().is_ok() {
        sleep(LOOK).await;
        let snapshot = Arc::clone(&published.borrow().snapshot);
        for ask in healer.look(&snapshot, Instant::now()) {
            tracing::warn!("endpoints do not work and nothing new comes: {ask:?}");
            if asks.send(ask).await.is_err() {
                return;
            }
        }
    }
}

/// Sums over its hosts; hosts that nobody tried do not count against it.
fn counts(cluster: &ClusterShared) -> Counts {
    let add = |sum: Counts, host: &Arc<Host>| Counts {
        failures: sum.failures + host.stats.totals.connect_failures.load(Relaxed),
        opened: sum.opened + host.stats.totals.connections_total.load(Relaxed),
    };
    used(cluster).iter().fold(Counts::default(), add)
}

/// Connections that are open now.
fn open(cluster: &ClusterShared) -> u32 {
    used(cluster).iter().map(|host| host.stats.totals.connections.load(Relaxed)).sum()
}

/// Nobody has tried the hosts of a cluster that is not used.
fn used(cluster: &ClusterShared) -> &[Arc<Host>] {
    cluster.hosts.used().map_or(&[], |set| &*set.all)
}

#[cfg(test)]
mod tests {
    use bench_harness::istiod::resources;
    use proxy_config::{Model, xds};

    use super::*;
    use crate::snapshot;
    use crate::tls::Secrets;

    fn snapshot(prev: Option<&Snapshot>, hosts: &[u8]) -> Snapshot {
        let all: Vec<_> = hosts.iter().map(|n| ([10, 0, 0, *n], 80).into()).collect();
        let mut model = Model::default();
        let cluster = xds::cluster(&resources::eds_cluster("a", 1)).unwrap().value;
        model.clusters.insert("a".into(), Arc::new(cluster));
        let said = xds::endpoints(&resources::assignment("a", &all)).unwrap().value;
        model.endpoints.insert("a".into(), Arc::new(said));
        snapshot::compile(prev, &model, &Secrets::new()).0
    }

    fn fail(snapshot: &Snapshot) {
        let host = &snapshot.clusters().next().unwrap().hosts().all[0];
        host.stats.totals.connect_failures.fetch_add(1, Relaxed);
    }

    fn ask() -> Vec<Ask> {
        vec![Ask::Resubscribe(vec!["a".into()])]
    }

    #[test]
    fn lasting_trouble_is_told_and_then_another_server_is_asked() {
        let (snapshot, mut healer, start) = (snapshot(None, &[1, 2]), Healer::default(), Instant::now());
        let mut asks = Vec::new();
        for look in 0..20 {
            fail(&snapshot);
            asks.extend(healer.look(&snapshot, start + LOOK * look));
        }
        // Told once, then once to the next server; to that one it is told again.
        let changes = asks.iter().filter(|ask| **ask == Ask::ChangeServer).count();
        assert_eq!(changes, 1, "{asks:?}");
        assert_eq!(asks[..2], [ask(), vec![Ask::ChangeServer]].concat()[..], "{asks:?}");
    }

    #[test]
    fn success_new_endpoints_and_quiet_end_it() {
        let (mut healer, now) = (Healer::default(), Instant::now());
        let first = snapshot(None, &[1, 2]);
        let mut looks = |of: &Snapshot| healer.look(of, now);
        fail(&first);
        assert_eq!((looks(&first), looks(&first)), (vec![], vec![]), "no failure between");
        fail(&first);
        assert!(looks(&first).is_empty());
        first.clusters().next().unwrap().hosts().all[1].stats.totals.connections_total.fetch_add(1, Relaxed);
        fail(&first);
        assert!(looks(&first).is_empty(), "one host works");
        fail(&first);
        assert!(looks(&first).is_empty());
        let second = snapshot(Some(&first), &[1, 3]);
        fail(&second);
        assert!(looks(&second).is_empty(), "there were news");
        fail(&second);
        assert!(looks(&second).is_empty());
        fail(&second);
        assert_eq!(looks(&second), ask());
    }
}
