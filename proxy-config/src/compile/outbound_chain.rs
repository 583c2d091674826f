//! Chains of an outbound listener, before they are put into one: what they match and where they lead.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::inbound::{self, protocol_filter};
use super::view::{Rules, View};
use super::virtual_services::Routes;
use super::{hosts, route_match};
use crate::istio::virtual_service::{Destination, L4Match, RouteDestination, TlsMatch};
use crate::model::{ChainMatch, Direction, Name, NetworkFilter, TcpProxy, TransportProtocol, WeightedName};
use crate::registry::{Protocol, Provider, Resolution, Service, ServicePort};

/// A chain that can be compared with others and merged.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    /// SNI names; `*` is any.
    pub(super) sni: Vec<String>,
    /// Destination addresses.
    pub(super) cidrs: Vec<String>,
    /// What the HTTP inspector must have found; empty asks nothing.
    pub(super) http: Vec<String>,
    /// Filters.
    pub(super) content: Content,
}

/// What is behind a draft.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// Route table name and protocol of the port.
    Http(String, Protocol),
    /// Complete filters.
    Tcp(Vec<NetworkFilter>),
}

impl Draft {
    fn tcp(sni: Vec<String>, cidrs: Vec<String>, filters: Vec<NetworkFilter>) -> Self {
        Self { sni, cidrs, http: Vec::new(), content: Content::Tcp(filters) }
    }

    /// Whether nothing can fail to match.
    pub(super) fn is_match_all(&self) -> bool {
        (self.sni.is_empty() || self.sni.iter().any(|s| s == "*")) && self.http.is_empty() && self.cidrs.is_empty()
    }

    /// Whether two drafts would match the same connections as the data path sees it.
    pub(super) fn conflicts_with(&self, other: &Self) -> bool {
        self.http == other.http && self.sni_set() == other.sni_set() && self.networks() == other.networks()
    }

    fn sni_set(&self) -> BTreeSet<&str> {
        self.sni.iter().map(String::as_str).filter(|s| *s != "*").collect()
    }

    /// Bits behind the prefix do not count.
    fn networks(&self) -> BTreeSet<IpNet> {
        let unspecified = |n: &IpNet| n.addr().is_unspecified() && n.addr().is_ipv4();
        self.cidrs.iter().filter_map(|c| network(c)).filter(|n| !unspecified(n)).map(|n| n.trunc()).collect()
    }

    /// The match that goes into the listener.
    pub(super) fn to_match(&self) -> ChainMatch {
        if self.is_match_all() {
            return ChainMatch::default();
        }
        let mut server_names = Vec::new();
        if !self.sni.iter().any(|s| s == "*") {
            server_names.clone_from(&self.sni);
            server_names.sort();
        }
        let mut cidrs = self.cidrs.clone();
        cidrs.sort();
        let networks = cidrs.iter().filter_map(|c| network(c));
        ChainMatch {
            server_names,
            prefix_ranges: networks.filter(|n| !(n.addr().is_ipv4() && n.addr().is_unspecified())).collect(),
            transport_protocol: (!self.http.is_empty()).then_some(TransportProtocol::RawBuffer),
            application_protocols: self.http.clone(),
            ..ChainMatch::default()
        }
    }
}

fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// One service port at one address.
#[derive(Clone, Copy)]
pub(super) struct Site<'a> {
    pub(super) service: &'a Service,
    pub(super) port: &'a ServicePort,
    /// Address that the listener stands for.
    pub(super) bind: &'a str,
    /// Networks that stand for the service where the listener is the wildcard.
    pub(super) cidrs: &'a [String],
    /// Other names of the service.
    pub(super) aliases: &'a [&'a str],
}

/// TCP and TLS chains of a service port.
pub(super) fn tcp_drafts(view: &View<'_>, site: Site<'_>) -> Vec<Draft> {
    let hostname = &site.service.hostname;
    let rules: Vec<&Routes> =
        view.virtual_services.iter().filter(|vs| vs.spec.hosts.iter().any(|h| hosts::matches(h, hostname))).collect();
    if site.port.protocol.is_tls() { tls(view, site, &rules) } else { plain(view, site, &rules) }
}

