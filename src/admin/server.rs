//! HTTP/1 on three ports; who may ask for what.

use std::collections::VecDeque;
use std::io::Write as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use regex::Regex;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::config_dump::{Ask, config_dump};
use super::{Admin, clusters, dump, ready, stats};
use crate::drain::Phase;
use crate::explain;
use crate::net::Stream;
use crate::telemetry::{StatsQuery, render_json, render_text};

/// Connections served at once on one port; one more ends the oldest. Waiting instead would let whoever opens so many and
/// says nothing keep the kubelet's probe out.
const CONNECTIONS: usize = 128;
/// The longest that request headers, or the next request of a connection, may take.
const HEADER_LIMIT: Duration = Duration::from_secs(30);
/// The same where each connection is one probe, and anybody may connect.
const PROBE_HEADER_LIMIT: Duration = Duration::from_secs(5);
/// After an accept error that is not one connection's, such as no file descriptors.
const BACK_OFF: Duration = Duration::from_millis(50);
/// Largest body that is read, bytes (calls to explain).
const BODY_LIMIT: usize = 1 << 20;
/// Smaller bodies are not worth compressing, bytes.
const GZIP_FROM: usize = 1024;

const TEXT: &str = "text/plain; charset=UTF-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";

const HELP: &str = "\
/certs: certificates and roots
/clusters: hosts with their health and totals (?format=json)
/config_dump: the configuration as received, else as understood, with everything that is not served as said
    (?mask=FIELD,..., ?include_eds)
/debug/workers: what each worker carries
/drain_listeners: say goodbye: new connections are refused (POST; ?graceful: only said, not done yet)
/explain: what would happen to calls, one JSON object a line (POST)
/healthcheck/fail: fail readiness (POST)
/healthcheck/ok: stop failing it (POST)
/help: this list
/listeners: listeners with their addresses (?format=json)
/logging: levels of the log (POST; ?level=L for all, ?TARGET=L for one module)
/memory: memory of the process
/quitquitquit: end at once (POST)
/ready: LIVE, or why not
/server_info: version, state, uptime
/stats: counters (?format=json or prometheus, ?usedonly, ?filter=REGEX)
/stats/prometheus: counters for Prometheus
";

/// Which port asks, and so what may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// 15000: everything.
    Admin,
    /// 15090: `/stats/prometheus`.
    Metrics,
    /// 15021: `/healthz/ready`.
    Ready,
}

/// An answer whose body is still plain bytes.
type Answer = Response<Bytes>;

/// Serves a port until dropped.
pub async fn serve(listener: TcpListener, admin: Admin, port: Port) {
    let mut open = Open::default();
    loop {
        match listener.accept().await {
            Ok((tcp, _)) => open.push(tokio::spawn(serve_connection(tcp.into(), admin.clone(), port))),
            Err(error) => {
                tracing::debug!(?port, %error, "accept");
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }
}

/// Connections of a port, the oldest first. Dropping it ends them.
#[derive(Default)]
struct Open(VecDeque<JoinHandle<()>>);

impl Open {
    /// One more; the oldest ends if there are too many.
    fn push(&mut self, connection: JoinHandle<()>) {
        if self.0.len() >= CONNECTIONS {
            self.0.retain(|connection| !connection.is_finished());
        }
        if self.0.len() >= CONNECTIONS
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
        }
        self.0.push_back(connection);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// Serves one connection to its end.
pub(super) async fn serve_connection(stream: Stream, admin: Admin, port: Port) {
    let service = service_fn(move |request| {
        let admin = admin.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(&admin, port, request).await.map(Full::new)) }
    });
    let mut http = http1::Builder::new();
    let limit = if port == Port::Ready { PROBE_HEADER_LIMIT } else { HEADER_LIMIT };
    http.timer(TokioTimer::new()).header_read_timeout(limit).keep_alive(port != Port::Ready);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(?port, %error, "admin connection");
    }
}

