//! Records as entries of remote access logs: Envoy's access log service and OTLP.

use std::sync::Arc;

use http::HeaderName;

use super::access_log::Template;
use super::attributes::Facts;
use super::outbox::Target;
use super::record::{Headers, Record, RecordKind};
use super::wire::{Message, address, any_value, attribute, duration, nanos, timestamp};
use crate::error::Flags;

/// A remote log, compiled.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) target: Arc<Target>,
    pub(super) entry: Entry,
}

/// What an entry holds.
#[derive(Debug)]
pub(super) enum Entry {
    /// `HTTPAccessLogEntry`, with these request and response headers.
    Http(Vec<HeaderName>, Vec<HeaderName>),
    /// `TCPAccessLogEntry`
    Tcp,
    /// `LogRecord`: body and attributes.
    Otlp(Option<Template>, Vec<(String, Template)>),
}

impl Remote {
    /// The entry's bytes; `None`: it tells nothing of such a record.
    pub(super) fn encode(&self, facts: &Facts<'_>) -> Option<Vec<u8>> {
        let record = facts.record;
        match &self.entry {
            Entry::Http(..) if record.kind != RecordKind::Http => None,
            Entry::Http(request, response) => Some(http_entry(record, request, response).0),
            Entry::Tcp if record.kind == RecordKind::Http => None,
            Entry::Tcp => {
                let (mut connection, mut out) = (Message::default(), Message::default());
                connection.number(1, record.bytes_received).number(2, record.bytes_sent);
                out.message(1, &common(record)).message(2, &connection);
                Some(out.0)
            }
            Entry::Otlp(body, attributes) => Some(otlp_record(facts, body.as_ref(), attributes).0),
        }
    }
}

fn otlp_record(facts: &Facts<'_>, body: Option<&Template>, attributes: &[(String, Template)]) -> Message {
    let mut out = Message::default();
    out.fixed(1, nanos(facts.record.start));
    if let Some(body) = body {
        out.message(5, &any_value(&serde_json::Value::String(body.text(facts))));
    }
    for (key, value) in attributes {
        out.message(6, &attribute(key, &value.text(facts)));
    }
    out
}

/// `AccessLogCommon`
fn common(record: &Record<'_>) -> Message {
    let mut out = Message::default();
    let mut place = |field: u32, of: Option<std::net::SocketAddr>| {
        if let Some(of) = of {
            out.message(field, &address(of));
        }
    };
    place(2, record.downstream_remote);
    place(3, record.downstream_local);
    place(13, record.upstream_host);
    place(14, record.upstream_local);
    place(20, record.downstream_direct_remote);
    out.message(5, &timestamp(record.start)).message(23, &duration(record.duration));
    if let Some(first) = record.response_duration {
        out.message(9, &duration(first));
    }
    out.text(15, record.upstream_cluster).text(18, record.transport_failure).text(19, record.route);
    out.number(24, record.attempts.into()).text(25, record.termination_details);
    let flags = flags(record.flags);
    if !flags.0.is_empty() {
        out.message(16, &flags);
    }
    out
}

/// `ResponseFlags`
fn flags(of: Flags) -> Message {
    const FIELDS: [(&str, u32); 22] = [
        ("LH", 1),
        ("UH", 2),
        ("UT", 3),
        ("LR", 4),
        ("UR", 5),
        ("UF", 6),
        ("UC", 7),
        ("UO", 8),
        ("NR", 9),
        ("DI", 10),
        ("FI", 11),
        ("RL", 12),
        ("DC", 15),
        ("URX", 16),
        ("SI", 17),
        ("IH", 18),
        ("DPE", 19),
        ("UMSDR", 20),
        ("DT", 23),
        ("UPE", 24),
        ("NC", 25),
        ("OM", 26),
    ];
    let mut out = Message::default();
    for (name, field) in FIELDS {
        if Flags::named(name).is_some_and(|flag| of.contains(flag)) {
            out.number(field, 1);
        }
    }
    out
}

fn http_entry(record: &Record<'_>, request: &[HeaderName], response: &[HeaderName]) -> Message {
    let version = match record.protocol {
        "HTTP/1.0" => 1,
        "HTTP/1.1" => 2,
        "HTTP/2" => 3,
        _ => 0,
    };
    let mut out = Message::default();
    out.message(1, &common(record)).number(2, version);
    out.message(3, &request_part(record, request)).message(4, &response_part(record, response));
    out
}

fn request_part(record: &Record<'_>, names: &[HeaderName]) -> Message {
    const METHODS: [&str; 10] = ["", "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
    let method = METHODS.iter().position(|method| *method == record.method).unwrap_or(0);
    let header = |name: &'static str| text(record.request_headers, &HeaderName::from_static(name));
    let mut out = Message::default();
    out.number(1, method as u64).text(2, record.scheme).text(3, record.authority).text(5, record.path);
    out.text(6, &header("user-agent")).text(8, &header("x-forwarded-for")).text(9, &header("x-request-id"));
    out.text(10, record.original_path).number(12, record.bytes_received);
    for name in names {
        let value = text(record.request_headers, name);
        if !value.is_empty() {
            out.entry(13, name.as_str(), &value);
        }
    }
    out
}

fn response_part(record: &Record<'_>, names: &[HeaderName]) -> Message {
    let (mut code, mut out) = (Message::default(), Message::default());
    code.number(1, record.code.into());
    out.message(1, &code).number(3, record.bytes_sent);
    for name in names {
        let value = text(record.response_headers, name);
        if !value.is_empty() {
            out.entry(4, name.as_str(), &value);
        }
    }
    out.text(6, record.details);
    out
}

fn text(headers: Headers<'_>, name: &HeaderName) -> String {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).unwrap_or_default()
}
