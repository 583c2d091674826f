//! Where routes lead: hosts, ports and subsets that are not there.

use std::collections::BTreeMap;

use super::{Item, Message, World};
use crate::compile::hosts::resolve;
use crate::registry::catalog::DOMAIN;
use crate::validate::At;

const MISSING: &str = "IST0101";
const PORT_OPEN: &str = "IST0112";
const NO_EFFECT: &str = "IST0140";

/// A service as far as destinations ask for it.
#[derive(Debug, Clone)]
pub(super) struct Service<'d> {
    ports: Vec<i64>,
    /// Labels of a ServiceEntry's workloads.
    pub(super) selector: At<'d>,
}

/// Services by the namespace that sees them (`*` for all) and host.
pub(super) struct Hosts<'d>(BTreeMap<(String, String), Service<'d>>);

impl<'d> Hosts<'d> {
    /// ServiceEntries, then Services, which win.
    pub(super) fn new(world: &World<'d>) -> Self {
        let mut out = BTreeMap::new();
        for item in world.of("ServiceEntry") {
            let service = service(item, "number");
            let export = item.spec.get("exportTo").texts();
            for host in item.spec.get("hosts").texts() {
                let host = full(host, item.namespace());
                for scope in scopes(&export, item.namespace()) {
                    out.insert((scope, host.clone()), service.clone());
                }
            }
        }
        for item in world.of("Service") {
            let service = service(item, "port");
            let said: Vec<&str> = item.annotation("networking.istio.io/exportTo").split(',').map(str::trim).collect();
            let export = if said == [""] { Vec::new() } else { said };
            for scope in scopes(&export, item.namespace()) {
                out.insert((scope, full(item.name(), item.namespace())), service.clone());
            }
        }
        Self(out)
    }
}

fn service<'d>(item: &Item<'d>, number: &str) -> Service<'d> {
    let ports = item.spec.get("ports").items().iter().map(|p| p.get(number).whole_or_zero()).collect();
    Service { ports, selector: item.spec.at("workloadSelector.labels") }
}

fn full(host: &str, namespace: &str) -> String {
    if host.starts_with('*') { host.to_owned() } else { resolve(host, namespace, DOMAIN) }
}

/// Namespaces that see an object: `*` alone when everyone does.
pub(super) fn scopes(export: &[&str], own: &str) -> Vec<String> {
    if export.is_empty() || export.contains(&"*") {
        return vec!["*".to_owned()];
    }
    export.iter().map(|e| if *e == "." { own.to_owned() } else { (*e).to_owned() }).collect()
}

/// The service that a name means for an object: exported to all, to its own reach, then by wildcard.
pub(super) fn find<'h, 'd>(hosts: &'h Hosts<'d>, own: &str, export: &[&str], host: &str) -> Option<&'h Service<'d>> {
    let name = full(host, own);
    let exact = |scope: &str| hosts.0.get(&(scope.to_owned(), name.clone()));
    if let Some(found) = exact("*") {
        return Some(found);
    }
    let reach: Vec<&str> =
        if export.is_empty() { vec![own] } else { export.iter().map(|e| if *e == "." { own } else { e }).collect() };
    if let Some(found) = reach.iter().find_map(|scope| exact(scope)) {
        return Some(found);
    }
    let wanted = host.trim_start_matches('*');
    let wild = hosts.0.iter().find(|((scope, known), _)| {
        (scope == "*" || scope == own) && known.strip_prefix('*').is_some_and(|rest| wanted.ends_with(rest))
    });
    wild.map(|(_, service)| service)
}

/// Destinations of every route, then those of mirrors.
fn all<'d>(item: &Item<'d>) -> Vec<At<'d>> {
    let mut out = Vec::new();
    for field in ["tcp", "tls", "http"] {
        let routes = item.spec.get(field).items();
        out.extend(routes.iter().flat_map(|r| r.get("route").items()).map(|r| r.get("destination")));
    }
    for route in item.spec.get("http").items() {
        let one = route.get("mirror");
        out.extend(one.is_said().then_some(one));
        out.extend(route.get("mirrors").items().iter().map(|m| m.get("destination")));
    }
    out
}

