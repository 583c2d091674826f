//! `virtualInbound`: what the proxy does with connections to its own workload.
//!
//! Decides the chains for every port: which bytes are mTLS, which are HTTP, and where they go. STRICT refuses
//! plaintext by having no chain for it. A declared port is `port x mode`; everything else takes the passthrough chains.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use super::view::{Interception, View};
use super::{hosts, http, route, tls};
use crate::istio::peer_authentication::Mode;
use crate::istio::sidecar::ServerTls;
use crate::model::{
    Address, ChainMatch, Direction, FilterChain, Listener, ListenerFilter, ListenerFilterKind, Name, NetworkFilter,
    PortPredicate, RouteSource, RouteTable, TcpProxy, TransportProtocol, VirtualHost, WeightedName,
};
use crate::registry::{Protocol, Proxy};

const PASSTHROUGH: &str = "InboundPassthroughCluster";

/// ALPN names by which a client sidecar says that it sends HTTP.
const MTLS_HTTP: &[&str] = &["istio-http/1.0", "istio-http/1.1", "istio-h2"];
/// ALPN names by which a client sidecar says that it sends anything else.
const MTLS_TCP: &[&str] = &["istio-peer-exchange", "istio"];
/// All of them: on a declared port only mTLS itself is in question.
const MTLS_ANY: &[&str] = &["istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2"];

/// What a set of chains leads to.
struct Target<'a> {
    cluster: String,
    /// Workload port; `None` matches every port.
    port: Option<u16>,
    /// Port by which the service is called; zero for passthrough.
    service_port: u16,
    protocol: Protocol,
    /// Host of the service, for traces.
    host: &'a str,
    /// Address in the names of its chains.
    bind: &'a str,
    /// It is listened on.
    bound: bool,
    /// TLS of its own, where the mesh asks for none.
    tls: Option<&'a ServerTls>,
}

/// One chain of a port, before its filters.
struct Shape {
    transport: TransportProtocol,
    alpn: Vec<String>,
    http: bool,
    terminate: bool,
}

/// The wildcard address of the proxy's family.
pub(super) fn wildcard(proxy: &Proxy) -> IpAddr {
    if !proxy.ips.is_empty() && proxy.ips.iter().all(IpAddr::is_ipv6) {
        return IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    }
    IpAddr::V4(Ipv4Addr::UNSPECIFIED)
}

/// The wildcard address of the family that [`wildcard`] is not of, for a proxy that has both: what is captured of it has
/// to arrive as well. istiod adds it only under a flag, and refuses the connections without.
pub(super) fn other_family(proxy: &Proxy, port: u16) -> Vec<Address> {
    let both = proxy.ips.iter().any(IpAddr::is_ipv4) && proxy.ips.iter().any(IpAddr::is_ipv6);
    both.then(|| Address::Socket((Ipv6Addr::UNSPECIFIED, port).into())).into_iter().collect()
}

