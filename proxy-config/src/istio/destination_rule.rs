//! `DestinationRule` (`networking.istio.io`).

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::common::{IstioDuration, Selector};

/// How a client talks to the endpoints of a host.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DestinationRule {
    /// Host: FQDN, short name or `*.suffix`.
    pub host: String,
    /// Policy of all endpoints.
    pub traffic_policy: Option<TrafficPolicy>,
    /// Named groups of endpoints.
    pub subsets: Vec<Subset>,
    /// Namespaces that see it.
    pub export_to: Vec<String>,
    /// Clients of the same namespace that obey it; absent is every client.
    pub workload_selector: Option<Selector>,
}

/// `Subset`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Subset {
    /// Name.
    pub name: String,
    /// Labels that an endpoint must have.
    pub labels: BTreeMap<String, String>,
    /// Policy that goes over the rule's, block by block.
    pub traffic_policy: Option<TrafficPolicy>,
}

/// `TrafficPolicy`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrafficPolicy {
    /// Choice of an endpoint.
    pub load_balancer: Option<LoadBalancer>,
    /// Limits.
    pub connection_pool: Option<ConnectionPool>,
    /// Ejection of endpoints.
    pub outlier_detection: Option<OutlierDetection>,
    /// TLS towards the endpoints.
    pub tls: Option<ClientTls>,
    /// Policies of single service ports: each replaces everything above.
    pub port_level_settings: Vec<PortPolicy>,
    /// Opaque bytes through a proxy.
    pub tunnel: Option<Tunnel>,
    /// PROXY protocol towards the endpoints.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Limit on retries relative to requests.
    pub retry_budget: Option<RetryBudget>,
}

/// `TrafficPolicy.PortTrafficPolicy`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortPolicy {
    /// Which port.
    pub port: Option<PortSelector>,
    /// Choice of an endpoint.
    pub load_balancer: Option<LoadBalancer>,
    /// Limits.
    pub connection_pool: Option<ConnectionPool>,
    /// Ejection of endpoints.
    pub outlier_detection: Option<OutlierDetection>,
    /// TLS towards the endpoints.
    pub tls: Option<ClientTls>,
}

/// `PortSelector`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortSelector {
    /// Service port.
    pub number: u32,
}

/// `LoadBalancerSettings`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancer {
    /// A balancer without settings.
    pub simple: SimpleLb,
    /// Consistent hashing; goes over `simple`.
    pub consistent_hash: Option<ConsistentHash>,
    /// Localities; replaces the mesh's.
    pub locality_lb_setting: Option<LocalityLbSetting>,
    /// Zone-aware routing.
    pub zone_aware_lb_setting: Option<Value>,
    /// Deprecated form of `warmup`.
    pub warmup_duration_secs: Option<IstioDuration>,
    /// New endpoints get their share slowly.
    pub warmup: Option<Warmup>,
}

/// `SimpleLB`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum SimpleLb {
    /// Istio's default, least request.
    #[default]
    Unspecified,
    /// Old name of least request.
    LeastConn,
    /// Random.
    Random,
    /// The address that was dialled.
    Passthrough,
    /// Round robin.
    RoundRobin,
    /// Least request.
    LeastRequest,
}

/// `ConsistentHashLB`: one key and one algorithm.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConsistentHash {
    /// Key: a header.
    pub http_header_name: Option<String>,
    /// Key: a cookie.
    pub http_cookie: Option<HttpCookie>,
    /// Key: the source address.
    pub use_source_ip: Option<bool>,
    /// Key: a query parameter.
    pub http_query_parameter_name: Option<String>,
    /// Ketama.
    pub ring_hash: Option<RingHash>,
    /// Maglev.
    pub maglev: Option<Maglev>,
    /// Deprecated form of `ringHash`.
    pub minimum_ring_size: u64,
}

/// `ConsistentHashLB.HTTPCookie`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpCookie {
    /// Name.
    pub name: String,
    /// Path of a cookie that the proxy makes.
    pub path: String,
    /// Lifetime; a cookie is made where this is said.
    pub ttl: Option<IstioDuration>,
    /// Further attributes of a cookie that the proxy makes.
    pub attributes: Vec<Value>,
}

/// `ConsistentHashLB.RingHash`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RingHash {
    /// Least number of points; zero is the default.
    pub minimum_ring_size: u64,
}

