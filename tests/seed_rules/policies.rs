//! Who may do what: Y9 to Y11 in front of the payment service's machine, Y15 in front of the database's.

use serde_json::{Value, json};

use crate::world::{API, DB, FE, ORD, OTH, PAY, Who, World, Yaml, outcome};

const NONE: &str = "403 [none]";
const DENIED: &str = "403 [ns[payments]-policy[deny-external-to-vms]-rule[0]]";
const CLOSED: &str = "closed [none]";
const CLOSED_BY_DENY: &str = "closed [ns[payments]-policy[deny-external-to-vms]-rule[0]]";
const NO_CHAIN: &str = "no filter chains matched";
const HANDSHAKE: &str = "invalid mTLS";
const APP: &str = "inbound|8080||";
const GRPC_APP: &str = "inbound|9090||";
const PASSTHROUGH: &str = "InboundPassthroughCluster";

/// One question: `PEER METHOD PORT PATH`, the peer a SPIFFE id or `plain` or `nobody` (TLS without a certificate); the
/// method `TCP` is other bytes, `GRPC` is a POST of gRPC.
fn call(address: &str, (peer, method, port, path): (&str, &str, u16, &str)) -> Value {
    let mut call = json!({"mode": "inbound", "address": address, "port": port, "host": "payment-service.payments"});
    match peer {
        "plain" => {}
        "nobody" => {
            call["tls"] = json!("tls");
            call["alpn"] = json!(if method == "GRPC" { "h2" } else { "istio-http/1.1,istio" });
        }
        peer => (call["tls"], call["peer"]) = (json!("mtls"), json!(peer)),
    }
    match method {
        "TCP" => call["protocol"] = json!("tcp"),
        "GRPC" => {
            (call["protocol"], call["method"], call["path"]) = (json!("http2"), json!("POST"), json!(path));
            call["headers"] = json!({"content-type": "application/grpc"});
        }
        method => (call["method"], call["path"]) = (json!(method), json!(path)),
    }
    call
}

