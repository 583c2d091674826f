//! Names, routes, subsets, endpoints and which DestinationRule counts.

use std::collections::BTreeMap;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use istio_proxy::snapshot::{RequestView, route};
use proxy_config::model::{CircuitBreakers, UpstreamProtocol};
use serde_json::{Value, json};

use crate::world::{POD2, Who, World, Yaml, outcome};

const PAYMENT: &str = "payment-service.payments.svc.cluster.local";

fn cluster(port: u16, subset: &str) -> String {
    format!("outbound|{port}|{subset}|{PAYMENT}")
}

fn get(port: u16, host: &str) -> Value {
    json!({"address": "10.96.0.10", "port": port, "host": host})
}

/// With a virtual IP, which the guide leaves to the cluster.
fn with_vip(yaml: Yaml) -> Yaml {
    yaml.edit("Y5", "spec:\n", "spec:\n  clusterIP: 10.96.0.10\n")
}

#[test]
fn t1_who_the_virtual_machine_is() {
    let world = Yaml::seed().without(&["Y3"]).load(Who::Vm);
    let proxy = &world.loaded.proxy;
    assert_eq!((&*proxy.namespace, &*proxy.service_account), ("payments", "payment-service-sa"));
    assert_eq!(proxy.labels["environment"], "production");
    let entry = world.loaded.auto_entry.as_ref().expect("it registers itself");
    assert_eq!(entry.name, "legacy-payment-service-10.0.1.5-vm-network");
    // Only what a Service names is served by name.
    let inbound: Vec<&str> =
        world.loaded.model.clusters.keys().map(|n| &**n).filter(|n| n.starts_with("inbound|")).collect();
    assert_eq!(inbound, ["inbound|8080||", "inbound|9090||"]);
}

#[test]
fn y1_is_accepted_and_changes_nothing() {
    let world = Yaml::only(&["Y1"]).load(Who::Frontend);
    assert_eq!(world.errors(), Vec::<String>::new());
    let listeners: Vec<&str> = world.loaded.model.listeners.keys().map(|n| &**n).collect();
    assert_eq!(listeners, ["virtualInbound", "virtualOutbound"]);
    assert!(world.loaded.model.inert.contains("IstioOperator istio-system/istio"));
}

#[test]
fn t6_the_entry_is_an_endpoint() {
    let world = Yaml::only(&["Y3", "Y5"]).load(Who::Frontend);
    for (port, address) in [(8080, "10.0.1.5:8080"), (9090, "10.0.1.5:9090")] {
        let name = cluster(port, "");
        assert_eq!(world.hosts(&name), [(address.to_owned(), 0)], "T6 {port}");
        let shared = world.snapshot.cluster(world.snapshot.cluster_id(&name).expect("there"));
        let host = &shared.hosts().all[0];
        assert!(host.is_eligible(), "T6 {port}");
        assert_eq!(format!("{:?}", shared.transport(host)), "tls", "T6 {port}: mTLS");
    }
    let moved = Yaml::only(&["Y3", "Y5"]).edit("Y3", "http: 8080", "http: 18080").load(Who::Frontend);
    assert_eq!(moved.hosts(&cluster(8080, "")), [("10.0.1.5:18080".to_owned(), 0)], "T6: the entry's port counts");
}

#[test]
fn t7_the_entry_that_nobody_selects() {
    let world = Yaml::seed().load(Who::Frontend);
    let with_it = world.loaded.model.endpoints.values().filter(|e| format!("{e:?}").contains("10.0.2.10"));
    assert_eq!(with_it.count(), 0, "T7");
    let warnings = world.warnings();
    let told = warnings.lines().any(|l| l.contains("WorkloadEntry database/legacy-db-server-1"));
    assert!(told, "T7: {warnings}");
}

