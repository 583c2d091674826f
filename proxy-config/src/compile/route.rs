//! Outbound route tables: one for each port that declared-HTTP services share, one for each sniffed `host:port`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::route_action::{self, Lookup};
use super::view::{Egress, OutboundPolicy, View, aliases};
use super::virtual_host::{self, Taken};
use super::virtual_services::Routes;
use super::{hosts, route_match};
use crate::istio::virtual_service::{Destination, HttpMatch, HttpRoute};
use crate::model::{
    Forward, HashPolicy, HeaderOps, Name, PathMatch, Route, RouteAction, RouteTable, VirtualHost, WeightedCluster,
};
use crate::registry::{Protocol, Resolution, Service, ServicePort};

/// Largest direct response, as istiod's validation limits it.
const MAX_DIRECT_RESPONSE: u32 = 1024 * 1024;

/// A service as one port sees it.
#[derive(Clone)]
struct OnPort {
    service: Arc<Service>,
    port: ServicePort,
}

/// Services of a port by lower-case host.
type Registry = BTreeMap<String, OnPort>;

/// Routes with the names they answer to.
struct Group {
    hosts: Vec<String>,
    services: Vec<OnPort>,
    routes: Vec<Route>,
}

/// The table that a connection manager asks for by `name` (`80` or `host:port`); `None` for a name that is neither.
pub fn table(view: &View<'_>, name: &str) -> Option<RouteTable> {
    let (host, port) = match name.rsplit_once(':') {
        Some((host, port)) => (Some(host.trim_matches(['[', ']'])), port),
        None => (None, name),
    };
    let port: u16 = port.parse().ok()?;
    let scoped;
    let mut proxied = false;
    let mut view = view;
    let mut virtual_hosts = if view.egress.is_empty() {
        virtual_hosts(view, port)
    } else {
        // The listener of the port, else the one of every port.
        let listens = |e: &&Egress| e.port.as_ref().is_none_or(|p| p.number == port);
        let egress = view.egress.iter().find(listens)?;
        scoped = view.through(egress);
        view = &scoped;
        match &egress.port {
            Some(own) if own.protocol == Protocol::HttpProxy => {
                proxied = true;
                of_proxy(view)
            }
            _ => virtual_hosts(view, port),
        }
    };
    if let Some(host) = host {
        virtual_hosts = of_sniffed(virtual_hosts, name, host);
    }
    virtual_hosts.sort_by(|a, b| a.name.cmp(&b.name));
    if host.is_none() {
        virtual_hosts.push(catch_all(view));
    }
    Some(RouteTable {
        name: Name::from(name),
        virtual_hosts,
        // The names of a forward proxy have ports; without them only those of port 80 would be found.
        ignore_port_in_host_matching: !proxied,
        max_direct_response_body_size: Some(MAX_DIRECT_RESPONSE),
        validate_clusters: false,
    })
}

/// Through a forward proxy every port of every service can be asked for, by name and port.
fn of_proxy(view: &View<'_>) -> Vec<VirtualHost> {
    let ports = view.services.iter().flat_map(|s| &s.ports).filter(|p| is_http_or_sniffed(p.protocol));
    let ports: BTreeSet<u16> = ports.map(|p| p.number).collect();
    let mut out = Vec::new();
    for port in ports {
        for mut host in virtual_hosts(view, port) {
            let names = std::mem::take(&mut host.domains);
            for name in names {
                let full = format!("{name}:{port}");
                host.domains.extend((port == 80).then_some(name));
                host.domains.push(full);
            }
            out.push(host);
        }
    }
    out
}

/// A sniffed port has a table of its own: whatever is said there is said to its service.
fn of_sniffed(virtual_hosts: Vec<VirtualHost>, name: &str, host: &str) -> Vec<VirtualHost> {
    let mut own: Vec<VirtualHost> =
        virtual_hosts.into_iter().filter(|v| v.domains.iter().any(|d| d == name || d == host)).collect();
    if let [only] = own.as_mut_slice() {
        only.domains = vec!["*".to_owned()];
    }
    own
}

