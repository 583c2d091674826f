//! HTTP filters, by the type of their configuration. A security filter that we cannot enforce as said stays in its
//! place as unsupported: what passes it is refused.

use std::collections::BTreeMap;
use std::mem::take;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::Cors;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::HttpFault;
use envoy_types::pb::envoy::extensions::filters::http::grpc_stats::v3::FilterConfig as GrpcStats;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::http::wasm::v3::Wasm;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpFilter as Pb, http_filter::ConfigType,
};
use envoy_types::pb::envoy::extensions::wasm::v3::FailurePolicy;
use envoy_types::pb::google::protobuf::Any;
use serde_json::{Map, Value, json};

use super::context::{Fault, Read, Reader, type_name};
use super::messages::{AlpnConfig, StatsConfig, TypedStruct};
use super::{Extensions, jwt, rbac, value};
use crate::model::{HttpFilter, IstioStats, Severity};

/// Filters that decide who may pass.
const SECURITY: [&str; 6] = ["ext_authz", "rbac", "jwt_authn", "oauth2", "basic_auth", "api_key_auth"];

/// Somebody's code: nobody knows whom it keeps out. One that lets pass when it does not run is not refused.
const CODE: [&str; 2] = ["envoy.extensions.filters.http.lua.v3.Lua", "envoy.extensions.filters.http.wasm.v3.Wasm"];

/// Filters that do nothing unless a route or a peer of ours asks, which never happens here.
const INERT: [&str; 2] = [
    "envoy.extensions.filters.http.stateful_session.v3.StatefulSession",
    "envoy.extensions.filters.http.on_demand.v3.OnDemand",
];

/// The filters before the router, and the router's `suppress_envoy_headers`.
pub(super) fn filters(of: Vec<Pb>, extensions: &Extensions, reader: &mut Reader) -> Read<(Vec<HttpFilter>, bool)> {
    let mut out = Vec::new();
    let mut suppress = false;
    for filter in of {
        if let Some(router) = router(&filter, reader)? {
            suppress = router;
            continue;
        }
        let discovered = matches!(filter.config_type, Some(ConfigType::ConfigDiscovery(_)));
        if discovered {
            reader.extensions.insert(filter.name.clone());
        }
        let resolved = discovered.then(|| extensions.get(&filter.name).cloned()).flatten();
        out.push(resolved.unwrap_or_else(|| self::filter(filter, reader)));
    }
    Ok((out, suppress))
}

fn router(of: &Pb, reader: &mut Reader) -> Read<Option<bool>> {
    let Some(ConfigType::TypedConfig(any)) = &of.config_type else { return Ok(None) };
    if type_name(&any.type_url) != "envoy.extensions.filters.http.router.v3.Router" {
        return Ok(None);
    }
    let mut router: Router = reader.unpack(any)?;
    let suppress = take(&mut router.suppress_envoy_headers);
    reader.done(&router);
    Ok(Some(suppress))
}

/// A filter that came by extension discovery, with its name.
pub(super) fn extension(of: TypedExtensionConfig, reader: &mut Reader) -> Read<(String, HttpFilter)> {
    let any = of.typed_config.ok_or_else(|| Fault::new("no typed_config"))?;
    let filter = typed(&of.name, &any, reader).unwrap_or_else(|fault| refused(&of.name, &any.type_url, fault, reader));
    Ok((of.name, filter))
}

