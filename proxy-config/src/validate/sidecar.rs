//! Sidecar.

use std::collections::BTreeMap;

use super::at::At;
use super::workload::UNIX;
use super::{Findings, http_route, names, pool, selector, server_tls};

/// Findings of a Sidecar.
pub(super) fn check(found: &mut Findings, root: &At<'_>) {
    let spec = root.get("spec");
    selector::alpha(found, &spec);
    let blocks = ["outboundTrafficPolicy", "inboundConnectionPool"];
    let some = spec.get("egress").len() + spec.get("ingress").len() > 0 || blocks.iter().any(|b| spec.get(b).is_said());
    found.expect(some, &spec, "at least one of its fields is expected");
    let mut ports = Vec::new();
    for listener in spec.get("ingress").items() {
        ingress(found, &listener, &mut ports);
    }
    pool::check(found, &spec.get("inboundConnectionPool"));
    egress(found, root);
    outbound(found, &spec.get("outboundTrafficPolicy"));
}

fn port(found: &mut Findings, port: &At<'_>) {
    let (name, protocol) = (port.get("name"), port.get("protocol"));
    let named = !name.has_text() || names::is_label(name.text());
    found.expect(named, &name, "a name of letters, digits and dashes is expected");
    let known = !protocol.has_text() || names::is_protocol(protocol.text());
    found.expect(known, &protocol, "no protocol that Istio knows");
    let target = port.get("targetPort");
    found.expect(target.whole_or_zero() == 0, &target, "has no effect here");
}

fn ingress(found: &mut Findings, listener: &At<'_>, seen: &mut Vec<i64>) {
    let said = listener.get("port");
    if !said.is_said() {
        found.add(&said, "a port is missing");
        return;
    }
    port(found, &said);
    let number = said.get("number");
    found.port(&number);
    let bind = listener.get("bind");
    found.expect(!bind.has_text() || names::is_address(bind.text()), &bind, "an IP address is expected");
    found.expect(!seen.contains(&number.whole_or_zero()), &number, "the port stands here twice");
    seen.push(number.whole_or_zero());
    endpoint(found, &listener.get("defaultEndpoint"));
    let protocol = said.get("protocol");
    tls(found, &listener.get("tls"), protocol.text());
    let limits = listener.get("connectionPool");
    pool::check(found, &limits);
    let http = limits.get("http");
    if http.is_said() && !names::is_http(protocol.text()) {
        found.warn(&http, "the port's protocol is not HTTP: only limits of TCP hold");
    }
}

/// `127.0.0.1:PORT`, `0.0.0.0:PORT`, `[::1]:PORT`, `[::]:PORT`, `:PORT` or a socket.
fn endpoint(found: &mut Findings, at: &At<'_>) {
    let text = at.text();
    if text.is_empty() {
        return;
    }
    if let Some(path) = text.strip_prefix(UNIX) {
        found.expect(names::is_socket(path), at, "the absolute path of a socket is expected");
        return;
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        found.add(at, "ADDRESS:PORT is expected");
        return;
    };
    let known = matches!(host, "" | "127.0.0.1" | "0.0.0.0" | "[::1]" | "[::]");
    found.expect(known, at, "127.0.0.1, 0.0.0.0, [::1] or [::] is expected before the port");
    let good = port.parse().is_ok_and(names::is_port);
    found.expect(good, at, "a port from 1 to 65535 is expected behind the address");
}

fn tls(found: &mut Findings, at: &At<'_>, protocol: &str) {
    if !at.is_said() {
        return;
    }
    for field in ["subjectAltNames", "credentialNames", "tlsCertificates"].map(|f| at.get(f)) {
        found.expect(field.len() == 0, &field, "has no place in a Sidecar");
    }
    let (redirect, credential) = (at.get("httpsRedirect"), at.get("credentialName"));
    found.expect(!redirect.is_true(), &redirect, "has no place in a Sidecar");
    found.expect(!credential.has_text(), &credential, "has no place in a Sidecar: files are expected");
    let mode = at.get("mode");
    let fits = !matches!(mode.text(), "ISTIO_MUTUAL" | "AUTO_PASSTHROUGH");
    found.expect(fits, &mode, "the mode has no place in a Sidecar");
    found.expect(names::is_tls(protocol), at, "a port of protocol HTTPS or TLS is expected");
    server_tls::check(found, at);
}

