//! ServiceEntry.

use super::at::At;
use super::selector::{self, Exported};
use super::workload::{self, UNIX};
use super::{Findings, names};

/// Findings of a ServiceEntry.
pub(super) fn check(found: &mut Findings, root: &At<'_>) {
    let spec = root.get("spec");
    let selector = selector::alpha(found, &spec);
    let (selects, endpoints) = (spec.get("workloadSelector"), spec.get("endpoints"));
    let both = selects.is_said() && endpoints.is_said();
    found.expect(!both, &endpoints, "only one of endpoints and workloadSelector may be set");
    hosts(found, &spec);
    addresses(found, &spec);
    ports(found, root);
    resolution(found, root, selector);
    several_hosts(found, &spec);
    selector::export_to(found, root, Exported::Service);
}

fn hosts(found: &mut Findings, spec: &At<'_>) {
    let hosts = spec.get("hosts");
    found.expect(hosts.len() > 0, &hosts, "a host is missing");
    for host in hosts.items() {
        let text = host.text();
        if text == "*" {
            found.add(&host, "a lone wildcard is no host of a service");
        } else if !names::is_wildcard_host(text) {
            found.add(&host, "a host name is expected");
        } else if names::is_partial_wildcard(text) && resolution_of(spec) != "DYNAMIC_DNS" {
            found.warn(&host, "a wildcard stands for whole labels: *.example.com");
        }
    }
}

fn resolution_of<'n>(spec: &At<'n>) -> &'n str {
    match spec.get("resolution").text() {
        "" | "0" => "NONE",
        said => said,
    }
}

fn addresses(found: &mut Findings, spec: &At<'_>) {
    let fits = matches!(resolution_of(spec), "NONE" | "STATIC");
    for address in spec.get("addresses").items() {
        let text = address.text();
        if !names::is_network(text) {
            found.add(&address, "an IP address or a network is expected");
        } else {
            found.expect(fits || !text.contains('/'), &address, "networks go with resolution NONE and STATIC only");
        }
    }
}

/// Whether istiod gives the service an address of its own.
fn allocates(root: &At<'_>) -> bool {
    let label = root.at("metadata.labels").entries();
    let label = label.iter().find(|(k, _)| *k == "networking.istio.io/enable-autoallocate-ip");
    let off = label.is_some_and(|(_, v)| v.text().eq_ignore_ascii_case("false"));
    resolution_of(&root.get("spec")) != "NONE" && !off
}

fn ports(found: &mut Findings, root: &At<'_>) {
    let spec = root.get("spec");
    let bare = spec.get("addresses").len() == 0 && !allocates(root);
    let mut seen: Vec<(&str, i64)> = Vec::new();
    for port in spec.get("ports").items() {
        if port.is_null() {
            found.add(&port, "a port is expected");
            continue;
        }
        let (name, number, protocol) = (port.get("name"), port.get("number"), port.get("protocol"));
        found.expect(names::is_label(name.text()), &name, "a name of letters, digits and dashes is expected");
        found.port(&number);
        let known = !protocol.has_text() || names::is_protocol(protocol.text());
        found.expect(known, &protocol, "no protocol that Istio knows");
        let target = port.get("targetPort");
        if target.whole_or_zero() != 0 {
            found.port(&target);
        }
        found.expect(seen.iter().all(|s| s.0 != name.text()), &name, "the name stands here twice");
        found.expect(seen.iter().all(|s| s.1 != number.whole_or_zero()), &number, "the number stands here twice");
        seen.push((name.text(), number.whole_or_zero()));
        if bare && matches!(protocol.text(), "" | "TCP") {
            found.warn(&port, "TCP is told from other services by its address: addresses are missing");
        }
    }
}

