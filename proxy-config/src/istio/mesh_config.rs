//! `MeshConfig`, as far as it acts on a sidecar. What is absent takes istiod's default where it is read.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::common::IstioDuration;
use super::destination_rule::{LocalityLbSetting, TrafficPolicy};
use super::proxy_config::ProxyConfig;
use super::virtual_service::{Destination, HttpRetry};

/// `istio.mesh.v1alpha1.MeshConfig`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshConfig {
    /// Port of `virtualOutbound` (15001).
    pub proxy_listen_port: Option<u16>,
    /// Port of `virtualInbound` (15006).
    pub proxy_inbound_listen_port: Option<u16>,
    /// Port of the explicit HTTP proxy; zero is none.
    pub proxy_http_port: u16,
    /// TCP connect limit of clusters (10 s).
    pub connect_timeout: Option<IstioDuration>,
    /// TCP keep-alive of clusters.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Limit on protocol detection; absent or zero is none.
    pub protocol_detection_timeout: Option<IstioDuration>,
    /// Trace context is handled (default true).
    pub enable_tracing: Option<bool>,
    /// Access log file; empty is none.
    pub access_log_file: String,
    /// Access log format.
    pub access_log_format: String,
    /// Access log encoding.
    pub access_log_encoding: AccessLogEncoding,
    /// Access log service of the bootstrap.
    pub enable_envoy_access_log_service: bool,
    /// No logs of connections without a chain.
    pub disable_envoy_listener_log: bool,
    /// Defaults of every proxy.
    pub default_config: Option<ProxyConfig>,
    /// Traffic to what no service explains.
    pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
    /// Traffic to the application.
    pub inbound_traffic_policy: Option<InboundTrafficPolicy>,
    /// Automatic mTLS (default true).
    pub enable_auto_mtls: Option<bool>,
    /// Trust domain (`cluster.local`).
    pub trust_domain: String,
    /// Other names of the trust domain.
    pub trust_domain_aliases: Vec<String>,
    /// Further certificate authorities.
    pub ca_certificates: Vec<CertificateData>,
    /// Visibility of services that say none.
    pub default_service_export_to: Vec<String>,
    /// Visibility of VirtualServices that say none.
    pub default_virtual_service_export_to: Vec<String>,
    /// Visibility of DestinationRules that say none.
    pub default_destination_rule_export_to: Vec<String>,
    /// Namespace of mesh-wide objects (`istio-system`).
    pub root_namespace: String,
    /// Locality balancing.
    pub locality_lb_setting: Option<LocalityLbSetting>,
    /// Refresh of DNS clusters.
    pub dns_refresh_rate: Option<IstioDuration>,
    /// HTTP/2 upgrade of clusters.
    pub h2_upgrade_policy: H2UpgradePolicy,
    /// Path normalisation.
    pub path_normalization: Option<PathNormalization>,
    /// Retries of routes that set none.
    pub default_http_retry_policy: Option<HttpRetry>,
    /// Retries towards the application.
    pub default_inbound_http_retry_policy: Option<HttpRetry>,
    /// Pool and outlier detection where a DestinationRule says none.
    pub default_traffic_policy: Option<TrafficPolicy>,
    /// Zone-aware routing.
    pub zone_aware_lb_setting: Option<Value>,
    /// TLS between sidecars.
    #[serde(rename = "meshMTLS")]
    pub mesh_mtls: Option<TlsConfig>,
    /// TLS everywhere else.
    pub tls_defaults: Option<TlsConfig>,
    /// Telemetry and authorization providers.
    pub extension_providers: Vec<ExtensionProvider>,
    /// Providers that are used without being named.
    pub default_providers: Option<Value>,
    /// Certificates of servers are verified against system roots.
    pub verify_certificate_at_client: Option<bool>,
    /// Statistics name of inbound clusters.
    pub inbound_cluster_stat_name: String,
    /// Statistics name of outbound clusters.
    pub outbound_cluster_stat_name: String,
}

/// `accessLogEncoding`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum AccessLogEncoding {
    /// Text.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// `OutboundTrafficPolicy`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OutboundTrafficPolicy {
    /// What happens.
    pub mode: OutboundMode,
    /// Where everything unknown goes (Sidecar only).
    pub egress_proxy: Option<Destination>,
}

/// `OutboundTrafficPolicy.Mode`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundMode {
    /// Refused.
    RegistryOnly,
    /// Passed on.
    #[default]
    AllowAny,
    /// Passed on, HTTP by the host's name.
    AllowAnyDynamicDns,
}

/// `InboundTrafficPolicy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InboundTrafficPolicy {
    /// Where the application is reached.
    pub mode: InboundMode,
}

/// `InboundTrafficPolicy.Mode`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum InboundMode {
    /// At the address that was dialled.
    #[default]
    Passthrough,
    /// At the loopback address.
    Localhost,
}

/// `h2UpgradePolicy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum H2UpgradePolicy {
    /// HTTP/1.1 stays.
    #[default]
    DoNotUpgrade,
    /// HTTP/1.1 between sidecars becomes HTTP/2.
    Upgrade,
}

/// `TcpKeepalive`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpKeepalive {
    /// Probes before giving up.
    pub probes: u32,
    /// Idle time before the first.
    pub time: Option<IstioDuration>,
    /// Time between.
    pub interval: Option<IstioDuration>,
}

/// `ProxyPathNormalization`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PathNormalization {
    /// How far.
    pub normalization: Normalization,
}

/// `ProxyPathNormalization.NormalizationType`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Normalization {
    /// As `BASE`.
    #[default]
    Default,
    /// Not at all.
    None,
    /// RFC 3986.
    Base,
    /// Duplicate slashes too.
    MergeSlashes,
    /// Escaped slashes too.
    DecodeAndMergeSlashes,
}

/// `MeshConfig.TLSConfig`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TlsConfig {
    /// Lowest version.
    pub min_protocol_version: TlsProtocol,
    /// Groups for key exchange.
    pub ecdh_curves: Vec<String>,
    /// TLS 1.2 suites, OpenSSL names.
    pub cipher_suites: Vec<String>,
}

/// `MeshConfig.TLSConfig.TLSProtocol`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum TlsProtocol {
    /// TLS 1.2.
    #[default]
    #[serde(rename = "TLS_AUTO")]
    Auto,
    /// TLS 1.2.
    #[serde(rename = "TLSV1_2")]
    V1_2,
    /// TLS 1.3.
    #[serde(rename = "TLSV1_3")]
    V1_3,
}

/// `MeshConfig.CertificateData`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CertificateData {
    /// PEM text.
    pub pem: String,
    /// Where a bundle is fetched.
    pub spiffe_bundle_url: String,
    /// Signers it belongs to.
    pub cert_signers: Vec<String>,
    /// Trust domains it speaks for.
    pub trust_domains: Vec<String>,
}

/// `MeshConfig.ExtensionProvider`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionProvider {
    /// Name by which objects refer to it.
    pub name: String,
    /// The one kind that is set, with its settings.
    #[serde(flatten)]
    pub kind: BTreeMap<String, Value>,
}
