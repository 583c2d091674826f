//! Envoy's configuration: its own inbound side in front of the application, and outbound listeners to our inbound side.

use std::path::Path;

use bench_harness::envoy::{Server, address, bootstrap, hcm, options, tls_from_clients, tls_to};
use serde_json::{Value, json};

use super::world::{OURS, REMOTE};

/// Outbound listeners: to our inbound side with HTTP/1 or HTTP/2 inside.
pub(crate) const TO_OURS_H1: &str = "127.0.0.1:7001";
pub(crate) const TO_OURS_H2: &str = "127.0.0.1:7002";
/// To the gRPC port.
pub(crate) const TO_OURS_GRPC: &str = "127.0.0.1:7003";
/// With a certificate of the mesh that no policy names; with one of another root; as if we had another name.
pub(crate) const TO_OURS_AS_STRANGER: &str = "127.0.0.1:7004";
pub(crate) const TO_OURS_OF_OTHER_ROOT: &str = "127.0.0.1:7005";
pub(crate) const TO_OURS_AS_IF_OTHER: &str = "127.0.0.1:7006";
/// Bytes to our inbound side inside mTLS that agreed on HTTP/2.
pub(crate) const TLS_TO_OURS: &str = "127.0.0.1:7007";

/// What the istio.alpn filter would offer.
const ALPN_H1: &[&str] = &["istio-http/1.1", "istio", "http/1.1"];
const ALPN_H2: &[&str] = &["istio-h2", "istio", "h2"];
const WEB: &str = "10.9.0.1:8080";
const WEB_GRPC: &str = "10.9.0.1:9090";

/// Everything, with certificates below this folder.
pub(crate) fn config(dir: &Path) -> String {
    let (mut listeners, mut clusters) = (Vec::new(), Vec::new());
    for (at, certs, app) in [
        ("10.9.0.2:8080", "remote", "app-h1"),
        ("10.9.0.2:9090", "remote", "app-h2"),
        // Has the wrong name for the service that is asked for.
        ("10.9.0.3:8080", "stranger", "app-h1"),
    ] {
        let details = json!({"forward_client_cert_details": "APPEND_FORWARD",
            "set_current_client_cert_details": {"subject": true, "dns": true, "uri": true}});
        listeners.push(listener(at, manager(app, &[rbac()], details), Some(tls_from_clients(&dir.join(certs)))));
    }
    clusters.push(cluster("app-h1", "127.0.0.1:7080", "http_protocol_options", None));
    clusters.push(cluster("app-h2", "127.0.0.1:7090", "http2_protocol_options", None));
    for (at, certs, to, id, alpn) in [
        (TO_OURS_H1, "remote", WEB, OURS, ALPN_H1),
        (TO_OURS_H2, "remote", WEB, OURS, ALPN_H2),
        (TO_OURS_GRPC, "remote", WEB_GRPC, OURS, ALPN_H2),
        (TO_OURS_AS_STRANGER, "stranger", WEB, OURS, ALPN_H1),
        (TO_OURS_OF_OTHER_ROOT, "other/remote", WEB, OURS, ALPN_H1),
        (TO_OURS_AS_IF_OTHER, "remote", WEB, REMOTE, ALPN_H1),
    ] {
        let protocol = if alpn == ALPN_H2 { "http2_protocol_options" } else { "http_protocol_options" };
        let server = Server { sni: "outbound_.8080_._.web.shop.svc.cluster.local", id, alpn };
        listeners.push(listener(at, manager(at, &[], json!({})), None));
        clusters.push(cluster(at, to, protocol, Some(tls_to(&dir.join(certs), &server))));
    }
    let server = Server { sni: "outbound_.8080_._.web.shop.svc.cluster.local", id: OURS, alpn: ALPN_H2 };
    let bytes = json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "bytes", "cluster": "bytes"}});
    listeners.push(listener(TLS_TO_OURS, bytes, None));
    clusters.push(cluster("bytes", WEB, "http_protocol_options", Some(tls_to(&dir.join("remote"), &server))));
    bootstrap(&json!(listeners), &json!(clusters)).to_string()
}

fn manager(cluster: &str, filters: &[Value], mut more: Value) -> Value {
    let route = json!({"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}});
    more["upgrade_configs"] = json!([{"upgrade_type": "websocket"}]);
    hcm(cluster, &json!([{"name": "all", "domains": ["*"], "routes": [route]}]), filters, &more)
}

/// What our side says as an AuthorizationPolicy.
fn rbac() -> Value {
    let paths: Vec<Value> = ["/heads", "/echo", "/ws", "/test.Echo/"]
        .iter()
        .map(|path| json!({"url_path": {"path": {"prefix": path}}}))
        .collect();
    json!({"name": "envoy.filters.http.rbac", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC",
        "rules": {"action": "ALLOW", "policies": {"ours": {
            "permissions": [{"or_rules": {"rules": paths}}],
            "principals": [{"authenticated": {"principal_name": {"exact": OURS}}}]}}}}})
}

fn socket(at: &str) -> Value {
    let (host, port) = at.rsplit_once(':').expect("HOST:PORT");
    address(host, port.parse().expect("a port"))
}

fn listener(at: &str, filter: Value, tls: Option<Value>) -> Value {
    let mut chain = json!({"filters": [filter]});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({"name": at, "address": socket(at), "filter_chains": [chain]})
}

fn cluster(name: &str, to: &str, protocol: &str, tls: Option<Value>) -> Value {
    let mut cluster = json!({"name": name, "type": "STATIC", "connect_timeout": "10s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket(to)}}]}]},
        "typed_extension_protocol_options": options(&json!({"explicit_http_config": {protocol: {}}}))});
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls;
    }
    cluster
}
