//! Traces: which requests are traced, whose context they continue, and what a span says of one.
//!
//! Everything here is pure: headers and random bits come in, headers and bytes go out.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue};
use proxy_config::model;
use serde_json::{Map, Value, json};

use super::access_log::Template;
use super::attributes::Facts;
use super::outbox::{Speaks, Target};
use super::wire::{Message, attribute, nanos};

/// Longest path in a span, as Envoy's default.
const PATH_LENGTH: usize = 256;

const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Tracing of a connection manager with somebody to report to.
#[derive(Debug)]
pub struct Tracer {
    target: Arc<Target>,
    /// Contexts of B3 are read and written.
    b3: bool,
    /// Contexts of W3C are read and written.
    w3c: bool,
    /// Trace ids have 128 bits.
    wide: bool,
    /// Shares in ten-thousandths.
    random: u64,
    overall: u64,
    path_length: usize,
    tags: Box<[(String, Tag)]>,
}

#[derive(Debug)]
enum Tag {
    Literal(String),
    /// A request header, and what stands for it.
    Header(HeaderName, String),
    Format(Template),
}

/// Where a request is in its trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanContext {
    trace: u128,
    span: u64,
    parent: Option<u64>,
    /// It is reported.
    pub sampled: bool,
}

/// What a span tells beside the record.
#[derive(Debug, Clone, Copy)]
pub struct SpanNames<'a> {
    /// What the request does, by the route's decorator; empty: not known.
    pub operation: &'a str,
    /// This service.
    pub service: &'a str,
}

impl Tracer {
    /// Compiles; `None`: there is nobody to report to.
    ///
    /// # Errors
    /// What of it is not supported.
    pub fn compile(said: &model::Tracing) -> Result<Option<Self>, String> {
        let Some(provider) = &said.provider else { return Ok(None) };
        let config = &provider["typed_config"];
        let kind = config["@type"].as_str().unwrap_or_default();
        let zipkin = kind.ends_with("envoy.config.trace.v3.ZipkinConfig");
        if !zipkin && !kind.ends_with("envoy.config.trace.v3.OpenTelemetryConfig") {
            return Err(format!("tracing by {}", provider["name"].as_str().unwrap_or(kind)));
        }
        let target = if zipkin { of_zipkin(config) } else { of_opentelemetry(config) }?;
        let share =
            |percent: Option<f64>, otherwise: f64| (percent.unwrap_or(otherwise).clamp(0.0, 100.0) * 100.0) as u64;
        let option = config["trace_context_option"].as_str().unwrap_or_default();
        Ok(Some(Self {
            target: Arc::new(target),
            b3: zipkin,
            w3c: !zipkin || option == "USE_B3_WITH_W3C_PROPAGATION",
            wide: !zipkin || config["trace_id_128bit"] == true,
            random: share(said.random_sampling, 100.0),
            overall: share(said.overall_sampling, 100.0),
            path_length: said.max_path_tag_length.map_or(PATH_LENGTH, |length| length as usize),
            tags: said.custom_tags.iter().filter_map(|(name, value)| Some((name.clone(), tag(value)?))).collect(),
        }))
    }

    /// Request headers that spans tell.
    pub fn headers(&self) -> Vec<HeaderName> {
        let named = self.tags.iter().filter_map(|(_, tag)| match tag {
            Tag::Header(name, _) => Some(name.clone()),
            Tag::Literal(_) | Tag::Format(_) => None,
        });
        named.chain([HeaderName::from_static("x-envoy-downstream-service-cluster")]).collect()
    }

    /// The context of a request that comes, put into its headers for whoever is next. `draw` is below 10 000 and stands
    /// for the request, the same on every hop; `random` makes ids.
    pub fn begin(&self, headers: &mut HeaderMap, forced: bool, draw: u64, random: (u128, u64)) -> SpanContext {
        let drawn = forced || draw < self.random;
        let wanted = drawn && draw < self.overall;
        let (trace, span) = (random.0.max(1), random.1.max(1));
        let context = match self.extract(headers) {
            Some(Parent { trace, span: parent, sampled }) => {
                SpanContext { trace, span, parent, sampled: sampled.unwrap_or(wanted) }
            }
            None => {
                let trace = if self.wide { trace } else { trace & u128::from(u64::MAX) };
                SpanContext { trace: trace.max(1), span, parent: None, sampled: wanted }
            }
        };
        self.inject(&context, headers);
        context
    }

