//! From what configuration says to what a handshake offers.
//!
//! The library refuses a handshake when the client's protocols and ours share nothing, and mesh clients offer names that
//! are never selected. So a server context is a set of equal configurations that differ in one thing, the one protocol
//! they may select; which one is used is decided when the ClientHello has been read.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use proxy_config::model::{CommonTls, DownstreamTls, TlsVersion, UpstreamTls, Validation};
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::{self, cipher_suite as suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::{
    ClientConfig, DistinguishedName, RootCertStore, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion,
};

use super::certs::{Identity, Roots, Secrets};
use super::peer::{Peer, sha256};
use super::verify::{NameRule, PeerVerifier};

/// Sessions that a cluster remembers, one for each server name.
const CLIENT_SESSIONS: usize = 64;

/// TLS termination of one filter chain, compiled; cheap to clone, shared by all workers.
#[derive(Clone)]
pub struct ServerTls(Arc<ServerInner>);

struct ServerInner {
    /// In the server's order of preference.
    by_alpn: Vec<(String, Arc<ServerConfig>)>,
    without_alpn: Arc<ServerConfig>,
    verifier: Option<Arc<PeerVerifier>>,
    /// Who is connected, by certificate. Touched once per handshake, never per request.
    peers: Mutex<Peers>,
}

/// TLS origination of one cluster, compiled; cheap to clone, shared by all workers.
#[derive(Clone)]
pub struct ClientTls(Arc<ClientInner>);

/// Small before its first connection: a mesh has thousands of clusters of which a proxy calls a few.
struct ClientInner {
    /// What it has in common with other clusters; it trusts nobody.
    base: Arc<ClientConfig>,
    sni: String,
    auto_sni: bool,
    alpn: Vec<String>,
    verifier: Arc<PeerVerifier>,
    /// One configuration for each list of protocols that was asked for. Touched once per new connection, never per
    /// request; the lists are those of the configuration, a handful. They share the sessions of the first.
    by_alpn: Mutex<HashMap<Vec<String>, Arc<ClientConfig>>>,
}

/// Peers that connections hold, so that those on which the same is known of the same client hold it once.
#[derive(Default)]
struct Peers {
    known: HashMap<String, Weak<Peer>>,
    /// So many are looked through for those who have left.
    full: usize,
}

impl Peers {
    /// Fewer are not looked through.
    const FEW: usize = 64;

    fn share(&mut self, peer: Peer) -> Arc<Peer> {
        if let Some(known) = self.known.get(&peer.hash).and_then(Weak::upgrade).filter(|known| **known == peer) {
            return known;
        }
        if self.known.len() >= self.full.max(Self::FEW) {
            self.known.retain(|_, peer| peer.strong_count() > 0);
            self.full = 2 * self.known.len();
        }
        let peer = Arc::new(peer);
        self.known.insert(peer.hash.clone(), Arc::downgrade(&peer));
        peer
    }
}

/// Contexts by content, so that a configuration push that changes nothing keeps tickets and sessions.
#[derive(Default)]
pub(super) struct Contexts {
    servers: Mutex<Known<ServerInner>>,
    clients: Mutex<Known<ClientInner>>,
    /// What clients are made from: versions, suites, own certificate.
    client_bases: Mutex<Known<ClientConfig>>,
}

/// By the digest of the content: a cluster's settings are longer as a text than everything else that is kept of them.
type Known<T> = HashMap<[u8; 32], Weak<T>>;

impl ServerTls {
    /// Compiles a chain's context. `chain_key` names the chain: tickets of one chain mean nothing to another, even with
    /// equal settings. The error names what is missing or wrong.
    pub fn compile(said: &DownstreamTls, secrets: &Secrets, chain_key: &str) -> Result<Self, String> {
        let key = format!("{chain_key} {said:?} {}", material(&said.common, secrets));
        let inner = cached(&secrets.contexts().servers, &key, || ServerInner::build(said, secrets))?;
        Ok(Self(inner))
    }

    /// What is wrong with a chain's context whatever secrets there are.
    ///
    /// # Errors
    /// Names it.
    pub fn check(said: &DownstreamTls) -> Result<(), String> {
        check(&said.common)?;
        if said.common.certificates.is_empty() {
            return Err("a server needs a certificate and none is named".to_owned());
        }
        match &said.common.validation {
            None if said.require_client_certificate => {
                Err("client certificates are required and nothing says how to check them".to_owned())
            }
            Some(validation) if validation.roots.is_none() && !validation.accept_untrusted => {
                Err("client certificates cannot be checked without roots".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// The configuration that answers this list of offered protocols: the first of ours that the client offers, else
    /// one that selects nothing.
    pub(super) fn for_offer<'a>(&self, offered: impl Iterator<Item = &'a [u8]>) -> Arc<ServerConfig> {
        let offered: Vec<&[u8]> = offered.collect();
        let chosen = self.0.by_alpn.iter().find(|(name, _)| offered.contains(&name.as_bytes()));
        Arc::clone(chosen.map_or(&self.0.without_alpn, |(_, config)| config))
    }

    pub(super) fn verifier(&self) -> Option<&PeerVerifier> {
        self.0.verifier.as_deref()
    }

    /// The peer for its connection to keep.
    pub(super) fn share(&self, peer: Peer) -> Arc<Peer> {
        self.0.peers.lock().unwrap_or_else(PoisonError::into_inner).share(peer)
    }

    /// Whether a peer that another context admitted would be admitted here too, by its names; its certificate was
    /// verified when it came.
    pub fn admits(&self, peer: &Peer) -> bool {
        self.0.verifier.as_ref().is_none_or(|verifier| verifier.admits(peer))
    }
}

impl ServerInner {
    fn build(said: &DownstreamTls, secrets: &Secrets) -> Result<Self, String> {
        ServerTls::check(said)?;
        let (provider, versions) = provider(&said.common)?;
        let identity = identity(&said.common, secrets)?.expect("a certificate is named");
        let verifier = server_verifier(said, secrets, &provider)?;
        let builder = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&versions)
            .map_err(|e| format!("TLS versions: {e}"))?;
        let builder = match &verifier {
            Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier) as _),
            None => builder.with_no_client_auth(),
        };
        let mut base = builder
            .with_single_cert(identity.chain.clone(), identity.key.clone_key())
            .map_err(|e| format!("certificate and key: {e}"))?;
        base.ignore_client_order = true;
        base.ticketer = aws_lc_rs::Ticketer::new().map_err(|e| format!("session ticket key: {e}"))?;
        let by_alpn = said.common.alpn.iter().map(|name| {
            let mut config = base.clone();
            config.alpn_protocols = vec![name.as_bytes().to_vec()];
            (name.clone(), Arc::new(config))
        });
        Ok(Self { by_alpn: by_alpn.collect(), without_alpn: Arc::new(base), verifier, peers: Mutex::default() })
    }
}

impl ClientTls {
    /// Compiles a cluster's context. The error names what is missing or wrong.
    pub fn compile(said: &UpstreamTls, secrets: &Secrets) -> Result<Self, String> {
        let key = format!("{said:?} {}", material(&said.common, secrets));
        let inner = cached(&secrets.contexts().clients, &key, || ClientInner::build(said, secrets))?;
        Ok(Self(inner))
    }

    /// What is wrong with a cluster's context whatever secrets there are.
    ///
    /// # Errors
    /// Names it.
    pub fn check(said: &CommonTls) -> Result<(), String> {
        check(said)
    }

    /// For a server outside the mesh's data plane, as istiod: its certificate leads to `roots` and carries `name` (DNS or
    /// address). `identity` is presented if the server asks.
    pub fn to_server(name: &str, roots: Roots, identity: Option<Identity>) -> Result<Self, String> {
        const OWN: &str = "own";
        const TRUSTED: &str = "trusted";
        let certificates = identity.iter().map(|_| OWN.into()).collect();
        let mut secrets = Secrets::new().with_roots(TRUSTED, roots);
        if let Some(identity) = identity {
            secrets = secrets.with_identity(OWN, identity);
        }
        let validation = Some(Validation { roots: Some(TRUSTED.into()), ..Validation::default() });
        let common = CommonTls { certificates, validation, ..CommonTls::default() };
        let said =
            UpstreamTls { common, sni: name.to_owned(), auto_sni_san_validation: true, ..UpstreamTls::default() };
        Self::compile(&said, &secrets)
    }

    /// The configured server name; empty sends none.
    pub fn sni(&self) -> &str {
        &self.0.sni
    }

    /// The server name is the request's host (`auto_host_sni`).
    pub fn auto_sni(&self) -> bool {
        self.0.auto_sni
    }

    /// The configured protocols, for connections that no filter rewrites.
    pub fn alpn(&self) -> &[String] {
        &self.0.alpn
    }

    pub(super) fn for_alpn(&self, alpn: &[String]) -> Arc<ClientConfig> {
        let mut known = self.0.by_alpn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = known.get(alpn) {
            return Arc::clone(config);
        }
        let mut config = known.values().next().map_or_else(|| self.0.first(), |config| ClientConfig::clone(config));
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let config = Arc::new(config);
        known.insert(alpn.to_vec(), Arc::clone(&config));
        config
    }

    pub(super) fn verifier(&self) -> &PeerVerifier {
        &self.0.verifier
    }
}

impl ClientInner {
    fn build(said: &UpstreamTls, secrets: &Secrets) -> Result<Self, String> {
        let base = client_base(&said.common, secrets)?;
        let verifier = client_verifier(said, secrets, base.crypto_provider())?;
        Ok(Self {
            base,
            sni: said.sni.clone(),
            auto_sni: said.auto_host_sni,
            alpn: said.common.alpn.clone(),
            verifier,
            by_alpn: Mutex::default(),
        })
    }

    /// With the cluster's own rules, and sessions of its own.
    fn first(&self) -> ClientConfig {
        let mut config = ClientConfig::clone(&self.base);
        config.dangerous().set_certificate_verifier(Arc::clone(&self.verifier) as _);
        config.resumption = Resumption::in_memory_sessions(CLIENT_SESSIONS);
        config
    }
}

/// The part of a client's configuration that does not say who the server must be. Reading a private key is what takes
/// the time in it, and thousands of clusters show the same one.
fn client_base(said: &CommonTls, secrets: &Secrets) -> Result<Arc<ClientConfig>, String> {
    let own = CommonTls { validation: None, alpn: Vec::new(), ..said.clone() };
    let key = format!("{own:?} {}", material(&own, secrets));
    cached(&secrets.contexts().client_bases, &key, || {
        let (provider, versions) = provider(&own)?;
        let identity = identity(&own, secrets)?;
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&versions)
            .map_err(|e| format!("TLS versions: {e}"))?
            .with_root_certificates(RootCertStore::empty());
        let mut base = match identity {
            Some(identity) => builder
                .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
                .map_err(|e| format!("certificate and key: {e}"))?,
            None => builder.with_no_client_auth(),
        };
        base.resumption = Resumption::disabled();
        Ok(base)
    })
}

