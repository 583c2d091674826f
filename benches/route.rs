//! Finding a route: one virtual host of twenty, the last of its five routes. Budget: 300 ns.

#![allow(clippy::unwrap_used, reason = "a bench that cannot be set up has nothing to measure")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, Method};
use istio_proxy::snapshot::{RequestView, compile, route};
use istio_proxy::tls::Secrets;
use proxy_config::Model;
use proxy_config::model::{
    Forward, HeaderMatcher, HeaderOps, HeaderValueMatch, PathMatch, Route, RouteAction, RouteMatch, RouteTable,
    StringMatcher, VirtualHost, WeightedCluster,
};

const HOSTS: usize = 20;

fn path(path: PathMatch, headers: Vec<HeaderMatcher>) -> Route {
    let to = |name: &str, weight| WeightedCluster { name: name.into(), weight, ..WeightedCluster::default() };
    let forward =
        Forward { clusters: vec![to("outbound|80|v1|a", 90), to("outbound|80|v2|a", 10)], ..Forward::default() };
    Route {
        name: "default".into(),
        matches: RouteMatch {
            path,
            case_sensitive: true,
            headers,
            query: Vec::new(),
            dynamic_metadata: Vec::new(),
            grpc: false,
        },
        action: RouteAction::Forward(Box::new(forward)),
        request_headers: HeaderOps::default(),
        response_headers: HeaderOps::default(),
        decorator: None,
        fault: None,
        cors: None,
        config: None,
        stat_prefix: String::new(),
        unsupported: Vec::new(),
    }
}

fn canary() -> HeaderMatcher {
    let value = HeaderValueMatch::String(StringMatcher::exact("true"));
    HeaderMatcher { name: "x-canary".into(), value, invert: false, treat_missing_as_empty: false }
}

fn table(regex: bool) -> RouteTable {
    let virtual_hosts = (0..HOSTS).map(|i| {
        let host = format!("service-{i}.payments.svc.cluster.local");
        let short = format!("service-{i}.payments");
        let mut routes: Vec<Route> =
            (0..3).map(|i| path(PathMatch::Prefix(format!("/api/v{i}/orders")), Vec::new())).collect();
        routes.push(path(PathMatch::Prefix("/".into()), vec![canary()]));
        if regex {
            routes.push(path(PathMatch::Regex("/items/[0-9]+".into()), Vec::new()));
        }
        routes.push(path(PathMatch::Prefix("/".into()), Vec::new()));
        VirtualHost {
            name: format!("{host}:80").into(),
            domains: vec![host, short, format!("10.0.0.{i}"), format!("*.service-{i}.example.com")],
            routes,
            include_request_attempt_count: true,
        }
    });
    RouteTable {
        name: "80".into(),
        virtual_hosts: virtual_hosts.collect(),
        ignore_port_in_host_matching: true,
        ..RouteTable::default()
    }
}

fn benches(c: &mut Criterion) {
    let mut headers = HeaderMap::new();
    for (name, value) in [("user-agent", "bench"), ("accept", "*/*"), ("x-request-id", "0b7c7b7e"), ("te", "trailers")]
    {
        headers.insert(name, value.parse().unwrap());
    }
    for (name, regex, authority) in [
        ("exact host", false, "service-13.payments.svc.cluster.local:80"),
        ("wildcard host", false, "a.service-13.example.com"),
        ("regex in between", true, "service-13.payments.svc.cluster.local"),
    ] {
        let mut model = Model::default();
        model.routes.insert("80".into(), Arc::new(table(regex)));
        let (snapshot, rejects) = compile(None, &model, &Secrets::new());
        assert!(rejects.is_empty(), "{rejects:?}");
        let table = snapshot.route_table_named("80").unwrap();
        let request = RequestView {
            method: &Method::GET,
            scheme: "http",
            authority,
            path: "/checkout/basket?id=17",
            headers: &headers,
        };
        c.bench_function(&format!("route::find/{name}"), |b| {
            let mut draw = 0_u64;
            b.iter(|| {
                draw = draw.wrapping_add(0x9e37_79b9_7f4a_7c15);
                route::find(black_box(table), black_box(&request), draw).unwrap().cluster().is_some()
            });
        });
    }
}

criterion_group!(routes, benches);
criterion_main!(routes);
