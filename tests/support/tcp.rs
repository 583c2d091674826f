//! Models by hand: a listener that hands connections to one cluster, a cluster with one host.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::net::SocketAddr;

use proxy_config::model::{
    Address, CircuitBreakers, Cluster, ClusterKind, Direction, DownstreamTls, Endpoint, Endpoints, FilterChain,
    HealthStatus, LbPolicy, Listener, LocalityEndpoints, NetworkFilter, TcpProxy, Transport, WeightedName,
};
use tokio::net::TcpListener;

/// A listener of this address, which is its name too.
pub fn listener(address: SocketAddr, direction: Direction, to: &str, tls: Option<DownstreamTls>) -> Listener {
    let tcp = TcpProxy {
        stat_prefix: to.to_owned(),
        clusters: vec![WeightedName { cluster: to.into(), weight: 1 }],
        idle_timeout: None,
        max_downstream_connection_duration: None,
        hash_source_ip: false,
        tunneling: None,
        access_log: Vec::new(),
    };
    Listener {
        name: address.to_string().into(),
        address: Address::Socket(address),
        additional_addresses: Vec::new(),
        direction,
        bind_to_port: true,
        use_original_dst: false,
        transparent: false,
        listener_filters: Vec::new(),
        listener_filters_timeout: None,
        continue_on_listener_filters_timeout: false,
        filter_chains: vec![FilterChain { tls, filters: vec![NetworkFilter::TcpProxy(tcp)], ..FilterChain::default() }],
        default_filter_chain: None,
        access_log: Vec::new(),
        exact_balance: false,
        max_accepts_per_event: None,
    }
}

/// A cluster with one host.
pub fn cluster(name: &str, host: SocketAddr, transport: Transport) -> Cluster {
    let host = Endpoint {
        address: Address::Socket(host),
        health: HealthStatus::default(),
        weight: 1,
        transport_labels: Default::default(),
        workload: Default::default(),
        hostname: String::new(),
        metadata: Default::default(),
    };
    let locality = LocalityEndpoints { endpoints: vec![host], ..LocalityEndpoints::default() };
    Cluster {
        name: name.into(),
        kind: ClusterKind::Static(Endpoints { localities: vec![locality], ..Endpoints::default() }),
        lb: LbPolicy::Random,
        connect_timeout: None,
        limits: CircuitBreakers::default(),
        outlier: None,
        healthy_panic_threshold: None,
        locality_weighted: false,
        http: Default::default(),
        transport_matches: Vec::new(),
        transport,
        source_address: None,
        tcp_keepalive: None,
        upstream_port_override: None,
        istio: Default::default(),
        metadata_exchange: None,
        dns: None,
        close_on_host_failure: false,
        alt_stat_name: String::new(),
        tcp_idle_timeout: None,
        unsupported: Vec::new(),
    }
}

/// An application that echoes; its address.
pub async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = tcp.split();
                tokio::io::copy(&mut reader, &mut writer).await
            });
        }
    });
    address
}

/// An address that nobody listens at now.
pub async fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.and_then(|l| l.local_addr()).expect("a port")
}
