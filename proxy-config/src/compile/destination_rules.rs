//! Which DestinationRule a proxy obeys for each host.
//!
//! Rules of the client's namespace come before those of the service's, and those before the root namespace's; the
//! first level that names the host at all decides, by its most specific name. Rules of one host in one namespace are
//! merged: all subsets, but the first traffic policy as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::hosts;
use super::view::{Rules, Settings};
use crate::istio::common::IstioDuration;
use crate::istio::destination_rule::{
    ConsistentHash, DestinationRule, LoadBalancer, PortPolicy, Subset, TrafficPolicy,
};
use crate::model::{HashKind, HashPolicy};
use crate::registry::{Proxy, Service};

/// A DestinationRule with its name, as it was written.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Namespace of the object.
    pub namespace: &'a str,
    /// Name of the object.
    pub name: &'a str,
    /// What it says.
    pub spec: &'a DestinationRule,
}

/// One rule in force: the first of those that were merged gives it its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    /// Namespace of the first object.
    pub namespace: String,
    /// Name of the first object.
    pub name: String,
    /// Full host name, all subsets, one traffic policy.
    pub spec: DestinationRule,
    export_to: BTreeSet<String>,
}

impl Applied {
    /// Path of the object as istiod writes it into metadata.
    pub(super) fn config_path(&self) -> String {
        format!("/apis/networking.istio.io/v1/namespaces/{}/destination-rule/{}", self.namespace, self.name)
    }

    /// The subset of that name.
    pub(super) fn subset(&self, name: &str) -> Option<&Subset> {
        self.spec.subsets.iter().find(|s| s.name == name)
    }

    /// Policy of a service port: the rule's, with the subset's over it.
    pub(super) fn policy(&self, port: u16, subset: &str) -> Option<TrafficPolicy> {
        let own = self.spec.traffic_policy.as_ref().map(|p| on_port(p, port).0);
        let said = if subset.is_empty() { None } else { self.subset(subset) };
        match said.and_then(|s| s.traffic_policy.as_ref()) {
            Some(over) => Some(merged(own, on_port(over, port))),
            None => own,
        }
    }
}

/// The DestinationRules that one proxy obeys, by host.
#[derive(Debug, Clone, Default)]
pub struct DestinationRules {
    by_host: BTreeMap<String, Chosen>,
}

#[derive(Debug, Clone, Default)]
struct Chosen {
    outbound: Option<Arc<Applied>>,
    inbound: Option<Arc<Applied>>,
}

