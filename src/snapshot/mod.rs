//! The configuration as the hot path reads it: immutable, compiled, looked up by pure functions.
//!
//! It decides which listener, chain, route and policy apply, and never does I/O, waits, or takes a lock. The atomics that
//! workers share (breaker counts, host statistics) ride along in it and survive from one snapshot to the next.
//!
//! ```ignore
//! let (snapshot, rejects) = snapshot::compile(None, &model, &secrets);
//! let listener = snapshot.hand_off(&snapshot.bound()[0], destination).unwrap_or(entry);
//! let chain = listener.chain(&input);
//! let found = route::find(snapshot.route_table(http).unwrap(), &request, fastrand::u64(..))?;
//! let cluster = snapshot.cluster(snapshot.resolve(found.cluster()?)?);
//! ```

pub mod action;
mod action_compile;
mod chain;
mod chain_compile;
mod chain_match;
pub mod check;
mod cluster;
mod clusters;
mod compile;
mod host;
mod hosts;
mod jwks;
mod jwt;
mod jwt_cache;
mod jwt_claims;
mod jwt_place;
#[cfg(test)]
mod jwt_tests;
mod jwt_token;
mod listener;
mod logs;
mod matcher;
mod metadata;
pub mod path;
mod peer_metadata;
#[cfg(test)]
mod property_tests;
mod rbac;
mod rbac_why;
pub mod route;
mod route_compile;
mod template;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use http::{HeaderMap, Method};

pub use chain::{AlpnRewrite, Chain, Filter, HttpChain, HttpFilter, HttpOptions, TcpChain, Terminal};
pub use cluster::{ClusterRef, ClusterShared, Transport, WeightedClusters};
pub(crate) use clusters::PIECE;
pub use compile::{compile, compile_endpoints};
pub use host::{
    Breakers, Ejection, Failures, Gauge, Host, HostSet, HostStats, LocalityHosts, Priority, Totals, Window,
};
pub use hosts::Hosts;
pub use jwks::check as check_jwks;
pub use jwt::{Grant, Jwt, KeyBell, KeySource, Verified, metadata_of};
pub use jwt_cache::JwtCache;
pub use jwt_place::{Place, without_param};
pub use jwt_token::Denied;
pub use listener::{ChainInput, Inspect, Listener};

pub use matcher::{HeaderMatch, QueryMatch, StringMatch, query, url_path};
pub use metadata::Metadata;
pub use peer_metadata::{Discovery, OwnMetadata, PeerMetadata, Propagation, TcpExchange};
pub use proxy_config::{Name, Reject};
pub use rbac::{Rbac, Verdict};
pub use rbac_why::Denial;
pub use route::{Found, NoRoute, Route, RouteTable, VirtualHost};

pub use crate::telemetry::{Format, Operator, Segment};
use crate::tls::{Peer, Secrets};

/// A map by name with the hasher of the hot path.
pub(crate) type ByName<T> = hashbrown::HashMap<Name, T, foldhash::fast::RandomState>;

/// A cluster inside one snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterId(u32);

impl ClusterId {
    /// Position in [`Snapshot::clusters`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Everything, compiled.
#[derive(Default)]
pub struct Snapshot {
    /// Counts up from 1.
    pub version: u64,
    listeners: Arc<[Arc<Listener>]>,
    bound: Arc<[Arc<Listener>]>,
    by_address: Arc<hashbrown::HashMap<SocketAddr, u32, foldhash::fast::RandomState>>,
    routes: Arc<ByName<Arc<compile::CompiledTable>>>,
    clusters: clusters::Clusters,
    by_name: Arc<ByName<ClusterId>>,
    /// By EDS name, where that is not the cluster's own.
    by_eds: Arc<ByName<Vec<ClusterId>>>,
    secrets: Secrets,
    rejects: Arc<[Reject]>,
    /// One for all snapshots of a process.
    bell: Arc<KeyBell>,
    counts_by_default: bool,
}

impl Snapshot {
    /// Whether requests and connections are counted for Istio where no filter asks for it.
    pub fn counts_by_default(&self) -> bool {
        self.counts_by_default
    }

    /// Listeners with a socket.
    pub fn bound(&self) -> &[Arc<Listener>] {
        &self.bound
    }

    /// All listeners, by name.
    pub fn listeners(&self) -> &[Arc<Listener>] {
        &self.listeners
    }

    /// A listener by name.
    pub fn listener(&self, name: &str) -> Option<&Arc<Listener>> {
        let index = self.listeners.binary_search_by(|listener| (*listener.name).cmp(name)).ok()?;
        Some(&self.listeners[index])
    }

    /// What is not served as said, of all resources in it.
    pub fn rejects(&self) -> &[Reject] {
        &self.rejects
    }