/// A port with declared TLS: chains by SNI where VirtualServices say so, else one for the service.
fn tls(view: &View<'_>, site: Site<'_>, rules: &[&Routes]) -> Vec<Draft> {
    let mut out = Vec::new();
    let mut handled = BTreeSet::new();
    let mut cidrs = site.cidrs.to_vec();
    for vs in rules {
        for route in vs.spec.tls.iter().filter(|r| !r.route.is_empty()) {
            for m in route.matches.iter().filter(|m| applies_tls(m, view, site.port.number)) {
                // Subnets of a match stay in force for the service's later chains; istiod does it so.
                if !m.destination_subnets.is_empty() {
                    cidrs.clone_from(&m.destination_subnets);
                }
                if handled.insert((&m.sni_hosts, &m.destination_subnets)) {
                    let filters = to_routes(view, &route.route, site.port, vs);
                    out.push(Draft::tcp(m.sni_hosts.clone(), cidrs.clone(), filters));
                }
            }
        }
    }
    if out.is_empty() {
        let filters = to_service(view, site);
        out.push(Draft::tcp(sni_of_service(view, site), cidrs, filters));
    }
    out
}

/// SNI tells services apart only where the address does not.
fn sni_of_service(view: &View<'_>, site: Site<'_>) -> Vec<String> {
    let wildcard = inbound::wildcard(view.proxy).to_string();
    let address = match site.service.addresses.first().map(String::as_str) {
        Some(cidr) if cidr.contains('/') => "",
        Some(address) => address,
        None if site.service.provider == Provider::External => wildcard.as_str(),
        None => "0.0.0.0",
    };
    let shared = !site.cidrs.is_empty() || address.is_empty() || (address == wildcard && site.bind == wildcard);
    let dynamic = hosts::is_wildcard(&site.service.hostname) && site.service.resolution == Resolution::DynamicDns;
    if !shared && !dynamic {
        return Vec::new();
    }
    let mut out = vec![site.service.hostname.clone()];
    for alias in site.aliases {
        out.push((*alias).to_owned());
        out.extend(super::virtual_host::alternative_names(alias, &view.proxy.dns_domain));
    }
    out
}

/// A port with opaque bytes: chains by destination subnet where VirtualServices say so, then one for the rest.
fn plain(view: &View<'_>, site: Site<'_>, rules: &[&Routes]) -> Vec<Draft> {
    let mut out = Vec::new();
    let own = || site.cidrs.to_vec();
    for vs in rules {
        for route in vs.spec.tcp.iter().filter(|r| !r.route.is_empty()) {
            let filters = || to_routes(view, &route.route, site.port, vs);
            let matching: Vec<&L4Match> =
                route.matches.iter().filter(|m| applies_tcp(m, view, site.port.number)).collect();
            if route.matches.is_empty() || matching.iter().any(|m| m.destination_subnets.is_empty()) {
                out.push(Draft::tcp(Vec::new(), own(), filters()));
                return out;
            }
            let mut subnets: Vec<String> = matching.iter().flat_map(|m| m.destination_subnets.clone()).collect();
            if subnets.is_empty() {
                continue;
            }
            out.push(Draft::tcp(Vec::new(), subnets.clone(), filters()));
            let mut service = own();
            subnets.sort();
            service.sort();
            // The service's own chain would be a second one with the same match.
            if subnets == service {
                return out;
            }
        }
    }
    out.push(Draft::tcp(Vec::new(), own(), to_service(view, site)));
    out
}

fn applies_tls(m: &TlsMatch, view: &View<'_>, port: u16) -> bool {
    applies(m.port, &m.gateways, port)
        && route_match::has_labels(&m.source_labels, view.proxy)
        && route_match::from_namespace(&m.source_namespace, view.proxy)
}

fn applies_tcp(m: &L4Match, view: &View<'_>, port: u16) -> bool {
    applies(m.port, &m.gateways, port)
        && route_match::has_labels(&m.source_labels, view.proxy)
        && route_match::from_namespace(&m.source_namespace, view.proxy)
}

