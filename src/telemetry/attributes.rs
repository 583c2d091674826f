//! What the names in expressions stand for: Envoy's attributes, read off a record.

use std::borrow::Cow;
use std::net::SocketAddr;

use http::HeaderName;

use super::cel::{CelValue, Expr};
use super::labels::NodeLabels;
use super::operator::grpc_name;
use super::record::{Headers, Record};

/// What an expression is evaluated over.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The request or connection.
    pub record: &'a Record<'a>,
    /// Who we are.
    pub node: &'a NodeLabels,
}

/// The value of `a.b['c']`; `None`: there is none, or no such attribute.
pub(super) fn value<'a>(path: &[Box<str>], facts: &Facts<'a>) -> Option<CelValue<'a>> {
    let parts: smallvec::SmallVec<[&str; 6]> = path.iter().map(|part| &**part).collect();
    let record = facts.record;
    match &parts[..] {
        ["request", "headers", name] => request_header(name, record).map(text),
        ["response", "headers", name] => header(record.response_headers, name).map(text),
        ["request", name] => request(name, record),
        ["response", name] => response(name, record),
        ["connection", name] => connection(name, record),
        ["source", "address"] => address(record.downstream_remote),
        ["source", "port"] => port(record.downstream_remote),
        ["destination", "address"] => address(record.downstream_local),
        ["destination", "port"] => port(record.downstream_local),
        ["upstream", name] => upstream(name, record),
        ["xds", "node", rest @ ..] | ["node", rest @ ..] => node(rest, facts.node),
        ["xds", name] => xds(name, record),
        ["filter_state", name, rest @ ..] => filter_state(name, rest, record),
        ["cluster_name"] => known(record.upstream_cluster),
        ["route_name"] => known(record.route),
        ["listener_direction"] => Some(direction(record)),
        _ => None,
    }
}

/// Whether an expression is a map of attributes, in which a key may be looked for.
pub(super) fn is_map(expr: &Expr) -> bool {
    let Expr::Attribute(path) = expr else { return false };
    let parts: Vec<&str> = path.iter().map(|part| &**part).collect();
    matches!(parts[..], ["request" | "response", "headers"] | ["filter_state", _, "labels"] | ["filter_state"])
}

/// Headers that a path reads.
pub(super) fn headers(path: &[Box<str>], out: &mut (Vec<HeaderName>, Vec<HeaderName>)) {
    let parts: Vec<&str> = path.iter().map(|part| &**part).collect();
    let name = |name: &str| name.to_ascii_lowercase().parse().ok();
    match parts[..] {
        ["request", "headers", header] => out.0.extend(name(header)),
        ["response", "headers", header] => out.1.extend(name(header)),
        ["request", "referer"] => out.0.push(http::header::REFERER),
        _ => {}
    }
}

fn text<'a>(text: Cow<'a, str>) -> CelValue<'a> {
    CelValue::Text(text)
}

/// Text that is there.
fn known(of: &str) -> Option<CelValue<'_>> {
    (!of.is_empty()).then(|| CelValue::Text(of.into()))
}

fn plain(of: &str) -> Option<CelValue<'_>> {
    Some(CelValue::Text(of.into()))
}

fn int(number: u64) -> Option<CelValue<'static>> {
    Some(CelValue::Int(i64::try_from(number).unwrap_or(i64::MAX)))
}

fn address(of: Option<SocketAddr>) -> Option<CelValue<'static>> {
    of.map(|address| CelValue::Text(address.to_string().into()))
}

fn port(of: Option<SocketAddr>) -> Option<CelValue<'static>> {
    of.map(|address| CelValue::Int(address.port().into()))
}

fn header<'a>(headers: Headers<'a>, name: &str) -> Option<Cow<'a, str>> {
    let name: HeaderName = name.to_ascii_lowercase().parse().ok()?;
    headers.get(&name).map(|value| String::from_utf8_lossy(value.as_bytes()))
}

fn request_header<'a>(name: &str, record: &Record<'a>) -> Option<Cow<'a, str>> {
    let pseudo = match name {
        ":method" => record.method,
        ":path" => path(record),
        ":authority" | "host" => record.authority,
        ":scheme" => record.scheme,
        _ => return header(record.request_headers, name),
    };
    (!pseudo.is_empty()).then(|| pseudo.into())
}

