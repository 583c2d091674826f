//! Route tables, virtual hosts, routes and their matches.

use std::collections::{BTreeMap, HashMap};
use std::mem::take;

use envoy_types::pb::envoy::config::core::v3::{self as core, header_value_option::HeaderAppendAction};
use envoy_types::pb::envoy::config::route::v3::{self as pb, route, route_match};
use envoy_types::pb::envoy::extensions::filters::common::fault::v3::fault_delay;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::CorsPolicy as PbCors;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::{HttpFault, fault_abort};
use envoy_types::pb::google::protobuf::Any;

use super::context::{At, Fault as Refusal, Read, Reader, each, type_name};
use super::{http_filter, matcher, rbac, route_action, value};
use crate::model::{
    AppendAction, CorsPolicy, Fault, HeaderOps, HeaderSet, Name, PathMatch, Route, RouteAction, RouteMatch, RouteTable,
    Severity, VirtualHost,
};

const HTTP_FAULT: &str = "envoy.extensions.filters.http.fault.v3.HTTPFault";
const CORS: &str = "envoy.extensions.filters.http.cors.v3.CorsPolicy";

/// `envoy.config.route.v3.RouteConfiguration`.
pub(super) fn table(mut of: pb::RouteConfiguration, reader: &mut Reader) -> Read<RouteTable> {
    let out = RouteTable {
        name: Name::from(take(&mut of.name)),
        virtual_hosts: each("virtual_hosts", take(&mut of.virtual_hosts), |v| virtual_host(v, reader))?,
        ignore_port_in_host_matching: take(&mut of.ignore_port_in_host_matching),
        max_direct_response_body_size: value::number(&mut of.max_direct_response_body_size_bytes),
        validate_clusters: value::flag(&mut of.validate_clusters).unwrap_or(false),
    };
    reader.done(&of);
    Ok(out)
}

fn virtual_host(mut of: pb::VirtualHost, reader: &mut Reader) -> Read<VirtualHost> {
    if of.matcher.is_some() {
        return Err(Refusal::new("matcher is not supported"));
    }
    let out = VirtualHost {
        name: Name::from(take(&mut of.name)),
        domains: take(&mut of.domains),
        routes: each("routes", take(&mut of.routes), |r| route(r, reader))?,
        include_request_attempt_count: take(&mut of.include_request_attempt_count),
    };
    reader.done(&of);
    Ok(out)
}

