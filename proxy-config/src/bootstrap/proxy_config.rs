//! The effective `ProxyConfig`: the agent's defaults, then what each source says over them, as protojson.

use serde_json::{Map, Number, Value, json};

use super::schema::{Field, Kind, PROXY_CONFIG};
use crate::istio::common::parse_duration;
use crate::yaml;

/// A ProxyConfig in protojson.
pub type ProxyConfig = Map<String, Value>;

/// The agent's defaults (Istio's `DefaultProxyConfig`).
pub fn defaults() -> ProxyConfig {
    let said = json!({
        "configPath": "./etc/istio/proxy",
        "binaryPath": "/usr/local/bin/envoy",
        "serviceCluster": "istio-proxy",
        "drainDuration": "45s",
        "terminationDrainDuration": "5s",
        "proxyAdminPort": 15000,
        "controlPlaneAuthPolicy": "MUTUAL_TLS",
        "discoveryAddress": "istiod.istio-system.svc:15012",
        "statNameLength": 189,
        "statusPort": 15020,
    });
    match said {
        Value::Object(said) => said,
        _ => Map::new(),
    }
}

/// What one source said over what others said before it.
///
/// Fields are replaced as a whole; `proxyMetadata` is merged by name, and five of the `proxyHeaders` stay when the newer
/// source leaves them out, as the agent has it. Fields that nobody knows are put into `unknown`.
///
/// # Errors
/// The field with a value that it cannot hold.
pub fn overlay(base: &mut ProxyConfig, said: &Value, unknown: &mut Vec<String>) -> Result<(), Wrong> {
    let before = (base.get("proxyMetadata").cloned(), base.get("proxyHeaders").cloned());
    for (field, value) in message(PROXY_CONFIG, said, "", unknown)? {
        if !field.oneof.is_empty() {
            for other in PROXY_CONFIG.iter().filter(|other| other.oneof == field.oneof) {
                base.remove(other.name);
            }
        }
        match value {
            Some(value) => base.insert(field.name.to_owned(), value),
            None => base.remove(field.name),
        };
    }
    if let (Some(Value::Object(mut names)), Some(Value::Object(new))) = (before.0, base.get("proxyMetadata")) {
        names.extend(new.clone());
        base.insert("proxyMetadata".to_owned(), Value::Object(names));
    }
    if let (Some(Value::Object(old)), Some(Value::Object(new))) = (before.1, base.get_mut("proxyHeaders")) {
        const KEPT: [&str; 5] = ["forwardedClientCert", "requestId", "attemptCount", "server", "envoyDebugHeaders"];
        for (name, value) in old.into_iter().filter(|(name, _)| KEPT.contains(&name.as_str())) {
            new.entry(name).or_insert(value);
        }
    }
    Ok(())
}

/// Reads one YAML document, or JSON, and lays it over `base`; with `within` only that field of it.
///
/// # Errors
/// `FILE:LINE:COLUMN: FIELD: what was expected`.
pub fn overlay_text(
    base: &mut ProxyConfig,
    source: &crate::Source,
    within: Option<&str>,
    unknown: &mut Vec<String>,
) -> Result<(), String> {
    let (documents, errors) = yaml::parse(&source.text);
    if let Some(e) = errors.first() {
        return Err(format!("{}:{}:{}: {}", source.name, e.line, e.column, e.reason));
    }
    let Some(mut root) = documents.first() else { return Ok(()) };
    if let Some(field) = within {
        match root.get(field) {
            Some(inner) => root = inner,
            None => return Ok(()),
        }
    }
    if root.is_null() {
        return Ok(());
    }
    let value: Value = yaml::read(root, "", &yaml::Notes::default())
        .map_err(|e| format!("{}:{}:{}: {}: {}", source.name, e.line, e.column, e.field, e.reason))?;
    let mut strange = Vec::new();
    overlay(base, &value, &mut strange).map_err(|wrong| {
        let place = root.at(&wrong.field);
        format!("{}:{}:{}: {}: {}", source.name, place.line, place.column, wrong.field, wrong.reason)
    })?;
    unknown.extend(strange.into_iter().map(|field| format!("{}: {field} is not a field of ProxyConfig", source.name)));
    Ok(())
}

/// A field that holds what it cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// Path of the field.
    pub field: String,
    /// What was expected.
    pub reason: String,
}

