//! Tracing of connection managers.

use std::mem::take;

use base64::Engine as _;
use envoy_types::pb::envoy::config::core::v3::{grpc_service, http_uri};
use envoy_types::pb::envoy::config::trace::v3::{OpenTelemetryConfig, ZipkinConfig, tracing};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager as hcm;
use envoy_types::pb::envoy::r#type::metadata::v3::{MetadataKey, MetadataKind, metadata_key, metadata_kind};
use envoy_types::pb::envoy::r#type::tracing::v3::{CustomTag, custom_tag};
use serde_json::{Map, Value, json};

use super::context::{At, Read, Reader, type_name};
use super::value;
use crate::model::Tracing;

/// What is sampled, tagged and where it is reported.
pub(super) fn settings(mut of: hcm::Tracing, reader: &mut Reader) -> Read<Tracing> {
    let out = Tracing {
        client_sampling: of.client_sampling.take().map(|p| p.value),
        random_sampling: of.random_sampling.take().map(|p| p.value),
        overall_sampling: of.overall_sampling.take().map(|p| p.value),
        provider: of.provider.take().map(|p| provider(p, reader)).transpose().at("provider")?,
        custom_tags: take(&mut of.custom_tags).into_iter().filter_map(|t| tag(t, reader)).collect(),
        max_path_tag_length: value::number(&mut of.max_path_tag_length),
    };
    reader.done(&of);
    Ok(out)
}

/// A provider that we know in detail is spelled out, any other one keeps its bytes.
fn provider(of: tracing::Http, reader: &mut Reader) -> Read<Value> {
    let mut out = Map::from_iter([("name".to_owned(), Value::String(of.name))]);
    if let Some(tracing::http::ConfigType::TypedConfig(any)) = of.config_type {
        let mut config = Map::new();
        config.insert("@type".to_owned(), Value::String(any.type_url.clone()));
        if type_name(&any.type_url) == "envoy.config.trace.v3.ZipkinConfig" {
            zipkin(reader.unpack(&any)?, &mut config, reader);
        } else if type_name(&any.type_url) == "envoy.config.trace.v3.OpenTelemetryConfig" {
            opentelemetry(reader.unpack(&any)?, &mut config, reader);
        } else {
            let bytes = base64::engine::general_purpose::STANDARD.encode(&any.value);
            config.insert("value".to_owned(), Value::String(bytes));
        }
        out.insert("typed_config".to_owned(), Value::Object(config));
    }
    Ok(Value::Object(out))
}

fn zipkin(mut of: ZipkinConfig, out: &mut Map<String, Value>, reader: &mut Reader) {
    let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
    for (key, field) in [
        ("collector_cluster", &mut of.collector_cluster),
        ("collector_endpoint", &mut of.collector_endpoint),
        ("collector_hostname", &mut of.collector_hostname),
    ] {
        if let Some(text) = value::text(field) {
            put(key, Value::String(text));
        }
    }
    if of.collector_endpoint_version != 0 {
        put("collector_endpoint_version", json!(of.collector_endpoint_version().as_str_name()));
        take(&mut of.collector_endpoint_version);
    }
    if of.trace_context_option != 0 {
        put("trace_context_option", json!(of.trace_context_option().as_str_name()));
        take(&mut of.trace_context_option);
    }
    for (key, field) in [
        ("trace_id_128bit", take(&mut of.trace_id_128bit).then_some(true)),
        ("shared_span_context", value::flag(&mut of.shared_span_context)),
    ] {
        if let Some(flag) = field {
            put(key, Value::Bool(flag));
        }
    }
    if let Some(mut service) = of.collector_service.take() {
        let mut uri = service.http_uri.take().unwrap_or_default();
        let cluster = uri.http_upstream_type.take().map(|http_uri::HttpUpstreamType::Cluster(c)| c);
        let timeout = value::duration(&mut uri.timeout).map(value::duration_text);
        put(
            "collector_service",
            json!({"http_uri": {"uri": take(&mut uri.uri), "cluster": cluster, "timeout": timeout}}),
        );
        reader.done(&service);
    }
    reader.done(&of);
}

