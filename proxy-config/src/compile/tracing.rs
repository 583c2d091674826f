//! Tracing settings of connection managers without a provider: what is sampled and tagged.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::model::Tracing;
use crate::registry::Proxy;

/// Share of new traces that are sampled when nothing says otherwise, in percent.
pub const DEFAULT_SAMPLING: f64 = 1.0;

/// The settings that istiod gives every connection manager while mesh tracing is enabled.
pub fn without_provider(proxy: &Proxy, sampling: Option<f64>) -> Tracing {
    let sampling = sampling.filter(|s| *s > 0.0).map_or(DEFAULT_SAMPLING, |s| if s > 100.0 { 1.0 } else { s });
    Tracing {
        client_sampling: Some(100.0),
        random_sampling: Some(sampling),
        overall_sampling: Some(100.0),
        provider: None,
        custom_tags: istio_tags(proxy),
        max_path_tag_length: None,
    }
}

fn istio_tags(proxy: &Proxy) -> BTreeMap<String, Value> {
    let label = |name: &str, otherwise: &str| text(proxy.labels.get(name).map(String::as_str), otherwise);
    let metadata = |name: &str| text(proxy.metadata.get(name).and_then(Value::as_str), "unknown");
    let literals = [
        ("istio.canonical_revision", label("service.istio.io/canonical-revision", "latest")),
        ("istio.canonical_service", label("service.istio.io/canonical-name", "unknown")),
        ("istio.mesh_id", metadata("MESH_ID")),
        ("istio.namespace", text(Some(proxy.namespace.as_str()), "default")),
        ("istio.cluster_id", text(Some(proxy.cluster_id.as_str()), "unknown")),
    ];
    let mut tags: BTreeMap<String, Value> =
        literals.into_iter().map(|(tag, value)| (tag.to_owned(), json!({"literal": {"value": value}}))).collect();
    for action in ["allow", "deny"] {
        for (what, key) in [("name", "effective_policy_id"), ("result", "engine_result")] {
            let key = format!("istio_dry_run_{action}_shadow_{key}");
            tags.insert(
                format!("istio.authorization.dry_run.{action}_policy.{what}"),
                json!({"metadata": {
                    "kind": {"request": {}},
                    "metadata_key": {"key": "envoy.filters.http.rbac", "path": [{"key": key}]},
                }}),
            );
        }
    }
    tags
}

fn text(value: Option<&str>, otherwise: &str) -> String {
    value.filter(|v| !v.is_empty()).unwrap_or(otherwise).to_owned()
}

/// One tag of `ProxyConfig.tracing.customTags` as a connection manager holds it.
pub fn custom_tag(said: &Value) -> Value {
    let field = |outer: &str, inner: &str| said.get(outer).and_then(|v| v.get(inner)).cloned();
    let with_default = |kind: &str, outer: &str| {
        let mut tag = json!({kind: {"name": field(outer, "name").unwrap_or_default()}});
        if let Some(default) = field(outer, "defaultValue") {
            tag[kind]["default_value"] = default;
        }
        tag
    };
    if said.get("environment").is_some() {
        return with_default("environment", "environment");
    }
    if said.get("header").is_some() {
        return with_default("request_header", "header");
    }
    json!({"literal": {"value": field("literal", "value").unwrap_or_default()}})
}
