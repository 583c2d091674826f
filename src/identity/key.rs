//! Keys and certificate requests, in the agent's forms.

use anyhow::{Context, Result, anyhow, bail};
use proxy_config::bootstrap::KeyKind;
use rcgen::string::{Ia5String, PrintableString};
use rcgen::{
    CertificateParams, CustomExtension, DistinguishedName, DnType, DnValue, KeyPair, PKCS_ECDSA_P256_SHA256,
    PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256, RsaKeySize,
};

use crate::tls::pem;

/// Object identifier of subjectAltName.
const SAN: [u64; 4] = [2, 5, 29, 17];
/// DER tags.
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const SEQUENCE: u8 = 0x30;
/// Name of a URI in a subjectAltName: context-specific 6.
const URI: u8 = 0x86;
/// Explicit context-specific tags.
const PARAMETERS: u8 = 0xa0;
const PUBLIC_KEY: u8 = 0xa1;

/// How a key is written to files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyForm {
    /// PKCS#1 or SEC1, the agent's default.
    Traditional,
    /// PKCS#8 (`PKCS8_KEY`).
    Pkcs8,
}

/// A key and the request for its certificate.
#[derive(Debug)]
pub(super) struct Request {
    /// PKCS#10, PEM.
    pub(super) csr: String,
    /// The key, PEM.
    pub(super) key: String,
}

impl Request {
    /// Makes a key for a SPIFFE id, whose parts may be empty: the CA signs for the caller, not for what is asked.
    pub(super) fn make(kind: KeyKind, form: KeyForm, id: &str) -> Result<Self> {
        let pair = match kind {
            KeyKind::Rsa(bits) => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, rsa_size(bits)?)?,
            KeyKind::P256 => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?,
            KeyKind::P384 => KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384)?,
        };
        let mut params = CertificateParams::default();
        // As the agent writes it: an organisation without a name, and so a critical subjectAltName by hand.
        params.distinguished_name = DistinguishedName::new();
        let nobody = DnValue::PrintableString(PrintableString::try_from("")?);
        params.distinguished_name.push(DnType::OrganizationName, nobody);
        let id = Ia5String::try_from(id).context("SPIFFE id")?;
        let name = der(SEQUENCE, &der(URI, id.as_str().as_bytes()));
        let mut san = CustomExtension::from_oid_content(&SAN, name);
        san.set_criticality(true);
        params.custom_extensions = vec![san];
        let csr = pem("CERTIFICATE REQUEST", params.serialize_request(&pair)?.der());
        let key = match form {
            KeyForm::Pkcs8 => pem("PRIVATE KEY", pair.serialized_der()),
            KeyForm::Traditional => traditional(kind, &pair)?,
        };
        Ok(Self { csr, key })
    }
}

fn rsa_size(bits: u16) -> Result<RsaKeySize> {
    match bits {
        2048 => Ok(RsaKeySize::_2048),
        3072 => Ok(RsaKeySize::_3072),
        4096 => Ok(RsaKeySize::_4096),
        _ => bail!("WORKLOAD_RSA_KEY_SIZE={bits}: expected 2048, 3072 or 4096"),
    }
}

/// PKCS#8 is the traditional key in an envelope that says which kind it is. For RSA the envelope is taken off; an
/// elliptic key also moves the curve's name inside.
fn traditional(kind: KeyKind, pair: &KeyPair) -> Result<String> {
    let broken = || anyhow!("a key of our own is no PKCS#8");
    let (_, envelope, _) = element(pair.serialized_der()).ok_or_else(broken)?;
    let (_, _, rest) = element(envelope).ok_or_else(broken)?;
    let (_, algorithm, rest) = element(rest).ok_or_else(broken)?;
    let (_, key, _) = element(rest).ok_or_else(broken)?;
    if matches!(kind, KeyKind::Rsa(_)) {
        return Ok(pem("RSA PRIVATE KEY", key));
    }
    let (_, _, curve) = element(algorithm).ok_or_else(broken)?;
    let (_, inner, _) = element(key).ok_or_else(broken)?;
    let (_, _, rest) = element(inner).ok_or_else(broken)?;
    let (_, secret, _) = element(rest).ok_or_else(broken)?;
    let public = [&[0], pair.public_key_raw()].concat();
    let fields = [
        der(INTEGER, &[1]),
        der(OCTET_STRING, secret),
        der(PARAMETERS, curve),
        der(PUBLIC_KEY, &der(BIT_STRING, &public)),
    ];
    Ok(pem("EC PRIVATE KEY", &der(SEQUENCE, &fields.concat())))
}

/// One DER element.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let length = &length[length.iter().position(|byte| *byte != 0).unwrap_or(length.len() - 1)..];
    let mut out = vec![tag];
    if content.len() >= 0x80 {
        out.push(0x80 | u8::try_from(length.len()).expect("a length has 8 bytes at most"));
    }
    out.extend_from_slice(length);
    out.extend_from_slice(content);
    out
}

