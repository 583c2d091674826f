//! What a traffic policy says about connections, requests, ejection and balancing, put into a cluster.

use std::time::Duration;

use super::clusters::{Inputs, mesh_keepalive, unlimited};
use super::locality;
use crate::istio::common::IstioDuration;
use crate::istio::destination_rule::{
    ConnectionPool, ConsistentHash, H2Upgrade, HttpPool, LoadBalancer, OutlierDetection as OutlierSettings,
    RetryBudget, SimpleLb, TcpKeepalive as KeepaliveSettings, TcpPool,
};
use crate::istio::mesh_config::H2UpgradePolicy;
use crate::model::{Cluster, ClusterKind, Http2Options, LbPolicy, OutlierDetection, TcpKeepalive, UpstreamProtocol};
use crate::registry::{Protocol, Service};

/// A cluster whose HTTP version may still change.
pub(super) struct Draft {
    pub(super) cluster: Cluster,
    /// The version that something asked for.
    version: Option<UpstreamProtocol>,
}

fn plain(d: Option<IstioDuration>) -> Option<Duration> {
    d.map(|IstioDuration(d)| d)
}

impl Draft {
    /// Starts with what the port's protocol asks for.
    pub(super) fn new(cluster: Cluster, protocol: Protocol, preserve_case: bool) -> Self {
        let mut out = Self { cluster, version: None };
        if protocol.is_http2() {
            out.http2();
            return out;
        }
        let auto = protocol == Protocol::Auto;
        if preserve_case && (auto || protocol.is_http()) {
            out.version = Some(UpstreamProtocol::Http1);
            out.cluster.http.preserve_header_case = true;
            out.cluster.http.configured = true;
        }
        if auto {
            out.downstream();
        }
        out
    }

    /// Asks for HTTP/2; what was asked for before stays.
    fn http2(&mut self) {
        self.cluster.http.configured = true;
        self.version.get_or_insert(UpstreamProtocol::Http2);
    }

    fn downstream(&mut self) {
        self.cluster.http.configured = true;
        self.cluster.http.http2 = Http2Options::default();
        self.version = Some(UpstreamProtocol::Downstream);
    }

    /// HTTP/2 and nothing else.
    pub(super) fn is_http2(&self) -> bool {
        self.version == Some(UpstreamProtocol::Http2)
    }

    /// The cluster with its HTTP version.
    pub(super) fn finish(self) -> Cluster {
        let mut cluster = self.cluster;
        cluster.http.protocol = self.version.unwrap_or_default();
        cluster
    }

    /// HTTP/1.1 becomes HTTP/2 where the rule or the mesh says so; a rule may say so of ports that are not HTTP.
    pub(super) fn upgrade(&mut self, inputs: Inputs<'_>, pool: Option<&ConnectionPool>, protocol: Protocol) {
        let http = pool.and_then(|p| p.http.as_ref());
        if http.is_some_and(|h| h.use_client_protocol) {
            return;
        }
        let wanted = match http.map(|h| h.h2_upgrade_policy).unwrap_or_default() {
            H2Upgrade::Upgrade => true,
            H2Upgrade::DoNotUpgrade => false,
            H2Upgrade::Default => protocol.is_http() && inputs.mesh.h2_upgrade_policy == H2UpgradePolicy::Upgrade,
        };
        if wanted {
            self.http2();
        }
    }

    /// Limits and timeouts; zero in a rule is the default.
    pub(super) fn pool(&mut self, inputs: Inputs<'_>, pool: Option<&ConnectionPool>, budget: Option<RetryBudget>) {
        let none = (TcpPool::default(), HttpPool::default());
        let tcp = pool.and_then(|p| p.tcp.as_ref()).unwrap_or(&none.0);
        let http = pool.and_then(|p| p.http.as_ref()).unwrap_or(&none.1);
        let limit = |said: u32| if said > 0 { said } else { u32::MAX };
        let limits = &mut self.cluster.limits;
        *limits = unlimited();
        limits.max_connections = limit(tcp.max_connections);
        limits.max_pending_requests = limit(http.http1_max_pending_requests);
        limits.max_requests = limit(http.http2_max_requests);
        limits.max_retries = limit(http.max_retries);
        limits.retry_budget = budget.map(|b| {
            let least = if b.min_retry_concurrency > 0 { b.min_retry_concurrency } else { 3 };
            (b.percent.unwrap_or(20.0), least)
        });
        if let Some(timeout) = plain(tcp.connect_timeout) {
            self.cluster.connect_timeout = Some(timeout);
        }
        self.cluster.tcp_keepalive = keepalive(inputs, tcp.tcp_keepalive);
        self.connections(tcp, http);
        if http.use_client_protocol {
            self.downstream();
        }
    }

