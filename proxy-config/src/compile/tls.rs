//! TLS contexts of inbound chains.

use super::view::Settings;
use crate::istio::mesh_config::TlsProtocol;
use crate::istio::sidecar::ServerTls;
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

/// TLS that a Sidecar says for one of its ports: certificates from files, no mesh identity.
pub(super) fn of_sidecar(said: &ServerTls) -> DownstreamTls {
    let version = |said: TlsProtocol| match said {
        TlsProtocol::Auto => None,
        TlsProtocol::V1_2 => Some(TlsVersion::V1_2),
        TlsProtocol::V1_3 => Some(TlsVersion::V1_3),
    };
    let mutual = said.mode == "MUTUAL";
    let exact = |san: &String| SanMatcher { kind: SanKind::Any, value: StringMatcher::exact(san.clone()) };
    DownstreamTls {
        common: CommonTls {
            certificates: vec![Name::from(format!("file-cert:{}~{}", said.server_certificate, said.private_key))],
            validation: mutual.then(|| Validation {
                roots: Some(Name::from(format!("file-root:{}", said.ca_certificates))),
                san: said.subject_alt_names.iter().map(exact).collect(),
                accept_untrusted: false,
            }),
            alpn: ["h2", "http/1.1"].map(str::to_owned).to_vec(),
            min_version: version(said.min_protocol_version),
            max_version: version(said.max_protocol_version),
            cipher_suites: said.cipher_suites.clone(),
            ecdh_curves: Vec::new(),
        },
        require_client_certificate: mutual,
    }
}