/// Plaintext HTTP as the HTTP inspector tells it.
pub(super) fn plaintext_http(http10: bool) -> Vec<String> {
    let names: &[&str] = if http10 { &["http/1.0", "http/1.1", "h2c"] } else { &["http/1.1", "h2c"] };
    strings(names)
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

/// The listener of captured inbound traffic, where there is any, and those of a Sidecar's ports that are listened on.
pub fn listeners(view: &View<'_>) -> Vec<Listener> {
    let served = served(view);
    let captured = (!view.is_uncaptured()).then(|| captured(view, &served));
    let own = served.values().filter(|target| target.bound).map(|target| bound(view, target));
    captured.into_iter().chain(own).collect()
}

/// Chains of one declared port.
fn of_port(view: &View<'_>, target: &Target<'_>) -> Vec<FilterChain> {
    let mode = view.mtls.port(target.port.unwrap_or_default());
    match target.tls {
        // Beside the mesh's own TLS there is no room for another.
        Some(tls) if mode == Mode::Disable => own_tls(view, target, tls),
        _ => chains(view, target, mode),
    }
}

/// Chains behind TLS that a Sidecar says: nothing else is let in.
fn own_tls(view: &View<'_>, target: &Target<'_>, said: &ServerTls) -> Vec<FilterChain> {
    let inside = match target.protocol {
        Protocol::Https => Protocol::Http,
        Protocol::Tls => Protocol::Tcp,
        other => other,
    };
    let target = Target { protocol: inside, cluster: target.cluster.clone(), ..*target };
    let mut out: Vec<FilterChain> =
        shapes(false, inside, Mode::Strict).into_iter().map(|shape| chain(view, &target, shape)).collect();
    // Who speaks plain TLS sends no ALPN of the mesh.
    out.retain(|chain| chain.matches.application_protocols.is_empty());
    out.iter_mut().for_each(|chain| chain.tls = Some(tls::of_sidecar(said)));
    out
}

/// A port of a Sidecar with a socket of its own.
fn bound(view: &View<'_>, target: &Target<'_>) -> Listener {
    let port = target.port.unwrap_or_default();
    let mut chains = of_port(view, target);
    if let Some(object) = &view.policies.unusable {
        chains.iter_mut().for_each(|c| c.unusable = Some(object.clone()));
    }
    let ip = target.bind.parse().unwrap_or_else(|_| wildcard(view.proxy));
    Listener {
        name: Name::from(chain_name(view, target, false)),
        address: Address::Socket(SocketAddr::new(ip, port)),
        additional_addresses: Vec::new(),
        listener_filters: inspectors(&chains),
        filter_chains: chains,
        use_original_dst: false,
        transparent: false,
        exact_balance: false,
        access_log: Vec::new(),
        ..skeleton(view)
    }
}

fn captured(view: &View<'_>, served: &BTreeMap<u16, Target<'_>>) -> Listener {
    let mut chains = vec![blackhole(view)];
    chains.extend(passthrough(view, served));
    for target in served.values().filter(|target| !target.bound) {
        chains.extend(of_port(view, target));
    }
    if let Some(object) = &view.policies.unusable {
        chains.iter_mut().skip(1).for_each(|c| c.unusable = Some(object.clone()));
    }
    Listener { listener_filters: listener_filters(view, &chains), filter_chains: chains, ..skeleton(view) }
}

fn skeleton(view: &View<'_>) -> Listener {
    Listener {
        name: Name::from("virtualInbound"),
        address: Address::Socket(SocketAddr::new(wildcard(view.proxy), view.mesh.inbound_port)),
        additional_addresses: other_family(view.proxy, view.mesh.inbound_port),
        direction: Direction::Inbound,
        bind_to_port: true,
        use_original_dst: false,
        transparent: view.mesh.interception == Interception::Tproxy,
        listener_filters: Vec::new(),
        listener_filters_timeout: view.mesh.detection_timeout,
        continue_on_listener_filters_timeout: true,
        filter_chains: Vec::new(),
        default_filter_chain: None,
        access_log: view.mesh.inbound_told.listener_access_log.clone(),
        exact_balance: view.mesh.inbound_exact_balance,
        max_accepts_per_event: Some(1),
    }
}

/// Service ports by workload port; of several services on one port the oldest decides.
fn served<'a>(view: &View<'a>) -> BTreeMap<u16, Target<'a>> {
    let mut out = BTreeMap::new();
    for t in view.targets {
        // What is not captured has to be asked for.
        let unheard = view.is_uncaptured() && t.ingress.is_none();
        if t.port.protocol == Protocol::Udp || view.is_reserved(t.target_port) || unheard {
            continue;
        }
        out.entry(t.target_port).or_insert_with(|| Target {
            cluster: format!("inbound|{}||", t.target_port),
            port: Some(t.target_port),
            service_port: t.port.number,
            protocol: t.port.protocol,
            host: t.ingress.as_ref().map_or(&t.service.hostname, |i| &i.host),
            bind: t.ingress.as_ref().map_or("", |i| &i.bind),
            bound: t.ingress.as_ref().is_some_and(|i| i.bound),
            tls: t.ingress.as_ref().and_then(|i| i.tls.as_ref()),
        });
    }
    out
}

/// Connections to the listener's own port would come back for ever.
fn blackhole(view: &View<'_>) -> FilterChain {
    let mut proxy = tcp_proxy(view, Direction::Inbound, "BlackHoleCluster");
    proxy.idle_timeout = None;
    proxy.access_log = Vec::new();
    FilterChain {
        name: Name::from("virtualInbound-blackhole"),
        matches: ChainMatch { destination_port: Some(view.mesh.inbound_port), ..ChainMatch::default() },
        filters: [metadata_exchange()]
            .into_iter()
            .chain(stats(view, Direction::Inbound))
            .chain([NetworkFilter::TcpProxy(proxy)])
            .collect(),
        ..FilterChain::default()
    }
}