/// Fields that are said; `None` for a default, which protojson leaves out.
fn message(
    fields: &'static [Field],
    said: &Value,
    path: &str,
    unknown: &mut Vec<String>,
) -> Result<Vec<(&'static Field, Option<Value>)>, Wrong> {
    let Value::Object(said) = said else { return Err(wrong(path, "fields", said)) };
    let mut out: Vec<(&'static Field, Option<Value>)> = Vec::new();
    for (name, value) in said.iter().filter(|(_, value)| !value.is_null()) {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let name = camel_case(name);
        let Some(field) = fields.iter().find(|field| field.name == name) else {
            unknown.push(path);
            continue;
        };
        let twice = |(other, _): &&(&Field, _)| !field.oneof.is_empty() && other.oneof == field.oneof;
        if let Some((other, _)) = out.iter().find(twice) {
            return Err(Wrong { field: path, reason: format!("only one of it and {} may be said", other.name) });
        }
        let value = kind(&field.kind, value, &path, unknown)?;
        let said = !field.oneof.is_empty() || !is_default(&field.kind, &value);
        out.push((field, said.then_some(value)));
    }
    Ok(out)
}

/// What protojson leaves out.
fn is_default(kind: &Kind, value: &Value) -> bool {
    match (kind, value) {
        (Kind::Text, Value::String(text)) => text.is_empty(),
        (Kind::Enum(names), Value::String(text)) => names.first().is_some_and(|(name, _)| name == text),
        (Kind::Bool, value) => value == &Value::Bool(false),
        (Kind::Int | Kind::Double, value) => value.as_f64() == Some(0.0),
        (Kind::List(_), Value::Array(items)) => items.is_empty(),
        (Kind::Map(_), Value::Object(items)) => items.is_empty(),
        _ => false,
    }
}

fn kind(kind: &'static Kind, value: &Value, path: &str, unknown: &mut Vec<String>) -> Result<Value, Wrong> {
    match kind {
        Kind::Text => value.as_str().map(Value::from).ok_or_else(|| wrong(path, "text", value)),
        Kind::Bool | Kind::MaybeBool => {
            value.as_bool().map(Value::from).ok_or_else(|| wrong(path, "true or false", value))
        }
        Kind::Int | Kind::MaybeInt => integer(value)
            .filter(|n| i32::try_from(*n).is_ok() || u32::try_from(*n).is_ok())
            .map(Value::from)
            .ok_or_else(|| wrong(path, "a number of 32 bits", value)),
        Kind::MaybeInt64 => {
            integer(value).map(|n| Value::from(n.to_string())).ok_or_else(|| wrong(path, "a number", value))
        }
        Kind::Double => double(value).ok_or_else(|| wrong(path, "a number", value)),
        Kind::Duration => {
            let said = value.as_str().and_then(parse_duration);
            said.map(|d| Value::from(seconds(d))).ok_or_else(|| wrong(path, "a duration such as 45s", value))
        }
        Kind::Enum(names) => {
            let found =
                names.iter().find(|(name, number)| value.as_str() == Some(name) || integer(value) == Some(*number));
            found.map(|(name, _)| Value::from(*name)).ok_or_else(|| {
                let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
                wrong(path, &format!("one of {}", names.join(", ")), value)
            })
        }
        Kind::Message(fields) => {
            let said = message(fields, value, path, unknown)?;
            Ok(Value::Object(said.into_iter().filter_map(|(f, v)| Some((f.name.to_owned(), v?))).collect()))
        }
        Kind::List(inner) => {
            let Value::Array(items) = value else { return Err(wrong(path, "a list", value)) };
            let item = |(at, item)| self::kind(inner, item, &format!("{path}[{at}]"), unknown);
            Ok(Value::Array(items.iter().enumerate().map(item).collect::<Result<_, _>>()?))
        }
        Kind::Map(inner) => {
            let Value::Object(items) = value else { return Err(wrong(path, "names with values", value)) };
            let item = |(name, item): (&String, _)| {
                Ok((name.clone(), self::kind(inner, item, &format!("{path}.{name}"), unknown)?))
            };
            Ok(Value::Object(items.iter().map(item).collect::<Result<_, _>>()?))
        }
    }
}

/// A number, also as text, as protojson allows.
fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::String(text) => text.parse().ok(),
        Value::Number(number) => {
            let whole = |n: &f64| n.fract() == 0.0 && n.abs() < 9e15;
            number.as_i64().or_else(|| number.as_f64().filter(whole).map(|n| n as i64))
        }
        _ => None,
    }
}

