//! Outbound clusters of a service: one for each port, and one for each port and subset.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::cluster_policy::Draft;
use super::clusters::{Inputs, bare, metadata_exchange};
use super::destination_rules::{self, Applied};
use super::view::View;
use super::{cluster_tls, endpoints, hosts, peer_auth};
use crate::istio::common::IstioDuration;
use crate::istio::destination_rule::{SimpleLb, TrafficPolicy};
use crate::istio::peer_authentication::Mode;
use crate::model::{Cluster, ClusterKind, DnsOptions, Model, Name};
use crate::registry::{Protocol, Provider, Resolution, Service, ServiceEndpoint, ServicePort};

/// Random delay of DNS queries of clusters, so that clients of a name do not ask in step.
const DNS_JITTER: Duration = Duration::from_millis(100);

/// A service as its clusters see it.
pub(super) struct Site<'a> {
    pub(super) view: &'a View<'a>,
    pub(super) inputs: Inputs<'a>,
    pub(super) service: &'a Service,
    pub(super) rule: Option<&'a Applied>,
    /// Identities that a server of the service may have, sorted.
    pub(super) accounts: Vec<String>,
}

impl Site<'_> {
    /// Whether the rule was written for chosen clients.
    pub(super) fn has_selector(&self) -> bool {
        self.rule.is_some_and(|r| r.spec.workload_selector.is_some())
    }

    fn name(&self, port: &ServicePort, subset: &str) -> String {
        format!("outbound|{}|{subset}|{}", port.number, self.service.hostname)
    }
}

/// Adds the clusters of a service and what EDS would say about them.
pub(super) fn add(view: &View<'_>, inputs: Inputs<'_>, service: &Service, model: &mut Model) {
    if service.resolution == Resolution::Alias {
        return;
    }
    let ports = service.ports.iter().filter(|p| p.protocol != Protocol::Udp);
    let ports: Vec<(&ServicePort, Vec<ServiceEndpoint>)> =
        ports.map(|p| (p, (view.endpoints)(service, p.number))).collect();
    let site = Site {
        view,
        inputs,
        service,
        rule: inputs.rules.outbound(&service.hostname).map(Arc::as_ref),
        accounts: accounts(inputs, service, &ports),
    };
    if service.resolution == Resolution::DynamicDns && hosts::is_wildcard(&service.hostname) {
        ports.iter().filter_map(|(port, _)| dynamic(&site, port)).for_each(|c| put(model, c));
        return;
    }
    for (port, endpoints) in &ports {
        let mut add = |subset: &str, inherited: Option<&ClusterKind>| {
            let cluster = cluster(&site, port, endpoints, subset, inherited)?;
            if let ClusterKind::Eds(name) = &cluster.kind
                && !model.endpoints.contains_key(name)
            {
                let outlier = destination_rules::policy(site.rule, None, port.number, subset).outlier_detection;
                let assignment = endpoints::assignment(&site, port, endpoints, subset, outlier.is_some());
                model.endpoints.insert(Name::clone(name), Arc::new(assignment));
            }
            let kind = cluster.kind.clone();
            put(model, cluster);
            Some(kind)
        };
        let Some(kind) = add("", None) else { continue };
        for subset in site.rule.iter().flat_map(|r| &r.spec.subsets) {
            add(&subset.name, Some(&kind));
        }
    }
}

/// The first cluster of a name stays, as the first service of a host does.
fn put(model: &mut Model, cluster: Cluster) {
    model.clusters.entry(Name::clone(&cluster.name)).or_insert_with(|| Arc::new(cluster));
}

/// SPIFFE ids of all endpoints and what the service adds, under every name of the trust domain.
fn accounts(inputs: Inputs<'_>, service: &Service, ports: &[(&ServicePort, Vec<ServiceEndpoint>)]) -> Vec<String> {
    let endpoints = ports.iter().flat_map(|(_, e)| e).map(|e| e.service_account.as_str());
    let said = service.service_accounts.iter().map(String::as_str);
    let mut out = BTreeSet::new();
    for id in endpoints.chain(said).filter(|id| !id.is_empty()) {
        out.insert(id.to_owned());
        if let Some((_, path)) = id.strip_prefix("spiffe://").and_then(|id| id.split_once('/')) {
            out.extend(inputs.mesh.trust_domain_aliases.iter().map(|domain| format!("spiffe://{domain}/{path}")));
        }
    }
    out.into_iter().collect()
}

