//! Certificates, keys and roots, by the names under which configuration asks for them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use proxy_config::xds::Material;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, TrustAnchor};
use rustls::sign::CertifiedKey;
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::config::Contexts;
use super::peer::{Peer, hex, sha256};
use super::verify;

/// SDS name of the workload's own certificate.
const WORKLOAD: &str = "default";
/// SDS name of the mesh roots.
const MESH_ROOTS: &str = "ROOTCA";
const FILE_CERT: &str = "file-cert:";
const FILE_ROOT: &str = "file-root:";
/// `file-root:system` asks for the operating system's roots.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// All key material at one moment; immutable, cheap to clone. A renewal makes a new one.
#[derive(Clone, Default)]
pub struct Secrets {
    identities: BTreeMap<Arc<str>, Arc<Identity>>,
    roots: BTreeMap<Arc<str>, Arc<Roots>>,
    contexts: Arc<Contexts>,
}

/// A certificate chain with its key.
pub struct Identity {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
    pub(super) digest: String,
    /// What the chain says, leaf first.
    pub info: Vec<CertInfo>,
    /// URI names of the leaf, as every connection that it serves keeps them.
    pub uris: Arc<[String]>,
}

/// Certificates that are trusted as roots.
#[derive(Clone)]
pub struct Roots {
    pub(super) anchors: Vec<TrustAnchor<'static>>,
    /// Where each trust domain has roots of its own, theirs; a certificate of another domain leads nowhere.
    pub(super) by_domain: BTreeMap<String, Vec<TrustAnchor<'static>>>,
    /// Where there are any, every certificate of a chain must be on a list that its issuer signed, and not revoked by it.
    pub(super) revoked: Arc<[CertRevocationList<'static>]>,
    /// As read: to be shown and kept.
    all: Vec<CertificateDer<'static>>,
    domains: BTreeMap<String, Vec<CertificateDer<'static>>>,
    lists: Arc<[CertificateRevocationListDer<'static>]>,
    pub(super) digest: String,
    /// What they say.
    pub info: Vec<CertInfo>,
}

/// A certificate for people and for `/certs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertInfo {
    /// Subject, RFC 2253.
    pub subject: String,
    /// URI and DNS names.
    pub sans: Vec<String>,
    /// Serial number, lower-case hex.
    pub serial: String,
    /// Begin of validity, seconds since 1970.
    pub not_before: i64,
    /// End of validity, seconds since 1970.
    pub not_after: i64,
}

impl CertInfo {
    /// Whole days until the end, 0 when it has passed.
    pub fn days_left(&self, now: i64) -> u64 {
        const DAY: i64 = 86_400;
        u64::try_from((self.not_after - now) / DAY).unwrap_or(0)
    }

    fn read(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let peer = Peer::from_certificate(certificate)?;
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
        Ok(Self {
            subject: peer.subject,
            sans: [peer.uri_sans, peer.dns_sans].concat(),
            serial: hex(parsed.raw_serial()),
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
        })
    }
}

impl Identity {
    /// A chain (leaf first) and its key, both PEM.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, String> {
        let chain = certificates(chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| format!("private key: {e}"))?;
        // A renewal that is written file by file is seen half done: the last good pair stays until they belong together.
        CertifiedKey::from_der(chain.clone(), key.clone_key(), &aws_lc_rs::default_provider())
            .map_err(|e| format!("certificate and key: {e}"))?;
        let info = chain.iter().map(CertInfo::read).collect::<Result<Vec<_>, _>>()?;
        let names = info.first().map(|leaf| &leaf.sans[..]).unwrap_or_default();
        let uris = names.iter().filter(|name| name.contains("://")).cloned().collect();
        let digest = digest(&chain);
        Ok(Self { chain, key, digest, info, uris })
    }

