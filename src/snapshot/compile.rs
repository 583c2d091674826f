//! From the model to a snapshot, incrementally by identity: what did not change keeps its `Arc`, so that workers, live
//! connections and session tickets are left alone. Runs on the control thread; costs comparisons for what is unchanged.

use std::net::SocketAddr;
use std::sync::Arc;

use proxy_config::model::{self, CommonTls};
use proxy_config::{Model, Reject, Severity};

use super::chain_compile;
use super::chain_match::ChainMatcher;
use super::cluster::{Ids, Transport};
use super::clusters::Clusters;
use super::host::Breakers;
use super::hosts::Hosts;
use super::listener::Inspectors;
use super::logs::access_logs;
use super::{
    ByName, Chain, ClusterId, ClusterShared, KeyBell, Listener, Name, RouteTable, Snapshot, TcpExchange, route_compile,
};
use crate::tls::Secrets;

/// A route table with what it was compiled from.
#[derive(Debug)]
pub(super) struct CompiledTable {
    pub(super) said: Arc<model::RouteTable>,
    pub(super) table: Arc<RouteTable>,
}

/// Compiles a model. What did not change since `prev` keeps its `Arc`; breakers survive by cluster name, host statistics
/// by cluster and address. Other secrets compile only TLS anew.
///
/// The rejects list what cannot be served as said, also where it did not change since `prev`: an expression that does not
/// compile leaves out its route, an action that is not done answers 501, a policy or certificate that cannot be used makes
/// its chain unusable.
pub fn compile(prev: Option<&Snapshot>, model: &Model, secrets: &Secrets) -> (Snapshot, Vec<Reject>) {
    let same_secrets = prev.is_some_and(|prev| prev.secrets == *secrets);
    let bell = prev.map(|prev| Arc::clone(&prev.bell)).unwrap_or_default();
    let kept = by_resource(prev.map_or(&[], |prev| &*prev.rejects));
    let mut work = Work { prev, model, secrets, same_secrets, bell: Arc::clone(&bell), kept, rejects: Vec::new() };
    let clusters: Clusters = model.clusters.values().map(|said| work.cluster(said)).collect();
    let by_name = ids(&clusters);
    let by_eds = other_eds_names(&clusters);
    let routes = work.routes(&Ids(&by_name));
    let listeners: Arc<[Arc<Listener>]> =
        model.listeners.values().map(|said| work.listener(said, &Ids(&by_name))).collect();
    let by_address = work.by_address(&listeners);
    let rejects = work.rejects;
    let snapshot = Snapshot {
        version: prev.map_or(1, |prev| prev.version + 1),
        bound: listeners.iter().filter(|listener| listener.bound).cloned().collect(),
        listeners,
        by_address: Arc::new(by_address),
        routes: Arc::new(routes),
        clusters,
        by_name: Arc::new(by_name),
        by_eds: Arc::new(by_eds),
        secrets: secrets.clone(),
        rejects: rejects.clone().into(),
        bell,
        counts_by_default: model.default_metrics,
    };
    (snapshot, rejects)
}

/// As [`compile`], where only the load assignments of these EDS names changed since `prev` was compiled: the push that
/// comes most often. Work is done for their clusters; all others cost a pointer. What is rejected stays the same.
pub fn compile_endpoints(prev: &Snapshot, model: &Model, names: &[Name]) -> Snapshot {
    let mut work = Work {
        prev: Some(prev),
        model,
        secrets: &prev.secrets,
        same_secrets: true,
        bell: Arc::clone(&prev.bell),
        kept: Default::default(),
        rejects: Vec::new(),
    };
    let mut clusters = prev.clusters.clone();
    for name in names {
        let own = prev.cluster_id(name).into_iter();
        for id in own.chain(prev.by_eds.get(name).into_iter().flatten().copied()) {
            let old = prev.cluster(id);
            if matches!(&old.config.kind, model::ClusterKind::Eds(eds) if eds == name) {
                clusters.set(id, work.cluster(&old.config));
            }
        }
    }
    Snapshot {
        version: prev.version + 1,
        listeners: Arc::clone(&prev.listeners),
        bound: Arc::clone(&prev.bound),
        by_address: Arc::clone(&prev.by_address),
        routes: Arc::clone(&prev.routes),
        clusters,
        by_name: Arc::clone(&prev.by_name),
        by_eds: Arc::clone(&prev.by_eds),
        secrets: prev.secrets.clone(),
        rejects: Arc::clone(&prev.rejects),
        bell: Arc::clone(&prev.bell),
        counts_by_default: prev.counts_by_default,
    }
}

