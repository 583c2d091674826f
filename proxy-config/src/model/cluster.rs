//! Clusters: how to reach a service, with every limit.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;

use super::{Endpoints, HashPolicy, Http2Options, MetadataExchange, Name, Shared, UpstreamTls};

/// `envoy.config.cluster.v3.Cluster`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cluster {
    /// Resource name.
    pub name: Name,
    /// Where hosts come from.
    pub kind: ClusterKind,
    /// Balancer.
    pub lb: LbPolicy,
    /// TCP connect limit; `None` is Envoy's default (5 s).
    pub connect_timeout: Option<Duration>,
    /// Limits of the default priority.
    pub limits: CircuitBreakers,
    /// Outlier detection; `None` is off.
    pub outlier: Option<OutlierDetection>,
    /// Panic threshold in percent; `None` is Envoy's default (50).
    pub healthy_panic_threshold: Option<f64>,
    /// Locality-weighted balancing.
    pub locality_weighted: bool,
    /// HTTP towards the upstream.
    pub http: UpstreamHttp,
    /// Sockets by endpoint metadata, first match wins; empty uses `transport`.
    pub transport_matches: Vec<TransportMatch>,
    /// Socket when no match is configured.
    pub transport: Transport,
    /// Source address (127.0.0.6 for inbound).
    pub source_address: Option<IpAddr>,
    /// TCP keep-alive.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// ORIGINAL_DST: port replaces the original one.
    pub upstream_port_override: Option<u16>,
    /// `filter_metadata.istio`: object, services, subset.
    pub istio: IstioClusterMetadata,
    /// TCP metadata exchange runs on upstream connections.
    pub metadata_exchange: Option<MetadataExchange>,
    /// DNS settings for DNS kinds.
    pub dns: Option<DnsOptions>,
    /// Hosts removed from discovery keep no connections (`close_connections_on_host_health_failure` and alike).
    pub close_on_host_failure: bool,
    /// Statistics name when it differs.
    pub alt_stat_name: String,
    /// Idle limit of TCP connections that wait in a pool; nobody reads it: ours are opened when they are needed.
    pub tcp_idle_timeout: Option<Duration>,
    /// Upstream filters that we do not do, by name.
    pub unsupported: Vec<String>,
}

/// Where hosts come from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum ClusterKind {
    /// EDS with this service name.
    Eds(Name),
    /// Inline endpoints.
    Static(Endpoints),
    /// Every address of the names.
    StrictDns(Endpoints),
    /// One address at a time of one name.
    LogicalDns(Endpoints),
    /// The original destination.
    OriginalDst,
    /// Dynamic forward proxy (not served yet).
    DynamicForwardProxy,
}

/// Balancers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs, reason = "a variant's line tells its fields")]
pub enum LbPolicy {
    /// Weighted round robin.
    RoundRobin { slow_start: Option<Duration> },
    /// Power of two choices over active requests.
    LeastRequest { slow_start: Option<Duration>, choice_count: Option<u32> },
    /// Random.
    Random,
    /// Ketama.
    RingHash { minimum: Option<u64>, maximum: Option<u64>, use_hostname: bool },
    /// Maglev.
    Maglev { table_size: Option<u64> },
    /// The cluster's own (ORIGINAL_DST).
    ClusterProvided,
}

/// Thresholds; `u32::MAX` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CircuitBreakers {
    /// Connections.
    pub max_connections: u32,
    /// Requests waiting for a connection.
    pub max_pending_requests: u32,
    /// Active requests.
    pub max_requests: u32,
    /// Concurrent retries.
    pub max_retries: u32,
    /// Retry budget: percent of active requests, and the least concurrency.
    pub retry_budget: Option<(f64, u32)>,
}

impl Default for CircuitBreakers {
    /// Envoy's defaults: 1024, 1024, 1024, 3.
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_pending_requests: 1024,
            max_requests: 1024,
            max_retries: 3,
            retry_budget: None,
        }
    }
}

