//! `WorkloadEntry`: one workload outside Kubernetes.

use std::collections::BTreeMap;

use serde::Deserialize;

/// `istio.networking.v1alpha3.WorkloadEntry`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadEntry {
    /// IP, host name or `unix://` path; empty only with `network`.
    pub address: String,
    /// Numbers by name of the service port (or of its target).
    pub ports: BTreeMap<String, u16>,
    /// Labels; those of the object's metadata win.
    pub labels: BTreeMap<String, String>,
    /// Network.
    pub network: String,
    /// `region/zone/subzone`.
    pub locality: String,
    /// Balancing weight; zero is one.
    pub weight: u32,
    /// Service account; it decides identity and mTLS.
    pub service_account: String,
}

/// `IstioStatus`, as far as health goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadEntryStatus {
    /// Conditions.
    pub conditions: Vec<Condition>,
}

/// `IstioCondition`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// `Healthy`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False`.
    pub status: String,
}
