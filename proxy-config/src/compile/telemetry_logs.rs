//! Access logs of a direction: by which providers, in which format, of what.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::settings::{TEXT_FORMAT, file_format, json_format, mesh_log};
use super::telemetry::{Context, Source, collector, default_providers, matches, names, provider, refuse};
use super::view::Told;
use crate::istio::telemetry::AccessLogging;
use crate::model::{AccessLog, LogFilter, LogFormat, LogSink, Name, Reject};

/// What gRPC sinks are told of peers.
const PEERS: [&str; 2] = ["upstream_peer", "downstream_peer"];
/// What OpenTelemetry sinks are told of peers, under their old names too.
const OLD_PEERS: [&str; 4] =
    ["wasm.upstream_peer", "wasm.upstream_peer_id", "wasm.downstream_peer", "wasm.downstream_peer_id"];

/// The logs of a direction.
pub(super) fn fill(
    levels: &[Source<'_>],
    context: Context<'_>,
    inbound: bool,
    rejects: &mut Vec<Reject>,
    out: &mut Told,
) {
    let defaults = default_providers(context.mesh, "accessLogging");
    let said: Vec<&[AccessLogging]> =
        levels.iter().map(|level| &level.spec.access_logging[..]).filter(|logs| !logs.is_empty()).collect();
    let logs: Vec<AccessLog> = if said.is_empty() && defaults.is_empty() {
        mesh_log(context.mesh).into_iter().collect()
    } else {
        let wanted = merge(&said, defaults, inbound);
        wanted.into_iter().filter_map(|(name, filter)| log(&name, filter, context, rejects)).collect()
    };
    if !context.mesh.disable_envoy_listener_log {
        out.listener_access_log = logs.iter().cloned().map(of_listener).collect();
    }
    out.access_log = logs;
}

/// A listener logs only what no chain took.
fn of_listener(log: AccessLog) -> AccessLog {
    let nowhere = LogFilter::ResponseFlags(vec!["NR".to_owned()]);
    let filter = match log.filter {
        None => nowhere,
        Some(filter) => LogFilter::And(vec![nowhere, filter]),
    };
    AccessLog { filter: Some(filter), ..log }
}

/// Providers with their filters: names of a lower level replace those above, and a level may switch off what it inherits.
fn merge(levels: &[&[AccessLogging]], defaults: Vec<String>, inbound: bool) -> BTreeMap<String, Option<String>> {
    let mut in_scope: BTreeSet<String> = defaults.iter().cloned().collect();
    let mut filters: BTreeMap<String, Option<String>> = BTreeMap::new();
    for level in levels {
        let mut named = BTreeSet::new();
        for log in level.iter().filter(|log| matches(log.matches, inbound)) {
            let filter = log.filter.as_ref().map(|f| f.expression.clone()).filter(|text| !text.is_empty());
            for name in names(&log.providers) {
                filters.insert(name.clone(), filter.clone());
                named.insert(name);
            }
        }
        if !named.is_empty() {
            in_scope = named;
        }
    }
    if levels.is_empty() {
        return defaults.into_iter().map(|name| (name, None)).collect();
    }
    let mut out = BTreeMap::new();
    let mut inherited = defaults;
    for log in levels.iter().copied().flatten() {
        if !log.providers.is_empty() {
            inherited = names(&log.providers);
        }
        for name in inherited.iter().filter(|name| in_scope.contains(*name)) {
            if !matches(log.matches, inbound) {
                continue;
            }
            if log.disabled == Some(true) {
                out.remove(name);
            } else {
                out.insert(name.clone(), filters.get(name).cloned().flatten());
            }
        }
    }
    out
}

fn log(name: &str, filter: Option<String>, context: Context<'_>, rejects: &mut Vec<Reject>) -> Option<AccessLog> {
    let Some(provider) = provider(context.mesh, name) else {
        refuse(name, "there is no such provider; its access log is left out", rejects);
        return None;
    };
    let (kind, settings) = provider.kind.iter().next()?;
    let grpc = |tcp: bool, default_name: &str, rejects: &mut Vec<Reject>| {
        let Some((cluster, authority)) = collector(settings, context) else {
            refuse(name, "there is no such service; its access log is left out", rejects);
            return None;
        };
        let log_name = settings["logName"].as_str().filter(|name| !name.is_empty()).unwrap_or(default_name).to_owned();
        let rest = Value::Object(grpc_rest(settings, &authority, tcp));
        Some(LogSink::Grpc { cluster: Name::from(cluster), log_name, tcp, rest })
    };
    let sink = match kind.as_str() {
        // The provider that is always there takes its format from the mesh.
        "envoyFileAccessLog" if name == "envoy" && settings["logFormat"].is_null() => {
            let path = settings["path"].as_str().unwrap_or("/dev/stdout").to_owned();
            LogSink::File { path, format: file_format(context.mesh), omit_empty: false }
        }
        "envoyFileAccessLog" => file(settings),
        "envoyHttpAls" => grpc(false, "http_envoy_accesslog", rejects)?,
        "envoyTcpAls" => grpc(true, "tcp_envoy_accesslog", rejects)?,
        "envoyOtelAls" => {
            let Some((cluster, authority)) = collector(settings, context) else {
                refuse(name, "there is no such service; its access log is left out", rejects);
                return None;
            };
            opentelemetry(settings, cluster, &authority)
        }
        other => {
            refuse(name, &format!("{other} writes no access logs; it is left out"), rejects);
            return None;
        }
    };
    Some(AccessLog { sink, filter: filter.map(LogFilter::Cel) })
}

fn file(settings: &Value) -> LogSink {
    let path = settings["path"].as_str().filter(|path| !path.is_empty()).unwrap_or("/dev/stdout").to_owned();
    let said = &settings["logFormat"];
    let format = match (said["text"].as_str(), said["labels"].as_object()) {
        (_, Some(labels)) if labels.is_empty() => LogFormat::Json(json_format()),
        (_, Some(labels)) => LogFormat::Json(Value::Object(labels.clone())),
        (None | Some(""), None) => LogFormat::Text(TEXT_FORMAT.to_owned()),
        (Some(text), None) if text.ends_with('\n') => LogFormat::Text(text.to_owned()),
        (Some(text), None) => LogFormat::Text(format!("{text}\n")),
    };
    LogSink::File { path, format, omit_empty: settings["omitEmptyValues"] == true }
}

fn grpc_rest(settings: &Value, authority: &str, tcp: bool) -> Map<String, Value> {
    let mut rest = Map::from_iter([("authority".to_owned(), json!(authority))]);
    let said = &settings["filterStateObjectsToLog"];
    let peers = if said.as_array().is_some_and(|list| !list.is_empty()) { said.clone() } else { json!(PEERS) };
    rest.insert("filter_state_objects_to_log".to_owned(), peers);
    if tcp {
        return rest;
    }
    for (key, field) in [
        ("additional_request_headers_to_log", "additionalRequestHeadersToLog"),
        ("additional_response_headers_to_log", "additionalResponseHeadersToLog"),
        ("additional_response_trailers_to_log", "additionalResponseTrailersToLog"),
    ] {
        if settings[field].as_array().is_some_and(|list| !list.is_empty()) {
            rest.insert(key.to_owned(), settings[field].clone());
        }
    }
    rest
}

fn opentelemetry(settings: &Value, cluster: String, authority: &str) -> LogSink {
    let log_name = settings["logName"].as_str().filter(|name| !name.is_empty()).unwrap_or("otel_envoy_accesslog");
    let said = &settings["logFormat"];
    let text = said["text"].as_str().filter(|text| !text.is_empty()).unwrap_or(TEXT_FORMAT);
    let mut rest = Map::from_iter([
        ("authority".to_owned(), json!(authority)),
        ("body".to_owned(), json!(text)),
        ("disable_builtin_labels".to_owned(), Value::Bool(true)),
    ]);
    let all: Vec<&str> = PEERS.into_iter().chain(OLD_PEERS).collect();
    let named = &settings["filterStateObjectsToLog"];
    let peers = if named.as_array().is_some_and(|list| !list.is_empty()) { named.clone() } else { json!(all) };
    rest.insert("filter_state_objects_to_log".to_owned(), peers);
    if said["labels"].as_object().is_some_and(|labels| !labels.is_empty()) {
        rest.insert("attributes".to_owned(), said["labels"].clone());
    }
    LogSink::OpenTelemetry { cluster: Name::from(cluster), log_name: log_name.to_owned(), rest: Value::Object(rest) }
}
