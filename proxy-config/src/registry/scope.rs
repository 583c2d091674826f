//! What a Sidecar lets its workloads see.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Service;
use crate::istio::sidecar::Egress;
use crate::istio::virtual_service::{Destination, VirtualService};

/// Imports of egress listeners; without any everything is seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Scope {
    /// Namespace (`*` for every one) and host pattern.
    imports: Option<Vec<(String, String)>>,
    /// The same, taken out again.
    excluded: Vec<(String, String)>,
}

impl Scope {
    /// `namespace` is the proxy's: what `.` stands for.
    pub(crate) fn new(egress: &[Egress], namespace: &str) -> Self {
        if egress.is_empty() {
            return Self::default();
        }
        let pattern = |text: &str| {
            let (said, host) = text.split_once('/').unwrap_or(("*", text));
            (if said == "." { namespace } else { said }.to_owned(), host.to_owned())
        };
        let mut out = Self { imports: Some(Vec::new()), excluded: Vec::new() };
        for host in egress.iter().flat_map(|e| &e.hosts) {
            match host.strip_prefix('~') {
                // Without a namespace it is taken out of every one; `~/*` leaves nothing.
                Some(rest) if rest.starts_with('/') => out.excluded.push(pattern(&format!("*{rest}"))),
                Some(rest) => out.excluded.push(pattern(rest)),
                None => out.imports.get_or_insert_default().push(pattern(host)),
            }
        }
        out
    }

    /// Whether the service is imported.
    pub(crate) fn service(&self, service: &Service) -> bool {
        let named = |patterns: &[(String, String)]| {
            patterns.iter().any(|(namespace, host)| {
                in_namespace(namespace, &service.namespace) && subset_of(&service.hostname, host)
            })
        };
        self.imports.as_deref().is_none_or(named) && !named(&self.excluded)
    }

    /// Whether a VirtualService is: one of its hosts and an import can mean the same, and nothing takes that host out.
    pub(crate) fn virtual_service(&self, namespace: &str, hosts: &[String]) -> bool {
        let Some(imports) = &self.imports else { return true };
        let meets = |host: &String| {
            imports.iter().any(|(wanted, pattern)| {
                in_namespace(wanted, namespace) && (subset_of(host, pattern) || subset_of(pattern, host))
            })
        };
        let taken = |host: &String| {
            self.excluded.iter().any(|(n, pattern)| in_namespace(n, namespace) && subset_of(host, pattern))
        };
        hosts.iter().any(|host| meets(host) && !taken(host))
    }
}

fn in_namespace(wanted: &str, namespace: &str) -> bool {
    wanted == "*" || wanted == namespace
}

/// Whether every host that `host` means is meant by `pattern`.
fn subset_of(host: &str, pattern: &str) -> bool {
    match (host.strip_prefix('*'), pattern.strip_prefix('*')) {
        (Some(a), Some(b)) => a.ends_with(b),
        (Some(_), None) => false,
        (None, Some(b)) => host.ends_with(b),
        (None, None) => host == pattern,
    }
}

/// Only this port of the services; those without it are left out.
pub(crate) fn only_port(services: &mut Vec<Arc<Service>>, port: u16) {
    services.retain(|s| s.ports.iter().any(|p| p.number == port));
    for service in services.iter_mut().filter(|s| s.ports.len() > 1) {
        Arc::make_mut(service).ports.retain(|p| p.number == port);
    }
}

/// What several listeners see together: each service once, with every port that one of them sees.
pub(crate) fn union<'l>(seen: impl Iterator<Item = &'l Arc<Service>>) -> Vec<Arc<Service>> {
    let mut out: Vec<Arc<Service>> = Vec::new();
    for service in seen {
        match out.iter_mut().find(|s| s.hostname == service.hostname) {
            None => out.push(Arc::clone(service)),
            Some(known) if known.namespace == service.namespace => super::services::add_ports(known, service),
            Some(_) => {}
        }
    }
    out
}

/// Services that are not seen but lead somewhere: destinations of the VirtualServices in scope, with the ports that
/// are asked for. The proxy's own namespace comes first, then the others by name.
pub(crate) fn dependencies<'v>(
    all: &[Arc<Service>],
    seen: &[Arc<Service>],
    routes: impl Iterator<Item = &'v VirtualService>,
    namespace: &str,
) -> Vec<Arc<Service>> {
    let mut wanted: BTreeMap<&str, BTreeSet<u16>> = BTreeMap::new();
    for spec in routes {
        for destination in destinations(spec) {
            let port = destination.port.map_or(0, |p| p.number);
            wanted.entry(destination.host.as_str()).or_default().insert(port);
        }
    }
    let mut out = Vec::new();
    for (host, ports) in wanted {
        if seen.iter().any(|s| s.hostname == host) {
            continue;
        }
        let of_host = all.iter().filter(|s| s.hostname == host);
        let Some(service) = of_host.min_by_key(|s| (s.namespace != namespace, s.namespace.as_str())) else { continue };
        let mut service = Service::clone(service);
        if !ports.contains(&0) {
            service.ports.retain(|p| ports.contains(&p.number));
        }
        if !service.ports.is_empty() {
            out.push(Arc::new(service));
        }
    }
    out
}

fn destinations(spec: &VirtualService) -> impl Iterator<Item = &Destination> {
    let http = spec.http.iter().flat_map(|r| {
        let mirrors = r.mirrors.iter().filter_map(|m| m.destination.as_ref());
        r.route.iter().map(|d| &d.destination).chain(&r.mirror).chain(mirrors)
    });
    let tcp = spec.tcp.iter().flat_map(|r| &r.route).map(|d| &d.destination);
    let tls = spec.tls.iter().flat_map(|r| &r.route).map(|d| &d.destination);
    http.chain(tcp).chain(tls)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(hosts: &[&str]) -> Scope {
        let hosts = hosts.iter().map(|h| (*h).to_owned()).collect();
        Scope::new(&[Egress { hosts, ..Egress::default() }], "n")
    }

    #[test]
    fn virtual_services_meet_imports_both_ways() {
        let hosts = |h: &str| vec![h.to_owned()];
        assert!(Scope::default().virtual_service("x", &hosts("a")));
        assert!(scope(&["./*"]).virtual_service("n", &hosts("a.b")));
        assert!(!scope(&["./*"]).virtual_service("m", &hosts("a.b")));
        assert!(scope(&["*/a.b"]).virtual_service("m", &hosts("*.b")), "a wildcard covers the import");
        assert!(!scope(&["*/a.b"]).virtual_service("m", &hosts("c.b")));
        assert!(!scope(&["~/*"]).virtual_service("n", &hosts("a.b")));
        let without = scope(&["*/*", "~/a.b", "~m/*.c"]);
        assert!(!without.virtual_service("n", &hosts("a.b")) && !without.virtual_service("m", &hosts("x.c")));
        assert!(without.virtual_service("n", &hosts("x.c")) && without.virtual_service("n", &hosts("*.b")));
    }

    #[test]
    fn patterns() {
        assert!(subset_of("a.b.c", "*.b.c") && subset_of("a", "*") && subset_of("*.b.c", "*.c"));
        assert!(!subset_of("*.c", "a.c") && !subset_of("a.c", "b.c"));
    }
}
