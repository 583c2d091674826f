//! Outbound listeners: `virtualOutbound`, and one for every address and port by which services are called.
//!
//! Declared HTTP ports share `0.0.0.0_port` and leave the rest to their route table; everything else has a listener
//! at the service's address. Where two ports meet on one key their chains are merged, HTTP told from TCP by the
//! first bytes, and of two chains with the same match the older service's stays.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::inbound::{self, plaintext_http};
use super::outbound_chain::{Content, Draft, Site, tcp_drafts};
use super::view::{Interception, OutboundPolicy, View, aliases};
use super::{http, outbound_chain};
use crate::model::{
    Address, ChainMatch, Direction, FilterChain, Listener, ListenerFilter, ListenerFilterKind, Name, NetworkFilter,
    RouteSource,
};
use crate::registry::{Protocol, Provider, Resolution, Service, ServicePort};

/// Limit of a chain's handshake; none of these chains has one, istiod sets it all the same.
const CHAIN_CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Kind of traffic on a listener so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Http,
    Tcp(Protocol),
    Sniffed,
}

/// A listener in the making.
struct Entry {
    class: Class,
    drafts: Vec<Draft>,
    /// It has a socket of its own.
    bound: bool,
    /// A Sidecar's own listener: what else there is of its port is not wanted on it.
    closed: bool,
}

/// Where the listeners of a set of services are.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// Their address; `None` follows from service and port.
    bind: Option<&'a str>,
    bound: bool,
}

type Entries = BTreeMap<(String, u16), Entry>;

/// All outbound listeners of a proxy. Those of a proxy whose traffic is not captured have sockets at the loopback address.
pub fn listeners(view: &View<'_>) -> Vec<Listener> {
    let mut entries = Entries::new();
    if view.egress.is_empty() {
        every_port(view, place(view, "", false, None).as_place(), &mut entries);
    }
    for egress in view.egress.iter().filter(|e| !e.bind.starts_with("unix://")) {
        let seen = view.through(egress);
        let place = place(view, &egress.bind, egress.bound, egress.port.as_ref());
        match &egress.port {
            Some(port) => own_port(&seen, place.as_place(), port, &mut entries),
            None => {
                entries.values_mut().for_each(|entry| entry.closed = true);
                every_port(&seen, place.as_place(), &mut entries);
            }
        }
    }
    let mut out: Vec<Listener> = entries.into_iter().map(|(key, entry)| finish(view, key, entry)).collect();
    if !view.is_uncaptured() {
        out.push(virtual_outbound(view));
    }
    out
}

/// An address that was chosen, with its owner.
struct Chosen {
    bind: Option<String>,
    bound: bool,
}

impl Chosen {
    fn as_place(&self) -> Place<'_> {
        Place { bind: self.bind.as_deref(), bound: self.bound }
    }
}

/// Where an egress listener is: at the address that it names, else, with a socket, at the loopback address, and captured
/// on a port of its own at the wildcard address.
fn place(view: &View<'_>, bind: &str, bound: bool, port: Option<&ServicePort>) -> Chosen {
    let bound = bound || view.is_uncaptured();
    let wildcard = inbound::wildcard(view.proxy);
    let bind = match (bind, bound, port) {
        ("", true, _) if wildcard.is_ipv6() => Some(Ipv6Addr::LOCALHOST.to_string()),
        ("", true, _) => Some(Ipv4Addr::LOCALHOST.to_string()),
        ("", false, Some(_)) => Some(wildcard.to_string()),
        ("", false, None) => None,
        (bind, ..) => Some(bind.to_owned()),
    };
    Chosen { bind, bound }
}

/// One port, spoken as the Sidecar says, for every service of the listener.
fn own_port(view: &View<'_>, place: Place<'_>, port: &ServicePort, entries: &mut Entries) {
    for service in view.services.iter().filter(|s| s.resolution != Resolution::Alias) {
        add(view, entries, (service, port, &[]), place);
    }
}

fn every_port(view: &View<'_>, place: Place<'_>, entries: &mut Entries) {
    let alias_names = aliases(view.services);
    for service in view.services.iter().filter(|s| s.resolution != Resolution::Alias) {
        let aliases = alias_names.get(service.hostname.as_str()).map_or(&[][..], Vec::as_slice);
        for port in &service.ports {
            add(view, entries, (service, port, aliases), place);
        }
    }
}