fn filter(mut of: Pb, reader: &mut Reader) -> HttpFilter {
    let name = take(&mut of.name);
    let (optional, disabled) = (take(&mut of.is_optional), take(&mut of.disabled));
    let config = of.config_type.take();
    reader.done(&of);
    match config {
        _ if disabled => refused(&name, "", Fault::new("filters that routes switch on are not supported"), reader),
        Some(ConfigType::TypedConfig(any)) => match typed(&name, &any, reader) {
            Ok(HttpFilter::Unsupported { name, type_url, security: false }) if optional => {
                reader.inert.insert(format!("http filter {name}"));
                // Whoever wrote it can do without.
                reader.notes.iter_mut().rev().take(1).for_each(|note| note.severity = Severity::Error);
                HttpFilter::Inert { name, type_url }
            }
            Ok(filter) => filter,
            Err(fault) => refused(&name, &any.type_url, fault, reader),
        },
        Some(ConfigType::ConfigDiscovery(source)) => {
            // RBAC stands among the types because agents put it where a plug-in could not be fetched.
            let plugin = source.type_urls.into_iter().find(|url| !is_security(type_name(url)));
            let type_url = plugin.unwrap_or_default();
            // What it is nobody knows before it has come.
            noted(&name, &type_url, Fault::new("extension discovery is not supported"), Severity::Error, reader)
        }
        None => refused(&name, "", Fault::new("no configuration"), reader),
    }
}

/// Keeps a filter's place and says why it does not work.
fn refused(name: &str, type_url: &str, fault: Fault, reader: &mut Reader) -> HttpFilter {
    let type_name = type_name(type_url);
    let guards = is_security(name) || is_security(type_name) || CODE.contains(&type_name);
    noted(name, type_url, fault, if guards { Severity::Security } else { Severity::Error }, reader)
}

fn noted(name: &str, type_url: &str, fault: Fault, severity: Severity, reader: &mut Reader) -> HttpFilter {
    let security = is_security(name) || is_security(type_name(type_url));
    let severity = if security { Severity::Security } else { severity };
    let reject = fault.into_reject(String::new());
    let field = format!("http_filters[{name}]");
    let separator = if reject.field.is_empty() { "" } else { "." };
    reader.note(&format!("{field}{separator}{}", reject.field), reject.reason, severity);
    HttpFilter::Unsupported { name: name.to_owned(), type_url: type_url.to_owned(), security }
}

/// Whether a filter decides who may pass, by its name or its type's.
pub(super) fn is_security(name: &str) -> bool {
    name.split('.').any(|part| SECURITY.contains(&part))
}

fn typed(name: &str, any: &Any, reader: &mut Reader) -> Read<HttpFilter> {
    Ok(match type_name(&any.type_url) {
        "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct" => untyped(name, reader.unpack(any)?, reader),
        "envoy.extensions.filters.http.rbac.v3.RBAC" => HttpFilter::Rbac(rbac::http(reader.unpack(any)?, reader)?),
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication" => {
            HttpFilter::JwtAuthn(Box::new(jwt::authn(reader.unpack(any)?, reader)?))
        }
        "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
            let rest: HttpFault = reader.unpack(any)?;
            reader.done_strict(&rest)?;
            HttpFilter::Fault
        }
        "envoy.extensions.filters.http.cors.v3.Cors" => {
            reader.unpack::<Cors>(any)?;
            HttpFilter::Cors
        }
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig" => {
            let rest: GrpcStats = reader.unpack(any)?;
            reader.done(&rest);
            HttpFilter::GrpcStats
        }
        "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb" => HttpFilter::GrpcWeb,
        "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig" => alpn(reader.unpack(any)?)?,
        "stats.PluginConfig" => HttpFilter::IstioStats(stats(reader.unpack(any)?)),
        "envoy.extensions.filters.http.wasm.v3.Wasm" => wasm(name, any, reader)?,
        other if INERT.contains(&other) => {
            reader.inert.insert(format!("http filter {name}"));
            HttpFilter::Inert { name: name.to_owned(), type_url: any.type_url.clone() }
        }
        _ => refused(name, &any.type_url, Fault::new("this filter is not supported"), reader),
    })
}

/// A filter whose configuration is JSON.
fn untyped(name: &str, of: TypedStruct, reader: &mut Reader) -> HttpFilter {
    let config = value::json(of.value.unwrap_or_default());
    match type_name(&of.type_url) {
        "io.istio.http.peer_metadata.Config" => HttpFilter::PeerMetadata(config),
        "stats.PluginConfig" => HttpFilter::IstioStats(IstioStats { config }),
        _ => refused(name, &of.type_url, Fault::new("this filter is not supported"), reader),
    }
}

