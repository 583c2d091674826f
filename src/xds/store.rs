//! Resources that are held, each read once for as long as its bytes stay the same.
//!
//! istiod sends no versions and sends much of what it has again with every push: bytes decide what is new. A resource that
//! cannot be used leaves its last good version, and every other resource, as they are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use prost::Message;
use proxy_config::model::{Cluster, Endpoints, HttpFilter, Listener, NameInfo, RouteTable};
use proxy_config::xds::{self, Alike, Any, Extensions, Secret};
use proxy_config::{Name, Reject, Severity};

use super::check::{self, Checks, checked};
use super::kept::Kept;
use super::kind::Kind;
use super::received::{Received, Refusal, Version};

/// Of one kind.
pub(super) struct Table<T>(BTreeMap<Name, Entry<T>>);

/// Of each of ten thousands: what most resources do not have is a pointer.
struct Entry<T> {
    /// SHA-256 of the bytes that were received last, used or not; [`Received`] has the bytes. `None`: none came yet, or
    /// they are to be read anew.
    seen: Option<Digest>,
    good: Option<Good<T>>,
    refused: Option<Box<Reject>>,
    /// The server does not have it any more; what it was stays for as long as it is asked for.
    gone: bool,
}

struct Good<T> {
    value: Arc<T>,
    /// Filters to be discovered; only listeners have any.
    #[allow(clippy::box_collection, reason = "most of many thousand resources have none: a word each, not three")]
    extensions: Option<Box<BTreeSet<String>>>,
}

type Digest = [u8; 32];

impl<T> Good<T> {
    fn extensions(&self) -> impl Iterator<Item = &String> {
        self.extensions.iter().flat_map(|names| names.iter())
    }
}

/// What became of a resource.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    /// Nothing is new.
    Same,
    /// It says something else now.
    Changed,
    /// It cannot be used.
    Refused(Reject),
}

/// Which response something came in.
pub(super) struct Push {
    pub(super) version: Arc<str>,
    pub(super) at: SystemTime,
}

/// All of them.
pub(super) struct Store {
    checks: Checks,
    pub(super) clusters: Table<Cluster>,
    pub(super) endpoints: Table<Endpoints>,
    pub(super) listeners: Table<Listener>,
    pub(super) routes: Table<RouteTable>,
    pub(super) extensions: Table<(String, HttpFilter)>,
    pub(super) secrets: Table<Secret>,
    pub(super) names: Table<BTreeMap<Name, NameInfo>>,
    pub(super) anchors: Table<Vec<String>>,
    pub(super) account: Account,
    pub(super) received: Arc<Received>,
    /// Filters by name, as the decoder of listeners wants them.
    filters: Extensions,
    alike: Alike,
}

/// What resources said besides.
#[derive(Default)]
pub(super) struct Account {
    /// Parts that are not served, and whole resources that are not.
    notes: BTreeMap<(Kind, Name), Vec<Reject>>,
    /// Accepted, without effect.
    pub(super) inert: BTreeSet<String>,
    unread: BTreeSet<String>,
    /// Something of this changed since [`Account::rejects`].
    pub(super) changed: bool,
}

impl Store {
    /// Nothing yet.
    pub(super) fn new(checks: Checks) -> Self {
        Self {
            checks,
            clusters: Table::default(),
            endpoints: Table::default(),
            listeners: Table::default(),
            routes: Table::default(),
            extensions: Table::default(),
            secrets: Table::default(),
            names: Table::default(),
            anchors: Table::default(),
            account: Account::default(),
            received: Arc::default(),
            filters: Extensions::new(),
            alike: Alike::default(),
        }
    }

