//! One loop on the control thread: inputs → model → snapshot → publish.
//!
//! It decides when what was said becomes what is served, and never touches a connection: workers see only a pointer that
//! changes.

use std::sync::Arc;

use proxy_config::registry::Proxy;
use proxy_config::{Model, Reject};

use crate::snapshot::Snapshot;

/// What is served at one moment, with what it was made from; sent to everybody over a `watch` channel.
pub struct Published {
    /// Counts up from 1 (the snapshot's number); 0 is "nothing yet".
    pub version: u64,
    /// What was said.
    pub model: Arc<Model>,
    /// What workers read.
    pub snapshot: Arc<Snapshot>,
    /// Every object that is not served as it was said, of all stages.
    pub rejects: Arc<[Reject]>,
    /// Whose configuration it is.
    pub proxy: Arc<Proxy>,
}

impl Published {
    /// Nothing yet, for this proxy.
    pub fn nothing(proxy: Arc<Proxy>) -> Self {
        Self { version: 0, model: Arc::default(), snapshot: Arc::default(), rejects: Arc::from([]), proxy }
    }
}

impl std::fmt::Debug for Published {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Published")
            .field("version", &self.version)
            .field("rejects", &self.rejects.len())
            .finish_non_exhaustive()
    }
}