    /// Whether a peer that trusts these roots accepts it at `now` (seconds since 1970). The clock of whoever signed it may
    /// be ahead of ours.
    pub fn leads_to(&self, roots: &Roots, now: i64) -> Result<(), String> {
        let (Some(info), [leaf, above @ ..]) = (self.info.first(), &*self.chain) else {
            return Err("no certificate".to_owned());
        };
        let at = u64::try_from(now.max(info.not_before)).unwrap_or(0);
        verify::leads_to(leaf, above, roots, Duration::from_secs(at)).map_err(|e| e.to_string())
    }

    /// The chain as PEM, leaf first.
    pub fn pem(&self) -> String {
        all_pem(&self.chain)
    }

    /// The private key as PEM. For files that nobody else may read.
    pub fn key_pem(&self) -> String {
        let label = match &self.key {
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            _ => "PRIVATE KEY",
        };
        pem(label, self.key.secret_der())
    }

    /// The same from two files.
    pub fn from_files(chain: &Path, key: &Path) -> Result<Self, String> {
        Self::from_pem(&read(chain)?, &read(key)?).map_err(|e| format!("{}: {e}", chain.display()))
    }
}

impl Roots {
    /// One or more certificates, PEM; each counts once.
    pub fn from_pem(pem: &[u8]) -> Result<Self, String> {
        let mut all = Vec::new();
        for certificate in certificates(pem)? {
            if !all.contains(&certificate) {
                all.push(certificate);
            }
        }
        let anchors = anchors(&all)?;
        let info = all.iter().map(CertInfo::read).collect::<Result<_, _>>()?;
        Ok(Self {
            anchors,
            by_domain: BTreeMap::new(),
            revoked: Arc::from([]),
            digest: digest(&all),
            info,
            all,
            domains: BTreeMap::new(),
            lists: Arc::from([]),
        })
    }

