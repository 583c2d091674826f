//! The proxy, completed from the objects: what it was told, then its WorkloadEntry, its Pod, its WorkloadGroup.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::AutoEntry;
use crate::bootstrap::Node;
use crate::istio::workload_entry::WorkloadEntry;
use crate::istio::workload_group::WorkloadGroup;
use crate::model::Locality;
use crate::objects::{Object, Objects};
use crate::registry::Proxy;
use crate::registry::catalog::Catalog;
use crate::registry::targets::Me;
use crate::registry::workload::{self, Place};

const GROUP: &str = "istio.io/autoRegistrationGroup";
const HEALTH_CHECKS: &str = "proxy.istio.io/health-checks-enabled";

/// Who the proxy is.
pub(super) struct Identity {
    pub(super) proxy: Proxy,
    pub(super) me: Me,
    pub(super) probe: Option<Value>,
    pub(super) auto_entry: Option<AutoEntry>,
}

/// Finds the workload behind `node`; `told_enough` when what it says needs no object to back it.
///
/// # Errors
/// What was tried, when nothing tells the proxy's namespace, address or labels.
pub(super) fn identify(
    node: &Node,
    objects: &Objects,
    catalog: &Catalog<'_>,
    told_enough: bool,
) -> Result<Identity, String> {
    let mut tried = Vec::new();
    if node.namespace.is_empty() {
        return Err("the proxy's namespace is not known: neither the node id nor POD_NAMESPACE tells it".to_owned());
    }
    let ips = addresses(node, catalog, &mut tried)?;
    let group_name = node.text("AUTO_REGISTER_GROUP");
    let group = find_group(objects, &node.namespace, &group_name);
    let me = find(node, ips[0], catalog, group, &mut tried);
    let me = match me {
        Some(me) => me,
        None if told_enough || !node.labels().is_empty() && group_name.is_empty() => told(node),
        None => return Err(format!("nothing tells who the proxy is; tried {}", tried.join(", "))),
    };
    let registered = matches!(&me, Me::Entry(entry) if catalog.entry(&node.namespace, ips[0], &entry.object).is_some());
    let group = group.or_else(|| named_by_entry(objects, &node.namespace, &me));
    let probe = group.and_then(|g| g.spec.probe.clone()).or_else(|| {
        let config = node.metadata.get("PROXY_CONFIG")?;
        config.get("readinessProbe").filter(|p| p.is_object()).cloned()
    });
    let auto_entry = group.filter(|_| !group_name.is_empty()).map(|g| entry_object(node, ips[0], g));
    let proxy = proxy(node, ips, &me, objects, !registered && matches!(me, Me::Entry(_)));
    Ok(Identity { proxy, me, probe, auto_entry })
}

fn addresses(node: &Node, catalog: &Catalog<'_>, tried: &mut Vec<String>) -> Result<Vec<IpAddr>, String> {
    if !node.ips.is_empty() {
        return Ok(node.ips.clone());
    }
    tried.push("INSTANCE_IP, ISTIO_SVC_IP, INSTANCE_IPS and the node id for an address".to_owned());
    tried.push(format!("Pod {}/{}", node.namespace, node.name));
    let pod = catalog.pod_named(&node.namespace, &node.name);
    let ips: Vec<IpAddr> = pod.iter().flat_map(|p| &p.addresses).filter_map(|a| a.parse().ok()).collect();
    if ips.is_empty() {
        return Err(format!("nothing tells the proxy's address; tried {}", tried.join(", ")));
    }
    Ok(ips)
}

fn find(
    node: &Node,
    ip: IpAddr,
    catalog: &Catalog<'_>,
    group: Option<&Object<WorkloadGroup>>,
    tried: &mut Vec<String>,
) -> Option<Me> {
    let namespace = node.namespace.as_str();
    tried.push(format!("a WorkloadEntry with address {ip} in namespace {namespace}"));
    if let Some(entry) = catalog.entry(namespace, ip, &node.name) {
        return Some(Me::Entry(entry.clone()));
    }
    tried.push(format!("a Pod with address {ip} in namespace {namespace}"));
    if let Some(pod) = catalog.pod(namespace, ip) {
        return Some(Me::Pod(pod.clone()));
    }
    let name = node.text("AUTO_REGISTER_GROUP");
    tried.push(if name.is_empty() {
        "ISTIO_META_AUTO_REGISTER_GROUP".to_owned()
    } else {
        format!("WorkloadGroup {namespace}/{name}")
    });
    let group = group?;
    let spec = entry_of(node, ip, group);
    Some(Me::Entry(workload::from_entry(&spec, namespace, &entry_name(node, ip, &group.meta.name))))
}

fn find_group<'o>(objects: &'o Objects, namespace: &str, name: &str) -> Option<&'o Object<WorkloadGroup>> {
    objects.workload_groups.iter().find(|g| g.meta.namespace == namespace && g.meta.name == name)
}

/// The group that an entry of the proxy says it came from.
fn named_by_entry<'o>(objects: &'o Objects, namespace: &str, me: &Me) -> Option<&'o Object<WorkloadGroup>> {
    let Me::Entry(entry) = me else { return None };
    let object =
        objects.workload_entries.iter().find(|e| e.meta.namespace == namespace && e.meta.name == entry.object)?;
    find_group(objects, namespace, object.meta.annotations.get(GROUP)?)
}

