//! Words that Istio's API takes: host names, labels, ports, addresses, durations, header names.
//!
//! Each function answers whether a text is good; what was expected is said by whoever asks.

use std::net::IpAddr;

pub(crate) use crate::compile::hosts::{matches as overlap, subset_of as within};

/// Letters, digits and dashes, at most 63, alphanumeric at both ends (RFC 1123, capitals allowed as Istio does).
pub(crate) fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
        && ends(bytes.first())
        && ends(bytes.last())
}

/// A label, `*`, or a label behind `*` or `*-`.
fn is_wildcard_label(text: &str) -> bool {
    if text.len() > 63 {
        return false;
    }
    let rest = text.strip_prefix('*').unwrap_or(text);
    text == "*" || is_label(rest) || (rest.len() < text.len() && rest.strip_prefix('-').is_some_and(is_label))
}

/// Labels joined by dots, an empty one allowed at the end; the last must not be a number alone.
fn are_labels(text: &str) -> bool {
    let parts: Vec<&str> = text.split('.').collect();
    let Some((last, rest)) = parts.split_last() else { return false };
    !is_number(last) && rest.iter().all(|l| is_label(l)) && (is_label(last) || (last.is_empty() && !rest.is_empty()))
}

fn is_number(text: &str) -> bool {
    text.parse::<i64>().is_ok()
}

fn fits_dns(text: &str) -> bool {
    !text.is_empty() && text.len() <= 255
}

/// A host name without wildcard; a short name is one.
pub(crate) fn is_fqdn(text: &str) -> bool {
    fits_dns(text) && are_labels(text)
}

/// A host name whose first label may be or begin with a wildcard.
pub(crate) fn is_wildcard_host(text: &str) -> bool {
    if !fits_dns(text) {
        return false;
    }
    match text.split_once('.') {
        None => is_wildcard_label(text),
        Some((first, rest)) => is_wildcard_label(first) && (rest.is_empty() || are_labels(rest)),
    }
}

/// A wildcard that is more than a whole label: `*foo.com`.
pub(crate) fn is_partial_wildcard(host: &str) -> bool {
    host.contains('*') && host.len() != 1 && !host.starts_with("*.")
}

/// The same for a VirtualService of a gateway, where `outbound_.80_._.host` names a cluster by its SNI.
pub(crate) fn is_gateway_host(text: &str, sni: bool) -> bool {
    if !fits_dns(text) || !sni || !text.starts_with("outbound_") {
        return is_wildcard_host(text);
    }
    let parts: Vec<&str> = text.split('_').collect();
    let [prefix, port, _, host, ..] = parts.as_slice() else { return false };
    *prefix == "outbound"
        && port.trim_matches('.').contains(|c: char| c.is_ascii_digit())
        && host.contains(|c: char| c.is_ascii_alphabetic())
}

/// An IP address.
pub(crate) fn is_address(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok()
}

/// An IP address or a network in CIDR notation.
pub(crate) fn is_network(text: &str) -> bool {
    is_address(text) || text.parse::<ipnet::IpNet>().is_ok()
}

/// 1 to 65535.
pub(crate) fn is_port(number: i64) -> bool {
    (1..=65535).contains(&number)
}

/// `unix://` stripped: an absolute path that names no folder, or an abstract name.
pub(crate) fn is_socket(path: &str) -> bool {
    path.starts_with('@') || (path.starts_with('/') && !path.ends_with('/'))
}

/// What a port's `protocol` may say, case aside.
pub(crate) fn is_protocol(text: &str) -> bool {
    const WORDS: [&str; 12] =
        ["tcp", "udp", "grpc", "grpc-web", "http", "http_proxy", "http2", "https", "tls", "mongo", "redis", "mysql"];
    WORDS.contains(&text.to_ascii_lowercase().as_str())
}

/// Protocols whose requests are routed by their authority.
pub(crate) fn is_http(protocol: &str) -> bool {
    matches!(protocol.to_ascii_lowercase().as_str(), "http" | "http2" | "http_proxy" | "grpc" | "grpc-web")
}

