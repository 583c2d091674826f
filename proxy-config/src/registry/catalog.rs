//! The registry of one mesh as loaded: services, workloads, and which of them serve what.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::workload::{self, Place, Ports, Workload};
use super::{Provider, Resolution, Service, ServiceEndpoint, ServicePort, TargetPort, services, spiffe_id};
use crate::istio::service_entry::{self, ServiceEntry};
use crate::istio::workload_entry::WorkloadEntry;
use crate::k8s::{EndpointSlice, SliceEndpoint};
use crate::model::{Address, HealthStatus};
use crate::objects::{Object, Objects};

/// Domain of Kubernetes Services.
pub(crate) const DOMAIN: &str = "cluster.local";

/// Services and workloads, ready to be asked.
pub(crate) struct Catalog<'o> {
    objects: &'o Objects,
    trust_domain: String,
    cluster: String,
    /// Every service, oldest first.
    pub(crate) services: Vec<Arc<Service>>,
    pods: Vec<Workload>,
    entries: Vec<Workload>,
    slices: BTreeMap<(&'o str, &'o str), Vec<&'o EndpointSlice>>,
    by_name: BTreeMap<(String, String), usize>,
    by_address: BTreeMap<String, usize>,
}

impl<'o> Catalog<'o> {
    /// `cluster` names this Kubernetes cluster in labels and metadata.
    /// `allocate` gives addresses to ServiceEntries that have none.
    pub(crate) fn new(objects: &'o Objects, trust_domain: &str, cluster: &str, allocate: bool) -> Self {
        let pods = workload::pods(objects, cluster);
        let mut slices: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
        for slice in &objects.slices {
            if let Some(name) = slice.meta.labels.get("kubernetes.io/service-name") {
                slices.entry((slice.meta.namespace.as_str(), name.as_str())).or_default().push(&slice.spec);
            }
        }
        let by_name = pods.iter().enumerate().map(|(i, p)| ((p.namespace.clone(), p.object.clone()), i)).collect();
        let by_address =
            pods.iter().enumerate().flat_map(|(i, p)| p.addresses.iter().map(move |a| (a.clone(), i))).collect();
        Self {
            services: services::services(objects, DOMAIN, trust_domain, allocate),
            entries: workload::entries(objects, cluster),
            trust_domain: trust_domain.to_owned(),
            cluster: cluster.to_owned(),
            objects,
            pods,
            slices,
            by_name,
            by_address,
        }
    }

    /// The pod with this namespace and address.
    pub(crate) fn pod(&self, namespace: &str, ip: IpAddr) -> Option<&Workload> {
        self.pods.iter().find(|p| p.namespace == namespace && p.has(ip))
    }

    /// The pod with this namespace and name.
    pub(crate) fn pod_named(&self, namespace: &str, name: &str) -> Option<&Workload> {
        self.by_name.get(&(namespace.to_owned(), name.to_owned())).map(|i| &self.pods[*i])
    }

    /// The entry with this namespace and address; of several the one that bears the proxy's name, else the first.
    pub(crate) fn entry(&self, namespace: &str, ip: IpAddr, name: &str) -> Option<&Workload> {
        let mine = || self.entries.iter().filter(|e| e.namespace == namespace && e.has(ip));
        mine().find(|e| e.object == name).or_else(|| mine().next())
    }

    /// Every WorkloadEntry.
    pub(crate) fn entries(&self) -> &[Workload] {
        &self.entries
    }

    /// Endpoints of a service port, whatever their health.
    pub(crate) fn endpoints(&self, service: &Service, port: u16) -> Vec<ServiceEndpoint> {
        let Some(port) = service.ports.iter().find(|p| p.number == port) else { return Vec::new() };
        match service.provider {
            Provider::Kubernetes => self.kubernetes(service, port),
            Provider::External => self.external(service, port),
        }
    }

    fn kubernetes(&self, service: &Service, port: &ServicePort) -> Vec<ServiceEndpoint> {
        if service.resolution == Resolution::Alias {
            return Vec::new();
        }
        let mut out = Vec::new();
        match self.slices.get(&(service.namespace.as_str(), service.name.as_str())) {
            Some(slices) => slices.iter().for_each(|s| self.of_slice(service, port, s, &mut out)),
            None => self.of_pods(service, port, &mut out),
        }
        // Entries of one namespace join its Services, headless ones excepted.
        if !service.selector.is_empty() && !service.headless {
            for entry in self.entries.iter().filter(|e| e.namespace == service.namespace) {
                let known = !entry.labels.is_empty() && entry.addresses[0].parse::<IpAddr>().is_ok();
                if known
                    && selects(&service.selector, &entry.labels)
                    && let Some(number) = target_port(port, &entry.ports)
                {
                    out.push(self.endpoint(entry, &entry.addresses[0], number, port, of_workload(entry)));
                }
            }
        }
        out
    }

