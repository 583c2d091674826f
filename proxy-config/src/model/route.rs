//! Route tables: virtual hosts, routes, actions.

use std::time::Duration;

use serde::Serialize;

use super::{CorsPolicy, HeaderMatcher, Name, QueryMatcher};

/// `envoy.config.route.v3.RouteConfiguration`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RouteTable {
    /// RDS name, or the inline table's name.
    pub name: Name,
    /// Virtual hosts.
    pub virtual_hosts: Vec<VirtualHost>,
    /// The port of the Host header plays no part in matching.
    pub ignore_port_in_host_matching: bool,
    /// Largest direct response, bytes.
    pub max_direct_response_body_size: Option<u32>,
    /// Unknown clusters refuse the table.
    pub validate_clusters: bool,
}

/// `VirtualHost`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct VirtualHost {
    /// `host:port`, `allow_any`, `block_all`, ...
    pub name: Name,
    /// Exact names, `*.suffix`, `prefix.*`, `*`.
    pub domains: Vec<String>,
    /// First match wins.
    pub routes: Vec<Route>,
    /// x-envoy-attempt-count is sent upstream.
    pub include_request_attempt_count: bool,
}

/// `Route`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Route {
    /// `%ROUTE_NAME%`; may be empty.
    pub name: Name,
    /// When.
    pub matches: RouteMatch,
    /// What.
    pub action: RouteAction,
    /// Request header changes.
    pub request_headers: HeaderOps,
    /// Response header changes.
    pub response_headers: HeaderOps,
    /// `decorator.operation`, sent as x-envoy-decorator-operation.
    pub decorator: Option<String>,
    /// Fault injection (`HTTPFault` of the route).
    pub fault: Option<Fault>,
    /// CORS.
    pub cors: Option<CorsPolicy>,
    /// Istio object it comes from (`filter_metadata.istio.config`).
    pub config: Option<String>,
    /// Statistics prefix.
    pub stat_prefix: String,
    /// Other per-filter configuration, by filter name, that we do not do.
    pub unsupported: Vec<String>,
}

/// `RouteMatch`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RouteMatch {
    /// Path.
    pub path: PathMatch,
    /// Path case matters.
    pub case_sensitive: bool,
    /// All must hold.
    pub headers: Vec<HeaderMatcher>,
    /// All must hold.
    pub query: Vec<QueryMatcher>,
    /// JWT claims: path in `envoy.filters.http.jwt_authn` and value; all must hold.
    pub dynamic_metadata: Vec<super::MetadataMatcher>,
    /// gRPC requests only.
    pub grpc: bool,
}

/// The path of a [`RouteMatch`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum PathMatch {
    /// Raw string prefix.
    Prefix(String),
    /// Whole path without the query.
    Exact(String),
    /// RE2 full match without the query.
    Regex(String),
    /// Prefix that ends at a segment border.
    PathSeparatedPrefix(String),
    /// Envoy URI template.
    Template(String),
    /// CONNECT requests.
    Connect,
}

/// What a route does.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs, reason = "a variant's line tells its fields")]
pub enum RouteAction {
    /// Forward.
    Forward(Box<Forward>),
    /// Redirect.
    Redirect(Redirect),
    /// Answer.
    Direct { status: u16, body: Vec<u8> },
    /// Something we do not do: 501 `unsupported_config`, with its name.
    Unsupported(String),
}

/// `RouteAction` that forwards.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Forward {
    /// Clusters; one entry takes everything.
    pub clusters: Vec<WeightedCluster>,
    /// Route timeout; `None` is Envoy's default (15 s), zero is off.
    pub timeout: Option<Duration>,
    /// Idle limit of a stream; `None` takes the connection manager's.
    pub idle_timeout: Option<Duration>,
    /// Legacy cap on grpc-timeout; `None` ignores the header, zero takes it as it is.
    pub max_grpc_timeout: Option<Duration>,
    /// `max_stream_duration.max_stream_duration`.
    pub max_stream_duration: Option<Duration>,
    /// `max_stream_duration.grpc_timeout_header_max`; `None` ignores the header, zero takes it as it is.
    pub grpc_timeout_header_max: Option<Duration>,
    /// Retries; `None` is none.
    pub retry: Option<RetryPolicy>,
    /// Replaces the matched prefix.
    pub prefix_rewrite: Option<String>,
    /// Regex and its substitution on the path.
    pub regex_rewrite: Option<(String, String)>,
    /// Host rewrite.
    pub host_rewrite: Option<HostRewrite>,
    /// x-forwarded-host keeps the old host.
    pub append_x_forwarded_host: bool,
    /// Mirrors.
    pub mirrors: Vec<Mirror>,
    /// Consistent hashing, in order.
    pub hash_policy: Vec<HashPolicy>,
    /// Status for an unknown cluster; `None` is 503.
    pub cluster_not_found_status: Option<u16>,
    /// Upgrades allowed here although the manager says otherwise (`true`) or the reverse.
    pub upgrades: Vec<(String, bool)>,
}