/// Protocols whose connections are routed by their server name.
pub(crate) fn is_tls(protocol: &str) -> bool {
    matches!(protocol.to_ascii_lowercase().as_str(), "https" | "tls")
}

/// A name or value of Kubernetes labels: letters, digits, `-_.`, alphanumeric at both ends.
fn is_qualified(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    ends(bytes.first())
        && ends(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// A label's key: a name, behind a DNS name and `/` if there is one.
pub(crate) fn is_label_key(text: &str) -> bool {
    let (prefix, name) = text.rsplit_once('/').map_or((None, text), |(p, n)| (Some(p), n));
    let prefix_good = prefix.is_none_or(|p| p.len() <= 253 && p.split('.').all(is_label));
    prefix_good && name.len() <= 63 && is_qualified(name)
}

/// A label's value; it may be empty.
pub(crate) fn is_label_value(text: &str) -> bool {
    text.is_empty() || is_qualified(text)
}

/// Characters of an HTTP token (RFC 9110 §5.6.2).
pub(crate) fn is_token(text: &str) -> bool {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !text.is_empty() && text.bytes().all(token)
}

/// Letters, digits, `-` and `_`: what Istio takes where it writes a header.
pub(crate) fn is_plain_header(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// A header name by which a route asks for a claim of the request's token.
pub(crate) fn is_claim_header(name: &str) -> bool {
    const PREFIX: &str = "@request.auth.claims";
    let Some(head) = name.get(..PREFIX.len()).filter(|h| h.eq_ignore_ascii_case(PREFIX)) else { return false };
    let rest = &name[head.len()..];
    (rest.starts_with('.') && rest.len() > 1) || (rest.starts_with('[') && rest.ends_with(']') && rest.len() > 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for good in ["a", "a.b", "a.b.", "*", "*.a.b", "*-a.b", "*a.b", "A.b", "1.a"] {
            assert!(is_wildcard_host(good), "{good}");
        }
        for bad in ["", "a*", "a.*", "*.*", "a_b.c", "a/b", "1.2.3.4", "-a", "a..b", "a.*.b"] {
            assert!(!is_wildcard_host(bad), "{bad}");
        }
        assert!(is_fqdn("a") && is_fqdn("a.b.") && !is_fqdn("*.a") && !is_fqdn("a.7"));
        assert!(is_gateway_host("outbound_.15010_._.a.b", true) && !is_gateway_host("outbound_.15010_._.a.b", false));
        assert!(!is_gateway_host("outbound_.a_._.b", true) && !is_gateway_host("outbound_x", true));
        assert!(is_partial_wildcard("*a.b") && !is_partial_wildcard("*.a") && !is_partial_wildcard("*"));
    }

    #[test]
    fn labels_and_headers() {
        for good in ["app", "app.kubernetes.io/name", "a_b", "a/b"] {
            assert!(is_label_key(good), "{good}");
        }
        for bad in ["", "/a", "a/", "-a", "a@b", "a_b/c", "a*"] {
            assert!(!is_label_key(bad), "{bad}");
        }
        assert!(is_label_value("") && is_label_value("v1.2_3") && !is_label_value("v1*") && !is_label_value("-"));
        assert!(is_token("x-a.b~") && !is_token("a b") && !is_token("a:b"));
        assert!(is_claim_header("@request.auth.claims.a") && is_claim_header("@Request.auth.claims[a][b]"));
        assert!(
            !is_claim_header("@request.auth.claims") && !is_claim_header("@request.auth.claims.ä".get(1..).unwrap())
        );
    }

    #[test]
    fn overlaps() {
        assert!(overlap("*.a.b", "*.b") && overlap("*.b", "x.a.b") && !overlap("*.a", "a") && overlap("a", "a"));
        assert!(within("*.a.b", "*.b") && !within("*.b", "*.a.b") && within("x.b", "*.b") && !within("*", "a"));
    }
}
