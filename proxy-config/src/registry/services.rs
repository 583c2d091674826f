//! Services of the mesh from Kubernetes Services and ServiceEntries.

use std::sync::Arc;

use super::scope::Scope;
use super::{Protocol, Provider, Resolution, Service, ServicePort, TargetPort};
use crate::istio::service_entry::{self, Location, ServiceEntry};
use crate::k8s::{self, IntOrString, ServiceSpec};
use crate::objects::{Object, Objects};

const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// All services, oldest first; of equal age by name, then namespace.
/// `allocate` gives addresses to ServiceEntries that have none.
pub(crate) fn services(objects: &Objects, domain: &str, trust_domain: &str, allocate: bool) -> Vec<Arc<Service>> {
    let kubernetes = objects.services.iter().map(|s| {
        let namespace = objects.namespaces.iter().find(|n| n.meta.name == s.meta.namespace);
        let inherited = namespace.and_then(|n| n.meta.annotations.get(TRAFFIC_DISTRIBUTION));
        kubernetes(s, domain, trust_domain, inherited.map(String::as_str).unwrap_or_default())
    });
    let mut all: Vec<Service> = kubernetes.chain(objects.service_entries.iter().flat_map(external)).collect();
    if allocate {
        super::allocate::allocate(&mut all);
    }
    all.sort_by(|a, b| (&a.created, &a.name, &a.namespace).cmp(&(&b.created, &b.name, &b.namespace)));
    all.into_iter().map(Arc::new).collect()
}

fn kubernetes(object: &Object<k8s::Service>, domain: &str, trust_domain: &str, inherited: &str) -> Service {
    let (meta, spec) = (&object.meta, &object.spec.spec);
    let annotation = |name: &str| meta.annotations.get(name).map(String::as_str).unwrap_or_default();
    let vip = if spec.cluster_ip.is_empty() { spec.cluster_ips.first() } else { Some(&spec.cluster_ip) };
    let headless = vip.is_some_and(|v| v == "None");
    let external_name = Some(&spec.external_name).filter(|n| spec.kind == "ExternalName" && !n.is_empty());
    let resolution = match (external_name, headless) {
        (Some(_), _) => Resolution::Alias,
        (None, true) => Resolution::Passthrough,
        (None, false) => Resolution::ClientSideLb,
    };
    let mut accounts = list(annotation("alpha.istio.io/canonical-serviceaccounts"));
    accounts.extend(
        list(annotation("alpha.istio.io/kubernetes-serviceaccounts"))
            .iter()
            .map(|account| super::spiffe_id(trust_domain, &meta.namespace, account)),
    );
    accounts.sort();
    Service {
        hostname: format!("{}.{}.svc.{domain}", meta.name, meta.namespace),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        addresses: vip.filter(|v| !headless && !v.is_empty() && external_name.is_none()).into_iter().cloned().collect(),
        ports: spec.ports.iter().filter_map(kubernetes_port).collect(),
        resolution,
        mesh_external: external_name.is_some(),
        headless,
        provider: Provider::Kubernetes,
        selector: spec.selector.clone(),
        labels: meta.labels.clone(),
        export_to: list(annotation("networking.istio.io/exportTo")),
        service_accounts: accounts,
        external_name: external_name.cloned(),
        node_local: spec.internal_traffic_policy == "Local",
        traffic_distribution: distribution(spec, annotation(TRAFFIC_DISTRIBUTION), inherited),
        publish_not_ready: spec.publish_not_ready_addresses,
        created: meta.creation_timestamp.clone(),
    }
}

/// The field wins over the annotation, that over the namespace's.
fn distribution(spec: &ServiceSpec, annotation: &str, inherited: &str) -> String {
    let said = [spec.traffic_distribution.as_str(), annotation, inherited];
    said.into_iter().find(|s| !s.is_empty()).unwrap_or_default().to_owned()
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|s| !s.is_empty()).map(str::to_owned).collect()
}

fn kubernetes_port(port: &k8s::Port) -> Option<ServicePort> {
    let target = match &port.target_port {
        None | Some(IntOrString::Number(0)) => TargetPort::Number(port.port),
        Some(IntOrString::Number(number)) => TargetPort::Number(*number),
        Some(IntOrString::Name(name)) => TargetPort::Name(name.clone()),
    };
    let protocol = protocol(port);
    (protocol != Protocol::Udp).then(|| ServicePort { name: port.name.clone(), number: port.port, protocol, target })
}

