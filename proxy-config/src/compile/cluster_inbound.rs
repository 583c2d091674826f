//! Inbound clusters: from the proxy to its own workload, one for each port of the application.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::cluster_outbound::{service_entry, stat_name};
use super::cluster_policy::Draft;
use super::clusters::{Inputs, bare, magic_source};
use super::destination_rules::on_port;
use super::view::View;
use crate::istio::destination_rule::TrafficPolicy;
use crate::istio::mesh_config::InboundMode;
use crate::model::{
    Address, Cluster, ClusterKind, Endpoint, Endpoints, HealthStatus, Locality, LocalityEndpoints, Name,
};
use crate::registry::ServiceTarget;

/// Clusters of every port that the proxy serves.
pub(super) fn clusters(view: &View<'_>, inputs: Inputs<'_>) -> Vec<Cluster> {
    let mut by_port: BTreeMap<u16, Vec<&ServiceTarget>> = BTreeMap::new();
    // Without capture only what a Sidecar declares comes in.
    for target in view.targets.iter().filter(|t| t.ingress.is_some() || !view.is_uncaptured()) {
        by_port.entry(target.target_port).or_default().push(target);
    }
    by_port.into_iter().map(|(port, targets)| cluster(view, inputs, port, &targets)).collect()
}

/// The oldest service of a port decides how the application is spoken to, and its rule how much.
fn cluster(view: &View<'_>, inputs: Inputs<'_>, port: u16, targets: &[&ServiceTarget]) -> Cluster {
    let first = targets[0];
    let name = format!("inbound|{port}||");
    let localhost = inputs.mesh.inbound_traffic_policy.unwrap_or_default().mode == InboundMode::Localhost;
    let ingress = first.ingress.as_deref();
    let endpoint = match ingress {
        Some(ingress) => ingress.endpoint.clone(),
        None => localhost.then(|| loopback(view, port)),
    };
    let kind = endpoint.as_ref().map_or(ClusterKind::OriginalDst, |e| ClusterKind::Static(only(&name, e)));
    let mut base = bare(inputs, &name, kind);
    // What comes from the loopback address needs no mark to be let through uncaptured.
    let near = matches!(&endpoint, Some(Address::Socket(address)) if address.ip().is_loopback());
    base.source_address = (!near).then(|| magic_source(view));
    let pattern = &inputs.mesh.inbound_cluster_stat_name;
    if !pattern.is_empty() {
        base.alt_stat_name = format!("{};", stat_name(pattern, &first.service, &first.port, "", port));
    }
    let rule = inputs.rules.inbound(&first.service.hostname);
    let said = rule.and_then(|r| r.spec.traffic_policy.as_ref());
    if !first.service.mesh_external && ingress.is_none_or(|i| i.served) {
        base.istio.config = rule.filter(|_| said.is_some()).map(|r| r.config_path());
        for target in targets.iter().filter(|t| t.port.number == first.port.number) {
            let entry = service_entry(&target.service);
            if base.istio.services.iter().all(|known| known.0 != entry.0) {
                base.istio.services.push(entry);
            }
        }
    }
    let TrafficPolicy { connection_pool, retry_budget, .. } =
        said.map(|p| on_port(p, first.port.number).0).unwrap_or_default();
    let default = inputs.mesh.default_traffic_policy.as_ref().and_then(|p| p.connection_pool.as_ref());
    let mut draft = Draft::new(base, first.port.protocol, view.mesh.headers.preserve_case);
    let own = ingress.and_then(|i| i.pool.as_ref()).or(view.mesh.inbound_pool.as_ref());
    draft.pool(inputs, own.or(connection_pool.as_ref()).or(default), retry_budget);
    draft.finish()
}

/// The application at the loopback address.
fn loopback(view: &View<'_>, port: u16) -> Address {
    let only_v6 = !view.proxy.ips.is_empty() && view.proxy.ips.iter().all(IpAddr::is_ipv6);
    let ip = if only_v6 { IpAddr::V6(Ipv6Addr::LOCALHOST) } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
    Address::Socket((ip, port).into())
}

/// A load assignment of one address.
fn only(name: &str, address: &Address) -> Endpoints {
    let endpoint = Endpoint {
        address: address.clone(),
        health: HealthStatus::Unknown,
        weight: 1,
        transport_labels: Default::default(),
        workload: Default::default(),
        hostname: String::new(),
        metadata: Default::default(),
    };
    let locality =
        LocalityEndpoints { locality: Locality::default(), priority: 0, weight: None, endpoints: vec![endpoint] };
    Endpoints { name: Name::from(name), localities: vec![locality], overprovisioning_factor: None }
}
