//! Static configuration for Envoy, as istiod would have said it, without Istio's own filters (they are not in this build).

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::case::{B, Case, HOSTS, PORT, PRINCIPAL, RULES, Rule, SERVER, host, vip};
use crate::envoy::{Server, address, bootstrap, hcm, options, original_dst, tls_from_clients, tls_to};

/// Writes the configuration of the proxy beside the service, and beside the caller.
///
/// # Errors
/// When a file cannot be written.
pub(super) fn write(case: &Case, folder: &Path, certs: &Path) -> Result<()> {
    fs::write(folder.join("envoy-b.json"), inbound(case, &certs.join("b")).to_string())?;
    Ok(fs::write(folder.join("envoy-a.json"), outbound(case, &certs.join("a")).to_string())?)
}

fn inbound(case: &Case, certs: &Path) -> Value {
    let http = if case.mtls {
        json!({"forward_client_cert_details": "APPEND_FORWARD",
               "set_current_client_cert_details": {"subject": true, "dns": true, "uri": true}})
    } else {
        json!({})
    };
    let retry = json!({"retry_on": "reset-before-request", "num_retries": 2});
    let route = json!({"match": {"prefix": "/"}, "decorator": {"operation": "svc"},
                       "route": {"cluster": "inbound", "timeout": "0s", "retry_policy": retry}});
    let hosts = json!([{"name": "inbound|http|8080", "domains": ["*"], "routes": [route]}]);
    let rbac = json!({"name": "envoy.filters.http.rbac", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC", "rules": rules(case)}});
    let mut chain = json!({"filters": [hcm("inbound", &hosts, &[rbac], &http)]});
    if case.mtls {
        chain["transport_socket"] = tls_from_clients(certs);
    }
    let listener = json!({"name": "virtualInbound", "address": address("0.0.0.0", 15006), "filter_chains": [chain],
                          "listener_filters": [original_dst()], "per_connection_buffer_limit_bytes": 32768});
    let cluster = json!({"name": "inbound", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "10s", "circuit_breakers": breakers(),
        "upstream_bind_config": {"source_address": {"address": "127.0.0.6", "port_value": 0}},
        "typed_extension_protocol_options": options(&json!({"explicit_http_config": {"http_protocol_options": {}}}))});
    bootstrap(&json!([listener]), &json!([cluster]))
}

fn outbound(case: &Case, certs: &Path) -> Value {
    let retry = json!({"retry_on": "connect-failure,refused-stream,unavailable,retriable-status-codes", "num_retries": 2,
        "retriable_status_codes": [503], "host_selection_retry_max_attempts": "5",
        "retry_host_predicate": [{"name": "envoy.retry_host_predicates.previous_hosts", "typed_config":
            {"@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"}}]});
    let hosts: Vec<Value> = (0..HOSTS)
        .map(|n| {
            let route = |prefix: &str| {
                json!({"match": {"prefix": prefix}, "decorator": {"operation": format!("{}:8080/*", host(n))},
                       "route": {"cluster": format!("svc-{n}"), "timeout": "0s", "retry_policy": retry}})
            };
            let short = format!("svc-{n}.apps");
            let mut domains = Vec::new();
            for name in [host(n), short, vip(n)] {
                domains.push(format!("{name}:8080"));
                domains.push(name);
            }
            json!({"name": format!("{}:8080", host(n)), "domains": domains, "include_request_attempt_count": true,
                   "routes": [route("/api/"), route("/")]})
        })
        .collect();
    let listeners = json!([
        {"name": "virtualOutbound", "address": address("0.0.0.0", 15001), "use_original_dst": true,
         "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": {
             "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
             "stat_prefix": "blackhole", "cluster": "svc-0"}}]}]},
        {"name": "0.0.0.0_8080", "address": address("0.0.0.0", PORT), "bind_to_port": false,
         "filter_chains": [{"filters": [hcm("outbound", &json!(hosts), &[], &json!({}))]}]}]);
    let clusters: Vec<Value> = (0..HOSTS).map(|n| service(case, n, certs)).collect();
    bootstrap(&listeners, &json!(clusters))
}

fn service(case: &Case, n: usize, certs: &Path) -> Value {
    let protocol = if case.h2_inside { "http2_protocol_options" } else { "http_protocol_options" };
    let name = format!("svc-{n}");
    let sni = format!("outbound_.8080_._.{}", host(n));
    let alpn = if case.h2_inside { "h2" } else { "http/1.1" };
    let server = Server { sni: &sni, id: &format!("spiffe://{SERVER}"), alpn: &[alpn] };
    json!({"name": name, "type": "STATIC", "lb_policy": "LEAST_REQUEST", "connect_timeout": "10s",
        "circuit_breakers": breakers(), "transport_socket": tls_to(certs, &server),
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [
            {"endpoint": {"address": address(B, PORT)}}]}]},
        "typed_extension_protocol_options": options(&json!({"explicit_http_config": {protocol: {}}}))})
}

fn breakers() -> Value {
    let most = u32::MAX;
    json!({"thresholds": [{"max_connections": most, "max_pending_requests": most, "max_requests": most,
                           "max_retries": most}]})
}

fn rules(case: &Case) -> Value {
    let policies: serde_json::Map<String, Value> = RULES
        .iter()
        .enumerate()
        .map(|(n, rule)| (format!("ns[apps]-policy[p{n}]-rule[0]"), policy(rule, case.mtls)))
        .collect();
    json!({"action": "ALLOW", "policies": policies})
}

fn policy(rule: &Rule, mtls: bool) -> Value {
    let any = |rules: Vec<Value>| json!({"or_rules": {"rules": rules}});
    let paths = rule.paths.iter().map(|path| {
        let matcher = path.strip_suffix('*').map_or_else(|| json!({"exact": path}), |start| json!({"prefix": start}));
        json!({"url_path": {"path": matcher}})
    });
    let mut what = vec![any(paths.collect())];
    if let Some(method) = rule.method {
        what.push(any(vec![json!({"header": {"name": ":method", "string_match": {"exact": method}}})]));
    }
    let mut who = Vec::new();
    if mtls {
        let name = json!({"exact": format!("spiffe://{PRINCIPAL}")});
        who.push(json!({"or_ids": {"ids": [{"authenticated": {"principal_name": name}}]}}));
    }
    if let Some((start, bits)) = rule.block.and_then(|block| block.split_once('/')) {
        let bits: u32 = bits.parse().unwrap_or(32);
        let range = json!({"address_prefix": start, "prefix_len": bits});
        who.push(json!({"or_ids": {"ids": [{"direct_remote_ip": range}]}}));
    }
    if let Some((name, value)) = rule.header {
        who.push(json!({"or_ids": {"ids": [{"header": {"name": name, "string_match": {"exact": value}}}]}}));
    }
    if who.is_empty() {
        who.push(json!({"any": true}));
    }
    json!({"permissions": [{"and_rules": {"rules": what}}], "principals": [{"and_ids": {"ids": who}}]})
}