/// The same allocation: equal settings, shared sessions.
impl PartialEq for ServerTls {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// The same allocation: equal settings, shared sessions.
impl PartialEq for ClientTls {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let alpn: Vec<_> = self.0.by_alpn.iter().map(|(name, _)| name).collect();
        f.debug_struct("ServerTls").field("alpn", &alpn).finish_non_exhaustive()
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("sni", &self.0.sni).field("alpn", &self.0.alpn).finish_non_exhaustive()
    }
}

impl fmt::Debug for Contexts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Contexts")
    }
}

fn cached<T>(
    known: &Mutex<Known<T>>,
    content: &str,
    build: impl FnOnce() -> Result<T, String>,
) -> Result<Arc<T>, String> {
    let key = <[u8; 32]>::try_from(sha256(content.as_bytes()).as_ref()).expect("SHA-256 has 32 bytes");
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(context) = known.get(&key).and_then(Weak::upgrade) {
        return Ok(context);
    }
    // Looked through only when the number has doubled since: constant work for each new one.
    if known.len() == known.capacity() {
        known.retain(|_, context| context.strong_count() > 0);
    }
    let context = Arc::new(build()?);
    known.insert(key, Arc::downgrade(&context));
    Ok(context)
}

/// Digests of the material that a context uses, so that a renewal is another content.
fn material(common: &CommonTls, secrets: &Secrets) -> String {
    let certificates = common.certificates.iter().filter_map(|name| secrets.identity(name)).map(|i| &*i.digest);
    let roots = common.validation.iter().filter_map(|v| secrets.roots(v.roots.as_ref()?)).map(|r| &*r.digest);
    certificates.chain(roots).collect::<Vec<_>>().join(" ")
}