    /// Takes in a resource.
    pub(super) fn put(&mut self, kind: Kind, name: &Name, any: &Any, push: &Push) -> Verdict {
        if any.type_url != kind.url() {
            let reason = format!("a {} among resources of type {}", any.type_url, kind.url());
            return Verdict::Refused(reject(kind, name, reason));
        }
        let (account, alike, checks) = (&mut self.account, &mut self.alike, self.checks);
        let (verdict, fresh) = match kind {
            Kind::Cluster => {
                let read = |any: &Any| {
                    let mut read = checked(xds::cluster(any), checks.cluster)?;
                    alike.cluster(&mut read.value);
                    Ok(read)
                };
                self.clusters.put((kind, name), any, read, |v| &v.name, account)
            }
            Kind::Endpoints => {
                let read = |any: &Any| {
                    let mut read = xds::endpoints(any)?;
                    alike.endpoints(&mut read.value);
                    Ok(read)
                };
                self.endpoints.put((kind, name), any, read, |v| &v.name, account)
            }
            Kind::Listener => {
                let filters = &self.filters;
                let read = |any: &Any| checked(xds::listener(any, filters), checks.listener);
                self.listeners.put((kind, name), any, read, |v| &v.name, account)
            }
            Kind::Names => self.names.put((kind, name), any, xds::names, |_| "", account),
            Kind::ProxyConfig => self.anchors.put((kind, name), any, check::anchors, |_| "", account),
            Kind::Routes => self.routes.put((kind, name), any, xds::route_table, |v| &v.name, account),
            Kind::Extension => {
                let read = |any: &Any| checked(xds::extension(any), |(name, filter)| (checks.filter)(name, filter));
                self.extensions.put((kind, name), any, read, |v| &v.0, account)
            }
            Kind::Secret => self.secrets.put((kind, name), any, check::secret, |v| &v.name, account),
        };
        if fresh {
            self.record(kind, name, any, push, &verdict);
        }
        if kind == Kind::Extension && verdict == Verdict::Changed {
            let filter = self.extensions.get(name).map(|named| named.1.clone());
            self.filters.extend(filter.map(|filter| (name.to_string(), filter)));
        }
        verdict
    }

    fn record(&self, kind: Kind, name: &Name, any: &Any, push: &Push, verdict: &Verdict) {
        // The response's buffer would live for as long as one resource of it does.
        let bytes = Kept::plain(Bytes::copy_from_slice(&any.value));
        let version = Version { bytes, push: Arc::clone(&push.version), at: push.at };
        match verdict {
            Verdict::Refused(why) => self.received.refuse(kind, name, Refusal { version, why: why.to_string() }),
            Verdict::Changed | Verdict::Same => self.received.accept(kind, name, version),
        }
    }

    /// Reads the listeners that wait for one of these filters again; those that changed.
    pub(super) fn relink(&mut self, filters: &BTreeSet<Name>) -> Vec<Name> {
        let waits = |entry: &Entry<Listener>| {
            let names = || entry.good.iter().flat_map(Good::extensions);
            names().any(|name| filters.contains(&**name))
        };
        let names: Vec<Name> = self.listeners.0.iter().filter(|(_, e)| waits(e)).map(|(n, _)| Arc::clone(n)).collect();
        let mut changed = Vec::new();
        for name in names {
            let (Some(entry), Some(value)) =
                (self.listeners.0.get_mut(&name), self.received.latest(Kind::Listener, &name))
            else {
                continue;
            };
            // What nobody has seen is new.
            entry.seen = None;
            let any = Any { type_url: Kind::Listener.url().to_owned(), value };
            let (known, check) = (&self.filters, self.checks.listener);
            let read = |any: &Any| checked(xds::listener(any, known), check);
            let of = (Kind::Listener, &name);
            if self.listeners.put(of, &any, read, |v| &v.name, &mut self.account).0 == Verdict::Changed {
                changed.push(name);
            }
        }
        changed
    }

