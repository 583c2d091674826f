//! The last good configuration, on disk: what was served last is served again when no control plane answers at start-up.
//!
//! One file holds everything that was accepted (as received), certificates with their keys, roots (those of each trust
//! domain too) with revocation lists, and fetched token keys. It is written whole, beside its place, and renamed; mode 0600. What is damaged, of another version, of another
//! proxy or too old is refused, and says why.
//!
//! ```text
//! istio-proxy last good 2
//! <SHA-256 of the rest, hex>
//! <protobuf>
//! ```

use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use aws_lc_rs::digest;
use bytes::Bytes;
use prost::Message;
use proxy_config::xds::{Any, DiscoveryResponse, XdsBundle, decode};
use proxy_config::{Model, Name};

use super::{Control, Published};
use crate::tls::{Identity, Roots, Secrets, hex, hex_sha256};
use crate::xds::Kind;

/// First line of the file: what it is, and its version. Another version is another line.
const HEADER: &[u8] = b"istio-proxy last good 2\n";
/// Name of the file in its folder.
const FILE: &str = "last-good";
/// Older than this is not served: policies may have changed since.
pub const MAX_AGE: Duration = Duration::from_secs(7 * 86_400);
/// At most one write in this time: pushes come in bursts.
const PACE: Duration = Duration::from_secs(1);
/// The same where only endpoints changed. In a large mesh they do all the time, a file is many megabytes, and endpoints of
/// half a minute ago serve a start without a control plane nearly as well.
const CALM: Duration = Duration::from_secs(30);

/// Keys of tokens: URI, cluster, text.
pub(super) type Keys = Vec<(Name, Name, Arc<str>)>;

/// What was served.
pub struct LastGood {
    /// When it was written.
    pub written: SystemTime,
    /// What was said.
    pub model: Model,
    /// Certificates and roots; expired ones too.
    pub secrets: Secrets,
    pub(super) keys: Keys,
}

#[derive(Clone, PartialEq, Message)]
struct Saved {
    #[prost(string, tag = "1")]
    node: String,
    #[prost(uint64, tag = "2")]
    written: u64,
    #[prost(message, repeated, tag = "3")]
    resources: Vec<Any>,
    #[prost(message, repeated, tag = "4")]
    identities: Vec<SavedIdentity>,
    #[prost(message, repeated, tag = "5")]
    roots: Vec<SavedRoots>,
    #[prost(message, repeated, tag = "6")]
    keys: Vec<SavedKeys>,
}

#[derive(Clone, PartialEq, Message)]
struct SavedIdentity {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    chain: String,
    #[prost(string, tag = "3")]
    key: String,
}

#[derive(Clone, PartialEq, Message)]
struct SavedRoots {
    #[prost(string, tag = "1")]
    name: String,
    /// For everybody; empty where each trust domain has its own.
    #[prost(string, tag = "2")]
    certificates: String,
    #[prost(message, repeated, tag = "3")]
    domains: Vec<SavedDomain>,
    /// Revocation lists; empty: none.
    #[prost(string, tag = "4")]
    revoked: String,
}

#[derive(Clone, PartialEq, Message)]
struct SavedDomain {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    certificates: String,
}

impl SavedRoots {
    fn of(name: &str, roots: &Roots) -> Self {
        let own = |(name, certificates): (&str, String)| SavedDomain { name: name.to_owned(), certificates };
        let domains: Vec<SavedDomain> = roots.domains_pem().map(own).collect();
        let certificates = if domains.is_empty() { roots.pem() } else { String::new() };
        Self { name: name.to_owned(), certificates, domains, revoked: roots.revoked_pem() }
    }

    fn roots(&self) -> Result<Roots, String> {
        let roots = if self.domains.is_empty() {
            Roots::from_pem(self.certificates.as_bytes())?
        } else {
            Roots::of_domains(self.domains.iter().map(|d| (d.name.as_str(), d.certificates.as_bytes())))?
        };
        if self.revoked.is_empty() { Ok(roots) } else { roots.with_revoked(self.revoked.as_bytes()) }
    }
}