fn identity<'s>(common: &CommonTls, secrets: &'s Secrets) -> Result<Option<&'s Identity>, String> {
    if common.certificates.is_empty() {
        return Ok(None);
    }
    let found = common.certificates.iter().find_map(|name| secrets.identity(name));
    found.map(|identity| Some(&**identity)).ok_or_else(|| format!("secret {} is missing", common.certificates[0]))
}

fn check(common: &CommonTls) -> Result<(), String> {
    versions(common)?;
    key_exchanges(&common.ecdh_curves)?;
    let names = common.validation.iter().flat_map(|validation| &validation.san);
    names.map(NameRule::compile).try_for_each(|rule| rule.map(drop))
}

fn server_verifier(
    said: &DownstreamTls,
    secrets: &Secrets,
    provider: &CryptoProvider,
) -> Result<Option<Arc<PeerVerifier>>, String> {
    let Some(validation) = &said.common.validation else { return Ok(None) };
    let mut verifier = verifier(validation, secrets, provider)?;
    verifier.mandatory = said.require_client_certificate;
    let anchors = verifier.roots.iter().flat_map(|roots| &roots.anchors);
    verifier.hints = anchors.map(|anchor| DistinguishedName::in_sequence(&anchor.subject)).collect();
    Ok(Some(Arc::new(verifier)))
}

