//! From models to snapshots: what is filled in, what stays the same object, what is refused and what follows.
#![cfg(test)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proxy_config::model::{
    Address, ChainMatch, CircuitBreakers, Cluster, ClusterKind, CommonTls, Direction, DownstreamTls, Endpoint,
    Endpoints, FilterChain, Forward, HealthStatus, HttpConnectionManager, IstioClusterMetadata, LbPolicy,
    LocalityEndpoints, NetworkFilter, PathMatch, Permission, Principal, RbacPolicy, RbacRules, RouteAction, RouteMatch,
    RouteSource, StringMatcher, TcpProxy, TransportMatch, UpstreamHttp, UpstreamTls, Validation, WeightedName,
};
use proxy_config::{Model, Severity, model};
use time::OffsetDateTime;

use super::*;
use crate::ca::Root;
use crate::tls::{Identity, Roots};

const A: &str = "outbound|80||a";

fn cluster(name: &str) -> Cluster {
    Cluster {
        name: name.into(),
        kind: ClusterKind::Eds(name.into()),
        lb: LbPolicy::RoundRobin { slow_start: None },
        connect_timeout: None,
        limits: CircuitBreakers::default(),
        outlier: None,
        healthy_panic_threshold: None,
        locality_weighted: false,
        http: UpstreamHttp::default(),
        transport_matches: Vec::new(),
        transport: model::Transport::Raw,
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

fn endpoint(address: &str, labels: &[(&str, &str)]) -> Endpoint {
    Endpoint {
        address: Address::Socket(address.parse().unwrap()),
        health: HealthStatus::Healthy,
        weight: 1,
        transport_labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        workload: Default::default(),
        hostname: String::new(),
        metadata: Default::default(),
    }
}

fn endpoints(of: Vec<Endpoint>) -> Arc<Endpoints> {
    let group = LocalityEndpoints { endpoints: of, ..LocalityEndpoints::default() };
    Arc::new(Endpoints { name: A.into(), localities: vec![group], overprovisioning_factor: None })
}

fn tcp(to: &str) -> NetworkFilter {
    NetworkFilter::TcpProxy(TcpProxy {
        stat_prefix: String::new(),
        clusters: vec![WeightedName { cluster: to.into(), weight: 1 }],
        idle_timeout: None,
        max_downstream_connection_duration: None,
        hash_source_ip: false,
        tunneling: None,
        access_log: Vec::new(),
    })
}

fn manager(routes: RouteSource, filters: Vec<model::HttpFilter>) -> HttpConnectionManager {
    HttpConnectionManager {
        stat_prefix: "s".into(),
        routes,
        filters,
        server_name: String::new(),
        server_header_transformation: model::ServerHeader::default(),
        forward_client_cert: model::ForwardClientCert::default(),
        set_current_client_cert: model::ClientCertDetails::default(),
        use_remote_address: false,
        generate_request_id: true,
        request_id_for_trace_sampling: true,
        normalize_path: true,
        merge_slashes: false,
        escaped_slashes: model::EscapedSlashes::default(),
        stream_idle_timeout: None,
        request_timeout: None,
        request_headers_timeout: None,
        idle_timeout: None,
        max_connection_duration: None,
        max_stream_duration: None,
        max_requests_per_connection: None,
        drain_timeout: None,
        max_request_headers_kb: None,
        headers_with_underscores: model::UnderscoreHeaders::default(),
        upgrades: vec!["WebSocket".into()],
        accept_http_10: false,
        allow_absolute_url: false,
        preserve_header_case: false,
        proxy_100_continue: true,
        append_x_forwarded_port: false,
        suppress_envoy_headers: false,
        http2: None,
        internal_cidrs: Vec::new(),
        access_log: Vec::new(),
        tracing: None,
    }
}

fn http() -> NetworkFilter {
    NetworkFilter::Http(Box::new(manager(RouteSource::Rds("80".into()), Vec::new())))
}

fn chain(name: &str, filters: Vec<NetworkFilter>) -> FilterChain {
    FilterChain { name: name.into(), filters, ..FilterChain::default() }
}

fn listener(name: &str, address: &str, chains: Vec<FilterChain>) -> model::Listener {
    model::Listener {
        name: name.into(),
        address: Address::Socket(address.parse().unwrap()),
        additional_addresses: Vec::new(),
        direction: Direction::Outbound,
        bind_to_port: false,
        use_original_dst: false,
        transparent: false,
        listener_filters: Vec::new(),
        listener_filters_timeout: None,
        continue_on_listener_filters_timeout: true,
        filter_chains: chains,
        default_filter_chain: None,
        access_log: Vec::new(),
        exact_balance: false,
        max_accepts_per_event: None,
    }
}

fn route(path: PathMatch, action: RouteAction) -> model::Route {
    model::Route {
        name: "r".into(),
        matches: RouteMatch {
            path,
            case_sensitive: true,
            headers: Vec::new(),
            query: Vec::new(),
            dynamic_metadata: Vec::new(),
            grpc: false,
        },
        action,
        request_headers: model::HeaderOps::default(),
        response_headers: model::HeaderOps::default(),
        decorator: None,
        fault: None,
        cors: None,
        config: None,
        stat_prefix: String::new(),
        unsupported: Vec::new(),
    }
}

fn to(cluster: &str) -> RouteAction {
    let one = model::WeightedCluster { name: cluster.into(), weight: 1, ..model::WeightedCluster::default() };
    RouteAction::Forward(Box::new(Forward { clusters: vec![one], ..Forward::default() }))
}

fn table(routes: Vec<model::Route>) -> model::RouteTable {
    let vhost =
        model::VirtualHost { name: "v".into(), domains: vec!["*".into()], routes, include_request_attempt_count: true };
    model::RouteTable { name: "80".into(), virtual_hosts: vec![vhost], ..model::RouteTable::default() }
}

fn prefix(text: &str) -> PathMatch {
    PathMatch::Prefix(text.into())
}

/// Two clusters, a listener that takes everything, one that stands for port 80, one table.
fn small() -> Model {
    let mut model = Model::default();
    for name in [A, "outbound|80||b"] {
        model.clusters.insert(name.into(), Arc::new(cluster(name)));
    }
    model.endpoints.insert(A.into(), endpoints(vec![endpoint("10.0.0.1:80", &[]), endpoint("10.0.0.2:80", &[])]));
    let mut entry = listener("virtualOutbound", "0.0.0.0:15001", vec![chain("all", vec![tcp(A)])]);
    (entry.bind_to_port, entry.use_original_dst) = (true, true);
    model.listeners.insert("virtualOutbound".into(), Arc::new(entry));
    let port_80 = listener("0.0.0.0_80", "0.0.0.0:80", vec![chain("http", vec![http()])]);
    model.listeners.insert("0.0.0.0_80".into(), Arc::new(port_80));
    model.routes.insert("80".into(), Arc::new(table(vec![route(prefix("/"), to(A))])));
    model
}

fn change_listener(model: &mut Model, name: &str, change: impl FnOnce(&mut model::Listener)) {
    let mut listener = (*model.listeners[name]).clone();
    change(&mut listener);
    model.listeners.insert(name.into(), Arc::new(listener));
}

fn compiled(model: &Model) -> Snapshot {
    let (snapshot, rejects) = compile(None, model, &Secrets::new());
    assert_eq!(rejects, []);
    snapshot
}

fn again(prev: &Snapshot, model: &Model) -> Snapshot {
    let (snapshot, rejects) = compile(Some(prev), model, &Secrets::new());
    assert_eq!(rejects, []);
    snapshot
}

fn ptrs(snapshot: &Snapshot) -> Vec<*const ()> {
    let clusters = snapshot.clusters().map(|c| Arc::as_ptr(c).cast());
    let listeners = snapshot.listeners().iter().map(|l| Arc::as_ptr(l).cast());
    clusters.chain(listeners).chain(snapshot.route_tables().map(|t| Arc::as_ptr(t).cast())).collect()
}

/// The same content in other objects, as a reload makes it.
fn deep(model: &Model) -> Model {
    let mut copy = model.clone();
    copy.clusters.values_mut().for_each(|c| *c = Arc::new((**c).clone()));
    copy.listeners.values_mut().for_each(|c| *c = Arc::new((**c).clone()));
    copy.routes.values_mut().for_each(|c| *c = Arc::new((**c).clone()));
    copy.endpoints.values_mut().for_each(|c| *c = Arc::new((**c).clone()));
    copy
}

#[test]
fn what_did_not_change_is_the_same_object() {
    let model = small();
    let first = compiled(&model);
    let second = again(&first, &deep(&model));
    assert_eq!(ptrs(&first), ptrs(&second));
    assert_eq!((first.version, second.version), (1, 2));
}

#[test]
fn new_endpoints_replace_one_cluster_and_keep_its_accounts() {
    let mut model = small();
    let first = compiled(&model);
    let (id_a, id_b) = (first.cluster_id(A).unwrap(), first.cluster_id("outbound|80||b").unwrap());
    assert!(first.cluster(id_a).breakers.connections.take());
    let mut weighty = endpoint("10.0.0.2:80", &[]);
    weighty.weight = 7;
    let added = vec![endpoint("10.0.0.3:80", &[]), endpoint("10.0.0.1:80", &[]), weighty];
    model.endpoints.insert(A.into(), endpoints(added));
    let second = again(&first, &model);
    let (old, new) = (first.cluster(id_a), second.cluster(id_a));
    assert!(!Arc::ptr_eq(old, new) && Arc::ptr_eq(first.cluster(id_b), second.cluster(id_b)));
    assert!(Arc::ptr_eq(&old.breakers, &new.breakers) && Arc::ptr_eq(&old.transports, &new.transports));
    assert!(Arc::ptr_eq(&old.config, &new.config));
    assert_eq!(new.breakers.connections.used(), 1);
    let host = |cluster: &ClusterShared, address: &str| cluster.hosts().find(address.parse().unwrap()).cloned();
    let of = |address: &str| (host(old, address).unwrap(), host(new, address).unwrap());
    let (before, after) = of("10.0.0.1:80");
    assert!(Arc::ptr_eq(&before, &after));
    let (before, after) = of("10.0.0.2:80");
    assert!(!Arc::ptr_eq(&before, &after) && Arc::ptr_eq(&before.stats, &after.stats));
    assert_eq!(after.weight, 7);
    assert_eq!(ptrs(&first)[2..], ptrs(&second)[2..], "listeners and tables");
}

#[test]
fn new_limits_apply_to_the_breaker_in_use() {
    let mut model = small();
    let first = compiled(&model);
    let id = first.cluster_id(A).unwrap();
    assert_eq!(first.cluster(id).hosts().all.len(), 2, "they are in use");
    let mut changed = cluster(A);
    changed.limits.max_connections = 2;
    model.clusters.insert(A.into(), Arc::new(changed));
    let second = again(&first, &model);
    assert!(Arc::ptr_eq(&first.cluster(id).breakers, &second.cluster(id).breakers));
    assert!(Arc::ptr_eq(&first.cluster(id).hosts, &second.cluster(id).hosts));
    assert_eq!(first.cluster(id).breakers.connections.limit(), 2);
}

#[test]
fn references_survive_other_clusters() {
    let mut model = small();
    let first = compiled(&model);
    model.clusters.insert("a first one".into(), Arc::new(cluster("a first one")));
    model.clusters.remove("outbound|80||b");
    let second = again(&first, &model);
    let headers = HeaderMap::new();
    let request = RequestView { method: &Method::GET, scheme: "http", authority: "x", path: "/", headers: &headers };
    let table = second.route_table_named("80").unwrap();
    assert!(Arc::ptr_eq(table, first.route_table_named("80").unwrap()));
    let found = route::find(table, &request, 0).unwrap();
    let id = second.resolve(found.cluster().unwrap()).unwrap();
    assert_eq!(&*second.cluster(id).name, A);
    model.clusters.remove(A);
    assert_eq!(again(&second, &model).resolve(found.cluster().unwrap()), None);
}

#[test]
fn connections_are_handed_to_the_listener_of_their_destination() {
    let mut model = small();
    model.listeners.insert("vip".into(), Arc::new(listener("vip", "10.9.0.1:80", vec![chain("c", vec![tcp(A)])])));
    let snapshot = compiled(&model);
    let [entry] = snapshot.bound() else { panic!("one listener has a socket") };
    let to = |dst: &str| snapshot.hand_off(entry, dst.parse().unwrap()).map(|l| l.name.to_string());
    assert_eq!(to("10.9.0.1:80").as_deref(), Some("vip"));
    assert_eq!(to("10.9.0.2:80").as_deref(), Some("0.0.0.0_80"));
    assert_eq!(to("10.9.0.2:81"), None);
    assert_eq!(to("10.9.0.2:15001"), None);
    assert_eq!(&*snapshot.listener("vip").unwrap().name, "vip");
    assert!(snapshot.listener("other").is_none());
}

#[test]
fn sockets_by_the_labels_of_an_endpoint() {
    let mut model = small();
    let mut said = cluster(A);
    let with = |name: &str, labels: &[(&str, &str)], version| TransportMatch {
        name: name.into(),
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        transport: model::Transport::ProxyProtocol(version, Box::default()),
    };
    said.transport_matches = vec![with("istio", &[("tlsMode", "istio")], 1), with("two", &[("a", "1"), ("b", "2")], 2)];
    model.clusters.insert(A.into(), Arc::new(said));
    let hosts = vec![
        endpoint("10.0.0.1:80", &[("tlsMode", "istio"), ("x", "y")]),
        endpoint("10.0.0.2:80", &[("a", "1")]),
        endpoint("10.0.0.3:80", &[("a", "1"), ("b", "2")]),
    ];
    model.endpoints.insert(A.into(), endpoints(hosts));
    let snapshot = compiled(&model);
    let cluster = snapshot.cluster(snapshot.cluster_id(A).unwrap());
    let sockets: Vec<String> = cluster.hosts().all.iter().map(|h| format!("{:?}", cluster.transport(h))).collect();
    assert_eq!(sockets, ["proxy-protocol v1 over raw", "raw", "proxy-protocol v2 over raw"]);
}

#[test]
fn resolved_names_come_from_the_model() {
    let mut model = small();
    let mut named = endpoint("10.0.0.1:80", &[]);
    named.address = Address::Host("db.example.com".into(), 80);
    let mut said = cluster(A);
    said.kind = ClusterKind::StrictDns((*endpoints(vec![named])).clone());
    model.clusters.insert(A.into(), Arc::new(said));
    model.endpoints.remove(A);
    let first = compiled(&model);
    let id = first.cluster_id(A).unwrap();
    assert_eq!(first.cluster(id).hosts().all.len(), 0);
    model.endpoints.insert(A.into(), endpoints(vec![endpoint("192.0.2.1:80", &[])]));
    assert_eq!(again(&first, &model).cluster(id).hosts().all.len(), 1);
}

#[test]
fn defaults_are_envoys() {
    let snapshot = compiled(&small());
    let chain = &snapshot.listener("0.0.0.0_80").unwrap().all_chains().next().unwrap().terminal;
    let Terminal::Http(http) = chain else { panic!("HTTP") };
    let o = &http.options;
    let seconds = |n| Some(Duration::from_secs(n));
    assert_eq!((o.stream_idle_timeout, o.idle_timeout), (seconds(300), seconds(3600)));
    assert_eq!((o.request_timeout, o.request_headers_timeout), (None, None));
    assert_eq!((o.max_stream_duration, o.max_connection_duration), (None, None));
    assert_eq!((o.drain_timeout, o.max_request_headers), (Duration::from_secs(5), 60 * 1024));
    assert_eq!((o.server_name.to_str().unwrap(), &*o.upgrades[0]), ("envoy", "websocket"));
    let chain = &snapshot.listener("virtualOutbound").unwrap().all_chains().next().unwrap().terminal;
    let Terminal::Tcp(tcp) = chain else { panic!("TCP") };
    assert_eq!((tcp.idle_timeout, tcp.max_duration), (seconds(3600), None));
    let action::Action::Forward(f) = &snapshot.route_table_named("80").unwrap().virtual_hosts[0].routes[0].action
    else {
        panic!("forwards")
    };
    assert_eq!((f.timeout, f.idle_timeout, f.max_stream_duration), (seconds(15), None, None));
    assert_eq!(f.cluster_not_found_status, 503);
}

#[test]
fn zero_switches_limits_off() {
    let zero = Some(Duration::ZERO);
    let mut said = manager(RouteSource::Rds("80".into()), Vec::new());
    (said.stream_idle_timeout, said.idle_timeout, said.request_timeout) = (zero, zero, zero);
    said.max_requests_per_connection = Some(0);
    let mut model = small();
    change_listener(&mut model, "0.0.0.0_80", |l| {
        l.filter_chains[0].filters = vec![NetworkFilter::Http(Box::new(said))];
    });
    let RouteAction::Forward(mut forward) = to(A) else { unreachable!() };
    (forward.timeout, forward.idle_timeout, forward.max_stream_duration) = (zero, zero, zero);
    forward.retry = Some(model::RetryPolicy { per_try_timeout: zero, ..model::RetryPolicy::default() });
    let one = route(prefix("/"), RouteAction::Forward(forward));
    model.routes.insert("80".into(), Arc::new(table(vec![one])));
    let snapshot = compiled(&model);
    let chain = &snapshot.listener("0.0.0.0_80").unwrap().all_chains().next().unwrap().terminal;
    let Terminal::Http(http) = chain else { panic!("HTTP") };
    assert_eq!((http.options.stream_idle_timeout, http.options.idle_timeout), (None, None));
    assert_eq!((http.options.request_timeout, http.options.max_requests_per_connection), (None, None));
    let action::Action::Forward(f) = &snapshot.route_table_named("80").unwrap().virtual_hosts[0].routes[0].action
    else {
        panic!("forwards")
    };
    assert_eq!((f.timeout, f.idle_timeout, f.max_stream_duration), (None, Some(None), Some(None)));
    let retry = f.retry.as_ref().unwrap();
    assert_eq!(retry.per_try_timeout, None);
    assert_eq!((retry.backoff_base, retry.backoff_max), (Duration::from_millis(25), Duration::from_millis(250)));
}

#[test]
fn a_route_that_does_not_compile_leaves_its_siblings() {
    let RouteAction::Forward(mut rewriting) = to(A) else { unreachable!() };
    let RouteAction::Forward(mut impatient) = to(A) else { unreachable!() };
    let retry =
        model::RetryPolicy { per_try_idle_timeout: Some(Duration::from_secs(1)), ..model::RetryPolicy::default() };
    impatient.retry = Some(retry);
    rewriting.regex_rewrite = Some(("(".into(), "x".into()));
    let mut model = small();
    let mut with_filter = route(prefix("/filter"), to(A));
    with_filter.unsupported = vec!["envoy.filters.http.lua".into()];
    let routes = vec![
        route(PathMatch::Regex("[".into()), to(A)),
        route(prefix("/rewrite"), RouteAction::Forward(rewriting)),
        route(prefix("/impatient"), RouteAction::Forward(impatient)),
        route(prefix("/hash"), RouteAction::Unsupported("cluster_header".into())),
        with_filter,
        route(prefix("/"), to(A)),
    ];
    model.routes.insert("80".into(), Arc::new(table(routes)));
    let (snapshot, rejects) = compile(None, &model, &Secrets::new());
    let fields: Vec<&str> = rejects.iter().map(|r| &*r.field).collect();
    assert_eq!(
        fields,
        [
            "virtual_hosts[v].routes[0].match",
            "virtual_hosts[v].routes[1].action",
            "virtual_hosts[v].routes[2].action",
            "virtual_hosts[v].routes[3].action",
            "virtual_hosts[v].routes[4].typed_per_filter_config"
        ]
    );
    assert!(rejects.iter().all(|r| r.resource == "RouteConfiguration 80" && r.severity == Severity::Error));
    let routes = &snapshot.route_table_named("80").unwrap().virtual_hosts[0].routes;
    assert_eq!(routes.len(), 5);
    let unsupported = |i: usize| matches!(routes[i].action, action::Action::Unsupported(_));
    assert!((0..3).all(unsupported) && routes[3].unsupported.is_some() && !unsupported(4));
    let (second, still) = compile(Some(&snapshot), &deep(&model), &Secrets::new());
    assert_eq!(still, rejects, "what stays the same is still rejected");
    assert_eq!(ptrs(&second), ptrs(&snapshot));
}

#[test]
fn what_is_not_done_is_named() {
    let mut model = small();
    change_listener(&mut model, "virtualOutbound", |l| l.additional_addresses.push(Address::Pipe("/s".into())));
    let eager = Cluster { close_on_host_failure: true, ..cluster(A) };
    model.clusters.insert(A.into(), Arc::new(eager));
    let fields: Vec<String> = compile(None, &model, &Secrets::new()).1.into_iter().map(|r| r.field).collect();
    assert_eq!(fields, ["close_connections_on_host_health_failure", "additional_addresses"]);
}

fn rbac(principal: Principal) -> model::Rbac {
    let policy = RbacPolicy { permissions: vec![Permission::Any], principals: vec![principal] };
    let policies = BTreeMap::from([("ns[n]-policy[p]-rule[0]".into(), policy)]);
    let rules = RbacRules { action: model::RbacAction::Deny, policies };
    model::Rbac { rules: Some(rules), ..model::Rbac::default() }
}

#[test]
fn a_policy_that_does_not_compile_closes_its_chain() {
    let bad = rbac(Principal::Authenticated(Some(StringMatcher::regex("["))));
    let over_http = manager(RouteSource::Rds("80".into()), vec![model::HttpFilter::Rbac(bad.clone())]);
    for filters in [vec![NetworkFilter::Rbac(bad), tcp(A)], vec![NetworkFilter::Http(Box::new(over_http))]] {
        let mut model = small();
        change_listener(&mut model, "virtualOutbound", |l| l.filter_chains.push(chain("guarded", filters)));
        change_listener(&mut model, "virtualOutbound", |l| l.filter_chains[1].matches.destination_port = Some(1));
        let (snapshot, rejects) = compile(None, &model, &Secrets::new());
        let [reject] = &rejects[..] else { panic!("one reject") };
        assert_eq!((reject.severity, &*reject.field), (Severity::Security, "filter_chains[guarded].rbac"));
        assert!(reject.reason.starts_with("ns[n]-policy[p]-rule[0]: "));
        let chains: Vec<_> = snapshot.listener("virtualOutbound").unwrap().all_chains().collect();
        assert!(chains[0].unusable.is_none() && chains[1].unusable.is_some());
        let policy = match (&*chains[1].l4, &chains[1].terminal) {
            ([Filter::Rbac(rbac)], _) => rbac,
            (_, Terminal::Http(http)) => match &http.filters[0] {
                HttpFilter::Rbac(rbac) => rbac,
                _ => panic!("a policy"),
            },
            _ => panic!("a policy"),
        };
        let attributes = Attributes {
            peer: None,
            direct_remote: "10.0.0.1:1".parse().unwrap(),
            remote_ip: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.1:1".parse().unwrap(),
            sni: None,
            request: None,
            metadata: None,
        };
        assert!(!policy.check(&attributes).allowed, "a policy that is not understood is never open");
    }
}

#[test]
fn chains_that_cannot_serve_refuse() {
    let mut tunnel = tcp(A);
    if let NetworkFilter::TcpProxy(proxy) = &mut tunnel {
        proxy.tunneling = Some(("h".into(), false));
    }
    let unsupported = NetworkFilter::Unsupported { name: "redis".into(), type_url: "t".into() };
    for (filters, refuses) in
        [(vec![], true), (vec![tunnel], true), (vec![tcp(A), tcp(A)], true), (vec![unsupported, tcp(A)], false)]
    {
        let mut model = small();
        change_listener(&mut model, "virtualOutbound", |l| l.filter_chains[0].filters = filters.clone());
        let (snapshot, rejects) = compile(None, &model, &Secrets::new());
        assert_eq!(rejects.len(), 1, "{filters:?}");
        let chain = Arc::clone(snapshot.listener("virtualOutbound").unwrap().all_chains().next().unwrap());
        assert_eq!(matches!(chain.terminal, Terminal::Refuse(_)), refuses);
        assert_eq!(matches!(&*chain.l4, [Filter::Unsupported(_)]), !refuses);
    }
}

#[test]
fn the_model_can_close_a_chain() {
    let mut model = small();
    change_listener(&mut model, "virtualOutbound", |l| {
        l.filter_chains[0].unusable = Some("PeerAuthentication x".into())
    });
    let snapshot = compiled(&model);
    let chain = Arc::clone(snapshot.listener("virtualOutbound").unwrap().all_chains().next().unwrap());
    assert_eq!(chain.unusable.as_deref(), Some("PeerAuthentication x"));
}

fn common() -> CommonTls {
    CommonTls {
        certificates: vec!["default".into()],
        validation: Some(Validation { roots: Some("ROOTCA".into()), ..Validation::default() }),
        ..CommonTls::default()
    }
}

fn secured() -> Model {
    let mut model = small();
    change_listener(&mut model, "0.0.0.0_80", |l| {
        l.filter_chains[0].tls = Some(DownstreamTls { common: common(), require_client_certificate: true });
        let mut plain = chain("plain", vec![tcp(A)]);
        plain.matches = ChainMatch { destination_port: Some(1), ..ChainMatch::default() };
        l.filter_chains.push(plain);
    });
    let mut said = cluster(A);
    said.transport = model::Transport::Tls(Box::new(UpstreamTls { common: common(), ..UpstreamTls::default() }));
    model.clusters.insert(A.into(), Arc::new(said));
    model
}

fn with_certificate(secrets: &Secrets, root: &Root) -> Secrets {
    let (day, now) = (Duration::from_secs(86_400), OffsetDateTime::now_utc());
    let (chain, key) = root.sign_between(&["spiffe://td/ns/a/sa/b"], now - day, now + day).unwrap();
    secrets
        .with_identity("default", Identity::from_pem(chain.as_bytes(), key.as_bytes()).unwrap())
        .with_roots("ROOTCA", Roots::from_pem(root.certificate().as_bytes()).unwrap())
}

#[test]
fn other_secrets_compile_only_tls_anew() {
    let root = Root::generate("root").unwrap().0;
    let model = secured();
    let (early, rejects) = compile(None, &model, &Secrets::new());
    assert!(!rejects.is_empty() && rejects.iter().all(|r| r.severity == Severity::Warning), "{rejects:?}");
    assert!(rejects.iter().all(|r| r.reason == "secret default is missing"));
    let chains = |s: &Snapshot| s.listener("0.0.0.0_80").unwrap().all_chains().cloned().collect::<Vec<_>>();
    assert!(matches!(chains(&early)[0].terminal, Terminal::Refuse(_)), "never plaintext instead");
    assert!(chains(&early)[0].unusable.is_some() && chains(&early)[0].tls.is_none());

    let secrets = with_certificate(&Secrets::new(), &root);
    let (first, rejects) = compile(Some(&early), &model, &secrets);
    assert_eq!(rejects, []);
    assert!(chains(&first)[0].unusable.is_none() && chains(&first)[0].tls.is_some());
    assert!(Arc::ptr_eq(&chains(&early)[1], &chains(&first)[1]));

    let (renewed, rejects) = compile(Some(&first), &deep(&model), &with_certificate(&secrets, &root));
    assert_eq!(rejects, []);
    let (old, new) = (chains(&first), chains(&renewed));
    assert!(old[0].tls != new[0].tls && Arc::ptr_eq(&old[1], &new[1]));
    let (Terminal::Http(a), Terminal::Http(b)) = (&old[0].terminal, &new[0].terminal) else { panic!("HTTP") };
    assert!(Arc::ptr_eq(a, b), "what serves requests stays");
    let id = first.cluster_id(A).unwrap();
    let (a, b) = (first.cluster(id), renewed.cluster(id));
    assert!(a.transports != b.transports && Arc::ptr_eq(&a.hosts, &b.hosts) && Arc::ptr_eq(&a.breakers, &b.breakers));
    assert_eq!(ptrs(&first)[1], ptrs(&renewed)[1], "the plaintext cluster stays");

    let (same, _) = compile(Some(&renewed), &model, renewed.secrets());
    assert_eq!(ptrs(&renewed), ptrs(&same));
}

#[test]
fn a_changed_listener_keeps_its_unchanged_chains() {
    let mut model = small();
    change_listener(&mut model, "virtualOutbound", |l| {
        let mut policed = chain("policed", vec![NetworkFilter::Rbac(rbac(Principal::Any)), tcp(A)]);
        policed.matches.destination_port = Some(1);
        l.filter_chains.push(policed);
    });
    let first = compiled(&model);
    change_listener(&mut model, "virtualOutbound", |l| {
        l.filter_chains.remove(0);
        l.exact_balance = true;
    });
    let second = again(&first, &model);
    let chains = |s: &Snapshot| s.listener("virtualOutbound").unwrap().all_chains().cloned().collect::<Vec<_>>();
    assert!(Arc::ptr_eq(&chains(&first)[1], &chains(&second)[0]));
    assert!(second.listener("virtualOutbound").unwrap().exact_balance);
}

#[test]
fn an_address_belongs_to_one_listener() {
    let mut model = small();
    model.listeners.insert("z".into(), Arc::new(listener("z", "0.0.0.0:80", vec![chain("c", vec![tcp(A)])])));
    let (snapshot, rejects) = compile(None, &model, &Secrets::new());
    let [reject] = &rejects[..] else { panic!("one reject") };
    assert_eq!((&*reject.resource, &*reject.field), ("Listener z", "address"));
    let found = snapshot.hand_off(&snapshot.bound()[0], "10.0.0.1:80".parse().unwrap()).unwrap();
    assert_eq!(&*found.name, "0.0.0.0_80");
}

#[test]
fn weights_split_draws_exactly() {
    let RouteAction::Forward(mut said) = to(A) else { unreachable!() };
    let weighted =
        |name: &str, weight| model::WeightedCluster { name: name.into(), weight, ..model::WeightedCluster::default() };
    said.clusters = vec![weighted("a", 90), weighted("none", 0), weighted("b", 10)];
    let mut model = small();
    model.routes.insert("80".into(), Arc::new(table(vec![route(prefix("/"), RouteAction::Forward(said))])));
    let snapshot = compiled(&model);
    let action::Action::Forward(f) = &snapshot.route_table_named("80").unwrap().virtual_hosts[0].routes[0].action
    else {
        panic!("forwards")
    };
    let picks = |name: &str| (0..1000).filter(|draw| *f.pick(*draw).unwrap().cluster.name == *name).count();
    assert_eq!((picks("a"), picks("none"), picks("b")), (900, 0, 100));
}

#[test]
fn header_changes_are_checked_one_by_one() {
    let set = |name: &str, value: &str| model::HeaderSet {
        name: name.into(),
        value: value.into(),
        action: model::AppendAction::Overwrite,
    };
    let mut one = route(prefix("/"), to(A));
    one.request_headers = model::HeaderOps {
        set: vec![set("X-A", "100%"), set("bad name", "v"), set("Host", "h"), set("x-b", "a\nb"), set(":path", "/p")],
        remove: vec!["x-c".into(), "bad name".into()],
    };
    let mut model = small();
    model.routes.insert("80".into(), Arc::new(table(vec![one])));
    let (snapshot, rejects) = compile(None, &model, &Secrets::new());
    let severities: Vec<_> = rejects.iter().map(|r| r.severity).collect();
    assert_eq!(severities, [Severity::Warning, Severity::Error, Severity::Error, Severity::Error]);
    let ops = &snapshot.route_table_named("80").unwrap().virtual_hosts[0].routes[0].request_headers;
    let names: Vec<_> = ops.set.iter().map(|s| format!("{:?}", s.name)).collect();
    assert_eq!(names, ["Header(\"x-a\")", "Authority", "Path"]);
    assert_eq!(ops.set[0].value.constant().unwrap(), "100%");
    assert_eq!(ops.remove.len(), 1);
}

#[test]
fn endpoints_alone_compile_to_what_everything_would() {
    let mut model = small();
    let (first, _) = compile(None, &model, &Secrets::new());
    let moved = endpoints(vec![endpoint("10.0.0.1:80", &[]), endpoint("10.0.0.9:80", &[])]);
    model.endpoints.insert(A.into(), moved);
    let quick = compile_endpoints(&first, &model, &[A.into(), "nobody".into()]);
    let (all, _) = compile(Some(&first), &model, &Secrets::new());
    let hosts = |of: &Snapshot| -> Vec<String> {
        let one = |c: &Arc<ClusterShared>| c.hosts().all.iter().map(|h| format!("{} {}", c.name, h.address)).collect();
        of.clusters().flat_map(|c: &Arc<ClusterShared>| -> Vec<String> { one(c) }).collect()
    };
    assert_eq!(hosts(&quick), hosts(&all));
    assert_eq!(quick.version, 2);
    let a = quick.cluster_id(A).expect("there");
    assert!(!Arc::ptr_eq(quick.cluster(a), first.cluster(a)));
    let same_stats = |of: &Snapshot| Arc::as_ptr(&of.cluster(a).hosts().all[0].stats);
    assert_eq!(same_stats(&quick), same_stats(&first), "a host that stays keeps its counts");
    for (old, new) in first.clusters().zip(quick.clusters()).filter(|(c, _)| &*c.name != A) {
        assert!(Arc::ptr_eq(old, new));
    }
    assert!(quick.listeners().iter().zip(first.listeners()).all(|(a, b)| Arc::ptr_eq(a, b)));
}

#[test]
fn hosts_are_compiled_for_those_who_use_them() {
    let mut model = small();
    let used = |of: &Snapshot| of.clusters().filter(|c| c.hosts.used().is_some()).count();
    let (first, id) = (compiled(&model), ClusterId(0));
    assert_eq!(first.cluster(id).hosts.look(|set| set.all.len()), 2, "who looks does not use");
    model.endpoints.insert(A.into(), endpoints(vec![endpoint("10.0.0.1:80", &[])]));
    let second = compile_endpoints(&first, &model, &[A.into()]);
    assert_eq!((used(&first), used(&second)), (0, 0));
    let stats = |of: &Snapshot| Arc::clone(&of.cluster(id).hosts().all[0].stats);
    let new = stats(&second);
    assert!(Arc::ptr_eq(&new, &stats(&first)), "an older version that is used later counts in the same place");
    model.endpoints.insert(A.into(), endpoints(vec![endpoint("10.0.0.1:80", &[]), endpoint("10.0.0.7:80", &[])]));
    let third = compile_endpoints(&second, &model, &[A.into()]);
    assert_eq!(used(&third), 1, "no worker waits for hosts that are in use");
    assert!(Arc::ptr_eq(&new, &stats(&third)));
}

#[test]
fn load_assignments_of_another_name_are_found() {
    let mut model = small();
    for name in [A, "outbound|80||b"] {
        let shared = Cluster { kind: ClusterKind::Eds("both".into()), ..cluster(name) };
        model.clusters.insert(name.into(), Arc::new(shared));
    }
    let first = compiled(&model);
    model.endpoints.insert("both".into(), endpoints(vec![endpoint("10.0.0.9:80", &[])]));
    let second = compile_endpoints(&first, &model, &["both".into()]);
    assert!(second.clusters().all(|cluster| cluster.hosts().all.len() == 1));
}