    fn extract(&self, headers: &HeaderMap) -> Option<Parent> {
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let b3 = || {
            text(&B3).and_then(b3_single).or_else(|| {
                let flag = match (text(&B3_FLAGS), text(&B3_SAMPLED)) {
                    (Some("1"), _) | (_, Some("1" | "true")) => Some(true),
                    (_, Some("0" | "false")) => Some(false),
                    _ => None,
                };
                Some(Parent {
                    trace: trace_id(text(&B3_TRACE)?)?,
                    span: Some(span_id(text(&B3_SPAN)?)?),
                    sampled: flag,
                })
            })
        };
        let w3c = || text(&TRACEPARENT).and_then(traceparent);
        let found = if self.b3 { b3() } else { None };
        found.or_else(|| if self.w3c { w3c() } else { None })
    }

    fn inject(&self, context: &SpanContext, headers: &mut HeaderMap) {
        let mut put = |name: HeaderName, text: String| {
            headers.insert(name, HeaderValue::try_from(text).expect("hexadecimal digits and dashes"));
        };
        if self.b3 {
            put(B3_TRACE, self.trace_text(context));
            put(B3_SPAN, format!("{:016x}", context.span));
            put(B3_SAMPLED, u8::from(context.sampled).to_string());
            if let Some(parent) = context.parent {
                put(B3_PARENT, format!("{parent:016x}"));
            }
        }
        if self.w3c {
            let flags = u8::from(context.sampled);
            put(TRACEPARENT, format!("00-{:032x}-{:016x}-{flags:02x}", context.trace, context.span));
        }
    }

    fn trace_text(&self, context: &SpanContext) -> String {
        let narrow = u64::try_from(context.trace).ok().filter(|_| !self.wide);
        narrow.map_or_else(|| format!("{:032x}", context.trace), |narrow| format!("{narrow:016x}"))
    }

    /// The span of a request that ended, in its collector's words.
    pub(super) fn encode(
        &self,
        context: &SpanContext,
        facts: &Facts<'_>,
        names: SpanNames<'_>,
    ) -> (&Arc<Target>, Vec<u8>) {
        let tags = self.tags(facts);
        let span = match &self.target.speaks {
            Speaks::Zipkin(_) => self.zipkin(context, facts, names, tags),
            _ => otlp(context, facts, names, &tags),
        };
        (&self.target, span)
    }

