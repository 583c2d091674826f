//! Configuration for HAProxy: a near match. It knows neither original destinations nor Istio's header rules.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Result;

use super::case::{B, Case, HOSTS, PORT, PRINCIPAL, RULES, host};

const COMMON: &str = "global\n  nbthread 1\n  maxconn 4000\n  log stdout format raw local0 emerg\ndefaults\n  mode http\n  \
    timeout client 60s\n  timeout server 60s\n  timeout connect 10s\n  http-reuse always\n  retries 2\n  \
    retry-on conn-failure 503\n";

/// Writes the configuration of the proxy beside the service, and beside the caller.
///
/// # Errors
/// When a file cannot be written or read.
pub(super) fn write(case: &Case, folder: &Path, certs: &Path) -> Result<()> {
    for side in ["a", "b"] {
        let dir = certs.join(side);
        let both = [fs::read(dir.join("cert-chain.pem"))?, fs::read(dir.join("key.pem"))?].concat();
        fs::write(dir.join("both.pem"), both)?;
    }
    fs::write(folder.join("haproxy-b.cfg"), inbound(case, &certs.join("b")))?;
    let map: String = (0..HOSTS).map(|n| format!("{} svc-{n}\n", host(n))).collect();
    let names = folder.join("hosts.map");
    fs::write(&names, map)?;
    Ok(fs::write(folder.join("haproxy-a.cfg"), outbound(case, &names, &certs.join("a")))?)
}

fn inbound(case: &Case, certs: &Path) -> String {
    let tls = if case.mtls {
        format!(
            " ssl crt {0}/both.pem ca-file {0}/root-cert.pem verify required alpn h2,http/1.1 ssl-min-ver TLSv1.2",
            certs.display()
        )
    } else {
        String::new()
    };
    let mut text = format!("{COMMON}frontend in\n  bind 0.0.0.0:15006{tls}\n");
    if case.mtls {
        let mut id = String::new();
        for byte in format!("spiffe://{PRINCIPAL}").bytes() {
            write!(id, "{byte:02X}").expect("writing to a string");
        }
        writeln!(text, "  http-request deny if !{{ ssl_c_der,hex -m sub {id} }}").expect("writing to a string");
        text.push_str("  http-request set-header x-forwarded-client-cert Subject=\\\"%[ssl_c_s_dn]\\\"\n");
    }
    let rules: Vec<String> = RULES.iter().map(rule).collect();
    writeln!(text, "  http-request allow if {}", rules.join(" or ")).expect("writing to a string");
    text.push_str("  http-request deny\n");
    // The redirect takes what the proxy's user sends to its own machine, unless it comes from 127.0.0.6.
    // `allow` ends the rules; what follows in the backend is done for every request that got so far.
    write!(
        text,
        "  default_backend app\nbackend app\n  http-request set-header x-forwarded-proto http\n  \
         http-request set-header x-request-id %[uuid]\n  server app {B}:{PORT} source 127.0.0.6\n"
    )
    .expect("writing to a string");
    text
}

fn rule(rule: &super::case::Rule) -> String {
    let mut text = String::new();
    if let Some(method) = rule.method {
        text.push_str(&format!("{{ method {method} }} "));
    }
    let (prefixes, whole): (Vec<&str>, Vec<&str>) = rule.paths.iter().partition(|path| path.ends_with('*'));
    if prefixes.is_empty() {
        text.push_str(&format!("{{ path {} }}", whole.join(" ")));
    } else {
        text.push_str(&format!("{{ path_beg {} }}", prefixes.join(" ").replace('*', "")));
    }
    if let Some(block) = rule.block {
        text.push_str(&format!(" {{ src {block} }}"));
    }
    if let Some((name, value)) = rule.header {
        text.push_str(&format!(" {{ req.hdr({name}) {value} }}"));
    }
    text
}

fn outbound(case: &Case, names: &Path, certs: &Path) -> String {
    let mut text = format!(
        "{COMMON}frontend out\n  bind 0.0.0.0:15001\n  http-request set-header x-forwarded-proto http\n  \
         http-request set-header x-request-id %[uuid]\n  use_backend %[req.hdr(host),lower,map({},svc-0)]\n",
        names.display()
    );
    let alpn = if case.h2_inside { "h2" } else { "http/1.1" };
    for n in 0..HOSTS {
        write!(
            text,
            "backend svc-{n}\n  server b {B}:{PORT} ssl crt {0}/both.pem ca-file {0}/root-cert.pem verify required alpn \
             {alpn}\n",
            certs.display()
        )
        .expect("writing to a string");
    }
    text
}
