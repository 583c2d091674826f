//! One worker's view of the configuration: the snapshot, and what this worker keeps for the clusters it uses.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use proxy_config::model::ClusterKind;

use super::breaker::Metrics;
use super::conn::Place;
use super::lb::{Balancer, Wish};
use super::outlier::{Cause, Detector, Policy, Signal};
use super::pool::{Key, Pool};
use crate::snapshot::{ClusterId, ClusterShared, Host, HostStats, PIECE, Snapshot, Transport};
use crate::telemetry::{NodeLabels, Shard, Telemetry};

/// Original destinations of a cluster that are remembered before the unused ones are looked for.
const DYNAMIC_HOSTS: usize = 64;

/// A snapshot with this worker's state for it.
pub struct View {
    /// The configuration.
    pub snap: Arc<Snapshot>,
    shard: Arc<Shard>,
    /// By number, in pieces that are there once somebody in them is used: a push makes this anew for every worker.
    clusters: Box<[OnceLock<Slots>]>,
}

type Slots = Box<[OnceLock<Arc<ClusterLocal>>]>;

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").field("version", &self.snap.version).finish_non_exhaustive()
    }
}

impl Default for View {
    fn default() -> Self {
        Self::new(Arc::default(), None)
    }
}

impl View {
    /// A view; connections of hosts that stay come along from `prev`, the others are closed as they become idle. So does
    /// the worker's shard of the metrics; without `prev` the counts go where nobody reads them.
    pub fn new(snap: Arc<Snapshot>, prev: Option<&Self>) -> Self {
        let nowhere = || Telemetry::new(NodeLabels::default()).shard();
        let shard = prev.map_or_else(nowhere, |prev| Arc::clone(&prev.shard));
        Self::counted(snap, shard, prev)
    }

    /// A view that counts in `shard`, which must be that of `prev`.
    pub fn counted(snap: Arc<Snapshot>, shard: Arc<Shard>, prev: Option<&Self>) -> Self {
        let pieces = snap.cluster_count().div_ceil(PIECE);
        let view = Self { snap, shard, clusters: (0..pieces).map(|_| OnceLock::new()).collect() };
        for old in prev.iter().flat_map(|view| view.used()) {
            let Some(id) = view.snap.cluster_id(&old.shared.name) else {
                old.retire(None);
                continue;
            };
            let shared = view.snap.cluster(id);
            let new = if Arc::ptr_eq(shared, &old.shared) {
                Arc::clone(old)
            } else {
                let new = ClusterLocal::new(Arc::clone(shared), view.shard.cluster(shared.stat_name()), Some(old));
                old.retire(Some(&new));
                new
            };
            // Nobody else has the slots yet.
            let _ = view.slot(id).set(new);
        }
        view
    }

    fn slot(&self, id: ClusterId) -> &OnceLock<Arc<ClusterLocal>> {
        let piece = self.clusters[id.index() / PIECE].get_or_init(|| (0..PIECE).map(|_| OnceLock::new()).collect());
        &piece[id.index() % PIECE]
    }

    /// This worker's part of a cluster, made when it is first asked for.
    pub fn cluster(&self, id: ClusterId) -> &Arc<ClusterLocal> {
        self.slot(id).get_or_init(|| {
            let shared = self.snap.cluster(id);
            ClusterLocal::new(Arc::clone(shared), self.shard.cluster(shared.stat_name()), None)
        })
    }

    /// The clusters that this worker has used.
    pub fn used(&self) -> impl Iterator<Item = &Arc<ClusterLocal>> {
        self.clusters.iter().filter_map(OnceLock::get).flatten().filter_map(OnceLock::get)
    }
}

/// What one worker keeps for a cluster: pools, balancer, draws.
pub struct ClusterLocal {
    /// What all workers share.
    pub shared: Arc<ClusterShared>,
    /// What this worker counts about it.
    pub metrics: Metrics,
    /// By position in [`crate::snapshot::HostSet::all`].
    hosts: Box<[Arc<HostPools>]>,
    /// Original destinations.
    dynamic: Arc<Mutex<Dynamic>>,
    balancer: Mutex<Balancer>,
    outlier: Option<Policy>,
}

type Dynamic = HashMap<SocketAddr, (Arc<Host>, Arc<HostPools>)>;

impl fmt::Debug for ClusterLocal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterLocal").field("name", &self.shared.name).finish_non_exhaustive()
    }
}

/// One worker's lock: never contended, and never held across a wait.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A chosen host.
#[derive(Debug, Clone)]
pub(super) struct Picked {
    /// Position in the host set; none for original destinations.
    pub(super) at: Option<u32>,
    pub(super) host: Arc<Host>,
    pub(super) pools: Arc<HostPools>,
}