/// Tag and content of the first element, and what follows it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (length, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
        (length.iter().fold(0, |all, byte| (all << 8) | usize::from(*byte)), rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::*;

    use super::*;

    const ID: &str = "spiffe://cluster.local/ns/payments/sa/payment-service-sa";

    /// The request without key and signature, beside what it says of them.
    fn read(csr: &str) -> (String, String, String, Vec<u8>) {
        let (_, pem) = parse_x509_pem(csr.as_bytes()).unwrap();
        let (_, request) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let info = &request.certification_request_info;
        let key = info.subject_pki.algorithm.algorithm.to_id_string();
        let signature = request.signature_algorithm.algorithm.to_id_string();
        let names: Vec<String> = request.requested_extensions().unwrap().map(|e| format!("{e:?}")).collect();
        (names.join(";"), key, signature, info.subject.as_raw().to_vec())
    }

    #[test]
    fn a_request_reads_as_the_agents() {
        let rsa = Request::make(KeyKind::Rsa(2048), KeyForm::Traditional, ID).unwrap();
        let (names, key, signature, subject) = read(&rsa.csr);
        assert!(names.contains(ID), "{names}");
        assert_eq!((&*key, &*signature), ("1.2.840.113549.1.1.1", "1.2.840.113549.1.1.11"));
        // SEQUENCE { SET { SEQUENCE { organisation, PrintableString "" } } }
        assert_eq!(subject, [0x30, 0x0b, 0x31, 0x09, 0x30, 0x07, 0x06, 0x03, 0x55, 0x04, 0x0a, 0x13, 0x00]);
        let (_, pem) = parse_x509_pem(rsa.csr.as_bytes()).unwrap();
        let critical = [0x06, 0x03, 0x55, 0x1d, 0x11, 0x01, 0x01, 0xff];
        assert!(pem.contents.windows(critical.len()).any(|w| w == critical));
        let (_, _, signature, _) = read(&Request::make(KeyKind::P384, KeyForm::Pkcs8, ID).unwrap().csr);
        assert_eq!(signature, "1.2.840.10045.4.3.3");
    }

    #[test]
    fn keys_are_written_as_asked_and_can_be_read_back() {
        let (root, _) = crate::ca::Root::generate("test").unwrap();
        let chain = root.certificate();
        for (kind, form, label) in [
            (KeyKind::Rsa(2048), KeyForm::Traditional, "RSA PRIVATE KEY"),
            (KeyKind::Rsa(2048), KeyForm::Pkcs8, "PRIVATE KEY"),
            (KeyKind::P256, KeyForm::Traditional, "EC PRIVATE KEY"),
            (KeyKind::P256, KeyForm::Pkcs8, "PRIVATE KEY"),
            (KeyKind::P384, KeyForm::Traditional, "EC PRIVATE KEY"),
        ] {
            let made = Request::make(kind, form, ID).unwrap();
            assert!(made.key.starts_with(&format!("-----BEGIN {label}-----\n")), "{}", made.key);
            assert!(made.key.lines().all(|line| line.len() <= 64));
            // The certificate is another key's, which can only be found out when this key was understood.
            let error = crate::tls::Identity::from_pem(chain.as_bytes(), made.key.as_bytes()).unwrap_err();
            assert!(error.contains("KeyMismatch") || error.contains("do not match"), "{label}: {error}");
        }
    }

    #[test]
    fn an_empty_trust_domain_is_no_error_and_odd_sizes_are() {
        Request::make(KeyKind::P256, KeyForm::Traditional, "spiffe:///ns/a/sa/b").unwrap();
        let error = Request::make(KeyKind::Rsa(1024), KeyForm::Traditional, ID).unwrap_err();
        assert!(error.to_string().contains("WORKLOAD_RSA_KEY_SIZE=1024"), "{error}");
    }

    #[test]
    fn lengths_of_der() {
        assert_eq!(der(SEQUENCE, &[]), [0x30, 0]);
        assert_eq!(der(SEQUENCE, &[0; 0x80])[..3], [0x30, 0x81, 0x80]);
        assert_eq!(der(SEQUENCE, &[0; 0x100])[..4], [0x30, 0x82, 1, 0]);
        for length in [0, 1, 127, 128, 255, 256, 70_000] {
            let bytes = der(OCTET_STRING, &vec![7; length]);
            assert_eq!(element(&bytes), Some((OCTET_STRING, &*vec![7; length], &[][..])));
        }
        assert_eq!(element(&[0x30]), None);
        assert_eq!(element(&[0x30, 0x82, 1]), None);
        assert_eq!(element(&[0x30, 5, 1]), None);
    }
}
