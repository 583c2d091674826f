//! `PeerAuthentication` (`security.istio.io`).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::common::Selector;

/// Which mTLS mode the selected workloads serve.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerAuthentication {
    /// Workloads; absent selects the whole namespace (root namespace: the mesh).
    pub selector: Option<Selector>,
    /// Mode of all ports.
    pub mtls: Option<MutualTls>,
    /// Mode by workload port; read only where there is a selector.
    pub port_level_mtls: BTreeMap<u16, MutualTls>,
}

/// `MutualTLS`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MutualTls {
    /// The mode.
    pub mode: Mode,
}

/// `MutualTLS.Mode`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mode {
    /// Inherited.
    #[default]
    Unset,
    /// Plaintext only.
    Disable,
    /// Both.
    Permissive,
    /// mTLS only.
    Strict,
}
