//! Clusters and load assignments of one proxy, put into its model.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use super::destination_rules::DestinationRules;
use super::peer_auth;
use super::view::View;
use crate::istio::common::IstioDuration;
use crate::istio::mesh_config::{MeshConfig, TcpKeepalive as MeshKeepalive};
use crate::istio::mesh_networks::MeshNetworks;
use crate::model::{
    CircuitBreakers, Cluster, ClusterKind, Endpoints, IstioClusterMetadata, LbPolicy, Model, Name, TcpKeepalive,
    Transport, UpstreamHttp, UpstreamProtocol,
};

/// Idle limit of connections to where the client wanted to go anyway.
const PASSTHROUGH_IDLE: Duration = Duration::from_secs(300);

/// What clusters are made from beside the view.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// DestinationRules that the proxy obeys.
    pub rules: &'a DestinationRules,
    /// Mesh configuration.
    pub mesh: &'a MeshConfig,
    /// PeerAuthentications of the whole mesh, oldest first: they say which servers speak mTLS.
    pub peer_policies: &'a [peer_auth::Policy<'a>],
    /// Gateways between networks.
    pub networks: &'a MeshNetworks,
}

/// Adds every cluster and every load assignment that a cluster asks for.
pub fn fill(view: &View<'_>, inputs: Inputs<'_>, model: &mut Model) {
    let fixed = [black_hole(inputs), passthrough(view, inputs), inbound_passthrough(view, inputs)];
    for cluster in fixed {
        model.clusters.insert(Name::clone(&cluster.name), Arc::new(cluster));
    }
}

/// A cluster that has nothing but a name, a kind and the mesh's connect limit.
pub(super) fn bare(inputs: Inputs<'_>, name: &str, kind: ClusterKind) -> Cluster {
    let lb = match kind {
        ClusterKind::OriginalDst | ClusterKind::DynamicForwardProxy => LbPolicy::ClusterProvided,
        _ => LbPolicy::RoundRobin { slow_start: None },
    };
    Cluster {
        name: Name::from(name),
        kind,
        lb,
        connect_timeout: Some(inputs.mesh.connect_timeout.map_or(Duration::from_secs(10), |IstioDuration(d)| d)),
        limits: CircuitBreakers::default(),
        outlier: None,
        healthy_panic_threshold: None,
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
        alt_stat_name: format!("{name};"),
        tcp_idle_timeout: None,
        unsupported: Vec::new(),
    }
}

/// Istio's limits: none, so that what the user says is the only limit.
pub(super) fn unlimited() -> CircuitBreakers {
    CircuitBreakers {
        max_connections: u32::MAX,
        max_pending_requests: u32::MAX,
        max_requests: u32::MAX,
        max_retries: u32::MAX,
        retry_budget: None,
    }
}

/// The protocol of the TCP metadata exchange towards the upstream.
pub(super) fn exchange() -> Option<String> {
    Some("istio-peer-exchange".to_owned())
}

/// Source address by which the proxy's own connections to the application escape capture.
pub(super) fn magic_source(view: &View<'_>) -> IpAddr {
    if !view.proxy.ips.is_empty() && view.proxy.ips.iter().all(IpAddr::is_ipv6) {
        return IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));
    }
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6))
}

/// The mesh's keep-alive in the model's seconds.
pub(super) fn mesh_keepalive(said: MeshKeepalive) -> TcpKeepalive {
    let seconds = |d: Option<IstioDuration>| d.map(|IstioDuration(d)| u32::try_from(d.as_secs()).unwrap_or(u32::MAX));
    TcpKeepalive {
        probes: Some(said.probes).filter(|p| *p > 0),
        time: seconds(said.time),
        interval: seconds(said.interval),
    }
}

/// Where refused traffic goes.
fn black_hole(inputs: Inputs<'_>) -> Cluster {
    bare(inputs, "BlackHoleCluster", ClusterKind::Static(Endpoints::default()))
}

/// Where unknown outbound traffic goes.
fn passthrough(view: &View<'_>, inputs: Inputs<'_>) -> Cluster {
    Cluster { metadata_exchange: exchange(), ..to_original(view, inputs, "PassthroughCluster") }
}

/// Where traffic to undeclared ports of the application goes.
fn inbound_passthrough(view: &View<'_>, inputs: Inputs<'_>) -> Cluster {
    Cluster {
        source_address: Some(magic_source(view)),
        alt_stat_name: "PassthroughCluster;".to_owned(),
        ..to_original(view, inputs, "InboundPassthroughCluster")
    }
}

fn to_original(view: &View<'_>, inputs: Inputs<'_>, name: &str) -> Cluster {
    Cluster {
        limits: unlimited(),
        tcp_keepalive: inputs.mesh.tcp_keepalive.map(mesh_keepalive),
        http: UpstreamHttp {
            protocol: UpstreamProtocol::Downstream,
            idle_timeout: Some(PASSTHROUGH_IDLE),
            preserve_header_case: view.mesh.headers.preserve_case,
            configured: true,
            ..UpstreamHttp::default()
        },
        ..bare(inputs, name, ClusterKind::OriginalDst)
    }
}
