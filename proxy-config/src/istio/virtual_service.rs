//! `VirtualService` (`networking.istio.io`).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::common::IstioDuration;

/// Names of gRPC's codes as faults and retries write them, each at its number.
pub const GRPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Routes of hosts.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VirtualService {
    /// Hosts: FQDN, short name or `*.suffix`.
    pub hosts: Vec<String>,
    /// Gateways; empty is `mesh`.
    pub gateways: Vec<String>,
    /// Routes of HTTP traffic.
    pub http: Vec<HttpRoute>,
    /// Routes of opaque TLS.
    pub tls: Vec<TlsRoute>,
    /// Routes of opaque bytes.
    pub tcp: Vec<TcpRoute>,
    /// Namespaces that see it.
    pub export_to: Vec<String>,
}

/// `HTTPRoute`: redirect before direct response before route.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRoute {
    /// Name for logs.
    pub name: String,
    /// Any must match; empty matches everything.
    #[serde(rename = "match")]
    pub matches: Vec<HttpMatch>,
    /// Destinations with weights.
    pub route: Vec<HttpDestination>,
    /// Redirect.
    pub redirect: Option<HttpRedirect>,
    /// Fixed answer.
    pub direct_response: Option<HttpDirectResponse>,
    /// Another VirtualService that holds the routes.
    pub delegate: Option<Delegate>,
    /// Path and host changes.
    pub rewrite: Option<HttpRewrite>,
    /// Limit on the whole exchange; absent or zero is none.
    pub timeout: Option<IstioDuration>,
    /// Retries; absent takes the mesh's.
    pub retries: Option<HttpRetry>,
    /// Fault injection.
    pub fault: Option<HttpFault>,
    /// Copy of the traffic.
    pub mirror: Option<Destination>,
    /// Copies of the traffic.
    pub mirrors: Vec<HttpMirror>,
    /// Deprecated whole-number share of `mirror`.
    #[serde(alias = "mirror_percent")]
    pub mirror_percent: Option<u32>,
    /// Share of `mirror`.
    pub mirror_percentage: Option<Percent>,
    /// CORS.
    pub cors_policy: Option<CorsPolicy>,
    /// Header changes.
    pub headers: Option<Headers>,
}

/// `HTTPMatchRequest`: all fields that are set must hold.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpMatch {
    /// Name for logs.
    pub name: String,
    /// Path.
    pub uri: Option<StringMatch>,
    /// Scheme.
    pub scheme: Option<StringMatch>,
    /// Method.
    pub method: Option<StringMatch>,
    /// Host header.
    pub authority: Option<StringMatch>,
    /// Headers.
    pub headers: BTreeMap<String, Option<StringMatch>>,
    /// Headers that must not match.
    pub without_headers: BTreeMap<String, Option<StringMatch>>,
    /// Port of the service that was dialled; zero is any.
    pub port: u32,
    /// Labels of the client.
    pub source_labels: BTreeMap<String, String>,
    /// Gateways of this match.
    pub gateways: Vec<String>,
    /// Query parameters.
    pub query_params: BTreeMap<String, Option<StringMatch>>,
    /// Path case does not matter.
    pub ignore_uri_case: bool,
    /// Namespace of the client.
    pub source_namespace: String,
    /// Statistics prefix.
    pub stat_prefix: String,
}

/// `StringMatch`; nothing set means presence.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StringMatch {
    /// Equal.
    pub exact: Option<String>,
    /// Starts with.
    pub prefix: Option<String>,
    /// RE2 full match.
    pub regex: Option<String>,
}

/// `HTTPRouteDestination`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpDestination {
    /// Where to.
    pub destination: Destination,
    /// Share relative to the sum.
    pub weight: u32,
    /// Header changes.
    pub headers: Option<Headers>,
}

/// `RouteDestination` of TCP and TLS routes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteDestination {
    /// Where to.
    pub destination: Destination,
    /// Share relative to the sum.
    pub weight: u32,
}

/// `Destination`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Destination {
    /// Service host.
    pub host: String,
    /// Subset of its DestinationRule.
    pub subset: String,
    /// Port.
    pub port: Option<PortSelector>,
}

/// `PortSelector`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortSelector {
    /// Service port number.
    pub number: u16,
}

/// `HTTPRedirect`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRedirect {
    /// New path.
    pub uri: String,
    /// New prefix.
    #[serde(alias = "uriPrefix")]
    pub prefix_rewrite: String,
    /// New host.
    pub authority: String,
    /// New port.
    pub port: Option<u16>,
    /// Where the port comes from otherwise.
    pub derive_port: Option<DerivePort>,
    /// New scheme.
    pub scheme: String,
    /// Status; zero is 301.
    pub redirect_code: u16,
}

/// `HTTPRedirect.RedirectPortSelection`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum DerivePort {
    /// 80 or 443, left out.
    #[serde(rename = "FROM_PROTOCOL_DEFAULT")]
    FromProtocolDefault,
    /// Port of the listener.
    #[serde(rename = "FROM_REQUEST_PORT")]
    FromRequestPort,
}

/// `HTTPDirectResponse`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpDirectResponse {
    /// Status.
    pub status: u16,
    /// Body.
    pub body: Option<HttpBody>,
}

