//! The record of everything (`--access-log`): one JSON object for each request, TCP connection and refused connection.

use std::net::SocketAddr;

use super::clock::default_time;
use super::operator::millis;
use super::record::{Record, RecordKind};

/// Appends the object and a line end. Fields without a value are left out, `flags` is `-` without flags.
pub(super) fn write(record: &Record<'_>, out: &mut Vec<u8>) {
    let mut object = Object { out, any: false };
    object.text("kind", record.kind.as_str());
    object.key("start");
    object.out.push(b'"');
    default_time(record.start, object.out);
    object.out.push(b'"');
    object.text("flags", &record.flags.to_string());
    if record.kind == RecordKind::Http {
        object.number("code", record.code.into());
    }
    object.text("details", record.details);
    object.text("terminationDetails", record.termination_details);
    object.text("upstreamCluster", record.upstream_cluster);
    object.address("upstreamHost", record.upstream_host);
    object.text("route", record.route);
    if record.attempts > 0 {
        object.number("attempts", record.attempts.into());
    }
    object.text("upstreamFailure", record.transport_failure);
    object.text("tlsFailure", record.downstream_failure);
    request(&mut object, record);
    connection(&mut object, record);
    object.number("bytesReceived", record.bytes_received);
    object.number("bytesSent", record.bytes_sent);
    object.number("durationMs", millis(record.duration));
    object.out.extend_from_slice(b"}\n");
}

fn request(object: &mut Object<'_>, record: &Record<'_>) {
    object.text("method", record.method);
    object.text("path", record.path);
    object.text("originalPath", record.original_path);
    object.text("authority", record.authority);
    object.text("protocol", record.protocol);
    object.text("virtualHost", record.virtual_host);
    if let Some(status) = record.grpc_status {
        object.number("grpcStatus", status.into());
    }
    if let Some(id) = record.request_headers.get(&http::HeaderName::from_static("x-request-id")) {
        object.bytes("requestId", id.as_bytes());
    }
}

fn connection(object: &mut Object<'_>, record: &Record<'_>) {
    object.text("policy", record.policy);
    object.text("filterChain", record.filter_chain);
    object.text("sni", record.sni);
    object.text("peerUri", record.peer_uri);
    object.text("tlsVersion", record.tls_version);
    object.address("downstreamRemote", record.downstream_remote);
    object.address("downstreamLocal", record.downstream_local);
    object.address("upstreamLocal", record.upstream_local);
}

/// A JSON object in the making.
struct Object<'a> {
    out: &'a mut Vec<u8>,
    any: bool,
}

impl Object<'_> {
    fn key(&mut self, key: &str) {
        self.out.push(if self.any { b',' } else { b'{' });
        self.any = true;
        self.out.push(b'"');
        self.out.extend_from_slice(key.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    fn bytes(&mut self, key: &str, value: &[u8]) {
        if !value.is_empty() {
            self.key(key);
            self.out.push(b'"');
            put_json_text(value, self.out);
            self.out.push(b'"');
        }
    }

    fn text(&mut self, key: &str, value: &str) {
        self.bytes(key, value.as_bytes());
    }

    fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    }

    fn address(&mut self, key: &str, value: Option<SocketAddr>) {
        if let Some(address) = value {
            self.text(key, &address.to_string());
        }
    }
}

/// Appends the inside of a JSON string. What is not UTF-8 becomes U+FFFD.
pub(super) fn put_json_text(value: &[u8], out: &mut Vec<u8>) {
    if value.iter().all(|b| (0x20..0x7F).contains(b) && *b != b'"' && *b != b'\\') {
        out.extend_from_slice(value);
        return;
    }
    for c in String::from_utf8_lossy(value).chars() {
        match c {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            c if u32::from(c) < 0x20 || c == '\u{7F}' => {
                out.extend_from_slice(format!("\\u{:04x}", u32::from(c)).as_bytes());
            }
            c => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}