    /// The listener that takes over a connection to `dst`: that of the exact address, else that of the wildcard address
    /// with the port, that of IPv4 also for IPv6: istiod's listeners have the wildcard of the proxy's first family.
    /// `None`: `entry` keeps it.
    pub fn hand_off(&self, entry: &Listener, dst: SocketAddr) -> Option<&Arc<Listener>> {
        if !entry.use_original_dst {
            return None;
        }
        let at = |ip: IpAddr| self.by_address.get(&SocketAddr::new(ip, dst.port()));
        let any_v4 = || at(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let id = at(dst.ip()).or_else(|| match dst.ip() {
            IpAddr::V4(_) => any_v4(),
            IpAddr::V6(_) => at(IpAddr::V6(Ipv6Addr::UNSPECIFIED)).or_else(any_v4),
        })?;
        let found = &self.listeners[*id as usize];
        (found.name != entry.name).then_some(found)
    }

    /// A cluster by name.
    pub fn cluster_id(&self, name: &str) -> Option<ClusterId> {
        self.by_name.get(name).copied()
    }

    /// The cluster that a compiled table refers to; `None`: it is not there (NC).
    pub fn resolve(&self, cluster: &ClusterRef) -> Option<ClusterId> {
        match self.clusters.get(ClusterId(cluster.hint)) {
            Some(hinted) if Arc::ptr_eq(&hinted.name, &cluster.name) || hinted.name == cluster.name => {
                Some(ClusterId(cluster.hint))
            }
            _ => self.cluster_id(&cluster.name),
        }
    }

    /// A cluster of this snapshot.
    pub fn cluster(&self, id: ClusterId) -> &Arc<ClusterShared> {
        self.clusters.get(id).expect("an id is of its own snapshot")
    }

    /// All clusters, in the order of their ids.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<ClusterShared>> {
        self.clusters.iter()
    }

    /// How many clusters there are.
    pub fn cluster_count(&self) -> usize {
        self.clusters.len()
    }

    /// The routes of a connection manager; `None` while its table is not there. Ask for each request, with the current
    /// snapshot: long connections see new routes at once.
    pub fn route_table<'a>(&'a self, http: &'a HttpChain) -> Option<&'a Arc<RouteTable>> {
        match &http.routes {
            chain::Routes::Inline(table) => Some(table),
            chain::Routes::Rds(name) => self.route_table_named(name),
        }
    }

    /// A route table by its RDS name.
    pub fn route_table_named(&self, name: &str) -> Option<&Arc<RouteTable>> {
        self.routes.get(name).map(|compiled| &compiled.table)
    }

    /// All RDS tables.
    pub fn route_tables(&self) -> impl Iterator<Item = &Arc<RouteTable>> {
        self.routes.values().map(|compiled| &compiled.table)
    }

    /// Rings when a token asks for a key that its provider does not have.
    pub fn key_bell(&self) -> &Arc<KeyBell> {
        &self.bell
    }

    /// Where keys for tokens are fetched from; one that several chains use comes several times.
    pub fn key_sources(&self) -> impl Iterator<Item = &Arc<KeySource>> {
        let chains = self.listeners.iter().flat_map(|listener| listener.all_chains());
        let filters = chains.flat_map(|chain| match &chain.terminal {
            Terminal::Http(http) => &*http.filters,
            Terminal::Tcp(_) | Terminal::Refuse(_) => &[],
        });
        filters
            .filter_map(|filter| if let HttpFilter::JwtAuthn(jwt) = filter { Some(jwt) } else { None })
            .flat_map(|jwt| jwt.sources())
    }

    /// The key material it was compiled with.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }
}

/// A request as the pure functions see it, after normalisation.
#[derive(Debug, Clone, Copy)]
pub struct RequestView<'a> {
    /// Method.
    pub method: &'a Method,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// Host with port, as sent.
    pub authority: &'a str,
    /// Path with query.
    pub path: &'a str,
    /// Headers without pseudo-headers.
    pub headers: &'a HeaderMap,
}

/// What policy may ask about.
#[derive(Debug, Clone, Copy)]
pub struct Attributes<'a> {
    /// The TLS peer; `None` is plaintext.
    pub peer: Option<&'a Peer>,
    /// The connection's peer address.
    pub direct_remote: SocketAddr,
    /// Peer address after x-forwarded-for.
    pub remote_ip: IpAddr,
    /// Original destination.
    pub destination: SocketAddr,
    /// Server name that the client sent.
    pub sni: Option<&'a str>,
    /// The request; `None` on TCP.
    pub request: Option<&'a RequestView<'a>>,
    /// Dynamic metadata by filter name (JWT payloads).
    pub metadata: Option<&'a Metadata>,
}
