//! `Sidecar`: what a workload sees and serves.

use serde::Deserialize;

use super::destination_rule::ConnectionPool;
use super::mesh_config::{OutboundTrafficPolicy, TlsProtocol};
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
    pub tls: Option<ServerTls>,
    /// Pool limits.
    pub connection_pool: Option<ConnectionPool>,
}

/// `ServerTLSSettings`, as far as a Sidecar may say it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServerTls {
    /// `SIMPLE` or `MUTUAL`.
    pub mode: String,
    /// Certificate chain, a file.
    pub server_certificate: String,
    /// Its key, a file.
    pub private_key: String,
    /// Roots of client certificates, a file.
    pub ca_certificates: String,
    /// Revoked client certificates, a file.
    pub ca_crl: String,
    /// A Secret instead of files.
    pub credential_name: String,
    /// Names that a client certificate must have.
    pub subject_alt_names: Vec<String>,
    /// Lowest version.
    pub min_protocol_version: TlsProtocol,
    /// Highest version.
    pub max_protocol_version: TlsProtocol,
    /// TLS 1.2 suites.
    pub cipher_suites: Vec<String>,
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