fn virtual_hosts(view: &View<'_>, port: u16) -> Vec<VirtualHost> {
    let registry = registry(view, port);
    let alias_names = aliases(view.services);
    let groups = groups(view, &registry, port);
    let mut taken = Taken::default();
    for service in groups.iter().flat_map(|g| &g.services) {
        taken.reserve(&service.service.hostname, port);
    }
    let mut names = BTreeSet::new();
    let mut out = Vec::new();
    for group in &groups {
        let plain = group.hosts.iter().map(|h| h.to_ascii_lowercase()).map(|h| (virtual_host::of_host(&h), h));
        let services = group.services.iter().map(|s| {
            let host = s.service.hostname.to_ascii_lowercase();
            let aliases = alias_names.get(s.service.hostname.as_str()).map_or(&[][..], Vec::as_slice);
            (virtual_host::of_service(&s.service, aliases, view.proxy), host)
        });
        for (domains, host) in plain.chain(services) {
            let name = hosts::with_port(&host, port);
            if !names.insert(name.clone()) {
                continue;
            }
            let domains = taken.claim(domains);
            if !domains.is_empty() {
                out.push(VirtualHost {
                    name: Name::from(name),
                    domains,
                    routes: group.routes.clone(),
                    include_request_attempt_count: view.mesh.headers.attempt_count,
                });
            }
        }
    }
    out
}

fn registry(view: &View<'_>, port: u16) -> Registry {
    let on_port = |s: &Arc<Service>| {
        let found = s.ports.iter().find(|p| p.number == port)?;
        Some((s.hostname.to_ascii_lowercase(), OnPort { service: Arc::clone(s), port: found.clone() }))
    };
    view.services.iter().filter_map(on_port).collect()
}

/// Routes of VirtualServices first, then the default route of every service that none of them took.
fn groups(view: &View<'_>, registry: &Registry, port: u16) -> Vec<Group> {
    let all = view.virtual_services.iter();
    // Names without a service are only served on port 80.
    let chosen = all.filter(|vs| port == 80 || selects_service(vs, registry));
    let mut out: Vec<Group> = chosen.filter_map(|vs| of_virtual_service(view, vs, registry, port)).collect();
    let covered: BTreeSet<String> =
        out.iter().flat_map(|g| &g.services).map(|s| s.service.hostname.to_ascii_lowercase()).collect();
    for (host, service) in registry {
        let served = is_http_or_sniffed(service.port.protocol) && service.service.resolution != Resolution::Alias;
        if served && !covered.contains(host) {
            out.push(Group {
                hosts: Vec::new(),
                services: vec![service.clone()],
                routes: vec![default_outbound(view, service)],
            });
        }
    }
    out
}

fn is_http_or_sniffed(protocol: Protocol) -> bool {
    protocol.is_http() || protocol == Protocol::Auto
}

fn selects_service(vs: &Routes, registry: &Registry) -> bool {
    vs.spec.hosts.iter().any(|host| {
        let host = host.to_ascii_lowercase();
        let may_be_wild = |service: &String| hosts::is_wildcard(&host) || hosts::is_wildcard(service);
        registry.contains_key(&host) || registry.keys().any(|s| may_be_wild(s) && hosts::matches(&host, s))
    })
}

fn of_virtual_service(view: &View<'_>, vs: &Routes, registry: &Registry, port: u16) -> Option<Group> {
    let routes = http_routes(view, vs, registry, port);
    if routes.is_empty() {
        return None;
    }
    let mut plain = Vec::new();
    let mut services: Vec<OnPort> = Vec::new();
    for host in vs.spec.hosts.iter().filter(|h| !hosts::is_wildcard(h)) {
        match registry.get(&host.to_ascii_lowercase()) {
            Some(service) => services.push(service.clone()),
            None => plain.push(host.clone()),
        }
    }
    for host in vs.spec.hosts.iter().filter(|h| hosts::is_wildcard(h)) {
        let matched: Vec<&OnPort> =
            registry.iter().filter(|(name, _)| hosts::matches(name, host)).map(|(_, s)| s).collect();
        if matched.is_empty() {
            plain.push(host.to_ascii_lowercase());
        }
        let own = |s: &&OnPort| owner(view, &s.service.hostname).is_some_and(|o| std::ptr::eq(o, vs));
        services.extend(matched.into_iter().filter(own).cloned());
    }
    services.retain(|s| is_http_or_sniffed(s.port.protocol));
    // Without any service the names still count on port 80, as plain names.
    (!services.is_empty() || port == 80).then_some(Group { hosts: plain, services, routes })
}