/// Host rewriting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum HostRewrite {
    /// This text.
    Literal(String),
    /// The chosen host's name.
    Auto,
}

/// A cluster with weight and its own header changes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct WeightedCluster {
    /// Cluster name.
    pub name: Name,
    /// Weight relative to the sum; 1 when alone.
    pub weight: u32,
    /// Request header changes.
    pub request_headers: HeaderOps,
    /// Response header changes.
    pub response_headers: HeaderOps,
    /// Host rewrite for this cluster.
    pub host_rewrite: Option<String>,
}

/// `RetryPolicy`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RetryPolicy {
    /// `retry_on` words, in order.
    pub retry_on: Vec<String>,
    /// Retries after the first try.
    pub num_retries: u32,
    /// Limit of each try; `None` is the route's.
    pub per_try_timeout: Option<Duration>,
    /// Idle limit of each try.
    pub per_try_idle_timeout: Option<Duration>,
    /// Statuses that `retriable-status-codes` means.
    pub retriable_status_codes: Vec<u16>,
    /// Hosts already tried are avoided.
    pub avoid_previous_hosts: bool,
    /// Times that host selection is repeated.
    pub host_selection_attempts: u32,
    /// `previous_priorities` update frequency.
    pub previous_priorities: Option<u32>,
    /// First back-off; `None` is 25 ms.
    pub backoff_base: Option<Duration>,
    /// Longest back-off; `None` is ten times the first.
    pub backoff_max: Option<Duration>,
}

/// `RedirectAction`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Redirect {
    /// Status (301, 302, 303, 307, 308).
    pub status: u16,
    /// New host.
    pub host: Option<String>,
    /// New whole path.
    pub path: Option<String>,
    /// New prefix.
    pub prefix: Option<String>,
    /// New scheme.
    pub scheme: Option<String>,
    /// Scheme becomes https.
    pub https: bool,
    /// New port.
    pub port: Option<u16>,
    /// Query is dropped.
    pub strip_query: bool,
}

/// Request mirroring.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mirror {
    /// Where the copy goes.
    pub cluster: Name,
    /// Share in millionths.
    pub millionths: u32,
    /// Host gets the `-shadow` suffix.
    pub shadow_suffix: bool,
}

/// `HashPolicy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HashPolicy {
    /// Source of the hash.
    pub kind: HashKind,
    /// No further policies are looked at when this one gave a hash.
    pub terminal: bool,
}

/// Source of a consistent hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "a variant's line tells its fields")]
pub enum HashKind {
    /// A header's value.
    Header(String),
    /// A cookie; with a lifetime it is made when absent.
    Cookie { name: String, path: String, ttl: Option<Duration> },
    /// The source address.
    SourceIp,
    /// A query parameter.
    Query(String),
}

/// Header changes, applied in the order set/append, then remove.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct HeaderOps {
    /// Additions.
    pub set: Vec<HeaderSet>,
    /// Removals, lower case.
    pub remove: Vec<String>,
}

/// One header addition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HeaderSet {
    /// Name.
    pub name: String,
    /// Envoy format string.
    pub value: String,
    /// What happens to an existing one.
    pub action: AppendAction,
}

/// `HeaderValueOption.append_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum AppendAction {
    /// Another line.
    Append,
    /// Only when absent.
    AddIfAbsent,
    /// Replace or add.
    Overwrite,
    /// Replace only when present.
    OverwriteIfExists,
}

/// `HTTPFault`; shares are in millionths.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Delay and its share.
    pub delay: Option<(Duration, u32)>,
    /// HTTP status and its share.
    pub abort_http: Option<(u16, u32)>,
    /// gRPC status and its share.
    pub abort_grpc: Option<(u32, u32)>,
}
