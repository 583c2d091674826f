//! The account of one request: begun with it, settled exactly once when it is dropped, however it ended.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, SystemTime};

use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::{PathAndQuery, Scheme};
use http::{Method, StatusCode, Version};
use tokio::time::{Instant, Sleep, sleep};

use super::conn::Conn;
use super::head::Head;
use super::http::HttpConn;
use super::peer_metadata::Asked;
use super::running::Running;
use super::vars::protocol;
use crate::error::{Error, Flags};
use crate::net::grpc::Messages;
use crate::snapshot::Name;
use crate::telemetry::{
    Captured, Facts, Headers, Labels, Overrides, Peer, Protocol, Record, RecordKind, Reporter, Service, Sizes,
    SpanContext, SpanNames, Stats, Values,
};
use crate::upstream::{ClusterLocal, Progress, Trace};

/// Between two reports of a stream that goes on, as Envoy's default.
const REPORTING: Duration = Duration::from_secs(5);

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Whoever gives up a request within this time did not want its answer.
const HASTY: Duration = Duration::from_secs(1);

/// One request.
pub(super) struct Ctx {
    pub(super) http: Arc<HttpConn>,
    pub(super) start: Instant,
    pub(super) started: SystemTime,
    method: Method,
    version: Version,
    scheme: Scheme,
    authority: HeaderValue,
    path: PathAndQuery,
    /// Before a rewrite.
    original_path: Option<PathAndQuery>,
    pub(super) grpc: bool,
    request_head_bytes: usize,
    request_headers: Captured,
    /// The client after x-forwarded-for.
    pub(super) remote: IpAddr,
    /// What the client said of its workload inbound, the server outbound.
    pub(super) peer: Option<Arc<Peer>>,
    /// Its place in its trace, where there is somebody to report to.
    pub(super) span: Option<SpanContext>,
    /// What it does, in words of its route.
    pub(super) operation: Option<HeaderValue>,
    /// Which of our peer metadata the client gets.
    pub(super) asked: Asked,
    /// Of a streamed request body.
    pub(super) progress: Option<Arc<Progress>>,
    /// 0: no response yet.
    pub(super) code: u16,
    pub(super) flags: Flags,
    pub(super) details: Cow<'static, str>,
    pub(super) policy: Option<Name>,
    pub(super) route: Option<Name>,
    pub(super) vhost: Option<Name>,
    pub(super) cluster: Option<Arc<ClusterLocal>>,
    /// Its name, when there is no such cluster.
    pub(super) missing_cluster: Option<Name>,
    pub(super) trace: Trace,
    response_head_bytes: usize,
    response_headers: Captured,
    grpc_status: Option<u32>,
    /// Body bytes given to the client.
    pub(super) sent: u64,
    /// gRPC messages given to the client.
    pub(super) response_messages: Messages,
    /// Messages of the request and of the response that were reported while the stream went on.
    reported: (u64, u64),
    /// When the next report is due.
    report: Option<Pin<Box<Sleep>>>,
    complete: bool,
    /// The generation of configuration whose policy it has passed.
    judged: u64,
}

impl Ctx {
    /// Opens the account.
    pub(super) fn begin(http: &Arc<HttpConn>, head: &Head, progress: Option<Arc<Progress>>) -> Box<Self> {
        http.request_begins(head.version);
        let grpc = head.is_grpc();
        if let Some(progress) = progress.as_ref().filter(|_| grpc) {
            progress.count_messages();
        }
        Box::new(Self {
            start: Instant::now(),
            started: SystemTime::now(),
            method: head.method.clone(),
            version: head.version,
            scheme: head.scheme.clone(),
            authority: head.authority.clone(),
            path: head.path.clone(),
            original_path: None,
            grpc,
            request_head_bytes: bytes_of(&head.headers),
            request_headers: http.logs.capture_request(&head.headers),
            remote: http.conn.peer.ip(),
            peer: None,
            span: None,
            operation: None,
            asked: Asked::default(),
            progress,
            code: 0,
            flags: Flags::NONE,
            details: Cow::Borrowed(""),
            policy: None,
            route: None,
            vhost: None,
            cluster: None,
            missing_cluster: None,
            trace: Trace::default(),
            response_head_bytes: 0,
            response_headers: Captured::new(),
            grpc_status: None,
            sent: 0,
            response_messages: Messages::default(),
            reported: (0, 0),
            report: None,
            complete: false,
            judged: http.conn.env.generation(),
            http: Arc::clone(http),
        })
    }