impl DestinationRules {
    /// Chooses a rule for every service. `sources` is in conflict order (oldest first); `default_export` is the
    /// mesh's `defaultDestinationRuleExportTo`.
    pub fn new(
        sources: &[Source<'_>],
        services: &[Arc<Service>],
        proxy: &Proxy,
        mesh: &Settings,
        default_export: &[String],
    ) -> Self {
        let index = Index::new(sources, mesh, default_export);
        let mut by_host = BTreeMap::new();
        for service in services.iter().filter(|s| !by_host.contains_key(&s.hostname)).collect::<Vec<_>>() {
            let found = index.find(service, &proxy.namespace, &mesh.root_namespace);
            by_host.entry(service.hostname.clone()).or_insert_with(|| choose(&found, proxy));
        }
        Self { by_host }
    }

    /// The rule for calls to a host.
    pub fn outbound(&self, host: &str) -> Option<&Arc<Applied>> {
        self.by_host.get(host)?.outbound.as_ref()
    }

    /// The rule whose pool holds where the proxy itself serves the host; selectors do not count.
    pub fn inbound(&self, host: &str) -> Option<&Arc<Applied>> {
        self.by_host.get(host)?.inbound.as_ref()
    }
}

/// A rule with a selector that selects the proxy, else the last one without.
fn choose(found: &[&Arc<Applied>], proxy: &Proxy) -> Chosen {
    let plain = found.iter().rfind(|r| r.spec.workload_selector.is_none());
    let selected = found.iter().find(|r| {
        r.namespace == proxy.namespace && r.spec.workload_selector.as_ref().is_some_and(|s| s.selects(&proxy.labels))
    });
    Chosen { outbound: selected.or(plain).map(|r| Arc::clone(r)), inbound: plain.map(|r| Arc::clone(r)) }
}

/// Rules of one level by host.
type Level = BTreeMap<String, Vec<Arc<Applied>>>;

#[derive(Default)]
struct Index {
    /// By namespace, for clients of that namespace.
    local: BTreeMap<String, Level>,
    /// By namespace, for clients of others.
    exported: BTreeMap<String, Level>,
    /// Private ones of the root namespace.
    root: Level,
}

impl Index {
    fn new(sources: &[Source<'_>], mesh: &Settings, default_export: &[String]) -> Self {
        let mut ordered: Vec<&Source<'_>> = sources.iter().collect();
        ordered.sort_by_key(|s| s.spec.workload_selector.is_none());
        let mut out = Self::default();
        for source in ordered {
            out.add(source, mesh, default_export);
        }
        out
    }

    fn add(&mut self, source: &Source<'_>, mesh: &Settings, default_export: &[String]) {
        let private = || ".".to_owned();
        let export: BTreeSet<String> = match source.spec.workload_selector {
            Some(_) => BTreeSet::from([private()]),
            None => source.spec.export_to.iter().cloned().collect(),
        };
        let mut spec = source.spec.clone();
        spec.host = hosts::resolve(&spec.host, source.namespace, &mesh.domain);
        let rule = Applied {
            namespace: source.namespace.to_owned(),
            name: source.name.to_owned(),
            spec,
            export_to: export.clone(),
        };
        let has = |what: &str| export.contains(what);
        if export.is_empty() || has("*") || has(".") || has(source.namespace) {
            merge(self.local.entry(source.namespace.to_owned()).or_default(), &rule);
        }
        let private_only = if export.is_empty() {
            default_export.iter().any(|e| e == ".")
        } else {
            export.len() == 1 && (has(".") || has(source.namespace))
        };
        if !private_only {
            merge(self.exported.entry(source.namespace.to_owned()).or_default(), &rule);
        } else if source.namespace == mesh.root_namespace {
            merge(&mut self.root, &rule);
        }
    }

    fn find<'a>(&'a self, service: &Service, client: &str, root: &str) -> Vec<&'a Arc<Applied>> {
        let own = if client == root { Some(&self.root) } else { self.local.get(client) };
        if let Some(found) = own.and_then(|level| named(level, &service.hostname)) {
            return found.iter().collect();
        }
        for namespace in [service.namespace.as_str(), root] {
            let level = self.exported.get(namespace);
            if let Some(found) = level.and_then(|level| named(level, &service.hostname)) {
                let seen = |e: &BTreeSet<String>| e.is_empty() || e.contains("*") || e.contains(client);
                return found.iter().filter(|r| seen(&r.export_to)).collect();
            }
        }
        Vec::new()
    }
}

fn named<'a>(level: &'a Level, host: &str) -> Option<&'a Vec<Arc<Applied>>> {
    level.get(hosts::most_specific(host, level.keys().map(String::as_str))?)
}

/// Puts a rule beside or into those of the same host.
fn merge(level: &mut Level, rule: &Applied) {
    let known = level.entry(rule.spec.host.clone()).or_default();
    let mut apart = true;
    for existing in known.iter_mut() {
        if existing.export_to == rule.export_to {
            apart = false;
        } else if !existing.export_to.is_empty() && rule.export_to.is_superset(&existing.export_to) {
            apart = true;
        } else {
            apart = true;
            continue;
        }
        match (&existing.spec.workload_selector, &rule.spec.workload_selector) {
            (Some(a), Some(b)) if a != b => {
                apart = true;
                continue;
            }
            (Some(_), Some(_)) | (None, None) => apart = false,
            (Some(_), None) | (None, Some(_)) => {}
        }
        let merged = Arc::make_mut(existing);
        for subset in &rule.spec.subsets {
            if !merged.spec.subsets.iter().any(|s| s.name == subset.name) {
                merged.spec.subsets.push(subset.clone());
            }
        }
        if merged.spec.traffic_policy.is_none() {
            merged.spec.traffic_policy.clone_from(&rule.spec.traffic_policy);
        }
    }
    if apart {
        known.push(Arc::new(rule.clone()));
    }
}

/// Policy of one port, and whether the port has its own: then nothing is inherited.
pub(super) fn on_port(policy: &TrafficPolicy, port: u16) -> (TrafficPolicy, bool) {
    match port_policy(policy, port) {
        Some(own) => {
            let own = own.clone();
            let policy = TrafficPolicy {
                load_balancer: own.load_balancer,
                connection_pool: own.connection_pool,
                outlier_detection: own.outlier_detection,
                tls: own.tls,
                ..TrafficPolicy::default()
            };
            (policy, true)
        }
        None => (policy.clone(), false),
    }
}