/// One cluster; `inherited` is the kind of the port's cluster, for a subset. `None` where DNS would have nothing to
/// resolve.
fn cluster(
    site: &Site<'_>,
    port: &ServicePort,
    endpoints: &[ServiceEndpoint],
    subset: &str,
    inherited: Option<&ClusterKind>,
) -> Option<Cluster> {
    let default = site.inputs.mesh.default_traffic_policy.as_ref();
    let policy = destination_rules::policy(site.rule, default, port.number, subset);
    let own = match site.rule {
        Some(rule) if subset.is_empty() => rule.spec.traffic_policy.as_ref(),
        Some(rule) => rule.subset(subset).and_then(|s| s.traffic_policy.as_ref()),
        None => None,
    };
    let original = inherited == Some(&ClusterKind::OriginalDst) || (!subset.is_empty() && is_passthrough(own));
    let outlier = policy.outlier_detection.is_some();
    let kind = if original { ClusterKind::OriginalDst } else { kind(site, port, endpoints, subset, outlier)? };
    let mut base = bare(site.inputs, &site.name(port, subset), kind);
    base.dns = dns(site, &base.kind);
    base.upstream_port_override = port_override(site.service, port).filter(|_| base.kind == ClusterKind::OriginalDst);
    describe(site, port, subset, &mut base);
    let service = site.service;
    base.istio.services = vec![service_entry(service)];
    let automatic = is_automatic(site, own, endpoints);
    let sni = format!("outbound_.{}_.{subset}_.{}", port.number, service.hostname);
    Some(govern(site, port, base, &policy, (&sni, automatic)))
}

/// Puts a traffic policy into a cluster, in istiod's order: each step reads what those before it decided.
fn govern(
    site: &Site<'_>,
    port: &ServicePort,
    base: Cluster,
    policy: &TrafficPolicy,
    (sni, automatic): (&str, bool),
) -> Cluster {
    let mut draft = Draft::new(base, port.protocol, site.view.mesh.headers.preserve_case);
    draft.upgrade(site.inputs, policy.connection_pool.as_ref(), port.protocol);
    draft.pool(site.inputs, policy.connection_pool.as_ref(), policy.retry_budget);
    draft.outlier(policy.outlier_detection.as_ref(), site.service);
    draft.balance(site.inputs, policy.load_balancer.as_ref(), site.service);
    cluster_tls::apply(&mut draft, site, policy.tls.as_ref(), sni, automatic);
    cluster_tls::proxy_protocol(&mut draft, policy.proxy_protocol);
    draft.cluster.metadata_exchange = Some(metadata_exchange());
    draft.finish()
}

fn kind(
    site: &Site<'_>,
    port: &ServicePort,
    endpoints: &[ServiceEndpoint],
    subset: &str,
    outlier: bool,
) -> Option<ClusterKind> {
    let inline =
        || Some(endpoints::inline(site, port, endpoints, subset, outlier)).filter(|a| !a.localities.is_empty());
    Some(match site.service.resolution {
        Resolution::DnsLb => ClusterKind::StrictDns(inline()?),
        Resolution::DnsRoundRobinLb => ClusterKind::LogicalDns(inline()?),
        Resolution::Passthrough => ClusterKind::OriginalDst,
        Resolution::ClientSideLb | Resolution::Alias | Resolution::DynamicDns => {
            ClusterKind::Eds(Name::from(site.name(port, subset)))
        }
    })
}

fn is_passthrough(policy: Option<&TrafficPolicy>) -> bool {
    policy.and_then(|p| p.load_balancer.as_ref()).is_some_and(|lb| lb.simple == SimpleLb::Passthrough)
}

