//! Access logs as configured: formats and filters compiled once, lines rendered into a buffer.

use std::sync::Arc;

use http::{HeaderMap, HeaderName};
use serde_json::Value;

use super::attributes::Facts;
use super::cel::Expression;
use super::format::{Format, Segment};
use super::json_log::put_json_text;
use super::operator::{Op, Wrote};
use super::outbox::Target;
use super::record::Captured;
use super::remote_log::{Entry, Remote};
use crate::error::Flags;

/// Envoy's own format, when a log names none.
const ENVOY_FORMAT: &str = concat!(
    "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% ",
    "%RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% ",
    "\"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" ",
    "\"%UPSTREAM_HOST%\"\n"
);

/// Where standard output is written to under all its names.
pub(super) const STDOUT: &str = "/dev/stdout";

/// A log as said.
#[derive(Debug, Clone)]
pub struct SaidLog<'a> {
    /// File; `-` and `/dev/stdout` are standard output.
    pub path: &'a str,
    /// What a line looks like.
    pub shape: LogShape<'a>,
    /// What is absent is left out instead of written as `-` or null.
    pub omit_empty: bool,
    /// Which records are written; `None`: all.
    pub filter: Option<LogFilter>,
}

/// What a line looks like.
#[derive(Debug, Clone)]
pub enum LogShape<'a> {
    /// No line in a file: an entry for a collector.
    Remote(Box<SaidRemote>),
    /// Text with command operators; it ends its lines itself.
    Text(&'a str),
    /// A JSON object whose texts have command operators.
    Json(&'a Value),
    /// Envoy's default text.
    Default,
}

/// A log that goes to a collector.
#[derive(Debug, Clone)]
pub struct SaidRemote {
    /// Where to.
    pub target: Target,
    /// What an entry holds.
    pub shape: RemoteShape,
}

/// What an entry for a collector holds.
#[derive(Debug, Clone)]
pub enum RemoteShape {
    /// Requests, with these headers of theirs and of their responses.
    Http {
        /// Request headers.
        request: Vec<HeaderName>,
        /// Response headers.
        response: Vec<HeaderName>,
    },
    /// TCP connections.
    Tcp,
    /// Texts with command operators.
    Otlp {
        /// Body.
        body: Option<String>,
        /// Attributes.
        attributes: Vec<(String, String)>,
    },
}

/// Which records are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogFilter {
    /// It is true.
    Expression(Expression),
    /// One of these flags is set; none given: any flag.
    Flags(Flags),
    /// The status compares.
    Status(Compare, u16),
    /// All hold.
    And(Vec<Self>),
    /// One holds.
    Or(Vec<Self>),
}

/// How a status compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// At least.
    Ge,
    /// At most.
    Le,
}

impl LogFilter {
    /// Whether a record is written.
    pub fn holds(&self, facts: &Facts<'_>) -> bool {
        let record = facts.record;
        match self {
            Self::Expression(expression) => expression.holds(facts),
            Self::Flags(wanted) if wanted.is_empty() => !record.flags.is_empty(),
            Self::Flags(wanted) => record.flags.intersects(*wanted),
            Self::Status(Compare::Eq, status) => record.code == *status,
            Self::Status(Compare::Ne, status) => record.code != *status,
            Self::Status(Compare::Ge, status) => record.code >= *status,
            Self::Status(Compare::Le, status) => record.code <= *status,
            Self::And(all) => all.iter().all(|filter| filter.holds(facts)),
            Self::Or(some) => some.iter().any(|filter| filter.holds(facts)),
        }
    }

    /// Request and response headers that it reads.
    fn headers(&self, out: &mut (Vec<HeaderName>, Vec<HeaderName>)) {
        match self {
            Self::Expression(expression) => {
                let (request, response) = expression.headers();
                out.0.extend(request);
                out.1.extend(response);
            }
            Self::And(parts) | Self::Or(parts) => parts.iter().for_each(|part| part.headers(out)),
            Self::Flags(_) | Self::Status(..) => {}
        }
    }
}

/// The logs of a chain or listener, compiled.
#[derive(Debug, Default)]
pub struct AccessLogs {
    logs: Box<[Log]>,
    request_headers: Box<[HeaderName]>,
    response_headers: Box<[HeaderName]>,
}

/// One log.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) to: To,
    filter: Option<LogFilter>,
}

/// Where a log goes.
#[derive(Debug)]
pub(super) enum To {
    File(FileLog),
    Collector(Remote),
}

/// Lines in a file.
#[derive(Debug)]
pub(super) struct FileLog {
    pub(super) path: Arc<str>,
    pieces: Box<[Piece]>,
    omit_empty: bool,
    is_json: bool,
}

/// A text with command operators; what is absent is empty.
#[derive(Debug)]
pub(super) struct Template(Box<[Piece]>);

impl Template {
    /// Compiles. The second value names the operators that we do not know.
    pub(super) fn compile(said: &str) -> (Self, Vec<String>) {
        let (mut pieces, mut unknown) = (Vec::new(), Vec::new());
        text(said, Piece::Text, &mut unknown, &mut pieces);
        (Self(pieces.into()), unknown)
    }

