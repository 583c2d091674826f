//! Envoy's command operators over a [`Record`], resolved by name once.

use std::net::SocketAddr;
use std::time::Duration;

use http::HeaderName;

use super::attributes::Facts;
use super::cel::{CelValue, Expression};
use super::clock::{TimePiece, time_format, write_time};
use super::format::Operator;
use super::record::{Headers, Record};
use crate::error::GRPC_CODES;

/// An operator with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Op {
    what: What,
    /// Longest result, bytes.
    max: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    StartTime(Box<[TimePiece]>),
    Request(Box<[Source]>),
    Response(Box<[Source]>),
    Text(Text),
    Number(Number),
    Flags,
    GrpcStatus,
    Address(Address, Shape),
    /// A constant of the process.
    Constant(Box<str>),
    /// What an expression says.
    Expression(Expression),
    /// Known to Envoy, not to us: always absent.
    Absent,
}

/// Where `REQ` and `RESP` look, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Header(HeaderName),
    Method,
    Path,
    PathWithoutQuery,
    OriginalPath,
    Authority,
    Scheme,
    Status,
    ServiceTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Text {
    Protocol,
    Details,
    TerminationDetails,
    TransportFailure,
    DownstreamFailure,
    UpstreamCluster,
    ServerName,
    Route,
    VirtualHost,
    FilterChain,
    PeerUri,
    PeerSubject,
    LocalUri,
    TlsVersion,
    TlsCipher,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    ResponseCode,
    BytesReceived,
    BytesSent,
    Duration,
    RequestDuration,
    ResponseDuration,
    ResponseTxDuration,
    Attempts,
    ConnectionId,
    GrpcStatus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Address {
    UpstreamHost,
    UpstreamLocal,
    DownstreamLocal,
    DownstreamRemote,
    DownstreamDirectRemote,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Whole,
    WithoutPort,
    Port,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrote {
    /// Nothing: there is none.
    Nothing,
    /// A number.
    Number,
    /// Text.
    Text,
}

impl Op {
    /// Resolves an operator; what we do not know is always absent, and the second value names it.
    pub(super) fn compile(said: &Operator) -> (Self, Option<String>) {
        let (what, unknown) = match What::compile(&said.name, &said.argument) {
            Some(what) => (what, None),
            None if said.argument.is_empty() => (What::Absent, Some(format!("%{}%", said.name))),
            None => (What::Absent, Some(format!("%{}({})%", said.name, said.argument))),
        };
        (Self { what, max: said.max }, unknown)
    }

    /// Request and response headers that it reads.
    pub(super) fn headers(&self, out: &mut (Vec<HeaderName>, Vec<HeaderName>)) {
        match &self.what {
            What::Request(sources) => out.0.extend(sources.iter().filter_map(Source::header).cloned()),
            What::Response(sources) => out.1.extend(sources.iter().filter_map(Source::header).cloned()),
            What::Expression(expression) => {
                let (request, response) = expression.headers();
                out.0.extend(request);
                out.1.extend(response);
            }
            _ => {}
        }
    }

    /// Appends the value.
    pub(super) fn write(&self, facts: &Facts<'_>, out: &mut Vec<u8>) -> Wrote {
        let start = out.len();
        let wrote = self.what.write(facts, out);
        if let Some(max) = self.max
            && out.len() > start + max
        {
            let mut end = start + max;
            // A value of several bytes is not cut in the middle.
            while end > start && out[end] & 0xC0 == 0x80 {
                end -= 1;
            }
            out.truncate(end);
        }
        wrote
    }
}

impl What {
    fn compile(name: &str, argument: &str) -> Option<Self> {
        if let Some(text) = text(name, argument) {
            return Some(Self::Text(text));
        }
        if let Some(number) = number(name) {
            return Some(Self::Number(number));
        }
        if let Some((address, shape)) = address(name) {
            return Some(Self::Address(address, shape));
        }
        match name {
            "START_TIME" => time_format(argument).map(Self::StartTime),
            "REQ" => sources(argument, request_source).map(Self::Request),
            "REQ_WITHOUT_QUERY" => sources(argument, |name| match request_source(name)? {
                Source::Path | Source::OriginalPath => Some(Source::PathWithoutQuery),
                other => Some(other),
            })
            .map(Self::Request),
            "RESP" => sources(argument, response_source).map(Self::Response),
            "RESPONSE_FLAGS" => Some(Self::Flags),
            "GRPC_STATUS" => Some(Self::GrpcStatus),
            "HOSTNAME" => Some(Self::Constant(hostname().into())),
            "CEL" => Expression::compile(argument).ok().map(Self::Expression),
            "FILTER_STATE" => filter_state(argument),
            _ => None,
        }
    }

    fn write(&self, facts: &Facts<'_>, out: &mut Vec<u8>) -> Wrote {
        let record = facts.record;
        match self {
            Self::Expression(expression) => match expression.value(facts) {
                Ok(value) => {
                    let mut text = String::new();
                    value.print(&mut text);
                    put(&text, out);
                    if matches!(value, CelValue::Int(_) | CelValue::Double(_)) { Wrote::Number } else { Wrote::Text }
                }
                Err(_) => Wrote::Nothing,
            },
            Self::StartTime(pieces) => {
                write_time(record.start, pieces, out);
                Wrote::Text
            }
            Self::Request(sources) => first(sources, record, record.request_headers, out),
            Self::Response(sources) => first(sources, record, record.response_headers, out),
            Self::Text(text) => put_text(text.of(record), out),
            Self::Number(number) => number.of(record).map_or(Wrote::Nothing, |value| put_number(value, out)),
            Self::Flags if record.flags.is_empty() => put_text("-", out),
            Self::Flags => put_text(&record.flags.to_string(), out),
            Self::GrpcStatus => record.grpc_status.map_or(Wrote::Nothing, |status| {
                put(grpc_name(status), out);
                Wrote::Text
            }),
            Self::Address(address, shape) => match address.of(record) {
                None => Wrote::Nothing,
                Some(address) => {
                    put_address(address, *shape, out);
                    if *shape == Shape::Port { Wrote::Number } else { Wrote::Text }
                }
            },
            Self::Constant(text) => put_text(text, out),
            Self::Absent => Wrote::Nothing,
        }
    }
}

/// `upstream_peer:FIELD:workload`: a field of what the other proxy said of its workload.
fn filter_state(argument: &str) -> Option<What> {
    let mut parts = argument.split(':');
    let (object, "FIELD", field) = (parts.next()?, parts.next()?, parts.next()?) else { return None };
    if !matches!(object, "upstream_peer" | "downstream_peer")
        || !field.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
    {
        return None;
    }
    Expression::compile(&format!("filter_state.{object}.{field}")).ok().map(What::Expression)
}

fn text(name: &str, argument: &str) -> Option<Text> {
    Some(match name {
        "PROTOCOL" => Text::Protocol,
        "RESPONSE_CODE_DETAILS" => Text::Details,
        "CONNECTION_TERMINATION_DETAILS" => Text::TerminationDetails,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => Text::TransportFailure,
        "DOWNSTREAM_TRANSPORT_FAILURE_REASON" => Text::DownstreamFailure,
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Text::UpstreamCluster,
        "REQUESTED_SERVER_NAME" if argument.is_empty() => Text::ServerName,
        "ROUTE_NAME" => Text::Route,
        "VIRTUAL_CLUSTER_NAME" | "VIRTUAL_HOST_NAME" => Text::VirtualHost,
        "FILTER_CHAIN_NAME" => Text::FilterChain,
        "DOWNSTREAM_PEER_URI_SAN" => Text::PeerUri,
        "DOWNSTREAM_PEER_SUBJECT" => Text::PeerSubject,
        "DOWNSTREAM_LOCAL_URI_SAN" => Text::LocalUri,
        "DOWNSTREAM_TLS_VERSION" => Text::TlsVersion,
        "DOWNSTREAM_TLS_CIPHER" => Text::TlsCipher,
        _ => return None,
    })
}

fn number(name: &str) -> Option<Number> {
    Some(match name {
        "RESPONSE_CODE" => Number::ResponseCode,
        "BYTES_RECEIVED" => Number::BytesReceived,
        "BYTES_SENT" => Number::BytesSent,
        "DURATION" => Number::Duration,
        "REQUEST_DURATION" => Number::RequestDuration,
        "RESPONSE_DURATION" => Number::ResponseDuration,
        "RESPONSE_TX_DURATION" => Number::ResponseTxDuration,
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Number::Attempts,
        "CONNECTION_ID" => Number::ConnectionId,
        "GRPC_STATUS_NUMBER" => Number::GrpcStatus,
        _ => return None,
    })
}

fn address(name: &str) -> Option<(Address, Shape)> {
    if name == "UPSTREAM_HOST" {
        return Some((Address::UpstreamHost, Shape::Whole));
    }
    let (name, shape) = if let Some(name) = name.strip_suffix("_ADDRESS_WITHOUT_PORT") {
        (name, Shape::WithoutPort)
    } else if let Some(name) = name.strip_suffix("_ADDRESS") {
        (name, Shape::Whole)
    } else {
        (name.strip_suffix("_PORT")?, Shape::Port)
    };
    let address = match name {
        "UPSTREAM_LOCAL" => Address::UpstreamLocal,
        "UPSTREAM_REMOTE" => Address::UpstreamHost,
        "DOWNSTREAM_LOCAL" => Address::DownstreamLocal,
        "DOWNSTREAM_REMOTE" => Address::DownstreamRemote,
        "DOWNSTREAM_DIRECT_REMOTE" => Address::DownstreamDirectRemote,
        _ => return None,
    };
    Some((address, shape))
}

/// `A?B` as places to look, in order; `None` when one of them is no header name.
fn sources(argument: &str, source: impl Fn(&str) -> Option<Source>) -> Option<Box<[Source]>> {
    argument.split('?').map(source).collect()
}

fn request_source(name: &str) -> Option<Source> {
    Some(match name.to_ascii_lowercase().as_str() {
        ":method" => Source::Method,
        ":path" => Source::Path,
        ":authority" | "host" => Source::Authority,
        ":scheme" => Source::Scheme,
        "x-envoy-original-path" => Source::OriginalPath,
        other => Source::Header(other.parse().ok()?),
    })
}

fn response_source(name: &str) -> Option<Source> {
    Some(match name.to_ascii_lowercase().as_str() {
        ":status" => Source::Status,
        "x-envoy-upstream-service-time" => Source::ServiceTime,
        other => Source::Header(other.parse().ok()?),
    })
}

impl Source {
    fn header(&self) -> Option<&HeaderName> {
        if let Self::Header(name) = self { Some(name) } else { None }
    }
}

fn first(sources: &[Source], record: &Record<'_>, headers: Headers<'_>, out: &mut Vec<u8>) -> Wrote {
    for source in sources {
        let wrote = match source {
            Source::Header(name) => match headers.get(name) {
                Some(value) => {
                    out.extend_from_slice(value.as_bytes());
                    Wrote::Text
                }
                None => Wrote::Nothing,
            },
            Source::Method => put_text(record.method, out),
            Source::Path => put_text(record.path, out),
            Source::PathWithoutQuery => {
                let path = if record.original_path.is_empty() { record.path } else { record.original_path };
                put_text(path.split('?').next().unwrap_or_default(), out)
            }
            Source::OriginalPath => put_text(record.original_path, out),
            Source::Authority => put_text(record.authority, out),
            Source::Scheme => put_text(record.scheme, out),
            Source::Status if record.code == 0 => Wrote::Nothing,
            Source::Status => put_number(record.code.into(), out),
            Source::ServiceTime => match record.upstream_service_time {
                Some(time) => {
                    put_number(millis(time), out);
                    // It is a header, so it is text.
                    Wrote::Text
                }
                None => Wrote::Nothing,
            },
        };
        if wrote != Wrote::Nothing {
            return wrote;
        }
    }
    Wrote::Nothing
}

impl Text {
    fn of<'a>(self, record: &Record<'a>) -> &'a str {
        match self {
            Self::Protocol => record.protocol,
            Self::Details => record.details,
            Self::TerminationDetails => record.termination_details,
            Self::TransportFailure => record.transport_failure,
            Self::DownstreamFailure => record.downstream_failure,
            Self::UpstreamCluster => record.upstream_cluster,
            Self::ServerName => record.sni,
            Self::Route => record.route,
            Self::VirtualHost => record.virtual_host,
            Self::FilterChain => record.filter_chain,
            Self::PeerUri => record.peer_uri,
            Self::PeerSubject => record.peer_subject,
            Self::LocalUri => record.local_uri,
            Self::TlsVersion => record.tls_version,
            Self::TlsCipher => record.tls_cipher,
        }
    }
}

