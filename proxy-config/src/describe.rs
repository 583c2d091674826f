//! Messages as JSON with field names, for `/config_dump`, and back, for dumps that are read as input.
//!
//! Works on bytes and descriptors, not on the decoded types: what nobody reads is shown too. Nested `Any`s are shown
//! with their type; one whose type is not known is shown as base64. The descriptors are those of `envoy-types`, embedded
//! at build time, and a few of Istio's own, written here. Unpacking them takes milliseconds and about 10 MB, so they
//! are made for one dump and dropped.

use std::io::Read;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use prost::Message;
use prost_reflect::prost_types::field_descriptor_proto::{Label, Type};
use prost_reflect::prost_types::{
    DescriptorProto, EnumDescriptorProto, EnumValueDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet, MessageOptions,
};
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor,
    ReflectMessage, Value as Field,
};
use serde_json::{Map, Value, json};

use crate::xds::Any;

/// Packed `FileDescriptorSet`; empty when the build found none.
const PACKED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.gz"));
/// Where every type URL begins.
const PREFIX: &str = "type.googleapis.com/";
const ANY: &str = "google.protobuf.Any";
/// How deep messages are shown; protobuf itself stops at 100.
const MAX_DEPTH: usize = 100;

/// What is known about messages.
#[derive(Debug, Clone)]
pub struct Descriptors(DescriptorPool);

impl Descriptors {
    /// Unpacks them. `None`: the build went without.
    pub fn load() -> Option<Self> {
        if PACKED.is_empty() {
            return None;
        }
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(PACKED).read_to_end(&mut bytes).expect("packed by our own build");
        let mut pool = DescriptorPool::new();
        let set = FileDescriptorSet::decode(&*bytes).expect("packed by our own build");
        pool.add_file_descriptor_protos(set.file).expect("a set that a compiler made is complete");
        let own = own_files().into_iter().filter(|file| pool.get_file_by_name(file.name()).is_none());
        let own: Vec<FileDescriptorProto> = own.collect();
        pool.add_file_descriptor_protos(own).expect("tested: they are complete");
        Some(Self(pool))
    }

    /// A message with its type, as `{"@type": …}` with proto field names. One of an unknown type, or malformed, shows
    /// its bytes under `value` as base64.
    pub fn json(&self, type_url: &str, bytes: &[u8]) -> Value {
        self.any(type_url, bytes, 0)
    }

    /// A message that was shown as JSON, in either spelling of field names, as bytes. An extension of unknown type
    /// becomes a `TypedStruct` that says which.
    ///
    /// # Errors
    /// What does not fit the type, or an object without a known `@type`.
    pub fn message(&self, shown: &Value) -> Result<Any, String> {
        let mut shown = shown.clone();
        let type_url = shown.get("@type").and_then(Value::as_str).ok_or("no @type")?.to_owned();
        let name = type_url.rsplit('/').next().unwrap_or_default();
        let descriptor = self.0.get_message_by_name(name).ok_or_else(|| format!("unknown type {name}"))?;
        if let Some(fields) = shown.as_object_mut() {
            fields.remove("@type");
        }
        self.prepare(&mut shown, &descriptor);
        let options = DeserializeOptions::new().deny_unknown_fields(false);
        let message =
            DynamicMessage::deserialize_with_options(descriptor, shown, &options).map_err(|e| e.to_string())?;
        Ok(Any { type_url, value: Bytes::from(message.encode_to_vec()) })
    }

    /// Makes what the parser refuses readable: an `Any` of unknown type is wrapped, an empty one is left out.
    fn prepare(&self, shown: &mut Value, descriptor: &MessageDescriptor) {
        let Value::Object(fields) = shown else { return };
        let of = |name: &str| message_of(&field_of(descriptor, name)?);
        fields.retain(|name, value| {
            !(value.as_object().is_some_and(Map::is_empty) && of(name).is_some_and(|of| of.full_name() == ANY))
        });
        for (name, value) in fields {
            let Some(inner) = of(name) else { continue };
            match value {
                Value::Array(items) => items.iter_mut().for_each(|item| self.prepare_field(item, &inner)),
                Value::Object(entries) if field_of(descriptor, name).is_some_and(|field| field.is_map()) => {
                    entries.values_mut().for_each(|item| self.prepare_field(item, &inner));
                }
                one => self.prepare_field(one, &inner),
            }
        }
    }

    fn prepare_field(&self, value: &mut Value, descriptor: &MessageDescriptor) {
        if descriptor.full_name() != ANY {
            return self.prepare(value, descriptor);
        }
        let Some(url) = value.get("@type").and_then(Value::as_str).map(str::to_owned) else { return };
        if let Some(known) = self.0.get_message_by_name(url.rsplit('/').next().unwrap_or_default()) {
            return self.prepare(value, &known);
        }
        let mut inner = value.take();
        if let Some(fields) = inner.as_object_mut() {
            fields.remove("@type");
        }
        *value = json!({ "@type": format!("{PREFIX}xds.type.v3.TypedStruct"), "typeUrl": url, "value": inner });
    }

