//! Workloads, wherever they run: a Pod and a WorkloadEntry in one shape.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::bootstrap::parse_locality;
use crate::istio::mesh_networks::MeshNetworks;
use crate::istio::workload_entry::WorkloadEntry;
use crate::k8s;
use crate::model::Locality;
use crate::objects::{Object, Objects};

const TLS_MODE: &str = "security.istio.io/tlsMode";
const NETWORK: &str = "topology.istio.io/network";
const CLUSTER: &str = "topology.istio.io/cluster";

/// Where ports of a workload are looked up by name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ports {
    /// A pod's container ports, asked for by the name in `targetPort`.
    Pod(BTreeMap<String, u16>),
    /// A WorkloadEntry's map, asked for by the service port's name first.
    Entry(BTreeMap<String, u16>),
}

/// One workload.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Workload {
    /// Name that telemetry shows: of the Deployment where there is one.
    pub(crate) name: String,
    /// Name of the object.
    pub(crate) object: String,
    pub(crate) namespace: String,
    /// Addresses as written: IPs, host names or `unix://` paths; the main one first.
    pub(crate) addresses: Vec<String>,
    /// Its own labels.
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) service_account: String,
    pub(crate) locality: Locality,
    pub(crate) network: String,
    pub(crate) node_name: String,
    pub(crate) mtls: bool,
    pub(crate) weight: u32,
    /// Health of an entry, readiness of a pod.
    pub(crate) healthy: bool,
    pub(crate) ports: Ports,
    pub(crate) hostname: String,
    pub(crate) subdomain: String,
}

impl Workload {
    /// Whether one of its addresses is this one.
    pub(crate) fn has(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|a| a.parse() == Ok(ip))
    }

    /// Its labels with those that say where it is.
    pub(crate) fn all_labels(&self, cluster: &str) -> BTreeMap<String, String> {
        let place = Place { locality: &self.locality, network: &self.network, node: &self.node_name, cluster };
        place.augment(&self.labels)
    }
}

/// Where something is, as labels.
pub(crate) struct Place<'a> {
    pub(crate) locality: &'a Locality,
    pub(crate) network: &'a str,
    pub(crate) node: &'a str,
    pub(crate) cluster: &'a str,
}

impl Place<'_> {
    /// `labels` with the topology labels added; what is unknown is left as it was.
    pub(crate) fn augment(&self, labels: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut out = labels.clone();
        let synthetic = [
            ("topology.kubernetes.io/region", self.locality.region.as_str()),
            ("topology.kubernetes.io/zone", self.locality.zone.as_str()),
            ("topology.istio.io/subzone", self.locality.sub_zone.as_str()),
            (CLUSTER, self.cluster),
            (NETWORK, self.network),
            ("kubernetes.io/hostname", self.node),
        ];
        for (name, value) in synthetic.into_iter().filter(|(_, v)| !v.is_empty()) {
            out.insert(name.to_owned(), value.to_owned());
        }
        out
    }
}

/// Pods that have an address and have not ended.
pub(crate) fn pods(objects: &Objects, cluster: &str) -> Vec<Workload> {
    let running = |p: &&Object<k8s::Pod>| !matches!(p.spec.status.phase.as_str(), "Succeeded" | "Failed");
    objects.pods.iter().filter(running).map(|p| pod(p, objects, cluster)).filter(|w| !w.addresses.is_empty()).collect()
}

fn pod(pod: &Object<k8s::Pod>, objects: &Objects, cluster: &str) -> Workload {
    let labels = pod.meta.labels.clone();
    let locality = labels
        .get("istio-locality")
        .map(|l| parse_locality(&l.replace('.', "/")))
        .unwrap_or_else(|| node_locality(objects, &pod.spec.spec.node_name));
    let addresses: Vec<String> = pod.spec.ips().map(str::to_owned).collect();
    let ports = pod.spec.spec.containers.iter().flat_map(|c| &c.ports);
    let account = pod.spec.spec.service_account_name.as_str();
    let mut workload = Workload {
        name: workload_name(&pod.meta),
        object: pod.meta.name.clone(),
        namespace: pod.meta.namespace.clone(),
        mtls: labels.get(TLS_MODE).is_some_and(|m| m == "istio"),
        labels,
        service_account: if account.is_empty() { "default" } else { account }.to_owned(),
        locality,
        network: String::new(),
        addresses,
        node_name: pod.spec.spec.node_name.clone(),
        weight: 1,
        healthy: pod.spec.is_ready(),
        ports: Ports::Pod(
            ports
                .filter(|p| matches!(p.protocol.as_str(), "" | "TCP"))
                .map(|p| (p.name.clone(), p.container_port))
                .collect(),
        ),
        hostname: pod.spec.spec.hostname.clone(),
        subdomain: pod.spec.spec.subdomain.clone(),
    };
    find_network(&mut workload, objects, cluster);
    workload
}