fn route(mut of: pb::Route, reader: &mut Reader) -> Read<Route> {
    let name = Name::from(take(&mut of.name));
    let (matches, unknown) = route_match(of.r#match.take().unwrap_or_default(), reader).at("match")?;
    let mut action = match of.action.take().ok_or_else(|| Refusal::new("no action"))? {
        route::Action::Route(forward) => route_action::forward(forward, reader).at("route")?,
        route::Action::Redirect(redirect) => route_action::redirect(redirect, reader).at("redirect")?,
        route::Action::DirectResponse(direct) => route_action::direct(direct, reader).at("direct_response")?,
        route::Action::FilterAction(_) => RouteAction::Unsupported("filter_action".to_owned()),
        route::Action::NonForwardingAction(_) => RouteAction::Unsupported("non_forwarding_action".to_owned()),
    };
    if let Some(field) = unknown {
        action = RouteAction::Unsupported(format!("match on {field}"));
    }
    if let RouteAction::Unsupported(what) = &action {
        reader.note(&format!("route {name}"), format!("{what} is not supported"), Severity::Error);
    }
    let mut filters = filters(take(&mut of.typed_per_filter_config), reader)?;
    let decorator = of.decorator.take().and_then(|mut d| {
        let operation = value::text(&mut d.operation);
        reader.done(&d);
        operation
    });
    let out = Route {
        name,
        matches,
        action,
        request_headers: headers(&mut of.request_headers_to_add, &mut of.request_headers_to_remove, reader),
        response_headers: headers(&mut of.response_headers_to_add, &mut of.response_headers_to_remove, reader),
        decorator,
        fault: filters.fault.take(),
        cors: filters.cors.take(),
        config: of.metadata.take().and_then(|m| istio_config(m, reader)),
        stat_prefix: take(&mut of.stat_prefix),
        unsupported: filters.unsupported,
    };
    reader.done(&of);
    Ok(out)
}

/// `filter_metadata.istio.config`: the object that shaped a resource.
fn istio_config(of: core::Metadata, reader: &mut Reader) -> Option<String> {
    let mut config = None;
    for (namespace, fields) in of.filter_metadata {
        if namespace != "istio" {
            reader.unread.insert(format!("Metadata.{namespace}"));
            continue;
        }
        let fields = value::json(fields);
        for (key, value) in fields.as_object().into_iter().flatten() {
            match (key.as_str(), value.as_str()) {
                ("config", Some(path)) => config = Some(path.to_owned()),
                _ => {
                    reader.unread.insert(format!("Metadata.istio.{key}"));
                }
            }
        }
    }
    config
}

/// The match, and the conditions in it that are not understood: such a route must not take what it should not.
fn route_match(mut of: pb::RouteMatch, reader: &mut Reader) -> Read<(RouteMatch, Option<String>)> {
    use route_match::PathSpecifier;
    let path = match of.path_specifier.take().ok_or_else(|| Refusal::new("no path"))? {
        PathSpecifier::Prefix(p) => PathMatch::Prefix(p),
        PathSpecifier::Path(p) => PathMatch::Exact(p),
        PathSpecifier::SafeRegex(r) => PathMatch::Regex(matcher::regex(r, reader)),
        PathSpecifier::PathSeparatedPrefix(p) => PathMatch::PathSeparatedPrefix(p),
        PathSpecifier::ConnectMatcher(_) => PathMatch::Connect,
        PathSpecifier::PathMatchPolicy(policy) => {
            PathMatch::Template(rbac::template(policy, reader).at("path_match_policy")?)
        }
    };
    let out = RouteMatch {
        path,
        case_sensitive: value::flag(&mut of.case_sensitive).unwrap_or(true),
        headers: each("headers", take(&mut of.headers), |h| matcher::header(h, reader))?,
        query: each("query_parameters", take(&mut of.query_parameters), |q| matcher::query(q, reader))?,
        dynamic_metadata: each("dynamic_metadata", take(&mut of.dynamic_metadata), |m| matcher::metadata(m, reader))?,
        grpc: of.grpc.take().is_some(),
    };
    Ok((out, reader.unknown(&of)))
}

/// Header changes of a route or a weighted cluster.
pub(super) fn headers(
    add: &mut Vec<core::HeaderValueOption>,
    remove: &mut Vec<String>,
    reader: &mut Reader,
) -> HeaderOps {
    let set = take(add).into_iter().filter_map(|option| header_set(option, reader)).collect();
    HeaderOps { set, remove: take(remove).into_iter().map(|name| name.to_ascii_lowercase()).collect() }
}

#[expect(deprecated, reason = "the older way to say append_action")]
fn header_set(mut of: core::HeaderValueOption, reader: &mut Reader) -> Option<HeaderSet> {
    let mut header = of.header.take()?;
    let appends = value::flag(&mut of.append);
    let action = match (HeaderAppendAction::try_from(take(&mut of.append_action)), appends) {
        (Ok(HeaderAppendAction::AppendIfExistsOrAdd), Some(false)) => AppendAction::Overwrite,
        (Ok(HeaderAppendAction::AppendIfExistsOrAdd) | Err(_), _) => AppendAction::Append,
        (Ok(HeaderAppendAction::AddIfAbsent), _) => AppendAction::AddIfAbsent,
        (Ok(HeaderAppendAction::OverwriteIfExistsOrAdd), _) => AppendAction::Overwrite,
        (Ok(HeaderAppendAction::OverwriteIfExists), _) => AppendAction::OverwriteIfExists,
    };
    let out = HeaderSet { name: take(&mut header.key), value: take(&mut header.value), action };
    reader.done(&header);
    reader.done(&of);
    Some(out)
}

/// Configuration of a route for filters, by name.
#[derive(Default)]
struct Filters {
    fault: Option<Fault>,
    cors: Option<CorsPolicy>,
    unsupported: Vec<String>,
}

fn filters(of: HashMap<String, Any>, reader: &mut Reader) -> Read<Filters> {
    let mut out = Filters::default();
    for (name, any) in of.into_iter().collect::<BTreeMap<_, _>>() {
        let path = format!("typed_per_filter_config[{name}]");
        match type_name(&any.type_url) {
            HTTP_FAULT => out.fault = fault(reader.unpack(&any).at(&path)?, &mut out.unsupported, reader),
            CORS => out.cors = cors(reader.unpack(&any).at(&path)?, reader).at(&path)?,
            other => {
                // A guard that a route sets otherwise than its listener is not passed by either.
                let guards = http_filter::is_security(&name) || http_filter::is_security(other);
                let severity = if guards { Severity::Security } else { Severity::Error };
                reader.note(&path, format!("{other} is not supported"), severity);
                out.unsupported.push(name);
            }
        }
    }
    Ok(out)
}

fn fault(mut of: HttpFault, unsupported: &mut Vec<String>, reader: &mut Reader) -> Option<Fault> {
    let mut out = Fault::default();
    let mut unknown = Vec::new();
    if let Some(mut delay) = of.delay.take() {
        let share = delay.percentage.take().map_or(0, value::millionths);
        match delay.fault_delay_secifier.take() {
            Some(fault_delay::FaultDelaySecifier::FixedDelay(fixed)) => {
                out.delay = value::duration(&mut Some(fixed)).map(|d| (d, share));
            }
            _ => unknown.push("fault delay".to_owned()),
        }
        reader.done(&delay);
    }
    if let Some(mut abort) = of.abort.take() {
        let share = abort.percentage.take().map_or(0, value::millionths);
        match abort.error_type.take() {
            Some(fault_abort::ErrorType::HttpStatus(status)) => {
                out.abort_http = u16::try_from(status).ok().map(|status| (status, share));
            }
            Some(fault_abort::ErrorType::GrpcStatus(status)) => out.abort_grpc = Some((status, share)),
            _ => unknown.push("fault abort".to_owned()),
        }
        reader.done(&abort);
    }
    unknown.extend(reader.unknown(&of));
    for what in unknown {
        reader.note(
            "typed_per_filter_config[envoy.filters.http.fault]",
            format!("{what} is not supported"),
            Severity::Error,
        );
        unsupported.push(what);
    }
    (out != Fault::default()).then_some(out)
}

fn cors(mut of: PbCors, reader: &mut Reader) -> Read<Option<CorsPolicy>> {
    let enabled = value::fraction(&mut of.filter_enabled, reader);
    let out = CorsPolicy {
        allow_origins: each("allow_origin_string_match", take(&mut of.allow_origin_string_match), |m| {
            matcher::string(m, reader)
        })?,
        allow_methods: take(&mut of.allow_methods),
        allow_headers: take(&mut of.allow_headers),
        expose_headers: take(&mut of.expose_headers),
        max_age: take(&mut of.max_age),
        allow_credentials: value::flag(&mut of.allow_credentials),
        forward_not_matching_preflights: value::flag(&mut of.forward_not_matching_preflights),
    };
    reader.done(&of);
    Ok((enabled != Some(0)).then_some(out))
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::RuntimeFractionalPercent;
    use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
    use envoy_types::pb::google::protobuf as wkt;
    use envoy_types::util::pack_any;

    use super::*;

    fn to(cluster: &str) -> pb::Route {
        let specifier = pb::route_action::ClusterSpecifier::Cluster(cluster.to_owned());
        let action = pb::RouteAction { cluster_specifier: Some(specifier), ..Default::default() };
        let path = route_match::PathSpecifier::Prefix("/".to_owned());
        pb::Route {
            r#match: Some(pb::RouteMatch { path_specifier: Some(path), ..Default::default() }),
            action: Some(route::Action::Route(action)),
            ..Default::default()
        }
    }

    #[test]
    fn a_route_says_what_it_says() {
        let mut reader = Reader::default();
        let read = route(to("c"), &mut reader).expect("valid");
        assert_eq!(read.matches.path, PathMatch::Prefix("/".to_owned()));
        assert!(read.matches.case_sensitive);
        let RouteAction::Forward(forward) = read.action else { panic!("forward") };
        assert_eq!((&*forward.clusters[0].name, forward.clusters[0].weight), ("c", 1));
        assert!(reader.unread.is_empty() && reader.notes.is_empty());
    }

    #[test]
    fn a_guard_that_a_route_sets_is_a_security_matter_and_other_filters_are_not() {
        let mut reader = Reader::default();
        let of = |name: &str, kind: &str| {
            let type_url = format!("type.googleapis.com/envoy.extensions.filters.http.{kind}");
            (name.to_owned(), Any { type_url, value: Vec::new() })
        };
        let both = HashMap::from([of("a", "rbac.v3.RBACPerRoute"), of("b", "buffer.v3.BufferPerRoute")]);
        let read = filters(both, &mut reader).expect("noted");
        assert_eq!(read.unsupported, ["a", "b"]);
        let severities: Vec<Severity> = reader.notes.iter().map(|note| note.severity).collect();
        assert_eq!(severities, [Severity::Security, Severity::Error]);
    }

    #[test]
    fn a_condition_that_is_not_understood_serves_nothing() {
        let mut reader = Reader::default();
        let mut message = to("c");
        message.r#match.as_mut().expect("match").runtime_fraction = Some(RuntimeFractionalPercent::default());
        let read = route(message, &mut reader).expect("read");
        assert_eq!(read.action, RouteAction::Unsupported("match on runtime_fraction".to_owned()));
        assert_eq!(reader.notes.len(), 1);
    }

    #[test]
    fn header_changes_have_two_spellings() {
        let option = |append, action: HeaderAppendAction| {
            #[expect(deprecated, reason = "the older way is the point")]
            let message = core::HeaderValueOption {
                header: Some(core::HeaderValue { key: "A".to_owned(), ..Default::default() }),
                append: Option::map(append, |value| wkt::BoolValue { value }),
                append_action: action as i32,
                ..Default::default()
            };
            header_set(message, &mut Reader::default()).expect("header").action
        };
        assert_eq!(option(Some(false), HeaderAppendAction::AppendIfExistsOrAdd), AppendAction::Overwrite);
        assert_eq!(option(None, HeaderAppendAction::AppendIfExistsOrAdd), AppendAction::Append);
        assert_eq!(option(None, HeaderAppendAction::OverwriteIfExistsOrAdd), AppendAction::Overwrite);
        assert_eq!(option(None, HeaderAppendAction::AddIfAbsent), AppendAction::AddIfAbsent);
    }

    #[test]
    fn faults_and_cors_come_by_type() {
        let abort = pb_abort(503, 25);
        let cors = PbCors { allow_methods: "GET".to_owned(), ..Default::default() };
        let config = HashMap::from([
            ("f".to_owned(), pack_any(HttpFault { abort: Some(abort), ..Default::default() })),
            ("c".to_owned(), pack_any(cors)),
            ("x".to_owned(), Any { type_url: "t/a.B".to_owned(), value: Vec::new() }),
        ]);
        let mut reader = Reader::default();
        let read = filters(config, &mut reader).expect("read");
        assert_eq!(read.fault.and_then(|f| f.abort_http), Some((503, 250_000)));
        assert_eq!(read.cors.map(|c| c.allow_methods).as_deref(), Some("GET"));
        assert_eq!((read.unsupported, reader.notes.len()), (vec!["x".to_owned()], 1));
    }

    fn pb_abort(status: u32, percent: u32) -> envoy_types::pb::envoy::extensions::filters::http::fault::v3::FaultAbort {
        envoy_types::pb::envoy::extensions::filters::http::fault::v3::FaultAbort {
            percentage: Some(FractionalPercent { numerator: percent, denominator: 0 }),
            error_type: Some(fault_abort::ErrorType::HttpStatus(status)),
            ..Default::default()
        }
    }
}