/// `ConsistentHashLB.MagLev`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Maglev {
    /// Size of the table, a prime; zero is the default.
    pub table_size: u64,
}

/// `WarmupConfiguration`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Warmup {
    /// How long.
    pub duration: Option<IstioDuration>,
    /// Share at the start, percent (10).
    pub minimum_percent: Option<f64>,
    /// Shape of the ramp (1 is linear).
    pub aggression: Option<f64>,
}

/// `LocalityLoadBalancerSetting`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalityLbSetting {
    /// Share of each locality.
    pub distribute: Vec<Distribute>,
    /// Order of foreign regions.
    pub failover: Vec<Failover>,
    /// Labels that decide the order, most important first.
    pub failover_priority: Vec<String>,
    /// Off, where it says `false`.
    pub enabled: Option<bool>,
}

/// `LocalityLoadBalancerSetting.Distribute`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Distribute {
    /// Locality of the client, `region/zone/*`.
    pub from: String,
    /// Locality of endpoints and its share in percent.
    pub to: BTreeMap<String, u32>,
}

/// `LocalityLoadBalancerSetting.Failover`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Failover {
    /// Region of the client.
    pub from: String,
    /// Region that comes before other foreign ones.
    pub to: String,
}

/// `ConnectionPoolSettings`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectionPool {
    /// Of connections.
    pub tcp: Option<TcpPool>,
    /// Of requests.
    pub http: Option<HttpPool>,
}

/// `ConnectionPoolSettings.TCPSettings`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpPool {
    /// Connections; zero is no limit.
    pub max_connections: u32,
    /// Time to connect.
    pub connect_timeout: Option<IstioDuration>,
    /// Keep-alive.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Longest life of a connection.
    pub max_connection_duration: Option<IstioDuration>,
    /// Idle time of a connection.
    pub idle_timeout: Option<IstioDuration>,
}

/// `ConnectionPoolSettings.TCPSettings.TcpKeepalive`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpKeepalive {
    /// Probes before giving up; zero is the kernel's.
    pub probes: u32,
    /// Idle time before the first.
    pub time: Option<IstioDuration>,
    /// Time between.
    pub interval: Option<IstioDuration>,
}

/// `ConnectionPoolSettings.HTTPSettings`; zero is no limit.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpPool {
    /// Requests that wait for a connection.
    pub http1_max_pending_requests: u32,
    /// Active requests.
    pub http2_max_requests: u32,
    /// Requests of one connection.
    pub max_requests_per_connection: u32,
    /// Concurrent retries.
    pub max_retries: u32,
    /// Idle time of a connection.
    pub idle_timeout: Option<IstioDuration>,
    /// HTTP/1.1 becomes HTTP/2.
    pub h2_upgrade_policy: H2Upgrade,
    /// The client's version goes upstream.
    pub use_client_protocol: bool,
    /// Streams of one HTTP/2 connection.
    pub max_concurrent_streams: u32,
    /// Pings of HTTP/2 connections.
    pub http2_keep_alive: Option<Http2KeepAlive>,
}

/// `ConnectionPoolSettings.HTTPSettings.H2UpgradePolicy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum H2Upgrade {
    /// The mesh's.
    #[default]
    Default,
    /// No.
    DoNotUpgrade,
    /// Yes.
    Upgrade,
}

/// `ConnectionPoolSettings.HTTPSettings.ConnectionKeepalive`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Http2KeepAlive {
    /// Time between pings.
    pub interval: Option<IstioDuration>,
    /// How long a ping may stay unanswered.
    pub timeout: Option<IstioDuration>,
}

/// `OutlierDetection`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OutlierDetection {
    /// Deprecated and unread.
    pub consecutive_errors: Option<u32>,
    /// Local errors count apart.
    pub split_external_local_origin_errors: bool,
    /// Local errors in a row.
    pub consecutive_local_origin_failures: Option<u32>,
    /// 502, 503 and 504 in a row; zero is off.
    pub consecutive_gateway_errors: Option<u32>,
    /// 5xx in a row; zero is off.
    #[serde(rename = "consecutive5xxErrors")]
    pub consecutive_5xx_errors: Option<u32>,
    /// Time between sweeps.
    pub interval: Option<IstioDuration>,
    /// Ejection time times ejections.
    pub base_ejection_time: Option<IstioDuration>,
    /// Share of endpoints that may be ejected, percent; zero is the default.
    pub max_ejection_percent: u32,
    /// Share of healthy endpoints under which all are used, percent.
    pub min_health_percent: u32,
    /// Statuses that count instead of 5xx.
    pub outlier_detection_http_error_codes: Vec<u16>,
}