/// Names of the route tables that a set of listeners asks for.
pub fn route_names(listeners: &[Listener]) -> Vec<Name> {
    let chains = listeners.iter().flat_map(|l| l.filter_chains.iter().chain(&l.default_filter_chain));
    let mut out: Vec<Name> = chains
        .flat_map(|c| &c.filters)
        .filter_map(|f| match f {
            NetworkFilter::Http(hcm) => match &hcm.routes {
                RouteSource::Rds(name) => Some(Name::clone(name)),
                RouteSource::Inline(_) => None,
            },
            _ => None,
        })
        .collect();
    out.sort();
    out.dedup();
    out
}

fn add(
    view: &View<'_>,
    entries: &mut Entries,
    (service, port, aliases): (&Service, &ServicePort, &[&str]),
    place: Place<'_>,
) {
    let needs_wildcard = port.protocol.is_http() || place.bound;
    if port.protocol == Protocol::Udp || (needs_wildcard && view.is_reserved(port.number)) {
        return;
    }
    let wildcard = inbound::wildcard(view.proxy).to_string();
    let at = |bind: &str, cidrs: &[String], entries: &mut Entries| {
        insert(view, entries, Site { service, port, bind, cidrs, aliases }, place.bound);
    };
    if let Some(bind) = place.bind {
        return at(bind, &[], entries);
    }
    if port.protocol.is_http() {
        return at(&wildcard, &[], entries);
    }
    if is_per_endpoint(service) {
        return per_endpoint(view, service, port, &mut |bind| at(bind, &[], entries));
    }
    if service.addresses.is_empty() {
        let unspecified = if service.provider == Provider::External { wildcard.as_str() } else { "0.0.0.0" };
        return at(unspecified, &[], entries);
    }
    let listened = if service.provider == Provider::Kubernetes { 1 } else { service.addresses.len() };
    for address in service.addresses.iter().take(listened) {
        if address.contains('/') {
            at(&wildcard, std::slice::from_ref(address), entries);
        } else {
            at(address, &[], entries);
        }
    }
}

/// Without an address of its own a headless service is known by its endpoints'.
fn is_per_endpoint(service: &Service) -> bool {
    service.resolution == Resolution::Passthrough && service.addresses.iter().all(|a| a == "0.0.0.0")
}

fn per_endpoint(view: &View<'_>, service: &Service, port: &ServicePort, at: &mut dyn FnMut(&str)) {
    let endpoints = (view.endpoints)(service, port.number);
    if endpoints.is_empty() && service.provider != Provider::Kubernetes && service.selector.is_empty() {
        return at(&inbound::wildcard(view.proxy).to_string());
    }
    let own = view.proxy.ips.first();
    for endpoint in endpoints {
        // What the workload sends to itself never leaves it.
        if let Address::Socket(address) = endpoint.address
            && Some(&address.ip()) != own
        {
            at(&address.ip().to_string());
        }
    }
}

fn insert(view: &View<'_>, entries: &mut Entries, site: Site<'_>, bound: bool) {
    let protocol = site.port.protocol;
    let key = (site.bind.to_owned(), site.port.number);
    let wildcard = inbound::wildcard(view.proxy).to_string();
    let existing = entries.get_mut(&key);
    if existing.as_ref().is_some_and(|entry| entry.closed) {
        return;
    }
    if protocol == Protocol::HttpProxy {
        if existing.is_none() {
            let content = Content::Http(site.port.number.to_string(), protocol);
            let draft = Draft { sni: Vec::new(), cidrs: Vec::new(), http: Vec::new(), content };
            entries.insert(key, Entry { class: Class::Http, drafts: vec![draft], bound, closed: false });
        }
        return;
    }
    let incoming = class_of(protocol);
    match existing {
        None => {
            let class = if incoming == Class::Http && site.bind == wildcard { Class::Sniffed } else { incoming };
            let drafts = drafts(view, site, &wildcard);
            entries.insert(key, Entry { class, drafts, bound, closed: false });
        }
        Some(entry) => merge(view, entry, incoming, site, &wildcard),
    }
}

fn class_of(protocol: Protocol) -> Class {
    match protocol {
        p if p.is_http() => Class::Http,
        Protocol::Auto => Class::Sniffed,
        p => Class::Tcp(p),
    }
}

