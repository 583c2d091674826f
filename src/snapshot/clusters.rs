//! The clusters of a snapshot by number.

use std::sync::Arc;

use super::{ClusterId, ClusterShared};

/// Clusters of a piece. Small enough that copying one is nothing beside what a changed cluster costs.
pub(crate) const PIECE: usize = 64;

/// All clusters, in pieces that snapshots share while nothing in them changes: the push that comes most often changes one
/// cluster of thousands.
#[derive(Default, Clone)]
pub(super) struct Clusters(Box<[Arc<[Arc<ClusterShared>]>]>);

impl Clusters {
    /// A cluster.
    pub(super) fn get(&self, id: ClusterId) -> Option<&Arc<ClusterShared>> {
        self.0.get(id.index() / PIECE)?.get(id.index() % PIECE)
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<ClusterShared>> {
        self.0.iter().flat_map(|piece| piece.iter())
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.0.last().map_or(0, |last| (self.0.len() - 1) * PIECE + last.len())
    }

    /// Puts another version in a cluster's place.
    pub(super) fn set(&mut self, id: ClusterId, cluster: Arc<ClusterShared>) {
        let piece = &mut self.0[id.index() / PIECE];
        let mut own: Vec<_> = piece.iter().cloned().collect();
        own[id.index() % PIECE] = cluster;
        *piece = own.into();
    }
}

impl FromIterator<Arc<ClusterShared>> for Clusters {
    fn from_iter<I: IntoIterator<Item = Arc<ClusterShared>>>(all: I) -> Self {
        let mut all = all.into_iter().peekable();
        let mut pieces = Vec::new();
        while all.peek().is_some() {
            pieces.push(all.by_ref().take(PIECE).collect());
        }
        Self(pieces.into())
    }
}

#[cfg(test)]
mod tests {
    use bench_harness::istiod::resources;

    use super::*;

    #[test]
    fn a_changed_cluster_costs_one_piece() {
        let one = || {
            let said = proxy_config::xds::cluster(&resources::eds_cluster("c", 1)).unwrap().value;
            Arc::new(ClusterShared::alone(said, &Default::default(), &Default::default()))
        };
        let shared = one();
        let before: Clusters = (0..1000).map(|_| Arc::clone(&shared)).collect();
        let mut after = before.clone();
        after.set(ClusterId(777), one());
        let copied = before.0.iter().zip(&after.0).filter(|(a, b)| !Arc::ptr_eq(a, b)).count();
        assert_eq!((copied, before.len(), after.len(), after.iter().count()), (1, 1000, 1000, 1000));
        let changed = |id| !Arc::ptr_eq(after.get(ClusterId(id)).unwrap(), &shared);
        assert!((0..1000).all(|id| changed(id) == (id == 777)));
        assert!(after.get(ClusterId(1000)).is_none());
    }
}
