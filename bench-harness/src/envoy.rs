//! The reference: real Envoy with a static configuration, as istiod would have said it, without Istio's own filters (they are
//! not in this build).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Where `make` installs it.
pub const LAUNCHER: &str = "target/venv/bin/envoy";

const HCM: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";

/// Whom an upstream connection is for.
#[derive(Debug)]
pub struct Server<'a> {
    /// Server name.
    pub sni: &'a str,
    /// The SPIFFE id that it has to have.
    pub id: &'a str,
    /// Offered protocols.
    pub alpn: &'a [&'a str],
}

/// The program itself: the Python package's launcher cannot be read by the proxy's user.
///
/// # Errors
/// When there is none.
pub fn binary(envoy: &Path) -> Result<PathBuf> {
    let start = fs::read(envoy).with_context(|| format!("{} (make bench installs it)", envoy.display()))?;
    if !start.starts_with(b"#!") {
        return Ok(envoy.to_owned());
    }
    let lib = envoy.parent().and_then(Path::parent).context("a launcher inside a folder")?.join("lib");
    for entry in fs::read_dir(&lib).with_context(|| format!("cannot read {}", lib.display()))? {
        let inside = entry?.path().join("site-packages/envoy/_bin/envoy");
        if inside.exists() {
            return Ok(inside);
        }
    }
    anyhow::bail!("no Envoy below {}", lib.display())
}

/// Everything it is given.
pub fn bootstrap(listeners: &Value, clusters: &Value) -> Value {
    json!({"static_resources": {"listeners": listeners, "clusters": clusters},
           "layered_runtime": {"layers": [{"name": "static", "static_layer":
               {"overload.global_downstream_max_connections": 100_000}}]}})
}

/// An address with its port.
pub fn address(address: &str, port: u16) -> Value {
    json!({"socket_address": {"address": address, "port_value": port}})
}

/// Options of an upstream's HTTP.
pub fn options(protocol: &Value) -> Value {
    let mut options = protocol.clone();
    options["@type"] = json!("type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions");
    json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options})
}

/// The listener filter that asks where a redirected connection wanted to go.
pub fn original_dst() -> Value {
    json!({"name": "envoy.filters.listener.original_dst", "typed_config":
        {"@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"}})
}

/// A connection manager: virtual hosts, filters before the router, and other fields.
pub fn hcm(name: &str, hosts: &Value, filters: &[Value], more: &Value) -> Value {
    let router = json!({"name": "envoy.filters.http.router", "typed_config":
        {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}});
    let filters: Vec<&Value> = filters.iter().chain([&router]).collect();
    let mut config = json!({"@type": HCM, "stat_prefix": name, "server_name": "istio-envoy", "normalize_path": true,
        "use_remote_address": false, "http_filters": filters,
        "route_config": {"name": name, "virtual_hosts": hosts, "validate_clusters": false}});
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": config})
}

/// TLS that takes clients of the mesh only.
pub fn tls_from_clients(certs: &Path) -> Value {
    let mut context = tls(certs, "Downstream", &["h2", "http/1.1"], json!({}));
    context["typed_config"]["require_client_certificate"] = json!(true);
    context
}

/// TLS to a server of the mesh.
pub fn tls_to(certs: &Path, server: &Server<'_>) -> Value {
    let names = json!([{"san_type": "URI", "matcher": {"exact": server.id}}]);
    let mut context = tls(certs, "Upstream", server.alpn, json!({"match_typed_subject_alt_names": names}));
    context["typed_config"]["sni"] = json!(server.sni);
    context
}

fn tls(certs: &Path, side: &str, alpn: &[&str], mut validation: Value) -> Value {
    let file = |name: &str| json!({"filename": certs.join(name).to_string_lossy()});
    validation["trusted_ca"] = file("root-cert.pem");
    let common = json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": file("cert-chain.pem"), "private_key": file("key.pem")}],
        "validation_context": validation, "alpn_protocols": alpn});
    json!({"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{side}TlsContext"),
        "common_tls_context": common}})
}