/// A second port on a listener's key.
fn merge(view: &View<'_>, entry: &mut Entry, incoming: Class, site: Site<'_>, wildcard: &str) {
    // The HTTP chain is there already; its route table holds this service too.
    if incoming == Class::Http && !matches!(entry.class, Class::Tcp(_)) {
        return;
    }
    if breaks_server_first(entry.class, incoming) {
        return;
    }
    let drafts = match (entry.class, incoming) {
        (Class::Http, Class::Sniffed) => {
            entry.class = Class::Sniffed;
            entry.drafts = drafts(view, site, wildcard);
            return;
        }
        (Class::Sniffed, Class::Sniffed) => tcp_drafts(view, site),
        _ => drafts(view, site, wildcard),
    };
    for draft in drafts {
        if !entry.drafts.iter().any(|existing| existing.conflicts_with(&draft)) {
            entry.drafts.push(draft);
        }
    }
    let mixed =
        matches!((entry.class, incoming), (Class::Tcp(_), Class::Http | Class::Sniffed) | (Class::Http, Class::Tcp(_)));
    if mixed {
        entry.class = Class::Sniffed;
    }
}

/// In MongoDB and MySQL the server speaks first: sniffing beside them would hang them.
fn breaks_server_first(existing: Class, incoming: Class) -> bool {
    let server_first = |c: Class| matches!(c, Class::Tcp(Protocol::Mongo | Protocol::Mysql));
    (server_first(existing) || server_first(incoming)) && existing != incoming
}

/// Chains of one service port alone.
fn drafts(view: &View<'_>, site: Site<'_>, wildcard: &str) -> Vec<Draft> {
    let number = site.port.number;
    let http = |table: String, found: Vec<String>| Draft {
        sni: Vec::new(),
        cidrs: Vec::new(),
        http: found,
        content: Content::Http(table, site.port.protocol),
    };
    let sniffed = || plaintext_http(view.mesh.http10);
    match class_of(site.port.protocol) {
        Class::Http if site.bind == wildcard => vec![http(number.to_string(), sniffed())],
        Class::Http => vec![http(number.to_string(), Vec::new())],
        Class::Tcp(_) => tcp_drafts(view, site),
        Class::Sniffed => {
            let own = site.bind != wildcard;
            let table = if own { format!("{}:{number}", site.service.hostname) } else { number.to_string() };
            let mut out = tcp_drafts(view, site);
            out.push(http(table, sniffed()));
            out
        }
    }
}

fn finish(view: &View<'_>, (bind, port): (String, u16), entry: Entry) -> Listener {
    let name = format!("{bind}_{port}");
    let needs_tls = entry.drafts.iter().any(|d| !d.sni.is_empty());
    let needs_http = entry.drafts.iter().any(|d| !d.http.is_empty());
    let mut default = None;
    let mut chains = Vec::new();
    for draft in &entry.drafts {
        let chain = chain(view, &name, draft);
        if draft.is_match_all() {
            default = Some(chain);
        } else {
            chains.push(chain);
        }
    }
    if chains.is_empty() {
        chains.extend(default.take());
    } else if default.is_none() {
        default = Some(fallthrough(view));
    }
    let mut listener = empty(view, &name, &bind, port);
    if entry.bound {
        listener.bind_to_port = true;
        listener.max_accepts_per_event = Some(1);
    }
    let inspector = |kind| ListenerFilter { kind, disabled: None };
    if needs_tls {
        let kind = ListenerFilterKind::TlsInspector { initial_read_buffer_size: Some(512) };
        listener.listener_filters.push(inspector(kind));
    }
    if needs_http {
        listener.listener_filters.push(inspector(ListenerFilterKind::HttpInspector));
        listener.listener_filters_timeout = view.mesh.detection_timeout;
    }
    // A network is listened for on the wildcard addresses of every family that the proxy has.
    let networks = entry.drafts.iter().any(|d| !d.cidrs.is_empty());
    if networks {
        listener.additional_addresses = inbound::other_family(view.proxy, port);
    }
    listener.filter_chains = chains;
    listener.default_filter_chain = default;
    listener
}

fn chain(view: &View<'_>, listener: &str, draft: &Draft) -> FilterChain {
    let filters = match &draft.content {
        Content::Tcp(filters) => filters.clone(),
        Content::Http(table, protocol) => {
            let routes = RouteSource::Rds(Name::from(table.as_str()));
            let hcm = http::outbound(view, format!("outbound_{listener};"), routes, *protocol);
            vec![NetworkFilter::Http(Box::new(hcm))]
        }
    };
    FilterChain {
        matches: draft.to_match(),
        filters,
        transport_socket_connect_timeout: Some(CHAIN_CONNECT_TIMEOUT),
        ..FilterChain::default()
    }
}

