//! The mesh's name table: what DNS answers for services.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::catalog::Catalog;
use super::{Provider, Proxy, Resolution, Service};
use crate::model::{Address, Name, NameInfo};

/// Names of the services that the proxy sees. A service without address is left out, a headless one answers with its
/// endpoints.
pub(crate) fn names(catalog: &Catalog<'_>, services: &[Arc<Service>], proxy: &Proxy) -> BTreeMap<Name, NameInfo> {
    let mut out: BTreeMap<Name, NameInfo> = BTreeMap::new();
    for service in services {
        let mut ips: Vec<String> = Vec::new();
        if service.addresses.is_empty() {
            if service.resolution == Resolution::Passthrough {
                ips = headless(catalog, service, proxy, &mut out);
            }
        } else {
            // A CIDR is no answer.
            let listed = if service.provider == Provider::Kubernetes { 1 } else { service.addresses.len() };
            let addresses = service.addresses.iter().take(listed);
            ips.extend(addresses.filter(|a| a.parse::<std::net::IpAddr>().is_ok()).cloned());
        }
        if ips.is_empty() {
            continue;
        }
        let info = out.entry(Name::from(service.hostname.as_str())).or_default();
        if info.ips.is_empty() || service.provider == Provider::Kubernetes {
            *info = row(service, ips, service.name.clone());
        } else {
            info.ips.extend(ips);
        }
    }
    out
}

fn row(service: &Service, ips: Vec<String>, shortname: String) -> NameInfo {
    let kubernetes = service.provider == Provider::Kubernetes;
    NameInfo {
        ips,
        registry: if kubernetes { "Kubernetes" } else { "External" }.to_owned(),
        shortname: if kubernetes { shortname } else { String::new() },
        namespace: if kubernetes { service.namespace.clone() } else { String::new() },
    }
}

/// Addresses of all endpoints in the proxy's network; pods with a host name get a row of their own.
fn headless(
    catalog: &Catalog<'_>,
    service: &Service,
    proxy: &Proxy,
    out: &mut BTreeMap<Name, NameInfo>,
) -> Vec<String> {
    let Some(port) = service.ports.first() else { return Vec::new() };
    let mut ips = Vec::new();
    for endpoint in catalog.endpoints(service, port.number) {
        let Address::Socket(address) = endpoint.address else { continue };
        let near = proxy.network.is_empty() || endpoint.network.is_empty() || proxy.network == endpoint.network;
        if !near {
            continue;
        }
        let ip = address.ip().to_string();
        if !endpoint.hostname.is_empty() && service.headless {
            let name = format!("{}.{}", endpoint.hostname, service.hostname);
            let shortname = format!("{}.{}", endpoint.hostname, service.name);
            let pod = row(service, vec![ip.clone()], shortname);
            out.entry(Name::from(name)).or_insert(pod);
        }
        ips.push(ip);
    }
    ips
}