/// Chains for ports that no service declares, and for those of them that have a mode of their own.
fn passthrough(view: &View<'_>, served: &BTreeMap<u16, Target<'_>>) -> Vec<FilterChain> {
    let declared: BTreeSet<u16> = view.targets.iter().map(|t| t.target_port).collect();
    let own = view.mtls.ports.keys().filter(|p| !declared.contains(p) && !served.contains_key(p));
    let ports = std::iter::once(None).chain(own.map(|p| Some(*p)));
    let target = |port| Target {
        cluster: PASSTHROUGH.to_owned(),
        port,
        service_port: 0,
        protocol: Protocol::Auto,
        host: "",
        bind: "",
        bound: false,
        tls: None,
    };
    ports.flat_map(|p| chains(view, &target(p), p.map_or(view.mtls.mode, |p| view.mtls.port(p)))).collect()
}

fn chains(view: &View<'_>, target: &Target<'_>, mode: Mode) -> Vec<FilterChain> {
    shapes(view.mesh.http10, target.protocol, mode).into_iter().map(|shape| chain(view, target, shape)).collect()
}

/// The table of chains: protocol by mode.
fn shapes(http10: bool, protocol: Protocol, mode: Mode) -> Vec<Shape> {
    let mtls =
        |alpn: &[&str], http| Shape { transport: TransportProtocol::Tls, alpn: strings(alpn), http, terminate: true };
    let raw = |alpn: Vec<String>, http| Shape { transport: TransportProtocol::RawBuffer, alpn, http, terminate: false };
    let foreign_tls = || Shape { transport: TransportProtocol::Tls, alpn: Vec::new(), http: false, terminate: false };
    let sniffed = || plaintext_http(http10);
    let (http, auto) = (protocol.is_http(), protocol == Protocol::Auto);
    match mode {
        Mode::Strict if http => vec![mtls(&[], true)],
        Mode::Strict if auto => vec![mtls(MTLS_HTTP, true), mtls(&[], false)],
        Mode::Strict => vec![mtls(&[], false)],
        Mode::Permissive if http => vec![mtls(MTLS_ANY, true), raw(Vec::new(), true)],
        Mode::Permissive if auto => vec![
            mtls(MTLS_HTTP, true),
            raw(sniffed(), true),
            mtls(MTLS_TCP, false),
            raw(Vec::new(), false),
            foreign_tls(),
        ],
        Mode::Permissive => vec![mtls(MTLS_ANY, false), foreign_tls(), raw(Vec::new(), false)],
        Mode::Disable | Mode::Unset if http => vec![raw(Vec::new(), true)],
        Mode::Disable | Mode::Unset if auto => vec![raw(sniffed(), true), raw(Vec::new(), false)],
        Mode::Disable | Mode::Unset => vec![raw(Vec::new(), false)],
    }
}

fn chain(view: &View<'_>, target: &Target<'_>, shape: Shape) -> FilterChain {
    let filters = if shape.http { http_filters(view, target) } else { tcp_filters(view, target) };
    FilterChain {
        name: Name::from(chain_name(view, target, shape.http)),
        matches: ChainMatch {
            destination_port: target.port,
            transport_protocol: Some(shape.transport),
            application_protocols: shape.alpn,
            ..ChainMatch::default()
        },
        tls: shape.terminate.then(|| tls::inbound(view.mesh, !shape.http)),
        filters,
        ..FilterChain::default()
    }
}

fn chain_name(view: &View<'_>, target: &Target<'_>, http: bool) -> String {
    match (target.cluster == PASSTHROUGH, http) {
        (true, true) => "virtualInbound-catchall-http".to_owned(),
        (true, false) => "virtualInbound".to_owned(),
        (false, _) if target.bind.is_empty() => {
            format!("{}_{}", wildcard(view.proxy), target.port.unwrap_or_default())
        }
        (false, _) => format!("{}_{}", target.bind, target.port.unwrap_or_default()),
    }
}

