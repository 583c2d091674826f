//! WorkloadEntry and WorkloadGroup.

use super::at::At;
use super::{Findings, names, selector};

/// The prefix of addresses that are sockets.
pub(super) const UNIX: &str = "unix://";

/// Findings of an entry; `ports` are the names of its service's ports when it is an endpoint of one, and `by_name`
/// whether it may be a host name.
pub(super) fn entry(found: &mut Findings, at: &At<'_>, ports: Option<&[&str]>, by_name: bool) {
    let (address, network) = (at.get("address"), at.get("network"));
    let text = address.text();
    let said = at.get("ports");
    if text.is_empty() {
        if !network.has_text() {
            found.add(&address, "an address is missing");
            return;
        }
        found.warn(&address, "without an address it is reached through its network's gateway only");
    }
    if let Some(path) = text.strip_prefix(UNIX) {
        found.expect(names::is_socket(path), &address, "the absolute path of a socket is expected");
        found.expect(said.len() == 0, &said, "a socket has no ports");
        let one = ports.is_none_or(|p| p.len() == 1);
        found.expect(one, &address, "a socket takes a service of exactly one port");
    } else if !text.is_empty() && !names::is_address(text) {
        let good = by_name && names::is_fqdn(text);
        let expected =
            if by_name { "an IP address, host name or unix:// path" } else { "an IP address or unix:// path" };
        found.expect(good, &address, &format!("{expected} is expected"));
    }
    self::ports(found, &said, ports);
    selector::labels(found, &at.get("labels"));
}

/// Ports of an endpoint by their service's names.
pub(super) fn ports(found: &mut Findings, said: &At<'_>, known: Option<&[&str]>) {
    for (name, number) in said.entries() {
        found.expect(names::is_label(name), &number, "the port's name is not of letters, digits and dashes");
        found.expect(known.is_none_or(|k| k.contains(&name)), &number, "no port of the service has this name");
        found.port(&number);
    }
}

/// Findings of a WorkloadGroup's spec.
pub(super) fn group(found: &mut Findings, spec: &At<'_>) {
    let template = spec.get("template");
    found.expect(template.is_said(), &template, "a template is missing");
    selector::labels(found, &spec.at("metadata.labels"));
    let (address, said) = (template.get("address"), template.get("ports"));
    if let Some(path) = address.text().strip_prefix(UNIX)
        && !(names::is_socket(path) && said.len() == 0)
    {
        found.schema(&address, "the absolute path of a socket is expected, and no ports");
    }
    for (name, number) in said.entries() {
        if !names::is_label(name) || !names::is_port(number.whole_or_zero()) {
            found.schema(&number, "a name of letters, digits and dashes and a port from 1 to 65535 are expected");
        }
    }
    probe(found, &spec.get("probe"));
}

/// `probe`.
pub(super) fn probe(found: &mut Findings, at: &At<'_>) {
    if !at.is_said() {
        return;
    }
    for field in ["periodSeconds", "initialDelaySeconds", "timeoutSeconds", "successThreshold", "failureThreshold"] {
        let field = at.get(field);
        found.expect(field.whole_or_zero() >= 0, &field, "0 or more is expected");
    }
    let (http, tcp, exec, grpc) = (at.get("httpGet"), at.get("tcpSocket"), at.get("exec"), at.get("grpc"));
    let said = [&http, &tcp, &exec, &grpc].into_iter().filter(|m| m.is_said()).count();
    found.expect(said == 1, at, "exactly one of httpGet, tcpSocket, exec and grpc is expected");
    for method in [&http, &tcp, &grpc].into_iter().filter(|m| m.is_said()) {
        found.port(&method.get("port"));
    }
    if exec.is_said() {
        let command = exec.get("command");
        found.expect(command.len() > 0, &command, "a command is missing");
    }
    let scheme = http.get("scheme");
    found.expect(matches!(scheme.text(), "" | "HTTP" | "HTTPS"), &scheme, "HTTP or HTTPS is expected");
    for header in http.get("httpHeaders").items() {
        let name = header.get("name");
        let good = name.has_text() && name.text().bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        found.expect(good, &name, "a name of letters, digits and dashes is expected");
    }
}