async fn answer(admin: &Admin, port: Port, request: Request<Incoming>) -> Answer {
    let (head, body) = request.into_parts();
    let query = Query::parse(head.uri.query().unwrap_or_default());
    let path = head.uri.path();
    let reading = head.method == Method::GET || head.method == Method::HEAD;
    match (port, path) {
        (Port::Ready, "/healthz/ready") => readiness(admin, ""),
        (Port::Metrics, "/stats/prometheus") => compressed(&head.headers, prometheus(admin, &query)),
        (Port::Ready | Port::Metrics, _) => text(StatusCode::NOT_FOUND, String::new()),
        (Port::Admin, "/explain") if head.method == Method::POST => explain(admin, body).await,
        (Port::Admin, _) if head.method == Method::POST => change(admin, path, &query),
        (Port::Admin, _) if reading => compressed(&head.headers, look(admin, path, &query)),
        (Port::Admin, _) => text(StatusCode::METHOD_NOT_ALLOWED, String::new()),
    }
}

/// What only shows.
fn look(admin: &Admin, path: &str, query: &Query<'_>) -> Answer {
    let as_json = query.get("format") == Some("json");
    let published = admin.now();
    match path {
        "/" | "/help" => text(StatusCode::OK, HELP.to_owned()),
        "/ready" => readiness(admin, "LIVE\n"),
        "/stats" => match query.get("format") {
            Some("prometheus") => prometheus(admin, query),
            Some("json") => match query.stats() {
                Ok(wanted) => body(JSON, render_json(&stats::samples(admin), &wanted)),
                Err(why) => text(StatusCode::BAD_REQUEST, why),
            },
            _ => match query.stats() {
                Ok(wanted) => body(TEXT, render_text(&stats::samples(admin), &wanted)),
                Err(why) => text(StatusCode::BAD_REQUEST, why),
            },
        },
        "/stats/prometheus" => prometheus(admin, query),
        "/clusters" if as_json => json(&clusters::json(&published.snapshot)),
        "/clusters" => text(StatusCode::OK, clusters::text(&published.snapshot)),
        "/config_dump" => {
            let ask = Ask { mask: query.get("mask"), include_eds: query.get("include_eds").is_some() };
            json(&config_dump(&published, ask))
        }
        "/listeners" if as_json => json(&dump::listeners_json(&published.snapshot)),
        "/listeners" => text(StatusCode::OK, dump::listeners_text(&published.snapshot)),
        "/certs" => json(&dump::certs(&published.snapshot)),
        "/server_info" => json(&dump::server_info(admin)),
        "/debug/workers" => json(&dump::workers(admin)),
        "/memory" => text(StatusCode::OK, memory()),
        "/logging" => text(StatusCode::OK, levels(admin)),
        "/quitquitquit" | "/healthcheck/fail" | "/healthcheck/ok" | "/drain_listeners" | "/explain" => {
            text(StatusCode::METHOD_NOT_ALLOWED, format!("{path} is asked for with POST\n"))
        }
        _ => text(StatusCode::NOT_FOUND, format!("nothing at {path}; there is:\n{HELP}")),
    }
}

/// What changes something; whatever only shows may be asked for by POST as well.
fn change(admin: &Admin, path: &str, query: &Query<'_>) -> Answer {
    match path {
        "/logging" => return logging(admin, query),
        "/healthcheck/fail" => admin.failed.store(true, Ordering::Relaxed),
        "/healthcheck/ok" => admin.failed.store(false, Ordering::Relaxed),
        "/drain_listeners" if query.get("graceful").is_some() => admin.drain.enter(Phase::Lame),
        "/drain_listeners" => admin.drain.enter(Phase::Closing),
        "/quitquitquit" => {
            tracing::info!("asked to quit");
            admin.drain.enter(Phase::Gone);
        }
        _ => return look(admin, path, query),
    }
    text(StatusCode::OK, "OK\n".to_owned())
}

