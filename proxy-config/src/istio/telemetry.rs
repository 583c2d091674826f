//! `Telemetry` (`telemetry.istio.io`).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::common::{IstioDuration, Selector, TargetRef};

/// What is told of the traffic of the selected workloads.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Telemetry {
    /// Workloads; absent selects the whole namespace.
    pub selector: Option<Selector>,
    /// Gateway-style attachment: such an object never applies to a sidecar.
    pub target_ref: Option<TargetRef>,
    /// Gateway-style attachment: such an object never applies to a sidecar.
    pub target_refs: Vec<TargetRef>,
    /// Traces.
    pub tracing: Vec<Tracing>,
    /// Metrics.
    pub metrics: Vec<Metrics>,
    /// Access logs.
    pub access_logging: Vec<AccessLogging>,
}

/// `ProviderRef`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Provider {
    /// Name of an extension provider.
    pub name: String,
}

/// `WorkloadMode`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Mode {
    /// Both.
    #[default]
    ClientAndServer,
    /// Outbound.
    Client,
    /// Inbound.
    Server,
    /// The same as both.
    Undefined,
}

impl Mode {
    /// Whether it speaks of a direction.
    pub fn includes(self, inbound: bool) -> bool {
        match self {
            Self::ClientAndServer | Self::Undefined => true,
            Self::Client => !inbound,
            Self::Server => inbound,
        }
    }
}

/// `Tracing`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Tracing {
    /// Direction.
    #[serde(rename = "match")]
    pub matches: Option<ModeMatch>,
    /// Where spans go; only the first one counts.
    pub providers: Vec<Provider>,
    /// Share of new traces, percent.
    pub random_sampling_percentage: Option<f64>,
    /// Nothing is reported; context is still handed on.
    pub disable_span_reporting: Option<bool>,
    /// Further tags; they replace those of a level above.
    pub custom_tags: Option<BTreeMap<String, Value>>,
    /// The request id carries the decision (default true).
    pub use_request_id_for_trace_sampling: Option<bool>,
    /// Istio's own tags (default true).
    pub enable_istio_tags: Option<bool>,
}

/// A match on the direction alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ModeMatch {
    /// Direction.
    pub mode: Mode,
}

/// `Metrics`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metrics {
    /// Where metrics go.
    pub providers: Vec<Provider>,
    /// Changes, later ones win.
    pub overrides: Vec<Override>,
    /// Interval of TCP reports.
    pub reporting_interval: Option<IstioDuration>,
}

/// `MetricsOverrides`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Override {
    /// Which metrics; absent is every one.
    #[serde(rename = "match")]
    pub matches: Option<MetricMatch>,
    /// They are not kept.
    pub disabled: Option<bool>,
    /// Labels.
    pub tag_overrides: BTreeMap<String, TagOverride>,
}

/// `MetricSelector`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MetricMatch {
    /// One of Istio's metrics.
    pub metric: Option<Metric>,
    /// Another one, by name.
    pub custom_metric: Option<String>,
    /// Direction.
    pub mode: Mode,
}

/// `IstioMetric`; its order is that of its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Metric {
    AllMetrics,
    GrpcRequestMessages,
    GrpcResponseMessages,
    RequestCount,
    RequestDuration,
    RequestSize,
    ResponseSize,
    TcpClosedConnections,
    TcpOpenedConnections,
    TcpReceivedBytes,
    TcpSentBytes,
}

impl Metric {
    /// Every single one.
    pub const ALL: [Self; 10] = [
        Self::GrpcRequestMessages,
        Self::GrpcResponseMessages,
        Self::RequestCount,
        Self::RequestDuration,
        Self::RequestSize,
        Self::ResponseSize,
        Self::TcpClosedConnections,
        Self::TcpOpenedConnections,
        Self::TcpReceivedBytes,
        Self::TcpSentBytes,
    ];

    /// The family's name without `istio_`.
    pub const fn family(self) -> &'static str {
        match self {
            Self::AllMetrics => "",
            Self::GrpcRequestMessages => "request_messages_total",
            Self::GrpcResponseMessages => "response_messages_total",
            Self::RequestCount => "requests_total",
            Self::RequestDuration => "request_duration_milliseconds",
            Self::RequestSize => "request_bytes",
            Self::ResponseSize => "response_bytes",
            Self::TcpClosedConnections => "tcp_connections_closed_total",
            Self::TcpOpenedConnections => "tcp_connections_opened_total",
            Self::TcpReceivedBytes => "tcp_received_bytes_total",
            Self::TcpSentBytes => "tcp_sent_bytes_total",
        }
    }
}

/// `TagOverride`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TagOverride {
    /// What happens to the label.
    pub operation: Operation,
    /// Expression of its value.
    pub value: String,
}

/// `TagOverride.Operation`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Operation {
    /// It gets the value.
    #[default]
    Upsert,
    /// It goes.
    Remove,
}

/// `AccessLogging`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessLogging {
    /// Direction.
    #[serde(rename = "match")]
    pub matches: Option<ModeMatch>,
    /// Where lines go.
    pub providers: Vec<Provider>,
    /// They are not written.
    pub disabled: Option<bool>,
    /// Which ones.
    pub filter: Option<Filter>,
}

/// `AccessLogging.Filter`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Filter {
    /// Expression (CEL).
    pub expression: String,
}
