//! A small mesh for tests of this folder: one client proxy and a service with a port of every kind.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::clusters::{self, Inputs};
use super::destination_rules::{self, DestinationRules};
use super::peer_auth::{Effective, Policy};
use super::view::{Policies, Rules, Settings, View};
use super::virtual_services::{self, Routes, Source};
use crate::istio::destination_rule::DestinationRule;
use crate::istio::mesh_config::MeshConfig;
use crate::istio::mesh_networks::MeshNetworks;
use crate::istio::peer_authentication::{Mode, PeerAuthentication};
use crate::istio::virtual_service::VirtualService;
use crate::model::{Address, HealthStatus, Locality, Model};
use crate::registry::{
    Protocol, Provider, Proxy, Resolution, Service, ServiceEndpoint, ServicePort, ServiceTarget, TargetPort,
};

pub(super) struct Mesh {
    pub(super) proxy: Proxy,
    pub(super) settings: Settings,
    pub(super) services: Vec<Arc<Service>>,
    pub(super) targets: Vec<ServiceTarget>,
    pub(super) virtual_services: Vec<Routes>,
    pub(super) mtls: Effective,
    pub(super) policies: Policies,
    pub(super) endpoints: Vec<ServiceEndpoint>,
    pub(super) peer_policies: Vec<(String, PeerAuthentication)>,
    pub(super) networks: MeshNetworks,
}

impl Mesh {
    pub(super) fn new(services: Vec<Service>) -> Self {
        let proxy = Proxy {
            namespace: "app".to_owned(),
            ips: vec![IpAddr::from([10, 2, 0, 1])],
            dns_domain: "app.svc.cluster.local".to_owned(),
            labels: BTreeMap::from([("app".to_owned(), "client".to_owned())]),
            ..Proxy::default()
        };
        Self {
            proxy,
            settings: Settings::default(),
            services: services.into_iter().map(Arc::new).collect(),
            targets: Vec::new(),
            virtual_services: Vec::new(),
            mtls: Effective { mode: Mode::Permissive, ports: BTreeMap::new() },
            policies: Policies::default(),
            endpoints: Vec::new(),
            peer_policies: Vec::new(),
            networks: MeshNetworks::default(),
        }
    }

    /// Adds VirtualServices of namespace `app` from YAML of their `spec`.
    pub(super) fn route(&mut self, name: &str, spec: &str) {
        let spec: VirtualService = serde_saphyr::from_str(spec).expect("valid test YAML");
        let source = [Source { namespace: "app", name, spec: &spec }];
        self.virtual_services.extend(virtual_services::visible(&source, "app", "cluster.local", &[], &mut Vec::new()));
    }

    /// Makes the proxy an instance of every port of its services.
    pub(super) fn serve(&mut self) {
        self.targets = self
            .services
            .iter()
            .flat_map(|s| s.ports.iter().map(|p| (Arc::clone(s), p.clone())))
            .map(|(service, port)| ServiceTarget { service, target_port: port.number, port, ingress: None })
            .collect();
    }

    /// Clusters and load assignments under DestinationRules (namespace, name, YAML of the `spec`) and a `MeshConfig`.
    pub(super) fn clusters(&self, rules: &[(&str, &str, &str)], mesh: &str) -> Model {
        let config: MeshConfig = serde_saphyr::from_str(mesh).expect("valid test YAML");
        let specs: Vec<DestinationRule> =
            rules.iter().map(|(.., spec)| serde_saphyr::from_str(spec).expect("valid test YAML")).collect();
        let sources: Vec<destination_rules::Source<'_>> = rules
            .iter()
            .zip(&specs)
            .map(|((namespace, name, _), spec)| destination_rules::Source { namespace, name, spec })
            .collect();
        let rules = DestinationRules::new(&sources, &self.services, &self.proxy, &self.settings, &[]);
        let inputs = Inputs {
            rules: &rules,
            mesh: &config,
            peer_policies: &self
                .peer_policies
                .iter()
                .map(|(n, p)| Policy { namespace: n, name: "p", spec: p })
                .collect::<Vec<_>>(),
            networks: &self.networks,
        };
        let mut model = Model::default();
        self.with_view(|view| clusters::fill(view, inputs, &mut model));
        model
    }

    pub(super) fn with_view<T>(&self, f: impl FnOnce(&View<'_>) -> T) -> T {
        f(&View {
            proxy: &self.proxy,
            mesh: &self.settings,
            services: &self.services,
            dependencies: &[],
            egress: &[],
            targets: &self.targets,
            virtual_services: &self.virtual_services,
            mtls: &self.mtls,
            policies: &self.policies,
            rules: &|_, _, _| Rules::default(),
            endpoints: &|_, _| self.endpoints.clone(),
        })
    }
}

/// An endpoint in `region/zone`, with mTLS where it has a service account.
pub(super) fn endpoint(ip: [u8; 4], port: u16, place: (&str, &str), account: &str, version: &str) -> ServiceEndpoint {
    let labels = [("app", "web"), ("version", version)].map(|(k, v)| (k.to_owned(), v.to_owned()));
    ServiceEndpoint {
        address: Address::Socket((ip, port).into()),
        service_port: "http".to_owned(),
        labels: labels.into(),
        service_account: if account.is_empty() {
            String::new()
        } else {
            format!("spiffe://cluster.local/ns/app/sa/{account}")
        },
        locality: Locality { region: place.0.to_owned(), zone: place.1.to_owned(), sub_zone: String::new() },
        network: String::new(),
        weight: 1,
        mtls: !account.is_empty(),
        health: HealthStatus::Healthy,
        workload: format!("web-{}", ip[3]),
        namespace: "app".to_owned(),
        node_name: format!("node{}", ip[3]),
        hostname: String::new(),
    }
}

pub(super) fn port(name: &str, number: u16, protocol: Protocol) -> ServicePort {
    ServicePort { name: name.to_owned(), number, protocol, target: TargetPort::Number(number) }
}

pub(super) fn service(name: &str, address: Option<&str>, ports: Vec<ServicePort>) -> Service {
    Service {
        hostname: format!("{name}.app.svc.cluster.local"),
        name: name.to_owned(),
        namespace: "app".to_owned(),
        addresses: address.into_iter().map(str::to_owned).collect(),
        ports,
        resolution: Resolution::ClientSideLb,
        mesh_external: false,
        headless: false,
        provider: Provider::Kubernetes,
        selector: BTreeMap::new(),
        labels: BTreeMap::new(),
        export_to: Vec::new(),
        service_accounts: Vec::new(),
        external_name: None,
        node_local: false,
        traffic_distribution: String::new(),
        publish_not_ready: false,
        created: String::new(),
    }
}

/// A service with one port of every kind.
pub(super) fn web() -> Service {
    let ports = vec![
        port("http", 80, Protocol::Http),
        port("grpc", 9090, Protocol::Grpc),
        port("tcp", 7000, Protocol::Tcp),
        port("auto", 6000, Protocol::Auto),
    ];
    service("web", Some("10.97.0.1"), ports)
}
