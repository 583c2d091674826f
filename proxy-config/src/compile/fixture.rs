//! A small mesh for tests of this folder: one client proxy and a service with a port of every kind.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::peer_auth::Effective;
use super::view::{Policies, Rules, Settings, View};
use super::virtual_services::{self, Routes, Source};
use crate::istio::peer_authentication::Mode;
use crate::istio::virtual_service::VirtualService;
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
            .map(|(service, port)| ServiceTarget { service, target_port: port.number, port })
            .collect();
    }

    pub(super) fn with_view<T>(&self, f: impl FnOnce(&View<'_>) -> T) -> T {
        f(&View {
            proxy: &self.proxy,
            mesh: &self.settings,
            services: &self.services,
            targets: &self.targets,
            virtual_services: &self.virtual_services,
            mtls: &self.mtls,
            policies: &self.policies,
            rules: &|_, _, _| Rules::default(),
            endpoints: &|_, _| self.endpoints.clone(),
        })
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