/// The VirtualService whose host names the service most closely; the first one among equals.
fn owner<'v>(view: &'v View<'_>, service: &str) -> Option<&'v Routes> {
    let all = view.virtual_services.iter().flat_map(|vs| vs.spec.hosts.iter().map(String::as_str));
    let best = hosts::most_specific(service, all)?;
    view.virtual_services.iter().find(|vs| vs.spec.hosts.iter().any(|h| h == best))
}

fn http_routes(view: &View<'_>, vs: &Routes, registry: &Registry, port: u16) -> Vec<Route> {
    let mut out = Vec::new();
    for route in &vs.spec.http {
        if route.matches.is_empty() {
            out.push(http_route(view, vs, route, None, (registry, port)));
            return out;
        }
        for m in route.matches.iter().filter(|m| route_match::applies(m, view.proxy, port)) {
            let translated = http_route(view, vs, route, Some(m), (registry, port));
            let last = route_match::is_catch_all(&translated.matches);
            out.push(translated);
            if last {
                return out;
            }
        }
    }
    out
}

fn http_route(
    view: &View<'_>,
    vs: &Routes,
    route: &HttpRoute,
    m: Option<&HttpMatch>,
    (registry, port): (&Registry, u16),
) -> Route {
    let cluster = |d: &Destination| destination_cluster(d, registry, port);
    let hash = |d: &Destination| destination_hash(view, d);
    let lookup = Lookup {
        cluster: &cluster,
        hash: &hash,
        retries: view.mesh.retries.as_ref(),
        append_x_forwarded_host: view.mesh.headers.forwarded_host,
        port,
    };
    let translated = route_action::translate(route, &lookup);
    let matches = m.map_or_else(route_match::any, route_match::translate);
    let decorator = Some(operation(route, &translated.action, &matches.path, &format!("{}:{port}", vs.name)));
    let name = match m.filter(|m| !m.name.is_empty()) {
        Some(m) => format!("{}.{}", route.name, m.name),
        None => route.name.clone(),
    };
    Route {
        name: Name::from(name),
        matches,
        action: translated.action,
        request_headers: translated.request_headers,
        response_headers: translated.response_headers,
        decorator,
        fault: route.fault.as_ref().and_then(route_action::fault),
        cors: route.cors_policy.as_ref().map(route_action::cors),
        config: Some(vs.config_path()),
        stat_prefix: m.map(|m| m.stat_prefix.clone()).unwrap_or_default(),
        unsupported: Vec::new(),
    }
}

fn destination_hash(view: &View<'_>, d: &Destination) -> Option<HashPolicy> {
    (view.rules)(&d.host, d.port.map(|p| p.number), &d.subset).hash
}

/// Cluster of a destination; a port that is not said is the listener's.
fn destination_cluster(d: &Destination, registry: &Registry, port: u16) -> String {
    if d.host.is_empty() {
        return "UnknownService".to_owned();
    }
    let service = registry.get(&d.host);
    let host = service.and_then(|s| s.service.external_name.as_deref()).unwrap_or(&d.host);
    let port = d.port.map_or(port, |p| p.number);
    format!("outbound|{port}|{}|{host}", d.subset)
}

/// What a trace calls the route: its only destination, or the VirtualService when there are several.
fn operation(route: &HttpRoute, action: &RouteAction, path: &PathMatch, otherwise: &str) -> String {
    let path = match path {
        PathMatch::Prefix(p) => format!("{p}*"),
        PathMatch::Exact(p) | PathMatch::Regex(p) => p.clone(),
        PathMatch::PathSeparatedPrefix(_) | PathMatch::Template(_) | PathMatch::Connect => "/*".to_owned(),
    };
    let only = match action {
        RouteAction::Forward(f) if route.route.len() == 1 => f.clusters.first(),
        _ => None,
    };
    let parts: Vec<&str> = only.map(|c| c.name.split('|').collect()).unwrap_or_default();
    match parts.as_slice() {
        [_, port, _, host] => format!("{host}:{port}{path}"),
        _ => format!("{otherwise}{path}"),
    }
}