    fn any(&self, type_url: &str, bytes: &[u8], depth: usize) -> Value {
        if type_url.is_empty() && bytes.is_empty() {
            return Value::Object(Map::new());
        }
        let opaque = || json!({ "@type": type_url, "value": BASE64.encode(bytes) });
        let name = type_url.rsplit('/').next().unwrap_or_default();
        let Some(descriptor) = self.0.get_message_by_name(name).filter(|_| depth < MAX_DEPTH) else { return opaque() };
        let Ok(message) = DynamicMessage::decode(descriptor, bytes) else { return opaque() };
        match self.object(&message, depth) {
            Value::Object(fields) if !is_special(name) => {
                let typed = [("@type".to_owned(), Value::from(type_url))];
                Value::Object(typed.into_iter().chain(fields).collect())
            }
            special => json!({ "@type": type_url, "value": special }),
        }
    }

    fn object(&self, message: &DynamicMessage, depth: usize) -> Value {
        let descriptor = message.descriptor();
        let name = descriptor.full_name();
        if name == ANY {
            let text = message.get_field_by_name("type_url");
            let bytes = message.get_field_by_name("value");
            let url = text.as_deref().and_then(Field::as_str).unwrap_or_default();
            let bytes = bytes.as_deref().and_then(Field::as_bytes).cloned().unwrap_or_default();
            return self.any(url, &bytes, depth + 1);
        }
        if is_special(name) {
            return serde_json::to_value(message).unwrap_or(Value::Null);
        }
        let field = |(descriptor, value): (FieldDescriptor, &Field)| {
            (descriptor.name().to_owned(), self.value(value, &descriptor.kind(), depth + 1))
        };
        Value::Object(message.fields().map(field).collect())
    }

    fn value(&self, value: &Field, kind: &Kind, depth: usize) -> Value {
        match value {
            Field::Bool(on) => Value::from(*on),
            Field::I32(number) => Value::from(*number),
            Field::U32(number) => Value::from(*number),
            Field::I64(number) => Value::from(number.to_string()),
            Field::U64(number) => Value::from(number.to_string()),
            Field::F32(number) => float(f64::from(*number)),
            Field::F64(number) => float(*number),
            Field::String(text) => Value::from(text.as_str()),
            Field::Bytes(bytes) => Value::from(BASE64.encode(bytes)),
            Field::EnumNumber(number) => match kind {
                Kind::Enum(names) => {
                    names.get_value(*number).map_or_else(|| Value::from(*number), |v| Value::from(v.name()))
                }
                _ => Value::from(*number),
            },
            Field::Message(message) => self.object(message, depth),
            Field::List(items) => items.iter().map(|item| self.value(item, kind, depth)).collect(),
            Field::Map(entries) => {
                let of = match kind {
                    Kind::Message(entry) => entry.map_entry_value_field().kind(),
                    other => other.clone(),
                };
                let entry = |(key, item): (&MapKey, &Field)| (key_text(key), self.value(item, &of, depth));
                Value::Object(entries.iter().map(entry).collect::<Map<_, _>>())
            }
        }
    }
}

/// A field by either spelling of its name.
fn field_of(descriptor: &MessageDescriptor, name: &str) -> Option<FieldDescriptor> {
    descriptor.get_field_by_name(name).or_else(|| descriptor.get_field_by_json_name(name))
}

/// The message that a field, or each of its items, holds.
fn message_of(field: &FieldDescriptor) -> Option<MessageDescriptor> {
    match field.kind() {
        Kind::Message(entry) if field.is_map() => entry.map_entry_value_field().kind().as_message().cloned(),
        kind => kind.as_message().cloned(),
    }
}

fn float(number: f64) -> Value {
    if number.is_nan() {
        return Value::from("NaN");
    }
    serde_json::Number::from_f64(number)
        .map_or_else(|| Value::from(if number > 0.0 { "Infinity" } else { "-Infinity" }), Value::Number)
}

fn key_text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(on) => on.to_string(),
        MapKey::I32(number) => number.to_string(),
        MapKey::I64(number) => number.to_string(),
        MapKey::U32(number) => number.to_string(),
        MapKey::U64(number) => number.to_string(),
        MapKey::String(text) => text.clone(),
    }
}

/// Messages whose JSON is not an object of their fields.
fn is_special(name: &str) -> bool {
    let Some(short) = name.strip_prefix("google.protobuf.") else { return false };
    matches!(short, "Duration" | "Timestamp" | "Struct" | "Value" | "ListValue" | "FieldMask")
        || short.ends_with("Value")
}

