//! `Sidecar`: what a workload sees and serves.

use serde::Deserialize;
use serde_json::Value;

use super::destination_rule::ConnectionPool;
use super::mesh_config::OutboundTrafficPolicy;
use super::service_entry::{LabelSelector, Port};

/// `istio.networking.v1alpha3.Sidecar`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Sidecar {
    /// Workloads it is for; absent is the whole namespace.
    pub workload_selector: Option<LabelSelector>,
    /// Ports served.
    pub ingress: Vec<Ingress>,
    /// Services seen.
    pub egress: Vec<Egress>,
    /// Traffic that no service explains.
    pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
    /// Pool limits of every inbound port.
    pub inbound_connection_pool: Option<ConnectionPool>,
}

/// `IstioIngressListener`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ingress {
    /// Port.
    pub port: Port,
    /// Address to bind.
    pub bind: String,
    /// `DEFAULT`, `IPTABLES`, `NONE`.
    pub capture_mode: String,
    /// Where the application listens.
    pub default_endpoint: String,
    /// TLS that the proxy ends.
    pub tls: Option<Value>,
    /// Pool limits.
    pub connection_pool: Option<ConnectionPool>,
}

/// `IstioEgressListener`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Egress {
    /// Port; absent is every port.
    pub port: Option<Port>,
    /// Address to bind.
    pub bind: String,
    /// `DEFAULT`, `IPTABLES`, `NONE`.
    pub capture_mode: String,
    /// `namespace/host` patterns.
    pub hosts: Vec<String>,
}
