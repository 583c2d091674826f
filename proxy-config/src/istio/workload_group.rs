//! `WorkloadGroup`: what WorkloadEntries of a kind have in common, and how to probe them.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::workload_entry::WorkloadEntry;

/// `istio.networking.v1alpha3.WorkloadGroup`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadGroup {
    /// Metadata of the entries.
    pub metadata: GroupMetadata,
    /// The entries themselves.
    pub template: WorkloadEntry,
    /// Readiness probe as written; the prober reads it.
    pub probe: Option<Value>,
}

/// `WorkloadGroup.ObjectMeta`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GroupMetadata {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}
