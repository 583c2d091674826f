//! Whether a certificate is acceptable: chain, dates, key usage, names.
//!
//! A server's DNS name plays no part in the mesh: what counts is the SPIFFE identity that configuration expects.

use std::sync::Arc;
use std::time::Duration;

use proxy_config::model::{SanKind, SanMatcher, StringMatcher, StringPattern};
use regex::Regex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerMisbehaved, SignatureScheme,
};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage,
    RevocationOptionsBuilder,
};

use super::certs::Roots;
use super::peer::Peer;
use super::spiffe::SpiffeId;

/// Checks peers by one validation context. As `Arc<PeerVerifier>` it is what rustls asks during handshakes; resumed
/// sessions are put to it again by the handshake itself.
#[derive(Debug)]
pub(super) struct PeerVerifier {
    pub(super) roots: Option<Arc<Roots>>,
    pub(super) names: Vec<NameRule>,
    /// The server's certificate may also carry the server name that was asked for.
    pub(super) accept_server_name: bool,
    /// A client without certificate is refused.
    pub(super) mandatory: bool,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    /// A server's: subjects of the roots, so that a client with several certificates can choose.
    pub(super) hints: Vec<DistinguishedName>,
}

/// One compiled SAN rule.
#[derive(Debug)]
pub(super) struct NameRule {
    kind: SanKind,
    value: StringMatcher,
    regex: Option<Regex>,
}

/// Why names were refused; rustls turns it into the alert `certificate_unknown`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NameMismatch(pub(super) String);

impl std::fmt::Display for NameMismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NameMismatch {}

/// Which side the peer is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Role<'a> {
    Client,
    Server(&'a ServerName<'a>),
}

impl PeerVerifier {
    /// The whole check of a chain, leaf first.
    pub(super) fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let parsed = EndEntityCert::try_from(leaf).map_err(refusal)?;
        if let Some(roots) = &self.roots {
            let anchors = roots.anchors_of(leaf)?;
            lead(&parsed, intermediates, (roots, anchors), self.algorithms.all, (Usage::of(role), now))?;
        }
        self.check_names(leaf, &parsed, role)
    }

    fn check_names(&self, leaf: &CertificateDer<'_>, parsed: &EndEntityCert<'_>, role: Role<'_>) -> Result<(), Error> {
        let peer = Peer::from_certificate(leaf).map_err(mismatch)?;
        let is_svid = peer.uri_sans.iter().any(|uri| uri.starts_with("spiffe://"));
        if is_svid && peer.uri_sans.len() > 1 {
            return Err(mismatch(format!("more than one URI name in the certificate: {}", peer.uri_sans.join(", "))));
        }
        if self.expects(&peer) {
            return Ok(());
        }
        if let (true, Role::Server(name)) = (self.accept_server_name, role)
            && parsed.verify_is_valid_for_subject_name(name).is_ok()
        {
            return Ok(());
        }
        let names = [peer.uri_sans, peer.dns_sans].concat().join(", ");
        Err(mismatch(format!("no name of the certificate is expected here: {names}")))
    }

    /// Whether a client is let in, once its certificate, if it has one, is known to be good.
    pub(super) fn admits(&self, client: &Peer) -> bool {
        if client.hash.is_empty() { !self.mandatory } else { self.expects(client) }
    }

    fn expects(&self, peer: &Peer) -> bool {
        let anybody = self.names.is_empty() && !self.accept_server_name;
        anybody || self.names.iter().any(|rule| rule.holds(peer))
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes().into_iter().filter(|scheme| is_offered(*scheme)).collect()
    }
}

impl Roots {
    /// Where a certificate of this trust domain must lead to.
    fn anchors_of(&self, leaf: &CertificateDer<'_>) -> Result<&[TrustAnchor<'static>], Error> {
        if self.by_domain.is_empty() {
            return Ok(&self.anchors);
        }
        let peer = Peer::from_certificate(leaf).map_err(mismatch)?;
        let id = peer.uri_sans.first().and_then(|uri| uri.parse::<SpiffeId>().ok());
        let own = id.as_ref().and_then(|id| self.by_domain.get(id.trust_domain()));
        own.map(Vec::as_slice).ok_or_else(|| CertificateError::UnknownIssuer.into())
    }
}

/// Whether a chain leads to roots at a time, as a client of the mesh asks.
pub(super) fn leads_to(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &Roots,
    at: Duration,
) -> Result<(), Error> {
    let parsed = EndEntityCert::try_from(leaf).map_err(refusal)?;
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
    let usage = Usage::of(Role::Client);
    let at = UnixTime::since_unix_epoch(at);
    lead(&parsed, intermediates, (roots, roots.anchors_of(leaf)?), algorithms.all, (usage, at))
}