/// Application protocol of a Kubernetes port: what it says, else its name up to the first dash, else sniffed unless the
/// port is one whose server speaks first.
fn protocol(port: &k8s::Port) -> Protocol {
    if port.protocol == "UDP" {
        return Protocol::Udp;
    }
    let said = port.app_protocol.as_str();
    let by_app = match said.to_ascii_lowercase().as_str() {
        "" => None,
        "kubernetes.io/h2c" => Some(Protocol::Http2),
        "kubernetes.io/ws" => Some(Protocol::Http),
        "kubernetes.io/wss" => Some(Protocol::Https),
        other => Some(named(other)),
    };
    let by_name = || {
        let name = port.name.to_ascii_lowercase();
        if name.starts_with("grpc-web") { Protocol::GrpcWeb } else { named(name.split('-').next().unwrap_or_default()) }
    };
    let found = by_app.filter(|p| *p != Protocol::Auto).unwrap_or_else(by_name);
    // UDP in a name says nothing about a TCP port.
    let found = if found == Protocol::Udp { Protocol::Auto } else { found };
    if found == Protocol::Auto && matches!(port.port, 25 | 53 | 3306 | 27017) { Protocol::Tcp } else { found }
}

/// A protocol by its name; what is no protocol is sniffed.
pub(crate) fn named(name: &str) -> Protocol {
    match name.to_ascii_lowercase().as_str() {
        "http" => Protocol::Http,
        "http_proxy" => Protocol::HttpProxy,
        "http2" => Protocol::Http2,
        "grpc" => Protocol::Grpc,
        "grpc-web" => Protocol::GrpcWeb,
        "https" => Protocol::Https,
        "tls" => Protocol::Tls,
        "tcp" => Protocol::Tcp,
        "mongo" => Protocol::Mongo,
        "mysql" => Protocol::Mysql,
        "redis" => Protocol::Redis,
        "udp" => Protocol::Udp,
        _ => Protocol::Auto,
    }
}

/// A ServiceEntry is one service per host.
fn external(object: &Object<ServiceEntry>) -> Vec<Service> {
    let (meta, spec) = (&object.meta, &object.spec);
    let resolution = match spec.resolution {
        service_entry::Resolution::None => Resolution::Passthrough,
        service_entry::Resolution::Static => Resolution::ClientSideLb,
        service_entry::Resolution::Dns => Resolution::DnsLb,
        service_entry::Resolution::DnsRoundRobin => Resolution::DnsRoundRobinLb,
        service_entry::Resolution::DynamicDns => Resolution::DynamicDns,
    };
    let one = |host: &String| Service {
        hostname: host.clone(),
        // istiod names it after its host, in conflicts and in metadata.
        name: host.clone(),
        namespace: meta.namespace.clone(),
        addresses: spec.addresses.iter().filter_map(|a| address(a)).collect(),
        ports: spec.ports.iter().filter_map(external_port).collect(),
        resolution,
        mesh_external: spec.location == Location::MeshExternal,
        headless: false,
        provider: Provider::External,
        selector: spec.workload_selector.as_ref().map(|s| s.labels.clone()).unwrap_or_default(),
        labels: meta.labels.clone(),
        export_to: spec.export_to.clone(),
        service_accounts: spec.subject_alt_names.clone(),
        external_name: None,
        node_local: false,
        traffic_distribution: meta.annotations.get(TRAFFIC_DISTRIBUTION).cloned().unwrap_or_default(),
        publish_not_ready: false,
        created: meta.creation_timestamp.clone(),
    };
    spec.hosts.iter().map(one).collect()
}

fn external_port(port: &service_entry::Port) -> Option<ServicePort> {
    let target = if port.target_port == 0 { port.number } else { port.target_port };
    let protocol = named(&port.protocol);
    (protocol != Protocol::Udp).then(|| ServicePort {
        name: port.name.clone(),
        number: port.number,
        protocol,
        target: TargetPort::Number(target),
    })
}

/// An IP or a CIDR; a CIDR of one address is that address, anything else is none.
fn address(text: &str) -> Option<String> {
    if text.parse::<std::net::IpAddr>().is_ok() {
        return Some(text.to_owned());
    }
    let net: ipnet::IpNet = text.parse().ok()?;
    Some(if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { text.to_owned() })
}

/// Services that a namespace sees: private ones, those exported to it, then public ones, each oldest first. A host is
/// seen once, from Kubernetes before all others; entries of one namespace that differ in their ports alone are one
/// service.
pub(crate) fn visible(
    all: &[Arc<Service>],
    namespace: &str,
    default_export: &[String],
    scope: &Scope,
) -> Vec<Arc<Service>> {
    let mut out: Vec<Arc<Service>> = Vec::new();
    for wanted in [Reach::Private, Reach::Exported, Reach::Public] {
        let reached = all.iter().filter(|s| reach(s, namespace, default_export) == Some(wanted));
        for service in reached.filter(|s| scope.service(s)) {
            match out.iter_mut().find(|s| s.hostname == service.hostname) {
                None => out.push(Arc::clone(service)),
                Some(known) if known.provider > service.provider => *known = Arc::clone(service),
                Some(known) if is_same(known, service) => add_ports(known, service),
                Some(_) => {}
            }
        }
    }
    out
}

/// Whether two entries of one host describe one service.
fn is_same(a: &Service, b: &Service) -> bool {
    a.provider == Provider::External
        && (a.provider, a.resolution, &a.namespace) == (b.provider, b.resolution, &b.namespace)
        && (&a.labels, &a.selector, &a.export_to) == (&b.labels, &b.selector, &b.export_to)
}