    /// The head as filters see it: its path is normalised, its id made.
    pub(super) fn arrived(&mut self, head: &Head, remote: IpAddr) {
        self.remote = remote;
        self.path = head.path.clone();
        self.request_headers = self.http.logs.capture_request(&head.headers);
    }

    /// The head as it goes upstream.
    pub(super) fn sent_upstream(&mut self, head: &Head) {
        if head.path != self.path {
            self.original_path = Some(std::mem::replace(&mut self.path, head.path.clone()));
        }
        if head.authority != self.authority {
            self.authority = head.authority.clone();
        }
    }

    /// The response head as it goes to the client.
    pub(super) fn answered(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.code = status.as_u16();
        self.response_head_bytes = bytes_of(headers);
        self.response_headers = self.http.logs.capture_response(headers);
        if self.grpc {
            self.note_grpc_status(headers);
        }
    }

    /// Trailers, or the head of a trailers-only response.
    pub(super) fn note_grpc_status(&mut self, headers: &HeaderMap) {
        let status = headers.get(GRPC_STATUS).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
        self.grpc_status = status.or(self.grpc_status);
    }

    /// The response has been given to the client whole.
    pub(super) fn complete(&mut self) {
        self.complete = true;
    }

    /// The response broke off on our side of the client.
    pub(super) fn failed(&mut self, error: &Error) {
        self.complete = true;
        self.flags.insert(error.kind.row().flag);
        self.details = Cow::Owned(error.details().replace("before_response_started", "after_response_started"));
    }

    /// What is left of the request's head, for policy that changes.
    pub(super) fn running(&self) -> Running {
        Running {
            http: Arc::clone(&self.http),
            method: self.method.clone(),
            scheme: self.scheme.clone(),
            authority: self.authority.clone(),
            path: self.original_path.as_ref().unwrap_or(&self.path).clone(),
            remote: self.remote,
        }
    }

    /// Asks policy again if configuration has changed; whether the stream has to end.
    pub(super) fn is_denied(&mut self) -> bool {
        let env = &self.http.conn.env;
        let generation = env.generation();
        if generation == self.judged {
            return false;
        }
        self.judged = generation;
        let Some(details) = self.running().judge(&env.view()) else { return false };
        self.http.metrics.rq_policy_close.inc();
        self.details = Cow::Owned(details);
        true
    }

    /// Whether the client speaks HTTP/1.
    pub(super) fn is_http1(&self) -> bool {
        self.version != Version::HTTP_2
    }

    /// Whether the client still sends its request.
    pub(super) fn request_unfinished(&self) -> bool {
        self.progress.as_ref().is_some_and(|progress| !progress.ended())
    }

    /// Name of the cluster, there or not.
    pub(super) fn cluster_name(&self) -> &str {
        let there = self.cluster.as_ref().map(|cluster| &*cluster.shared.name);
        there.or(self.missing_cluster.as_deref()).unwrap_or_default()
    }

    fn settle(&mut self) {
        if !self.complete {
            self.flags.insert(Flags::DC);
            if self.details.is_empty() || self.details == "via_upstream" {
                let denied = self.http.counts.denied().map(|details| Cow::Owned(details.to_owned()));
                self.details = denied.unwrap_or(Cow::Borrowed("downstream_remote_disconnect"));
            }
        }
        self.flags.insert(self.trace.flags);
        let duration = self.start.elapsed();
        if self.code == 0 && duration < HASTY {
            self.http.counts.given_up();
        }
        self.count(duration);
        let env = &self.http.conn.env;
        if let Some(sink) = env.log().filter(|sink| sink.wants(&self.http.logs)) {
            sink.log(&self.record(duration), &self.http.logs);
        }
        self.report_span(duration);
        self.http.request_ends();
    }

