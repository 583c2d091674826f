//! Every counter there is, in tables; handles; one shard for each worker.
//!
//! A handle is one block of cells on its own cache lines that only its worker writes. Readers add the shards up.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_utils::CachePadded;
use hashbrown::HashMap;
use tokio::time::Instant;

use super::custom_series::{CustomSeries, expose_custom};
use super::expose::{Sample, Value};
use super::histogram::{Histogram, Merged};
use super::labels::{Labels, NodeLabels};
use super::overrides::{Overrides, Values};
use super::recorder::Process;
use super::series::{self, Cache, MessageSeries, Moving, RequestSeries, Sizes, TcpReport, TcpSeries};
use crate::error::Flags;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    /// The number.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    fn read(&self) -> Reading<'_> {
        Reading::Counter(self.value())
    }
}

/// A number that goes up and down. Whoever raises it lowers it in a `Drop`.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }
    /// One less.
    pub fn dec(&self) {
        self.add(-1);
    }
    /// `n` more.
    pub fn add(&self, n: i64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    /// The number.
    pub fn value(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
    fn read(&self) -> Reading<'_> {
        Reading::Gauge(self.value())
    }
}

impl Histogram {
    fn read(&self) -> Reading<'_> {
        Reading::Histogram(self)
    }
}

/// A cell's content.
enum Reading<'a> {
    Counter(u64),
    Gauge(i64),
    Histogram(&'a Histogram),
}

/// A row of a table: Envoy's name and where the number is.
struct Cell<T: 'static> {
    name: &'static str,
    read: Read<T>,
}

type Read<T> = fn(&T) -> Reading<'_>;

macro_rules! cell_type {
    (counter) => {
        Counter
    };
    (gauge) => {
        Gauge
    };
    (histogram) => {
        Histogram
    };
}

