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

    /// Every rule that some service obeys.
    pub(super) fn all(&self) -> Vec<&Applied> {
        let mut out: Vec<&Applied> = Vec::new();
        for rule in self.by_host.values().flat_map(|c| [&c.outbound, &c.inbound]).flatten() {
            if !out.iter().any(|known| std::ptr::eq(*known, &**rule)) {
                out.push(rule);
            }
        }
        out
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

/// Policy of a service port: the rule's, with the mesh's default pool and outlier detection under it and the subset's
/// blocks over it.
pub(super) fn policy(
    rule: Option<&Applied>,
    default: Option<&TrafficPolicy>,
    port: u16,
    subset: &str,
) -> TrafficPolicy {
    let own = rule.and_then(|r| r.spec.traffic_policy.as_ref()).map(|p| on_port(p, port).0);
    let mut base = own.unwrap_or_default();
    if let Some(default) = default {
        base.connection_pool = base.connection_pool.or_else(|| default.connection_pool.clone());
        base.outlier_detection = base.outlier_detection.or_else(|| default.outlier_detection.clone());
    }
    let said = if subset.is_empty() { None } else { rule.and_then(|r| r.subset(subset)) };
    match said.and_then(|s| s.traffic_policy.as_ref()) {
        Some(over) => merged(base, on_port(over, port)),
        None => base,
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
fn merged(base: TrafficPolicy, (over, on_port): (TrafficPolicy, bool)) -> TrafficPolicy {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::fixture::{Mesh, web};
    use super::*;

    fn specs(yaml: &[(&str, &str, &str)]) -> Vec<DestinationRule> {
        yaml.iter().map(|(.., spec)| serde_saphyr::from_str(spec).expect("valid test YAML")).collect()
    }

    /// The rules that a proxy of namespace `client` obeys for `web.app.svc.cluster.local`.
    fn rules(client: &str, yaml: &[(&str, &str, &str)]) -> DestinationRules {
        let mut mesh = Mesh::new(vec![web()]);
        client.clone_into(&mut mesh.proxy.namespace);
        let specs = specs(yaml);
        let sources: Vec<Source<'_>> =
            yaml.iter().zip(&specs).map(|((namespace, name, _), spec)| Source { namespace, name, spec }).collect();
        DestinationRules::new(&sources, &mesh.services, &mesh.proxy, &mesh.settings, &[])
    }

    const WEB: &str = "web.app.svc.cluster.local";

    fn name(rules: &DestinationRules) -> Option<String> {
        rules.outbound(WEB).map(|r| format!("{}/{}", r.namespace, r.name))
    }

    /// What is tried, the client's namespace, rules by namespace and name, and the rule that must win.
    type Case =
        (&'static str, &'static str, &'static [(&'static str, &'static str, &'static str)], Option<&'static str>);

    const LEVELS: &[Case] = &[
        ("short name", "app", &[("app", "a", "{host: web}")], Some("app/a")),
        ("short name elsewhere", "other", &[("other", "a", "{host: web}")], None),
        (
            "client before service, even by a wildcard",
            "other",
            &[("app", "a", "{host: web}"), ("other", "b", "{host: '*.local'}")],
            Some("other/b"),
        ),
        (
            "service before root",
            "other",
            &[("istio-system", "r", "{host: web.app.svc.cluster.local}"), ("app", "a", "{host: '*'}")],
            Some("app/a"),
        ),
        ("root", "other", &[("istio-system", "r", "{host: '*.local'}")], Some("istio-system/r")),
    ];

    const VISIBILITY: &[Case] = &[
        ("private", "other", &[("app", "a", "{host: web, exportTo: ['.']}")], None),
        (
            "a private rule does not hide the root's",
            "other",
            &[("app", "a", "{host: web, exportTo: ['.']}"), ("istio-system", "r", "{host: '*'}")],
            Some("istio-system/r"),
        ),
        (
            "one exported to others hides it",
            "other",
            &[("app", "a", "{host: web, exportTo: [third]}"), ("istio-system", "r", "{host: '*'}")],
            None,
        ),
        ("exported by name", "other", &[("app", "a", "{host: web, exportTo: [other]}")], Some("app/a")),
        ("not for its own namespace", "app", &[("app", "a", "{host: web, exportTo: [other]}")], None),
        (
            "the most specific of a level",
            "app",
            &[("app", "a", "{host: '*.local'}"), ("app", "b", "{host: '*.app.svc.cluster.local'}")],
            Some("app/b"),
        ),
        (
            "a selector of the proxy wins",
            "app",
            &[("app", "a", "{host: web}"), ("app", "b", "{host: web, workloadSelector: {matchLabels: {app: client}}}")],
            Some("app/b"),
        ),
        (
            "a selector of others does not",
            "app",
            &[("app", "a", "{host: web}"), ("app", "b", "{host: web, workloadSelector: {matchLabels: {app: x}}}")],
            Some("app/a"),
        ),
        (
            "a selector is private",
            "other",
            &[("app", "b", "{host: web, workloadSelector: {matchLabels: {app: client}}}")],
            None,
        ),
        (
            "root as client sees its private ones",
            "istio-system",
            &[("istio-system", "r", "{host: '*', exportTo: ['.']}")],
            Some("istio-system/r"),
        ),
    ];

    #[test]
    fn levels_and_visibility() {
        for (what, client, yaml, expected) in LEVELS.iter().chain(VISIBILITY) {
            assert_eq!(name(&rules(client, yaml)).as_deref(), *expected, "{what}");
        }
    }

    #[test]
    fn rules_of_one_host_are_merged_without_their_policies() {
        let all = rules(
            "app",
            &[
                ("app", "a", "{host: web, subsets: [{name: v1, labels: {version: v1}}]}"),
                (
                    "app",
                    "b",
                    "{host: web.app.svc.cluster.local, trafficPolicy: {tls: {mode: SIMPLE}}, subsets: [{name: v1}, {name: v2}]}",
                ),
                ("app", "c", "{host: web, trafficPolicy: {tls: {mode: DISABLE}, outlierDetection: {}}}"),
            ],
        );
        let rule = all.outbound(WEB).expect("found");
        assert_eq!(rule.name, "a");
        assert_eq!(rule.spec.subsets.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["v1", "v2"]);
        assert_eq!(rule.spec.subsets[0].labels.len(), 1, "the first of a name");
        let policy = rule.spec.traffic_policy.as_ref().expect("adopted");
        assert!(policy.tls.is_some() && policy.outlier_detection.is_none());
    }

    #[test]
    fn selectors_hold_for_calls_alone() {
        let all = rules("app", &[("app", "b", "{host: web, workloadSelector: {matchLabels: {app: client}}}")]);
        assert!(all.outbound(WEB).is_some() && all.inbound(WEB).is_none());
    }

    #[test]
    fn blocks_go_over_blocks_and_ports_over_everything() {
        let all = rules(
            "app",
            &[(
                "app",
                "a",
                "{host: web, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}, outlierDetection: {}, \
                  portLevelSettings: [{port: {number: 80}, tls: {mode: DISABLE}}]}, subsets: [\
                  {name: block, trafficPolicy: {tls: {mode: SIMPLE}}}, \
                  {name: port, trafficPolicy: {portLevelSettings: [{port: {number: 90}, connectionPool: {}}]}}]}",
            )],
        );
        let rule = all.outbound(WEB).map(Arc::as_ref);
        let of = |port, subset| {
            let p = policy(rule, None, port, subset);
            (p.tls.map(|t| t.mode), p.outlier_detection.is_some(), p.connection_pool.is_some())
        };
        use crate::istio::destination_rule::TlsMode::{Disable, IstioMutual, Simple};
        assert_eq!(of(90, ""), (Some(IstioMutual), true, false));
        assert_eq!(of(80, ""), (Some(Disable), false, false), "a port inherits nothing");
        assert_eq!(of(90, "block"), (Some(Simple), true, false));
        assert_eq!(of(80, "block"), (Some(Simple), false, false));
        assert_eq!(of(90, "port"), (None, false, true), "a subset's port leaves nothing of the rule");
        assert_eq!(of(91, "port"), (Some(IstioMutual), true, false));
    }

    #[test]
    fn what_listeners_and_routes_read() {
        let all = rules(
            "app",
            &[(
                "app",
                "a",
                "{host: web, trafficPolicy: {connectionPool: {tcp: {idleTimeout: 30s, maxConnectionDuration: 10m}}, \
                  loadBalancer: {consistentHash: {useSourceIp: true}}, tunnel: {protocol: POST, targetHost: t, targetPort: 9}, \
                  portLevelSettings: [{port: {number: 80}, loadBalancer: {consistentHash: {httpHeaderName: x}}}]}, \
                  subsets: [{name: s, trafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: c, ttl: 0s}}}}}]}",
            )],
        );
        let of = |port, subset| rules_of(&all, WEB, port, subset);
        let whole = of(None, "");
        assert_eq!(whole.idle_timeout, Some(Duration::from_secs(30)));
        assert_eq!(whole.max_connection_duration, Some(Duration::from_secs(600)));
        assert_eq!(whole.tunneling, Some(("t:9".to_owned(), true)));
        assert_eq!((whole.hash.map(|h| h.kind), whole.hash_source_ip), (Some(HashKind::SourceIp), true));
        assert_eq!(of(Some(80), "").hash.map(|h| h.kind), Some(HashKind::Header("x".to_owned())));
        let subset = of(Some(80), "s");
        let cookie = HashKind::Cookie { name: "c".to_owned(), path: String::new(), ttl: Some(Duration::ZERO) };
        assert_eq!(subset.hash.map(|h| h.kind), Some(cookie));
        assert_eq!((subset.hash_source_ip, subset.tunneling), (false, None));
        assert_eq!(rules_of(&all, "unknown", None, ""), Rules::default());
    }
}
