//! TLS of a server, as Sidecars and Gateways say it, and Gateways themselves.

use super::at::At;
use super::workload::UNIX;
use super::{Findings, names};

/// Findings of `tls`.
pub(super) fn check(found: &mut Findings, tls: &At<'_>) {
    if !tls.is_said() {
        return;
    }
    let mode = tls.get("mode").text();
    let own = ["serverCertificate", "privateKey", "caCertificates", "credentialName"].map(|f| tls.get(f));
    let lists = ["tlsCertificates", "credentialNames"].map(|f| tls.get(f));
    if mode == "ISTIO_MUTUAL" {
        for field in own.iter().chain(&lists) {
            let said = field.has_text() || field.len() > 0;
            found.expect(!said, field, "ISTIO_MUTUAL takes the workload's own certificate");
        }
        return;
    }
    let old = matches!(tls.get("minProtocolVersion").text(), "TLSV1_0" | "TLSV1_1");
    if old && tls.get("cipherSuites").len() == 0 {
        found.warn(&tls.get("minProtocolVersion"), "versions before 1.2 need cipher suites of theirs");
    }
    suites(found, &tls.get("cipherSuites"));
    let [certificate, key, ca, credential] = own;
    let [certificates, credentials] = lists;
    let files = certificate.has_text() && key.has_text();
    let sources = [files, credential.has_text(), credentials.len() > 0, certificates.len() > 0];
    let several = sources.iter().filter(|s| **s).count() > 1;
    found.expect(!several, tls, "only one source of certificates may be set");
    let verifies = matches!(mode, "MUTUAL" | "OPTIONAL_MUTUAL");
    let single = [&certificate, &key, &ca, &credential, &tls.get("caCrl")].into_iter().any(At::has_text);
    if matches!(mode, "PASSTHROUGH" | "AUTO_PASSTHROUGH" | "") && (single || sources.contains(&true)) {
        found.warn(tls, "what is passed through needs no certificate");
    }
    let remote = credential.has_text() || credentials.len() > 0;
    if (mode == "SIMPLE" || verifies) && !remote {
        found.expect(!verifies || ca.has_text(), &ca, "clients are verified: a root is missing");
        let items = certificates.items();
        for at in if items.is_empty() { vec![tls.clone()] } else { items } {
            for field in ["serverCertificate", "privateKey"].map(|f| at.get(f)) {
                found.expect(field.has_text(), &field, "a server's certificate and its key are expected");
            }
        }
    }
    let crl = tls.get("caCrl");
    if crl.has_text() && !((mode == "SIMPLE" || verifies) && remote) {
        found.expect(!credential.has_text(), &crl, "credentialName brings the revocation list");
        found.expect(mode != "SIMPLE", &crl, "SIMPLE verifies no client: a revocation list has no use");
    }
}

/// Cipher suites that nobody knows, or twice, are left out.
fn suites(found: &mut Findings, list: &At<'_>) {
    const KNOWN: [&str; 16] = [
        "ALL",
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES128-SHA",
        "ECDHE-RSA-AES128-SHA",
        "ECDHE-ECDSA-AES256-SHA",
        "ECDHE-RSA-AES256-SHA",
        "AES128-GCM-SHA256",
        "AES256-GCM-SHA384",
        "AES128-SHA",
        "AES256-SHA",
        "DES-CBC3-SHA",
    ];
    let mut seen: Vec<&str> = Vec::new();
    for suite in list.items() {
        let name = suite.text();
        // An operator of OpenSSL's lists may stand before a name.
        let known = !name.starts_with(char::is_alphanumeric) || KNOWN.contains(&name);
        if !known || seen.contains(&name) {
            found.warn(&suite, "the suite is not known or was said before: it is left out");
        }
        seen.push(name);
    }
}

/// Findings of a Gateway.
pub(super) fn gateway(found: &mut Findings, root: &At<'_>) {
    let name = root.at("metadata.name");
    found.expect(names::is_label(name.text()), &name, "a name of letters, digits and dashes is expected");
    let servers = root.at("spec.servers");
    found.expect(servers.len() > 0, &servers, "a server is missing");
    let mut seen: Vec<&str> = Vec::new();
    for server in servers.items() {
        self::server(found, &server);
        let name = server.at("port.name");
        found.expect(!name.has_text() || !seen.contains(&name.text()), &name, "the name stands here twice");
        seen.push(name.text());
    }
}

fn server(found: &mut Findings, server: &At<'_>) {
    if server.is_null() {
        found.add(server, "a server is expected");
        return;
    }
    let hosts = server.get("hosts");
    found.expect(hosts.len() > 0, &hosts, "a host is missing");
    for item in hosts.items() {
        host(found, &item);
    }
    let (port, bind, tls) = (server.get("port"), server.get("bind"), server.get("tls"));
    if !port.is_said() {
        found.add(&port, "a port is missing");
        return;
    }
    let (number, protocol) = (port.get("number"), port.get("protocol").text());
    found.expect(names::is_protocol(protocol), &port.get("protocol"), "no protocol that Istio knows");
    found.expect(port.get("name").has_text(), &port.get("name"), "a name is missing");
    let target = port.get("targetPort");
    found.expect(target.whole_or_zero() == 0, &target, "has no effect here");
    if let Some(path) = bind.text().strip_prefix(UNIX) {
        found.expect(names::is_socket(path), &bind, "the absolute path of a socket is expected");
        found.expect(number.whole_or_zero() == 0, &number, "a socket has no port");
    } else {
        found.port(&number);
        found.expect(!bind.has_text() || names::is_address(bind.text()), &bind, "an IP address is expected");
    }
    check(found, &tls);
    let secret = ["caCertificates", "privateKey", "serverCertificate"].iter().any(|f| tls.get(f).has_text());
    let passes = matches!(tls.get("mode").text(), "" | "PASSTHROUGH" | "AUTO_PASSTHROUGH");
    if names::is_tls(protocol) {
        found.expect(tls.is_said(), &tls, "the port's protocol asks for TLS settings");
    } else if tls.is_said() {
        let redirects = names::is_http(protocol) && passes && !secret;
        found.expect(redirects, &tls, "the port's protocol takes no TLS settings");
    }
}

/// `HOST` or `NAMESPACE/HOST`.
fn host(found: &mut Findings, at: &At<'_>) {
    let (namespace, name) = at.text().split_once('/').unwrap_or_else(|| ("*", at.text()));
    let scoped = matches!(namespace, "*" | ".") || names::is_label(namespace);
    found.expect(scoped, at, "the part before the slash is no name of a namespace, * or .");
    let known =
        names::is_wildcard_host(name) && !names::is_partial_wildcard(name) && (name == "*" || name.contains('.'));
    found.expect(known || names::is_address(name), at, "a host name with dots, *.HOST or * is expected");
}