macro_rules! cells {
    ($(#[$doc:meta])* $name:ident { $($kind:ident $field:ident: $stat:literal, $help:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub struct $name {
            $(#[doc = $help] pub $field: cell_type!($kind),)*
        }

        impl $name {
            const TABLE: &'static [Cell<Self>] = &[$(Cell { name: $stat, read: |cells| cells.$field.read() },)*];
        }
    };
}

cells! {
    /// `cluster.NAME.*` on one worker.
    ClusterMetrics {
        counter cx_total: "upstream_cx_total", "Connections opened or tried.";
        gauge cx_active: "upstream_cx_active", "Open connections.";
        counter cx_http1_total: "upstream_cx_http1_total", "HTTP/1 connections.";
        counter cx_http2_total: "upstream_cx_http2_total", "HTTP/2 connections.";
        counter cx_connect_fail: "upstream_cx_connect_fail", "Connections that failed before they served.";
        counter cx_connect_timeout: "upstream_cx_connect_timeout", "Of these, those that took too long.";
        counter cx_overflow: "upstream_cx_overflow", "Connections that the circuit breaker refused.";
        counter cx_destroy: "upstream_cx_destroy", "Connections closed.";
        counter cx_destroy_local: "upstream_cx_destroy_local", "Connections closed by us.";
        counter cx_destroy_remote: "upstream_cx_destroy_remote", "Connections closed by the upstream.";
        counter cx_destroy_with_active_rq: "upstream_cx_destroy_with_active_rq", "Closed with requests on them.";
        counter cx_idle_timeout: "upstream_cx_idle_timeout", "Closed because idle.";
        counter cx_max_requests: "upstream_cx_max_requests", "Closed after their last request.";
        counter cx_max_duration: "upstream_cx_max_duration_reached", "Closed because of age.";
        counter cx_protocol_error: "upstream_cx_protocol_error", "Connections with broken HTTP.";
        counter cx_none_healthy: "upstream_cx_none_healthy", "Attempts without a healthy host.";
        counter cx_rx_bytes: "upstream_cx_rx_bytes_total", "Bytes received.";
        counter cx_tx_bytes: "upstream_cx_tx_bytes_total", "Bytes sent.";
        histogram cx_connect_ms: "upstream_cx_connect_ms", "Time to connect, ms.";
        counter rq_total: "upstream_rq_total", "Requests sent, retries included.";
        gauge rq_active: "upstream_rq_active", "Active requests.";
        counter rq_pending_total: "upstream_rq_pending_total", "Requests that waited for a connection.";
        gauge rq_pending_active: "upstream_rq_pending_active", "Requests that wait now.";
        counter rq_pending_overflow: "upstream_rq_pending_overflow", "Requests that the circuit breaker refused.";
        counter rq_pending_failure_eject: "upstream_rq_pending_failure_eject", "Failed with their connection.";
        counter rq_cancelled: "upstream_rq_cancelled", "Cancelled before a connection was there.";
        counter rq_timeout: "upstream_rq_timeout", "Requests that met their timeout.";
        counter rq_per_try_timeout: "upstream_rq_per_try_timeout", "Tries that met theirs.";
        counter rq_max_duration: "upstream_rq_max_duration_reached", "Streams that met their longest life.";
        counter rq_rx_reset: "upstream_rq_rx_reset", "Streams reset by the upstream.";
        counter rq_tx_reset: "upstream_rq_tx_reset", "Streams reset by us.";
        counter rq_retry: "upstream_rq_retry", "Retries.";
        counter rq_retry_success: "upstream_rq_retry_success", "Retries that succeeded.";
        counter rq_retry_overflow: "upstream_rq_retry_overflow", "Retries that the circuit breaker refused.";
        counter rq_retry_limit_exceeded: "upstream_rq_retry_limit_exceeded", "Requests that used up their retries.";
        counter rq_completed: "upstream_rq_completed", "Responses.";
        counter rq_1xx: "upstream_rq_1xx", "1xx.";
        counter rq_2xx: "upstream_rq_2xx", "2xx.";
        counter rq_3xx: "upstream_rq_3xx", "3xx.";
        counter rq_4xx: "upstream_rq_4xx", "4xx.";
        counter rq_5xx: "upstream_rq_5xx", "5xx.";
        histogram rq_time: "upstream_rq_time", "Time of a request, ms.";
        counter lb_healthy_panic: "lb_healthy_panic", "Choices made among all hosts, healthy or not.";
        counter ejections_enforced: "outlier_detection.ejections_enforced_total", "Ejections.";
        counter ejections_consecutive_5xx:
            "outlier_detection.ejections_enforced_consecutive_5xx", "Because of 5xx.";
        counter ejections_consecutive_gateway_failure:
            "outlier_detection.ejections_enforced_consecutive_gateway_failure", "Because of gateway failures.";
        counter ejections_consecutive_local_origin:
            "outlier_detection.ejections_enforced_consecutive_local_origin_failure", "Because of connect failures.";
        counter ejections_overflow: "outlier_detection.ejections_overflow", "Not done: too many are out.";
        counter ssl_handshake: "ssl.handshake", "TLS handshakes done.";
        counter ssl_connection_error: "ssl.connection_error", "TLS handshakes failed.";
        counter ssl_fail_verify_san: "ssl.fail_verify_san", "Of these, because of the peer's name.";
    }
}

cells! {
    /// `listener.NAME.*` on one worker.
    ListenerMetrics {
        counter cx_total: "downstream_cx_total", "Connections accepted.";
        gauge cx_active: "downstream_cx_active", "Open connections.";
        counter cx_destroy: "downstream_cx_destroy", "Connections closed.";
        counter cx_overflow: "downstream_cx_overflow", "Connections refused by a limit.";
        counter global_cx_overflow: "downstream_global_cx_overflow", "Connections refused by the limit of all.";
        counter cx_overload_reject: "downstream_cx_overload_reject", "Connections refused under overload.";
        counter no_filter_chain_match: "no_filter_chain_match", "Connections without a chain.";
        counter pre_cx_timeout: "downstream_pre_cx_timeout", "Inspections that took too long.";
        counter handed_off: "downstream_cx_handed_off", "Connections given to another worker.";
        counter ssl_handshake: "ssl.handshake", "TLS handshakes done.";
        counter ssl_connection_error: "ssl.connection_error", "TLS handshakes failed.";
        counter ssl_handshake_timeout: "ssl.handshake_timeout", "TLS handshakes that took too long.";
        counter ssl_no_certificate: "ssl.no_certificate", "Handshakes without a client certificate.";
        counter ssl_fail_verify_error: "ssl.fail_verify_error", "Client certificates that do not verify.";
        counter ssl_fail_verify_san: "ssl.fail_verify_san", "Client certificates with another name.";
    }
}

cells! {
    /// `http.PREFIX.*` on one worker.
    HttpMetrics {
        counter cx_total: "downstream_cx_total", "Connections.";
        gauge cx_active: "downstream_cx_active", "Open connections.";
        counter cx_http1_total: "downstream_cx_http1_total", "HTTP/1 connections.";
        counter cx_http2_total: "downstream_cx_http2_total", "HTTP/2 connections.";
        counter cx_ssl_total: "downstream_cx_ssl_total", "TLS connections.";
        counter cx_protocol_error: "downstream_cx_protocol_error", "Connections with broken HTTP.";
        counter cx_idle_timeout: "downstream_cx_idle_timeout", "Closed because idle.";
        counter cx_max_duration: "downstream_cx_max_duration_reached", "Closed because of age.";
        counter cx_drain_close: "downstream_cx_drain_close", "Closed while leaving.";
        counter cx_policy_close: "downstream_cx_policy_close", "Closed because a new policy would not admit them.";
        counter rq_total: "downstream_rq_total", "Requests.";
        gauge rq_active: "downstream_rq_active", "Active requests.";
        counter rq_http1_total: "downstream_rq_http1_total", "HTTP/1 requests.";
        counter rq_http2_total: "downstream_rq_http2_total", "HTTP/2 requests.";
        counter rq_completed: "downstream_rq_completed", "Responses.";
        counter rq_1xx: "downstream_rq_1xx", "1xx.";
        counter rq_2xx: "downstream_rq_2xx", "2xx.";
        counter rq_3xx: "downstream_rq_3xx", "3xx.";
        counter rq_4xx: "downstream_rq_4xx", "4xx.";
        counter rq_5xx: "downstream_rq_5xx", "5xx.";
        counter rq_rx_reset: "downstream_rq_rx_reset", "Requests reset by the client.";
        counter rq_tx_reset: "downstream_rq_tx_reset", "Requests reset by us.";
        counter rq_policy_close: "downstream_rq_policy_close", "Streams ended because a new policy would not admit them.";
        counter rq_timeout: "downstream_rq_timeout", "Requests that did not arrive in time.";
        counter rq_idle_timeout: "downstream_rq_idle_timeout", "Streams that were idle for too long.";
        counter rq_too_large: "downstream_rq_too_large", "Requests with too large headers or body.";
        histogram rq_time: "downstream_rq_time", "Time of a request, ms.";
        counter no_route: "no_route", "Requests without a route.";
        counter no_cluster: "no_cluster", "Requests to a cluster that is not there.";
        counter rbac_allowed: "rbac.allowed", "Requests that policy allowed.";
        counter rbac_denied: "rbac.denied", "Requests that policy refused.";
        counter rbac_shadow_denied: "rbac.shadow_denied", "Requests that a dry-run policy would refuse.";
        counter jwt_denied: "jwt_authn.denied", "Requests with a bad or missing token.";
        counter fault_aborts: "fault.aborts_injected", "Aborts injected.";
        counter fault_delays: "fault.delays_injected", "Delays injected.";
        counter unsupported: "unsupported_config", "Requests answered 501: their route asks for what is not done.";
    }
}

cells! {
    /// `tcp.PREFIX.*` on one worker.
    TcpMetrics {
        counter cx_total: "downstream_cx_total", "Connections.";
        gauge cx_active: "downstream_cx_active", "Open connections.";
        counter cx_no_route: "downstream_cx_no_route", "Connections without a cluster.";
        counter cx_rx_bytes: "downstream_cx_rx_bytes_total", "Bytes received.";
        counter cx_tx_bytes: "downstream_cx_tx_bytes_total", "Bytes sent.";
        counter idle_timeout: "idle_timeout", "Closed because idle.";
        counter max_duration: "max_downstream_connection_duration", "Closed because of age.";
        counter cx_policy_close: "downstream_cx_policy_close", "Closed because a new policy would not admit them.";
        counter rbac_allowed: "rbac.allowed", "Connections that policy allowed.";
        counter rbac_denied: "rbac.denied", "Connections that policy refused.";
    }
}

cells! {
    /// `metadata_exchange.*` on one worker: peer metadata on TCP.
    ExchangeMetrics {
        counter found: "alpn_protocol_found", "Connections on which it was agreed.";
        counter not_found: "alpn_protocol_not_found", "Connections on which it was not.";
        counter added: "metadata_added", "Connections on which ours was sent.";
        counter no_header: "initial_header_not_found", "Peers that agreed and did not begin with a frame.";
        counter garbage: "header_not_found", "Frames that were not understood.";
    }
}

macro_rules! by_status {
    ($name:ident) => {
        impl $name {
            /// Counts a response by the class of its status; 0 (no response was sent) counts nothing.
            pub fn count_status(&self, status: u16) {
                let class = match status / 100 {
                    1 => &self.rq_1xx,
                    2 => &self.rq_2xx,
                    3 => &self.rq_3xx,
                    4 => &self.rq_4xx,
                    5.. => &self.rq_5xx,
                    0 => return,
                };
                class.inc();
                self.rq_completed.inc();
            }
        }
    };
}
by_status!(ClusterMetrics);
by_status!(HttpMetrics);

type Blocks<T> = Mutex<HashMap<Arc<str>, Arc<CachePadded<T>>, foldhash::fast::RandomState>>;

/// The counters of one worker. Asking for a handle takes a lock that nobody else wants unless stats are being read;
/// counting takes none.
#[derive(Debug)]
pub struct Shard {
    node: Arc<NodeLabels>,
    clusters: Blocks<ClusterMetrics>,
    listeners: Blocks<ListenerMetrics>,
    http: Blocks<HttpMetrics>,
    tcp: Blocks<TcpMetrics>,
    requests: Cache<RequestSeries>,
    messages: Cache<MessageSeries>,
    connections: Cache<TcpSeries>,
    custom: CustomSeries,
    /// Peer metadata on TCP.
    pub exchange: CachePadded<ExchangeMetrics>,
}

/// A lock whose holders never panic half way through a change.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn block<T: Default>(blocks: &Blocks<T>, name: &str) -> Arc<CachePadded<T>> {
    let mut blocks = lock(blocks);
    if let Some(found) = blocks.get(name) {
        return Arc::clone(found);
    }
    let new = Arc::new(CachePadded::<T>::default());
    blocks.insert(name.into(), Arc::clone(&new));
    new
}