    fn connections(&mut self, tcp: &TcpPool, http: &HttpPool) {
        let is_http2 = self.is_http2();
        let out = &mut self.cluster.http;
        let idle = plain(http.idle_timeout.or(tcp.idle_timeout));
        let life = plain(tcp.max_connection_duration);
        let (requests, streams) = (http.max_requests_per_connection, http.max_concurrent_streams);
        let ping = http.http2_keep_alive;
        if idle.is_none() && life.is_none() && requests == 0 && streams == 0 && ping.is_none() {
            return;
        }
        out.configured = true;
        out.idle_timeout = idle;
        out.max_connection_duration = life;
        out.max_requests_per_connection = Some(requests).filter(|r| *r > 0);
        if is_http2 {
            out.http2.max_concurrent_streams = Some(streams).filter(|s| *s > 0);
            out.http2.keepalive_interval = ping.and_then(|p| plain(p.interval));
            out.http2.keepalive_timeout = ping.and_then(|p| plain(p.timeout));
        }
    }

    /// Ejection of endpoints.
    pub(super) fn outlier(&mut self, said: Option<&OutlierSettings>, service: &Service) {
        let Some(said) = said else { return };
        let enforced = |n: Option<u32>| n.map(|n| if n > 0 { 100 } else { 0 });
        let local = said.consecutive_local_origin_failures.filter(|n| *n > 0);
        let local = local.filter(|_| said.split_external_local_origin_errors);
        self.cluster.outlier = Some(OutlierDetection {
            consecutive_5xx: said.consecutive_5xx_errors,
            enforcing_consecutive_5xx: enforced(said.consecutive_5xx_errors),
            consecutive_gateway_failure: said.consecutive_gateway_errors,
            enforcing_consecutive_gateway_failure: enforced(said.consecutive_gateway_errors),
            consecutive_local_origin_failure: local,
            enforcing_consecutive_local_origin_failure: local.map(|_| 100),
            interval: plain(said.interval),
            base_ejection_time: plain(said.base_ejection_time),
            max_ejection_time: None,
            max_ejection_percent: Some(said.max_ejection_percent).filter(|p| *p > 0),
            enforcing_success_rate: Some(0),
            split_external_local_origin_errors: said.split_external_local_origin_errors,
            error_statuses: said.outlier_detection_http_error_codes.iter().map(|code| (*code, *code)).collect(),
        });
        if !said.outlier_detection_http_error_codes.is_empty() {
            self.cluster.http.configured = true;
        }
        // Endpoints are sent whatever their health for such services: panic would send traffic to the unready ones.
        let percent = if locality::is_spread(service) { 0 } else { said.min_health_percent };
        self.cluster.healthy_panic_threshold = Some(f64::from(percent));
    }

    /// Balancer. `PASSTHROUGH` turns the cluster into one that goes where the client wanted to go.
    pub(super) fn balance(&mut self, inputs: Inputs<'_>, said: Option<&LoadBalancer>, service: &Service) {
        let cluster = &mut self.cluster;
        if cluster.kind == ClusterKind::DynamicForwardProxy {
            return;
        }
        cluster.healthy_panic_threshold.get_or_insert(0.0);
        let localities = locality::effective(inputs.mesh, said, service);
        cluster.locality_weighted = localities.is_some_and(|l| l.is_weighted(cluster.outlier.is_some()));
        let simple = said.map(|lb| lb.simple).unwrap_or_default();
        if simple == SimpleLb::Passthrough {
            cluster.kind = ClusterKind::OriginalDst;
        }
        if cluster.kind == ClusterKind::OriginalDst {
            cluster.lb = LbPolicy::ClusterProvided;
            return;
        }
        let slow_start = said.and_then(|lb| plain(lb.warmup.as_ref().map_or(lb.warmup_duration_secs, |w| w.duration)));
        cluster.lb = match (said.and_then(|lb| lb.consistent_hash.as_ref()), simple) {
            (Some(hash), _) => consistent(hash),
            (None, SimpleLb::Random) => LbPolicy::Random,
            (None, SimpleLb::RoundRobin) => LbPolicy::RoundRobin { slow_start },
            (None, _) => LbPolicy::LeastRequest { slow_start, choice_count: None },
        };
    }
}

fn consistent(hash: &ConsistentHash) -> LbPolicy {
    let some = |n: u64| Some(n).filter(|n| *n > 0);
    if let Some(maglev) = hash.maglev {
        return LbPolicy::Maglev { table_size: some(maglev.table_size) };
    }
    let minimum = match hash.ring_hash {
        Some(ring) => some(ring.minimum_ring_size),
        None => some(hash.minimum_ring_size).or(Some(1024)),
    };
    LbPolicy::RingHash { minimum, maximum: None, use_hostname: false }
}

/// The rule's keep-alive over the mesh's, field by field.
fn keepalive(inputs: Inputs<'_>, said: Option<KeepaliveSettings>) -> Option<TcpKeepalive> {
    let mesh = inputs.mesh.tcp_keepalive.map(mesh_keepalive);
    let Some(said) = said else { return mesh };
    let base = mesh.unwrap_or_default();
    let seconds = |d: Option<IstioDuration>| plain(d).map(|d| u32::try_from(d.as_secs()).unwrap_or(u32::MAX));
    Some(TcpKeepalive {
        probes: Some(said.probes).filter(|p| *p > 0).or(base.probes),
        time: seconds(said.time).or(base.time),
        interval: seconds(said.interval).or(base.interval),
    })
}