/// `ClientTLSSettings`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientTls {
    /// Mode.
    pub mode: TlsMode,
    /// File of the client certificate.
    pub client_certificate: String,
    /// File of the client key.
    pub private_key: String,
    /// File of the roots; empty is the system's.
    pub ca_certificates: String,
    /// Secret with all of them.
    pub credential_name: String,
    /// Names of which the server must have one.
    pub subject_alt_names: Vec<String>,
    /// SNI.
    pub sni: String,
    /// The server is not verified.
    pub insecure_skip_verify: Option<bool>,
    /// File of revoked certificates.
    pub ca_crl: String,
}

/// `ClientTLSSettings.TLSmode`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TlsMode {
    /// Plaintext.
    #[default]
    Disable,
    /// TLS.
    Simple,
    /// TLS with a client certificate.
    Mutual,
    /// TLS with the workload's certificate.
    IstioMutual,
}

/// `TrafficPolicy.TunnelSettings`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Tunnel {
    /// `CONNECT` or `POST`.
    pub protocol: String,
    /// Host that the proxy is asked to reach.
    pub target_host: String,
    /// Port that the proxy is asked to reach.
    pub target_port: u32,
}

/// `TrafficPolicy.ProxyProtocol`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyProtocol {
    /// Version.
    pub version: ProxyVersion,
}

/// `TrafficPolicy.ProxyProtocol.VERSION`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum ProxyVersion {
    /// Text.
    #[default]
    V1,
    /// Binary.
    V2,
}

/// `TrafficPolicy.RetryBudget`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryBudget {
    /// Share of active requests, percent (20).
    pub percent: Option<f64>,
    /// Retries that are always allowed; zero is 3.
    pub min_retry_concurrency: u32,
    /// Window over which requests count.
    pub budget_interval: Option<IstioDuration>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_has_its_place() {
        let rule: DestinationRule = serde_saphyr::from_str(
            "{host: web, workloadSelector: {matchLabels: {app: a}}, exportTo: ['.'], \
             trafficPolicy: {tls: {mode: ISTIO_MUTUAL}, proxyProtocol: {version: V2}, \
               connectionPool: {http: {http1MaxPendingRequests: 3, h2UpgradePolicy: UPGRADE, http2KeepAlive: {interval: 5s}}}, \
               loadBalancer: {simple: LEAST_CONN, localityLbSetting: {distribute: [{from: a/*, to: {b/*: 100}}]}}, \
               outlierDetection: {consecutive5xxErrors: 0, outlierDetectionHttpErrorCodes: [429]}, \
               portLevelSettings: [{port: {number: 80}, tls: {mode: SIMPLE, insecureSkipVerify: true}}]}, \
             subsets: [{name: v1, labels: {version: v1}, trafficPolicy: {retryBudget: {percent: 5}}}]}",
        )
        .expect("valid test YAML");
        let policy = rule.traffic_policy.expect("said");
        let http = policy.connection_pool.and_then(|p| p.http).expect("said");
        assert_eq!((http.http1_max_pending_requests, http.h2_upgrade_policy), (3, H2Upgrade::Upgrade));
        assert!(http.http2_keep_alive.is_some_and(|k| k.interval.is_some() && k.timeout.is_none()));
        let outlier = policy.outlier_detection.expect("said");
        assert_eq!((outlier.consecutive_5xx_errors, outlier.outlier_detection_http_error_codes), (Some(0), vec![429]));
        assert_eq!(policy.load_balancer.map(|l| l.simple), Some(SimpleLb::LeastConn));
        assert_eq!(policy.port_level_settings[0].tls.as_ref().map(|t| t.mode), Some(TlsMode::Simple));
        assert_eq!(policy.proxy_protocol.map(|p| p.version), Some(ProxyVersion::V2));
        assert_eq!(rule.subsets[0].traffic_policy.as_ref().and_then(|p| p.retry_budget?.percent), Some(5.0));
    }
}
