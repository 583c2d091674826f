//! Hosts and the atomics that all workers share: breaker counts and host statistics. They outlive snapshots.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use crossbeam_utils::CachePadded;
use hashbrown::HashMap;
use proxy_config::model::{self, HealthStatus, Locality};
use proxy_config::peer::Workload;
use tokio::time::Instant;

use super::Name;
use crate::telemetry::Peer;

/// Envoy's overprovisioning factor, percent.
const OVERPROVISIONING: u32 = 140;

/// One endpoint of a cluster. Replaced when what is said about it changes; its statistics go on.
#[derive(Debug)]
pub struct Host {
    /// Where; `0.0.0.0:0` for a Unix domain socket.
    pub address: SocketAddr,
    /// Unix domain socket path.
    pub pipe: Option<Box<str>>,
    /// Weight inside its locality; at least 1.
    pub weight: u32,
    /// Where it runs.
    pub locality: Arc<Locality>,
    /// 0 is tried first.
    pub priority: u32,
    /// What the control plane says of it.
    pub health: HealthStatus,
    /// Its workload, as the endpoint's metadata tells it.
    pub peer: Option<Arc<Peer>>,
    /// Host name, for DNS kinds; empty otherwise.
    pub hostname: Name,
    /// Index into [`super::ClusterShared::transports`].
    pub transport: usize,
    /// Shared by all versions of this host.
    pub stats: Arc<HostStats>,
    said: model::Endpoint,
}

impl Host {
    /// A host that nobody configured: the original destination of a connection.
    pub fn original(address: SocketAddr, transport: usize) -> Self {
        let said = model::Endpoint {
            address: model::Address::Socket(address),
            health: HealthStatus::Unknown,
            weight: 1,
            transport_labels: Default::default(),
            workload: Default::default(),
            hostname: String::new(),
            metadata: Default::default(),
        };
        host(&said, &(address, None), (&Arc::default(), 0), transport, None)
    }

    /// Whether the control plane lets it be used at all.
    pub fn is_eligible(&self) -> bool {
        !matches!(self.health, HealthStatus::Unhealthy | HealthStatus::Draining)
    }
}

/// What all workers know about a host. `upstream::outlier` gives the words their meaning; times are milliseconds on
/// its clock. The success path only reads `failures`, so that line stays shared.
#[derive(Debug, Default)]
pub struct HostStats {
    /// Active requests (TCP: connections).
    pub active: CachePadded<AtomicU32>,
    /// Consecutive failures, to be read on every success.
    pub failures: CachePadded<Failures>,
    /// Totals for `/clusters`.
    pub totals: CachePadded<Totals>,
    /// Ejection.
    pub ejection: CachePadded<Ejection>,
    /// Responses since the last sweep, counted only while success rates are compared.
    pub window: CachePadded<Window>,
}

/// Responses of one sweep interval.
#[derive(Debug, Default)]
pub struct Window {
    /// All.
    pub total: AtomicU32,
    /// Those that were no failure.
    pub good: AtomicU32,
}

/// Consecutive failures by kind.
#[derive(Debug, Default)]
pub struct Failures {
    /// 5xx.
    pub server_error: AtomicU32,
    /// 502, 503, 504.
    pub gateway: AtomicU32,
    /// Local origin.
    pub local_origin: AtomicU32,
}

/// Ejection state.
#[derive(Debug, Default)]
pub struct Ejection {
    /// Until when it gets no traffic; 0: it does.
    pub until: AtomicU64,
    /// Ejections so far, decreasing with good behaviour: the multiplier of the ejection time.
    pub times: AtomicU32,
    /// When the host was first seen, for slow start; 0: not yet.
    pub since: AtomicU64,
}

/// Totals.
#[derive(Debug, Default)]
pub struct Totals {
    /// Requests.
    pub requests: AtomicU64,
    /// Requests that failed (5xx or a reset).
    pub errors: AtomicU64,
    /// Open connections.
    pub connections: AtomicU32,
    /// Connections opened so far.
    pub connections_total: AtomicU64,
    /// Connections that could not be opened.
    pub connect_failures: AtomicU64,
}

