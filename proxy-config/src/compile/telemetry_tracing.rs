//! Tracing of a direction: where spans go, how many there are, what they carry.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::telemetry::{Context, Source, collector, default_providers, matches, provider, refuse};
use super::tracing;
use super::view::Told;
use crate::istio::mesh_config::ExtensionProvider;
use crate::model::{Reject, Tracing};

/// What Telemetry objects say together.
#[derive(Default)]
struct Spec {
    provider: Option<String>,
    sampling: Option<f64>,
    disabled: bool,
    tags: Option<BTreeMap<String, Value>>,
    istio_tags: Option<bool>,
    by_request_id: Option<bool>,
}

/// The tracing of a direction.
pub(super) fn fill(
    levels: &[Source<'_>],
    context: Context<'_>,
    inbound: bool,
    rejects: &mut Vec<Reject>,
    out: &mut Told,
) {
    out.trace_by_request_id = true;
    let default = default_providers(context.mesh, "tracing").into_iter().next();
    let said: Vec<_> = levels.iter().flat_map(|level| &level.spec.tracing).collect();
    if said.is_empty() && default.is_none() {
        out.tracing = (context.mesh.enable_tracing != Some(false)).then(|| of_mesh(context));
        return;
    }
    let mut spec = Spec { provider: default, ..Spec::default() };
    for said in said.into_iter().filter(|said| matches(said.matches, inbound)) {
        spec.provider = said.providers.first().map(|provider| provider.name.clone()).or(spec.provider);
        spec.sampling = said.random_sampling_percentage.or(spec.sampling);
        spec.disabled = said.disable_span_reporting.unwrap_or(spec.disabled);
        spec.tags = said.custom_tags.clone().or(spec.tags);
        spec.istio_tags = said.enable_istio_tags.or(spec.istio_tags);
        spec.by_request_id = said.use_request_id_for_trace_sampling.or(spec.by_request_id);
    }
    let Some(name) = spec.provider.take() else { return };
    let Some(provider) = provider(context.mesh, &name) else {
        return refuse(&name, "there is no such provider; nothing is traced", rejects);
    };
    if spec.disabled {
        return;
    }
    out.trace_by_request_id = spec.by_request_id != Some(false);
    out.tracing = of_provider(&provider, &spec, context, rejects);
}

/// The mesh's own fields and the proxy's configuration: nobody to report to.
fn of_mesh(context: Context<'_>) -> Tracing {
    let said = context.config.tracing.as_ref();
    let mut out = tracing::without_provider(context.proxy, said.map(|t| t.sampling));
    custom_tags(context, &Spec::default(), &mut out);
    out.max_path_tag_length = said.map(|t| t.max_path_tag_length).filter(|l| *l > 0);
    out
}

/// Istio's tags, those of the proxy's configuration, those of Telemetry; later ones win.
fn custom_tags(context: Context<'_>, spec: &Spec, out: &mut Tracing) {
    let said = context.config.tracing.as_ref();
    if spec.istio_tags.or_else(|| said.and_then(|t| t.enable_istio_tags)) == Some(false) {
        out.custom_tags.clear();
    }
    let of_proxy = said.iter().flat_map(|t| &t.custom_tags);
    let tags: Vec<(&String, &Value)> = match &spec.tags {
        Some(tags) => tags.iter().collect(),
        None => of_proxy.collect(),
    };
    for (tag, value) in tags {
        out.custom_tags.insert(tag.clone(), tracing::custom_tag(value));
    }
}

fn of_provider(
    provider: &ExtensionProvider,
    spec: &Spec,
    context: Context<'_>,
    rejects: &mut Vec<Reject>,
) -> Option<Tracing> {
    let (kind, settings) = provider.kind.iter().next()?;
    let known = match kind.as_str() {
        "zipkin" => zipkin(settings, context),
        "opentelemetry" => opentelemetry(settings, context),
        other => {
            let reason = format!("tracing by {other} is not supported; nothing is traced");
            refuse(&provider.name, &reason, rejects);
            return None;
        }
    };
    let Some(config) = known else {
        refuse(&provider.name, "there is no such service; nothing is traced", rejects);
        return None;
    };
    let of_proxy = context.config.tracing.as_ref();
    let mut out = tracing::without_provider(context.proxy, of_proxy.map(|t| t.sampling));
    if let Some(sampling) = spec.sampling {
        out.random_sampling = Some(sampling);
    }
    custom_tags(context, spec, &mut out);
    out.provider = Some(config);
    let length = settings["maxTagLength"].as_u64().and_then(|length| u32::try_from(length).ok()).filter(|l| *l > 0);
    out.max_path_tag_length = length.or_else(|| of_proxy.map(|t| t.max_path_tag_length).filter(|l| *l > 0));
    Some(out)
}

fn zipkin(settings: &Value, context: Context<'_>) -> Option<Value> {
    let (cluster, host) = collector(settings, context)?;
    let path = settings["path"].as_str().filter(|path| !path.is_empty()).unwrap_or("/api/v2/spans");
    let timeout = settings["timeout"].as_str().unwrap_or("5s");
    let mut config = json!({
        "@type": "type.googleapis.com/envoy.config.trace.v3.ZipkinConfig",
        "collector_endpoint_version": "HTTP_JSON",
        "collector_service": {
            "http_uri": {"uri": format!("http://{host}{path}"), "cluster": cluster, "timeout": timeout},
        },
        "shared_span_context": false,
    });
    if settings["enable64bitTraceId"] != true {
        config["trace_id_128bit"] = Value::Bool(true);
    }
    if let Some(option) = settings["traceContextOption"].as_str().filter(|option| *option != "USE_B3") {
        config["trace_context_option"] = json!(option);
    }
    Some(json!({"name": "envoy.tracers.zipkin", "typed_config": config}))
}

fn opentelemetry(settings: &Value, context: Context<'_>) -> Option<Value> {
    let (cluster, host) = collector(settings, context)?;
    let mut config = json!({
        "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
        "service_name": service_name(context),
    });
    if settings["http"].is_object() {
        let path = settings["http"]["path"].as_str().unwrap_or_default();
        let timeout = settings["http"]["timeout"].as_str().unwrap_or("10s");
        let uri = format!("http://{host}:{}{path}", settings["port"]);
        config["http_service"] = json!({"http_uri": {"uri": uri, "cluster": cluster, "timeout": timeout}});
    } else {
        config["grpc_service"] = json!({"cluster": cluster, "authority": host});
    }
    Some(json!({"name": "envoy.tracers.opentelemetry", "typed_config": config}))
}

/// The name of this service in traces: `APP.NAMESPACE`.
fn service_name(context: Context<'_>) -> String {
    let proxy = context.proxy;
    let app = proxy.labels.get("app").or_else(|| proxy.labels.get("service.istio.io/canonical-name"));
    match app {
        Some(app) => format!("{app}.{}", proxy.namespace),
        None => format!("{}.{}", proxy.name, proxy.namespace),
    }
}