    fn of_slice(&self, service: &Service, port: &ServicePort, slice: &EndpointSlice, out: &mut Vec<ServiceEndpoint>) {
        if slice.address_type == "FQDN" {
            return;
        }
        let numbers = slice.ports.iter().filter(|p| p.name == port.name && matches!(p.protocol.as_str(), "" | "TCP"));
        for number in numbers.filter_map(|p| p.port) {
            for endpoint in &slice.endpoints {
                let ready = endpoint.conditions.ready != Some(false) || service.publish_not_ready;
                for address in &endpoint.addresses {
                    match self.pod_of(endpoint, address) {
                        Behind::Pod(pod) => {
                            let mut made = self.endpoint(pod, address, number, port, health(ready));
                            if pod.subdomain.is_empty() {
                                made.hostname.clone_from(&endpoint.hostname);
                            }
                            out.push(made);
                        }
                        Behind::Nothing => out.push(self.bare(endpoint, address, number, port, health(ready))),
                        Behind::Missing => {}
                    }
                }
            }
        }
    }

    /// A pod that the slice names must exist; an address alone may be anybody's.
    fn pod_of(&self, endpoint: &SliceEndpoint, address: &str) -> Behind<'_> {
        if let Some(target) = endpoint.target_ref.as_ref().filter(|t| t.kind == "Pod") {
            return self.pod_named(&target.namespace, &target.name).map_or(Behind::Missing, Behind::Pod);
        }
        self.by_address.get(address).map_or(Behind::Nothing, |i| Behind::Pod(&self.pods[*i]))
    }

    /// Without slices the selector finds the pods, as Kubernetes would have done.
    fn of_pods(&self, service: &Service, port: &ServicePort, out: &mut Vec<ServiceEndpoint>) {
        if service.selector.is_empty() {
            return;
        }
        for pod in self.pods.iter().filter(|p| p.namespace == service.namespace) {
            if selects(&service.selector, &pod.labels)
                && let Some(number) = target_port(port, &pod.ports)
            {
                let ready = pod.healthy || service.publish_not_ready;
                out.push(self.endpoint(pod, &pod.addresses[0], number, port, health(ready)));
            }
        }
    }

    fn external(&self, service: &Service, port: &ServicePort) -> Vec<ServiceEndpoint> {
        let mine = |e: &&Object<ServiceEntry>| {
            e.meta.namespace == service.namespace && e.spec.hosts.contains(&service.hostname)
        };
        let mut out = Vec::new();
        for entry in self.objects.service_entries.iter().filter(mine) {
            // istiod makes one service per address, and each of them brings its endpoints along.
            for _ in 0..entry.spec.addresses.len().max(1) {
                self.of_entry(service, port, entry, &mut out);
            }
        }
        out
    }

    fn of_entry(
        &self,
        service: &Service,
        port: &ServicePort,
        entry: &Object<ServiceEntry>,
        out: &mut Vec<ServiceEndpoint>,
    ) {
        let spec = &entry.spec;
        let Some(said) = spec.ports.iter().find(|p| p.number == port.number) else { return };
        let number = if said.target_port == 0 { said.number } else { said.target_port };
        if let Some(selector) = &spec.workload_selector {
            for workload in self.entries.iter().chain(&self.pods).filter(|w| w.namespace == service.namespace) {
                if selector.selects(&workload.labels) {
                    let number = workload.named_port(&port.name).unwrap_or(number);
                    let health = of_workload(workload);
                    out.push(self.endpoint(workload, &workload.addresses[0], number, port, health));
                }
            }
            return;
        }
        // A DNS service without endpoints is its own endpoint, in plaintext.
        if spec.endpoints.is_empty() && is_dns(spec.resolution) {
            let mut itself = workload::from_entry(&WorkloadEntry::default(), &entry.meta.namespace, &entry.meta.name);
            itself.addresses = vec![service.hostname.clone()];
            out.push(self.endpoint(&itself, &itself.addresses[0], number, port, HealthStatus::Unknown));
        }
        for (index, endpoint) in spec.endpoints.iter().enumerate() {
            let name = format!("{}-{index}", entry.meta.name);
            let mut workload = workload::from_entry(endpoint, &entry.meta.namespace, &name);
            workload::find_network(&mut workload, self.objects, &self.cluster);
            let number = workload.named_port(&port.name).unwrap_or(number);
            out.push(self.endpoint(&workload, &workload.addresses[0], number, port, HealthStatus::Unknown));
        }
    }

    fn endpoint(
        &self,
        workload: &Workload,
        address: &str,
        number: u16,
        port: &ServicePort,
        health: HealthStatus,
    ) -> ServiceEndpoint {
        let account = workload.service_account.as_str();
        ServiceEndpoint {
            address: to_address(address, number),
            service_port: port.name.clone(),
            labels: workload.all_labels(&self.cluster),
            service_account: if account.is_empty() {
                String::new()
            } else {
                spiffe_id(&self.trust_domain, &workload.namespace, account)
            },
            locality: workload.locality.clone(),
            network: workload.network.clone(),
            weight: workload.weight,
            mtls: workload.mtls,
            health,
            workload: workload.name.clone(),
            namespace: workload.namespace.clone(),
            node_name: workload.node_name.clone(),
            hostname: workload.hostname.clone(),
        }
    }

    /// An address that no pod owns: nothing is known of it but where it is.
    fn bare(
        &self,
        endpoint: &SliceEndpoint,
        address: &str,
        number: u16,
        port: &ServicePort,
        health: HealthStatus,
    ) -> ServiceEndpoint {
        let locality = workload::node_locality(self.objects, &endpoint.node_name);
        let network = workload::network_of(&self.objects.networks, Some(&address.to_owned()), &self.cluster);
        let place = Place { locality: &locality, network: &network, node: &endpoint.node_name, cluster: &self.cluster };
        ServiceEndpoint {
            address: to_address(address, number),
            service_port: port.name.clone(),
            labels: place.augment(&BTreeMap::new()),
            service_account: String::new(),
            locality: locality.clone(),
            network: network.clone(),
            weight: 1,
            mtls: false,
            health,
            workload: String::new(),
            namespace: String::new(),
            node_name: endpoint.node_name.clone(),
            hostname: endpoint.hostname.clone(),
        }
    }
}