#[test]
fn names_of_the_service() {
    let yaml = with_vip(Yaml::only(&["Y3", "Y5"]));
    let frontend = yaml.load(Who::Frontend);
    let service = cluster(8080, "");
    for host in [
        "payment-service.payments:8080",
        "payment-service.payments",
        "payment-service.payments.svc:8080",
        "payment-service.payments.svc.cluster.local",
        "payment-service.payments.svc.cluster.local:8080",
        "Payment-Service.Payments",
        "10.96.0.10",
        "10.96.0.10:8080",
    ] {
        assert_eq!(outcome(&frontend.ask(&get(8080, host))), service, "T8 {host}");
    }
    assert_eq!(outcome(&frontend.ask(&get(8080, "payment-service:8080"))), "PassthroughCluster", "T9");
    let strict = yaml.clone().mesh("outboundTrafficPolicy: {mode: REGISTRY_ONLY}").load(Who::Frontend);
    assert!(outcome(&strict.ask(&get(8080, "payment-service:8080"))).starts_with("502"), "T9");
    let payments = yaml.load(Who::Payments);
    for host in ["payment-service", "payment-service:8080"] {
        assert_eq!(outcome(&payments.ask(&get(8080, host))), service, "T10 {host}");
    }
    assert_eq!(outcome(&payments.ask(&get(9090, "payment-service:9090"))), cluster(9090, ""), "T11");
    assert_eq!(payments.cluster(&cluster(9090, "")).http.protocol, UpstreamProtocol::Http2, "T11");
    assert_eq!(payments.hosts(&cluster(9090, "")), [("10.0.1.5:9090".to_owned(), 0)], "T11");
}

#[test]
fn t8_absolute_name_with_a_dot() {
    let frontend = with_vip(Yaml::only(&["Y3", "Y5"])).load(Who::Frontend);
    let host = "payment-service.payments.svc.cluster.local.:8080";
    assert_eq!(outcome(&frontend.ask(&get(8080, host))), cluster(8080, ""), "T8");
}

/// How 2,000 draws, every remainder of a hundred alike, fall on subsets.
fn split(world: &World, port: u16, headers: &[(&str, &str)]) -> BTreeMap<String, u32> {
    const DRAWS: u64 = 2_000;
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let name: HeaderName = name.parse().expect("a header");
        map.append(name, HeaderValue::from_str(value).expect("a value"));
    }
    let table = world.snapshot.route_table_named(&port.to_string()).expect("a table");
    let request = RequestView {
        method: &Method::GET,
        scheme: "http",
        authority: "payment-service.payments",
        path: "/api/v1/x",
        headers: &map,
    };
    let mut counts = BTreeMap::new();
    for draw in 0..DRAWS {
        let found = route::find(table, &request, draw).expect("a route");
        let name = found.cluster().expect("a cluster").name.to_string();
        let subset = name.split('|').nth(2).expect("a subset").to_owned();
        *counts.entry(subset).or_insert(0) += 1;
    }
    counts
}

#[test]
fn where_the_virtual_service_sends_requests() {
    let world = Yaml::seed().labelled().with("POD2", POD2).load(Who::Frontend);
    let canary = BTreeMap::from([("vm-version".to_owned(), 2_000)]);
    let default = BTreeMap::from([("k8s-version".to_owned(), 1_800), ("vm-version".to_owned(), 200)]);
    for (t, port, headers, expected) in [
        ("T33", 8080, &[("x-canary", "true")][..], &canary),
        ("T34", 8080, &[], &default),
        ("T35", 8080, &[("x-canary", "TRUE")], &default),
        ("T35", 8080, &[("x-canary", "True")], &default),
        ("T35", 8080, &[("x-canary", "1")], &default),
        ("T35", 8080, &[("x-canary", "true,true")], &default),
        ("T35", 8080, &[("x-canary", "true"), ("x-canary", "true")], &canary),
        ("T35", 8080, &[("x-canary", "false"), ("x-canary", "true")], &canary),
        ("T35", 8080, &[("x-canary", "true"), ("x-canary", "false")], &canary),
        ("T36", 8080, &[("X-Canary", "true")], &canary),
        ("T37", 9090, &[("x-canary", "true"), ("content-type", "application/grpc")], &canary),
    ] {
        assert_eq!(&split(&world, port, headers), expected, "{t} {headers:?}");
    }
    let hosts = |port, subset| world.hosts(&cluster(port, subset));
    assert_eq!(hosts(8080, "vm-version"), [("10.0.1.5:8080".to_owned(), 0)], "T33");
    assert_eq!(hosts(8080, "k8s-version"), [("10.1.0.2:8080".to_owned(), 0)], "T34");
    assert_eq!(hosts(9090, "vm-version"), [("10.0.1.5:9090".to_owned(), 0)], "T37");
    assert_eq!(world.cluster(&cluster(9090, "vm-version")).http.protocol, UpstreamProtocol::Http2, "T37");
    let warnings = world.warnings();
    assert_eq!(warnings.lines().filter(|l| l.starts_with("IST0112")).count(), 1, "T37: {warnings}");
}