#[derive(Clone, PartialEq, Message)]
struct SavedKeys {
    #[prost(string, tag = "1")]
    uri: String,
    #[prost(string, tag = "2")]
    cluster: String,
    #[prost(string, tag = "3")]
    keys: String,
}

impl Control {
    /// Keeps what is served in a folder, and serves what is kept there until the control plane speaks. What must not be
    /// served is logged, and stays there until there is something better. `node` is the node id.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn keep(&mut self, folder: &Path, node: &str) -> Result<()> {
        match load(folder, node, SystemTime::now()) {
            Ok(Some(kept)) => self.restore(kept),
            Ok(None) => {}
            Err(e) => tracing::warn!("the last good configuration is not served: {e:#}"),
        }
        self.keeper = Some(Keeper::start(folder.to_owned(), node.to_owned())?);
        Ok(())
    }

    fn restore(&mut self, kept: LastGood) {
        let seconds = kept.written.elapsed().map_or(0, |age| age.as_secs());
        tracing::warn!("no control plane yet: the last good configuration, {seconds} s old, is served");
        self.kept = Some(kept.written);
        self.model = Arc::new(kept.model);
        // What is newer already stays.
        self.secrets = kept.secrets.updated(&self.secrets);
        self.keys.restore(kept.keys);
        self.publish(Vec::new());
    }

    /// Offers what is served now for keeping; not what was kept itself, which would make it young. `soon`: something else
    /// than endpoints changed.
    pub(super) fn offer(&self, soon: bool) {
        if let Some(keeper) = self.keeper.as_ref().filter(|_| self.kept.is_none()) {
            keeper.offer(&self.published, self.keys.known(), soon);
        }
    }
}

/// Reads the file of a folder for the proxy with this node id. `None`: there is none.
///
/// # Errors
/// A file that must not be served.
pub fn load(folder: &Path, node: &str, now: SystemTime) -> Result<Option<LastGood>> {
    let path = folder.join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(anyhow!(e).context(path.display().to_string())),
    };
    read(&bytes, node, now).map(Some).with_context(|| path.display().to_string())
}

fn read(bytes: &[u8], node: &str, now: SystemTime) -> Result<LastGood> {
    let rest = bytes.strip_prefix(HEADER).ok_or_else(|| anyhow!("not a last good configuration of this version"))?;
    let end = rest.iter().position(|byte| *byte == b'\n').ok_or_else(|| anyhow!("no checksum"))?;
    let (sum, body) = (&rest[..end], &rest[end + 1..]);
    ensure!(sum == hex_sha256(body).as_bytes(), "damaged: the checksum does not fit");
    let saved = Saved::decode(body)?;
    ensure!(saved.node == node, "of another proxy, {}", saved.node);
    let written = UNIX_EPOCH + Duration::from_secs(saved.written);
    let age = now.duration_since(written).unwrap_or_default();
    if age > MAX_AGE {
        bail!("too old: {} days", age.as_secs() / 86_400);
    }
    let mut secrets = Secrets::new();
    for identity in &saved.identities {
        let read = Identity::from_pem(identity.chain.as_bytes(), identity.key.as_bytes()).map_err(|e| anyhow!(e))?;
        secrets = secrets.with_identity(&identity.name, read);
    }
    for roots in &saved.roots {
        let read = roots.roots().map_err(|e| anyhow!("roots {}: {e}", roots.name))?;
        secrets = secrets.with_roots(&roots.name, read);
    }
    let response = DiscoveryResponse { resources: saved.resources, ..DiscoveryResponse::default() };
    let model = decode(&XdsBundle { responses: vec![Bytes::from(response.encode_to_vec())] }).model;
    let keys = saved.keys.into_iter().map(|k| (k.uri.into(), k.cluster.into(), k.keys.into())).collect();
    Ok(LastGood { written, model, secrets, keys })
}