/// Whether servers of the service take mTLS without being asked: by namespace, and for an original destination by all
/// endpoints.
fn is_automatic(site: &Site<'_>, own: Option<&TrafficPolicy>, endpoints: &[ServiceEndpoint]) -> bool {
    let service = site.service;
    if service.mesh_external || site.inputs.mesh.enable_auto_mtls == Some(false) {
        return false;
    }
    let original = service.resolution == Resolution::Passthrough || is_passthrough(own);
    if original && (endpoints.is_empty() || endpoints.iter().any(|e| !e.mtls)) {
        return false;
    }
    let root = &site.view.mesh.root_namespace;
    peer_auth::namespace_mode(site.inputs.peer_policies, root, &service.namespace) != Mode::Disable
}

/// Host, name and namespace for telemetry; an entry of the world has no name but its host.
pub(super) fn service_entry(service: &Service) -> (String, String, String) {
    let name = if service.provider == Provider::External { &service.hostname } else { &service.name };
    (service.hostname.clone(), name.clone(), service.namespace.clone())
}

fn describe(site: &Site<'_>, port: &ServicePort, subset: &str, cluster: &mut Cluster) {
    let pattern = &site.inputs.mesh.outbound_cluster_stat_name;
    if !pattern.is_empty() {
        cluster.alt_stat_name = format!("{};", stat_name(pattern, site.service, port, subset, 0));
    }
    cluster.istio.config = site.rule.map(Applied::config_path);
    cluster.istio.subset = Some(subset.to_owned()).filter(|s| !s.is_empty());
    cluster.istio.external = site.service.mesh_external && subset.is_empty();
}

/// The mesh's pattern for statistics names of clusters. `target` is zero where there is none.
pub(super) fn stat_name(pattern: &str, service: &Service, port: &ServicePort, subset: &str, target: u16) -> String {
    let kubernetes = service.provider == Provider::Kubernetes;
    let short = format!("{}.{}", service.name, service.namespace);
    let short = if kubernetes { short.as_str() } else { service.hostname.as_str() };
    let name = if kubernetes { &service.name } else { &service.hostname };
    pattern
        .replace("%SERVICE%", short)
        .replace("%SERVICE_NAME%", name)
        .replace("%SERVICE_FQDN%", &service.hostname)
        .replace("%SUBSET_NAME%", subset)
        .replace("%TARGET_PORT%", &target.to_string())
        .replace("%SERVICE_PORT%", &port.number.to_string())
        .replace("%SERVICE_PORT_NAME%", &port.name)
}

/// An entry without resolution may say that connections go to another port of the same address.
fn port_override(service: &Service, port: &ServicePort) -> Option<u16> {
    match port.target {
        crate::registry::TargetPort::Number(target) if service.provider == Provider::External => {
            Some(target).filter(|t| *t != port.number)
        }
        _ => None,
    }
}

fn dns(site: &Site<'_>, kind: &ClusterKind) -> Option<DnsOptions> {
    if !matches!(kind, ClusterKind::StrictDns(_) | ClusterKind::LogicalDns(_)) {
        return None;
    }
    let ips = &site.view.proxy.ips;
    let only_v6 = !ips.is_empty() && ips.iter().all(std::net::IpAddr::is_ipv6);
    let refresh = site.inputs.mesh.dns_refresh_rate.map_or(Duration::from_secs(60), |IstioDuration(d)| d);
    Some(DnsOptions {
        family: if only_v6 { "V6_ONLY" } else { "V4_ONLY" }.to_owned(),
        refresh_rate: Some(refresh),
        respect_ttl: true,
        failure_refresh: None,
        jitter: Some(DNS_JITTER),
    })
}

/// A host that is resolved for each request.
fn dynamic(site: &Site<'_>, port: &ServicePort) -> Option<Cluster> {
    if !matches!(port.protocol, Protocol::Http | Protocol::Tls | Protocol::Grpc | Protocol::Http2) {
        return None;
    }
    let default = site.inputs.mesh.default_traffic_policy.as_ref();
    let policy = destination_rules::policy(site.rule, default, port.number, "");
    let mut base = bare(site.inputs, &site.name(port, ""), ClusterKind::DynamicForwardProxy);
    base.istio.config = site.rule.map(Applied::config_path);
    base.istio.external = site.service.mesh_external;
    Some(govern(site, port, base, &policy, ("", is_automatic(site, None, &[]))))
}