    /// The text.
    pub(super) fn text(&self, facts: &Facts<'_>) -> String {
        let mut out = Vec::new();
        write_pieces(&self.0, facts, true, &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    fn headers(&self, out: &mut (Vec<HeaderName>, Vec<HeaderName>)) {
        self.0.iter().filter_map(Piece::op).for_each(|op| op.headers(out));
    }
}

/// A piece of a line.
#[derive(Debug)]
enum Piece {
    Literal(Box<str>),
    /// An operator in text: `-` when absent.
    Text(Op),
    /// An operator that is a whole JSON value: a number, a text or null.
    Json(Op),
    /// An operator inside a JSON text.
    JsonText(Op),
}

impl AccessLogs {
    /// Compiles. The second value names the operators that we do not know; they print as absent.
    pub fn compile<'a>(said: impl IntoIterator<Item = SaidLog<'a>>) -> (Self, Vec<String>) {
        let mut unknown = Vec::new();
        let logs: Box<[Log]> = said.into_iter().map(|said| Log::compile(said, &mut unknown)).collect();
        let request_headers = vec![
            http::header::USER_AGENT,
            HeaderName::from_static("x-forwarded-for"),
            HeaderName::from_static("x-request-id"),
        ];
        let mut read = (request_headers, Vec::new());
        for log in &logs {
            log.to.headers(&mut read);
            if let Some(filter) = &log.filter {
                filter.headers(&mut read);
            }
        }
        let logs = Self { logs, ..Self::default() };
        (logs.reading(read), unknown)
    }

    /// The same, keeping these headers of requests and of responses too.
    #[must_use]
    pub fn reading(mut self, (request, response): (Vec<HeaderName>, Vec<HeaderName>)) -> Self {
        for (kept, more) in [(&mut self.request_headers, request), (&mut self.response_headers, response)] {
            let mut names: Vec<HeaderName> = kept.iter().cloned().chain(more).collect();
            names.sort_by(|one, other| one.as_str().cmp(other.as_str()));
            names.dedup();
            *kept = names.into();
        }
        self
    }

    /// Whether nothing is logged.
    pub fn is_empty(&self) -> bool {
        self.logs.is_empty()
    }

    /// Keeps the request headers that lines will tell, before they go upstream.
    pub fn capture_request(&self, headers: &HeaderMap) -> Captured {
        capture(&self.request_headers, headers)
    }

    /// Keeps the response headers that lines will tell.
    pub fn capture_response(&self, headers: &HeaderMap) -> Captured {
        capture(&self.response_headers, headers)
    }

    pub(super) fn wanted<'a>(&'a self, facts: &'a Facts<'_>) -> impl Iterator<Item = &'a Log> {
        self.logs.iter().filter(|log| log.filter.as_ref().is_none_or(|filter| filter.holds(facts)))
    }
}

impl To {
    fn headers(&self, out: &mut (Vec<HeaderName>, Vec<HeaderName>)) {
        match self {
            Self::File(file) => file.pieces.iter().filter_map(Piece::op).for_each(|op| op.headers(out)),
            Self::Collector(remote) => match &remote.entry {
                Entry::Http(request, response) => {
                    out.0.extend(request.iter().cloned());
                    out.1.extend(response.iter().cloned());
                }
                Entry::Tcp => {}
                Entry::Otlp(body, attributes) => {
                    let all = body.iter().chain(attributes.iter().map(|(_, template)| template));
                    all.for_each(|template| template.headers(out));
                }
            },
        }
    }
}

fn capture(names: &[HeaderName], headers: &HeaderMap) -> Captured {
    names.iter().filter_map(|name| Some((name.clone(), headers.get(name)?.clone()))).collect()
}

impl Log {
    fn compile(said: SaidLog<'_>, unknown: &mut Vec<String>) -> Self {
        let mut pieces = Vec::new();
        let is_json = matches!(said.shape, LogShape::Json(_));
        match said.shape {
            LogShape::Remote(remote) => {
                return Self { to: To::Collector(collector(*remote, unknown)), filter: said.filter };
            }
            LogShape::Text(format) => text(format, Piece::Text, unknown, &mut pieces),
            LogShape::Default => text(ENVOY_FORMAT, Piece::Text, unknown, &mut pieces),
            LogShape::Json(value) => {
                json(value, unknown, &mut pieces);
                literal("\n", &mut pieces);
            }
        }
        let path = canonical_path(said.path).into();
        let file = FileLog { path, pieces: pieces.into(), omit_empty: said.omit_empty, is_json };
        Self { to: To::File(file), filter: said.filter }
    }
}

fn collector(said: SaidRemote, unknown: &mut Vec<String>) -> Remote {
    let mut template = |text: &str| {
        let (template, not_known) = Template::compile(text);
        unknown.extend(not_known);
        template
    };
    let entry = match said.shape {
        RemoteShape::Http { request, response } => Entry::Http(request, response),
        RemoteShape::Tcp => Entry::Tcp,
        RemoteShape::Otlp { body, attributes } => Entry::Otlp(
            body.as_deref().map(&mut template),
            attributes.into_iter().map(|(name, text)| (name, template(&text))).collect(),
        ),
    };
    Remote { target: Arc::new(said.target), entry }
}