    fn tags(&self, facts: &Facts<'_>) -> Vec<(String, String)> {
        let record = facts.record;
        let header = |name: &'static str| {
            let value = record.request_headers.get(&HeaderName::from_static(name));
            value.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let or_dash = |text: Option<String>| text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned());
        let path = if record.original_path.is_empty() { record.path } else { record.original_path };
        let mut url = format!("{}://{}{}", record.scheme, record.authority, cut(path, self.path_length));
        url.retain(|c| !c.is_control());
        let mut out: Vec<(String, String)> = [
            ("component", "proxy".to_owned()),
            ("node_id", facts.node.id.clone()),
            ("guid:x-request-id", header("x-request-id").unwrap_or_default()),
            ("http.url", url),
            ("http.method", record.method.to_owned()),
            ("downstream_cluster", or_dash(header("x-envoy-downstream-service-cluster"))),
            ("user_agent", or_dash(header("user-agent"))),
            ("http.protocol", record.protocol.to_owned()),
            ("peer.address", record.downstream_direct_remote.map(|a| a.ip().to_string()).unwrap_or_default()),
            ("request_size", record.bytes_received.to_string()),
            ("response_size", record.bytes_sent.to_string()),
            ("http.status_code", record.code.to_string()),
            ("response_flags", record.flags.to_string()),
            ("upstream_cluster", record.upstream_cluster.to_owned()),
            ("upstream_cluster.name", record.upstream_cluster.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        if let Some(status) = record.grpc_status {
            out.push(("grpc.status_code".to_owned(), status.to_string()));
        }
        if record.code == 0 || record.code >= 500 || record.grpc_status.is_some_and(|status| status != 0) {
            out.push(("error".to_owned(), "true".to_owned()));
        }
        out.extend(self.tags.iter().filter_map(|(name, tag)| {
            let value = match tag {
                Tag::Literal(text) => text.clone(),
                Tag::Header(header, otherwise) => {
                    let value = record.request_headers.get(header);
                    value.map_or_else(|| otherwise.clone(), |v| String::from_utf8_lossy(v.as_bytes()).into_owned())
                }
                Tag::Format(template) => template.text(facts),
            };
            (!value.is_empty()).then(|| (name.clone(), value))
        }));
        out
    }

    fn zipkin(
        &self,
        context: &SpanContext,
        facts: &Facts<'_>,
        names: SpanNames<'_>,
        tags: Vec<(String, String)>,
    ) -> Vec<u8> {
        let record = facts.record;
        let since = record.start.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut place = json!({"serviceName": names.service});
        if let Some(own) = record.downstream_local.filter(|_| !record.outbound).or(record.upstream_local) {
            place[if own.is_ipv4() { "ipv4" } else { "ipv6" }] = json!(own.ip().to_string());
        }
        let mut span = json!({
            "traceId": self.trace_text(context),
            "id": format!("{:016x}", context.span),
            "name": name(facts, names),
            "timestamp": micros(since),
            "duration": micros(record.duration).max(1),
            "kind": if record.outbound { "CLIENT" } else { "SERVER" },
            "localEndpoint": place,
            "tags": tags.into_iter().map(|(name, value)| (name, Value::String(value))).collect::<Map<_, _>>(),
        });
        if let Some(parent) = context.parent {
            span["parentId"] = json!(format!("{parent:016x}"));
        }
        span.to_string().into_bytes()
    }
}

fn micros(of: Duration) -> u64 {
    u64::try_from(of.as_micros()).unwrap_or(u64::MAX)
}

fn name(facts: &Facts<'_>, names: SpanNames<'_>) -> String {
    match (names.operation, facts.record.outbound) {
        ("", true) => format!("egress {}", facts.record.authority),
        ("", false) => "ingress".to_owned(),
        (operation, _) => operation.to_owned(),
    }
}

fn cut(text: &str, length: usize) -> &str {
    let mut end = text.len().min(length);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// `opentelemetry.proto.trace.v1.Span`
fn otlp(context: &SpanContext, facts: &Facts<'_>, names: SpanNames<'_>, tags: &[(String, String)]) -> Vec<u8> {
    let record = facts.record;
    let end: SystemTime = record.start + record.duration;
    let mut out = Message::default();
    out.bytes(1, &context.trace.to_be_bytes()).bytes(2, &context.span.to_be_bytes());
    if let Some(parent) = context.parent {
        out.bytes(4, &parent.to_be_bytes());
    }
    out.text(5, &name(facts, names)).number(6, if record.outbound { 3 } else { 2 });
    out.fixed(7, nanos(record.start)).fixed(8, nanos(end));
    for (key, value) in tags {
        out.message(9, &attribute(key, value));
    }
    if tags.iter().any(|(name, _)| name == "error") {
        let mut status = Message::default();
        status.number(3, 2);
        out.message(15, &status);
    }
    out.0
}

/// Whose child a request is.
struct Parent {
    trace: u128,
    span: Option<u64>,
    /// `None`: whoever comes next decides.
    sampled: Option<bool>,
}

/// 16 or 32 hexadecimal digits, not all zero.
fn trace_id(text: &str) -> Option<u128> {
    let digits = matches!(text.len(), 16 | 32) && text.bytes().all(|b| b.is_ascii_hexdigit());
    u128::from_str_radix(text, 16).ok().filter(|id| digits && *id != 0)
}

/// 16 hexadecimal digits, not all zero.
fn span_id(text: &str) -> Option<u64> {
    let digits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
    u64::from_str_radix(text, 16).ok().filter(|id| digits && *id != 0)
}

/// `TRACE-SPAN[-SAMPLED[-PARENT]]`
fn b3_single(text: &str) -> Option<Parent> {
    let mut parts = text.split('-');
    let (trace, span) = (trace_id(parts.next()?)?, span_id(parts.next()?)?);
    let sampled = match parts.next() {
        Some("1" | "d") => Some(true),
        Some("0") => Some(false),
        _ => None,
    };
    Some(Parent { trace, span: Some(span), sampled })
}

/// `VERSION-TRACE-SPAN-FLAGS`
fn traceparent(text: &str) -> Option<Parent> {
    let parts: Vec<&str> = text.split('-').collect();
    let [version, trace, span, flags, ..] = parts[..] else { return None };
    if version.len() != 2 || version == "ff" || trace.len() != 32 || (version == "00" && parts.len() != 4) {
        return None;
    }
    let flags = u8::from_str_radix(flags, 16).ok().filter(|_| flags.len() == 2)?;
    Some(Parent { trace: trace_id(trace)?, span: Some(span_id(span)?), sampled: Some(flags & 1 == 1) })
}

fn of_zipkin(config: &Value) -> Result<Target, String> {
    if let Some(version) = config["collector_endpoint_version"].as_str()
        && version != "HTTP_JSON"
    {
        return Err(format!("Zipkin's {version}"));
    }
    let service = &config["collector_service"]["http_uri"];
    if service.is_object() {
        let (authority, path) = split_uri(service["uri"].as_str().unwrap_or_default());
        return target(service["cluster"].as_str(), authority, Speaks::Zipkin(path));
    }
    let cluster = config["collector_cluster"].as_str();
    let path = config["collector_endpoint"].as_str().unwrap_or("/api/v2/spans").to_owned();
    let authority = config["collector_hostname"].as_str().or(cluster).unwrap_or_default().to_owned();
    target(cluster, authority, Speaks::Zipkin(path))
}

fn of_opentelemetry(config: &Value) -> Result<Target, String> {
    let service = config["service_name"].as_str().unwrap_or("unknown_service:envoy").to_owned();
    if config["sampler"].is_object() {
        return Err("a sampler of OpenTelemetry's".to_owned());
    }
    let http = &config["http_service"]["http_uri"];
    if http.is_object() {
        let (authority, path) = split_uri(http["uri"].as_str().unwrap_or_default());
        return target(http["cluster"].as_str(), authority, Speaks::OtlpHttp(path, service));
    }
    let grpc = &config["grpc_service"];
    let cluster = grpc["cluster"].as_str();
    let authority = grpc["authority"].as_str().or(cluster).unwrap_or_default().to_owned();
    target(cluster, authority, Speaks::OtlpTraces(service))
}

fn target(cluster: Option<&str>, authority: String, speaks: Speaks) -> Result<Target, String> {
    let cluster = cluster.filter(|name| !name.is_empty()).ok_or("tracing without a cluster")?;
    Ok(Target { cluster: cluster.into(), authority, speaks })
}

/// Host and path of an absolute URI.
fn split_uri(uri: &str) -> (String, String) {
    let rest = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    (host.to_owned(), if path.is_empty() { "/" } else { path }.to_owned())
}

fn tag(said: &Value) -> Option<Tag> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    if let Some(literal) = said.get("literal") {
        return Some(Tag::Literal(text(&literal["value"])));
    }
    if let Some(variable) = said.get("environment") {
        // The process's environment is read in one place only; here the default stands.
        return Some(Tag::Literal(text(&variable["default_value"])));
    }
    if let Some(header) = said.get("request_header") {
        let name = text(&header["name"]).to_ascii_lowercase().parse().ok()?;
        return Some(Tag::Header(name, text(&header["default_value"])));
    }
    if let Some(format) = said.get("value") {
        return Some(Tag::Format(Template::compile(&text(format)).0));
    }
    // What dry-run policies said is not kept.
    said.get("metadata").map(|metadata| Tag::Literal(text(&metadata["default_value"])))
}

#[cfg(test)]
#[path = "tracer_tests.rs"]
mod tests;