/// Istio's messages, which the library lacks, see `xds::messages`: names and numbers of their fields.
fn own_files() -> Vec<FileDescriptorProto> {
    use Type::{Bool, Enum, Message, String};
    let text = |name, number| field(name, number, String, "");
    let texts = |name, number| many(text(name, number));
    let alpn = "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig";
    let table = "istio.networking.nds.v1.NameTable";
    let mut protocol = field("upstream_protocol", 1, Enum, &format!(".{alpn}.Protocol"));
    protocol.label = Some(Label::Optional.into());
    let mut filter = message(
        "FilterConfig",
        vec![many(field("alpn_override", 1, Message, &format!(".{alpn}.AlpnOverride")))],
        vec![message("AlpnOverride", vec![protocol, texts("alpn_override", 2)], vec![])],
    );
    filter.enum_type = vec![protocols()];
    let mut entry =
        message("TableEntry", vec![text("key", 1), field("value", 2, Message, &format!(".{table}.NameInfo"))], vec![]);
    entry.options = Some(MessageOptions { map_entry: Some(true), ..MessageOptions::default() });
    let info = vec![texts("ips", 1), text("registry", 2), text("shortname", 3), text("namespace", 4)];
    let names = message(
        "NameTable",
        vec![many(field("table", 1, Message, &format!(".{table}.TableEntry")))],
        vec![message("NameInfo", info, vec![]), entry],
    );
    let exchange = message(
        "MetadataExchange",
        vec![text("protocol", 1), field("enable_discovery", 2, Bool, ""), texts("additional_labels", 3)],
        vec![],
    );
    vec![
        file("istio.envoy.config.filter.http.alpn.v2alpha1", filter),
        file("istio.networking.nds.v1", names),
        file("envoy.tcp.metadataexchange.config", exchange),
        stats(),
        untyped("udpa.type.v1"),
        untyped("xds.type.v3"),
    ]
}

/// Untyped configuration with the name of its type: the same message in two packages.
fn untyped(package: &str) -> FileDescriptorProto {
    let value = field("value", 2, Type::Message, ".google.protobuf.Struct");
    let mut untyped =
        file(package, message("TypedStruct", vec![field("type_url", 1, Type::String, ""), value], vec![]));
    untyped.name = Some(format!("{}/typed_struct.proto", package.replace('.', "/")));
    untyped.dependency = vec!["google/protobuf/struct.proto".to_owned()];
    untyped
}

fn protocols() -> EnumDescriptorProto {
    enumeration("Protocol", &["HTTP10", "HTTP11", "HTTP2"])
}

/// `stats.PluginConfig` of the `istio.stats` filters.
fn stats() -> FileDescriptorProto {
    use Type::{Bool, Enum, Message, String};
    let text = |name, number| field(name, number, String, "");
    let time = |name, number| field(name, number, Message, ".google.protobuf.Duration");
    let metric = message(
        "MetricConfig",
        vec![
            many(field("dimensions", 1, Message, ".stats.MetricConfig.DimensionsEntry")),
            text("name", 2),
            many(text("tags_to_remove", 3)),
            text("match", 4),
            field("drop", 5, Bool, ""),
        ],
        vec![map_entry("DimensionsEntry", text("value", 2))],
    );
    let definition = message(
        "MetricDefinition",
        vec![text("name", 1), text("value", 2), field("type", 3, Enum, ".stats.MetricType")],
        vec![],
    );
    let config = message(
        "PluginConfig",
        vec![
            field("disable_host_header_fallback", 6, Bool, ""),
            time("tcp_reporting_duration", 7),
            many(field("metrics", 8, Message, ".stats.MetricConfig")),
            many(field("definitions", 9, Message, ".stats.MetricDefinition")),
            field("reporter", 10, Enum, ".stats.Reporter"),
            time("rotation_interval", 11),
            time("graceful_deletion_interval", 12),
        ],
        vec![],
    );
    let mut file = file("stats", config);
    file.message_type.extend([metric, definition]);
    file.enum_type = vec![
        enumeration("MetricType", &["COUNTER", "GAUGE", "HISTOGRAM"]),
        enumeration("Reporter", &["UNSPECIFIED", "SERVER_GATEWAY"]),
    ];
    file.dependency = vec!["google/protobuf/duration.proto".to_owned()];
    file
}

/// Names of the numbers from 0 on.
fn enumeration(name: &str, values: &[&str]) -> EnumDescriptorProto {
    let value = |(number, name): (i32, &&str)| EnumValueDescriptorProto {
        name: Some((*name).to_owned()),
        number: Some(number),
        options: None,
    };
    EnumDescriptorProto {
        name: Some(name.to_owned()),
        value: (0..).zip(values).map(value).collect(),
        ..EnumDescriptorProto::default()
    }
}

