//! What came over the stream, as it came: for `/config_dump`, which shows received bytes and not our reading of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use proxy_config::Name;

use super::kept::{Kept, Like, Packer};
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
    pub bytes: Kept,
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
    /// By kind, what its resources are packed against.
    likes: Mutex<[Option<Like>; KINDS]>,
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
        refused.or(record.accepted).map(|version| version.bytes.bytes())
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

    /// Packs what is not packed yet; for a thread that may take its time. Nobody is kept waiting by it.
    pub(super) fn pack(&self) {
        let mut packer = Packer::new();
        for kind in Kind::ALL {
            let plain: Vec<(Name, Bytes)> = {
                let kinds = self.lock();
                let accepted = kinds[kind.index()].iter().filter_map(|(name, r)| Some((name, r.accepted.as_ref()?)));
                accepted.filter_map(|(name, v)| Some((Arc::clone(name), Bytes::clone(v.bytes.unpacked()?)))).collect()
            };
            let Some(like) = self.like(kind, &plain) else { continue };
            for (name, bytes) in plain {
                let Some(packed) = packer.pack(&bytes, &like) else { continue };
                let mut kinds = self.lock();
                let version = kinds[kind.index()].get_mut(&name).and_then(|record| record.accepted.as_mut());
                // Another version may have come meanwhile.
                let same = |version: &&mut Version| {
                    version.bytes.unpacked().is_some_and(|now| std::ptr::eq(now.as_ptr(), bytes.as_ptr()))
                };
                if let Some(version) = version.filter(same) {
                    version.bytes = packed;
                }
            }
        }
    }

    /// The longest of the first ones: the short ones of a kind (clusters that lead nowhere) are like no other.
    fn like(&self, kind: Kind, plain: &[(Name, Bytes)]) -> Option<Like> {
        let mut likes = self.likes.lock().unwrap_or_else(PoisonError::into_inner);
        let like = &mut likes[kind.index()];
        if like.is_none() {
            *like = plain.iter().map(|(_, bytes)| bytes).max_by_key(|bytes| bytes.len()).map(|bytes| Like::of(bytes));
        }
        like.clone()
    }

    fn lock(&self) -> MutexGuard<'_, [BTreeMap<Name, Record>; KINDS]> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn packed_bytes_are_the_bytes_that_came() {
        let (received, text) =
            (Received::default(), |n: usize| Bytes::from(format!("cluster outbound|80||svc-{n} of a mesh")));
        let version = |n: usize| Version { bytes: Kept::plain(text(n)), push: "1".into(), at: UNIX_EPOCH };
        for n in 0..100 {
            received.accept(Kind::Cluster, &format!("svc-{n}").into(), version(n));
        }
        received.refuse(Kind::Cluster, &"svc-7".into(), Refusal { version: version(1), why: "no".to_owned() });
        received.pack();
        for n in 0..100 {
            let kept =
                received.get(Kind::Cluster, &format!("svc-{n}")).and_then(|record| record.accepted).unwrap().bytes;
            assert!(kept.unpacked().is_none() && kept.bytes() == text(n), "{n}");
        }
        assert_eq!(received.latest(Kind::Cluster, "svc-7"), Some(text(1)), "what came last was refused");
        assert_eq!(received.latest(Kind::Cluster, "svc-8"), Some(text(8)));
    }
}