fn client_verifier(
    said: &UpstreamTls,
    secrets: &Secrets,
    provider: &CryptoProvider,
) -> Result<Arc<PeerVerifier>, String> {
    let unchecked = Validation::default();
    let mut verifier = verifier(said.common.validation.as_ref().unwrap_or(&unchecked), secrets, provider)?;
    verifier.accept_server_name = said.auto_sni_san_validation;
    Ok(Arc::new(verifier))
}

fn verifier(said: &Validation, secrets: &Secrets, provider: &CryptoProvider) -> Result<PeerVerifier, String> {
    let roots = match &said.roots {
        Some(name) if !said.accept_untrusted => {
            Some(Arc::clone(secrets.roots(name).ok_or_else(|| format!("secret {name} is missing"))?))
        }
        _ => None,
    };
    Ok(PeerVerifier {
        names: said.san.iter().map(NameRule::compile).collect::<Result<_, _>>()?,
        roots,
        accept_server_name: false,
        mandatory: false,
        algorithms: provider.signature_verification_algorithms,
        hints: Vec::new(),
    })
}

type Versions = Vec<&'static SupportedProtocolVersion>;

fn provider(common: &CommonTls) -> Result<(CryptoProvider, Versions), String> {
    let mut provider = aws_lc_rs::default_provider();
    let versions = versions(common)?;
    provider.cipher_suites = cipher_suites(&common.cipher_suites);
    provider.kx_groups = key_exchanges(&common.ecdh_curves)?;
    Ok((provider, versions))
}

