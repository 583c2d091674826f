//! What came over the stream, as it came: for `/config_dump`, which shows received bytes and not our reading of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use proxy_config::Name;

use super::kind::{KINDS, Kind};

/// One resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The message inside its `Any`, as accepted last; `None`: it never was.
    pub accepted: Option<Version>,
    /// The last refusal, while nothing was accepted since.
    pub refused: Option<Box<Refusal>>,
}

/// A version of a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Encoded message, without the `Any` around it; the type URL is the kind's.
    pub bytes: Bytes,
    /// The push it came with.
    pub push: Arc<str>,
    /// When its content last changed.
    pub at: SystemTime,
}

/// A version that could not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What was sent.
    pub version: Version,
    /// Why it is not served.
    pub why: String,
}

/// Everything that is held, by kind and name. It is written by the stream and read by the admin port, both on the
/// control thread; the lock is never waited for.
#[derive(Debug, Default)]
pub struct Received {
    kinds: Mutex<[BTreeMap<Name, Record>; KINDS]>,
}

impl Received {
    /// A copy of the records of a kind; their bytes are shared.
    pub fn of(&self, kind: Kind) -> BTreeMap<Name, Record> {
        self.lock()[kind.index()].clone()
    }

    /// Nothing came from a control plane.
    pub fn is_empty(&self) -> bool {
        self.lock().iter().all(BTreeMap::is_empty)
    }

    /// One record.
    pub fn get(&self, kind: Kind, name: &str) -> Option<Record> {
        self.lock()[kind.index()].get(name).cloned()
    }

    /// The bytes that came last, accepted or not.
    pub(super) fn latest(&self, kind: Kind, name: &str) -> Option<Bytes> {
        let record = self.get(kind, name)?;
        let refused = record.refused.map(|refusal| refusal.version);
        refused.or(record.accepted).map(|version| version.bytes)
    }

    pub(crate) fn accept(&self, kind: Kind, name: &Name, version: Version) {
        let record = Record { accepted: Some(version), refused: None };
        self.lock()[kind.index()].insert(Arc::clone(name), record);
    }

    pub(crate) fn refuse(&self, kind: Kind, name: &Name, refusal: Refusal) {
        let mut kinds = self.lock();
        let record = kinds[kind.index()].entry(Arc::clone(name));
        record.or_insert(Record { accepted: None, refused: None }).refused = Some(Box::new(refusal));
    }

    pub(super) fn remove(&self, kind: Kind, name: &str) {
        self.lock()[kind.index()].remove(name);
    }

    fn lock(&self) -> MutexGuard<'_, [BTreeMap<Name, Record>; KINDS]> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