/// Whether there is something worth keeping: a listener, and the certificate that it needs.
fn is_worth_it(published: &Published) -> bool {
    let listeners = published.received.of(Kind::Listener);
    listeners.values().any(|record| record.accepted.is_some()) && published.awaited.is_none()
}

/// What is to be kept of what is published, after the checksum: messages that are one when they stand one after the other,
/// so that a large mesh is never in memory a second time.
fn parts(published: &Published, keys: &Keys, node: &str, now: SystemTime) -> impl Iterator<Item = Vec<u8>> {
    let received = Arc::clone(&published.received);
    // Secrets of the stream are among the secrets, CAs that it names among the roots.
    let kinds = Kind::ALL.into_iter().filter(|kind| !matches!(kind, Kind::Secret | Kind::ProxyConfig));
    let resources = kinds.flat_map(move |kind| {
        received.of(kind).into_values().filter_map(move |record| {
            let any = Any { type_url: kind.url().to_owned(), value: record.accepted?.bytes.bytes() };
            Some(Saved { resources: vec![any], ..Saved::default() }.encode_to_vec())
        })
    });
    std::iter::once(head(published, keys, node, now).encode_to_vec()).chain(resources)
}

/// Everything but resources.
fn head(published: &Published, keys: &Keys, node: &str, now: SystemTime) -> Saved {
    let secrets = published.snapshot.secrets();
    Saved {
        node: node.to_owned(),
        written: now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        resources: Vec::new(),
        identities: secrets
            .identities()
            .map(|(name, identity)| SavedIdentity {
                name: name.to_owned(),
                chain: identity.pem(),
                key: identity.key_pem(),
            })
            .collect(),
        roots: secrets.all_roots().map(|(name, roots)| SavedRoots::of(name, roots)).collect(),
        keys: keys
            .iter()
            .map(|(uri, cluster, keys)| SavedKeys {
                uri: uri.to_string(),
                cluster: cluster.to_string(),
                keys: keys.to_string(),
            })
            .collect(),
    }
}

fn write(folder: &Path, parts: impl Iterator<Item = Vec<u8>>) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let beside = folder.join(format!("{FILE}.new"));
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    let mut file = std::io::BufWriter::new(file);
    file.write_all(HEADER)?;
    // The checksum's place; nobody reads the file before it has its name.
    file.write_all(&[b'0'; 64])?;
    file.write_all(b"\n")?;
    let mut sum = digest::Context::new(&digest::SHA256);
    for part in parts {
        sum.update(&part);
        file.write_all(&part)?;
    }
    file.seek(SeekFrom::Start(HEADER.len() as u64))?;
    file.write_all(hex(sum.finish().as_ref()).as_bytes())?;
    let file = file.into_inner()?;
    file.sync_all()?;
    std::fs::rename(&beside, folder.join(FILE))?;
    std::fs::File::open(folder)?.sync_all()
}

/// Writes in a thread of its own: a disk may be slow. What was offered last is written; what was overtaken is not.
pub struct Keeper(Arc<Slot>);

#[derive(Default)]
struct Slot {
    offered: Mutex<Option<Offer>>,
    news: Condvar,
}

struct Offer {
    published: Arc<Published>,
    keys: Keys,
    /// Something else than endpoints changed since the last one was taken.
    soon: bool,
}

