//! Clusters for the tests of this module.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use proxy_config::model::{
    Address, CircuitBreakers, Cluster, ClusterKind, Endpoint, Endpoints, HealthStatus, IstioClusterMetadata, LbPolicy,
    LocalityEndpoints, Transport, UpstreamHttp,
};

use super::ClusterLocal;
use crate::snapshot::ClusterShared;

pub(super) fn cluster(name: &str) -> Cluster {
    Cluster {
        name: name.into(),
        kind: ClusterKind::Static(Endpoints::default()),
        lb: LbPolicy::LeastRequest { slow_start: None, choice_count: None },
        connect_timeout: None,
        limits: CircuitBreakers::default(),
        outlier: None,
        healthy_panic_threshold: Some(0.0),
        locality_weighted: false,
        http: UpstreamHttp::default(),
        transport_matches: Vec::new(),
        transport: Transport::Raw,
        source_address: None,
        tcp_keepalive: None,
        upstream_port_override: None,
        istio: IstioClusterMetadata::default(),
        metadata_exchange: None,
        dns: None,
        close_on_host_failure: false,
        alt_stat_name: String::new(),
        tcp_idle_timeout: None,
        unsupported: Vec::new(),
    }
}

pub(super) fn endpoint(address: SocketAddr, weight: u32) -> Endpoint {
    Endpoint {
        address: Address::Socket(address),
        health: HealthStatus::Unknown,
        weight,
        transport_labels: Default::default(),
        workload: Default::default(),
        hostname: String::new(),
        metadata: Default::default(),
    }
}

pub(super) fn group(priority: u32, weight: Option<u32>, hosts: Vec<Endpoint>) -> LocalityEndpoints {
    LocalityEndpoints { priority, weight, endpoints: hosts, ..LocalityEndpoints::default() }
}

/// Hosts on these ports of 127.0.0.1.
pub(super) fn endpoints(ports: &[u16]) -> Endpoints {
    let hosts = ports.iter().map(|port| endpoint((Ipv4Addr::LOCALHOST, *port).into(), 1)).collect();
    Endpoints { localities: vec![group(0, None, hosts)], ..Endpoints::default() }
}

pub(super) fn shared(config: Cluster, hosts: &Endpoints) -> Arc<ClusterShared> {
    Arc::new(ClusterShared::alone(config, hosts, &Default::default()))
}

/// One worker's part of a cluster, as the successor of another.
pub(super) fn joined(shared: Arc<ClusterShared>, prev: Option<&ClusterLocal>) -> Arc<ClusterLocal> {
    let metrics = prev.map_or_else(Arc::default, |prev| Arc::clone(&prev.metrics));
    ClusterLocal::new(shared, metrics, prev)
}
