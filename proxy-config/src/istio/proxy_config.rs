//! `ProxyConfig` of `MeshConfig.defaultConfig`, pod annotation or node metadata, as far as it shapes a configuration.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// `istio.mesh.v1alpha1.ProxyConfig`; what the agent alone reads is kept as it is.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyConfig {
    /// Tracing.
    pub tracing: Option<Tracing>,
    /// Headers that the proxy adds or leaves.
    pub proxy_headers: Option<ProxyHeaders>,
    /// Limits of connection managers.
    pub connection_settings: Option<Value>,
    /// Settings that this side does not read.
    #[serde(flatten)]
    pub agent: BTreeMap<String, Value>,
}

/// `Tracing`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Tracing {
    /// Share of new traces, percent; zero is the default.
    pub sampling: f64,
    /// Longest path tag.
    pub max_path_tag_length: u32,
    /// Istio's own tags (default true).
    pub enable_istio_tags: Option<bool>,
    /// Further tags.
    pub custom_tags: BTreeMap<String, Value>,
    /// Providers and other settings.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

/// `ProxyHeaders`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyHeaders {
    /// `x-forwarded-client-cert`.
    pub forwarded_client_cert: ForwardedClientCert,
    /// Parts of `x-forwarded-client-cert`.
    pub set_current_client_cert_details: Option<ClientCertDetails>,
    /// `x-request-id`.
    pub request_id: Option<Switch>,
    /// `server`.
    pub server: Option<Server>,
    /// `x-envoy-attempt-count`.
    pub attempt_count: Option<Switch>,
    /// `x-envoy-*` debug headers.
    pub envoy_debug_headers: Option<Switch>,
    /// Metadata exchange.
    pub metadata_exchange_headers: Option<MetadataExchange>,
    /// Header case on HTTP/1.
    #[serde(rename = "preserveHttp1HeaderCase")]
    pub preserve_http1_header_case: Option<bool>,
    /// `x-forwarded-host`.
    pub x_forwarded_host: Option<Switch>,
    /// `x-forwarded-port`.
    pub x_forwarded_port: Option<Switch>,
}

/// `disabled` or `enabled` of a header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Switch {
    /// Turned off.
    pub disabled: Option<bool>,
    /// Turned on.
    pub enabled: Option<bool>,
}

/// `ProxyHeaders.Server`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Server {
    /// The application's own is left.
    pub disabled: Option<bool>,
    /// Value instead of the default.
    pub value: String,
}

/// `ProxyHeaders.MetadataExchangeHeaders`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MetadataExchange {
    /// `UNDEFINED` or `IN_MESH`.
    pub mode: String,
}

/// `ProxyHeaders.SetCurrentClientCertDetails`; absent takes the default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientCertDetails {
    /// `Subject=` (default true).
    pub subject: Option<bool>,
    /// `Cert=`.
    pub cert: Option<bool>,
    /// `Chain=`.
    pub chain: Option<bool>,
    /// `DNS=` (default true).
    pub dns: Option<bool>,
    /// `URI=` (default true).
    pub uri: Option<bool>,
}

/// `ForwardClientCertDetails`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ForwardedClientCert {
    /// The default.
    #[default]
    Undefined,
    /// Removed.
    Sanitize,
    /// Kept.
    ForwardOnly,
    /// Appended.
    AppendForward,
    /// Replaced.
    SanitizeSet,
    /// Kept, whatever the peer.
    AlwaysForwardOnly,
}