enum Behind<'a> {
    Pod(&'a Workload),
    Nothing,
    Missing,
}

impl Workload {
    /// An entry's own number for a service port's name.
    fn named_port(&self, name: &str) -> Option<u16> {
        match &self.ports {
            Ports::Entry(ports) => ports.get(name).copied().filter(|p| *p > 0),
            Ports::Pod(_) => None,
        }
    }
}

/// Port of a workload for a service port: an entry's map is asked for the service port's name first.
pub(crate) fn target_port(port: &ServicePort, ports: &Ports) -> Option<u16> {
    if let Ports::Entry(map) = ports
        && let Some(number) = map.get(&port.name).filter(|p| **p > 0)
    {
        return Some(*number);
    }
    match (&port.target, ports) {
        (TargetPort::Number(number), _) => Some(*number),
        (TargetPort::Name(name), Ports::Pod(map) | Ports::Entry(map)) => map.get(name).copied(),
    }
}

/// Whether a service's selector selects these labels; an empty one selects nothing.
pub(crate) fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    !selector.is_empty() && selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

fn is_dns(resolution: service_entry::Resolution) -> bool {
    matches!(resolution, service_entry::Resolution::Dns | service_entry::Resolution::DnsRoundRobin)
}

fn health(good: bool) -> HealthStatus {
    if good { HealthStatus::Healthy } else { HealthStatus::Unhealthy }
}

/// Of an entry nobody has said that it is healthy, only that it is not.
fn of_workload(workload: &Workload) -> HealthStatus {
    match workload.ports {
        Ports::Entry(_) if workload.healthy => HealthStatus::Unknown,
        Ports::Pod(_) | Ports::Entry(_) => health(workload.healthy),
    }
}

/// An endpoint's address: an IP, a `unix://` path, or a name to be resolved.
fn to_address(text: &str, port: u16) -> Address {
    if let Some(path) = text.strip_prefix("unix://") {
        return Address::Pipe(path.to_owned());
    }
    match text.parse() {
        Ok(ip) => Address::Socket(SocketAddr::new(ip, port)),
        Err(_) => Address::Host(text.to_owned(), port),
    }
}