/// `OutlierDetection`; `None` is Envoy's default for that field.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct OutlierDetection {
    /// Consecutive 5xx (default 5).
    pub consecutive_5xx: Option<u32>,
    /// Consecutive gateway failures (default 5).
    pub consecutive_gateway_failure: Option<u32>,
    /// Consecutive local-origin failures (default 5).
    pub consecutive_local_origin_failure: Option<u32>,
    /// Sweep interval (default 10 s).
    pub interval: Option<Duration>,
    /// Ejection time times ejections (default 30 s).
    pub base_ejection_time: Option<Duration>,
    /// Longest ejection (default 300 s or the base, if greater).
    pub max_ejection_time: Option<Duration>,
    /// Share of hosts that may be ejected, percent (default 10).
    pub max_ejection_percent: Option<u32>,
    /// Chance that 5xx ejects, percent (default 100).
    pub enforcing_consecutive_5xx: Option<u32>,
    /// Chance that gateway failures eject, percent (default 0).
    pub enforcing_consecutive_gateway_failure: Option<u32>,
    /// Chance that local-origin failures eject, percent (default 100).
    pub enforcing_consecutive_local_origin_failure: Option<u32>,
    /// Success rate ejection, percent (default 100; istiod always sends 0).
    pub enforcing_success_rate: Option<u32>,
    /// Local-origin errors count apart.
    pub split_external_local_origin_errors: bool,
    /// Statuses that count as errors instead of 5xx (`HttpProtocolOptions.outlier_detection.error_matcher`).
    pub error_statuses: Vec<(u16, u16)>,
}

/// How HTTP is spoken upstream.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct UpstreamHttp {
    /// Version.
    pub protocol: UpstreamProtocol,
    /// HTTP/2 settings.
    pub http2: Http2Options,
    /// Pool idle limit; `None` is Envoy's default (1 h), zero is off.
    pub idle_timeout: Option<Duration>,
    /// Requests per connection.
    pub max_requests_per_connection: Option<u32>,
    /// Longest life of a connection.
    pub max_connection_duration: Option<Duration>,
    /// SNI from the request's host.
    pub auto_sni: bool,
    /// SAN must equal the automatic SNI.
    pub auto_san_validation: bool,
    /// Header case is kept on HTTP/1.
    pub preserve_header_case: bool,
    /// `true` when protocol options were given at all.
    pub configured: bool,
}

/// Upstream HTTP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2.
    Http2,
    /// As the client spoke.
    Downstream,
}

/// One row of `transport_socket_matches`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TransportMatch {
    /// `tlsMode-istio`, `tlsMode-disabled`.
    pub name: String,
    /// Pairs that `envoy.transport_socket_match` of the endpoint must contain.
    pub labels: Shared<BTreeMap<String, String>>,
    /// Socket.
    pub transport: Transport,
}

/// A transport socket.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub enum Transport {
    /// Plaintext.
    #[default]
    Raw,
    /// TLS.
    Tls(Box<UpstreamTls>),
    /// PROXY protocol header (version 1 or 2) in front of another socket.
    ProxyProtocol(u8, Box<Self>),
    /// Not served; its name.
    Unsupported(String),
}

/// TCP keep-alive; `None` is the kernel's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TcpKeepalive {
    /// Probes before giving up.
    pub probes: Option<u32>,
    /// Idle seconds before the first.
    pub time: Option<u32>,
    /// Seconds between.
    pub interval: Option<u32>,
}

/// `filter_metadata.istio` of a cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct IstioClusterMetadata {
    /// Object that shaped it (a DestinationRule's path).
    pub config: Option<String>,
    /// Services behind it: host, name, namespace.
    pub services: Vec<(String, String, String)>,
    /// Subset.
    pub subset: Option<String>,
    /// Mesh-external.
    pub external: bool,
    /// `alpn_override: "false"`: the `istio.alpn` filter leaves it alone.
    pub no_alpn_override: bool,
    /// No metadata exchange.
    pub disable_mx: bool,
}

/// Resolver settings of DNS clusters.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DnsOptions {
    /// `V4_ONLY`, `V6_ONLY`, `ALL`, ...
    pub family: String,
    /// Refresh.
    pub refresh_rate: Option<Duration>,
    /// Record TTL decides.
    pub respect_ttl: bool,
    /// Refresh after a failure: base and maximum.
    pub failure_refresh: Option<(Duration, Duration)>,
    /// Jitter.
    pub jitter: Option<Duration>,
}

/// Hash settings that a cluster may carry beside the route's.
pub type ClusterHash = Vec<HashPolicy>;