pub(super) fn add_ports(known: &mut Arc<Service>, service: &Service) {
    let is_new = |p: &&ServicePort| known.ports.iter().all(|k| k.number != p.number);
    let new: Vec<ServicePort> = service.ports.iter().filter(is_new).cloned().collect();
    if !new.is_empty() {
        Arc::make_mut(known).ports.extend(new);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Private,
    Exported,
    Public,
}

fn reach(service: &Service, namespace: &str, default_export: &[String]) -> Option<Reach> {
    let list = if service.export_to.is_empty() { default_export } else { &service.export_to };
    let has = |what: &str| list.iter().any(|e| e == what);
    if list.is_empty() || has("*") {
        return Some(Reach::Public);
    }
    if has("~") {
        return None;
    }
    let own = service.namespace == namespace;
    if own && (has(".") || has(namespace)) {
        return Some(Reach::Private);
    }
    has(namespace).then_some(Reach::Exported)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn port(name: &str, number: u16, app: &str) -> k8s::Port {
        k8s::Port { name: name.to_owned(), port: number, app_protocol: app.to_owned(), ..k8s::Port::default() }
    }

    #[test]
    fn protocols() {
        for (name, number, app, expected) in [
            ("http", 80, "", Protocol::Http),
            ("HTTP-admin", 80, "", Protocol::Http),
            ("grpc-web-x", 80, "", Protocol::GrpcWeb),
            ("grpc", 80, "", Protocol::Grpc),
            ("postgres", 5432, "", Protocol::Auto),
            ("", 3306, "", Protocol::Tcp),
            ("db", 27017, "", Protocol::Tcp),
            ("tcp", 80, "http", Protocol::Http),
            ("x", 80, "kubernetes.io/h2c", Protocol::Http2),
            ("tcp", 80, "kubernetes.io/ws", Protocol::Http),
            ("tls-x", 80, "unheard.of", Protocol::Tls),
            ("udp", 80, "", Protocol::Auto),
        ] {
            assert_eq!(protocol(&port(name, number, app)), expected, "{name} {number} {app}");
        }
    }

    #[test]
    fn addresses_of_service_entries() {
        assert_eq!(address("10.0.0.1/32").as_deref(), Some("10.0.0.1"));
        assert_eq!(address("10.0.0.0/8").as_deref(), Some("10.0.0.0/8"));
        assert_eq!(address("example.com"), None);
    }

    pub(in crate::registry) fn named_service(
        host: &str,
        namespace: &str,
        provider: Provider,
        export: &[&str],
    ) -> Arc<Service> {
        let mut object = Object {
            meta: k8s::Meta { namespace: namespace.to_owned(), ..k8s::Meta::default() },
            spec: Arc::new(ServiceEntry { hosts: vec![host.to_owned()], ..ServiceEntry::default() }),
        };
        Arc::make_mut(&mut object.spec).export_to = export.iter().map(|e| (*e).to_owned()).collect();
        let mut service = external(&object).remove(0);
        service.provider = provider;
        Arc::new(service)
    }

    #[test]
    fn who_sees_what() {
        let all = [
            named_service("a", "m", Provider::External, &[]),
            named_service("b", "m", Provider::External, &["."]),
            named_service("c", "m", Provider::External, &["n"]),
            named_service("d", "n", Provider::External, &["."]),
            named_service("a", "k", Provider::Kubernetes, &[]),
            named_service("e", "n", Provider::External, &["~"]),
        ];
        let seen = visible(&all, "n", &[], &Scope::default());
        let names: Vec<(&str, &str)> = seen.iter().map(|s| (s.hostname.as_str(), s.namespace.as_str())).collect();
        assert_eq!(names, [("d", "n"), ("c", "m"), ("a", "k")]);
        assert_eq!(visible(&all, "z", &[".".to_owned()], &Scope::default()).len(), 0);
    }

    #[test]
    fn entries_of_one_host_lend_each_other_their_ports() {
        let with = |namespace: &str, number: u16, resolution| {
            let mut service = Service::clone(&named_service("a", namespace, Provider::External, &[]));
            let target = TargetPort::Number(number);
            service.ports = vec![ServicePort { name: "p".to_owned(), number, protocol: Protocol::Tcp, target }];
            service.resolution = resolution;
            Arc::new(service)
        };
        let all = [
            with("m", 80, Resolution::DnsLb),
            with("m", 443, Resolution::DnsLb),
            with("m", 80, Resolution::DnsLb),
            with("m", 81, Resolution::ClientSideLb),
            with("n", 82, Resolution::DnsLb),
        ];
        let seen = visible(&all, "n", &[], &Scope::default());
        let ports: Vec<u16> = seen.iter().flat_map(|s| s.ports.iter().map(|p| p.number)).collect();
        assert_eq!((seen.len(), ports), (1, vec![80, 443]));
    }
}