/// A plug-in that says that traffic may pass when it does not run, passes it.
fn wasm(name: &str, any: &Any, reader: &mut Reader) -> Read<HttpFilter> {
    let plugin = reader.unpack::<Wasm>(any)?.config.unwrap_or_default();
    #[expect(deprecated, reason = "the older way to say it")]
    let open = plugin.fail_open || plugin.failure_policy() == FailurePolicy::FailOpen;
    if open {
        reader.inert.insert(format!("http filter {name}"));
        return Ok(HttpFilter::Inert { name: name.to_owned(), type_url: any.type_url.clone() });
    }
    Err(Fault::new("WebAssembly is not supported, and the plug-in does not fail open"))
}

fn alpn(of: AlpnConfig) -> Read<HttpFilter> {
    let mut out = BTreeMap::new();
    for row in of.alpn_override {
        let upstream = match row.upstream_protocol {
            0 => "http/1.0",
            1 => "http/1.1",
            2 => "h2",
            other => return Err(Fault::new(format!("unknown upstream_protocol {other}"))),
        };
        out.insert(upstream.to_owned(), row.alpn_override);
    }
    Ok(HttpFilter::Alpn(out))
}

/// Istio's metrics, as their canonical JSON.
pub(super) fn stats(of: StatsConfig) -> IstioStats {
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
    if of.disable_host_header_fallback {
        put("disable_host_header_fallback", Value::Bool(true));
    }
    for (key, mut interval) in [
        ("tcp_reporting_duration", of.tcp_reporting_duration),
        ("rotation_interval", of.rotation_interval),
        ("graceful_deletion_interval", of.graceful_deletion_interval),
    ] {
        if let Some(interval) = value::duration(&mut interval) {
            put(key, json!(value::duration_text(interval)));
        }
    }
    if of.reporter != 0 {
        put("reporter", json!("SERVER_GATEWAY"));
    }
    let metrics: Vec<Value> = of.metrics.into_iter().map(metric).collect();
    if !metrics.is_empty() {
        put("metrics", Value::Array(metrics));
    }
    let kind = |k: i32| ["COUNTER", "GAUGE", "HISTOGRAM"][usize::try_from(k).unwrap_or(0).min(2)];
    let definitions: Vec<Value> =
        of.definitions.into_iter().map(|d| json!({"name": d.name, "value": d.value, "type": kind(d.r#type)})).collect();
    if !definitions.is_empty() {
        put("definitions", Value::Array(definitions));
    }
    IstioStats { config: Value::Object(out) }
}

fn metric(of: super::messages::MetricConfig) -> Value {
    let mut out = Map::new();
    if !of.dimensions.is_empty() {
        out.insert("dimensions".to_owned(), json!(of.dimensions.into_iter().collect::<BTreeMap<_, _>>()));
    }
    for (key, text) in [("name", of.name), ("match", of.r#match)] {
        if !text.is_empty() {
            out.insert(key.to_owned(), Value::String(text));
        }
    }
    if !of.tags_to_remove.is_empty() {
        out.insert("tags_to_remove".to_owned(), json!(of.tags_to_remove));
    }
    if of.drop {
        out.insert("drop".to_owned(), Value::Bool(true));
    }
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::ExtensionConfigSource;
    use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac;
    use envoy_types::pb::envoy::extensions::wasm::v3::PluginConfig;
    use envoy_types::util::pack_any;

    use super::*;

    fn pb(name: &str, any: Any) -> Pb {
        Pb { name: name.to_owned(), config_type: Some(ConfigType::TypedConfig(any)), ..Default::default() }
    }

    fn unknown(type_url: &str) -> Any {
        Any { type_url: format!("type.googleapis.com/{type_url}"), value: Vec::new() }
    }

    fn read(of: Vec<Pb>, reader: &mut Reader) -> Vec<HttpFilter> {
        filters(of, &Extensions::new(), reader).expect("read").0
    }

    #[test]
    fn unknown_filters_keep_their_place_and_weight() {
        let mut reader = Reader::default();
        let out = read(
            vec![
                pb("a", unknown("envoy.extensions.filters.http.ext_authz.v3.ExtAuthz")),
                pb("b", unknown("envoy.extensions.filters.http.lua.v3.Lua")),
                Pb { is_optional: true, ..pb("c", unknown("envoy.extensions.filters.http.lua.v3.Lua")) },
                pb("e", unknown("envoy.extensions.filters.http.buffer.v3.Buffer")),
                pb("d", unknown("envoy.extensions.filters.http.stateful_session.v3.StatefulSession")),
            ],
            &mut reader,
        );
        assert!(matches!(out[0], HttpFilter::Unsupported { security: true, .. }));
        assert!(matches!(out[1], HttpFilter::Unsupported { security: false, .. }));
        assert!(matches!(out[2], HttpFilter::Inert { .. }));
        assert!(matches!(out[3], HttpFilter::Unsupported { security: false, .. }));
        assert!(matches!(out[4], HttpFilter::Inert { .. }));
        // Code that may keep somebody out refuses its listener; what is optional or only changes traffic does not.
        let severities: Vec<Severity> = reader.notes.iter().map(|note| note.severity).collect();
        use Severity::{Error, Security};
        assert_eq!(severities, [Security, Security, Error, Error]);
        assert_eq!(reader.inert.len(), 2);
    }

    #[test]
    fn a_policy_that_is_not_understood_is_a_security_matter() {
        let mut reader = Reader::default();
        let message = Rbac { matcher: Some(Default::default()), ..Default::default() };
        let out = read(vec![pb("envoy.filters.http.rbac", pack_any(message))], &mut reader);
        assert!(matches!(out[0], HttpFilter::Unsupported { security: true, .. }));
        assert_eq!(reader.notes[0].reason, "matcher is not supported");
    }

    #[test]
    fn a_plug_in_that_fails_closed_is_a_security_matter_once_it_is_known() {
        let severity = |policy: FailurePolicy| {
            let plugin = PluginConfig { failure_policy: policy.into(), ..Default::default() };
            let mut reader = Reader::default();
            read(vec![pb("w", pack_any(Wasm { config: Some(plugin) }))], &mut reader);
            reader.notes.first().map(|note| note.severity)
        };
        assert_eq!(severity(FailurePolicy::FailOpen), None);
        assert_eq!(severity(FailurePolicy::FailClosed), Some(Severity::Security));
        let mut reader = Reader::default();
        let source = ExtensionConfigSource {
            type_urls: vec!["type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm".to_owned()],
            ..Default::default()
        };
        let config_type = Some(ConfigType::ConfigDiscovery(source));
        read(vec![Pb { name: "w".to_owned(), config_type, ..Default::default() }], &mut reader);
        assert_eq!(reader.notes[0].severity, Severity::Error);
    }

    #[test]
    fn the_router_is_implied() {
        let router = Router { suppress_envoy_headers: true, ..Default::default() };
        let read = filters(vec![pb("router", pack_any(router))], &Extensions::new(), &mut Reader::default());
        assert_eq!(read, Ok((Vec::new(), true)));
    }

    #[test]
    fn discovered_filters_come_by_name() {
        let pb = Pb {
            name: "x".to_owned(),
            config_type: Some(ConfigType::ConfigDiscovery(Default::default())),
            ..Default::default()
        };
        let known = Extensions::from([("x".to_owned(), HttpFilter::Cors)]);
        let mut reader = Reader::default();
        assert_eq!(filters(vec![pb.clone()], &known, &mut reader), Ok((vec![HttpFilter::Cors], false)));
        let missing = filters(vec![pb], &Extensions::new(), &mut reader).expect("read").0;
        assert!(matches!(missing[0], HttpFilter::Unsupported { .. }));
    }
}