/// What would happen to calls.
async fn explain(admin: &Admin, calls: Incoming) -> Answer {
    let bytes = match Limited::new(calls, BODY_LIMIT).collect().await {
        Ok(collected) => collected.to_bytes(),
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    let answers = match std::str::from_utf8(&bytes) {
        Ok(calls) => explain::answer_lines(&admin.now(), calls).map_err(|error| format!("{error:#}\n")),
        Err(error) => Err(format!("{error}\n")),
    };
    match answers {
        Ok(lines) => body(JSON, lines),
        Err(why) => text(StatusCode::BAD_REQUEST, why),
    }
}

fn readiness(admin: &Admin, good: &str) -> Answer {
    let reasons = ready::reasons(admin);
    if reasons.is_empty() {
        let kept = admin.now().kept.map(|written| {
            let seconds = written.elapsed().map_or(0, |age| age.as_secs());
            format!("no control plane yet: the last good configuration, {seconds} s old, is served\n")
        });
        return text(StatusCode::OK, good.to_owned() + &kept.unwrap_or_default());
    }
    text(StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
}

fn prometheus(admin: &Admin, query: &Query<'_>) -> Answer {
    match query.stats() {
        Ok(wanted) => body(PROMETHEUS, stats::prometheus(admin, &wanted)),
        Err(why) => text(StatusCode::BAD_REQUEST, why),
    }
}

/// Envoy's shape: istioctl reads the names before it sets levels.
fn levels(admin: &Admin) -> String {
    let set = admin.levels.as_ref().map(|levels| levels.now()).unwrap_or_default();
    set.split(',').filter(|part| !part.is_empty()).fold("active loggers:\n".to_owned(), |out, part| {
        let (target, level) = part.split_once('=').unwrap_or(("*", part));
        format!("{out}  {target}: {level}\n")
    })
}

fn logging(admin: &Admin, query: &Query<'_>) -> Answer {
    let Some(levels_of) = &admin.levels else {
        return text(StatusCode::NOT_IMPLEMENTED, "the log belongs to somebody else\n".to_owned());
    };
    let changed = match query.0.as_slice() {
        [] => return text(StatusCode::OK, levels(admin)),
        [("level", level)] => levels_of.set(level),
        [(target, level)] => levels_of.set_one(&target_of(target), level),
        _ => return text(StatusCode::BAD_REQUEST, "one parameter: level=L or TARGET=L\n".to_owned()),
    };
    match changed {
        Ok(()) => text(StatusCode::OK, levels(admin)),
        Err(error) => text(StatusCode::BAD_REQUEST, format!("{error:#}\n")),
    }
}

/// A module of ours by its short name, or a target as it stands.
fn target_of(name: &str) -> String {
    if name.contains("::") || name == "istio_proxy" { name.to_owned() } else { format!("istio_proxy::{name}") }
}

fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .filter(|line| line.starts_with("Vm") || line.starts_with("Rss"))
        .fold(String::new(), |out, line| format!("{out}{line}\n"))
}

/// Parameters of a request, decoded, in order.
struct Query<'a>(Vec<(&'a str, String)>);

impl<'a> Query<'a> {
    fn parse(said: &'a str) -> Self {
        let pair = |pair: &'a str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (name, percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned())
        };
        Self(said.split('&').filter(|pair| !pair.is_empty()).map(pair).collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    fn stats(&self) -> Result<StatsQuery, String> {
        let filter = self.get("filter").map(Regex::new).transpose().map_err(|error| format!("{error}\n"))?;
        Ok(StatsQuery { used_only: self.get("usedonly").is_some(), filter })
    }
}

fn body(kind: &'static str, content: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(content.into());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0"));
    answer
}

fn text(status: StatusCode, content: String) -> Answer {
    let mut answer = body(TEXT, content);
    *answer.status_mut() = status;
    answer
}

fn json(value: &serde_json::Value) -> Answer {
    // Printing a value has no way to fail: its keys are strings.
    body(JSON, serde_json::to_vec_pretty(value).unwrap_or_default())
}

/// Compresses what is long when the client takes gzip: a scrape of a large mesh is megabytes.
fn compressed(request: &HeaderMap, answer: Answer) -> Answer {
    let takes = request.get(header::ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).is_some_and(accepts_gzip);
    if !takes || answer.body().len() < GZIP_FROM {
        return answer;
    }
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let Ok(small) = encoder.write_all(answer.body()).and_then(|()| encoder.finish()) else { return answer };
    let mut answer = answer.map(|_| small.into());
    answer.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    answer
}

fn accepts_gzip(said: &str) -> bool {
    said.split(',').any(|coding| {
        let mut parts = coding.split(';').map(str::trim);
        parts.next() == Some("gzip") && parts.next() != Some("q=0")
    })
}