impl Shard {
    fn new(node: Arc<NodeLabels>) -> Self {
        Self {
            node,
            clusters: Blocks::default(),
            listeners: Blocks::default(),
            http: Blocks::default(),
            tcp: Blocks::default(),
            requests: Cache::default(),
            messages: Cache::default(),
            connections: Cache::default(),
            custom: CustomSeries::default(),
            exchange: CachePadded::default(),
        }
    }

    /// The counters of a cluster; keep the handle with the cluster.
    pub fn cluster(&self, name: &str) -> Arc<CachePadded<ClusterMetrics>> {
        block(&self.clusters, name)
    }

    /// The counters of a listener.
    pub fn listener(&self, name: &str) -> Arc<CachePadded<ListenerMetrics>> {
        block(&self.listeners, name)
    }

    /// The counters of a connection manager, by its statistics prefix.
    pub fn http(&self, prefix: &str) -> Arc<CachePadded<HttpMetrics>> {
        block(&self.http, prefix)
    }

    /// The counters of a TCP proxy, by its statistics prefix.
    pub fn tcp(&self, prefix: &str) -> Arc<CachePadded<TcpMetrics>> {
        block(&self.tcp, prefix)
    }

    /// Counts a finished request under Istio's labels.
    pub fn record_request(&self, labels: &Labels<'_>, sizes: Sizes) {
        self.requests.with(labels, &self.node, |series| series.record(sizes));
        if let Some((overrides, values)) = labels.changed {
            self.custom.record(overrides, values);
        }
    }