/// Whole numbers without a fraction, as protojson prints them.
fn double(value: &Value) -> Option<Value> {
    if let Some(whole) = integer(value) {
        return Some(Value::from(whole));
    }
    let said = match value {
        Value::String(text) => text.parse().ok()?,
        other => other.as_f64()?,
    };
    Number::from_f64(said).map(Value::Number)
}

/// `1.500s`: seconds with none, 3, 6 or 9 digits of fraction.
fn seconds(duration: std::time::Duration) -> String {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    match nanos {
        0 => format!("{seconds}s"),
        n if n % 1_000_000 == 0 => format!("{seconds}.{:03}s", n / 1_000_000),
        n if n % 1_000 == 0 => format!("{seconds}.{:06}s", n / 1_000),
        n => format!("{seconds}.{n:09}s"),
    }
}

/// protojson takes both spellings.
fn camel_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut parts = name.split('_');
    out.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let mut letters = part.chars();
        out.extend(letters.next().map(|c| c.to_ascii_uppercase()));
        out.push_str(letters.as_str());
    }
    out
}

fn wrong(field: &str, expected: &str, said: &Value) -> Wrong {
    Wrong { field: field.to_owned(), reason: format!("expected {expected}, not {said}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn laid(base: Value, said: Value) -> Result<Value, String> {
        let Value::Object(mut base) = base else { panic!("fields") };
        overlay(&mut base, &said, &mut Vec::new()).map_err(|w| format!("{}: {}", w.field, w.reason))?;
        Ok(Value::Object(base))
    }

    #[test]
    fn fields_are_replaced_metadata_is_merged() {
        let base = json!({"statusPort": 15020, "proxyMetadata": {"A": "1", "B": "1"}, "extraStatTags": ["a", "b"],
            "proxyHeaders": {"server": {"value": "x"}, "metadataExchangeHeaders": {"mode": "IN_MESH"}}});
        let said = json!({"status_port": 0, "proxyMetadata": {"B": "2"}, "extraStatTags": ["c"], "concurrency": 0,
            "proxyHeaders": {"attemptCount": {"disabled": true}}, "meshId": null});
        let expected = json!({"concurrency": 0, "proxyMetadata": {"A": "1", "B": "2"}, "extraStatTags": ["c"],
            "proxyHeaders": {"server": {"value": "x"}, "attemptCount": {"disabled": true}}});
        assert_eq!(laid(base, said).unwrap(), expected);
    }

    #[test]
    fn values_are_written_as_protojson_writes_them() {
        let said = json!({"drainDuration": "1m1.5s", "tracing": {"sampling": 50.0, "zipkin": {}, "maxPathTagLength": 0},
            "controlPlaneAuthPolicy": 1, "interceptionMode": "REDIRECT", "proxyAdminPort": "15000",
            "connectionSettings": {"httpMergeSlashes": false}});
        let expected = json!({"drainDuration": "61.500s", "tracing": {"sampling": 50, "zipkin": {}},
            "controlPlaneAuthPolicy": "MUTUAL_TLS", "proxyAdminPort": 15000,
            "connectionSettings": {"httpMergeSlashes": false}});
        assert_eq!(laid(json!({}), said).unwrap(), expected);
    }

    #[test]
    fn of_a_oneof_the_last_source_wins() {
        let base = json!({"serviceCluster": "x"});
        let said = json!({"tracingServiceName": "APP_LABEL_AND_NAMESPACE"});
        assert_eq!(laid(base, said.clone()).unwrap(), said);
        let both = json!({"serviceCluster": "x", "tracingServiceName": "CANONICAL_NAME_ONLY"});
        assert!(laid(json!({}), both).unwrap_err().contains("only one"), "both at once");
    }

    #[test]
    fn a_wrong_value_is_told_with_its_place() {
        let text = "defaultConfig:\n  readinessProbe:\n    httpGet: {port: http}\n".to_owned();
        let source = crate::Source { name: "mesh".to_owned(), text };
        let error = overlay_text(&mut defaults(), &source, Some("defaultConfig"), &mut Vec::new()).unwrap_err();
        assert_eq!(error, "mesh:3:21: readinessProbe.httpGet.port: expected a number of 32 bits, not \"http\"");
        let mut unknown = Vec::new();
        let source = crate::Source { name: "PROXY_CONFIG".to_owned(), text: "{parentShutdownDuration: 1m}".to_owned() };
        overlay_text(&mut defaults(), &source, None, &mut unknown).unwrap();
        assert_eq!(unknown, ["PROXY_CONFIG: parentShutdownDuration is not a field of ProxyConfig"]);
    }
}
