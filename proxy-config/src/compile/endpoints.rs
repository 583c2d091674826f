//! Load assignments: endpoints by locality, as one proxy should use them.

use std::collections::BTreeMap;

use super::cluster_outbound::Site;
use super::locality;
use super::{destination_rules, networks, peer_auth};
use crate::istio::destination_rule::{TlsMode, TrafficPolicy};
use crate::istio::peer_authentication::Mode;
use crate::model::{Address, Endpoint, Endpoints, HealthStatus, Locality, LocalityEndpoints, Name};
use crate::registry::{ServiceEndpoint, ServicePort};

/// What EDS says about a cluster: a host name is no address and is left out.
pub(super) fn assignment(
    site: &Site<'_>,
    port: &ServicePort,
    all: &[ServiceEndpoint],
    subset: &str,
    outlier: bool,
) -> Endpoints {
    let resolved = |e: &&ServiceEndpoint| !matches!(e.address, Address::Host(..));
    build(site, port, all.iter().filter(resolved), subset, outlier)
}

/// What stands in a DNS cluster itself.
pub(super) fn inline(
    site: &Site<'_>,
    port: &ServicePort,
    all: &[ServiceEndpoint],
    subset: &str,
    outlier: bool,
) -> Endpoints {
    build(site, port, all.iter(), subset, outlier)
}

fn build<'e>(
    site: &Site<'_>,
    port: &ServicePort,
    all: impl Iterator<Item = &'e ServiceEndpoint>,
    subset: &str,
    outlier: bool,
) -> Endpoints {
    let policy = destination_rules::policy(site.rule, None, port.number, subset);
    let unhealthy = takes_unhealthy(site, &policy);
    let labels = site.rule.and_then(|r| r.subset(subset)).map(|s| &s.labels).filter(|_| !subset.is_empty());
    let wanted = |e: &&ServiceEndpoint| {
        (!site.service.node_local || e.node_name == site.view.proxy.node_name)
            && labels.is_none_or(|labels| labels.iter().all(|(k, v)| e.labels.get(k) == Some(v)))
            && match e.health {
                HealthStatus::Unhealthy => unhealthy,
                HealthStatus::Draining => false,
                HealthStatus::Unknown | HealthStatus::Healthy | HealthStatus::Degraded => true,
            }
    };
    let mode = tls_mode(site, port.number, subset);
    let mut by_locality: BTreeMap<String, Vec<&ServiceEndpoint>> = BTreeMap::new();
    for endpoint in all.filter(wanted) {
        by_locality.entry(label(&endpoint.locality)).or_default().push(endpoint);
    }
    let groups = by_locality.into_values().map(|members| {
        let mut group = networks::reachable(site, &members, |e| one(site, e, mode));
        group.locality = members[0].locality.clone();
        group.weigh();
        group
    });
    let effective = locality::effective(site.inputs.mesh, policy.load_balancer.as_ref(), site.service);
    let groups = locality::apply(groups.collect(), effective.as_ref(), site.view.proxy, outlier);
    let localities = groups.into_iter().map(|g| LocalityEndpoints {
        locality: g.locality,
        priority: g.priority,
        weight: g.weight,
        endpoints: g.endpoints.into_iter().map(|(e, _)| e).collect(),
    });
    Endpoints {
        name: Name::from(format!("outbound|{}|{subset}|{}", port.number, site.service.hostname)),
        localities: localities.collect(),
        overprovisioning_factor: None,
    }
}

/// Panic would use unhealthy endpoints; where a rule turns it on they are not even named.
fn takes_unhealthy(site: &Site<'_>, policy: &TrafficPolicy) -> bool {
    locality::is_spread(site.service) || policy.outlier_detection.as_ref().is_none_or(|o| o.min_health_percent == 0)
}

/// `region/zone/subzone` without what is absent at the end; localities are ordered by it.
fn label(locality: &Locality) -> String {
    let Locality { region, zone, sub_zone } = locality;
    match (zone.is_empty(), sub_zone.is_empty()) {
        (true, true) => region.clone(),
        (false, true) => format!("{region}/{zone}"),
        (_, false) => format!("{region}/{zone}/{sub_zone}"),
    }
}

/// TLS mode that the rule says for the endpoints of a cluster; a port that says none has the rule's.
fn tls_mode(site: &Site<'_>, port: u16, subset: &str) -> Option<TlsMode> {
    let rule = site.rule?;
    let of = |policy: Option<&TrafficPolicy>| {
        let policy = policy?;
        let on_port = |p: &&crate::istio::destination_rule::PortPolicy| {
            p.port.is_some_and(|s| s.number == u32::from(port)) && p.tls.is_some()
        };
        let own = policy.port_level_settings.iter().find(on_port).and_then(|p| p.tls.as_ref());
        own.or(policy.tls.as_ref()).map(|t| t.mode)
    };
    let whole = || of(rule.spec.traffic_policy.as_ref());
    if subset.is_empty() {
        return whole();
    }
    let subset = rule.subset(subset)?;
    of(subset.traffic_policy.as_ref()).or_else(whole)
}

/// Whether the proxy may speak mTLS to an endpoint.
fn speaks_mtls(site: &Site<'_>, endpoint: &ServiceEndpoint, said: Option<TlsMode>) -> bool {
    if !endpoint.mtls {
        return false;
    }
    if let Some(mode) = said {
        return mode == TlsMode::IstioMutual;
    }
    let root = &site.view.mesh.root_namespace;
    let mode = peer_auth::effective(site.inputs.peer_policies, root, &endpoint.namespace, &endpoint.labels);
    mode.port(port_of(&endpoint.address)) != Mode::Disable
}

fn port_of(address: &Address) -> u16 {
    match address {
        Address::Socket(socket) => socket.port(),
        Address::Host(_, port) => *port,
        Address::Pipe(_) | Address::Internal(..) => 0,
    }
}

fn one(site: &Site<'_>, endpoint: &ServiceEndpoint, said: Option<TlsMode>) -> Endpoint {
    let mtls = speaks_mtls(site, endpoint, said);
    Endpoint {
        address: endpoint.address.clone(),
        health: endpoint.health,
        weight: endpoint.weight.max(1),
        transport_labels: mtls.then(|| ("tlsMode".to_owned(), "istio".to_owned())).into_iter().collect(),
        workload: workload(endpoint, &site.view.proxy.cluster_id).into(),
        hostname: String::new(),
        metadata: Default::default(),
    }
}

/// `name;namespace;canonical service;revision;cluster`.
fn workload(endpoint: &ServiceEndpoint, cluster: &str) -> String {
    let cluster = endpoint.labels.get("topology.istio.io/cluster").map_or(cluster, String::as_str);
    let label = |names: [&str; 3]| names.into_iter().find_map(|n| endpoint.labels.get(n)).map(String::as_str);
    let service = label(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let revision = label(["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    let revision = revision.filter(|r| *r != "latest").unwrap_or_default();
    let name = &endpoint.workload;
    format!("{name};{};{};{revision};{cluster}", endpoint.namespace, service.unwrap_or(name))
}