    /// Forgets a resource; `true`: it was there.
    pub(super) fn remove(&mut self, kind: Kind, name: &str) -> bool {
        let was = match kind {
            Kind::Cluster => self.clusters.0.remove(name).is_some(),
            Kind::Endpoints => self.endpoints.0.remove(name).is_some(),
            Kind::Listener => self.listeners.0.remove(name).is_some(),
            Kind::Names => self.names.0.remove(name).is_some(),
            Kind::ProxyConfig => self.anchors.0.remove(name).is_some(),
            Kind::Routes => self.routes.0.remove(name).is_some(),
            Kind::Extension => {
                self.filters.remove(name);
                self.extensions.0.remove(name).is_some()
            }
            Kind::Secret => self.secrets.0.remove(name).is_some(),
        };
        if was {
            self.account.forget(kind, name);
            self.received.remove(kind, name);
        }
        was
    }

    /// The server does not have it; what it was is served on.
    pub(super) fn gone(&mut self, kind: Kind, name: &str) {
        match kind {
            Kind::Endpoints => self.endpoints.gone(name),
            Kind::Routes => self.routes.gone(name),
            Kind::Extension => self.extensions.gone(name),
            Kind::Secret => self.secrets.gone(name),
            Kind::Cluster | Kind::Listener | Kind::Names | Kind::ProxyConfig => {}
        }
    }

    /// Names that the server has too, as far as we know.
    pub(super) fn held(&self, kind: Kind) -> Vec<Name> {
        match kind {
            Kind::Cluster => self.clusters.held(),
            Kind::Endpoints => self.endpoints.held(),
            Kind::Listener => self.listeners.held(),
            Kind::Names => self.names.held(),
            Kind::ProxyConfig => self.anchors.held(),
            Kind::Routes => self.routes.held(),
            Kind::Extension => self.extensions.held(),
            Kind::Secret => self.secrets.held(),
        }
    }

    /// Filters that listeners want discovered.
    pub(super) fn wanted_extensions(&self) -> BTreeSet<Name> {
        let wanted = self.listeners.0.values().filter_map(|e| e.good.as_ref()).flat_map(Good::extensions);
        wanted.map(|name| Name::from(&**name)).collect()
    }

    /// Whether every filter of a listener that has to be discovered was.
    pub(super) fn is_linked(&self, listener: &str) -> bool {
        let good = self.listeners.0.get(listener).and_then(|entry| entry.good.as_ref());
        good.is_none_or(|good| good.extensions().all(|name| self.filters.contains_key(name)))
    }
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: PartialEq> Table<T> {
    /// `true`: the bytes are others than those that came last.
    fn put(
        &mut self,
        (kind, name): (Kind, &Name),
        any: &Any,
        read: impl FnOnce(&Any) -> Result<xds::Resource<T>, Reject>,
        name_of: impl FnOnce(&T) -> &str,
        account: &mut Account,
    ) -> (Verdict, bool) {
        let seen = Some(digest(&any.value));
        if let Some(entry) = self.0.get_mut(name)
            && entry.seen == seen
        {
            entry.gone = false;
            return (entry.refused.as_deref().cloned().map_or(Verdict::Same, Verdict::Refused), false);
        }
        let read = read(any).and_then(|resource| usable(kind, name, resource, name_of));
        let entry = self.0.entry(Arc::clone(name)).or_insert_with(Entry::new);
        entry.seen = seen;
        entry.gone = false;
        match read {
            Ok(resource) => {
                entry.refused = None;
                account.note(kind, name, resource.notes);
                account.said(resource.inert, resource.unread);
                let old = entry.good.take();
                let same = old.filter(|old| *old.value == resource.value);
                let verdict = if same.is_some() { Verdict::Same } else { Verdict::Changed };
                let value = same.map_or_else(|| Arc::new(resource.value), |old| old.value);
                let extensions = Some(resource.extensions).filter(|names| !names.is_empty()).map(Box::new);
                entry.good = Some(Good { value, extensions });
                (verdict, true)
            }
            Err(reject) => {
                account.note(kind, name, vec![reject.clone()]);
                entry.refused = Some(Box::new(reject.clone()));
                (Verdict::Refused(reject), true)
            }
        }
    }
}

impl<T> Table<T> {
    /// The last good version.
    pub(super) fn get(&self, name: &str) -> Option<&Arc<T>> {
        self.0.get(name)?.good.as_ref().map(|good| &good.value)
    }