/// Fills in the network of a workload that says none: its label's, the mesh-wide namespace's, its address's.
pub(crate) fn find_network(workload: &mut Workload, objects: &Objects, cluster: &str) {
    if !workload.network.is_empty() {
        return;
    }
    let root = objects.namespaces.iter().find(|n| n.meta.name == root_namespace(objects));
    let label = workload.labels.get(NETWORK).or_else(|| root.and_then(|n| n.meta.labels.get(NETWORK)));
    workload.network =
        label.cloned().unwrap_or_else(|| network_of(&objects.networks, workload.addresses.first(), cluster));
}

/// A Deployment's name is its ReplicaSet's without the template's hash; a pod without owner stands for itself.
fn workload_name(meta: &k8s::Meta) -> String {
    let Some(owner) = meta.owner_references.iter().find(|o| o.controller) else { return meta.name.clone() };
    let hash = meta.labels.get("pod-template-hash").map(|h| format!("-{h}"));
    let deployment = hash.and_then(|h| owner.name.strip_suffix(&h).map(str::to_owned));
    deployment.filter(|_| owner.kind == "ReplicaSet").unwrap_or_else(|| owner.name.clone())
}

/// WorkloadEntries.
pub(crate) fn entries(objects: &Objects, cluster: &str) -> Vec<Workload> {
    let entry = |e: &Object<crate::objects::Entry>| {
        let mut labels = e.spec.spec.labels.clone();
        labels.extend(e.meta.labels.clone());
        let spec = WorkloadEntry { labels, ..e.spec.spec.clone() };
        let mut workload = from_entry(&spec, &e.meta.namespace, &e.meta.name);
        workload.healthy = e.spec.healthy;
        if let Some(group) = e.meta.annotations.get("istio.io/autoRegistrationGroup") {
            workload.name.clone_from(group);
        }
        find_network(&mut workload, objects, cluster);
        workload
    };
    objects.workload_entries.iter().map(entry).collect()
}

/// A workload as an entry describes it.
pub(crate) fn from_entry(spec: &WorkloadEntry, namespace: &str, name: &str) -> Workload {
    let locality = match spec.labels.get("istio-locality") {
        Some(label) if spec.locality.is_empty() => parse_locality(&label.replace('.', "/")),
        _ => parse_locality(&spec.locality),
    };
    let mtls = match spec.labels.get(TLS_MODE) {
        Some(mode) => mode == "istio",
        None => !spec.service_account.is_empty(),
    };
    Workload {
        name: name.to_owned(),
        object: name.to_owned(),
        namespace: namespace.to_owned(),
        addresses: vec![spec.address.clone()],
        labels: spec.labels.clone(),
        service_account: spec.service_account.clone(),
        locality,
        network: spec.network.clone(),
        node_name: String::new(),
        mtls,
        weight: spec.weight.max(1),
        healthy: true,
        ports: Ports::Entry(spec.ports.clone()),
        hostname: String::new(),
        subdomain: String::new(),
    }
}

/// Locality of a Kubernetes node by its labels.
pub(crate) fn node_locality(objects: &Objects, name: &str) -> Locality {
    let Some(node) = objects.nodes.iter().find(|n| n.meta.name == name) else { return Locality::default() };
    let label = |names: [&str; 2]| names.iter().find_map(|n| node.meta.labels.get(*n)).cloned().unwrap_or_default();
    Locality {
        region: label(["topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region"]),
        zone: label(["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"]),
        sub_zone: label(["topology.istio.io/subzone", "topology.istio.io/subzone"]),
    }
}

/// Network by address, else by cluster.
pub(crate) fn network_of(networks: &MeshNetworks, address: Option<&String>, cluster: &str) -> String {
    let ip: Option<IpAddr> = address.and_then(|a| a.parse().ok());
    let holds = |cidr: &str| {
        let net: Option<ipnet::IpNet> = cidr.parse().ok();
        net.zip(ip).is_some_and(|(net, ip)| net.contains(&ip))
    };
    let by_address = networks.networks.iter().find(|(_, n)| n.endpoints.iter().any(|e| holds(&e.from_cidr)));
    let by_cluster = || {
        let here = |n: &crate::istio::mesh_networks::Network| {
            n.endpoints.iter().any(|e| !e.from_registry.is_empty() && e.from_registry == cluster)
        };
        networks.networks.iter().find(|(_, n)| here(n))
    };
    by_address.or_else(by_cluster).map(|(name, _)| name.clone()).unwrap_or_default()
}

/// Namespace of mesh-wide objects.
pub(crate) fn root_namespace(objects: &Objects) -> &str {
    let said = objects.mesh.root_namespace.as_str();
    if said.is_empty() { "istio-system" } else { said }
}