fn resolution(found: &mut Findings, root: &At<'_>, good_selector: bool) {
    let spec = root.get("spec");
    let endpoints = spec.get("endpoints");
    let selects = spec.get("workloadSelector");
    let ports: Vec<&str> = spec.get("ports").items().iter().map(|p| p.get("name").text()).collect();
    match resolution_of(&spec) {
        "NONE" => {
            found.expect(endpoints.len() == 0, &endpoints, "resolution NONE takes no endpoints");
            if selects.is_said() && good_selector {
                found.warn(&selects, "resolution NONE takes no endpoints: the selector has no effect");
            }
        }
        "STATIC" => {
            for endpoint in endpoints.items() {
                workload::entry(found, &endpoint, Some(&ports), false);
            }
        }
        "DNS" | "DNS_ROUND_ROBIN" => by_name(found, &spec, &ports),
        "DYNAMIC_DNS" => dynamic(found, root),
        _ => found.add(&spec.get("resolution"), "NONE, STATIC, DNS, DNS_ROUND_ROBIN or DYNAMIC_DNS is expected"),
    }
}

fn by_name(found: &mut Findings, spec: &At<'_>, ports: &[&str]) {
    let (endpoints, hosts) = (spec.get("endpoints"), spec.get("hosts"));
    if endpoints.len() == 0 {
        let wild = hosts.items().into_iter().find(|h| !names::is_fqdn(h.text()));
        if let Some(host) = wild {
            found.add(
                &host,
                "the name is resolved, since there are no endpoints: a host name without wildcard is expected",
            );
        }
    }
    if resolution_of(spec) == "DNS_ROUND_ROBIN" {
        found.expect(endpoints.len() <= 1, &endpoints, "resolution DNS_ROUND_ROBIN takes one endpoint");
    }
    for endpoint in endpoints.items() {
        let address = endpoint.get("address");
        let text = address.text();
        if text.starts_with(UNIX) {
            found.add(&address, "a socket takes resolution STATIC");
        } else {
            let good = names::is_address(text) || names::is_fqdn(text);
            found.expect(good, &address, "an IP address or host name is expected");
        }
        selector::labels(found, &endpoint.get("labels"));
        workload::ports(found, &endpoint.get("ports"), Some(ports));
    }
    let tcp = |p: &At<'_>| {
        let protocol = p.get("protocol").text();
        names::is_protocol(protocol) && !names::is_http(protocol) && !protocol.eq_ignore_ascii_case("udp")
    };
    let addressed = spec.get("addresses").len() > 0;
    if addressed && hosts.len() > 1 && spec.get("ports").items().iter().any(tcp) {
        found.warn(&hosts, "hosts that share an address are not told apart on TCP ports");
    }
}

fn dynamic(found: &mut Findings, root: &At<'_>) {
    let spec = root.get("spec");
    for host in spec.get("hosts").items() {
        found.expect(host.text().starts_with('*'), &host, "resolution DYNAMIC_DNS takes hosts with wildcard");
    }
    for list in ["addresses", "endpoints"].map(|f| spec.get(f)) {
        found.expect(list.len() == 0, &list, "resolution DYNAMIC_DNS finds addresses by name");
    }
    for port in spec.get("ports").items() {
        let protocol = port.get("protocol");
        let fits = matches!(protocol.text().to_ascii_lowercase().as_str(), "http" | "http2" | "grpc" | "tls");
        found.expect(fits, &protocol, "resolution DYNAMIC_DNS takes HTTP, HTTP2, GRPC and TLS only");
    }
    let waypoint = root.at("metadata.labels").entries().into_iter().find(|(k, _)| *k == "istio.io/use-waypoint");
    let waypoint = waypoint.is_some_and(|(_, v)| v.has_text() && !v.text().eq_ignore_ascii_case("none"));
    let location = spec.get("location");
    let inside = location.text() == "MESH_INTERNAL";
    found.expect(!(inside && waypoint), &location, "a waypoint serves DYNAMIC_DNS outside the mesh only");
}

/// What is neither HTTP nor TLS does not say which of several hosts it is for.
fn several_hosts(found: &mut Findings, spec: &At<'_>) {
    if resolution_of(spec) == "NONE" || spec.get("hosts").len() < 2 {
        return;
    }
    let opaque = |p: &At<'_>| {
        let protocol = p.get("protocol").text();
        !names::is_http(protocol) && !names::is_tls(protocol)
    };
    if let Some(port) = spec.get("ports").items().into_iter().find(opaque) {
        found.add(&port.get("protocol"), "several hosts are told apart by HTTP or TLS only");
    }
}