    /// Counts messages of a gRPC stream: those of its request, those of its response.
    pub fn record_messages(&self, labels: &Labels<'_>, (request, response): (u64, u64)) {
        let early = Labels { code: 0, grpc_status: None, flags: Flags::NONE, ..*labels };
        self.messages.with(&early, &self.node, |series| {
            series.request.add(request);
            series.response.add(response);
        });
    }

    /// Counts an opened TCP connection, whose bytes are asked of it; dropping the report counts it closed.
    pub fn open_tcp(&self, labels: &Labels<'_>, connection: Arc<dyn Moving>) -> TcpReport {
        TcpReport::open(self.connections.handle(labels, &self.node), connection)
    }

    /// Counts what a configuration defines itself, at the end of a request or connection.
    pub fn record_custom(&self, overrides: &Overrides, values: &Values) {
        self.custom.record(overrides, values);
    }

    /// Who we are in labels.
    pub fn node(&self) -> &NodeLabels {
        &self.node
    }
}

/// All shards and what belongs to the process.
#[derive(Debug)]
pub struct Telemetry {
    node: Arc<NodeLabels>,
    shards: Mutex<Vec<Arc<Shard>>>,
    /// What the process counts as a whole.
    pub process: Process,
}

impl Telemetry {
    /// Nothing counted yet. `node` says who we are in labels.
    pub fn new(node: NodeLabels) -> Arc<Self> {
        Arc::new(Self { node: Arc::new(node), shards: Mutex::default(), process: Process::new() })
    }