impl ClusterLocal {
    /// A worker's part of a cluster. Pools of hosts whose socket did not change come along from `prev`.
    pub fn new(shared: Arc<ClusterShared>, metrics: Metrics, prev: Option<&Self>) -> Arc<Self> {
        let prev = prev.filter(|prev| same_connections(&prev.shared, &shared));
        let old: HashMap<*const HostStats, &Arc<HostPools>> =
            prev.into_iter().flat_map(|prev| &prev.hosts).map(|p| (Arc::as_ptr(&p.place.host.stats), p)).collect();
        let pools = |host: &Arc<Host>| {
            let transport = shared.transport(host);
            let same = old.get(&Arc::as_ptr(&host.stats)).filter(|p| same_transport(&p.place.transport, transport));
            same.map_or_else(|| HostPools::new(&shared, host, &metrics), |pools| Arc::clone(pools))
        };
        let same_socket = |prev: &&Self| same_transport(prev.shared.default_transport(), shared.default_transport());
        let dynamic = prev.filter(same_socket);
        let local = Arc::new(Self {
            hosts: shared.hosts().all.iter().map(pools).collect(),
            dynamic: dynamic.map_or_else(Arc::default, |prev| Arc::clone(&prev.dynamic)),
            balancer: Mutex::new(Balancer::new(fastrand::u64(..))),
            outlier: shared.config.outlier.as_ref().map(Policy::new),
            shared,
            metrics,
        });
        local.watch();
        local
    }

    /// Sweeps ejections as long as this part of the cluster is there. Every worker ticks, one of them does the work.
    fn watch(self: &Arc<Self>) {
        let Some(policy) = &self.outlier else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let interval = policy.interval();
        let local = Arc::downgrade(self);
        runtime.spawn(sweep(local, interval));
    }

    /// Open upstream connections of this worker.
    pub fn connections(&self) -> usize {
        let dynamic: usize = lock(&self.dynamic).values().map(|(_, pools)| pools.size()).sum();
        self.hosts.iter().map(|pools| pools.size()).sum::<usize>() + dynamic
    }

    /// Chooses a host; `None`: there is none to be used.
    pub(super) fn pick(&self, wish: Wish<'_>, original_dst: Option<SocketAddr>) -> Option<Picked> {
        if matches!(self.shared.config.kind, ClusterKind::OriginalDst) {
            return original_dst.map(|address| self.original(address));
        }
        let clock = || self.shared.breakers.clock();
        let at = lock(&self.balancer).pick(&self.shared, wish, clock)?;
        let host = Arc::clone(&self.shared.hosts().all[at as usize]);
        Some(Picked { at: Some(at), host, pools: Arc::clone(&self.hosts[at as usize]) })
    }

    fn original(&self, mut address: SocketAddr) -> Picked {
        if let Some(port) = self.shared.config.upstream_port_override {
            address.set_port(port);
        }
        let mut dynamic = lock(&self.dynamic);
        // Looked at only when the number has doubled since: constant work per new destination.
        if dynamic.len() >= DYNAMIC_HOSTS && dynamic.len() == dynamic.capacity() && !dynamic.contains_key(&address) {
            dynamic.retain(|_, (_, pools)| pools.size() > 0);
        }
        let (host, pools) = dynamic.entry(address).or_insert_with(|| {
            let host = Arc::new(Host::original(address, usize::MAX));
            let pools = HostPools::new(&self.shared, &host, &self.metrics);
            (host, pools)
        });
        Picked { at: None, host: Arc::clone(host), pools: Arc::clone(pools) }
    }

    /// The host that the next request would go to; `None`: nobody. It takes its turn.
    pub fn choose(&self, hash: Option<u64>, original_dst: Option<SocketAddr>) -> Option<Arc<Host>> {
        self.pick(Wish { hash, avoid: &[], attempts: 0, pass_over: 0 }, original_dst).map(|picked| picked.host)
    }

    /// A number below 1.
    pub(super) fn draw(&self) -> f64 {
        f64::from(lock(&self.balancer).draw(1 << 20)) / f64::from(1 << 20)
    }

    /// Tells outlier detection about a try.
    pub(super) fn record(&self, host: &HostStats, signal: Signal) {
        let Some(detector) = self.detector() else { return };
        let draw = lock(&self.balancer).draw(100);
        let verdict = detector.record(host, signal, self.shared.breakers.clock(), draw);
        let metrics = &self.metrics;
        if verdict.overflow {
            metrics.ejections_overflow.inc();
        }
        let Some(cause) = verdict.ejected else { return };
        metrics.ejections_enforced.inc();
        match cause {
            Cause::ServerError => metrics.ejections_consecutive_5xx.inc(),
            Cause::Gateway => metrics.ejections_consecutive_gateway_failure.inc(),
            Cause::LocalOrigin => metrics.ejections_consecutive_local_origin.inc(),
        }
    }