/// What stands for one entry of a map with text keys.
fn map_entry(name: &str, value: FieldDescriptorProto) -> DescriptorProto {
    let mut entry = message(name, vec![field("key", 1, Type::String, ""), value], vec![]);
    entry.options = Some(MessageOptions { map_entry: Some(true), ..MessageOptions::default() });
    entry
}

fn file(package: &str, of: DescriptorProto) -> FileDescriptorProto {
    FileDescriptorProto {
        name: Some(format!("{}.proto", package.replace('.', "/"))),
        package: Some(package.to_owned()),
        message_type: vec![of],
        syntax: Some("proto3".to_owned()),
        ..FileDescriptorProto::default()
    }
}

fn message(name: &str, field: Vec<FieldDescriptorProto>, nested_type: Vec<DescriptorProto>) -> DescriptorProto {
    DescriptorProto { name: Some(name.to_owned()), field, nested_type, ..DescriptorProto::default() }
}

fn field(name: &str, number: i32, kind: Type, of: &str) -> FieldDescriptorProto {
    FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        label: Some(Label::Optional.into()),
        r#type: Some(kind.into()),
        type_name: (!of.is_empty()).then(|| of.to_owned()),
        ..FieldDescriptorProto::default()
    }
}

fn many(mut field: FieldDescriptorProto) -> FieldDescriptorProto {
    field.label = Some(Label::Repeated.into());
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptors() -> Descriptors {
        Descriptors::load().expect("the build found envoy-types")
    }

    #[test]
    fn a_message_is_shown_with_proto_names_and_typed_extensions() {
        let shown = json!({
            "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            "name": "outbound|80||web",
            "connect_timeout": "10s",
            "type": "EDS",
            "max_requests_per_connection": 5,
            "transport_socket": {"name": "tls", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": "web",
            }},
        });
        let any = descriptors().message(&shown).unwrap();
        assert_eq!(descriptors().json(&any.type_url, &any.value), shown);
    }

    #[test]
    fn istio_types_are_known() {
        let shown = json!({
            "@type": "type.googleapis.com/istio.networking.nds.v1.NameTable",
            "table": {"web.shop.svc.cluster.local": {"ips": ["10.0.0.1"], "registry": "Kubernetes"}},
        });
        let any = descriptors().message(&shown).unwrap();
        assert_eq!(descriptors().json(&any.type_url, &any.value), shown);
        let shown = json!({
            "@type": "type.googleapis.com/istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig",
            "alpn_override": [{"upstream_protocol": "HTTP2", "alpn_override": ["istio", "h2"]}],
        });
        let any = descriptors().message(&shown).unwrap();
        assert_eq!(descriptors().json(&any.type_url, &any.value), shown);
    }

    #[test]
    fn overrides_of_metrics_are_shown() {
        let shown = json!({
            "@type": "type.googleapis.com/stats.PluginConfig",
            "tcp_reporting_duration": "10s",
            "metrics": [{"dimensions": {"port": "string(destination.port)"}, "name": "requests_total", "drop": true}],
            "definitions": [{"name": "mine", "value": "1", "type": "GAUGE"}],
            "reporter": "SERVER_GATEWAY",
        });
        let any = descriptors().message(&shown).unwrap();
        assert_eq!(descriptors().json(&any.type_url, &any.value), shown);
    }

    #[test]
    fn what_is_not_known_keeps_its_bytes_or_its_name() {
        let unknown = descriptors().json("type.googleapis.com/no.such.Type", b"\x01\x02");
        assert_eq!(unknown, json!({"@type": "type.googleapis.com/no.such.Type", "value": "AQI="}));
        let broken = descriptors().json("type.googleapis.com/envoy.config.cluster.v3.Cluster", b"\xff");
        assert_eq!(broken["value"], "/w==");
        let shown = json!({
            "@type": "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            "name": "x", "typedConfig": {"@type": "type.googleapis.com/no.such.Type", "a": 1},
        });
        let any = descriptors().message(&shown).unwrap();
        let again = descriptors().json(&any.type_url, &any.value);
        assert_eq!(again["typed_config"]["type_url"], "type.googleapis.com/no.such.Type");
        assert_eq!(again["typed_config"]["value"], json!({"a": 1.0}));
        assert_eq!(descriptors().json("", b""), json!({}));
        let empty = json!({"@type": "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig", "name": "x", "typed_config": {}});
        assert_eq!(descriptors().message(&empty).unwrap().value, b"\x0a\x01x"[..]);
        assert!(descriptors().message(&json!({"@type": "x/no.such.Type"})).is_err());
    }
}