    /// All last good versions.
    pub(super) fn values(&self) -> impl Iterator<Item = &Arc<T>> {
        self.0.values().filter_map(|entry| entry.good.as_ref()).map(|good| &good.value)
    }

    /// Whether the server has answered for it, be it that it has none.
    pub(super) fn is_answered(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn gone(&mut self, name: &str) {
        self.0.entry(Name::from(name)).or_insert_with(Entry::new).gone = true;
    }

    fn held(&self) -> Vec<Name> {
        self.0.iter().filter(|(_, entry)| !entry.gone).map(|(name, _)| Arc::clone(name)).collect()
    }
}

impl<T> Entry<T> {
    fn new() -> Self {
        Self { seen: None, good: None, refused: None, gone: false }
    }
}

impl Account {
    /// Everything that is not served as said.
    pub(super) fn rejects(&mut self) -> Vec<Reject> {
        self.changed = false;
        self.notes.values().flatten().cloned().collect()
    }

    /// Fields that were met for the first time and have no effect.
    pub(super) fn new_unread(&mut self, of: BTreeSet<String>) -> Vec<String> {
        let new: Vec<String> = of.difference(&self.unread).cloned().collect();
        self.unread.extend(new.iter().cloned());
        new
    }

    fn said(&mut self, inert: BTreeSet<String>, unread: BTreeSet<String>) {
        let before = self.inert.len();
        self.inert.extend(inert);
        self.changed |= self.inert.len() != before;
        for field in self.new_unread(unread) {
            tracing::info!("{field} has no effect here");
        }
    }

    fn note(&mut self, kind: Kind, name: &Name, notes: Vec<Reject>) {
        let key = (kind, Arc::clone(name));
        let old = if notes.is_empty() { self.notes.remove(&key) } else { self.notes.insert(key.clone(), notes) };
        self.changed |= old.as_ref() != self.notes.get(&key);
    }

    fn forget(&mut self, kind: Kind, name: &str) {
        self.changed |= self.notes.remove(&(kind, Name::from(name))).is_some();
    }
}

fn digest(bytes: &[u8]) -> Digest {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// A resource may stand under another's name, and a part that decides who may pass may be missing: neither is served.
fn usable<T>(
    kind: Kind,
    name: &Name,
    resource: xds::Resource<T>,
    name_of: impl FnOnce(&T) -> &str,
) -> Result<xds::Resource<T>, Reject> {
    let own = name_of(&resource.value);
    if own != &**name {
        return Err(reject(kind, name, format!("calls itself {own:?}")));
    }
    match resource.notes.iter().find(|note| note.severity == Severity::Security) {
        Some(note) => Err(note.clone()),
        None => Ok(resource),
    }
}

fn reject(kind: Kind, name: &str, reason: String) -> Reject {
    let short = kind.url().rsplit('.').next().unwrap_or_default();
    Reject {
        resource: format!("{short} {name}"),
        place: None,
        field: String::new(),
        reason,
        severity: Severity::Error,
        code: None,
    }
}

/// The name of a resource that came without: the first field of every type but those of which there is one.
///
/// # Errors
/// When the bytes are no message.
pub(super) fn name_of(kind: Kind, value: &[u8]) -> Result<Name, Reject> {
    if kind.is_single() {
        return Ok(Name::from(""));
    }
    let named = Named::decode(value).map_err(|e| reject(kind, "", format!("malformed: {e}")))?;
    Ok(Name::from(named.name))
}

/// Any message whose first field is its name.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}
