//! What a handshake told about the other end, ready for policy, XFCC and logs.

use std::fmt::Write;
use std::net::IpAddr;

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};

use super::{SpiffeId, pem};

/// The authenticated peer of a connection. Without a certificate the identity fields are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    /// The one SPIFFE identity, when the certificate has one.
    pub spiffe: Option<SpiffeId>,
    /// URI names in the order of the certificate.
    pub uri_sans: Vec<String>,
    /// DNS names in the order of the certificate.
    pub dns_sans: Vec<String>,
    /// IP address names.
    pub ip_sans: Vec<IpAddr>,
    /// Email names.
    pub email_sans: Vec<String>,
    /// Subject in the order and the escaping of RFC 2253, most specific first.
    pub subject: String,
    /// SHA-256 of the leaf certificate, lower-case hex; empty without a certificate.
    pub hash: String,
    /// ALPN that was selected.
    pub alpn: Option<String>,
    /// Server name that the client sent.
    pub sni: Option<String>,
    /// `TLSv1.3` or `TLSv1.2`.
    pub tls_version: &'static str,
    /// Cipher suite by its IANA name.
    pub cipher: String,
    /// The session was resumed; the certificate is the one of the first handshake, checked again.
    pub resumed: bool,
    leaf: Vec<u8>,
}

impl Peer {
    /// Reads a leaf certificate. Fields of the connection itself are left for the handshake to fill in.
    pub(super) fn from_certificate(leaf: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, certificate) =
            X509Certificate::from_der(leaf).map_err(|e| format!("the peer's certificate cannot be read: {e}"))?;
        let mut peer = Self {
            subject: rfc2253(certificate.subject()),
            hash: hex(sha256(leaf).as_ref()),
            leaf: leaf.to_vec(),
            ..Self::default()
        };
        let names = certificate.subject_alternative_name().map_err(|e| format!("subject alternative names: {e}"))?;
        for name in names.iter().flat_map(|san| &san.value.general_names) {
            match name {
                GeneralName::URI(uri) => peer.uri_sans.push((*uri).to_owned()),
                GeneralName::DNSName(dns) => peer.dns_sans.push((*dns).to_owned()),
                GeneralName::RFC822Name(email) => peer.email_sans.push((*email).to_owned()),
                GeneralName::IPAddress(bytes) => peer.ip_sans.extend(ip(bytes)),
                _ => {}
            }
        }
        if let [only] = &peer.uri_sans[..] {
            peer.spiffe = only.parse().ok();
        }
        Ok(peer)
    }

    /// Whether the peer presented a certificate.
    pub fn has_certificate(&self) -> bool {
        !self.leaf.is_empty()
    }

    /// What Envoy's RBAC takes as principal when it is not asked for a SAN: first URI, else first DNS name, else subject.
    pub fn principal(&self) -> &str {
        self.uri_sans.first().or_else(|| self.dns_sans.first()).unwrap_or(&self.subject)
    }

    /// The leaf certificate as PEM, made on demand; `None` without one.
    pub fn pem(&self) -> Option<String> {
        (!self.leaf.is_empty()).then(|| pem("CERTIFICATE", &self.leaf))
    }
}

/// SHA-256 in lower-case hex.
pub fn hex_sha256(bytes: &[u8]) -> String {
    hex(sha256(bytes).as_ref())
}

/// SHA-256 by the TLS provider, so that no second crypto library is needed.
pub(super) fn sha256(bytes: &[u8]) -> rustls::crypto::hash::Output {
    let suite = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let tls13 = suite.tls13().expect("the suite is one of TLS 1.3");
    tls13.common.hash_provider.hash(bytes)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// A distinguished name as RFC 2253 writes it: reversed, `,` between and `+` inside RDNs, special characters escaped.
fn rfc2253(name: &X509Name<'_>) -> String {
    let mut rdns: Vec<_> = name.iter().collect();
    rdns.reverse();
    let mut text = String::new();
    for rdn in rdns {
        for (i, attribute) in rdn.iter().enumerate() {
            let separator = if i > 0 { "+" } else { "," };
            if !text.is_empty() {
                text.push_str(separator);
            }
            match oid2abbrev(attribute.attr_type(), oid_registry()) {
                Ok(short) => text.push_str(short),
                Err(_) => text.push_str(&attribute.attr_type().to_id_string()),
            }
            text.push('=');
            escape_into(&mut text, attribute.as_str().map_or(attribute.as_slice(), str::as_bytes));
        }
    }
    text
}

fn escape_into(text: &mut String, value: &[u8]) {
    for (i, &byte) in value.iter().enumerate() {
        let (first, last) = (i == 0, i + 1 == value.len());
        let escaped = match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => true,
            b'#' => first,
            b' ' => first || last,
            _ => false,
        };
        if escaped {
            text.push('\\');
            text.push(char::from(byte));
        } else if (b' '..=b'~').contains(&byte) {
            text.push(char::from(byte));
        } else {
            write!(text, "\\{byte:02X}").expect("writing to a string cannot fail");
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn certificate(fill: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        fill(&mut params);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn names_are_read_in_order() {
        let leaf = certificate(|p| {
            p.subject_alt_names = vec![
                SanType::URI("spiffe://td/ns/a/sa/b".try_into().unwrap()),
                SanType::DnsName("x.y".try_into().unwrap()),
                SanType::IpAddress("10.0.0.1".parse().unwrap()),
            ];
        });
        let peer = Peer::from_certificate(&leaf).unwrap();
        assert_eq!(peer.uri_sans, ["spiffe://td/ns/a/sa/b"]);
        assert_eq!(peer.dns_sans, ["x.y"]);
        assert_eq!(peer.ip_sans, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(peer.spiffe.as_ref().and_then(SpiffeId::namespace), Some("a"));
        assert_eq!((peer.hash.len(), &*peer.subject), (64, ""));
        assert!(peer.pem().unwrap().starts_with("-----BEGIN CERTIFICATE-----\nMII"));
    }

    #[test]
    fn subjects_are_reversed_and_escaped() {
        let leaf = certificate(|p| {
            p.distinguished_name.push(DnType::OrganizationName, "Acme, Inc");
            p.distinguished_name.push(DnType::CommonName, "fe \"x\"");
        });
        assert_eq!(Peer::from_certificate(&leaf).unwrap().subject, r#"CN=fe \"x\",O=Acme\, Inc"#);
    }

    #[test]
    fn edges_of_escaping() {
        for (value, expected) in
            [("#a#", "\\#a#"), (" a ", "\\ a\\ "), ("\u{e4}", "\\C3\\A4"), ("a\nb", "a\\0Ab"), ("", "")]
        {
            let mut text = String::new();
            escape_into(&mut text, value.as_bytes());
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn hashing_is_sha256() {
        assert!(hex(sha256(b"abc").as_ref()).starts_with("ba7816bf8f01cfea"));
    }

    #[test]
    fn garbage_is_an_error() {
        assert!(Peer::from_certificate(&CertificateDer::from(vec![1, 2, 3])).is_err());
    }
}