fn default_outbound(view: &View<'_>, service: &OnPort) -> Route {
    let host = service.service.hostname.to_ascii_lowercase();
    let port = service.port.number;
    let mut forward = to_cluster(&format!("outbound|{port}||{host}"));
    forward.max_grpc_timeout = Some(Duration::ZERO);
    forward.retry = route_action::retry(view.mesh.retries.as_ref(), false);
    forward.hash_policy.extend((view.rules)(&host, Some(port), "").hash);
    default_route("default", forward, Some(format!("{}/*", hosts::with_port(&host, port))))
}

/// The only route of an inbound chain.
pub(super) fn default_inbound(view: &View<'_>, cluster: &str, operation: &str, protocol: Protocol) -> Route {
    let mut forward = to_cluster(cluster);
    forward.max_stream_duration = Some(Duration::ZERO);
    forward.grpc_timeout_header_max = Some(Duration::ZERO);
    if !matches!(protocol, Protocol::Grpc | Protocol::GrpcWeb) {
        forward.retry = route_action::inbound_retry(view.mesh.inbound_retries.as_ref());
    }
    default_route("default", forward, Some(operation.to_owned()))
}

fn to_cluster(name: &str) -> Forward {
    Forward {
        clusters: vec![WeightedCluster { name: Name::from(name), weight: 1, ..WeightedCluster::default() }],
        timeout: Some(Duration::ZERO),
        ..Forward::default()
    }
}

fn default_route(name: &str, forward: Forward, decorator: Option<String>) -> Route {
    Route {
        name: Name::from(name),
        matches: route_match::any(),
        action: RouteAction::Forward(Box::new(forward)),
        request_headers: HeaderOps::default(),
        response_headers: HeaderOps::default(),
        decorator,
        fault: None,
        cors: None,
        config: None,
        stat_prefix: String::new(),
        unsupported: Vec::new(),
    }
}

/// Where requests for unknown hosts go.
fn catch_all(view: &View<'_>) -> VirtualHost {
    let cluster = match &view.mesh.outbound {
        OutboundPolicy::AllowAny => "PassthroughCluster".to_owned(),
        OutboundPolicy::EgressProxy(d) => destination_cluster(d, &Registry::new(), 0),
        OutboundPolicy::RegistryOnly => return block_all(view),
    };
    let mut forward = to_cluster(&cluster);
    forward.max_grpc_timeout = Some(Duration::ZERO);
    forward.append_x_forwarded_host = view.mesh.headers.forwarded_host;
    unknown_hosts(view, "allow_any", default_route("allow_any", forward, None))
}

fn block_all(view: &View<'_>) -> VirtualHost {
    let mut route = default_route("block_all", Forward::default(), None);
    route.action = RouteAction::Direct { status: 502, body: Vec::new() };
    unknown_hosts(view, "block_all", route)
}