    /// Who we are in labels.
    pub fn node(&self) -> &NodeLabels {
        &self.node
    }

    /// A shard for one more worker.
    pub fn shard(&self) -> Arc<Shard> {
        let shard = Arc::new(Shard::new(Arc::clone(&self.node)));
        lock(&self.shards).push(Arc::clone(&shard));
        shard
    }

    /// Forgets the counters of clusters that are gone and that nobody holds any more.
    pub fn retain_clusters(&self, mut wanted: impl FnMut(&str) -> bool) {
        for shard in lock(&self.shards).iter() {
            lock(&shard.clusters).retain(|name, cells| Arc::strong_count(cells) > 1 || wanted(name));
        }
    }

    /// Everything under Envoy's names, added up over the workers.
    pub fn samples(&self) -> Vec<Sample> {
        let shards = lock(&self.shards).clone();
        let mut out = Vec::new();
        gather("cluster", ClusterMetrics::TABLE, shards.iter().map(|s| &s.clusters), &mut out);
        gather("listener", ListenerMetrics::TABLE, shards.iter().map(|s| &s.listeners), &mut out);
        gather("http", HttpMetrics::TABLE, shards.iter().map(|s| &s.http), &mut out);
        gather("tcp", TcpMetrics::TABLE, shards.iter().map(|s| &s.tcp), &mut out);
        for cell in ExchangeMetrics::TABLE {
            let value = sum(shards.iter().map(|shard| (cell.read)(&shard.exchange)));
            out.push(Sample { scope: "metadata_exchange", instance: "".into(), name: cell.name.into(), value });
        }
        out
    }

    /// Istio's own families, as Prometheus text.
    pub fn istio_families(&self, out: &mut String) {
        let shards = lock(&self.shards).clone();
        series::expose_requests(shards.iter().map(|s| &s.requests), out);
        series::expose_messages(shards.iter().map(|s| &s.messages), out);
        series::expose_tcp(shards.iter().map(|s| &s.connections), out);
        expose_custom(shards.iter().map(|s| &s.custom), out);
    }

