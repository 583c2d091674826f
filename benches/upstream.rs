//! What choosing a host and taking a permit cost: the budget is 150 ns for both together.

use std::net::Ipv4Addr;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use istio_proxy::snapshot::ClusterShared;
use istio_proxy::tls::Secrets;
use istio_proxy::upstream::{ClusterLocal, xx_hash};
use proxy_config::model::{
    Address, CircuitBreakers, Cluster, ClusterKind, Endpoint, Endpoints, HealthStatus, IstioClusterMetadata, LbPolicy,
    LocalityEndpoints, Transport, UpstreamHttp,
};

fn config(lb: LbPolicy) -> Cluster {
    Cluster {
        name: "bench".into(),
        kind: ClusterKind::Static(Endpoints::default()),
        lb,
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

fn endpoint(port: u16, weight: u32) -> Endpoint {
    Endpoint {
        address: Address::Socket((Ipv4Addr::LOCALHOST, port).into()),
        health: HealthStatus::Unknown,
        weight,
        transport_labels: Default::default(),
        workload: Default::default(),
        hostname: String::new(),
        metadata: Default::default(),
    }
}

fn local(lb: LbPolicy, weight: impl Fn(u16) -> u32) -> Arc<ClusterLocal> {
    let hosts = (1..=20).map(|port| endpoint(port, weight(port))).collect();
    let group = LocalityEndpoints { endpoints: hosts, ..LocalityEndpoints::default() };
    let said = Endpoints { localities: vec![group], ..Endpoints::default() };
    let shared = ClusterShared::alone(config(lb), &said, &Secrets::new());
    ClusterLocal::new(Arc::new(shared), Arc::default(), None)
}

fn pick_and_permit(c: &mut Criterion) {
    let least = || LbPolicy::LeastRequest { slow_start: None, choice_count: None };
    let ring = LbPolicy::RingHash { minimum: None, maximum: None, use_hostname: false };
    let cases = [
        ("least request", local(least(), |_| 1)),
        ("least request, weighted", local(least(), |port| 1 + u32::from(port % 3))),
        ("round robin", local(LbPolicy::RoundRobin { slow_start: None }, |_| 1)),
        ("ring hash", local(ring, |_| 1)),
    ];
    let hash = Some(xx_hash(b"user"));
    for (name, cluster) in &cases {
        c.bench_function(&format!("pick and permit, {name}"), |b| {
            b.iter(|| {
                let taken = cluster.shared.breakers.requests.take();
                let host = cluster.choose(hash, None);
                cluster.shared.breakers.requests.give_back();
                (taken, host)
            });
        });
    }
}

criterion_group!(benches, pick_and_permit);
criterion_main!(benches);
