//! Which service ports the proxy itself serves.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::catalog::{Catalog, selects, target_port};
use super::workload::{Ports, Workload};
use super::{Provider, Proxy, Resolution, Service, ServiceTarget};
use crate::model::Address;

/// The workload behind the proxy, as far as it is known.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Me {
    /// A WorkloadEntry, or what registration would have made of the group.
    Entry(Workload),
    /// A pod.
    Pod(Workload),
    /// Only what the proxy said itself: its labels and named ports.
    Told(BTreeMap<String, String>, BTreeMap<String, u16>),
}

/// Service ports that the proxy serves, oldest service first, Kubernetes before others of equal age.
pub(crate) fn targets(catalog: &Catalog<'_>, me: &Me, proxy: &Proxy) -> Vec<ServiceTarget> {
    let mut out = Vec::new();
    let kubernetes = || catalog.services.iter().filter(|s| s.provider == Provider::Kubernetes);
    for service in kubernetes().filter(|s| s.namespace == proxy.namespace) {
        selected(service, me, &mut out);
    }
    if out.is_empty() && !matches!(me, Me::Entry(_)) {
        for service in kubernetes().filter(|s| s.selector.is_empty()) {
            by_address(catalog, service, &proxy.ips, &mut out);
        }
    }
    let entries = catalog.services.iter().filter(|s| s.provider == Provider::External);
    for service in entries.filter(|s| s.namespace == proxy.namespace) {
        let before = out.len();
        by_address(catalog, service, &proxy.ips, &mut out);
        if let Me::Entry(entry) = me
            && out.len() == before
        {
            unlisted(service, entry, &mut out);
        }
    }
    out.sort_by(|a, b| a.service.created.cmp(&b.service.created));
    out
}

/// Ports of a Service that selects the workload.
fn selected(service: &Arc<Service>, me: &Me, out: &mut Vec<ServiceTarget>) {
    let told;
    let (labels, ports) = match me {
        Me::Entry(workload) if service.resolution == Resolution::ClientSideLb => (&workload.labels, &workload.ports),
        Me::Entry(_) => return,
        Me::Pod(workload) => (&workload.labels, &workload.ports),
        Me::Told(labels, ports) => {
            told = Ports::Pod(ports.clone());
            (labels, &told)
        }
    };
    if !selects(&service.selector, labels) {
        return;
    }
    for port in &service.ports {
        if let Some(number) = target_port(port, ports) {
            out.push(ServiceTarget {
                service: Arc::clone(service),
                port: port.clone(),
                target_port: number,
                ingress: None,
            });
        }
    }
}

/// Ports of a service that has an endpoint at one of the proxy's addresses.
fn by_address(catalog: &Catalog<'_>, service: &Arc<Service>, ips: &[IpAddr], out: &mut Vec<ServiceTarget>) {
    for port in &service.ports {
        let mut numbers: Vec<u16> = Vec::new();
        for endpoint in catalog.endpoints(service, port.number) {
            if let Address::Socket(address) = endpoint.address
                && ips.contains(&address.ip())
                && !numbers.contains(&address.port())
            {
                numbers.push(address.port());
            }
        }
        out.extend(numbers.into_iter().map(|number| ServiceTarget {
            service: Arc::clone(service),
            port: port.clone(),
            target_port: number,
            ingress: None,
        }));
    }
}

/// Ports of a ServiceEntry that selects an auto-registered workload, which is nobody's endpoint yet.
fn unlisted(service: &Arc<Service>, entry: &Workload, out: &mut Vec<ServiceTarget>) {
    if !selects(&service.selector, &entry.labels) {
        return;
    }
    for port in &service.ports {
        if let Some(number) = target_port(port, &entry.ports) {
            out.push(ServiceTarget {
                service: Arc::clone(service),
                port: port.clone(),
                target_port: number,
                ingress: None,
            });
        }
    }
}
