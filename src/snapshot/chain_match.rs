//! Chooses the filter chain of a connection.

use std::sync::Arc;

use super::chain::Chain;
use super::listener::ChainInput;

/// All chains of a listener, arranged for lookup.
#[derive(Debug, Default)]
pub(super) struct ChainMatcher {
    chains: Box<[Arc<Chain>]>,
    default: Option<Arc<Chain>>,
}

impl ChainMatcher {
    pub(super) fn find(&self, _input: &ChainInput<'_>) -> Option<&Arc<Chain>> {
        self.default.as_ref()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Chain>> {
        self.chains.iter().chain(&self.default)
    }
}