/// Hosts and ports that are not there, ports that are left open, and subsets that a gateway does not know of.
pub(super) fn hosts(world: &World<'_>, out: &mut Vec<Message>) {
    let hosts = Hosts::new(world);
    let subsets = own_subsets(world);
    for item in world.of("VirtualService") {
        let export = item.spec.get("exportTo").texts();
        for to in all(item) {
            let host = to.get("host");
            match find(&hosts, item.namespace(), &export, host.text()) {
                _ if !host.has_text() => {}
                Some(service) => port(item, &to, service, out),
                None => {
                    let reason = format!("no Service or ServiceEntry has the host {:?}: calls get 503", host.text());
                    out.push(item.message(MISSING, &host, reason));
                }
            }
        }
        if item.spec.get("gateways").len() > 0 {
            gateway_subsets(item, &subsets, out);
        }
    }
}

fn port(item: &Item<'_>, to: &At<'_>, service: &Service<'_>, out: &mut Vec<Message>) {
    let (host, port) = (to.get("host").text(), to.get("port"));
    if !port.is_said() {
        if service.ports.len() > 1 {
            let reason = format!("{host:?} has the ports {:?}: without one the request's own is taken", service.ports);
            out.push(item.message(PORT_OPEN, to, reason).unsure());
        }
    } else if !service.ports.contains(&port.get("number").whole_or_zero()) {
        let reason = format!("{host:?} has no port {}: calls get 503", port.get("number").text());
        out.push(item.message(MISSING, &port, reason));
    }
}

/// Hosts of VirtualServices that route a subset of themselves.
fn own_subsets<'d>(world: &World<'d>) -> Vec<(String, &'d str)> {
    let mut out = Vec::new();
    for item in world.of("VirtualService") {
        let hosts = item.spec.get("hosts").texts();
        for to in
            item.spec.get("http").items().iter().flat_map(|r| r.get("route").items()).map(|r| r.get("destination"))
        {
            if to.get("subset").has_text() {
                let own = hosts.iter().filter(|h| **h == to.get("host").text());
                out.extend(own.map(|h| (item.full_name(), *h)));
            }
        }
    }
    out
}

fn gateway_subsets(item: &Item<'_>, subsets: &[(String, &str)], out: &mut Vec<Message>) {
    for to in item.spec.get("http").items().iter().flat_map(|r| r.get("route").items()).map(|r| r.get("destination")) {
        let host = to.get("host");
        for (other, _) in subsets.iter().filter(|(_, h)| *h == host.text() && !to.get("subset").has_text()) {
            let reason = format!("the subsets that {other} chooses have no effect on requests of this gateway");
            out.push(item.message(NO_EFFECT, &host, reason));
        }
    }
}

/// Namespace and name of a service of the cluster; of any other host its name, as seen from the object's namespace.
fn resource<'a>(host: &'a str, own: &'a str) -> (&'a str, &'a str) {
    let service = host.strip_suffix(".svc.cluster.local").and_then(|h| h.rsplit_once('.'));
    service.map_or((own, host), |(name, namespace)| (namespace, name))
}

/// Subsets that no DestinationRule has.
pub(super) fn subsets(world: &World<'_>, out: &mut Vec<Message>) {
    let mut known = Vec::new();
    for item in world.of("DestinationRule") {
        let host = resource(item.spec.get("host").text(), item.namespace());
        known.extend(item.spec.get("subsets").items().iter().map(|s| (host, s.get("name").text())));
    }
    for item in world.of("VirtualService") {
        for to in all(item) {
            let (host, subset) = (to.get("host"), to.get("subset"));
            let wanted = (resource(host.text(), item.namespace()), subset.text());
            if subset.has_text() && !known.contains(&wanted) {
                let reason =
                    format!("no DestinationRule has a subset {:?} of {:?}: calls get 503", subset.text(), host.text());
                out.push(item.message(MISSING, &subset, reason));
            }
        }
    }
}