fn egress(found: &mut Findings, root: &At<'_>) {
    let listeners = root.at("spec.egress").items();
    let namespace = root.at("metadata.namespace").text();
    let (mut ports, mut sockets) = (Vec::new(), Vec::new());
    for (index, listener) in listeners.iter().enumerate() {
        if listener.is_null() {
            found.add(listener, "a listener is expected");
            continue;
        }
        let said = listener.get("port");
        if !said.is_said() {
            let last = index + 1 == listeners.len();
            found.expect(last, listener, "only the last listener may be without a port");
        } else {
            port(found, &said);
            let (number, bind) = (said.get("number"), listener.get("bind"));
            if number.whole_or_zero() == 0 {
                socket(found, listener);
                found.expect(!sockets.contains(&bind.text()), &bind, "the socket stands here twice");
                sockets.push(bind.text());
            } else {
                found.port(&number);
                found.expect(!bind.has_text() || names::is_address(bind.text()), &bind, "an IP address is expected");
                let value = number.whole_or_zero();
                found.expect(!ports.contains(&value), &number, "the port stands here twice");
                ports.push(value);
            }
        }
        hosts(found, &listener.get("hosts"), namespace);
    }
}

fn socket(found: &mut Findings, listener: &At<'_>) {
    let (bind, mode) = (listener.get("bind"), listener.get("captureMode"));
    let path = bind.text().strip_prefix(UNIX);
    let reason = "without a port number the absolute path of a unix:// socket is expected";
    found.expect(path.is_some_and(names::is_socket), &bind, reason);
    let fits = matches!(mode.text(), "" | "DEFAULT" | "NONE");
    found.expect(fits, &mode, "a socket cannot be captured");
}

fn hosts(found: &mut Findings, list: &At<'_>, own: &str) {
    found.expect(list.len() > 0, list, "a host is missing");
    let mut seen: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for item in list.items() {
        host(found, &item);
        let Some((namespace, service)) = item.text().split_once('/') else { continue };
        if namespace.starts_with('~') {
            continue;
        }
        let services = seen.entry(if namespace == "." { own } else { namespace }).or_default();
        let twice =
            if service == "*" { !services.is_empty() } else { services.contains(&service) || services.contains(&"*") };
        if twice {
            found.warn(&item, "other entries cover this one, or are covered by it");
        }
        services.push(service);
    }
    let all = seen.get("*").is_some_and(|s| s.contains(&"*"));
    if all && seen.len() > 1 {
        found.warn(list, "*/* selects everything: the other hosts have no effect");
    }
}

/// `NAMESPACE/HOST`.
fn host(found: &mut Findings, at: &At<'_>) {
    let Some((namespace, name)) = at.text().split_once('/') else {
        found.add(at, "NAMESPACE/HOST is expected");
        return;
    };
    if namespace.is_empty() || name.is_empty() {
        found.add(at, "both the namespace and the host are expected");
        return;
    }
    let plain = namespace.strip_prefix('~').unwrap_or(namespace);
    let good = matches!(plain, "" | "*" | ".") || names::is_label(plain);
    found.expect(good, at, "the part before the slash is no name of a namespace, * or .");
    if name != "*" && !name.contains('.') {
        found.add(at, "a short name is not understood here: a host name with dots is expected");
    } else {
        let whole = names::is_wildcard_host(name) && !names::is_partial_wildcard(name);
        found.expect(whole, at, "the part behind the slash is no host name, *.HOST or *");
    }
}

fn outbound(found: &mut Findings, policy: &At<'_>) {
    let (mode, proxy) = (policy.get("mode"), policy.get("egressProxy"));
    // 3 is the number of ALLOW_ANY_DYNAMIC_DNS, which the mesh has and a Sidecar has not.
    if matches!(mode.text(), "3" | "ALLOW_ANY_DYNAMIC_DNS") {
        found.add(&mode, "REGISTRY_ONLY or ALLOW_ANY is expected; the mesh decides about dynamic DNS");
        return;
    }
    if !proxy.is_said() {
        return;
    }
    if !matches!(mode.text(), "ALLOW_ANY" | "1") {
        found.add(&proxy, "an egress proxy goes with mode ALLOW_ANY only");
        return;
    }
    let host = proxy.get("host");
    found.expect(names::is_fqdn(host.text()), &host, "a host name is expected");
    let port = proxy.get("port");
    found.expect(port.is_said(), &port, "a port is missing");
    http_route::destination(found, &proxy);
}