impl Number {
    fn of(self, record: &Record<'_>) -> Option<u64> {
        match self {
            Self::ResponseCode => Some(record.code.into()),
            Self::BytesReceived => Some(record.bytes_received),
            Self::BytesSent => Some(record.bytes_sent),
            Self::Duration => Some(millis(record.duration)),
            Self::RequestDuration => record.request_duration.map(millis),
            Self::ResponseDuration => record.response_duration.map(millis),
            Self::ResponseTxDuration => record.response_duration.map(|at| millis(record.duration.saturating_sub(at))),
            Self::Attempts => (record.attempts > 0).then_some(record.attempts.into()),
            Self::ConnectionId => Some(record.connection_id),
            Self::GrpcStatus => record.grpc_status.map(u64::from),
        }
    }
}

impl Address {
    fn of(self, record: &Record<'_>) -> Option<SocketAddr> {
        match self {
            Self::UpstreamHost => record.upstream_host,
            Self::UpstreamLocal => record.upstream_local,
            Self::DownstreamLocal => record.downstream_local,
            Self::DownstreamRemote => record.downstream_remote,
            Self::DownstreamDirectRemote => record.downstream_direct_remote.or(record.downstream_remote),
        }
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn put(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(text.as_bytes());
}

fn put_text(text: &str, out: &mut Vec<u8>) -> Wrote {
    put(text, out);
    if text.is_empty() { Wrote::Nothing } else { Wrote::Text }
}

fn put_number(value: u64, out: &mut Vec<u8>) -> Wrote {
    put(itoa::Buffer::new().format(value), out);
    Wrote::Number
}

/// An address as `SocketAddr` prints it, several times faster for IPv4.
fn put_address(address: SocketAddr, shape: Shape, out: &mut Vec<u8>) {
    use std::io::Write as _;
    // Writing to a vector cannot fail.
    let _ = match (address, shape) {
        (_, Shape::Port) => {
            put_number(address.port().into(), out);
            return;
        }
        (SocketAddr::V4(v4), _) => {
            for (i, octet) in v4.ip().octets().into_iter().enumerate() {
                if i > 0 {
                    out.push(b'.');
                }
                put_number(octet.into(), out);
            }
            if shape == Shape::Whole {
                out.push(b':');
                put_number(address.port().into(), out);
            }
            return;
        }
        (SocketAddr::V6(v6), Shape::Whole) => write!(out, "{v6}"),
        (SocketAddr::V6(v6), Shape::WithoutPort) => write!(out, "{}", v6.ip()),
    };
}

/// The kernel's name of this machine.
fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}

/// gRPC's status names as Envoy prints them.
pub(super) fn grpc_name(status: u32) -> &'static str {
    GRPC_CODES.get(status as usize).copied().unwrap_or("InvalidCode")
}