impl Keeper {
    /// Keeps the last good configuration of the proxy with this node id in a folder, for as long as the process lives.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(super) fn start(folder: PathBuf, node: String) -> std::io::Result<Self> {
        let slot = Arc::new(Slot::default());
        let keeper = Self(Arc::clone(&slot));
        std::thread::Builder::new().name("last-good".to_owned()).spawn(move || {
            loop {
                let Offer { published, keys, .. } = slot.wait();
                if is_worth_it(&published)
                    && let Err(e) = write(&folder, parts(&published, &keys, &node, SystemTime::now()))
                {
                    tracing::warn!("{}: the last good configuration is not kept: {e}", folder.display());
                }
                drop((published, keys));
                std::thread::sleep(PACE);
                slot.rest(CALM - PACE);
            }
        })?;
        Ok(keeper)
    }

    /// What is served now, and whether something else than endpoints changed.
    pub(super) fn offer(&self, published: &Arc<Published>, keys: Keys, soon: bool) {
        let mut offered = self.0.offered.lock().unwrap_or_else(PoisonError::into_inner);
        let soon = soon || offered.as_ref().is_some_and(|offer| offer.soon);
        *offered = Some(Offer { published: Arc::clone(published), keys, soon });
        self.0.news.notify_one();
    }
}

impl Slot {
    /// Until something is offered that cannot wait, at most so long.
    fn rest(&self, most: Duration) {
        let offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        let can_wait = |offered: &mut Option<Offer>| offered.as_ref().is_none_or(|offer| !offer.soon);
        drop(self.news.wait_timeout_while(offered, most, can_wait));
    }

    fn wait(&self) -> Offer {
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(offer) = offered.take() {
                return offer;
            }
            offered = self.news.wait(offered).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proxy_config::registry::Proxy;

    use super::*;
    use crate::snapshot;
    use crate::xds::{Kept, Received, Version};

    const NODE: &str = "sidecar~10.0.0.1~w.a~a.svc.cluster.local";

    /// A listener by name alone, a cluster, a certificate with its root.
    fn published() -> Published {
        let received = Arc::new(Received::default());
        let version = |bytes: &'static [u8]| Version {
            bytes: Kept::plain(Bytes::from_static(bytes)),
            push: "1".into(),
            at: UNIX_EPOCH,
        };
        received.accept(Kind::Listener, &"l".into(), version(b"\x0a\x01l"));
        received.accept(Kind::Cluster, &"c".into(), version(b"\x0a\x01c"));
        let (root, _) = crate::ca::Root::generate("test").unwrap();
        let day = Duration::from_secs(86_400);
        let (chain, key) = root.sign(&"spiffe://td/ns/a/sa/b".parse().unwrap(), day).unwrap();
        let secrets = Secrets::new()
            .with_identity("default", Identity::from_pem(chain.as_bytes(), key.as_bytes()).unwrap())
            .with_roots("ROOTCA", Roots::from_pem(root.certificate().as_bytes()).unwrap());
        let (snapshot, _) = snapshot::compile(None, &Model::default(), &secrets);
        Published { snapshot: Arc::new(snapshot), received, ..Published::nothing(Arc::new(Proxy::default())) }
    }

    #[test]
    fn what_was_kept_comes_back_and_nobody_else_may_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let published = published();
        let keys: Keys = vec![("https://issuer/keys".into(), "".into(), "{}".into())];
        let now = SystemTime::now();
        write(folder.path(), parts(&published, &keys, NODE, now)).unwrap();
        let mode = std::fs::metadata(folder.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let back = load(folder.path(), NODE, now).unwrap().unwrap();
        assert!(back.model.clusters.contains_key("c"), "{:?}", back.model);
        assert_eq!(back.secrets, *published.snapshot.secrets());
        assert_eq!(back.keys, keys);
    }

    /// A revocation list of a CA of its own, with nobody on it.
    fn list() -> String {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::default();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        ca.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign];
        let now = time::OffsetDateTime::now_utc();
        let params = rcgen::CertificateRevocationListParams {
            this_update: now,
            next_update: now + time::Duration::hours(1),
            crl_number: 1_u64.into(),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        params.signed_by(&rcgen::Issuer::new(ca, key)).unwrap().pem().unwrap()
    }