/// As the guide has it no machine bears the label that the canary's subset asks for: the subset is there, and empty.
#[test]
fn t31_t32_the_canary_as_written_is_empty() {
    let world = Yaml::seed().with("POD2", POD2).load(Who::Frontend);
    assert_eq!(world.hosts(&cluster(8080, "vm-version")), [], "T31");
    assert_eq!(split(&world, 8080, &[("x-canary", "true")]), BTreeMap::from([("vm-version".to_owned(), 2_000)]), "T31");
    let default = BTreeMap::from([("k8s-version".to_owned(), 1_800), ("vm-version".to_owned(), 200)]);
    assert_eq!(split(&world, 8080, &[]), default, "T32");
    assert_eq!(world.hosts(&cluster(8080, "k8s-version")), [("10.1.0.2:8080".to_owned(), 0)], "T32");
    let warnings = world.warnings();
    assert!(warnings.lines().any(|l| l.starts_with("IST0173") && l.contains("vm-version")), "{warnings}");
    assert!(!warnings.lines().any(|l| l.starts_with("IST0173") && l.contains("k8s-version")), "{warnings}");
}

#[test]
fn t38_subsets_that_nobody_defines() {
    let world = Yaml::seed().without(&["Y13", "Y14"]).load(Who::Frontend);
    let mut call = get(8080, "payment-service.payments");
    assert_eq!(outcome(&world.ask(&call)), "503 cluster_not_found", "T38");
    call["headers"] = json!({"x-canary": "true"});
    let answer = world.ask(&call);
    assert_eq!(outcome(&answer), "503 cluster_not_found", "T38");
    assert_eq!(answer.response.expect("an answer").flags, "NC", "T38");
}

fn limits(connections: u32, pending: u32, requests: u32) -> CircuitBreakers {
    CircuitBreakers {
        max_connections: connections,
        max_pending_requests: pending,
        max_requests: requests,
        max_retries: u32::MAX,
        retry_budget: None,
    }
}

/// Of two DestinationRules for one host the first by age, then name, sets the policy, wholly; subsets come from both.
#[test]
fn t39_t40_which_destination_rule_counts() {
    let most = u32::MAX;
    for (t, older, limits, http2, per_connection, outlier) in [
        ("T39", None, limits(50, 100, 1000), false, Some(100), true),
        ("T40", Some("payment-service-dr"), limits(100, most, most), true, None, false),
    ] {
        let mut yaml = Yaml::seed().labelled();
        if let Some(name) = older {
            let date = |year| format!("name: {name}\n  creationTimestamp: {year}-01-01T00:00:00Z\n");
            yaml = yaml.edit("Y13", &format!("name: {name}\n"), &date(2020));
            let younger = "name: payment-service-circuit-breaker\n";
            yaml = yaml.edit("Y14", younger, &format!("{younger}  creationTimestamp: 2024-01-01T00:00:00Z\n"));
        }
        let world = yaml.load(Who::Frontend);
        for subset in ["", "k8s-version", "vm-version"] {
            let said = world.cluster(&cluster(8080, subset));
            assert_eq!(said.limits, limits, "{t} {subset}");
            assert_eq!(said.http.protocol == UpstreamProtocol::Http2, http2, "{t} {subset}");
            assert_eq!(said.http.max_requests_per_connection, per_connection, "{t} {subset}");
            assert_eq!(said.outlier.is_some(), outlier, "{t} {subset}");
            // Y14's minHealthPercent, in percent.
            assert_eq!(said.healthy_panic_threshold, Some(if outlier { 30.0 } else { 0.0 }), "{t} {subset}");
        }
        let warnings = world.warnings();
        let (loser, winner) = match older {
            None => ("payment-service-dr", "payment-service-circuit-breaker"),
            Some(_) => ("payment-service-circuit-breaker", "payment-service-dr"),
        };
        let told = |l: &str| l.contains(&format!("DestinationRule payments/{loser}")) && l.contains(winner);
        assert!(warnings.lines().any(told), "{t}: {warnings}");
    }
}