fn port_policy(policy: &TrafficPolicy, port: u16) -> Option<&PortPolicy> {
    policy.port_level_settings.iter().find(|p| p.port.is_some_and(|s| s.number == u32::from(port)))
}

/// A subset's policy over the rule's, block by block; a subset's port policy goes over all four blocks.
fn merged(base: Option<TrafficPolicy>, (over, on_port): (TrafficPolicy, bool)) -> TrafficPolicy {
    let Some(base) = base else { return over };
    fn pick<T>(base: Option<T>, over: Option<T>, replace: bool) -> Option<T> {
        if replace { over } else { over.or(base) }
    }
    TrafficPolicy {
        load_balancer: pick(base.load_balancer, over.load_balancer, on_port),
        connection_pool: pick(base.connection_pool, over.connection_pool, on_port),
        outlier_detection: pick(base.outlier_detection, over.outlier_detection, on_port),
        tls: pick(base.tls, over.tls, on_port),
        port_level_settings: Vec::new(),
        tunnel: over.tunnel.or(base.tunnel),
        proxy_protocol: over.proxy_protocol.or(base.proxy_protocol),
        retry_budget: over.retry_budget.or(base.retry_budget),
    }
}

/// What listeners and routes read of the rule of a host: [`super::view::View::rules`] asks this. `port` is the port
/// that a destination says, if it says one.
pub fn rules_of(rules: &DestinationRules, host: &str, port: Option<u16>, subset: &str) -> Rules {
    let Some(rule) = rules.outbound(host) else { return Rules::default() };
    let policy = rule.spec.traffic_policy.as_ref();
    let tcp = policy.and_then(|p| p.connection_pool.as_ref()).and_then(|p| p.tcp.as_ref());
    let duration = |d: Option<IstioDuration>| d.map(|IstioDuration(d)| d);
    let said = if subset.is_empty() { None } else { rule.subset(subset) };
    let said = said.and_then(|s| s.traffic_policy.as_ref());
    // A subset's route asks the subset alone for its tunnel.
    let tunnel = if subset.is_empty() { policy } else { said }.and_then(|p| p.tunnel.as_ref());
    Rules {
        hash: hash_of(policy, said, port).and_then(hash_policy),
        hash_source_ip: hash_source_ip(policy, said),
        idle_timeout: tcp.and_then(|t| duration(t.idle_timeout)),
        max_connection_duration: tcp.and_then(|t| duration(t.max_connection_duration)),
        tunneling: tunnel.map(|t| {
            let host = if t.target_host.contains(':') { format!("[{}]", t.target_host) } else { t.target_host.clone() };
            (format!("{host}:{}", t.target_port), t.protocol == "POST")
        }),
    }
}

/// The hash of an HTTP destination: the subset's port, the subset, the port, the rule.
fn hash_of<'a>(
    policy: Option<&'a TrafficPolicy>,
    subset: Option<&'a TrafficPolicy>,
    port: Option<u16>,
) -> Option<&'a ConsistentHash> {
    let of = |lb: &'a Option<LoadBalancer>| lb.as_ref().and_then(|lb| lb.consistent_hash.as_ref());
    let on_port = |p: Option<&'a TrafficPolicy>| of(&port_policy(p?, port?)?.load_balancer);
    let whole = |p: Option<&'a TrafficPolicy>| of(&p?.load_balancer);
    on_port(subset).or_else(|| whole(subset)).or_else(|| on_port(policy)).or_else(|| whole(policy))
}

fn hash_source_ip(policy: Option<&TrafficPolicy>, subset: Option<&TrafficPolicy>) -> bool {
    let of = |lb: &LoadBalancer| lb.consistent_hash.as_ref().and_then(|h| h.use_source_ip) == Some(true);
    let lb = |p: Option<&TrafficPolicy>| p.and_then(|p| p.load_balancer.as_ref()).map(of);
    lb(subset).or_else(|| lb(policy)).unwrap_or(false)
}

fn hash_policy(hash: &ConsistentHash) -> Option<HashPolicy> {
    let kind = if let Some(name) = &hash.http_header_name {
        HashKind::Header(name.clone())
    } else if let Some(cookie) = &hash.http_cookie {
        let ttl = cookie.ttl.map(|IstioDuration(d)| d);
        HashKind::Cookie { name: cookie.name.clone(), path: cookie.path.clone(), ttl }
    } else if hash.use_source_ip == Some(true) {
        HashKind::SourceIp
    } else if let Some(name) = &hash.http_query_parameter_name {
        HashKind::Query(name.clone())
    } else {
        return None;
    };
    Some(HashPolicy { kind, terminal: false })
}