/// `HTTPBody`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpBody {
    /// Text.
    pub string: Option<String>,
    /// Base64.
    pub bytes: Option<String>,
}

/// `Delegate`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Delegate {
    /// Name of the child.
    pub name: String,
    /// Its namespace; empty is the parent's.
    pub namespace: String,
}

/// `HTTPRewrite`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRewrite {
    /// Replaces the matched part of the path.
    pub uri: String,
    /// New host.
    pub authority: String,
    /// Regular expression and its substitution.
    pub uri_regex_rewrite: Option<RegexRewrite>,
}

/// `RegexRewrite`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RegexRewrite {
    /// RE2.
    #[serde(rename = "match")]
    pub matches: String,
    /// Substitution with `\1`.
    pub rewrite: String,
}

/// `HTTPRetry`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRetry {
    /// Retries after the first try; zero or less is none.
    pub attempts: i32,
    /// Limit of each try.
    pub per_try_timeout: Option<IstioDuration>,
    /// Conditions and status codes, comma-separated.
    pub retry_on: String,
    /// Other localities are tried too.
    pub retry_remote_localities: Option<bool>,
    /// Hosts already tried are avoided.
    pub retry_ignore_previous_hosts: Option<bool>,
    /// First back-off.
    pub backoff: Option<IstioDuration>,
}

/// `HTTPFaultInjection`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpFault {
    /// Delay.
    pub delay: Option<FaultDelay>,
    /// Abort.
    pub abort: Option<FaultAbort>,
}

/// `HTTPFaultInjection.Delay`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultDelay {
    /// Deprecated whole-number share.
    pub percent: u32,
    /// Share; absent is 0 %.
    pub percentage: Option<Percent>,
    /// How long.
    pub fixed_delay: Option<IstioDuration>,
    /// Never supported by Istio.
    pub exponential_delay: Option<IstioDuration>,
}

/// `HTTPFaultInjection.Abort`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultAbort {
    /// HTTP status.
    pub http_status: Option<u16>,
    /// gRPC status name.
    pub grpc_status: Option<String>,
    /// Never supported by Istio.
    pub http2_error: Option<String>,
    /// Share; absent is 0 %.
    pub percentage: Option<Percent>,
}

/// `Percent`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Percent {
    /// 0 to 100.
    pub value: f64,
}

/// `HTTPMirrorPolicy`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpMirror {
    /// Where to.
    pub destination: Option<Destination>,
    /// Share; absent is 100 %.
    pub percentage: Option<Percent>,
}

/// `CorsPolicy`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CorsPolicy {
    /// Deprecated exact origins.
    pub allow_origin: Vec<String>,
    /// Origins.
    pub allow_origins: Vec<StringMatch>,
    /// Methods.
    pub allow_methods: Vec<String>,
    /// Request headers.
    pub allow_headers: Vec<String>,
    /// Response headers.
    pub expose_headers: Vec<String>,
    /// How long a preflight holds.
    pub max_age: Option<IstioDuration>,
    /// Credentials.
    pub allow_credentials: Option<bool>,
    /// What happens to preflights of other origins.
    pub unmatched_preflights: UnmatchedPreflights,
}

/// `CorsPolicy.UnmatchedPreflights`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum UnmatchedPreflights {
    /// Not said: forwarded.
    #[default]
    Unspecified,
    /// Forwarded.
    Forward,
    /// Answered without CORS headers.
    Ignore,
}

/// `Headers`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Headers {
    /// On the way to the service.
    pub request: HeaderOperations,
    /// On the way back.
    pub response: HeaderOperations,
}

/// `Headers.HeaderOperations`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HeaderOperations {
    /// Overwritten.
    pub set: BTreeMap<String, String>,
    /// Appended.
    pub add: BTreeMap<String, String>,
    /// Removed.
    pub remove: Vec<String>,
}

/// `TLSRoute`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TlsRoute {
    /// Any must match.
    #[serde(rename = "match")]
    pub matches: Vec<TlsMatch>,
    /// Destinations with weights.
    pub route: Vec<RouteDestination>,
}

/// `TLSMatchAttributes`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TlsMatch {
    /// SNI names.
    pub sni_hosts: Vec<String>,
    /// Destination addresses.
    pub destination_subnets: Vec<String>,
    /// Port; zero is any.
    pub port: u32,
    /// Labels of the client.
    pub source_labels: BTreeMap<String, String>,
    /// Gateways of this match.
    pub gateways: Vec<String>,
    /// Namespace of the client.
    pub source_namespace: String,
}

/// `TCPRoute`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpRoute {
    /// Any must match; empty matches everything.
    #[serde(rename = "match")]
    pub matches: Vec<L4Match>,
    /// Destinations with weights.
    pub route: Vec<RouteDestination>,
}

/// `L4MatchAttributes`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct L4Match {
    /// Destination addresses.
    pub destination_subnets: Vec<String>,
    /// Port; zero is any.
    pub port: u32,
    /// Deprecated and never read.
    pub source_subnet: String,
    /// Labels of the client.
    pub source_labels: BTreeMap<String, String>,
    /// Gateways of this match.
    pub gateways: Vec<String>,
    /// Namespace of the client.
    pub source_namespace: String,
}