/// Where rejects of one resource go, with the field that is being compiled.
pub(super) struct Sink<'a> {
    rejects: &'a mut Vec<Reject>,
    resource: &'a str,
    at: String,
}

impl<'a> Sink<'a> {
    pub(super) fn new(rejects: &'a mut Vec<Reject>, resource: &'a str) -> Self {
        Self { rejects, resource, at: String::new() }
    }

    /// The same one step further in.
    pub(super) fn at(&mut self, field: &str) -> Sink<'_> {
        let at = join(&self.at, field);
        Sink { rejects: self.rejects, resource: self.resource, at }
    }

    /// Accepted, worth a line.
    pub(super) fn warn(&mut self, field: &str, reason: String) {
        self.push(Severity::Warning, field, reason);
    }

    /// The smallest unit is left out or answers 501.
    pub(super) fn error(&mut self, field: &str, reason: String) {
        self.push(Severity::Error, field, reason);
    }

    /// The chain must not serve.
    pub(super) fn security(&mut self, field: &str, reason: String) {
        self.push(Severity::Security, field, reason);
    }

    fn push(&mut self, severity: Severity, field: &str, reason: String) {
        let field = join(&self.at, field);
        let reject = Reject { resource: self.resource.to_owned(), place: None, field, reason, severity, code: None };
        if !is_known(self.rejects, &reject) {
            self.rejects.push(reject);
        }
    }
}

fn join(at: &str, field: &str) -> String {
    if at.is_empty() || field.is_empty() {
        return format!("{at}{field}");
    }
    format!("{at}.{field}")
}

/// One compilation.
struct Work<'a> {
    prev: Option<&'a Snapshot>,
    model: &'a Model,
    secrets: &'a Secrets,
    same_secrets: bool,
    bell: Arc<KeyBell>,
    /// What was rejected before, by resource.
    kept: hashbrown::HashMap<&'a str, Vec<&'a Reject>, foldhash::fast::RandomState>,
    rejects: Vec<Reject>,
}

fn by_resource(rejects: &[Reject]) -> hashbrown::HashMap<&str, Vec<&Reject>, foldhash::fast::RandomState> {
    let mut out: hashbrown::HashMap<&str, Vec<&Reject>, _> = hashbrown::HashMap::default();
    for reject in rejects {
        out.entry(&*reject.resource).or_default().push(reject);
    }
    out
}

/// Whether a resource's reject is known. Resources come one after the other, so what is known of this one stands last.
fn is_known(rejects: &[Reject], reject: &Reject) -> bool {
    rejects.iter().rev().take_while(|known| known.resource == reject.resource).any(|known| known == reject)
}

/// Equal, cheaply where it is the same object.
fn same<T: PartialEq>(a: &Arc<T>, b: &Arc<T>) -> bool {
    Arc::ptr_eq(a, b) || a == b
}

fn ids(clusters: &Clusters) -> ByName<ClusterId> {
    (0..).map(ClusterId).zip(clusters.iter()).map(|(id, cluster)| (Arc::clone(&cluster.name), id)).collect()
}

/// istiod names load assignments as their clusters, so that there are none.
fn other_eds_names(clusters: &Clusters) -> ByName<Vec<ClusterId>> {
    let mut out: ByName<Vec<ClusterId>> = ByName::default();
    for (id, cluster) in (0..).map(ClusterId).zip(clusters.iter()) {
        if let model::ClusterKind::Eds(name) = &cluster.config.kind
            && *name != cluster.name
        {
            out.entry(Arc::clone(name)).or_default().push(id);
        }
    }
    out
}