fn versions(common: &CommonTls) -> Result<Versions, String> {
    let min = common.min_version.unwrap_or(TlsVersion::V1_2);
    let max = common.max_version.unwrap_or(TlsVersion::V1_3);
    let known = [(TlsVersion::V1_2, &rustls::version::TLS12), (TlsVersion::V1_3, &rustls::version::TLS13)];
    let chosen: Versions = known.into_iter().filter(|(v, _)| (min..=max).contains(v)).map(|(_, v)| v).collect();
    if chosen.is_empty() {
        return Err(format!("no TLS version from {min:?} to {max:?} is served; 1.2 and 1.3 are"));
    }
    Ok(chosen)
}

/// The suites of TLS 1.3 cannot be configured; those of TLS 1.2 go by their OpenSSL names, in the order given. RSA key
/// exchange has no forward secrecy and is left out.
fn cipher_suites(names: &[String]) -> Vec<SupportedCipherSuite> {
    const TLS12: [(&str, SupportedCipherSuite); 6] = [
        ("ECDHE-ECDSA-AES256-GCM-SHA384", suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
        ("ECDHE-RSA-AES256-GCM-SHA384", suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
        ("ECDHE-ECDSA-AES128-GCM-SHA256", suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
        ("ECDHE-RSA-AES128-GCM-SHA256", suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
        ("ECDHE-ECDSA-CHACHA20-POLY1305", suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
        ("ECDHE-RSA-CHACHA20-POLY1305", suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
    ];
    let mut suites =
        vec![suite::TLS13_AES_256_GCM_SHA384, suite::TLS13_AES_128_GCM_SHA256, suite::TLS13_CHACHA20_POLY1305_SHA256];
    // Envoy writes alternatives of equal preference as `[A|B]`.
    let wanted: Vec<&str> = names.iter().flat_map(|n| n.trim_matches(['[', ']']).split('|')).collect();
    if wanted.is_empty() {
        suites.extend(TLS12.map(|(_, suite)| suite));
        return suites;
    }
    suites.extend(wanted.iter().filter_map(|name| TLS12.iter().find(|(n, _)| n == name)).map(|(_, suite)| *suite));
    suites
}

fn key_exchanges(names: &[String]) -> Result<Vec<&'static dyn SupportedKxGroup>, String> {
    if names.is_empty() {
        return Ok(vec![kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1]);
    }
    let group = |name: &String| -> Result<&'static dyn SupportedKxGroup, String> {
        match &**name {
            "X25519" => Ok(kx_group::X25519),
            "P-256" => Ok(kx_group::SECP256R1),
            "P-384" => Ok(kx_group::SECP384R1),
            "X25519MLKEM768" => Ok(kx_group::X25519MLKEM768),
            other => {
                Err(format!("key exchange group {other:?} is not known; X25519, P-256, P-384, X25519MLKEM768 are"))
            }
        }
    };
    names.iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: usize, resumed: bool) -> Peer {
        let mut peer = Peer::default();
        (peer.hash, peer.resumed) = (n.to_string(), resumed);
        peer
    }

    #[test]
    fn equal_peers_are_one() {
        let mut peers = Peers::default();
        let one = peers.share(peer(1, false));
        assert!(Arc::ptr_eq(&one, &peers.share(peer(1, false))));
        let resumed = peers.share(peer(1, true));
        assert!(resumed.resumed && !one.resumed);
        assert_eq!(peers.share(peer(2, false)).hash, "2");
    }

    #[test]
    fn who_has_left_is_forgotten() {
        let mut peers = Peers::default();
        let stays = peers.share(peer(0, false));
        for n in 1..1_000 {
            drop(peers.share(peer(n, false)));
        }
        assert!(peers.known.len() <= Peers::FEW + 1, "{}", peers.known.len());
        assert!(Arc::ptr_eq(&stays, &peers.share(peer(0, false))));
    }
}