    fn detector(&self) -> Option<Detector<'_>> {
        let policy = self.outlier.as_ref()?;
        Some(Detector { policy, breakers: &self.shared.breakers, hosts: &self.shared.hosts().all })
    }

    /// Closes what is idle and not part of `next`.
    pub(super) fn retire(&self, next: Option<&Self>) {
        let kept: Vec<*const HostPools> = next.iter().flat_map(|next| &next.hosts).map(Arc::as_ptr).collect();
        for pools in self.hosts.iter().filter(|pools| !kept.contains(&Arc::as_ptr(pools))) {
            pools.retire();
        }
        if !next.is_some_and(|next| Arc::ptr_eq(&next.dynamic, &self.dynamic)) {
            lock(&self.dynamic).values().for_each(|(_, pools)| pools.retire());
        }
    }
}

async fn sweep(local: Weak<ClusterLocal>, interval: std::time::Duration) {
    loop {
        {
            let Some(local) = local.upgrade() else { return };
            let Some(detector) = local.detector() else { return };
            let now = local.shared.breakers.clock();
            if detector.is_due(now) {
                let draw = lock(&local.balancer).draw(100);
                detector.sweep(now, draw);
            }
        }
        tokio::time::sleep(interval).await;
    }
}

/// The pools of one host.
#[derive(Debug)]
pub(super) struct HostPools {
    pub(super) place: Place,
    breakers: Arc<crate::snapshot::Breakers>,
    pools: Mutex<Vec<Arc<Pool>>>,
}

impl HostPools {
    fn new(shared: &ClusterShared, host: &Arc<Host>, metrics: &Metrics) -> Arc<Self> {
        let place = Place {
            host: Arc::clone(host),
            transport: shared.transport(host).clone(),
            config: Arc::clone(&shared.config),
            metrics: Arc::clone(metrics),
        };
        Arc::new(Self { place, breakers: Arc::clone(&shared.breakers), pools: Mutex::default() })
    }

    /// The pool for a kind of connection; nearly always the first and only one.
    pub(super) fn pool(&self, key: &Key) -> Arc<Pool> {
        let mut pools = lock(&self.pools);
        if let Some(pool) = pools.iter().find(|pool| pool.key == *key) {
            return Arc::clone(pool);
        }
        // Keys that name a client or the host of a request come and go.
        pools.retain(|pool| (pool.key.client.is_none() && pool.key.sni.is_none()) || pool.size() > 0);
        let pool = Pool::new(key.clone(), self.place.clone(), &self.breakers);
        pools.push(Arc::clone(&pool));
        pool
    }

    fn size(&self) -> usize {
        lock(&self.pools).iter().map(|pool| pool.size()).sum()
    }

    fn retire(&self) {
        lock(&self.pools).iter().for_each(|pool| pool.retire());
    }
}

/// Whether connections of one version of a cluster are good for another: everything but hosts is the same.
fn same_connections(a: &ClusterShared, b: &ClusterShared) -> bool {
    Arc::ptr_eq(&a.config, &b.config) || {
        let (a, b) = (&a.config, &b.config);
        a.http == b.http
            && a.connect_timeout == b.connect_timeout
            && a.source_address == b.source_address
            && a.tcp_keepalive == b.tcp_keepalive
            && a.upstream_port_override == b.upstream_port_override
    }
}

fn same_transport(a: &Transport, b: &Transport) -> bool {
    match (a, b) {
        (Transport::Raw, Transport::Raw) => true,
        (Transport::Tls(a), Transport::Tls(b)) => a == b,
        (Transport::ProxyProtocol(v, a), Transport::ProxyProtocol(w, b)) => v == w && same_transport(a, b),
        (Transport::Unusable(a), Transport::Unusable(b)) => a == b,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{cluster, endpoints, joined, shared};
    use super::*;

    #[test]
    fn clients_cannot_fill_the_list_of_pools() {
        let cluster = joined(shared(cluster("c"), &endpoints(&[1])), None);
        for i in 0..100 {
            cluster.hosts[0].pool(&Key { sni: Some(format!("host-{i}").into()), ..Key::default() });
        }
        assert_eq!(lock(&cluster.hosts[0].pools).len(), 1);
    }
}
