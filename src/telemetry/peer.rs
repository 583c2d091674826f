//! Peers as metrics and logs know them: understood once, shared by every request that comes from them.

use std::hash::{BuildHasher as _, Hash, Hasher};
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use hashbrown::HashMap;
use proxy_config::peer::Workload;

use super::metrics::lock;

/// Peers that a worker remembers, as Envoy's default. A remembered one costs about 1 KB.
const PEERS: usize = 500;
/// What a peer may say of itself and still be remembered, bytes.
const REMEMBERED: usize = 8 * 1024;

/// What the other side of a connection said of its workload.
#[derive(Debug)]
pub struct Peer {
    said: Workload,
    /// Of everything that labels may show.
    hash: u64,
}

impl Peer {
    /// A peer.
    pub fn new(said: Workload) -> Arc<Self> {
        let mut hasher = foldhash::quality::FixedState::default().build_hasher();
        shown(&said).hash(&mut hasher);
        said.labels.hash(&mut hasher);
        Arc::new(Self { said, hash: hasher.finish() })
    }

    /// A number that equal peers have in common.
    pub(super) fn number(&self) -> u64 {
        self.hash
    }
}

impl Deref for Peer {
    type Target = Workload;

    fn deref(&self) -> &Workload {
        &self.said
    }
}

/// Instances of one workload are the same to labels.
impl PartialEq for Peer {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
            || (self.hash == other.hash
                && shown(&self.said) == shown(&other.said)
                && self.said.labels == other.said.labels)
    }
}

impl Eq for Peer {}

impl Hash for Peer {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

fn shown(said: &Workload) -> [&str; 7] {
    [&said.workload, &said.namespace, &said.service, &said.revision, &said.app, &said.version, &said.cluster]
        .map(String::as_str)
}

/// Which labels a filter keeps besides the standard ones.
pub type Additional = Arc<[String]>;

/// The peers of one worker, by their ids.
#[derive(Debug, Default)]
pub struct Peers(Mutex<HashMap<Box<[u8]>, Known, foldhash::fast::RandomState>>);

#[derive(Debug)]
struct Known {
    said: Box<[u8]>,
    additional: Additional,
    peer: Arc<Peer>,
}

impl Peers {
    /// The peer of a pair of headers. It is decoded once, and again when it says something else under the same id.
    pub fn of_headers(&self, id: &[u8], value: &[u8], additional: &Additional) -> Option<Arc<Peer>> {
        if id.is_empty() {
            return Workload::from_header(value, additional).map(Peer::new);
        }
        let mut peers = lock(&self.0);
        if let Some(known) = peers.get(id)
            && *known.said == *value
            && known.additional == *additional
        {
            return Some(Arc::clone(&known.peer));
        }
        let peer = Peer::new(Workload::from_header(value, additional)?);
        if id.len() + value.len() <= REMEMBERED {
            if peers.len() >= PEERS && !peers.contains_key(id) {
                peers.clear();
            }
            let known = Known { said: value.into(), additional: Arc::clone(additional), peer: Arc::clone(&peer) };
            peers.insert(id.into(), known);
        }
        Some(peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(workload: &str, instance: &str) -> Workload {
        Workload { workload: workload.to_owned(), instance: instance.to_owned(), ..Workload::default() }
    }

    #[test]
    fn instances_of_a_workload_are_one_peer_to_labels() {
        assert_eq!(Peer::new(said("a", "1")), Peer::new(said("a", "2")));
        assert_ne!(Peer::new(said("a", "1")), Peer::new(said("b", "1")));
        let labels = [("role".to_owned(), "x".to_owned())].into();
        assert_ne!(Peer::new(said("a", "1")), Peer::new(Workload { labels, ..said("a", "1") }));
    }

    #[test]
    fn peers_are_remembered_until_they_change_or_are_too_many() {
        let (peers, none) = (Peers::default(), Additional::default());
        let (one, other) = (said("a", "1").to_header(), said("b", "1").to_header());
        let first = peers.of_headers(b"id", one.as_bytes(), &none).expect("metadata");
        assert!(Arc::ptr_eq(&first, &peers.of_headers(b"id", one.as_bytes(), &none).expect("metadata")));
        assert_eq!(peers.of_headers(b"id", other.as_bytes(), &none).expect("metadata").workload, "b");
        assert!(peers.of_headers(b"id", b"garbage!", &none).is_none());
        for i in 0..2 * PEERS {
            peers.of_headers(format!("{i}").as_bytes(), one.as_bytes(), &none);
        }
        assert!(lock(&peers.0).len() <= PEERS);
    }
}
