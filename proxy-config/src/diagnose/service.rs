//! Services: ports whose names say no protocol, Services that differ between clusters, networks of unknown clusters.

use std::collections::BTreeMap;

use super::{Item, Message, World};
use crate::validate::{At, names};
use crate::yaml::{Data, Node};

const PORT_NAME: &str = "IST0118";
const UNKNOWN_REGISTRY: &str = "IST0126";
const EXTERNAL_PORT_NAME: &str = "IST0150";
const INCONSISTENT: &str = "IST0170";

/// Ports whose protocol must be detected.
pub(super) fn port_names(world: &World<'_>, out: &mut Vec<Message>) {
    const MANAGED: &str = "gateway.istio.io/managed";
    const CONTROLLERS: [&str; 3] =
        ["istio.io-gateway-controller", "istio.io-mesh-controller", "istio.io-eastwest-controller"];
    for item in world.of("Service") {
        let labels = item.labels();
        let control_plane = labels.entries().iter().any(|(k, _)| *k == "istio") || item.label("release") == "istio";
        if control_plane || CONTROLLERS.contains(&item.label(MANAGED)) {
            continue;
        }
        let external = item.spec.get("type").text() == "ExternalName";
        for port in item.spec.get("ports").items() {
            let name = port.get("name");
            if says_protocol(&port) && !(external && name.text() == "tcp") {
                continue;
            }
            let number = port.get("port").text();
            let (code, reason) = if external {
                (EXTERNAL_PORT_NAME, format!("port {number} ({:?}) of an ExternalName says no protocol", name.text()))
            } else {
                (PORT_NAME, format!("port {number} ({:?}) says no protocol by its name or appProtocol", name.text()))
            };
            out.push(item.message(code, &port, reason));
        }
    }
}

/// By its protocol, its `appProtocol`, its name up to a dash, or its number.
fn says_protocol(port: &At<'_>) -> bool {
    if port.get("protocol").text() == "UDP" {
        return true;
    }
    let app = port.get("appProtocol");
    let name = if app.is_said() { app.text() } else { port.get("name").text() };
    let kubernetes = app.is_said() && matches!(name, "kubernetes.io/h2c" | "kubernetes.io/ws" | "kubernetes.io/wss");
    let web = name.get(..8).is_some_and(|start| start.eq_ignore_ascii_case("grpc-web"));
    let word = name.split('-').next().unwrap_or_default();
    let known = matches!(port.get("port").whole_or_zero(), 25 | 53 | 3306 | 27017);
    kubernetes || web || names::is_protocol(word) || known
}

/// Services of one name that are not the same in every cluster.
pub(super) fn clusters(world: &World<'_>, out: &mut Vec<Message>) {
    let mut by_name: BTreeMap<String, Vec<&Item<'_>>> = BTreeMap::new();
    for item in world.of("Service").iter().filter(|i| !i.cluster.is_empty()) {
        by_name.entry(item.full_name()).or_default().push(item);
    }
    for services in by_name.values() {
        let Some((first, rest)) = services.split_first() else { continue };
        let headless = |i: &Item<'_>| i.spec.get("clusterIP").text() == "None";
        let mut why = Vec::new();
        for other in rest {
            why.extend((headless(first) != headless(other)).then_some("clusterIP"));
            why.extend((first.spec.get("type").text() != other.spec.get("type").text()).then_some("type"));
            why.extend((ports(first) != ports(other)).then_some("ports"));
        }
        why.dedup();
        if !why.is_empty() {
            let among: Vec<&str> = services.iter().map(|s| s.cluster).collect();
            let reason = format!("{} differ between the clusters {}", why.join(", "), among.join(", "));
            out.push(first.message(INCONSISTENT, &first.spec, reason));
        }
    }
}

/// Ports by name, each as its fields.
fn ports(item: &Item<'_>) -> Vec<Vec<(String, String)>> {
    let fields = |port: &At<'_>| {
        let mut fields: Vec<(String, String)> =
            port.entries().iter().filter_map(|(k, v)| Some(((*k).to_owned(), scalar(v.node()?)))).collect();
        fields.sort();
        fields
    };
    let list = item.spec.get("ports").items();
    let mut named: Vec<(&str, Vec<(String, String)>)> =
        list.iter().map(|p| (p.get("name").text(), fields(p))).collect();
    named.sort();
    named.into_iter().map(|(_, fields)| fields).collect()
}

fn scalar(node: &Node) -> String {
    match &node.data {
        Data::Scalar { text, plain } => format!("{plain}:{text}"),
        Data::List(_) | Data::Map(_) => String::new(),
    }
}

/// Networks whose endpoints come from clusters that nobody knows.
pub(super) fn networks(world: &World<'_>, out: &mut Vec<Message>) {
    let mut known = vec!["Mock", "Kubernetes", "External"];
    let secrets = world.of("Secret").iter().filter(|s| s.label("istio/multiCluster") == "true");
    let keys = secrets.flat_map(|s| [s.root.get("data"), s.root.get("stringData")]).flat_map(|d| d.entries());
    known.extend(keys.map(|(k, _)| k));
    for item in world.of("MeshNetworks") {
        for (name, network) in item.root.get("networks").entries() {
            for endpoint in network.get("endpoints").items() {
                let registry = endpoint.get("fromRegistry");
                if registry.has_text() && !known.contains(&registry.text()) {
                    let reason =
                        format!("network {name:?} takes endpoints of {:?}, which is no known cluster", registry.text());
                    out.push(item.message(UNKNOWN_REGISTRY, &registry, reason));
                }
            }
        }
    }
}
