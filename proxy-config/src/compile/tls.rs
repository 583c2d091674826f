//! TLS contexts of inbound chains.

use super::view::Settings;
use crate::model::{CommonTls, DownstreamTls, Name, SanKind, SanMatcher, StringMatcher, TlsVersion, Validation};

/// mTLS on a chain. TCP chains also offer the ALPN of the metadata exchange.
pub(super) fn inbound(mesh: &Settings, tcp: bool) -> DownstreamTls {
    let alpn: &[&str] = if tcp { &["istio-peer-exchange", "h2", "http/1.1"] } else { &["h2", "http/1.1"] };
    let domains = mesh
        .peer_domains
        .iter()
        .map(|domain| SanMatcher { kind: SanKind::Any, value: StringMatcher::prefix(format!("spiffe://{domain}/")) });
    DownstreamTls {
        common: CommonTls {
            certificates: vec![Name::from("default")],
            validation: Some(Validation {
                roots: Some(Name::from("ROOTCA")),
                san: domains.collect(),
                accept_untrusted: false,
            }),
            alpn: alpn.iter().map(|a| (*a).to_owned()).collect(),
            min_version: Some(mesh.min_tls),
            max_version: Some(TlsVersion::V1_3),
            cipher_suites: mesh.cipher_suites.clone(),
            ecdh_curves: Vec::new(),
        },
        require_client_certificate: true,
    }
}