fn http_filters(view: &View<'_>, target: &Target<'_>) -> Vec<NetworkFilter> {
    let stat_prefix = if target.cluster == PASSTHROUGH {
        format!("{PASSTHROUGH};")
    } else {
        format!("inbound_{};", chain_name(view, target, true))
    };
    let operation = format!("{}/*", hosts::with_port(target.host, target.service_port));
    let table = RouteTable {
        name: Name::from(target.cluster.as_str()),
        virtual_hosts: vec![VirtualHost {
            name: Name::from(format!("inbound|http|{}", target.service_port)),
            domains: vec!["*".to_owned()],
            routes: vec![route::default_inbound(view, &target.cluster, &operation, target.protocol)],
            include_request_attempt_count: false,
        }],
        ..RouteTable::default()
    };
    let hcm = http::inbound(view, stat_prefix, RouteSource::Inline(Arc::new(table)), target.protocol);
    vec![metadata_exchange(), NetworkFilter::Http(Box::new(hcm))]
}

fn tcp_filters(view: &View<'_>, target: &Target<'_>) -> Vec<NetworkFilter> {
    let mut filters = vec![metadata_exchange()];
    filters.extend(view.policies.tcp.iter().cloned().map(NetworkFilter::Rbac));
    filters.extend(stats(view, Direction::Inbound));
    filters.extend(protocol_filter(target.protocol));
    filters.push(NetworkFilter::TcpProxy(tcp_proxy(view, Direction::Inbound, &target.cluster)));
    filters
}

/// The statistics filter that istiod puts in front of some protocols; it does nothing here.
pub(super) fn protocol_filter(protocol: Protocol) -> Option<NetworkFilter> {
    (protocol == Protocol::Mongo).then(|| NetworkFilter::Inert {
        name: "envoy.filters.network.mongo_proxy".to_owned(),
        type_url: "type.googleapis.com/envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy".to_owned(),
    })
}

fn metadata_exchange() -> NetworkFilter {
    NetworkFilter::MetadataExchange(super::clusters::metadata_exchange())
}

/// Istio's metrics in a direction, where they are wanted.
pub(super) fn stats(view: &View<'_>, direction: Direction) -> Option<NetworkFilter> {
    view.mesh.told(direction).stats.clone().map(NetworkFilter::IstioStats)
}

/// A terminal filter to one cluster.
pub(super) fn tcp_proxy(view: &View<'_>, direction: Direction, cluster: &str) -> TcpProxy {
    TcpProxy {
        stat_prefix: cluster.to_owned(),
        clusters: vec![WeightedName { cluster: Name::from(cluster), weight: 1 }],
        idle_timeout: view.mesh.idle_timeout,
        max_downstream_connection_duration: None,
        hash_source_ip: false,
        tunneling: None,
        access_log: view.mesh.told(direction).access_log.clone(),
    }
}

/// Inspectors look only where some chain asks for their answer: an inspector that waits for bytes would hang
/// protocols in which the server speaks first.
fn listener_filters(view: &View<'_>, chains: &[FilterChain]) -> Vec<ListenerFilter> {
    let everywhere = |kind| ListenerFilter { kind, disabled: None };
    let mut out = vec![everywhere(ListenerFilterKind::OriginalDst)];
    if view.mesh.interception == Interception::Tproxy {
        out.push(everywhere(ListenerFilterKind::OriginalSrc { mark: 1337 }));
    }
    out.extend(inspectors(chains));
    out
}

fn inspectors(chains: &[FilterChain]) -> Vec<ListenerFilter> {
    let mut out = Vec::new();
    // Port zero stands for the chains of every other port.
    let mut needs: BTreeMap<u16, (bool, bool)> = BTreeMap::new();
    for chain in chains {
        let (tls, http) = needs.entry(chain.matches.destination_port.unwrap_or(0)).or_default();
        *tls |= chain.matches.transport_protocol == Some(TransportProtocol::Tls);
        *http |= chain.matches.application_protocols.iter().any(|a| a == "http/1.1" || a == "h2c");
    }
    if needs.values().any(|(tls, _)| *tls) {
        let kind = ListenerFilterKind::TlsInspector { initial_read_buffer_size: Some(512) };
        out.push(ListenerFilter { kind, disabled: tls_disabled(&needs) });
    }
    if needs.values().any(|(_, http)| *http) {
        let without = needs.iter().filter(|(_, (_, http))| !http).map(|(port, _)| *port).collect();
        out.push(ListenerFilter { kind: ListenerFilterKind::HttpInspector, disabled: any_of(without) });
    }
    out
}