/// The chain, with revocation lists where there are any: like Envoy's, they must speak of every certificate below the root
/// and must not be out of date.
fn lead(
    leaf: &EndEntityCert<'_>,
    intermediates: &[CertificateDer<'_>],
    (roots, anchors): (&Roots, &[TrustAnchor<'_>]),
    algorithms: &[&dyn SignatureVerificationAlgorithm],
    (usage, now): (Usage, UnixTime),
) -> Result<(), Error> {
    let lists: Vec<&CertRevocationList<'_>> = roots.revoked.iter().collect();
    let revocation = RevocationOptionsBuilder::new(&lists)
        .ok()
        .map(|options| options.with_expiration_policy(ExpirationPolicy::Enforce).build());
    let verified = leaf.verify_for_usage(algorithms, anchors, intermediates, now, usage, revocation, None);
    verified.map(|_| ()).map_err(refusal)
}

/// What Envoy offers: no Ed25519, nothing post-quantum.
fn is_offered(scheme: SignatureScheme) -> bool {
    use SignatureScheme as S;
    matches!(
        scheme,
        S::ECDSA_NISTP256_SHA256
            | S::ECDSA_NISTP384_SHA384
            | S::ECDSA_NISTP521_SHA512
            | S::RSA_PSS_SHA256
            | S::RSA_PSS_SHA384
            | S::RSA_PSS_SHA512
            | S::RSA_PKCS1_SHA256
            | S::RSA_PKCS1_SHA384
            | S::RSA_PKCS1_SHA512
    )
}

impl NameRule {
    pub(super) fn compile(said: &SanMatcher) -> Result<Self, String> {
        let regex = match &said.value.pattern {
            StringPattern::Regex(pattern) => {
                let anchored = format!("^(?:{pattern})$");
                Some(Regex::new(&anchored).map_err(|e| format!("name rule {pattern:?}: {e}"))?)
            }
            _ => None,
        };
        Ok(Self { kind: said.kind, value: said.value.clone(), regex })
    }

    fn holds(&self, peer: &Peer) -> bool {
        let any = |names: &[String]| names.iter().any(|name| self.matches(name));
        let ip = || peer.ip_sans.iter().any(|ip| self.matches(&ip.to_string()));
        match self.kind {
            SanKind::Uri => any(&peer.uri_sans),
            SanKind::Dns => any(&peer.dns_sans),
            SanKind::Email => any(&peer.email_sans),
            SanKind::Ip => ip(),
            SanKind::Any => any(&peer.uri_sans) || any(&peer.dns_sans) || any(&peer.email_sans) || ip(),
        }
    }

    fn matches(&self, name: &str) -> bool {
        if let Some(regex) = &self.regex {
            return regex.is_match(name);
        }
        if self.value.ignore_case {
            return compare(&lower(&self.value.pattern), &name.to_ascii_lowercase());
        }
        compare(&self.value.pattern, name)
    }
}

fn compare(pattern: &StringPattern, name: &str) -> bool {
    match pattern {
        StringPattern::Exact(p) => name == p,
        StringPattern::Prefix(p) => name.starts_with(p),
        StringPattern::Suffix(p) => name.ends_with(p),
        StringPattern::Contains(p) => name.contains(p),
        StringPattern::Regex(_) => false,
    }
}

fn lower(pattern: &StringPattern) -> StringPattern {
    match pattern {
        StringPattern::Exact(p) => StringPattern::Exact(p.to_ascii_lowercase()),
        StringPattern::Prefix(p) => StringPattern::Prefix(p.to_ascii_lowercase()),
        StringPattern::Suffix(p) => StringPattern::Suffix(p.to_ascii_lowercase()),
        StringPattern::Contains(p) => StringPattern::Contains(p.to_ascii_lowercase()),
        StringPattern::Regex(p) => StringPattern::Regex(p.clone()),
    }
}

fn mismatch(why: String) -> Error {
    CertificateError::Other(OtherError(Arc::new(NameMismatch(why)))).into()
}

/// webpki's finding as the error whose alert Envoy would have sent.
fn refusal(error: webpki::Error) -> Error {
    use webpki::Error as E;
    match error {
        E::CertExpired { .. } | E::InvalidCertValidity => CertificateError::Expired.into(),
        E::CertNotValidYet { .. } => CertificateError::NotValidYet.into(),
        E::CertRevoked => CertificateError::Revoked.into(),
        E::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus.into(),
        E::CrlExpired { .. } => CertificateError::UnknownRevocationStatus.into(),
        E::RequiredEkuNotFoundContext(_) | E::EmptyEkuExtension => CertificateError::InvalidPurpose.into(),
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding.into(),
        E::UnsupportedCriticalExtension => CertificateError::UnhandledCriticalExtension.into(),
        // Roots of different meshes share istiod's subject, so "signed by another key of that name" is a foreign CA too.
        E::InvalidSignatureForPublicKey
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_)
        | E::CaUsedAsEndEntity
        | E::UnknownIssuer => CertificateError::UnknownIssuer.into(),
        other => CertificateError::Other(OtherError(Arc::new(other))).into(),
    }
}

/// Extended key usage: what is not restricted may be used for anything.
struct Usage(KeyUsage);

impl Usage {
    fn of(role: Role<'_>) -> Self {
        match role {
            Role::Client => Self(KeyUsage::client_auth()),
            Role::Server(_) => Self(KeyUsage::server_auth()),
        }
    }
}

impl ExtendedKeyUsageValidator for Usage {
    fn validate(&self, iter: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        self.0.validate(iter)
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(leaf, intermediates, Role::Client, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        offered(dss)?;
        verify_tls12_signature(message, leaf, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        offered(dss)?;
        verify_tls13_signature(message, leaf, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(leaf, intermediates, Role::Server(server_name), now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ClientCertVerifier::verify_tls12_signature(self, message, leaf, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ClientCertVerifier::verify_tls13_signature(self, message, leaf, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

fn offered(dss: &DigitallySignedStruct) -> Result<(), Error> {
    if is_offered(dss.scheme) {
        return Ok(());
    }
    Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
}