/// Current use and limit of one resource of a cluster.
#[derive(Debug, Default)]
pub struct Gauge {
    used: AtomicU32,
    limit: AtomicU32,
}

impl Gauge {
    /// A gauge at zero.
    pub fn new(limit: u32) -> Self {
        Self { used: AtomicU32::new(0), limit: AtomicU32::new(limit) }
    }
    /// In use.
    pub fn used(&self) -> u32 {
        self.used.load(Ordering::Relaxed)
    }
    /// Most that may be in use.
    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }
    /// A new limit; what is in use stays.
    pub fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Ordering::Relaxed);
    }
    /// Takes one if the limit allows; whoever got `true` calls [`Gauge::give_back`].
    pub fn take(&self) -> bool {
        self.take_below(self.limit())
    }
    /// Takes one if fewer than `limit` are in use (retry budgets).
    pub fn take_below(&self, limit: u32) -> bool {
        if self.used.fetch_add(1, Ordering::Relaxed) < limit {
            return true;
        }
        self.used.fetch_sub(1, Ordering::Relaxed);
        false
    }
    /// Takes one without asking.
    pub fn force(&self) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }
    /// Gives one back.
    pub fn give_back(&self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A cluster's circuit breaker: shared by all workers, survives snapshots by the cluster's name. A request touches most of
/// it, so it lies together: a line of the cache for a cluster, where a line for each field would be a kilobyte for each of
/// the thousands of clusters that nobody calls.
#[derive(Debug, Default)]
pub struct Breakers {
    /// Connections.
    pub connections: Gauge,
    /// Requests that wait for a connection.
    pub pending: Gauge,
    /// Active requests.
    pub requests: Gauge,
    /// Concurrent retries.
    pub retries: Gauge,
    /// Hosts that are ejected now.
    pub ejected: AtomicU32,
    /// Changes with every ejection and return, so that workers know when their host lists are old.
    pub health_version: AtomicU32,
    /// When ejections are looked at next; the worker that moves it on does the work.
    pub next_sweep: AtomicU64,
    /// The hosts that were compiled last, whatever the version: those that stay keep their statistics. Held while hosts
    /// are compiled, never by a request.
    pub(super) known_hosts: Mutex<Weak<HostSet>>,
    epoch: OnceLock<Instant>,
}

impl Breakers {
    /// Breakers with these limits.
    pub fn new(limits: &model::CircuitBreakers) -> Self {
        let breakers = Self::default();
        breakers.limit(limits);
        breakers
    }

    /// Milliseconds on the cluster's clock, which all workers share; it starts at 1, so that 0 can mean "never".
    pub fn clock(&self) -> u64 {
        let epoch = *self.epoch.get_or_init(Instant::now);
        1 + u64::try_from(epoch.elapsed().as_millis()).expect("an uptime in milliseconds fits 64 bits")
    }

    /// New limits; what is in use stays.
    pub fn limit(&self, limits: &model::CircuitBreakers) {
        self.connections.set_limit(limits.max_connections);
        self.pending.set_limit(limits.max_pending_requests);
        self.requests.set_limit(limits.max_requests);
        self.retries.set_limit(limits.max_retries);
    }
}

/// The hosts of a cluster at one moment.
#[derive(Debug, Default)]
pub struct HostSet {
    /// By priority, 0 first; a priority nobody has is there and empty.
    pub priorities: Box<[Priority]>,
    /// Every host once, in configured order.
    pub all: Box<[Arc<Host>]>,
    /// Overprovisioning, percent.
    pub overprovisioning: u32,
}

/// Hosts of one priority.
#[derive(Debug, Default)]
pub struct Priority {
    /// All of them.
    pub hosts: Box<[Arc<Host>]>,
    /// By locality.
    pub localities: Box<[LocalityHosts]>,
}

/// Hosts of one locality of a priority.
#[derive(Debug)]
pub struct LocalityHosts {
    /// Where.
    pub locality: Arc<Locality>,
    /// Its weight; `None` takes no part in locality-weighted balancing.
    pub weight: Option<u32>,
    /// Hosts.
    pub hosts: Box<[Arc<Host>]>,
}

/// What a host is known by inside its cluster.
type Key = (SocketAddr, Option<Box<str>>);

/// The socket and the Unix path of an endpoint; `None` for what is not resolved yet.
fn place(address: &model::Address) -> Option<Key> {
    match address {
        model::Address::Socket(address) => Some((*address, None)),
        model::Address::Pipe(path) => {
            Some((SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0), Some(path.as_str().into())))
        }
        model::Address::Host(name, port) => name.parse().ok().map(|ip: IpAddr| (SocketAddr::new(ip, *port), None)),
        model::Address::Internal(..) => None,
    }
}