/// Where undeclared ports need TLS inspection, the others opt out; where they do not, the others opt in.
fn tls_disabled(needs: &BTreeMap<u16, (bool, bool)>) -> Option<PortPredicate> {
    let by_default = needs.get(&0).is_some_and(|(tls, _)| *tls);
    let differ = needs.iter().filter(|(port, (tls, _))| **port != 0 && *tls != by_default).map(|(p, _)| *p).collect();
    let ports = any_of(differ)?;
    Some(if by_default { ports } else { PortPredicate::Not(Box::new(ports)) })
}

fn any_of(ports: Vec<u16>) -> Option<PortPredicate> {
    let mut ranges: Vec<PortPredicate> = ports.into_iter().map(|p| PortPredicate::Range(p, u32::from(p) + 1)).collect();
    match ranges.len() {
        0 => None,
        1 => ranges.pop(),
        _ => Some(PortPredicate::Or(ranges)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Mesh, web};
    use super::super::peer_auth::Effective;
    use super::*;

    fn summary(protocol: Protocol, mode: Mode) -> Vec<(bool, usize, bool, bool)> {
        let tls = |s: &Shape| s.transport == TransportProtocol::Tls;
        shapes(false, protocol, mode).iter().map(|s| (tls(s), s.alpn.len(), s.http, s.terminate)).collect()
    }

    #[test]
    fn strict_has_no_chain_for_plaintext() {
        for protocol in [Protocol::Http, Protocol::Tcp, Protocol::Auto] {
            assert!(summary(protocol, Mode::Strict).iter().all(|(tls, .., terminate)| *tls && *terminate));
        }
    }

    #[test]
    fn permissive_http_has_no_chain_for_foreign_tls() {
        assert_eq!(summary(Protocol::Http, Mode::Permissive), [(true, 5, true, true), (false, 0, true, false)]);
        assert_eq!(
            summary(Protocol::Tcp, Mode::Permissive),
            [(true, 5, false, true), (true, 0, false, false), (false, 0, false, false)]
        );
    }

    #[test]
    fn inspectors_are_off_where_nobody_asks() {
        let needs = BTreeMap::from([(0, (true, true)), (70, (false, false)), (80, (true, false))]);
        assert_eq!(tls_disabled(&needs), Some(PortPredicate::Range(70, 71)));
        let needs = BTreeMap::from([(0, (false, true)), (70, (true, false)), (80, (false, false))]);
        assert_eq!(tls_disabled(&needs), Some(PortPredicate::Not(Box::new(PortPredicate::Range(70, 71)))));
        assert_eq!(any_of(Vec::new()), None);
    }

    #[test]
    fn a_port_of_its_own_mode_has_its_own_chains() {
        let mut mesh = Mesh::new(vec![web()]);
        mesh.serve();
        mesh.mtls =
            Effective { mode: Mode::Strict, ports: BTreeMap::from([(7000, Mode::Disable), (1, Mode::Disable)]) };
        let listener = mesh.with_view(listeners).remove(0);
        let of = |port: u16| -> Vec<&FilterChain> {
            listener.filter_chains.iter().filter(|c| c.matches.destination_port == Some(port)).collect()
        };
        assert!(of(7000).iter().all(|c| c.tls.is_none()));
        assert!(of(80).iter().all(|c| c.tls.is_some()));
        assert_eq!(of(1).len(), 2, "a port that no service declares");
        assert_eq!(&*of(80)[0].name, "0.0.0.0_80");
    }

    #[test]
    fn a_refused_policy_leaves_no_chain_usable() {
        let mut mesh = Mesh::new(vec![web()]);
        mesh.serve();
        mesh.policies.unusable = Some("AuthorizationPolicy app/p".to_owned());
        let listener = mesh.with_view(listeners).remove(0);
        assert!(listener.filter_chains[1..].iter().all(|c| c.unusable.is_some()));
    }
}