    /// Roots for each trust domain, PEM; a domain's certificates must lead to its own.
    pub fn of_domains<'a>(domains: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Result<Self, String> {
        let (mut by_domain, mut all, mut said) = (BTreeMap::new(), Vec::new(), BTreeMap::new());
        for (domain, pem) in domains {
            let own = certificates(pem).map_err(|e| format!("trust domain {domain}: {e}"))?;
            by_domain.insert(domain.to_owned(), anchors(&own)?);
            all.extend(own.iter().cloned());
            said.insert(domain.to_owned(), own);
        }
        if by_domain.is_empty() {
            return Err("no trust domain in it".to_owned());
        }
        // Which roots are whose is part of what they say.
        let parts: Vec<String> = said.iter().map(|(domain, own)| format!("{domain} {}", digest(own))).collect();
        let info = all.iter().map(CertInfo::read).collect::<Result<_, _>>()?;
        Ok(Self {
            anchors: anchors(&all)?,
            by_domain,
            revoked: Arc::from([]),
            digest: parts.join(","),
            info,
            all,
            domains: said,
            lists: Arc::from([]),
        })
    }

    /// The same with certificate revocation lists, PEM.
    pub fn with_revoked(&self, pem: &[u8]) -> Result<Self, String> {
        let lists = CertificateRevocationListDer::pem_slice_iter(pem);
        let lists = lists.collect::<Result<Vec<_>, _>>().map_err(|e| format!("revocation list: {e}"))?;
        if lists.is_empty() {
            return Err("no revocation list in it".to_owned());
        }
        let read = |list: &CertificateRevocationListDer<'_>| OwnedCertRevocationList::from_der(list).map(Into::into);
        let revoked = lists.iter().map(read).collect::<Result<_, _>>().map_err(|e| format!("revocation list: {e}"))?;
        let bytes: Vec<u8> = lists.iter().flat_map(|list| list.iter().copied()).collect();
        let own = self.digest.split('+').next().unwrap_or_default();
        let lists = lists.into();
        Ok(Self { revoked, lists, digest: format!("{own}+{}", hex(sha256(&bytes).as_ref())), ..self.clone() })
    }

    /// The same from a file.
    pub fn from_file(path: &Path) -> Result<Self, String> {
        Self::from_pem(&read(path)?).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// The same from a file and further PEM texts.
    pub fn from_file_and(path: &Path, more: &[String]) -> Result<Self, String> {
        let own = [read(path)?, more.join("\n").into_bytes()].join(&b'\n');
        Self::from_pem(&own).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// The certificates as PEM.
    pub fn pem(&self) -> String {
        all_pem(&self.all)
    }

    /// The roots of each trust domain as PEM; none where all are for everybody.
    pub fn domains_pem(&self) -> impl Iterator<Item = (&str, String)> {
        self.domains.iter().map(|(domain, own)| (domain.as_str(), all_pem(own)))
    }

    /// The revocation lists as PEM; empty: there are none.
    pub fn revoked_pem(&self) -> String {
        self.lists.iter().map(|list| pem("X509 CRL", list)).collect()
    }

    /// The operating system's.
    pub fn system() -> Result<Self, String> {
        Self::from_file(Path::new(SYSTEM_ROOTS))
    }
}

impl Secrets {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// `cert-chain.pem`, `key.pem` and `root-cert.pem` of a folder as `default` and `ROOTCA`.
    pub fn load(folder: &Path) -> Result<Self, String> {
        Self::new().renewed(folder)
    }

    /// The same with the folder's present content. Contexts whose material did not change stay the same, so renewal
    /// costs no open connection and no session ticket.
    pub fn renewed(&self, folder: &Path) -> Result<Self, String> {
        let identity = Identity::from_files(&folder.join("cert-chain.pem"), &folder.join("key.pem"))?;
        let roots = Roots::from_file(&folder.join("root-cert.pem"))?;
        Ok(self.with_identity(WORKLOAD, identity).with_roots(MESH_ROOTS, roots))
    }

    /// Adds or replaces a certificate.
    #[must_use]
    pub fn with_identity(&self, name: &str, identity: Identity) -> Self {
        let mut next = self.clone();
        next.identities.insert(name.into(), Arc::new(identity));
        next
    }

    /// Adds or replaces roots.
    #[must_use]
    pub fn with_roots(&self, name: &str, roots: Roots) -> Self {
        let mut next = self.clone();
        next.roots.insert(name.into(), Arc::new(roots));
        next
    }

    /// Adds or replaces what a secret holds.
    ///
    /// # Errors
    /// What of it cannot be used.
    pub fn with_material(&self, name: &str, material: &Material) -> Result<Self, String> {
        Ok(match material {
            Material::Certificate { chain, key } => self.with_identity(name, Identity::from_pem(chain, key)?),
            Material::Roots { pem, revoked } => {
                let roots = Roots::from_pem(pem)?;
                let revoked = revoked.as_ref().map(|lists| roots.with_revoked(lists)).transpose()?;
                self.with_roots(name, revoked.unwrap_or(roots))
            }
            Material::Domains(domains) => {
                let domains = domains.iter().map(|(name, pem)| (&**name, &**pem));
                self.with_roots(name, Roots::of_domains(domains)?)
            }
        })
    }

    /// Reads the files that an SDS name speaks of: `file-cert:CERT~KEY`, `file-root:PATH`, `file-root:system`. Other
    /// names are not files and change nothing.
    pub fn with_files(&self, name: &str) -> Result<Self, String> {
        if let Some(paths) = name.strip_prefix(FILE_CERT) {
            let (chain, key) = paths.split_once('~').ok_or_else(|| format!("{name}: expected CERT~KEY"))?;
            return Ok(self.with_identity(name, Identity::from_files(Path::new(chain), Path::new(key))?));
        }
        if let Some(path) = name.strip_prefix(FILE_ROOT) {
            let path = if path == "system" { SYSTEM_ROOTS } else { path };
            return Ok(self.with_roots(name, Roots::from_file(Path::new(path))?));
        }
        Ok(self.clone())
    }

    /// Gives the workload's own material to every name that has none; for questions that no peer will ever see.
    #[must_use]
    pub fn with_own_for<'a>(
        &self,
        certificates: impl IntoIterator<Item = &'a Arc<str>>,
        roots: impl IntoIterator<Item = &'a Arc<str>>,
    ) -> Self {
        let mut next = self.clone();
        if let Some(own) = self.identities.get(WORKLOAD) {
            certificates.into_iter().for_each(|name| {
                next.identities.entry(Arc::clone(name)).or_insert_with(|| Arc::clone(own));
            });
        }
        if let Some(own) = self.roots.get(MESH_ROOTS) {
            roots.into_iter().for_each(|name| {
                next.roots.entry(Arc::clone(name)).or_insert_with(|| Arc::clone(own));
            });
        }
        next
    }

    /// The same with what somebody else holds; contexts whose material did not change stay the same.
    #[must_use]
    pub fn updated(&self, other: &Self) -> Self {
        let mut next = self.clone();
        next.identities
            .extend(other.identities.iter().map(|(name, identity)| (Arc::clone(name), Arc::clone(identity))));
        next.roots.extend(other.roots.iter().map(|(name, roots)| (Arc::clone(name), Arc::clone(roots))));
        next
    }

    /// The same without these roots.
    #[must_use]
    pub fn without_roots(&self, name: &str) -> Self {
        let mut next = self.clone();
        next.roots.remove(name);
        next
    }

    /// A certificate by SDS name.
    pub fn identity(&self, name: &str) -> Option<&Arc<Identity>> {
        self.identities.get(name)
    }

    /// Roots by SDS name.
    pub fn roots(&self, name: &str) -> Option<&Arc<Roots>> {
        self.roots.get(name)
    }

    /// Every certificate with its name.
    pub fn identities(&self) -> impl Iterator<Item = (&str, &Arc<Identity>)> {
        self.identities.iter().map(|(name, identity)| (&**name, identity))
    }

    /// All roots with their names.
    pub fn all_roots(&self) -> impl Iterator<Item = (&str, &Arc<Roots>)> {
        self.roots.iter().map(|(name, roots)| (&**name, roots))
    }

    pub(super) fn contexts(&self) -> &Contexts {
        &self.contexts
    }
}