fn check(world: &World, address: &str, rows: &[(&str, &str, &str, u16, &str, &str)]) {
    let mut wrong = String::new();
    for &(t, peer, method, port, path, expected) in rows {
        let seen = outcome(&world.ask(&call(address, (peer, method, port, path))));
        if seen != expected {
            wrong.push_str(&format!("{t}: {peer} {method} {port} {path}: {seen}, expected {expected}\n"));
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

const VM: &str = "10.0.1.5";

#[test]
fn who_may_call_the_payment_service() {
    let world = Yaml::seed().load(Who::Vm);
    assert_eq!(world.errors(), Vec::<String>::new());
    check(
        &world,
        VM,
        &[
            ("T15", FE, "GET", 8080, "/api/v1/x", APP),
            ("T15", FE, "GET", 8080, "/api/v1/x?y=1", APP),
            ("T15", FE, "GET", 8080, "/api/v1/", APP),
            ("T16", FE, "POST", 8080, "/api/v1/pay", APP),
            ("T17", FE, "PUT", 8080, "/api/v1/x", NONE),
            ("T17", FE, "DELETE", 8080, "/api/v1/x", NONE),
            ("T17", FE, "HEAD", 8080, "/api/v1/x", NONE),
            ("T17", FE, "OPTIONS", 8080, "/api/v1/x", NONE),
            ("T17", FE, "PATCH", 8080, "/api/v1/x", NONE),
            ("T18", FE, "GET", 8080, "/api/v1", NONE),
            ("T18", FE, "GET", 8080, "/API/v1/x", NONE),
            ("T18", FE, "GET", 8080, "/api/v2/x", NONE),
            ("T18", FE, "GET", 8080, "/api/v1x", NONE),
            ("T18", FE, "GET", 8080, "/health", NONE),
            ("T19", FE, "GET", 8080, "/api/v1/../admin", NONE),
            ("T19", FE, "GET", 8080, "/api/v1/%2e%2e/admin", NONE),
            ("T19", FE, "GET", 8080, "/api/v1/%2E%2E/admin", NONE),
            ("T19", FE, "GET", 8080, "/api/v1/..\\..\\admin", NONE),
            ("T19", FE, "GET", 8080, "/admin/../api/v1/x", APP),
            ("T19", FE, "GET", 8080, "/api/v1/./x", APP),
            ("T19", FE, "GET", 8080, "/api/v1/..%2fadmin", APP),
            ("T20", FE, "GET", 8080, "//api/v1/x", NONE),
            ("T20", FE, "GET", 8080, "/api//v1/x", NONE),
            ("T21", ORD, "GET", 8080, "/api/v1/x", NONE),
            ("T21", PAY, "GET", 8080, "/api/v1/x", NONE),
            ("T22", OTH, "GET", 8080, "/api/v1/x", DENIED),
            ("T22", OTH, "POST", 8080, "/api/v1/x", DENIED),
            ("T23", "plain", "GET", 8080, "/api/v1/x", NO_CHAIN),
            ("T23", "plain", "TCP", 8080, "", NO_CHAIN),
            ("T23", "plain", "GRPC", 9090, "/pkg.Svc/M", NO_CHAIN),
            ("T23", "plain", "GET", 9091, "/metrics", NO_CHAIN),
            ("T24", "nobody", "GET", 8080, "/api/v1/x", HANDSHAKE),
            ("T24", "nobody", "GRPC", 8080, "/api/v1/x", HANDSHAKE),
            ("T26", FE, "GRPC", 9090, "/pkg.Svc/M", NONE),
            ("T26", OTH, "GRPC", 9090, "/pkg.Svc/M", DENIED),
            ("T26", ORD, "GRPC", 9090, "/pkg.Svc/M", NONE),
            ("T26", FE, "GRPC", 9090, "/api/v1/M", GRPC_APP),
            ("T27", FE, "GET", 9091, "/metrics", NONE),
            ("T27", FE, "GET", 9091, "/api/v1/x", PASSTHROUGH),
            ("T28", FE, "TCP", 9091, "", CLOSED),
        ],
    );
}

#[test]
fn t20_merged_slashes() {
    let world = Yaml::seed().mesh("pathNormalization: {normalization: MERGE_SLASHES}").load(Who::Vm);
    let rows = [("T20", FE, "GET", 8080, "//api/v1/x", APP), ("T20", FE, "GET", 8080, "/api//v1/x", APP)];
    check(&world, VM, &rows);
}

/// The peer's certificate must be of the mesh's domain; a trust domain of its own makes `cluster.local` a stranger.
#[test]
fn t25_t58_whose_certificates_are_taken() {
    for (t, mesh, domain) in [("T25", "", "cluster.local"), ("T58", "trustDomain: corp", "corp")] {
        let world = Yaml::seed().mesh(mesh).load(Who::Database);
        let chains = &world.loaded.model.listeners["virtualInbound"].filter_chains;
        let mut seen = 0;
        for tls in chains.iter().filter_map(|chain| chain.tls.as_ref()) {
            let validation = format!("{:?}", tls.common.validation.as_ref().expect("peers are checked"));
            assert!(validation.contains(&format!("spiffe://{domain}/")), "{t}: {validation}");
            assert_eq!(domain == "corp", !validation.contains("cluster.local"), "{t}: {validation}");
            assert!(tls.require_client_certificate, "{t}");
            seen += 1;
        }
        assert!(seen > 3, "{t}");
    }
}

#[test]
fn t29_only_the_denial_and_strict() {
    let world = Yaml::seed().without(&["Y9"]).load(Who::Vm);
    let mut rows = Vec::new();
    for peer in [FE, ORD, PAY] {
        rows.extend([
            ("T29", peer, "GET", 8080, "/any", APP),
            ("T29", peer, "DELETE", 9091, "/metrics", PASSTHROUGH),
            ("T29", peer, "TCP", 9091, "", PASSTHROUGH),
            ("T29", peer, "GRPC", 9090, "/pkg.Svc/M", GRPC_APP),
        ]);
    }
    rows.extend([
        ("T29", OTH, "GET", 8080, "/any", DENIED),
        ("T29", OTH, "GET", 9091, "/metrics", DENIED),
        ("T29", OTH, "TCP", 9091, "", CLOSED_BY_DENY),
        ("T29", OTH, "GRPC", 9090, "/pkg.Svc/M", DENIED),
    ]);
    check(&world, VM, &rows);
}

#[test]
fn t30_plaintext_where_it_is_permitted() {
    for (without, expected) in
        [(&["Y11"][..], DENIED), (&["Y10", "Y11"], NONE), (&["Y9", "Y10", "Y11"], APP), (&["Y9", "Y11"], DENIED)]
    {
        let world = Yaml::seed().without(without).load(Who::Vm);
        let rows = [
            ("T30", "plain", "GET", 8080, "/api/v1/x", expected),
            // mTLS is still taken, and the same caller passes.
            ("T30", FE, "GET", 8080, "/api/v1/x", APP),
        ];
        check(&world, VM, &rows);
    }
}

const DATABASE: &str = "10.0.2.20";

#[test]
fn who_may_reach_the_database() {
    const APP: &str = "inbound|5432||";
    let world = Yaml::seed().load(Who::Database);
    check(
        &world,
        DATABASE,
        &[
            ("T53", API, "TCP", 5432, "", APP),
            ("T54", FE, "TCP", 5432, "", CLOSED),
            ("T54", OTH, "TCP", 5432, "", CLOSED),
            ("T54", DB, "TCP", 5432, "", CLOSED),
            ("T55", "plain", "TCP", 5432, "", NO_CHAIN),
            ("T56", API, "GET", 9187, "/metrics", NONE),
            ("T56", API, "TCP", 9187, "", CLOSED),
            ("T57", API, "GET", 5432, "/", APP),
            ("T57", FE, "GET", 5432, "/", NONE),
        ],
    );
}

#[test]
fn t58_another_trust_domain() {
    const CORP: &str = "spiffe://corp/ns/hybrid-app/sa/api-sa";
    let world = Yaml::seed().mesh("trustDomain: corp").load(Who::Database);
    let rows = [
        ("T58", CORP, "TCP", 5432, "", "inbound|5432||"),
        ("T58", "spiffe://corp/ns/other/sa/x", "TCP", 5432, "", CLOSED),
    ];
    check(&world, DATABASE, &rows);
}

#[test]
fn what_a_token_changes_is_explained() {
    let authn = "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: t, namespace: payments}\n\
        spec: {selector: {matchLabels: {app: payment-service}}, jwtRules: [{issuer: i, \
        jwks: '{\"keys\":[{\"kty\":\"oct\",\"k\":\"c2VjcmV0\"}]}'}]}\n";
    let authz = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: t, namespace: payments}\n\
        spec: {selector: {matchLabels: {app: payment-service}}, action: DENY, \
        rules: [{from: [{source: {notRequestPrincipals: [\"i/*\"]}}], to: [{operation: {paths: [/api/*]}}]}]}\n";
    let world = Yaml::seed().with("authn", authn).with("authz", authz).load(Who::Vm);
    assert_eq!(world.errors(), Vec::<String>::new());
    let token = |claims: Value| {
        let key = jsonwebtoken::EncodingKey::from_secret(b"secret");
        jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).expect("a token")
    };
    let ask = |authorization: &str| {
        let mut call = call(VM, (FE, "GET", 8080, "/api/v1/x"));
        call["headers"] = json!({"authorization": authorization});
        world.ask(&call)
    };
    let verdict = |authorization: &str| {
        let answer = ask(authorization);
        let jwt = answer.policies.iter().find(|policy| policy.filter == "jwt").expect("it is asked").to_string();
        (outcome(&answer), jwt)
    };
    let bearer = |claims: Value| format!("Bearer {}", token(claims));
    let denied = "403 [ns[payments]-policy[t]-rule[0]]".to_owned();
    assert_eq!(verdict(""), (denied, "jwt allows: no token is needed".to_owned()));
    let good = verdict(&bearer(json!({"iss": "i", "sub": "s"})));
    assert_eq!(good, (APP.to_owned(), "jwt allows: a token is good".to_owned()));
    let stranger = verdict(&bearer(json!({"iss": "j", "sub": "s"})));
    assert_eq!(stranger.1, "jwt denies: Jwt issuer is not configured");
    assert_eq!(stranger.0, "401 jwt_authn_access_denied{Jwt_issuer_is_not_configured}");
}