fn unknown_hosts(view: &View<'_>, name: &str, route: Route) -> VirtualHost {
    VirtualHost {
        name: Name::from(name),
        domains: vec!["*".to_owned()],
        routes: vec![route],
        include_request_attempt_count: view.mesh.headers.attempt_count,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Mesh, port, service, web};
    use super::*;

    fn table_of(mesh: &Mesh, name: &str) -> RouteTable {
        mesh.with_view(|v| table(v, name)).expect("table")
    }

    fn clusters(route: &Route) -> Vec<String> {
        match &route.action {
            RouteAction::Forward(f) => f.clusters.iter().map(|c| c.name.to_string()).collect(),
            _ => Vec::new(),
        }
    }

    fn host_names(table: &RouteTable) -> Vec<&str> {
        table.virtual_hosts.iter().map(|v| &*v.name).collect()
    }

    #[test]
    fn services_without_rules_get_their_default_route() {
        let table = table_of(&Mesh::new(vec![web()]), "80");
        assert_eq!(host_names(&table), ["web.app.svc.cluster.local:80", "allow_any"]);
        let web = &table.virtual_hosts[0];
        assert_eq!(
            web.domains,
            ["web.app.svc.cluster.local", "web.app.svc.cluster.local.", "web", "web.app.svc", "web.app", "10.97.0.1"]
        );
        assert_eq!(clusters(&web.routes[0]), ["outbound|80||web.app.svc.cluster.local"]);
        assert_eq!(web.routes[0].decorator.as_deref(), Some("web.app.svc.cluster.local:80/*"));
    }

    #[test]
    fn a_sniffed_table_answers_to_every_name() {
        let table = table_of(&Mesh::new(vec![web()]), "web.app.svc.cluster.local:6000");
        assert_eq!(host_names(&table), ["web.app.svc.cluster.local:6000"]);
        assert_eq!(table.virtual_hosts[0].domains, ["*"]);
    }

    #[test]
    fn names_without_service_live_on_port_80_only() {
        let mut mesh = Mesh::new(vec![web()]);
        mesh.route("r", "{hosts: [x.com], http: [{route: [{destination: {host: web}}]}]}");
        assert_eq!(host_names(&table_of(&mesh, "80")), ["web.app.svc.cluster.local:80", "x.com:80", "allow_any"]);
        assert_eq!(host_names(&table_of(&mesh, "9090")), ["web.app.svc.cluster.local:9090", "allow_any"]);
    }

    #[test]
    fn everything_pruned_falls_back_to_the_default_route() {
        let mut mesh = Mesh::new(vec![web()]);
        mesh.route(
            "r",
            "{hosts: [web], http: [{match: [{sourceLabels: {app: other}}], route: [{destination: {host: shadow}}]}]}",
        );
        let table = table_of(&mesh, "80");
        assert_eq!(clusters(&table.virtual_hosts[0].routes[0]), ["outbound|80||web.app.svc.cluster.local"]);
    }

    #[test]
    fn the_closest_host_owns_a_service() {
        let http = |name: &str| service(name, None, vec![port("http", 80, Protocol::Http)]);
        let mut mesh = Mesh::new(vec![http("a"), http("b")]);
        mesh.route("wild", "{hosts: ['*.cluster.local'], http: [{route: [{destination: {host: w}}]}]}");
        mesh.route("exact", "{hosts: [a], http: [{route: [{destination: {host: e}}]}]}");
        let table = table_of(&mesh, "80");
        assert_eq!(host_names(&table), ["a.app.svc.cluster.local:80", "b.app.svc.cluster.local:80", "allow_any"]);
        assert_eq!(clusters(&table.virtual_hosts[0].routes[0]), ["outbound|80||e.app.svc.cluster.local"]);
        assert_eq!(clusters(&table.virtual_hosts[1].routes[0]), ["outbound|80||w.app.svc.cluster.local"]);
    }

    #[test]
    fn weights_are_named_after_their_virtual_service() {
        let mut mesh = Mesh::new(vec![web()]);
        mesh.route(
            "r",
            "{hosts: [web], http: [{route: [{destination: {host: web, subset: a}, weight: 90}, \
             {destination: {host: web, subset: b}, weight: 10}]}]}",
        );
        let route = &table_of(&mesh, "80").virtual_hosts[0].routes[0];
        assert_eq!(route.decorator.as_deref(), Some("r:80/*"));
        assert_eq!(route.config.as_deref(), Some("/apis/networking.istio.io/v1/namespaces/app/virtual-service/r"));
        assert_eq!(clusters(route).len(), 2);
    }

    #[test]
    fn an_external_name_is_another_name_of_its_service() {
        let mut alias = service("alias", None, vec![port("http", 80, Protocol::Http)]);
        alias.resolution = Resolution::Alias;
        alias.external_name = Some("web.app.svc.cluster.local".to_owned());
        let table = table_of(&Mesh::new(vec![web(), alias]), "80");
        assert_eq!(host_names(&table), ["web.app.svc.cluster.local:80", "allow_any"]);
        assert!(table.virtual_hosts[0].domains.contains(&"alias".to_owned()));
    }
}