/// Equal content, whatever the caches hold.
impl PartialEq for Secrets {
    fn eq(&self, other: &Self) -> bool {
        let digests = |s: &Self| -> Vec<(Arc<str>, String)> {
            let identities = s.identities.iter().map(|(n, i)| (Arc::clone(n), i.digest.clone()));
            identities.chain(s.roots.iter().map(|(n, r)| (Arc::clone(n), r.digest.clone()))).collect()
        };
        digests(self) == digests(other)
    }
}

/// Names only: keys do not belong into logs.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets")
            .field("identities", &self.identities.keys())
            .field("roots", &self.roots.keys())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("info", &self.info).finish_non_exhaustive()
    }
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roots").field("info", &self.info).finish_non_exhaustive()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn all_pem(certificates: &[CertificateDer<'_>]) -> String {
    certificates.iter().map(|certificate| pem("CERTIFICATE", certificate)).collect()
}

/// Bytes under a label as PEM (RFC 7468).
pub fn pem(label: &str, bytes: &[u8]) -> String {
    const LINE: usize = 64;
    let text = BASE64.encode(bytes);
    let lines: Vec<&str> = text.as_bytes().chunks(LINE).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    if all.is_empty() {
        return Err("no certificate in it".to_owned());
    }
    Ok(all)
}

fn anchors(certificates: &[CertificateDer<'_>]) -> Result<Vec<TrustAnchor<'static>>, String> {
    certificates
        .iter()
        .map(|root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
        .collect::<Result<_, _>>()
        .map_err(|e| format!("root certificate: {e}"))
}

fn digest(certificates: &[CertificateDer<'_>]) -> String {
    let all: Vec<u8> = certificates.iter().flat_map(|c| c.iter().copied()).collect();
    hex(sha256(&all).as_ref())
}
