//! `ServiceEntry`: a service that Kubernetes does not know.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::workload_entry::WorkloadEntry;

/// `istio.networking.v1alpha3.ServiceEntry`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceEntry {
    /// Host names, wildcards allowed.
    pub hosts: Vec<String>,
    /// VIPs or CIDRs.
    pub addresses: Vec<String>,
    /// Ports.
    pub ports: Vec<Port>,
    /// Inside or outside the mesh.
    pub location: Location,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Endpoints.
    pub endpoints: Vec<WorkloadEntry>,
    /// Workloads that are endpoints.
    pub workload_selector: Option<LabelSelector>,
    /// Visibility.
    pub export_to: Vec<String>,
    /// SANs that servers may show.
    pub subject_alt_names: Vec<String>,
}

/// `ServicePort` of a ServiceEntry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Port {
    /// Number.
    pub number: u16,
    /// Protocol by name.
    pub protocol: String,
    /// Name.
    pub name: String,
    /// Port of the endpoints; zero is `number`.
    pub target_port: u16,
}

/// `ServiceEntry.Location`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Location {
    /// No automatic mTLS.
    #[default]
    MeshExternal,
    /// Part of the mesh.
    MeshInternal,
}

/// `ServiceEntry.Resolution`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    /// To where the caller dialled.
    #[default]
    None,
    /// The endpoints given.
    Static,
    /// Every address of the names.
    Dns,
    /// One address of one name.
    DnsRoundRobin,
    /// Resolved per request.
    DynamicDns,
}

/// `WorkloadSelector` with `labels`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Labels that a workload must have; empty selects every workload.
    pub labels: BTreeMap<String, String>,
}

impl LabelSelector {
    /// Whether a workload with these labels is selected.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels.iter().all(|(k, v)| labels.get(k) == Some(v))
    }
}