    fn report_span(&self, duration: Duration) {
        let (Some(tracer), Some(span)) = (&self.http.chain.options.tracer, self.span) else { return };
        let env = &self.http.conn.env;
        if let Some(sink) = env.log().filter(|_| span.sampled) {
            let operation = self.operation.as_ref().and_then(|name| name.to_str().ok()).unwrap_or_default();
            sink.span(tracer, &span, &self.record(duration), SpanNames { operation, service: &env.node.service });
        }
    }

    fn count(&self, duration: Duration) {
        let metrics = &self.http.metrics;
        metrics.rq_completed.inc();
        match self.code {
            100..200 => metrics.rq_1xx.inc(),
            200..300 => metrics.rq_2xx.inc(),
            300..400 => metrics.rq_3xx.inc(),
            400..500 => metrics.rq_4xx.inc(),
            500.. => metrics.rq_5xx.inc(),
            _ => metrics.rq_rx_reset.inc(),
        }
        metrics.rq_time.record(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX));
        if let Some(stats) = &self.http.stats {
            self.count_for_istio(stats, duration);
        }
    }

    fn count_for_istio(&self, stats: &Stats, duration: Duration) {
        let received = self.progress.as_ref().map_or(0, |p| p.bytes());
        let sizes = Sizes {
            duration,
            request_bytes: self.request_head_bytes as u64 + received,
            response_bytes: self.response_head_bytes as u64 + self.sent,
        };
        let shard = self.http.conn.env.shard();
        let values = self.values(stats, duration);
        let changed = values.as_ref().map(|(overrides, values)| (*overrides, values));
        let labels = Labels { changed, ..self.labels(stats) };
        shard.record_request(&labels, sizes);
        if self.grpc {
            shard.record_messages(&labels, self.unreported());
        }
    }

    /// What changes the metrics, with its values now.
    fn values<'s>(&self, stats: &'s Stats, duration: Duration) -> Option<(&'s Arc<Overrides>, Values)> {
        let overrides = stats.overrides.as_ref()?;
        let record = self.record(duration);
        let facts = Facts { record: &record, node: self.http.conn.env.shard().node() };
        Some((overrides, overrides.evaluate(&facts)))
    }

    /// gRPC messages that went each way and were not counted yet.
    fn unreported(&self) -> (u64, u64) {
        let request = self.progress.as_ref().map_or(0, |progress| progress.messages());
        (request - self.reported.0, self.response_messages.count() - self.reported.1)
    }

    /// Reports messages of a stream that goes on, from time to time. Whoever waits for the next message asks; the timer
    /// is there only for streams that have several and where some were not reported.
    pub(super) fn poll_report(&mut self, cx: &mut Context<'_>) {
        let (request, response) = self.unreported();
        let several = self.reported != (0, 0) || request > 1 || response > 1;
        if !self.grpc || request + response == 0 || !several {
            return;
        }
        let Some(stats) = self.http.stats.clone() else { return };
        let every = stats.reporting.unwrap_or(REPORTING);
        let timer = self.report.get_or_insert_with(|| Box::pin(sleep(every)));
        if timer.as_mut().poll(cx).is_pending() {
            return;
        }
        self.report = None;
        let values = self.values(&stats, self.start.elapsed());
        let changed = values.as_ref().map(|(overrides, values)| (*overrides, values));
        let labels = Labels { changed, ..self.labels(&stats) };
        self.http.conn.env.shard().record_messages(&labels, (request, response));
        self.reported = (self.reported.0 + request, self.reported.1 + response);
    }

    /// The other side's workload: as it said itself, else as its endpoint says.
    fn peer(&self) -> Option<&Arc<Peer>> {
        let endpoint = || self.trace.host.as_ref().and_then(|host| host.peer.as_ref());
        self.peer.as_ref().or_else(|| endpoint().filter(|_| !self.http.conn.is_inbound()))
    }

    fn labels(&self, stats: &Stats) -> Labels<'_> {
        let conn = &self.http.conn;
        let service = self.cluster.as_ref().and_then(service);
        // What no service explains is told by the route that took it.
        let (service, cluster) = match self.route.as_deref() {
            Some("block_all") => (None, "BlackHoleCluster"),
            Some("allow_any") => (None, "PassthroughCluster"),
            _ => (service, self.cluster_name()),
        };
        let authority =
            if stats.disable_host_header_fallback { "" } else { self.authority.to_str().unwrap_or_default() };
        Labels {
            reporter: conn.reporter(),
            protocol: if self.grpc { Protocol::Grpc } else { Protocol::Http },
            service,
            cluster,
            authority,
            peer: self.peer(),
            local_principal: local_principal(conn, &self.http.local_uris, &self.trace),
            peer_principal: peer_principal(conn, &self.trace),
            code: self.code,
            grpc_status: self.grpc_status,
            flags: self.flags,
            changed: None,
        }
    }

    fn record(&self, duration: Duration) -> Record<'_> {
        let conn = &self.http.conn;
        let since = |at: Option<Instant>| at.map(|at| at - self.start);
        let trace = &self.trace;
        let mut record = conn.record(RecordKind::Http, self.started, duration);
        record.filter_chain = &self.http.whole.name;
        record.request_duration = if self.request_unfinished() { None } else { Some(Duration::ZERO) };
        record.response_duration = since(trace.first_byte);
        record.upstream_service_time =
            trace.first_byte.zip(trace.ready).map(|(first_byte, ready)| first_byte.saturating_duration_since(ready));
        record.method = self.method.as_str();
        record.path = self.path.as_str();
        record.original_path = self.original_path.as_ref().map_or("", |path| path.as_str());
        record.scheme = self.scheme.as_str();
        record.authority = self.authority.to_str().unwrap_or_default();
        record.protocol = protocol(self.version);
        record.request_headers = Headers::Captured(&self.request_headers);
        record.response_headers = Headers::Captured(&self.response_headers);
        record.code = self.code;
        record.grpc_status = self.grpc_status;
        record.flags = self.flags;
        record.details = &self.details;
        record.transport_failure = trace.transport_failure.as_deref().unwrap_or_default();
        record.policy = self.policy.as_deref().unwrap_or_default();
        record.bytes_received = self.progress.as_ref().map_or(0, |p| p.bytes());
        record.bytes_sent = self.sent;
        record.upstream_cluster = self.cluster_name();
        record.upstream_host = trace.host.as_ref().map(|host| host.address);
        record.upstream_local = trace.upstream_local;
        record.attempts = trace.attempts;
        record.downstream_remote = Some(match conn.peer.ip() == self.remote {
            true => conn.peer,
            false => SocketAddr::new(self.remote, 0),
        });
        record.route = self.route.as_deref().unwrap_or_default();
        record.virtual_host = self.vhost.as_deref().unwrap_or_default();
        record.local_uri = self.http.local_uris.first().map_or("", String::as_str);
        record.peer = self.peer();
        record
    }
}