    #[test]
    fn roots_of_trust_domains_and_revocation_lists_come_back() {
        let (one, two) = (crate::ca::Root::generate("one").unwrap().0, crate::ca::Root::generate("two").unwrap().0);
        let (a, b) = (one.certificate().as_bytes(), two.certificate().as_bytes());
        let apart = Roots::of_domains([("a.example", a), ("b.example", b)]).unwrap();
        let revoking = Roots::from_pem(a).unwrap().with_revoked(list().as_bytes()).unwrap();
        let before = published();
        let both = before.snapshot.secrets().with_roots("ROOTCA", apart).with_roots("kubernetes://x-cacert", revoking);
        let (snapshot, _) = snapshot::compile(None, &Model::default(), &both);
        let published = Published { snapshot: Arc::new(snapshot), ..before };
        let now = SystemTime::now();
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), parts(&published, &Keys::new(), NODE, now)).unwrap();
        let back = load(folder.path(), NODE, now).unwrap().unwrap().secrets;
        assert_eq!(back, both);
        let swapped = Roots::of_domains([("a.example", b), ("b.example", a)]).unwrap();
        assert_ne!(back, both.with_roots("ROOTCA", swapped), "which root is whose is kept");
        let id = |root: &crate::ca::Root, domain: &str| {
            let id = format!("spiffe://{domain}/ns/a/sa/b").parse().unwrap();
            let (chain, key) = root.sign(&id, Duration::from_secs(3600)).unwrap();
            Identity::from_pem(chain.as_bytes(), key.as_bytes()).unwrap()
        };
        let kept = back.roots("ROOTCA").unwrap();
        assert!(id(&one, "a.example").leads_to(kept, 0).is_ok() && id(&two, "a.example").leads_to(kept, 0).is_err());
        let lists = back.roots("kubernetes://x-cacert").unwrap();
        assert!(id(&one, "a.example").leads_to(lists, 0).is_err(), "its CA has no list: nobody of it gets in");
    }

    #[test]
    fn what_is_damaged_foreign_or_old_is_refused() {
        let now = SystemTime::now();
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), parts(&published(), &Keys::new(), NODE, now)).unwrap();
        let good = std::fs::read(folder.path().join(FILE)).unwrap();
        let error = |bytes: &[u8], node: &str, now| read(bytes, node, now).map(|_| ()).unwrap_err().to_string();
        for at in [HEADER.len() + 3, HEADER.len() + 80, good.len() - 1] {
            let mut broken = good.clone();
            broken[at] ^= 1;
            assert!(error(&broken, NODE, now).contains("checksum"), "byte {at}");
        }
        assert!(error(&good[..good.len() - 1], NODE, now).contains("checksum"));
        for another in [&b"istio-proxy last good 1\n"[..], b"istio-proxy last good 3\n"] {
            let other = [another, &good[HEADER.len()..]].concat();
            assert!(error(&other, NODE, now).contains("version"));
        }
        assert!(error(&good, "sidecar~10.0.0.2~w.a~d", now).contains("another proxy"));
        assert!(error(&good, NODE, now + MAX_AGE + Duration::from_secs(90_000)).contains("too old"));
        assert!(load(Path::new("/nowhere"), NODE, now).unwrap().is_none());
    }

    #[test]
    fn nothing_is_kept_before_there_is_something_to_serve() {
        let empty = Published::nothing(Arc::new(Proxy::default()));
        assert!(!is_worth_it(&empty));
        let waiting = Published { awaited: Some("no workload certificate yet".to_owned()), ..published() };
        assert!(!is_worth_it(&waiting) && is_worth_it(&published()));
    }

    #[test]
    fn endpoints_alone_wait_and_everything_else_does_not() {
        let slot = Arc::new(Slot::default());
        let keeper = Keeper(Arc::clone(&slot));
        let published = Arc::new(published());
        keeper.offer(&published, Keys::new(), false);
        slot.rest(Duration::ZERO);
        keeper.offer(&published, Keys::new(), true);
        keeper.offer(&published, Keys::new(), false);
        // Nothing would end this but an offer that cannot wait, and the one that overtook it did not calm it.
        slot.rest(Duration::MAX);
        assert!(slot.wait().soon);
        assert!(slot.offered.lock().unwrap().is_none());
    }
}
