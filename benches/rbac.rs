//! Policy on a request: a DENY and an ALLOW filter as Istio makes them. Budget: 300 ns for both.

#![allow(clippy::unwrap_used, reason = "a bench that cannot be set up has nothing to measure")]

use std::collections::BTreeMap;
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, Method};
use istio_proxy::snapshot::{Attributes, Rbac, RequestView};
use istio_proxy::tls::Peer;
use proxy_config::model::{
    self, HeaderMatcher, HeaderValueMatch, Permission, Principal, RbacAction, RbacPolicy, RbacRules, StringMatcher,
};

fn rbac(action: RbacAction, policies: Vec<(Permission, Principal)>) -> Rbac {
    let policies: BTreeMap<_, _> = (0..)
        .zip(policies)
        .map(|(i, (permission, principal))| {
            let policy = RbacPolicy { permissions: vec![permission], principals: vec![principal] };
            (format!("ns[payments]-policy[api]-rule[{i}]").into(), policy)
        })
        .collect();
    let rules = Some(RbacRules { action, policies });
    Rbac::compile(&model::Rbac { rules, ..model::Rbac::default() }).unwrap()
}

fn name(pattern: StringMatcher) -> Principal {
    Principal::Or(vec![Principal::Authenticated(Some(pattern))])
}

fn namespace(name: &str) -> StringMatcher {
    StringMatcher::regex(format!(".*/ns/{name}/.*"))
}

fn method(method: &str) -> Permission {
    let value = HeaderValueMatch::String(StringMatcher::exact(method));
    Permission::Header(HeaderMatcher { name: ":method".into(), value, invert: false, treat_missing_as_empty: false })
}

fn allowed(path: &str, principal: Principal) -> (Permission, Principal) {
    let paths = Permission::Or(vec![Permission::UrlPath(StringMatcher::prefix(path))]);
    let methods = Permission::Or(vec![method("GET"), method("POST")]);
    (Permission::And(vec![methods, paths]), Principal::And(vec![principal]))
}

fn benches(c: &mut Criterion) {
    let deny = rbac(
        RbacAction::Deny,
        vec![(Permission::Any, Principal::And(vec![Principal::Not(Box::new(name(namespace("frontend"))))]))],
    );
    let exact = |account: &str| name(StringMatcher::exact(format!("spiffe://cluster.local/ns/frontend/sa/{account}")));
    let allow = rbac(
        RbacAction::Allow,
        vec![
            allowed("/metrics", name(namespace("monitoring"))),
            allowed("/api/v1/", exact("other-sa")),
            allowed("/api/v1/", exact("frontend-sa")),
        ],
    );
    let mut headers = HeaderMap::new();
    headers.insert("user-agent", "bench".parse().unwrap());
    let request = RequestView {
        method: &Method::POST,
        scheme: "http",
        authority: "payment-service.payments:8080",
        path: "/api/v1/charge?id=17",
        headers: &headers,
    };
    let mut peer = Peer::default();
    peer.uri_sans = vec!["spiffe://cluster.local/ns/frontend/sa/frontend-sa".to_owned()];
    let attributes = Attributes {
        peer: Some(&peer),
        direct_remote: "10.0.0.1:4000".parse().unwrap(),
        remote_ip: "10.0.0.1".parse().unwrap(),
        destination: "10.0.0.2:8080".parse().unwrap(),
        sni: None,
        request: Some(&request),
        metadata: None,
    };
    c.bench_function("rbac/deny and allow", |b| {
        b.iter(|| {
            let attributes = black_box(&attributes);
            assert!(deny.check(attributes).allowed && allow.check(attributes).allowed);
        });
    });
    c.bench_function("rbac/no policy", |b| {
        let none = Rbac::default();
        b.iter(|| black_box(&none).check(black_box(&attributes)).allowed);
    });
}

criterion_group!(policy, benches);
criterion_main!(policy);