#[test]
fn t41_t42_what_is_spoken_between_proxies() {
    for (t, without, plain, grpc) in [
        ("T41", "Y14", UpstreamProtocol::Http2, UpstreamProtocol::Http2),
        ("T42", "Y13", UpstreamProtocol::Http1, UpstreamProtocol::Http2),
    ] {
        let world = Yaml::seed().without(&[without, "Y12"]).load(Who::Frontend);
        assert_eq!(world.cluster(&cluster(8080, "")).http.protocol, plain, "{t}");
        assert_eq!(world.cluster(&cluster(9090, "")).http.protocol, grpc, "{t}");
        // The application is spoken to as it declares itself.
        let server = Yaml::seed().without(&[without, "Y12"]).load(Who::Vm);
        assert_eq!(server.cluster("inbound|8080||").http.protocol, UpstreamProtocol::Http1, "{t}");
    }
}

#[test]
fn t44_grpc_streams_are_limited() {
    let world = Yaml::seed().load(Who::Frontend);
    let id = world.snapshot.cluster_id(&cluster(9090, "k8s-version")).expect("there");
    let requests = &world.snapshot.cluster(id).breakers.requests;
    let taken = (0..1_100).filter(|_| requests.take()).count();
    assert_eq!(taken, 1_000, "T44");
}

/// outlierDetection switches on locality priority.
#[test]
fn t48_the_own_zone_first() {
    let elsewhere = |yaml: Yaml| yaml.edit("Y3", "spec:\n", "spec:\n  locality: us-west-2/us-west-2b\n");
    let pod = ("10.1.0.2:8080".to_owned(), 0);
    for (t, without, vm_priority) in [("T48 with Y14", "Y13", 1), ("T48 with Y13 only", "Y14", 0)] {
        let world = elsewhere(Yaml::seed()).without(&[without]).with("POD2", POD2).load(Who::Frontend);
        let vm = ("10.0.1.5:8080".to_owned(), vm_priority);
        assert_eq!(world.hosts(&cluster(8080, "")), [vm, pod.clone()], "{t}");
    }
}

#[test]
fn the_database() {
    let world = Yaml::seed().load(Who::Database);
    let proxy = &world.loaded.proxy;
    assert_eq!((&*proxy.namespace, &*proxy.service_account), ("hybrid-app", "legacy-db-sa"), "T49");
    let warnings = world.warnings();
    assert!(warnings.lines().any(|l| l.starts_with("IST0118") && l.contains("legacy-database")), "T49: {warnings}");
    // Protocol detection: the port has a chain for HTTP and one for anything.
    let chains = &world.loaded.model.listeners["virtualInbound"].filter_chains;
    assert_eq!(chains.iter().filter(|c| c.matches.destination_port == Some(5432)).count(), 2, "T49");

    let database = "outbound|5432||legacy-database.hybrid-app.svc.cluster.local";
    let client = Yaml::seed().load(Who::HybridApp);
    let said = client.cluster(database);
    assert_eq!(said.limits.max_connections, 20, "T59");
    assert_eq!(world.cluster("inbound|5432||").limits.max_connections, 20, "T59: the server's own sidecar too");
    assert_eq!(said.connect_timeout, Some(Duration::from_secs(10)), "T60");
    let outlier = said.outlier.as_ref().expect("T61");
    assert_eq!(outlier.consecutive_5xx, Some(3), "T61");
    assert_eq!(outlier.interval, Some(Duration::from_secs(10)), "T61");
    assert_eq!(outlier.base_ejection_time, Some(Duration::from_secs(30)), "T61");
    assert_eq!(outlier.max_ejection_percent.unwrap_or(10), 10, "T61");
}