/// Where connections go that no chain of a listener explains.
fn fallthrough(view: &View<'_>) -> FilterChain {
    FilterChain { name: Name::from("PassthroughFilterChain"), filters: unknown(view), ..FilterChain::default() }
}

fn unknown(view: &View<'_>) -> Vec<NetworkFilter> {
    let cluster = match &view.mesh.outbound {
        OutboundPolicy::AllowAny => "PassthroughCluster".to_owned(),
        OutboundPolicy::RegistryOnly => "BlackHoleCluster".to_owned(),
        OutboundPolicy::EgressProxy(d) => outbound_chain::cluster(view, d, 0),
    };
    let proxy = NetworkFilter::TcpProxy(inbound::tcp_proxy(view, Direction::Outbound, &cluster));
    inbound::stats(view, Direction::Outbound).into_iter().chain([proxy]).collect()
}

fn virtual_outbound(view: &View<'_>) -> Listener {
    let port = view.mesh.outbound_port;
    let mut blackhole = inbound::tcp_proxy(view, Direction::Outbound, "BlackHoleCluster");
    blackhole.idle_timeout = None;
    blackhole.access_log = Vec::new();
    let own_port = FilterChain {
        name: Name::from("virtualOutbound-blackhole"),
        matches: ChainMatch { destination_port: Some(port), ..ChainMatch::default() },
        filters: inbound::stats(view, Direction::Outbound)
            .into_iter()
            .chain([NetworkFilter::TcpProxy(blackhole)])
            .collect(),
        ..FilterChain::default()
    };
    let rest = FilterChain {
        name: Name::from("virtualOutbound-catchall-tcp"),
        filters: unknown(view),
        ..FilterChain::default()
    };
    let mut listener = empty(view, "virtualOutbound", &inbound::wildcard(view.proxy).to_string(), port);
    listener.additional_addresses = inbound::other_family(view.proxy, port);
    listener.bind_to_port = true;
    listener.use_original_dst = true;
    listener.transparent = view.mesh.interception == Interception::Tproxy;
    listener.continue_on_listener_filters_timeout = false;
    listener.filter_chains = vec![own_port, rest];
    listener.access_log.clone_from(&view.mesh.outbound_told.listener_access_log);
    listener.exact_balance = false;
    listener.max_accepts_per_event = Some(1);
    listener
}

