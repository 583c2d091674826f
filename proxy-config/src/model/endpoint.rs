//! Load assignments.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Address, Name, Shared};

/// `ClusterLoadAssignment`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Endpoints {
    /// EDS service name (the cluster's name).
    pub name: Name,
    /// Localities with priority.
    pub localities: Vec<LocalityEndpoints>,
    /// Overprovisioning in percent; `None` is 140.
    pub overprovisioning_factor: Option<u32>,
}

/// `LocalityLbEndpoints`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LocalityEndpoints {
    /// Where.
    pub locality: Locality,
    /// 0 is tried first.
    pub priority: u32,
    /// Weight of the locality; `None` is unset.
    pub weight: Option<u32>,
    /// Hosts.
    pub endpoints: Vec<Endpoint>,
}

/// `envoy.config.core.v3.Locality`.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Locality {
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Sub-zone.
    pub sub_zone: String,
}

/// `LbEndpoint`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Endpoint {
    /// Address.
    pub address: Address,
    /// Health as the control plane says.
    pub health: HealthStatus,
    /// Weight inside the locality; at least 1.
    pub weight: u32,
    /// `envoy.transport_socket_match` pairs (`tlsMode: istio`). Endpoints of one workload share them, and what follows.
    pub transport_labels: Shared<BTreeMap<String, String>>,
    /// `istio.workload`: `name;namespace;canonical service;revision;cluster`.
    pub workload: Name,
    /// Host name, for DNS kinds.
    pub hostname: String,
    /// Other metadata by namespace, as canonical JSON.
    pub metadata: Shared<BTreeMap<String, serde_json::Value>>,
}

/// `HealthStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum HealthStatus {
    /// Unknown counts as healthy.
    #[default]
    Unknown,
    /// Healthy.
    Healthy,
    /// Unhealthy.
    Unhealthy,
    /// Draining.
    Draining,
    /// Degraded.
    Degraded,
}
