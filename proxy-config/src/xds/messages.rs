//! Messages that the typed library lacks: the response envelope with its bytes kept, Istio's own, both wrappers
//! of untyped configuration. Only the fields that istiod sets.

use std::collections::HashMap;

use bytes::Bytes;
use envoy_types::pb::google::protobuf::{Duration, Struct};

/// `google.protobuf.Any` that shares the buffer of the response it came in.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    /// `type.googleapis.com/` and the message's full name.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The message.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// `envoy.service.discovery.v3.DiscoveryResponse`, as far as it carries resources.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct DiscoveryResponse {
    /// Version of the whole type.
    #[prost(string, tag = "1")]
    pub version_info: String,
    /// The resources, all of one type.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Any>,
    /// Their type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// What an acknowledgement names.
    #[prost(string, tag = "5")]
    pub nonce: String,
}

/// `google.rpc.Status`, as an `error_detail`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Status {
    /// gRPC code; 13 (internal) as Envoy and the agent have it.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// `envoy.service.discovery.v3.DiscoveryRequest`: state of the world.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DiscoveryRequest {
    /// Version that was accepted last.
    #[prost(string, tag = "1")]
    pub version_info: String,
    /// An encoded `envoy.config.core.v3.Node`; on the first message of a stream.
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub node: Option<Bytes>,
    /// Everything that is wanted; none: all of a wildcard type.
    #[prost(string, repeated, tag = "3")]
    pub resource_names: Vec<String>,
    /// Type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// Which response this answers.
    #[prost(string, tag = "5")]
    pub response_nonce: String,
    /// Why it was not accepted.
    #[prost(message, optional, tag = "6")]
    pub error_detail: Option<Status>,
}

/// `udpa.type.v1.TypedStruct` and `xds.type.v3.TypedStruct`: the same message under two names.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TypedStruct {
    /// Type that `value` stands for.
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    /// Its content as JSON.
    #[prost(message, optional, tag = "2")]
    pub(super) value: Option<Struct>,
}

/// `istio.mesh.v1alpha1.ProxyConfig`, as far as a running proxy takes it from its control plane.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct ProxyConfig {
    /// Certificates of CAs that the mesh trusts beside the one that signs for us, PEM.
    #[prost(string, repeated, tag = "34")]
    pub(super) ca_certificates_pem: Vec<String>,
}

/// `istio.networking.nds.v1.NameTable`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct NameTable {
    /// By host name.
    #[prost(map = "string, message", tag = "1")]
    pub(super) table: HashMap<String, NameEntry>,
}

/// `istio.networking.nds.v1.NameTable.NameInfo`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct NameEntry {
    /// Addresses.
    #[prost(string, repeated, tag = "1")]
    pub(super) ips: Vec<String>,
    /// Registry.
    #[prost(string, tag = "2")]
    pub(super) registry: String,
    /// First label.
    #[prost(string, tag = "3")]
    pub(super) shortname: String,
    /// Namespace.
    #[prost(string, tag = "4")]
    pub(super) namespace: String,
}

/// `envoy.tcp.metadataexchange.config.MetadataExchange`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct MetadataExchange {
    /// ALPN name that switches the exchange on.
    #[prost(string, tag = "1")]
    pub(super) protocol: String,
    /// Peers may be looked up by address.
    #[prost(bool, tag = "2")]
    pub(super) enable_discovery: bool,
    /// Further labels to send.
    #[prost(string, repeated, tag = "3")]
    pub(super) additional_labels: Vec<String>,
}

/// `istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct AlpnConfig {
    /// One list for each upstream protocol.
    #[prost(message, repeated, tag = "1")]
    pub(super) alpn_override: Vec<AlpnOverride>,
}

/// `FilterConfig.AlpnOverride`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct AlpnOverride {
    /// 0 is HTTP/1.0, 1 is HTTP/1.1, 2 is HTTP/2.
    #[prost(int32, tag = "1")]
    pub(super) upstream_protocol: i32,
    /// What to offer.
    #[prost(string, repeated, tag = "2")]
    pub(super) alpn_override: Vec<String>,
}

/// `stats.PluginConfig` of the `istio.stats` filters.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StatsConfig {
    /// The Host header never names a destination.
    #[prost(bool, tag = "6")]
    pub(super) disable_host_header_fallback: bool,
    /// Interval of TCP reports.
    #[prost(message, optional, tag = "7")]
    pub(super) tcp_reporting_duration: Option<Duration>,
    /// Overrides.
    #[prost(message, repeated, tag = "8")]
    pub(super) metrics: Vec<MetricConfig>,
    /// New metrics.
    #[prost(message, repeated, tag = "9")]
    pub(super) definitions: Vec<MetricDefinition>,
    /// 0 is the ordinary reporter.
    #[prost(int32, tag = "10")]
    pub(super) reporter: i32,
    /// Interval after which idle series go.
    #[prost(message, optional, tag = "11")]
    pub(super) rotation_interval: Option<Duration>,
    /// How long they stay readable.
    #[prost(message, optional, tag = "12")]
    pub(super) graceful_deletion_interval: Option<Duration>,
}

/// `stats.MetricConfig`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct MetricConfig {
    /// Expression by label.
    #[prost(map = "string, string", tag = "1")]
    pub(super) dimensions: HashMap<String, String>,
    /// Metric; empty is every one.
    #[prost(string, tag = "2")]
    pub(super) name: String,
    /// Labels that go.
    #[prost(string, repeated, tag = "3")]
    pub(super) tags_to_remove: Vec<String>,
    /// Condition.
    #[prost(string, tag = "4")]
    pub(super) r#match: String,
    /// The metric goes.
    #[prost(bool, tag = "5")]
    pub(super) drop: bool,
}

/// `stats.MetricDefinition`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct MetricDefinition {
    /// Metric.
    #[prost(string, tag = "1")]
    pub(super) name: String,
    /// Expression of its value.
    #[prost(string, tag = "2")]
    pub(super) value: String,
    /// 0 is a counter, 1 a gauge, 2 a histogram.
    #[prost(int32, tag = "3")]
    pub(super) r#type: i32,
}

/// `envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct UriTemplate {
    /// The template.
    #[prost(string, tag = "1")]
    pub(super) path_template: String,
}