impl Drop for Ctx {
    fn drop(&mut self) {
        self.settle();
    }
}

/// The service that a cluster stands for.
pub(super) fn service(cluster: &Arc<ClusterLocal>) -> Option<Service<'_>> {
    let (host, name, namespace) = cluster.shared.config.istio.services.first()?;
    Some(Service { host, name, namespace })
}

/// Our identity on the connection that labels speak of: the client's side outbound, ours inbound.
pub(super) fn local_principal<'a>(conn: &Conn, local: &'a [String], trace: &Trace) -> &'a str {
    let authenticated = match conn.reporter() {
        Reporter::Source => trace.peer.is_some(),
        Reporter::Destination => conn.tls.as_ref().is_some_and(|peer| peer.has_certificate()),
    };
    if authenticated { local.first().map_or("", String::as_str) } else { "" }
}

/// The identity of the other side.
pub(super) fn peer_principal<'a>(conn: &'a Conn, trace: &'a Trace) -> &'a str {
    let peer = match conn.reporter() {
        Reporter::Source => trace.peer.as_deref(),
        Reporter::Destination => conn.tls.as_deref(),
    };
    peer.and_then(|peer| peer.uri_sans.first()).map_or("", String::as_str)
}

fn bytes_of(headers: &HeaderMap) -> usize {
    // Name, value, colon, blank and line end.
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum()
}