fn opentelemetry(mut of: OpenTelemetryConfig, out: &mut Map<String, Value>, reader: &mut Reader) {
    out.insert("service_name".to_owned(), Value::String(take(&mut of.service_name)));
    if let Some(grpc_service::TargetSpecifier::EnvoyGrpc(grpc)) =
        of.grpc_service.take().and_then(|service| service.target_specifier)
    {
        let authority = if grpc.authority.is_empty() { grpc.cluster_name.clone() } else { grpc.authority };
        out.insert("grpc_service".to_owned(), json!({"cluster": grpc.cluster_name, "authority": authority}));
    }
    if let Some(mut service) = of.http_service.take() {
        let mut uri = service.http_uri.take().unwrap_or_default();
        let cluster = uri.http_upstream_type.take().map(|http_uri::HttpUpstreamType::Cluster(c)| c);
        let timeout = value::duration(&mut uri.timeout).map(value::duration_text);
        let uri = json!({"http_uri": {"uri": take(&mut uri.uri), "cluster": cluster, "timeout": timeout}});
        out.insert("http_service".to_owned(), uri);
        reader.done(&service);
    }
    if let Some(sampler) = of.sampler.take() {
        out.insert("sampler".to_owned(), json!({"name": sampler.name}));
    }
    reader.done(&of);
}

fn tag(of: CustomTag, reader: &mut Reader) -> Option<(String, Value)> {
    let with_default = |name: String, default: String| {
        let mut out = json!({ "name": name });
        if !default.is_empty() {
            out["default_value"] = Value::String(default);
        }
        out
    };
    let value = match of.r#type? {
        custom_tag::Type::Literal(l) => json!({"literal": {"value": l.value}}),
        custom_tag::Type::Environment(e) => json!({"environment": with_default(e.name, e.default_value)}),
        custom_tag::Type::RequestHeader(h) => json!({"request_header": with_default(h.name, h.default_value)}),
        custom_tag::Type::Metadata(m) => json!({"metadata": metadata(m, reader)}),
        custom_tag::Type::Value(v) => json!({ "value": v }),
    };
    Some((of.tag, value))
}

fn metadata(mut of: custom_tag::Metadata, reader: &mut Reader) -> Value {
    let mut out = Map::new();
    if let Some(MetadataKind { kind: Some(kind) }) = of.kind.take() {
        let kind = match kind {
            metadata_kind::Kind::Request(_) => "request",
            metadata_kind::Kind::Route(_) => "route",
            metadata_kind::Kind::Cluster(_) => "cluster",
            metadata_kind::Kind::Host(_) => "host",
        };
        out.insert("kind".to_owned(), json!({ kind: {} }));
    }
    if let Some(MetadataKey { key, path }) = of.metadata_key.take() {
        let segment = |s: metadata_key::PathSegment| match s.segment {
            Some(metadata_key::path_segment::Segment::Key(key)) => json!({ "key": key }),
            Some(metadata_key::path_segment::Segment::Index(index)) => json!({ "index": index }),
            None => json!({}),
        };
        let path: Vec<Value> = path.into_iter().map(segment).collect();
        out.insert("metadata_key".to_owned(), json!({"key": key, "path": path}));
    }
    if let Some(default) = value::text(&mut of.default_value) {
        out.insert("default_value".to_owned(), Value::String(default));
    }
    reader.done(&of);
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_spelled_as_the_compiler_spells_them() {
        let environment = custom_tag::Environment { name: "E".to_owned(), default_value: "d".to_owned() };
        let message = CustomTag { tag: "t".to_owned(), r#type: Some(custom_tag::Type::Environment(environment)) };
        let expected = json!({"environment": {"name": "E", "default_value": "d"}});
        assert_eq!(tag(message, &mut Reader::default()), Some(("t".to_owned(), expected)));
    }
}