fn empty(view: &View<'_>, name: &str, bind: &str, port: u16) -> Listener {
    let address = match bind.parse::<IpAddr>() {
        Ok(ip) => Address::Socket(SocketAddr::new(ip, port)),
        Err(_) => Address::Pipe(bind.trim_start_matches("unix://").to_owned()),
    };
    Listener {
        name: Name::from(name),
        address,
        additional_addresses: Vec::new(),
        direction: Direction::Outbound,
        bind_to_port: false,
        use_original_dst: false,
        transparent: false,
        listener_filters: Vec::new(),
        listener_filters_timeout: None,
        continue_on_listener_filters_timeout: true,
        filter_chains: Vec::new(),
        default_filter_chain: None,
        access_log: Vec::new(),
        exact_balance: view.mesh.outbound_exact_balance,
        max_accepts_per_event: None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Mesh, port, service, web};
    use super::*;

    fn names(mesh: &Mesh) -> Vec<String> {
        mesh.with_view(|v| listeners(v).iter().map(|l| l.name.to_string()).collect())
    }

    fn named(mesh: &Mesh, name: &str) -> Listener {
        mesh.with_view(|v| listeners(v).into_iter().find(|l| &*l.name == name)).expect("listener")
    }

    fn clusters(chain: &FilterChain) -> Vec<String> {
        match chain.filters.last() {
            Some(NetworkFilter::TcpProxy(p)) => p.clusters.iter().map(|c| c.cluster.to_string()).collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn one_listener_for_each_way_of_calling() {
        let mesh = Mesh::new(vec![web(), service("shadow", Some("10.97.0.2"), vec![port("http", 80, Protocol::Http)])]);
        assert_eq!(names(&mesh), ["0.0.0.0_80", "0.0.0.0_9090", "10.97.0.1_6000", "10.97.0.1_7000", "virtualOutbound"]);
        let tables = mesh.with_view(|v| route_names(&listeners(v)));
        assert_eq!(tables.iter().map(|n| &**n).collect::<Vec<_>>(), ["80", "9090", "web.app.svc.cluster.local:6000"]);
    }

    #[test]
    fn http_ports_leave_other_bytes_to_the_default_chain() {
        let listener = named(&Mesh::new(vec![web()]), "0.0.0.0_80");
        assert_eq!(listener.filter_chains[0].matches.application_protocols, ["http/1.1", "h2c"]);
        let default = listener.default_filter_chain.expect("default chain");
        assert_eq!(
            (&*default.name, clusters(&default)),
            ("PassthroughFilterChain", vec!["PassthroughCluster".to_owned()])
        );
        assert!(!listener.bind_to_port);
    }

    #[test]
    fn sniffed_ports_have_both() {
        let listener = named(&Mesh::new(vec![web()]), "10.97.0.1_6000");
        let default = listener.default_filter_chain.expect("default chain");
        assert_eq!(clusters(&default), ["outbound|6000||web.app.svc.cluster.local"]);
        assert_eq!(listener.filter_chains.len(), 1);
    }

    #[test]
    fn tcp_services_without_address_collapse_onto_the_first() {
        let tcp = |name: &str| service(name, None, vec![port("tcp", 5000, Protocol::Tcp)]);
        let listener = named(&Mesh::new(vec![tcp("a"), tcp("b")]), "0.0.0.0_5000");
        assert_eq!(listener.filter_chains.len(), 1);
        assert_eq!(clusters(&listener.filter_chains[0]), ["outbound|5000||a.app.svc.cluster.local"]);
    }

    #[test]
    fn http_over_tcp_is_sniffed() {
        let tcp = service("a", None, vec![port("tcp", 5000, Protocol::Tcp)]);
        let http = service("b", None, vec![port("http", 5000, Protocol::Http)]);
        let listener = named(&Mesh::new(vec![tcp, http]), "0.0.0.0_5000");
        assert_eq!(listener.filter_chains.len(), 1, "the HTTP chain");
        let default = listener.default_filter_chain.expect("the TCP chain");
        assert_eq!(clusters(&default), ["outbound|5000||a.app.svc.cluster.local"]);
    }

    #[test]
    fn server_first_protocols_are_never_sniffed() {
        let mongo = service("a", None, vec![port("mongo", 5000, Protocol::Mongo)]);
        let http = service("b", None, vec![port("http", 5000, Protocol::Http)]);
        let listener = named(&Mesh::new(vec![mongo, http]), "0.0.0.0_5000");
        assert!(listener.listener_filters.is_empty());
    }

    #[test]
    fn tls_routes_choose_by_sni() {
        let mut mesh = Mesh::new(vec![service("a", Some("10.97.0.9"), vec![port("tls", 443, Protocol::Tls)])]);
        mesh.route(
            "r",
            "{hosts: [a], tls: [{match: [{sniHosts: [x.com, a.com]}], route: [{destination: {host: b}}]}]}",
        );
        let listener = named(&mesh, "10.97.0.9_443");
        assert_eq!(listener.filter_chains[0].matches.server_names, ["a.com", "x.com"]);
        assert_eq!(clusters(&listener.filter_chains[0]), ["outbound|443||b.app.svc.cluster.local"]);
        assert!(matches!(listener.listener_filters[0].kind, ListenerFilterKind::TlsInspector { .. }));
        assert!(listener.default_filter_chain.is_some());
    }

    #[test]
    fn tcp_routes_by_weight() {
        let mut mesh = Mesh::new(vec![service("a", Some("10.97.0.9"), vec![port("tcp", 5000, Protocol::Tcp)])]);
        mesh.route(
            "r",
            "{hosts: [a], tcp: [{route: [{destination: {host: a, subset: x}, weight: 1}, \
             {destination: {host: a, subset: y}, weight: 3}]}]}",
        );
        let listener = named(&mesh, "10.97.0.9_5000");
        let Some(NetworkFilter::TcpProxy(p)) = listener.filter_chains[0].filters.last() else { panic!("no proxy") };
        assert_eq!(p.stat_prefix, "r.app");
        assert_eq!(p.clusters.iter().map(|c| c.weight).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn registry_only_refuses_what_nobody_knows() {
        let mut mesh = Mesh::new(vec![web()]);
        mesh.settings.outbound = OutboundPolicy::RegistryOnly;
        let outbound = named(&mesh, "virtualOutbound");
        assert_eq!(clusters(&outbound.filter_chains[1]), ["BlackHoleCluster"]);
    }
}