impl Work<'_> {
    /// What stays the same is still rejected.
    fn keep_rejects(&mut self, resource: &str, field: &str) {
        for reject in self.kept.get(resource).into_iter().flatten().filter(|r| r.field.starts_with(field)) {
            if !is_known(&self.rejects, reject) {
                self.rejects.push((*reject).clone());
            }
        }
    }

    fn cluster(&mut self, said: &Arc<model::Cluster>) -> Arc<ClusterShared> {
        let old = self.prev.and_then(|prev| prev.cluster_id(&said.name).map(|id| prev.cluster(id)));
        let resource = format!("Cluster {}", said.name);
        let same_config = old.is_some_and(|old| same(&old.config, said));
        let config = Arc::clone(old.filter(|_| same_config).map_or(said, |old| &old.config));
        let said_hosts = self.said_hosts(&config, old.filter(|_| same_config));
        let same_hosts = old.is_some_and(|old| match (&old.hosts.said, &said_hosts) {
            (Some(a), Some(b)) => same(a, b),
            (a, b) => a.is_none() && b.is_none(),
        });
        if same_config && self.same_secrets {
            self.keep_rejects(&resource, "");
            if let Some(old) = old.filter(|_| same_hosts) {
                return Arc::clone(old);
            }
        }
        let transports = match old {
            Some(old) if same_config && self.same_secrets => Arc::clone(&old.transports),
            _ => self.transports(&config, &resource, old),
        };
        // What stays in use has its sockets chosen already; nobody else needs the old configuration any more.
        let stay = |old: &&Arc<ClusterShared>| {
            same_config || (old.hosts.used().is_some() && old.config.transport_matches == config.transport_matches)
        };
        let breakers = old.map_or_else(Arc::<Breakers>::default, |old| Arc::clone(&old.breakers));
        let hosts = match old.filter(stay) {
            Some(old) if same_hosts => Arc::clone(&old.hosts),
            _ => Arc::new(Hosts::new(said_hosts, &config, &breakers)),
        };
        if old.is_some_and(|old| old.hosts.used().is_some()) {
            hosts.get();
        }
        if let Some(old) = old.filter(|old| same_config && same_hosts && Arc::ptr_eq(&old.transports, &transports)) {
            return Arc::clone(old);
        }
        breakers.limit(&config.limits);
        let exchange = said.metadata_exchange.as_ref().map(TcpExchange::new);
        Arc::new(ClusterShared { name: Arc::clone(&said.name), config, breakers, hosts, transports, exchange })
    }

    /// The load assignment of a cluster. That of a DNS cluster may stand in the model under the cluster's name too: this
    /// is where the resolver's answers go.
    fn said_hosts(
        &self,
        config: &model::Cluster,
        unchanged: Option<&Arc<ClusterShared>>,
    ) -> Option<Arc<model::Endpoints>> {
        let inline = match &config.kind {
            model::ClusterKind::Eds(name) => return self.model.endpoints.get(name).cloned(),
            model::ClusterKind::OriginalDst | model::ClusterKind::DynamicForwardProxy => return None,
            model::ClusterKind::Static(inline) => inline,
            model::ClusterKind::StrictDns(inline) | model::ClusterKind::LogicalDns(inline) => {
                match self.model.endpoints.get(&config.name) {
                    Some(resolved) => return Some(Arc::clone(resolved)),
                    None => inline,
                }
            }
        };
        match unchanged.and_then(|old| old.hosts.said.as_ref()) {
            Some(old) if **old == *inline => Some(Arc::clone(old)),
            _ => Some(Arc::new(inline.clone())),
        }
    }

    /// The sockets of a cluster; the old ones when they came out equal.
    fn transports(
        &mut self,
        config: &model::Cluster,
        resource: &str,
        old: Option<&Arc<ClusterShared>>,
    ) -> Arc<[Transport]> {
        let mut sink = Sink::new(&mut self.rejects, resource);
        if config.kind == model::ClusterKind::DynamicForwardProxy {
            sink.error("", "dynamic forward proxy clusters are not supported; it has no hosts".to_owned());
        }
        if config.close_on_host_failure {
            let why = "connections of a host that fails end with their requests, not before".to_owned();
            sink.error("close_connections_on_host_health_failure", why);
        }
        let refused = (!config.unsupported.is_empty()).then(|| {
            let names = config.unsupported.join(", ");
            sink.error("filters", format!("{names} is not supported; no connection is opened"));
            Transport::Unusable(format!("upstream filter {names} is not supported").into())
        });
        let said = config.transport_matches.iter().map(|m| &m.transport).chain([&config.transport]);
        let mut compile = |said: &model::Transport| {
            let transport = Transport::compile(said, config, self.secrets);
            if let Some(why) = transport.unusable() {
                // A certificate that has not come yet is no mistake of the configuration.
                match missing_of(said, self.secrets) {
                    Some(name) => sink.warn("transport_socket", format!("secret {name} is missing")),
                    None => sink.error("transport_socket", why.to_string()),
                }
            }
            refused.clone().unwrap_or(transport)
        };
        let new: Arc<[Transport]> = said.map(&mut compile).collect();
        match old {
            Some(old) if old.transports == new => Arc::clone(&old.transports),
            _ => new,
        }
    }

    fn routes(&mut self, ids: &Ids<'_>) -> ByName<Arc<CompiledTable>> {
        let model = self.model;
        let tables = model.routes.iter().map(|(name, said)| {
            let resource = format!("RouteConfiguration {name}");
            let old = self.prev.and_then(|prev| prev.routes.get(name)).filter(|old| same(&old.said, said));
            if let Some(old) = old {
                self.keep_rejects(&resource, "");
                return (Arc::clone(name), Arc::clone(old));
            }
            let table = route_compile::table(said, ids, &mut Sink::new(&mut self.rejects, &resource));
            (Arc::clone(name), Arc::new(CompiledTable { said: Arc::clone(said), table: Arc::new(table) }))
        });
        tables.collect()
    }

    fn listener(&mut self, said: &Arc<model::Listener>, ids: &Ids<'_>) -> Arc<Listener> {
        let old = self.prev.and_then(|prev| prev.listener(&said.name));
        let same_config = old.is_some_and(|old| same(&old.config, said));
        let resource = format!("Listener {}", said.name);
        if let Some(old) = old.filter(|_| same_config && self.same_secrets) {
            self.keep_rejects(&resource, "");
            return Arc::clone(old);
        }
        let chains: Vec<Arc<Chain>> =
            said.filter_chains.iter().enumerate().map(|(i, c)| self.chain((said, Some(i), c), old, ids)).collect();
        let default = said.default_filter_chain.as_ref().map(|c| self.chain((said, None, c), old, ids));
        let config = Arc::clone(old.filter(|_| same_config).map_or(said, |old| &old.config));
        let (matcher, problems) =
            ChainMatcher::new(config.filter_chains.iter().map(|c| &c.matches).zip(chains), default);
        let mut sink = Sink::new(&mut self.rejects, &resource);
        for (index, why) in problems {
            sink.error(&format!("filter_chains[{index}].filter_chain_match"), why);
        }
        if let Some(old) = old.filter(|old| same_config && unchanged(&old.chains, &matcher)) {
            return Arc::clone(old);
        }
        Arc::new(listener(config, matcher, &mut sink))
    }

    /// A chain: the old one where it is equal, with a new TLS context where only the secrets changed.
    fn chain(
        &mut self,
        (listener, index, said): (&model::Listener, Option<usize>, &model::FilterChain),
        old: Option<&Arc<Listener>>,
        ids: &Ids<'_>,
    ) -> Arc<Chain> {
        let resource = format!("Listener {}", listener.name);
        let at = format!("filter_chains[{}]", said.name);
        let old = old.and_then(|old| old_chain(old, index, said));
        if let Some(old) = old {
            let tls = said.tls.as_ref().filter(|_| !self.same_secrets);
            if let Some(chain) = chain_compile::renewed(old, tls, listener, said, self.secrets) {
                self.keep_rejects(&resource, &at);
                return chain;
            }
        }
        let mut sink = Sink::new(&mut self.rejects, &resource);
        Arc::new(chain_compile::chain(listener, said, (ids, self.secrets, &self.bell), &mut sink.at(&at)))
    }

    fn by_address(
        &mut self,
        listeners: &[Arc<Listener>],
    ) -> hashbrown::HashMap<SocketAddr, u32, foldhash::fast::RandomState> {
        let mut all = hashbrown::HashMap::default();
        let mut found = Vec::new();
        for (index, listener) in (0_u32..).zip(listeners) {
            for address in listener.address.iter().chain(&listener.additional) {
                let holder = *all.entry(*address).or_insert(index);
                if holder != index {
                    let resource = format!("Listener {}", listener.name);
                    let other = &listeners[holder as usize].name;
                    let why = format!("{address} belongs to listener {other} already, which keeps it");
                    Sink::new(&mut found, &resource).error("address", why);
                }
            }
        }
        // Listeners that stayed the same said so already.
        for reject in found {
            if !self.rejects.contains(&reject) {
                self.rejects.push(reject);
            }
        }
        all
    }
}