/// As the client sent it.
fn path<'a>(record: &Record<'a>) -> &'a str {
    if record.original_path.is_empty() { record.path } else { record.original_path }
}

fn request<'a>(name: &str, record: &Record<'a>) -> Option<CelValue<'a>> {
    match name {
        "path" => known(path(record)),
        "url_path" => known(path(record).split('?').next().unwrap_or_default()),
        "query" => known(path(record)).and_then(|_| plain(path(record).split_once('?').map_or("", |(_, query)| query))),
        "host" => known(record.authority),
        "scheme" => known(record.scheme),
        "method" => known(record.method),
        "protocol" => known(record.protocol),
        "useragent" => header(record.request_headers, "user-agent").map(text),
        "referer" => header(record.request_headers, "referer").map(text),
        "id" => header(record.request_headers, "x-request-id").map(text),
        "size" => int(record.bytes_received),
        "duration" => Some(CelValue::Text(format!("{}s", record.duration.as_secs_f64()).into())),
        "time" => {
            let mut out = Vec::new();
            super::clock::default_time(record.start, &mut out);
            Some(CelValue::Text(String::from_utf8_lossy(&out).into_owned().into()))
        }
        _ => None,
    }
}

fn response<'a>(name: &str, record: &Record<'a>) -> Option<CelValue<'a>> {
    match name {
        "code" => (record.code != 0).then(|| CelValue::Int(record.code.into())),
        "code_details" => known(record.details),
        "grpc_status" => record.grpc_status.map(|status| CelValue::Int(status.into())),
        "grpc_status_name" => record.grpc_status.and_then(|status| plain(grpc_name(status))),
        "size" => int(record.bytes_sent),
        _ => None,
    }
}

fn connection<'a>(name: &str, record: &Record<'a>) -> Option<CelValue<'a>> {
    match name {
        "id" => int(record.connection_id),
        "mtls" => Some(CelValue::Bool(record.mtls)),
        "requested_server_name" => plain(record.sni),
        "tls_version" => known(record.tls_version),
        "subject_peer_certificate" => known(record.peer_subject),
        "uri_san_peer_certificate" => known(record.peer_uri),
        "uri_san_local_certificate" => known(record.local_uri),
        "termination_details" => known(record.termination_details),
        "transport_failure_reason" => known(record.downstream_failure),
        _ => None,
    }
}

fn upstream<'a>(name: &str, record: &Record<'a>) -> Option<CelValue<'a>> {
    match name {
        "address" => address(record.upstream_host),
        "port" => port(record.upstream_host),
        "local_address" => address(record.upstream_local),
        "transport_failure_reason" => known(record.transport_failure),
        "request_attempt_count" => int(record.attempts.into()),
        _ => None,
    }
}

fn xds<'a>(name: &str, record: &Record<'a>) -> Option<CelValue<'a>> {
    match name {
        "cluster_name" => known(record.upstream_cluster),
        "route_name" => known(record.route),
        "virtual_host_name" => known(record.virtual_host),
        "filter_chain_name" => plain(record.filter_chain),
        "listener_direction" => Some(direction(record)),
        _ => None,
    }
}

/// Envoy's enum: INBOUND is 1, OUTBOUND is 2.
fn direction(record: &Record<'_>) -> CelValue<'static> {
    CelValue::Int(if record.outbound { 2 } else { 1 })
}

fn node<'a>(path: &[&str], node: &'a NodeLabels) -> Option<CelValue<'a>> {
    match path {
        ["id"] => plain(&node.id),
        ["metadata", rest @ ..] => {
            let mut at = &node.metadata;
            for part in rest {
                at = at.get(part)?;
            }
            Some(at.into())
        }
        _ => None,
    }
}

/// The peer is the client inbound and the server outbound.
fn filter_state<'a>(name: &str, path: &[&str], record: &Record<'a>) -> Option<CelValue<'a>> {
    let wanted = if record.outbound { "upstream_peer" } else { "downstream_peer" };
    let peer = record.peer.filter(|_| name == wanted)?;
    match path {
        [field] => peer.get(field).and_then(known),
        ["labels", label] => peer.labels.get(*label).and_then(|value| plain(value)),
        _ => None,
    }
}