fn applies(wanted: u32, gateways: &[String], port: u16) -> bool {
    (wanted == 0 || wanted == u32::from(port)) && (gateways.is_empty() || gateways.iter().any(|g| g == "mesh"))
}

fn to_service(view: &View<'_>, site: Site<'_>) -> Vec<NetworkFilter> {
    let service = site.service;
    // A listener on a port of its own leads to the service's only port.
    let port = if let [only] = service.ports.as_slice() { only.number } else { site.port.number };
    let rules = (view.rules)(&service.hostname, None, "");
    let cluster = format!("outbound|{port}||{}", service.hostname);
    complete(view, site.port.protocol, with_rules(inbound::tcp_proxy(view, Direction::Outbound, &cluster), rules))
}

fn to_routes(view: &View<'_>, routes: &[RouteDestination], port: &ServicePort, vs: &Routes) -> Vec<NetworkFilter> {
    let first = &routes[0].destination;
    if let [only] = routes {
        let proxy = inbound::tcp_proxy(view, Direction::Outbound, &cluster(view, &only.destination, port.number));
        return complete(view, port.protocol, with_rules(proxy, (view.rules)(&first.host, None, &first.subset)));
    }
    let mut proxy = inbound::tcp_proxy(view, Direction::Outbound, &format!("{}.{}", vs.name, vs.namespace));
    proxy.clusters = routes
        .iter()
        .filter(|r| r.weight > 0)
        .map(|r| WeightedName { cluster: Name::from(cluster(view, &r.destination, port.number)), weight: r.weight })
        .collect();
    complete(view, port.protocol, with_rules(proxy, (view.rules)(&first.host, None, "")))
}

fn with_rules(mut proxy: TcpProxy, rules: Rules) -> TcpProxy {
    proxy.idle_timeout = rules.idle_timeout.or(proxy.idle_timeout);
    proxy.max_downstream_connection_duration = rules.max_connection_duration;
    proxy.hash_source_ip = rules.hash_source_ip;
    proxy.tunneling = rules.tunneling;
    proxy
}

fn complete(view: &View<'_>, protocol: Protocol, proxy: TcpProxy) -> Vec<NetworkFilter> {
    let stats = inbound::stats(view, Direction::Outbound);
    stats.into_iter().chain(protocol_filter(protocol)).chain([NetworkFilter::TcpProxy(proxy)]).collect()
}

/// Cluster of a destination: the port said, else the service's only one, else the listener's.
pub(super) fn cluster(view: &View<'_>, d: &Destination, listener_port: u16) -> String {
    let service = view.reachable().find(|s| s.hostname == d.host);
    let host = service.and_then(|s| s.external_name.as_deref()).unwrap_or(&d.host);
    let only = service.and_then(|s| if let [only] = s.ports.as_slice() { Some(only.number) } else { None });
    let port = d.port.map(|p| p.number).or(only).unwrap_or(listener_port);
    format!("outbound|{port}|{}|{host}", d.subset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(sni: &[&str], cidrs: &[&str]) -> Draft {
        let own = |of: &[&str]| of.iter().map(|s| (*s).to_owned()).collect();
        Draft::tcp(own(sni), own(cidrs), Vec::new())
    }

    #[test]
    fn overlapping_networks_conflict_when_they_are_equal() {
        assert!(draft(&[], &["1.2.3.4/8"]).conflicts_with(&draft(&[], &["1.5.6.7/8"])));
        assert!(!draft(&[], &["1.2.3.4/8"]).conflicts_with(&draft(&[], &["1.2.0.0/16"])));
        assert!(draft(&["a", "*"], &[]).conflicts_with(&draft(&["a"], &[])));
    }

    #[test]
    fn matches_are_sorted_and_any_is_nothing() {
        assert_eq!(draft(&["b", "a"], &[]).to_match().server_names, ["a", "b"]);
        assert!(draft(&["*"], &[]).is_match_all());
        assert!(draft(&["*"], &["10.0.0.0/8"]).to_match().server_names.is_empty());
    }
}