impl FileLog {
    /// Appends the line.
    pub(super) fn write(&self, facts: &Facts<'_>, out: &mut Vec<u8>) {
        let start = out.len();
        write_pieces(&self.pieces, facts, self.omit_empty, out);
        if self.omit_empty && self.is_json {
            without_nulls(out, start);
        }
    }
}

fn write_pieces(pieces: &[Piece], facts: &Facts<'_>, omit_empty: bool, out: &mut Vec<u8>) {
    for piece in pieces {
        match piece {
            Piece::Literal(text) => out.extend_from_slice(text.as_bytes()),
            Piece::Text(op) => {
                if op.write(facts, out) == Wrote::Nothing && !omit_empty {
                    out.push(b'-');
                }
            }
            Piece::Json(op) => json_value(op, facts, out),
            Piece::JsonText(op) => {
                let mut value = Vec::new();
                if op.write(facts, &mut value) == Wrote::Nothing {
                    value.push(b'-');
                }
                put_json_text(&value, out);
            }
        }
    }
}

/// Takes fields that are null out of the object that begins at `start`. Only who asks for it pays for the second pass.
fn without_nulls(out: &mut Vec<u8>, start: usize) {
    fn prune(value: &mut Value) {
        if let Value::Object(fields) = value {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(prune);
        }
    }
    let Ok(mut value) = serde_json::from_slice(&out[start..]) else { return };
    prune(&mut value);
    out.truncate(start);
    out.extend_from_slice(value.to_string().as_bytes());
    out.push(b'\n');
}

pub(super) fn canonical_path(path: &str) -> &str {
    if path == "-" { STDOUT } else { path }
}

impl Piece {
    fn op(&self) -> Option<&Op> {
        match self {
            Self::Literal(_) => None,
            Self::Text(op) | Self::Json(op) | Self::JsonText(op) => Some(op),
        }
    }
}

fn json_value(op: &Op, facts: &Facts<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    match op.write(facts, out) {
        Wrote::Nothing => out.extend_from_slice(b"null"),
        Wrote::Number => {}
        Wrote::Text => {
            let value = out.split_off(start);
            out.push(b'"');
            put_json_text(&value, out);
            out.push(b'"');
        }
    }
}

/// Appends a literal, to the last one if the line ends in one.
fn literal(text: &str, pieces: &mut Vec<Piece>) {
    if let Some(Piece::Literal(last)) = pieces.last_mut() {
        *last = format!("{last}{text}").into();
    } else {
        pieces.push(Piece::Literal(text.into()));
    }
}

fn text(format: &str, wrap: fn(Op) -> Piece, unknown: &mut Vec<String>, pieces: &mut Vec<Piece>) {
    for segment in Format::compile(format).segments() {
        match segment {
            Segment::Literal(text) => literal(text, pieces),
            Segment::Operator(said) => {
                let (op, not_known) = Op::compile(said);
                unknown.extend(not_known);
                pieces.push(wrap(op));
            }
        }
    }
}

/// Flattens a JSON value into literals and operators.
fn json(value: &Value, unknown: &mut Vec<String>, pieces: &mut Vec<Piece>) {
    match value {
        Value::Object(fields) => {
            for (i, (key, value)) in fields.iter().enumerate() {
                literal(if i == 0 { "{" } else { "," }, pieces);
                literal(&Value::from(key.as_str()).to_string(), pieces);
                literal(":", pieces);
                json(value, unknown, pieces);
            }
            literal(if fields.is_empty() { "{}" } else { "}" }, pieces);
        }
        Value::Array(items) => {
            for (i, value) in items.iter().enumerate() {
                literal(if i == 0 { "[" } else { "," }, pieces);
                json(value, unknown, pieces);
            }
            literal(if items.is_empty() { "[]" } else { "]" }, pieces);
        }
        Value::String(format) => json_format(format, unknown, pieces),
        Value::Null | Value::Bool(_) | Value::Number(_) => literal(&value.to_string(), pieces),
    }
}

/// A format that is one operator becomes a value of its type; anything else is a text.
fn json_format(format: &str, unknown: &mut Vec<String>, pieces: &mut Vec<Piece>) {
    if let [Segment::Operator(said)] = Format::compile(format).segments() {
        let (op, not_known) = Op::compile(said);
        unknown.extend(not_known);
        pieces.push(Piece::Json(op));
        return;
    }
    literal("\"", pieces);
    for segment in Format::compile(format).segments() {
        match segment {
            Segment::Literal(text) => {
                let quoted = Value::from(&**text).to_string();
                literal(&quoted[1..quoted.len() - 1], pieces);
            }
            Segment::Operator(said) => {
                let (op, not_known) = Op::compile(said);
                unknown.extend(not_known);
                pieces.push(Piece::JsonText(op));
            }
        }
    }
    literal("\"", pieces);
}

#[cfg(test)]
#[path = "access_log_tests.rs"]
mod tests;