impl HostSet {
    /// Compiles a load assignment. Hosts that were there keep their statistics, unchanged ones their `Arc`.
    /// `transport_of` chooses among the cluster's sockets. Addresses that are names are left out: who resolves them
    /// puts the result into the model.
    pub fn build(
        said: &model::Endpoints,
        prev: Option<&Self>,
        transport_of: impl Fn(&model::Endpoint) -> usize,
    ) -> Self {
        let old: HashMap<Key, &Arc<Host>, foldhash::fast::RandomState> =
            prev.into_iter().flat_map(|set| &set.all).map(|host| ((host.address, host.pipe.clone()), host)).collect();
        let mut all = Vec::new();
        let highest = said.localities.iter().map(|l| l.priority).max().map_or(0, |p| p as usize + 1);
        let mut levels: Vec<Vec<LocalityHosts>> = (0..highest).map(|_| Vec::new()).collect();
        for group in &said.localities {
            let locality = Arc::new(group.locality.clone());
            let mut hosts = Vec::with_capacity(group.endpoints.len());
            for endpoint in &group.endpoints {
                let Some(key) = place(&endpoint.address) else { continue };
                let transport = transport_of(endpoint);
                let same = old.get(&key).filter(|host| {
                    host.said == *endpoint
                        && *host.locality == *locality
                        && host.priority == group.priority
                        && host.transport == transport
                });
                let host = same.map_or_else(
                    || Arc::new(host(endpoint, &key, (&locality, group.priority), transport, old.get(&key).copied())),
                    |host| Arc::clone(host),
                );
                hosts.push(host);
            }
            all.extend(hosts.iter().cloned());
            levels[group.priority as usize].push(LocalityHosts { locality, weight: group.weight, hosts: hosts.into() });
        }
        let priorities = levels.into_iter().map(|localities| Priority {
            hosts: localities.iter().flat_map(|l| l.hosts.iter().cloned()).collect(),
            localities: localities.into(),
        });
        Self {
            priorities: priorities.collect(),
            all: all.into(),
            overprovisioning: said.overprovisioning_factor.unwrap_or(OVERPROVISIONING),
        }
    }

    /// A host by its address.
    pub fn find(&self, address: SocketAddr) -> Option<&Arc<Host>> {
        self.all.iter().find(|host| host.address == address)
    }
}

fn host(
    said: &model::Endpoint,
    key: &Key,
    (locality, priority): (&Arc<Locality>, u32),
    transport: usize,
    old: Option<&Arc<Host>>,
) -> Host {
    Host {
        address: key.0,
        pipe: key.1.clone(),
        weight: said.weight.max(1),
        locality: Arc::clone(locality),
        priority,
        health: said.health,
        peer: Workload::from_endpoint(&said.workload).map(Peer::new),
        hostname: said.hostname.as_str().into(),
        transport,
        stats: old.map_or_else(Arc::default, |host| Arc::clone(&host.stats)),
        said: said.clone(),
    }
}