/// What the proxy says of itself, for a workload that no object describes.
fn told(node: &Node) -> Me {
    let ports: Vec<Value> = serde_json::from_str(&node.text("POD_PORTS")).unwrap_or_default();
    let port = |p: &Value| {
        let number = p.get("containerPort")?.as_u64().and_then(|n| u16::try_from(n).ok())?;
        let tcp = p.get("protocol").and_then(Value::as_str).is_none_or(|p| p == "TCP" || p.is_empty());
        tcp.then(|| Some((p.get("name")?.as_str()?.to_owned(), number)))?
    };
    Me::Told(node.labels(), ports.iter().filter_map(port).collect())
}

fn proxy(node: &Node, ips: Vec<IpAddr>, me: &Me, objects: &Objects, auto_registered: bool) -> Proxy {
    let workload = match me {
        Me::Entry(workload) | Me::Pod(workload) => Some(workload),
        Me::Told(..) => None,
    };
    let mut labels = workload.map_or_else(|| node.labels(), |w| w.labels.clone());
    labels.extend(node.static_labels());
    let locality = if node.locality == Locality::default() {
        workload.map(|w| w.locality.clone()).unwrap_or_default()
    } else {
        node.locality.clone()
    };
    let or =
        |said: String, found: Option<&String>| if said.is_empty() { found.cloned().unwrap_or_default() } else { said };
    let network = or(node.text("NETWORK"), workload.map(|w| &w.network));
    let node_name = or(node.text("NODE_NAME"), workload.map(|w| &w.node_name));
    let cluster_id = node.text("CLUSTER_ID");
    let place = Place { locality: &locality, network: &network, node: &node_name, cluster: &cluster_id };
    let domain = format!("{}.svc.cluster.local", node.namespace);
    let _ = objects;
    Proxy {
        name: node.name.clone(),
        namespace: node.namespace.clone(),
        ips,
        labels: place.augment(&labels),
        service_account: or(node.text("SERVICE_ACCOUNT"), workload.map(|w| &w.service_account)),
        dns_domain: if node.dns_domain.is_empty() { domain } else { node.dns_domain.clone() },
        locality,
        network,
        cluster_id,
        node_name,
        metadata: node.metadata.clone(),
        auto_registered,
    }
}

/// The entry's `spec`, as registration makes it from the group.
fn entry_of(node: &Node, ip: IpAddr, group: &Object<WorkloadGroup>) -> WorkloadEntry {
    let template = &group.spec.template;
    let mut labels = template.labels.clone();
    labels.extend(group.spec.metadata.labels.clone());
    labels.extend(node.labels());
    let locality = [&node.locality.region, &node.locality.zone, &node.locality.sub_zone];
    let locality = locality.map(String::as_str).join("/").trim_end_matches('/').to_owned();
    let or = |said: String, template: &String| if said.is_empty() { template.clone() } else { said };
    WorkloadEntry {
        address: ip.to_string(),
        ports: template.ports.clone(),
        labels,
        network: or(node.text("NETWORK"), &template.network),
        locality: or(locality, &template.locality),
        weight: template.weight,
        service_account: template.service_account.clone(),
    }
}

/// `GROUP-IP[-NETWORK]`, its last 253 characters, colons made dashes.
fn entry_name(node: &Node, ip: IpAddr, group: &str) -> String {
    let network = node.text("NETWORK");
    let mut name = format!("{group}-{ip}");
    if !network.is_empty() {
        name.push('-');
        name.push_str(&network);
    }
    let name = name.replace(':', "-");
    let start = name.len().saturating_sub(253);
    name.get(start..).unwrap_or(&name).trim_start_matches(['-', '.']).to_owned()
}

/// The whole WorkloadEntry without its status.
fn entry_object(node: &Node, ip: IpAddr, group: &Object<WorkloadGroup>) -> AutoEntry {
    let entry = entry_of(node, ip, group);
    let name = entry_name(node, ip, &group.meta.name);
    let mut annotations: BTreeMap<String, String> = group.spec.metadata.annotations.clone();
    annotations.insert(GROUP.to_owned(), group.meta.name.clone());
    annotations.insert(HEALTH_CHECKS.to_owned(), "true".to_owned());
    let mut spec = Map::new();
    spec.insert("address".to_owned(), json!(entry.address));
    let mut set = |field: &str, value: Value, said: bool| {
        if said {
            spec.insert(field.to_owned(), value);
        }
    };
    set("labels", json!(entry.labels), !entry.labels.is_empty());
    set("ports", json!(entry.ports), !entry.ports.is_empty());
    set("network", json!(entry.network), !entry.network.is_empty());
    set("locality", json!(entry.locality), !entry.locality.is_empty());
    set("weight", json!(entry.weight), entry.weight > 0);
    set("serviceAccount", json!(entry.service_account), !entry.service_account.is_empty());
    AutoEntry {
        namespace: node.namespace.clone(),
        name: name.clone(),
        object: json!({
            "apiVersion": "networking.istio.io/v1",
            "kind": "WorkloadEntry",
            "metadata": {
                "name": name,
                "namespace": node.namespace,
                "labels": entry.labels,
                "annotations": annotations,
            },
            "spec": spec,
        }),
    }
}
