//! What format operators in header values stand for.

use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::{SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use http::header::HeaderName;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::conn::Conn;
use super::head::Head;
use crate::snapshot::{Format, Operator, Segment};

/// What is known when a header value is written.
#[derive(Clone, Copy)]
pub(super) struct Facts<'a> {
    pub(super) conn: &'a Conn,
    /// URI names of our certificate.
    pub(super) local_uris: &'a [String],
    /// The client after x-forwarded-for.
    pub(super) remote: IpAddr,
    pub(super) request: Option<&'a Head>,
    pub(super) response: Option<(&'a HeaderMap, u16)>,
    pub(super) route: &'a str,
    pub(super) cluster: &'a str,
    pub(super) host: Option<SocketAddr>,
}

impl Facts<'_> {
    /// The text of a format; what is not known is left out.
    pub(super) fn render(&self, format: &Format) -> String {
        format.render(|operator, out| {
            self.put(operator, out);
            true
        })
    }

    fn put(&self, operator: &Operator, out: &mut String) {
        match &*operator.name {
            "REQ" => self.request_header(&operator.argument, out),
            "RESP" => {
                if let Some((headers, _)) = self.response {
                    header(headers, &operator.argument, out);
                }
            }
            "PROTOCOL" => out.push_str(self.request.map_or("", |r| protocol(r.version))),
            "RESPONSE_CODE" => show(out, self.response.map(|(_, code)| code)),
            "START_TIME" => start_time(self.conn.started, out),
            "ROUTE_NAME" => out.push_str(self.route),
            "UPSTREAM_CLUSTER" => out.push_str(self.cluster),
            "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => show(out, self.host),
            "HOSTNAME" => out.push_str(&self.conn.env.node.hostname),
            "CONNECTION_ID" => show(out, Some(self.conn.id)),
            other => self.put_connection(other, out),
        }
    }

    fn put_connection(&self, name: &str, out: &mut String) {
        let conn = self.conn;
        let peer = conn.tls.as_deref();
        let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
        match name {
            "DOWNSTREAM_REMOTE_ADDRESS" => show(out, Some(self.remote_address())),
            "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => show(out, Some(self.remote)),
            "DOWNSTREAM_REMOTE_PORT" => show(out, Some(self.remote_address().port())),
            "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => show(out, Some(conn.peer)),
            "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => show(out, Some(conn.peer.ip())),
            "DOWNSTREAM_LOCAL_ADDRESS" => show(out, Some(conn.destination)),
            "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => show(out, Some(conn.destination.ip())),
            "DOWNSTREAM_LOCAL_PORT" => show(out, Some(conn.destination.port())),
            "REQUESTED_SERVER_NAME" => show(out, conn.sni.as_deref()),
            "DOWNSTREAM_PEER_URI_SAN" => out.push_str(&peer.map(|p| p.uri_sans.join(",")).unwrap_or_default()),
            "DOWNSTREAM_LOCAL_URI_SAN" => out.push_str(&self.local_uris.join(",")),
            "DOWNSTREAM_PEER_SUBJECT" => out.push_str(&text(peer.map(|p| p.subject.as_str()))),
            "DOWNSTREAM_PEER_FINGERPRINT_256" => out.push_str(&text(peer.map(|p| p.hash.as_str()))),
            "DOWNSTREAM_TLS_VERSION" => out.push_str(peer.map_or("", |p| p.tls_version)),
            "DOWNSTREAM_TLS_CIPHER" => out.push_str(&text(peer.map(|p| p.cipher.as_str()))),
            _ => {}
        }
    }

    /// The port is only known of the connection's own peer.
    fn remote_address(&self) -> SocketAddr {
        if self.remote == self.conn.peer.ip() { self.conn.peer } else { SocketAddr::new(self.remote, 0) }
    }

    /// `NAME?OTHER`: the first that is there.
    fn request_header(&self, names: &str, out: &mut String) {
        let Some(head) = self.request else { return };
        for name in names.split('?') {
            let before = out.len();
            match &*name.to_ascii_lowercase() {
                ":method" => out.push_str(head.method.as_str()),
                ":path" => out.push_str(head.path.as_str()),
                ":authority" | "host" => out.push_str(head.authority()),
                ":scheme" => out.push_str(head.scheme.as_str()),
                lower => header(&head.headers, lower, out),
            }
            if out.len() > before {
                return;
            }
        }
    }
}

fn header(headers: &HeaderMap, name: &str, out: &mut String) {
    let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else { return };
    if let Some(value) = headers.get(name) {
        out.push_str(&String::from_utf8_lossy(value.as_bytes()));
    }
}

fn show(out: &mut String, value: Option<impl std::fmt::Display>) {
    if let Some(value) = value {
        write!(out, "{value}").expect("writing to a string cannot fail");
    }
}

fn start_time(at: SystemTime, out: &mut String) {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = i64::try_from(seconds).unwrap_or_default();
    show(out, OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|t| t.format(&Rfc3339).ok()));
}

/// `HTTP/1.1`
pub(super) fn protocol(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_2 => "HTTP/2",
        http::Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    }
}

/// Whether a format asks for the request.
pub(super) fn asks_for_request(format: &Format) -> bool {
    let asks = |segment: &Segment| matches!(segment, Segment::Operator(op) if &*op.name == "REQ");
    format.constant().is_none() && format.segments().iter().any(asks)
}
