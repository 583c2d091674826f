//! `x-forwarded-client-cert`: who the client is, told to the application.

use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use proxy_config::model::{ClientCertDetails, ForwardClientCert};

use crate::tls::Peer;

pub(super) const XFCC: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// What stays as it is in an encoded certificate.
const PEM: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Our element for a connection, made once. `None` without a client certificate, or when a name in it cannot be written
/// in a header.
pub(super) fn element(peer: Option<&Peer>, local: &[String], parts: ClientCertDetails) -> Option<HeaderValue> {
    let peer = peer.filter(|p| p.has_certificate())?;
    let mut text = String::with_capacity(256);
    let mut put = |name: &str, value: &str| {
        if !text.is_empty() {
            text.push(';');
        }
        text.push_str(name);
        text.push('=');
        text.push_str(value);
    };
    let each = |put: &mut dyn FnMut(&str, &str), name: &str, values: &[String]| {
        for value in values.iter().filter(|v| !v.contains([';', ',', '"'])) {
            put(name, value);
        }
    };
    if local.is_empty() {
        put("By", "");
    }
    each(&mut put, "By", local);
    put("Hash", &peer.hash);
    if let (true, Some(pem)) = (parts.cert || parts.chain, peer.pem()) {
        let encoded = format!("\"{}\"", utf8_percent_encode(&pem, PEM));
        if parts.cert {
            put("Cert", &encoded);
        }
        if parts.chain {
            put("Chain", &encoded);
        }
    }
    if parts.subject {
        put("Subject", &format!("\"{}\"", quoted(&peer.subject)));
    }
    if parts.uri {
        if peer.uri_sans.is_empty() {
            put("URI", "");
        }
        each(&mut put, "URI", &peer.uri_sans);
    }
    if parts.dns {
        each(&mut put, "DNS", &peer.dns_sans);
    }
    HeaderValue::try_from(text).ok()
}

/// The subject inside quotes: what RFC 2253 escaped stays escaped, a bare quote cannot occur.
fn quoted(subject: &str) -> &str {
    subject
}

/// Applies the mode to a request. `element` is that of the connection.
pub(super) fn apply(headers: &mut HeaderMap, mode: ForwardClientCert, element: Option<&HeaderValue>) {
    match (mode, element) {
        (ForwardClientCert::AlwaysForwardOnly, _) | (ForwardClientCert::ForwardOnly, Some(_)) => {}
        (ForwardClientCert::Sanitize, _) | (_, None) => {
            headers.remove(XFCC);
        }
        (ForwardClientCert::SanitizeSet, Some(element)) => {
            headers.insert(XFCC, element.clone());
        }
        (ForwardClientCert::AppendForward, Some(element)) => {
            let mut all = Vec::new();
            for value in headers.get_all(XFCC) {
                all.extend_from_slice(value.as_bytes());
                all.push(b',');
            }
            if all.is_empty() {
                headers.insert(XFCC, element.clone());
                return;
            }
            all.extend_from_slice(element.as_bytes());
            let joined = HeaderValue::from_bytes(&all).expect("parts of header values, joined with commas");
            headers.insert(XFCC, joined);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes() {
        use ForwardClientCert::*;
        let mine = HeaderValue::from_static("By=me");
        for (mode, element, sent, expected) in [
            (AppendForward, Some(&mine), &["a", "b"][..], Some("a,b,By=me")),
            (AppendForward, Some(&mine), &[], Some("By=me")),
            (AppendForward, None, &["a"], None),
            (Sanitize, Some(&mine), &["a"], None),
            (SanitizeSet, Some(&mine), &["a"], Some("By=me")),
            (SanitizeSet, None, &["a"], None),
            (ForwardOnly, Some(&mine), &["a"], Some("a")),
            (ForwardOnly, None, &["a"], None),
            (AlwaysForwardOnly, None, &["a"], Some("a")),
        ] {
            let mut headers = HeaderMap::new();
            for value in sent {
                headers.append(XFCC, HeaderValue::from_static(value));
            }
            apply(&mut headers, mode, element);
            let all: Vec<_> = headers.get_all(XFCC).iter().map(|v| v.to_str().unwrap()).collect();
            assert_eq!(all.first().copied(), expected, "{mode:?} {sent:?}");
        }
    }
}
