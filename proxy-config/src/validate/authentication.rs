//! PeerAuthentication and RequestAuthentication.

use serde_json::Value;

use super::at::At;
use super::{Findings, duration, names, selector};

/// Findings of a PeerAuthentication.
pub(super) fn peer(found: &mut Findings, spec: &At<'_>) {
    let (picked, ports) = (spec.get("selector"), spec.get("portLevelMtls"));
    selector::workload(found, &picked);
    let selects = picked.get("matchLabels").len() > 0;
    found.expect(ports.len() == 0 || selects, &ports, "ports have modes only where a selector with labels is");
    found.expect(!ports.is_said() || ports.len() > 0, &ports, "the map is empty");
    for (port, mode) in ports.entries() {
        let good = port.parse().is_ok_and(names::is_port);
        found.expect(good, &mode, "a port from 1 to 65535 is expected");
    }
}

/// Findings of a RequestAuthentication.
pub(super) fn request(found: &mut Findings, spec: &At<'_>) {
    selector::policy(found, spec);
    for rule in spec.get("jwtRules").items().iter().filter(|r| !r.is_null()) {
        jwt_rule(found, rule);
    }
}

fn jwt_rule(found: &mut Findings, rule: &At<'_>) {
    let (issuer, uri, keys) = (rule.get("issuer"), rule.get("jwksUri"), rule.get("jwks"));
    found.expect(issuer.has_text() || uri.has_text(), &issuer, "issuer or jwksUri is expected");
    for list in ["audiences", "fromParams", "fromCookies"].map(|f| rule.get(f)) {
        found.each(&list, "is empty", |v| !v.is_empty());
    }
    found.expect(!uri.has_text() || is_url(uri.text()), &uri, "an http:// or https:// URL is expected");
    if uri.is_said() && keys.is_said() {
        found.schema(&keys, "only one of jwks and jwksUri may be set");
    }
    if keys.has_text() {
        key_set(found, &keys);
    }
    for header in rule.get("fromHeaders").items() {
        let name = header.get("name");
        found.expect(name.has_text(), &name, "a name is missing");
    }
    let mut seen: Vec<String> = Vec::new();
    for out in rule.get("outputClaimToHeaders").items() {
        let (header, claim) = (out.get("header"), out.get("claim"));
        found.expect(claim.has_text(), &claim, "a claim is missing");
        let good = names::is_plain_header(header.text());
        found.expect(good, &header, "a header name of letters, digits, - and _ is expected");
        let name = header.text().to_ascii_lowercase();
        if seen.contains(&name) {
            found.warn(&header, "the header is written twice");
        }
        seen.push(name);
    }
    duration::check(found, &rule.get("timeout"));
}

/// A JSON Web Key Set, or one key; its private parts have no use here.
fn key_set(found: &mut Findings, at: &At<'_>) {
    const PRIVATE: [&str; 2] = ["d", "k"];
    let set: Value = serde_json::from_str(at.text()).unwrap_or_default();
    let keys: Vec<&Value> = match set.get("keys") {
        Some(keys) => keys.as_array().into_iter().flatten().collect(),
        None => vec![&set],
    };
    let key = |k: &&Value| k.get("kty").is_some_and(Value::is_string);
    if !set.is_object() || !keys.iter().all(key) {
        found.add(at, "a JSON Web Key Set is expected");
    } else if keys.iter().any(|k| PRIVATE.iter().any(|p| k.get(p).is_some())) {
        found.warn(at, "the set holds a private key; only public keys verify");
    }
}

/// Scheme http or https, and a port that is a number if there is one.
fn is_url(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    let Some(rest) = lower.strip_prefix("http://").or_else(|| lower.strip_prefix("https://")) else { return false };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let plain = |h: &str| !h.chars().any(|c| c.is_whitespace() || c.is_control());
    match host.rsplit_once(':') {
        Some((name, port)) if !host.ends_with(']') => {
            !name.is_empty() && plain(name) && port.bytes().all(|b| b.is_ascii_digit())
        }
        _ => !host.is_empty() && plain(host),
    }
}

#[cfg(test)]
mod tests {
    use super::is_url;

    #[test]
    fn urls() {
        assert!(is_url("https://a.b:443/c") && is_url("http://a") && is_url("http://[::1]:80") && is_url("HTTPS://a"));
        assert!(!is_url("https://a:b") && !is_url("ftp://a") && !is_url("a.b") && !is_url("http://"));
    }
}