/// The chain of the old listener that is equal; looked for at the same place first.
fn old_chain<'o>(old: &'o Listener, index: Option<usize>, said: &model::FilterChain) -> Option<&'o Arc<Chain>> {
    let chains = &old.config.filter_chains;
    let Some(index) = index else {
        let same = old.config.default_filter_chain.as_ref() == Some(said);
        return old.chains.default_chain().filter(|_| same);
    };
    let here = chains.get(index).filter(|c| *c == said).map(|_| index);
    old.chains.nth(here.or_else(|| chains.iter().position(|c| c == said))?)
}

fn unchanged(old: &ChainMatcher, new: &ChainMatcher) -> bool {
    old.all().count() == new.all().count() && old.all().zip(new.all()).all(|(a, b)| Arc::ptr_eq(a, b))
}

fn listener(config: Arc<model::Listener>, chains: ChainMatcher, sink: &mut Sink<'_>) -> Listener {
    let said = &*config;
    let address = match &said.address {
        model::Address::Socket(address) => Some(*address),
        other => {
            sink.error("address", format!("{other:?} is not supported; nothing listens there"));
            None
        }
    };
    let mut additional = Vec::new();
    for address in &said.additional_addresses {
        match address {
            model::Address::Socket(address) => additional.push(*address),
            other => sink.error("additional_addresses", format!("{other:?} is not supported; nothing listens there")),
        }
    }
    let has = |wanted: fn(&model::ListenerFilterKind) -> bool| said.listener_filters.iter().any(|f| wanted(&f.kind));
    let original_dst = said.use_original_dst || has(|kind| matches!(kind, model::ListenerFilterKind::OriginalDst));
    Listener {
        name: Arc::clone(&said.name),
        address,
        additional: additional.into(),
        direction: said.direction,
        bound: said.bind_to_port && address.is_some(),
        use_original_dst: said.use_original_dst,
        original_dst,
        transparent: said.transparent,
        original_src: said.listener_filters.iter().find_map(|f| match f.kind {
            model::ListenerFilterKind::OriginalSrc { mark } => Some(mark),
            _ => None,
        }),
        proxy_protocol: has(|kind| matches!(kind, model::ListenerFilterKind::ProxyProtocol)),
        exact_balance: said.exact_balance,
        access_log: Arc::new(access_logs(&said.access_log, sink)),
        inspectors: Inspectors::new(said),
        chains,
        config,
    }
}

fn missing_of(said: &model::Transport, secrets: &Secrets) -> Option<Name> {
    match said {
        model::Transport::Tls(tls) => missing_secret(&tls.common, secrets),
        model::Transport::ProxyProtocol(_, inner) => missing_of(inner, secrets),
        model::Transport::Raw | model::Transport::Unsupported(_) => None,
    }
}

/// A secret that a context needs and that has not come yet.
pub(super) fn missing_secret(said: &CommonTls, secrets: &Secrets) -> Option<Name> {
    let no_certificate = said.certificates.iter().all(|name| secrets.identity(name).is_none());
    if let Some(name) = said.certificates.first().filter(|_| no_certificate) {
        return Some(Arc::clone(name));
    }
    let roots = said.validation.as_ref().filter(|v| !v.accept_untrusted)?.roots.as_ref()?;
    secrets.roots(roots).is_none().then(|| Arc::clone(roots))
}
