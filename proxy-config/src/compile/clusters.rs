//! Clusters and load assignments of one proxy, put into its model.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use super::destination_rules::DestinationRules;
use super::view::View;
use super::{cluster_inbound, cluster_outbound, destination_rule_check, peer_auth};
use crate::istio::common::IstioDuration;
use crate::istio::mesh_config::{MeshConfig, TcpKeepalive as MeshKeepalive};
use crate::istio::mesh_networks::MeshNetworks;
use crate::model::{
    CircuitBreakers, Cluster, ClusterKind, Endpoints, IstioClusterMetadata, LbPolicy, MetadataExchange, Model, Name,
    TcpKeepalive, Transport, UpstreamHttp, UpstreamProtocol,
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

/// Adds every cluster and every load assignment that a cluster asks for, and tells what cannot be served as said.
pub fn fill(view: &View<'_>, inputs: Inputs<'_>, model: &mut Model) {
    for service in view.reachable() {
        cluster_outbound::add(view, inputs, service, model);
    }
    let fixed = [black_hole(inputs), passthrough(view, inputs), inbound_passthrough(view, inputs)];
    for cluster in cluster_inbound::clusters(view, inputs).into_iter().chain(fixed) {
        model.clusters.insert(Name::clone(&cluster.name), Arc::new(cluster));
    }
    model.rejects.extend(destination_rule_check::check(inputs.rules));
    model.rejects.extend(destination_rule_check::check_mesh(inputs));
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

/// The TCP metadata exchange of every chain and of clusters in the mesh.
pub(super) fn metadata_exchange() -> MetadataExchange {
    let protocol = "istio-peer-exchange".to_owned();
    MetadataExchange { protocol, enable_discovery: true, additional_labels: Vec::new() }
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
    Cluster { metadata_exchange: Some(metadata_exchange()), ..to_original(view, inputs, "PassthroughCluster") }
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

#[cfg(test)]
mod tests {
    use super::super::fixture::{Mesh, endpoint, port, service, web};
    use super::*;
    use crate::istio::peer_authentication::{Mode, MutualTls, PeerAuthentication};
    use crate::model::{Address, SanMatcher, Severity};
    use crate::registry::{Protocol, Provider, Resolution, Service, TargetPort};

    fn three() -> Mesh {
        let mut mesh = Mesh::new(vec![web()]);
        mesh.proxy.locality.region = "r1".to_owned();
        mesh.proxy.locality.zone = "z1".to_owned();
        mesh.proxy.cluster_id = "Kubernetes".to_owned();
        mesh.endpoints = vec![
            endpoint([10, 2, 0, 11], 8080, ("r1", "z1"), "web", "v1"),
            endpoint([10, 2, 0, 12], 8080, ("r1", "z2"), "web", "v2"),
            endpoint([10, 2, 0, 13], 8080, ("r2", "z3"), "", "v2"),
        ];
        mesh
    }

    fn external(host: &str, resolution: Resolution) -> Service {
        Service {
            hostname: host.to_owned(),
            provider: Provider::External,
            resolution,
            mesh_external: true,
            ..service("ex", None, vec![port("http", 80, Protocol::Http), port("tls", 443, Protocol::Tls)])
        }
    }

    fn web_cluster(model: &Model, port: u16, subset: &str) -> Cluster {
        let name = format!("outbound|{port}|{subset}|web.app.svc.cluster.local");
        Cluster::clone(model.clusters.get(name.as_str()).unwrap_or_else(|| panic!("{name}")))
    }

    fn shape(model: &Model, port: u16, subset: &str) -> Vec<(String, u32, Option<u32>, usize)> {
        let name = format!("outbound|{port}|{subset}|web.app.svc.cluster.local");
        let groups = &model.endpoints[name.as_str()].localities;
        groups.iter().map(|l| (l.locality.zone.clone(), l.priority, l.weight, l.endpoints.len())).collect()
    }

    fn zones(of: &[(&str, u32, Option<u32>, usize)]) -> Vec<(String, u32, Option<u32>, usize)> {
        of.iter().map(|(z, p, w, n)| ((*z).to_owned(), *p, *w, *n)).collect()
    }

    fn tls(transport: &Transport) -> &crate::model::UpstreamTls {
        match transport {
            Transport::Tls(tls) => tls,
            Transport::ProxyProtocol(_, inner) => tls(inner),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_said() {
        let model = three().clusters(&[], "{}");
        assert_eq!(model.clusters.len(), 7);
        let http = web_cluster(&model, 80, "");
        assert_eq!(http.lb, LbPolicy::LeastRequest { slow_start: None, choice_count: None });
        assert_eq!((http.limits, http.connect_timeout), (unlimited(), Some(Duration::from_secs(10))));
        assert_eq!((http.healthy_panic_threshold, http.http.configured), (Some(0.0), false));
        assert_eq!(http.alt_stat_name, "outbound|80||web.app.svc.cluster.local;");
        assert_eq!(http.istio.services, [("web.app.svc.cluster.local".into(), "web".into(), "app".into())]);
        let matches: Vec<&str> = http.transport_matches.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(matches, ["tlsMode-istio", "tlsMode-disabled"]);
        let mtls = tls(&http.transport_matches[0].transport);
        assert_eq!(mtls.sni, "outbound_.80_._.web.app.svc.cluster.local");
        assert_eq!(mtls.common.alpn, ["istio-peer-exchange", "istio"]);
        assert_eq!(mtls.common.validation.as_ref().map(|v| v.san.len()), Some(1));
        let grpc = web_cluster(&model, 9090, "");
        assert_eq!(grpc.http.protocol, UpstreamProtocol::Http2);
        assert_eq!(tls(&grpc.transport_matches[0].transport).common.alpn, ["istio-peer-exchange", "istio", "h2"]);
        assert_eq!(web_cluster(&model, 6000, "").http.protocol, UpstreamProtocol::Downstream);
        assert!(!web_cluster(&model, 7000, "").http.configured);
        assert_eq!(
            shape(&model, 80, ""),
            zones(&[("z1", 0, Some(1), 1), ("z2", 0, Some(1), 1), ("z3", 0, Some(1), 1)])
        );
        let assignment = &model.endpoints["outbound|80||web.app.svc.cluster.local"];
        let first = &assignment.localities[0].endpoints[0];
        assert_eq!((&*first.workload, first.transport_labels.len()), ("web-11;app;web;v1;Kubernetes", 1));
        assert!(assignment.localities[2].endpoints[0].transport_labels.is_empty(), "no sidecar");
    }

    #[test]
    fn fixed_clusters() {
        let model = three().clusters(&[], "{tcpKeepalive: {time: 90s}, connectTimeout: 3s}");
        let of = |name: &str| Cluster::clone(&model.clusters[name]);
        let black = of("BlackHoleCluster");
        assert_eq!((black.limits, black.tcp_keepalive), (CircuitBreakers::default(), None));
        let passthrough = of("PassthroughCluster");
        assert_eq!(passthrough.tcp_keepalive, Some(TcpKeepalive { time: Some(90), ..TcpKeepalive::default() }));
        assert_eq!(passthrough.http.idle_timeout, Some(Duration::from_secs(300)));
        let inbound = of("InboundPassthroughCluster");
        assert_eq!(inbound.source_address, Some(IpAddr::from([127, 0, 0, 6])));
        assert_eq!((inbound.alt_stat_name.as_str(), inbound.metadata_exchange), ("PassthroughCluster;", None));
    }

    const POOL: &str = "{host: web, trafficPolicy: {connectionPool: {tcp: {maxConnections: 7, connectTimeout: 250ms, \
        idleTimeout: 30s, maxConnectionDuration: 10m, tcpKeepalive: {probes: 5, interval: 15s}}, \
        http: {http1MaxPendingRequests: 3, http2MaxRequests: 11, maxRequestsPerConnection: 2, maxRetries: 4, \
        h2UpgradePolicy: UPGRADE, maxConcurrentStreams: 50}}, retryBudget: {percent: 7}}}";

    #[test]
    fn pools_hold_on_both_sides() {
        let mut mesh = three();
        mesh.serve();
        let model = mesh.clusters(&[("app", "p", POOL)], "{tcpKeepalive: {time: 90s}}");
        let out = web_cluster(&model, 80, "");
        let limits = out.limits;
        assert_eq!((limits.max_connections, limits.max_pending_requests), (7, 3));
        assert_eq!((limits.max_requests, limits.max_retries, limits.retry_budget), (11, 4, Some((7.0, 3))));
        assert_eq!(out.connect_timeout, Some(Duration::from_millis(250)));
        assert_eq!(out.tcp_keepalive, Some(TcpKeepalive { probes: Some(5), time: Some(90), interval: Some(15) }));
        assert_eq!((out.http.protocol, out.http.http2.max_concurrent_streams), (UpstreamProtocol::Http2, Some(50)));
        assert_eq!(out.http.idle_timeout, Some(Duration::from_secs(30)), "TCP's, where HTTP says none");
        assert_eq!(out.istio.config.as_deref(), Some("/apis/networking.istio.io/v1/namespaces/app/destination-rule/p"));
        assert_eq!(web_cluster(&model, 7000, "").http.protocol, UpstreamProtocol::Http2, "a rule may upgrade any port");
        assert_eq!(web_cluster(&model, 6000, "").http.protocol, UpstreamProtocol::Downstream, "sniffed stays sniffed");
        let inbound = &model.clusters["inbound|80||"];
        assert_eq!(inbound.limits, limits);
        assert_eq!((inbound.http.protocol, inbound.healthy_panic_threshold), (UpstreamProtocol::Http1, None));
        assert_eq!(inbound.http.http2.max_concurrent_streams, None);
        assert_eq!(model.clusters["inbound|9090||"].http.http2.max_concurrent_streams, Some(50));
        assert_eq!((inbound.kind.clone(), inbound.istio.config.is_some()), (ClusterKind::OriginalDst, true));
    }

    #[test]
    fn http_versions() {
        let http = |said: &str| format!("{{host: web, trafficPolicy: {{connectionPool: {{http: {said}}}}}}}");
        let upgrade = "{h2UpgradePolicy: UPGRADE}";
        for (rule, mesh, port, expected) in [
            ("{}", upgrade, 80, UpstreamProtocol::Http2),
            ("{}", upgrade, 7000, UpstreamProtocol::Http1),
            ("{h2UpgradePolicy: DO_NOT_UPGRADE}", upgrade, 80, UpstreamProtocol::Http1),
            ("{useClientProtocol: true, h2UpgradePolicy: UPGRADE}", "{}", 80, UpstreamProtocol::Downstream),
            ("{useClientProtocol: true}", "{}", 9090, UpstreamProtocol::Downstream),
            ("{h2UpgradePolicy: DO_NOT_UPGRADE}", "{}", 9090, UpstreamProtocol::Http2),
        ] {
            let model = three().clusters(&[("app", "p", &http(rule))], mesh);
            assert_eq!(web_cluster(&model, port, "").http.protocol, expected, "{rule} {mesh} {port}");
        }
        let mut mesh = three();
        mesh.settings.headers.preserve_case = true;
        let model = mesh.clusters(&[], upgrade);
        let kept = |port| web_cluster(&model, port, "").http;
        assert_eq!((kept(80).protocol, kept(80).preserve_header_case), (UpstreamProtocol::Http1, true));
        assert_eq!((kept(9090).protocol, kept(9090).preserve_header_case), (UpstreamProtocol::Http2, false));
        assert_eq!((kept(6000).protocol, kept(6000).preserve_header_case), (UpstreamProtocol::Downstream, true));
    }

    #[test]
    fn balancers() {
        let warm = Some(Duration::from_secs(30));
        let ring = |minimum| LbPolicy::RingHash { minimum, maximum: None, use_hostname: false };
        for (said, expected) in [
            ("{simple: RANDOM}", LbPolicy::Random),
            ("{simple: ROUND_ROBIN, warmup: {duration: 30s}}", LbPolicy::RoundRobin { slow_start: warm }),
            ("{warmupDurationSecs: 30s}", LbPolicy::LeastRequest { slow_start: warm, choice_count: None }),
            ("{consistentHash: {httpHeaderName: x}}", ring(Some(1024))),
            ("{consistentHash: {httpHeaderName: x, minimumRingSize: 8}}", ring(Some(8))),
            ("{consistentHash: {httpHeaderName: x, ringHash: {}}}", ring(None)),
            ("{consistentHash: {httpHeaderName: x, maglev: {tableSize: 7}}}", LbPolicy::Maglev { table_size: Some(7) }),
            ("{simple: PASSTHROUGH}", LbPolicy::ClusterProvided),
        ] {
            let rule = format!("{{host: web, trafficPolicy: {{loadBalancer: {said}}}}}");
            assert_eq!(web_cluster(&three().clusters(&[("app", "p", &rule)], "{}"), 80, "").lb, expected, "{said}");
        }
    }

    #[test]
    fn passthrough_is_mtls_only_where_everyone_is() {
        let rule = [("app", "p", "{host: web, trafficPolicy: {loadBalancer: {simple: PASSTHROUGH}}}")];
        let mut mesh = three();
        let one = web_cluster(&mesh.clusters(&rule, "{}"), 80, "");
        assert_eq!((one.kind.clone(), one.transport.clone()), (ClusterKind::OriginalDst, Transport::Raw));
        assert!(mesh.clusters(&rule, "{}").endpoints.is_empty());
        mesh.endpoints.pop();
        let one = web_cluster(&mesh.clusters(&rule, "{}"), 80, "");
        assert!(one.transport_matches.is_empty());
        tls(&one.transport);
    }

    #[test]
    fn outlier_detection() {
        let rule = |said: &str| format!("{{host: web, trafficPolicy: {{outlierDetection: {said}}}}}");
        let of = |said: &str| {
            let cluster = web_cluster(&three().clusters(&[("app", "p", &rule(said))], "{}"), 80, "");
            (cluster.outlier.clone().expect("on"), cluster)
        };
        let (none, cluster) = of("{}");
        assert_eq!((none.consecutive_5xx, none.enforcing_success_rate), (None, Some(0)));
        assert_eq!((cluster.healthy_panic_threshold, cluster.locality_weighted), (Some(0.0), false));
        let (off, _) = of("{consecutive5xxErrors: 0, consecutiveGatewayErrors: 3}");
        assert_eq!((off.consecutive_5xx, off.enforcing_consecutive_5xx), (Some(0), Some(0)));
        assert_eq!((off.consecutive_gateway_failure, off.enforcing_consecutive_gateway_failure), (Some(3), Some(100)));
        let (local, cluster) = of("{consecutiveLocalOriginFailures: 4, minHealthPercent: 30}");
        assert_eq!((local.consecutive_local_origin_failure, cluster.healthy_panic_threshold), (None, Some(30.0)));
        let (codes, cluster) = of("{splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 4, \
                                   outlierDetectionHttpErrorCodes: [429]}");
        assert_eq!((codes.consecutive_local_origin_failure, codes.error_statuses), (Some(4), vec![(429, 429)]));
        assert!(cluster.http.configured);
    }

    #[test]
    fn localities() {
        let rule = |lb: &str, outlier: &str| format!("{{host: web, trafficPolicy: {{loadBalancer: {lb}{outlier}}}}}");
        let out = ", outlierDetection: {}";
        let flat: &[(&str, u32, Option<u32>, usize)] =
            &[("z1", 0, Some(1), 1), ("z2", 0, Some(1), 1), ("z3", 0, Some(1), 1)];
        let near: &[(&str, u32, Option<u32>, usize)] =
            &[("z1", 0, Some(1), 1), ("z2", 1, Some(1), 1), ("z3", 2, Some(1), 1)];
        let labels: &[(&str, u32, Option<u32>, usize)] =
            &[("z1", 0, Some(1), 1), ("z2", 0, Some(1), 1), ("z3", 1, Some(1), 1)];
        let shares: &[(&str, u32, Option<u32>, usize)] =
            &[("z1", 0, Some(70), 1), ("z2", 0, Some(30), 1), ("z3", 0, Some(1), 0)];
        for (lb, outlier, mesh, expected, weighted) in [
            ("{}", "", "{}", flat, false),
            ("{}", out, "{}", near, false),
            ("{}", out, "{localityLbSetting: {enabled: false}}", flat, false),
            ("{localityLbSetting: {enabled: false}}", out, "{}", flat, false),
            ("{localityLbSetting: {failover: [{from: r1, to: r2}]}}", out, "{}", near, true),
            ("{localityLbSetting: {failover: [{from: r1, to: r2}]}}", "", "{}", flat, false),
            ("{localityLbSetting: {failoverPriority: [topology.kubernetes.io/region]}}", out, "{}", labels, true),
            (
                "{localityLbSetting: {failoverPriority: ['version=v2']}}",
                out,
                "{}",
                &[("z1", 1, Some(1), 1), ("z2", 0, Some(1), 1), ("z3", 0, Some(1), 1)],
                true,
            ),
            (
                "{localityLbSetting: {distribute: [{from: r1/*, to: {r1/z1: 70, 'r1/z2/*': 30}}]}}",
                "",
                "{}",
                shares,
                true,
            ),
            ("{localityLbSetting: {distribute: [{from: r9/*, to: {r1/z1: 70}}]}}", "", "{}", flat, true),
        ] {
            let mut mesh_objects = three();
            for endpoint in &mut mesh_objects.endpoints {
                endpoint.labels.insert("topology.kubernetes.io/region".to_owned(), endpoint.locality.region.clone());
            }
            let model = mesh_objects.clusters(&[("app", "p", &rule(lb, outlier))], mesh);
            assert_eq!(shape(&model, 80, ""), zones(expected), "{lb} {outlier} {mesh}");
            assert_eq!(web_cluster(&model, 80, "").locality_weighted, weighted, "{lb} {outlier} {mesh}");
        }
    }

    #[test]
    fn traffic_distribution_orders_localities_by_itself() {
        let mut mesh = three();
        let mut service = web();
        "PreferClose".clone_into(&mut service.traffic_distribution);
        mesh.services = vec![Arc::new(service)];
        for endpoint in &mut mesh.endpoints {
            let place = [("region", &endpoint.locality.region), ("zone", &endpoint.locality.zone)];
            endpoint.labels.extend(place.map(|(k, v)| (format!("topology.kubernetes.io/{k}"), v.clone())));
        }
        let model = mesh
            .clusters(&[("app", "p", "{host: web, trafficPolicy: {outlierDetection: {minHealthPercent: 9}}}")], "{}");
        assert_eq!(
            shape(&model, 80, ""),
            zones(&[("z1", 0, Some(1), 1), ("z2", 1, Some(1), 1), ("z3", 2, Some(1), 1)])
        );
        assert_eq!(web_cluster(&model, 80, "").healthy_panic_threshold, Some(0.0));
    }

    #[test]
    fn subsets() {
        let rule = "{host: web, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}, subsets: [{name: v2, labels: {version: v2}}, \
                    {name: none, labels: {version: v9}}, {name: off, labels: {}, trafficPolicy: {tls: {mode: DISABLE}}}]}";
        let model = three().clusters(&[("app", "p", rule)], "{}");
        assert_eq!(shape(&model, 80, "v2"), zones(&[("z2", 0, Some(1), 1), ("z3", 0, Some(1), 1)]));
        assert_eq!(shape(&model, 80, "none"), [], "there, and empty");
        assert_eq!(shape(&model, 80, "off").len(), 3);
        let v2 = web_cluster(&model, 80, "v2");
        assert_eq!(v2.istio.subset.as_deref(), Some("v2"));
        assert_eq!(tls(&v2.transport).sni, "outbound_.80_.v2_.web.app.svc.cluster.local");
        assert_eq!(web_cluster(&model, 80, "off").transport, Transport::Raw);
        let off = &model.endpoints["outbound|80|off|web.app.svc.cluster.local"];
        assert!(
            off.localities[0].endpoints[0].transport_labels.is_empty(),
            "a mode that is said goes for endpoints too"
        );
    }

    #[test]
    fn servers_without_mtls_are_known() {
        let disable = |selector: Option<&str>| PeerAuthentication {
            selector: selector
                .map(|v| serde_saphyr::from_str(&format!("{{matchLabels: {{version: {v}}}}}")).expect("YAML")),
            mtls: Some(MutualTls { mode: Mode::Disable }),
            ..PeerAuthentication::default()
        };
        let mut mesh = three();
        mesh.peer_policies = vec![("app".to_owned(), disable(Some("v1")))];
        let model = mesh.clusters(&[], "{}");
        let assignment = &model.endpoints["outbound|80||web.app.svc.cluster.local"];
        let labelled: Vec<bool> =
            assignment.localities.iter().map(|l| !l.endpoints[0].transport_labels.is_empty()).collect();
        assert_eq!(labelled, [false, true, false]);
        mesh.peer_policies = vec![("app".to_owned(), disable(None))];
        assert!(web_cluster(&mesh.clusters(&[], "{}"), 80, "").transport_matches.is_empty());
        assert!(web_cluster(&three().clusters(&[], "{enableAutoMtls: false}"), 80, "").transport_matches.is_empty());
    }

    #[test]
    fn other_names_of_the_trust_domain_are_accepted() {
        let model = three().clusters(&[], "{trustDomainAliases: [old.domain]}");
        let cluster = web_cluster(&model, 80, "");
        let san = tls(&cluster.transport_matches[0].transport).common.validation.clone().map(|v| v.san);
        let exact = |id: &str| SanMatcher {
            kind: crate::model::SanKind::Any,
            value: crate::model::StringMatcher::exact(format!("spiffe://{id}/ns/app/sa/web")),
        };
        assert_eq!(san, Some(vec![exact("cluster.local"), exact("old.domain")]));
    }

    #[test]
    fn tls_modes_of_the_world() {
        let mut mesh = Mesh::new(vec![Service {
            service_accounts: vec!["san.example.com".to_owned()],
            ..external("ex.example.com", Resolution::DnsLb)
        }]);
        mesh.endpoints = vec![endpoint([1, 1, 1, 1], 443, ("", ""), "", "")];
        mesh.endpoints[0].address = Address::Host("ex.example.com".to_owned(), 443);
        let of = |mesh: &Mesh, tls: &str, selector: &str| {
            let rule = format!("{{host: ex.example.com, trafficPolicy: {{tls: {tls}}}{selector}}}");
            let model = mesh.clusters(&[("app", "p", &rule)], "{tlsDefaults: {ecdhCurves: [P-256]}}");
            (Cluster::clone(&model.clusters["outbound|80||ex.example.com"]), model.rejects)
        };
        let (simple, _) = of(&mesh, "{mode: SIMPLE}", "");
        assert!(
            matches!(simple.kind, ClusterKind::StrictDns(_)) && simple.istio.external && simple.istio.no_alpn_override
        );
        assert!(simple.http.auto_sni && simple.http.auto_san_validation);
        let context = tls(&simple.transport);
        assert_eq!(context.common.validation.as_ref().and_then(|v| v.roots.as_deref()), Some("file-root:system"));
        assert_eq!(context.common.validation.as_ref().map(|v| v.san.len()), Some(1), "the entry's own names");
        assert_eq!((context.common.ecdh_curves.as_slice(), context.common.alpn.len()), (&["P-256".to_owned()][..], 0));
        let (mutual, _) =
            of(&mesh, "{mode: MUTUAL, clientCertificate: /c, privateKey: /k, caCertificates: /r, sni: s}", "");
        assert_eq!(&*tls(&mutual.transport).common.certificates[0], "file-cert:/c~/k");
        assert!(!mutual.http.auto_sni && !mutual.http.configured);
        let (bad, rejects) = of(&mesh, "{mode: MUTUAL}", "");
        assert!(matches!(bad.transport, Transport::Unsupported(_)), "never plaintext instead");
        assert!(rejects.iter().any(|r| r.severity == Severity::Error));
        let (ignored, rejects) = of(&mesh, "{mode: SIMPLE, credentialName: c}", "");
        assert_eq!((ignored.transport, rejects.len()), (Transport::Raw, 1));
        let selector = ", workloadSelector: {matchLabels: {app: client}}";
        let (secret, rejects) = of(&mesh, "{mode: MUTUAL, credentialName: c}", selector);
        assert_eq!(&*tls(&secret.transport).common.certificates[0], "kubernetes://c");
        assert_eq!(
            tls(&secret.transport).common.validation.as_ref().and_then(|v| v.roots.as_deref()),
            Some("kubernetes://c-cacert")
        );
        assert_eq!(rejects.len(), 0);
        let (skip, _) = of(&mesh, "{mode: SIMPLE, insecureSkipVerify: true}", "");
        assert_eq!(tls(&skip.transport).common.validation, Some(Default::default()));
        assert!(!skip.http.auto_san_validation);
        let (none, _) = of(&mesh, "{mode: DISABLE}", "");
        assert_eq!((none.transport, none.istio.no_alpn_override), (Transport::Raw, false));
    }

    #[test]
    fn proxy_protocol_is_in_front_of_every_socket() {
        let model =
            three().clusters(&[("app", "p", "{host: web, trafficPolicy: {proxyProtocol: {version: V2}}}")], "{}");
        let cluster = web_cluster(&model, 80, "");
        assert!(cluster.transport_matches.iter().all(|m| matches!(m.transport, Transport::ProxyProtocol(2, _))));
    }

    #[test]
    fn kinds_of_services() {
        let mut none = external("*.wild.example.com", Resolution::Passthrough);
        none.ports[0].target = TargetPort::Number(8080);
        let services = vec![
            external("rr.example.com", Resolution::DnsRoundRobinLb),
            none,
            external("*.dyn.example.com", Resolution::DynamicDns),
            Service { resolution: Resolution::Alias, ..service("alias", None, vec![port("http", 80, Protocol::Http)]) },
        ];
        let mut mesh = Mesh::new(services);
        let model = mesh.clusters(&[], "{}");
        assert!(
            !model.clusters.keys().any(|n| n.contains("alias") || n.contains("rr.example.com")),
            "nothing to resolve"
        );
        let wild = &model.clusters["outbound|80||*.wild.example.com"];
        assert_eq!((wild.kind.clone(), wild.upstream_port_override), (ClusterKind::OriginalDst, Some(8080)));
        assert_eq!((wild.transport.clone(), wild.istio.external), (Transport::Raw, true));
        let dynamic = &model.clusters["outbound|443||*.dyn.example.com"];
        assert_eq!((&dynamic.kind, dynamic.istio.services.len()), (&ClusterKind::DynamicForwardProxy, 0));
        mesh.endpoints = vec![endpoint([1, 1, 1, 1], 80, ("", ""), "", "")];
        mesh.endpoints[0].address = Address::Host("rr.example.com".to_owned(), 80);
        let model = mesh.clusters(&[], "{}");
        let rr = &model.clusters["outbound|80||rr.example.com"];
        let ClusterKind::LogicalDns(inline) = &rr.kind else { panic!("{:?}", rr.kind) };
        assert_eq!((inline.localities.len(), rr.dns.as_ref().map(|d| d.family.as_str())), (1, Some("V4_ONLY")));
        assert_eq!(rr.istio.services[0].1, "rr.example.com");
    }

    #[test]
    fn inbound() {
        let mut mesh = Mesh::new(vec![web(), service("twin", None, vec![port("http", 80, Protocol::Http)])]);
        mesh.serve();
        let model = mesh.clusters(&[], "{inboundClusterStatName: '%SERVICE%_%SERVICE_PORT%'}");
        let http = &model.clusters["inbound|80||"];
        let hosts: Vec<&str> = http.istio.services.iter().map(|s| s.1.as_str()).collect();
        assert_eq!(hosts, ["web", "twin"]);
        assert_eq!(http.source_address, Some(IpAddr::from([127, 0, 0, 6])));
        assert_eq!((http.alt_stat_name.as_str(), http.transport.clone()), ("web.app_80;", Transport::Raw));
        let model = mesh.clusters(&[], "{inboundTrafficPolicy: {mode: LOCALHOST}}");
        let http = &model.clusters["inbound|80||"];
        assert_eq!((http.source_address, &http.lb), (None, &LbPolicy::RoundRobin { slow_start: None }));
        let ClusterKind::Static(inline) = &http.kind else { panic!("{:?}", http.kind) };
        assert_eq!(inline.localities[0].endpoints[0].address, Address::Socket(([127, 0, 0, 1], 80).into()));
    }

    #[test]
    fn other_networks_are_reached_through_gateways() {
        let mut mesh = three();
        mesh.networks = serde_saphyr::from_str(
            "{networks: {far: {gateways: [{address: 192.0.2.77, port: 15443}, {address: 192.0.2.78, port: 15443}]}}}",
        )
        .expect("valid test YAML");
        for far in &mut mesh.endpoints[1..] {
            "far".clone_into(&mut far.network);
            far.weight = 3;
        }
        let model = mesh.clusters(&[], "{}");
        // The last one speaks no mTLS: nothing could tell its connections apart at the gateway.
        assert_eq!(shape(&model, 80, ""), zones(&[("z1", 0, Some(2), 1), ("z2", 0, Some(6), 2), ("z3", 0, None, 0)]));
        let gateway = &model.endpoints["outbound|80||web.app.svc.cluster.local"].localities[1].endpoints[0];
        assert_eq!(gateway.address, Address::Socket(([192, 0, 2, 77], 15443).into()));
        assert_eq!((&*gateway.workload, gateway.weight), (";;;;", 3));
        "far".clone_into(&mut mesh.proxy.network);
        mesh.endpoints[0].network = "near".to_owned();
        let model = mesh.clusters(&[], "{}");
        assert!(shape(&model, 80, "").iter().all(|(.., n)| *n == 1), "same network, or none known to have gateways");
    }

    #[test]
    fn endpoints_that_are_not_for_this_proxy() {
        let mut mesh = three();
        mesh.endpoints[1].health = crate::model::HealthStatus::Unhealthy;
        mesh.endpoints[2].health = crate::model::HealthStatus::Draining;
        assert_eq!(shape(&mesh.clusters(&[], "{}"), 80, "").len(), 2, "unhealthy ones are told of");
        let rule = "{host: web, trafficPolicy: {outlierDetection: {minHealthPercent: 10}}}";
        assert_eq!(shape(&mesh.clusters(&[("app", "p", rule)], "{}"), 80, "").len(), 1, "but not where panic is on");
        let mut local = web();
        local.node_local = true;
        mesh.services = vec![Arc::new(local)];
        "node11".clone_into(&mut mesh.proxy.node_name);
        assert_eq!(shape(&mesh.clusters(&[], "{}"), 80, "").len(), 1);
    }

    #[test]
    fn what_is_not_done_is_told() {
        for (spec, field) in [
            ("{loadBalancer: {zoneAwareLbSetting: {}}}", "spec.trafficPolicy.loadBalancer.zoneAwareLbSetting"),
            (
                "{loadBalancer: {warmup: {duration: 1s, aggression: 2}}}",
                "spec.trafficPolicy.loadBalancer.warmup.aggression",
            ),
            ("{retryBudget: {budgetInterval: 1s}}", "spec.trafficPolicy.retryBudget.budgetInterval"),
            (
                "{portLevelSettings: [{port: {number: 80}, tls: {mode: SIMPLE, caCrl: /x}}]}",
                "spec.trafficPolicy.portLevelSettings[0].tls",
            ),
        ] {
            let rule = format!("{{host: web, trafficPolicy: {spec}}}");
            let fields: Vec<String> =
                three().clusters(&[("app", "p", &rule)], "{}").rejects.into_iter().map(|r| r.field).collect();
            assert_eq!(fields, [field]);
        }
        assert_eq!(three().clusters(&[("app", "p", POOL)], "{}").rejects, []);
    }
}