    /// Forgets Istio's series that were not used for so long; looks only, so call it more often than that.
    pub fn forget(&self, limit: Duration, now: Instant) {
        for shard in lock(&self.shards).iter() {
            shard.requests.forget(limit, now);
            shard.messages.forget(limit, now);
            shard.connections.forget(limit, now);
        }
    }
}

/// Adds the shards' blocks up by name and reads them by the table.
fn gather<'a, T: 'static>(
    scope: &'static str,
    table: &[Cell<T>],
    shards: impl Iterator<Item = &'a Blocks<T>>,
    out: &mut Vec<Sample>,
) {
    let mut by_name: std::collections::BTreeMap<Arc<str>, Vec<Arc<CachePadded<T>>>> = std::collections::BTreeMap::new();
    for blocks in shards {
        for (name, cells) in lock(blocks).iter() {
            by_name.entry(Arc::clone(name)).or_default().push(Arc::clone(cells));
        }
    }
    for cell in table {
        for (instance, blocks) in &by_name {
            let value = sum(blocks.iter().map(|cells| (cell.read)(cells)));
            out.push(Sample { scope, instance: Arc::clone(instance), name: cell.name.into(), value });
        }
    }
}

fn sum<'a>(readings: impl Iterator<Item = Reading<'a>>) -> Value {
    let mut histogram: Option<Box<Merged>> = None;
    let mut gauge = None;
    let mut counter = 0;
    for reading in readings {
        match reading {
            Reading::Counter(n) => counter += n,
            Reading::Gauge(n) => *gauge.get_or_insert(0) += n,
            Reading::Histogram(one) => histogram.get_or_insert_default().add(one),
        }
    }
    match (histogram, gauge) {
        (Some(merged), _) => Value::Histogram(merged),
        (None, Some(n)) => Value::Gauge(n),
        (None, None) => Value::Counter(counter),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(samples: &[Sample], instance: &str, name: &str) -> Value {
        samples.iter().find(|s| &*s.instance == instance && s.name == name).expect("sample").value.clone()
    }

    #[test]
    fn workers_are_added_up() {
        let telemetry = Telemetry::new(NodeLabels::default());
        let (one, two) = (telemetry.shard(), telemetry.shard());
        one.cluster("a").rq_total.inc();
        two.cluster("a").rq_total.add(2);
        two.cluster("b").cx_active.inc();
        one.cluster("a").cx_active.dec();
        two.cluster("a").rq_time.record(7);
        two.cluster("a").count_status(503);
        two.cluster("a").count_status(0);
        let samples = telemetry.samples();
        assert_eq!(value(&samples, "a", "upstream_rq_total"), Value::Counter(3));
        assert_eq!(value(&samples, "a", "upstream_cx_active"), Value::Gauge(-1));
        assert_eq!(value(&samples, "b", "upstream_cx_active"), Value::Gauge(1));
        assert_eq!(value(&samples, "a", "upstream_rq_5xx"), Value::Counter(1));
        assert_eq!(value(&samples, "a", "upstream_rq_completed"), Value::Counter(1));
        let Value::Histogram(time) = value(&samples, "a", "upstream_rq_time") else { panic!("a histogram") };
        assert_eq!((time.count(), time.sum), (1, 7));
    }

    #[test]
    fn a_handle_is_found_again_and_forgotten_only_when_unused() {
        let telemetry = Telemetry::new(NodeLabels::default());
        let shard = telemetry.shard();
        let held = shard.cluster("held");
        held.rq_total.inc();
        assert_eq!(shard.cluster("held").rq_total.value(), 1);
        shard.cluster("gone").rq_total.inc();
        telemetry.retain_clusters(|_| false);
        assert_eq!((shard.cluster("held").rq_total.value(), shard.cluster("gone").rq_total.value()), (1, 0));
    }
}
