//! VirtualService.

use super::at::At;
use super::selector::{self, Exported};
use super::{Findings, http_route, names, reach};

/// Findings of a VirtualService.
pub(super) fn check(found: &mut Findings, root: &At<'_>) {
    let spec = root.get("spec");
    let (hosts, gateways) = (spec.get("hosts"), spec.get("gateways"));
    let delegate = hosts.len() == 0;
    if delegate {
        for field in ["gateways", "tls", "tcp"] {
            let list = spec.get(field);
            found.expect(list.len() == 0, &list, "without hosts it is a delegate, and has http routes only");
        }
    }
    selector::gateways(found, &gateways);
    let of_gateway = gateways.len() > 0 && !gateways.texts().contains(&"mesh");
    if !of_gateway {
        claims(found, &spec);
    }
    check_hosts(found, &spec, of_gateway);
    let routes = ["http", "tcp", "tls"].map(|f| spec.get(f));
    found.expect(routes.iter().any(|r| r.len() > 0), &spec, "http, tcp or tls is expected");
    for route in spec.get("http").items() {
        if route.is_null() {
            found.add(&route, "a route is expected");
        } else {
            http_route::check(found, &route, delegate);
        }
    }
    for route in spec.get("tls").items().into_iter().filter(|r| !r.is_null()) {
        tls_route(found, &route, &hosts, of_gateway);
    }
    for route in spec.get("tcp").items().into_iter().filter(|r| !r.is_null()) {
        tcp_route(found, &route);
    }
    selector::export_to(found, root, Exported::Plain);
    reach::check(found, &spec);
}

/// Claims of a token are known where a gateway has checked it.
fn claims(found: &mut Findings, spec: &At<'_>) {
    for one in spec.get("http").items().iter().flat_map(|r| r.get("match").items()) {
        for list in ["headers", "withoutHeaders"] {
            for (name, value) in one.get(list).entries() {
                if names::is_claim_header(name) {
                    found.tell(&value, "routes look at a token's claims in gateways only");
                }
            }
        }
    }
}

fn check_hosts(found: &mut Findings, spec: &At<'_>, of_gateway: bool) {
    let matches = spec.get("tls").items().into_iter().flat_map(|t| t.get("match").items());
    let sni = of_gateway && matches.into_iter().any(|m| m.get("sniHosts").len() > 0);
    let hosts = spec.get("hosts").items();
    let before = found.0.len();
    for host in &hosts {
        let text = host.text();
        let good = if of_gateway { names::is_gateway_host(text, sni) } else { names::is_wildcard_host(text) };
        found.expect(good || names::is_address(text), host, "a host name or an IP address is expected");
        found.expect(of_gateway || text != "*", host, "a lone wildcard is for gateways only");
    }
    if found.0.len() > before {
        return;
    }
    for (index, host) in hosts.iter().enumerate() {
        if let Some(twin) = hosts[..index].iter().find(|h| names::overlap(h.text(), host.text())) {
            found.add(host, format!("{:?} covers this host already", twin.text()));
        }
    }
}

fn tls_route(found: &mut Findings, route: &At<'_>, hosts: &At<'_>, of_gateway: bool) {
    let (matches, to) = (route.get("match"), route.get("route"));
    found.expect(matches.len() > 0, &matches, "a match with sniHosts is expected");
    for one in matches.items() {
        let sni = one.get("sniHosts");
        found.expect(sni.len() > 0, &sni, "a host is missing");
        for host in sni.items() {
            sni_host(found, &host, &hosts.texts(), of_gateway);
        }
        layer_four(found, &one);
    }
    found.expect(to.len() > 0, &to, "a destination is missing");
    http_route::destinations(found, &to);
}

fn sni_host(found: &mut Findings, host: &At<'_>, hosts: &[&str], of_gateway: bool) {
    let text = host.text();
    let good = if of_gateway { names::is_gateway_host(text, true) } else { names::is_wildcard_host(text) };
    if good {
        let covered = hosts.iter().any(|h| names::within(text, h));
        found.expect(covered, host, "the host is none of the VirtualService's own");
    } else if names::is_address(text) {
        found.warn(host, "clients send no address as server name (RFC 6066 §3)");
    } else {
        found.add(host, "a host name is expected");
    }
}

/// One entry of `tcp`.
pub(super) fn tcp_route(found: &mut Findings, route: &At<'_>) {
    for one in route.get("match").items() {
        tcp_match(found, &one);
    }
    let to = route.get("route");
    found.expect(to.len() > 0, &to, "a destination is missing");
    http_route::destinations(found, &to);
}

/// `match` of a TCP route.
pub(super) fn tcp_match(found: &mut Findings, one: &At<'_>) {
    if one.is_null() {
        found.add(one, "a match is expected");
    }
    layer_four(found, one);
}

fn layer_four(found: &mut Findings, one: &At<'_>) {
    found.each(&one.get("destinationSubnets"), "is no address and no network", names::is_network);
    let port = one.get("port");
    if port.whole_or_zero() != 0 {
        found.port(&port);
    }
    selector::labels(found, &one.get("sourceLabels"));
    selector::gateways(found, &one.get("gateways"));
}
