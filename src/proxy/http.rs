//! One client connection that speaks HTTP: codec, limits, goodbye.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_utils::CachePadded;
use http::{HeaderValue, Version};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::{Instant, sleep_until, timeout};

use super::conn::Conn;
use super::head::Accepts;
use super::headers::Origin;
use super::live::{Counts, Live};
use super::quiet::Quiet;
use super::watched::{HEAD_LIMIT, Watched};
use super::{http1, request, xfcc};
use crate::drain::{Phase, Watch};
use crate::error::{Flags, Kind};
use crate::net::sniff::{Codec, read_codec};
use crate::net::{Gather, Stream, Turn};
use crate::snapshot::{Chain, HttpChain, HttpFilter, HttpOptions};
use crate::telemetry::{AccessLogs, HttpMetrics, RecordKind, Stats};

/// Header lines of a request, as Envoy's default.
pub(super) const MAX_HEADERS: usize = 100;
/// Streams of one HTTP/2 connection at a time, as Envoy's default.
const MAX_STREAMS: u32 = 1024;
/// Credit of a stream: enough for 10 Gbit/s at 200 µs, and what one slow reader may make us hold.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Credit of a connection: several busy streams.
const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// What one HTTP/1 connection may hold of a response that its client does not read, and of a request that the upstream does
/// not take, bytes each. Less and large bodies cost more system calls; the library's own 400 KiB lets a crowd of slow
/// clients take a megabyte each.
pub(super) const MAX_BUFFER: usize = 64 * 1024;

/// Silence after which an HTTP/1 connection's codec is taken away: longer than the pause between requests of a busy client.
const PAUSE: Duration = Duration::from_secs(2);

/// HTTP/2 peers are told to go within this time of the goodbye's beginning, not all at the same moment.
const SPREAD: Duration = Duration::from_secs(1);

/// Time that requests in progress have to end once policy would not admit their connection any more: the answer to a call
/// that was allowed when it came is not torn, streams that go on for ever are.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A connection as one chain serves it: what the requests share until configuration changes.
pub(super) struct HttpConn {
    pub(super) conn: Arc<Conn>,
    /// The filter chain.
    pub(super) whole: Arc<Chain>,
    /// Its connection manager.
    pub(super) chain: Arc<HttpChain>,
    /// Our XFCC element about this client.
    pub(super) xfcc: Option<HeaderValue>,
    /// URI names of our certificate.
    pub(super) local_uris: Arc<[String]>,
    pub(super) metrics: Arc<CachePadded<HttpMetrics>>,
    pub(super) logs: Arc<AccessLogs>,
    /// `istio.stats` of the filters, or what stands for it without a control plane.
    pub(super) stats: Option<Arc<Stats>>,
    pub(super) counts: Arc<Counts>,
}

/// Why a connection is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goodbye {
    Leaving,
    Idle,
    Old,
    /// Not the end, only a pause.
    Silent,
    /// Its chain is gone, or is not to be used.
    Outdated,
    /// Policy would not admit it any more.
    Denied,
}

impl Goodbye {
    pub(super) fn count(self, metrics: &HttpMetrics) {
        match self {
            Self::Leaving | Self::Outdated => metrics.cx_drain_close.inc(),
            Self::Idle => metrics.cx_idle_timeout.inc(),
            Self::Old => metrics.cx_max_duration.inc(),
            Self::Denied => metrics.cx_policy_close.inc(),
            Self::Silent => {}
        }
    }
}

impl HttpConn {
    pub(super) fn new(conn: Arc<Conn>, whole: Arc<Chain>, chain: Arc<HttpChain>, counts: Arc<Counts>) -> Self {
        let local_uris = conn.local_uris();
        Self {
            xfcc: xfcc::element(conn.tls.as_deref(), &local_uris, chain.options.client_cert_details),
            logs: Arc::clone(&chain.options.access_log),
            stats: stats_of(&conn, &chain),
            metrics: conn.env.shard().http(&chain.options.stat_prefix),
            local_uris,
            counts,
            conn,
            whole,
            chain,
        }
    }

    pub(super) fn accepts(&self) -> Accepts<'_> {
        Accepts {
            http_10: self.chain.options.accept_http_10,
            tls: self.conn.tls.is_some(),
            default_host: &self.conn.env.default_host,
        }
    }

    pub(super) fn origin(&self) -> Origin<'_> {
        Origin {
            peer: self.conn.peer,
            destination: self.conn.destination,
            tls: self.conn.tls.is_some(),
            xfcc: self.xfcc.as_ref(),
        }
    }

    pub(super) fn request_begins(&self, version: Version) {
        self.counts.request_begins();
        self.metrics.rq_total.inc();
        self.metrics.rq_active.inc();
        match version {
            Version::HTTP_2 => {
                self.metrics.rq_http2_total.inc();
                // HTTP/1 says it with the response.
                if self.is_used_up() {
                    self.counts.use_up();
                }
            }
            _ => self.metrics.rq_http1_total.inc(),
        }
    }

    pub(super) fn request_ends(&self) {
        self.metrics.rq_active.dec();
        self.counts.request_ends(self.conn.start.elapsed());
    }

    fn is_used_up(&self) -> bool {
        let most = self.chain.options.max_requests_per_connection;
        most.is_some_and(|max| self.counts.requests() >= max)
    }

    /// Whether the current request is the last one of its connection.
    pub(super) fn is_last_request(&self) -> bool {
        self.is_used_up() || self.counts.is_outdated() || self.conn.env.drain.is_leaving()
    }
}

fn stats_of(conn: &Conn, chain: &HttpChain) -> Option<Arc<Stats>> {
    let said = chain.filters.iter().find_map(|f| if let HttpFilter::Stats(stats) = f { Some(stats) } else { None });
    said.cloned().or_else(|| conn.default_stats())
}

/// Serves the connection to its end.
pub(super) async fn serve(stream: Stream, conn: Arc<Conn>, chain: &Arc<HttpChain>) {
    let live = Arc::new(Live::new(conn, chain));
    let http = live.first();
    let Some((codec, stream)) = Box::pin(codec(stream, http)).await else { return };
    let ended = match codec {
        Codec::Http1 => {
            http.metrics.cx_http1_total.inc();
            http1::serve(stream, &live).await
        }
        Codec::Http2 => {
            http.metrics.cx_http2_total.inc();
            Box::pin(serve_http2(stream, &live)).await
        }
    };
    if let Err(error) = ended {
        note_error(http, &error);
    }
}

async fn serve_http2(stream: Stream, live: &Arc<Live>) -> Served {
    let http = live.first();
    let service = {
        let live = Arc::clone(live);
        service_fn(move |request| request::handle(live.now(), request))
    };
    let options = &http.chain.options;
    let watched = Watched::new(stream, Codec::Http2, options.request_headers_timeout, &http.counts);
    let turn = Turn::default();
    let io = TokioIo::new(Gather::new(watched, turn.clone()));
    let mut connection = Box::pin(turn.count(http2(options).serve_connection(io, service)));
    match drive(&mut connection, |connection| connection.inner().graceful_shutdown(), live, Codec::Http2).await {
        Driven::Ended(served) => served,
        // Asked of HTTP/1 only.
        Driven::Silent => Ok(()),
    }
}

/// ALPN decides, else the first bytes do. A client that says nothing is idle.
async fn codec(stream: Stream, http: &HttpConn) -> Option<(Codec, Stream)> {
    match http.conn.tls.as_ref().and_then(|peer| peer.alpn.as_deref()) {
        Some("h2") => return Some((Codec::Http2, stream)),
        Some("http/1.1") => return Some((Codec::Http1, stream)),
        _ => {}
    }
    let mut drain = http.conn.env.drain.clone();
    let read = async {
        match http.chain.options.idle_timeout {
            Some(limit) => timeout(limit, read_codec(stream, HEAD_LIMIT)).await.ok()?.ok(),
            None => read_codec(stream, HEAD_LIMIT).await.ok(),
        }
    };
    tokio::select! {
        read = read => read,
        () = drain.reached(Phase::Closing) => None,
    }
}

pub(super) type Served = hyper::Result<()>;

/// What came of a connection.
pub(super) enum Driven {
    /// Its end.
    Ended(Served),
    /// It has been at rest for a while.
    Silent,
}

fn http2(options: &HttpOptions) -> http2::Builder<TokioExecutor> {
    let said = options.http2.unwrap_or_default();
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .initial_stream_window_size(said.initial_stream_window_size.unwrap_or(STREAM_WINDOW))
        .initial_connection_window_size(said.initial_connection_window_size.unwrap_or(CONNECTION_WINDOW))
        .max_concurrent_streams(said.max_concurrent_streams.unwrap_or(MAX_STREAMS))
        .max_header_list_size(options.max_request_headers);
    if let Some(interval) = said.keepalive_interval {
        builder.timer(TokioTimer::new()).keep_alive_interval(interval);
        if let Some(limit) = said.keepalive_timeout {
            builder.keep_alive_timeout(limit);
        }
    }
    builder
}

/// Runs a connection until it ends, or until it has to and its grace is over.
pub(super) async fn drive<C>(
    connection: &mut Pin<Box<C>>,
    say_goodbye: fn(Pin<&mut C>),
    live: &Live,
    codec: Codec,
) -> Driven
where
    C: Future<Output = Served>,
{
    let http = live.first();
    let mut drain = http.conn.env.drain.clone();
    let pause = Some(PAUSE).filter(|_| codec == Codec::Http1 && !http.conn.eof);
    let goodbye = tokio::select! {
        biased;
        ended = connection.as_mut() => return Driven::Ended(ended),
        goodbye = Quiet::new(until_goodbye(live, &mut drain, codec, pause)) => goodbye,
    };
    if goodbye == Goodbye::Silent {
        return Driven::Silent;
    }
    goodbye.count(&http.metrics);
    say_goodbye(connection.as_mut());
    let grace = if goodbye == Goodbye::Denied { LAST_WORDS } else { http.chain.options.drain_timeout };
    let grace = Instant::now() + grace;
    Driven::Ended(tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = drain.reached(Phase::Gone) => Ok(()),
        // Whoever was idle before has nothing to finish, and may never answer; whoever is denied is not asked.
        () = sleep_until(grace), if matches!(goodbye, Goodbye::Old | Goodbye::Idle | Goodbye::Denied) => Ok(()),
    })
}

/// Waits for a reason to end the connection, or for so long a pause.
pub(super) async fn until_goodbye(live: &Live, drain: &mut Watch, codec: Codec, pause: Option<Duration>) -> Goodbye {
    let mut views = live.first().conn.env.view.subscribe();
    // What changed before we listened was not looked at yet.
    views.mark_changed();
    loop {
        let http = live.now();
        if http.counts.denied().is_some() {
            return Goodbye::Denied;
        }
        if http.counts.is_outdated() {
            return Goodbye::Outdated;
        }
        let (options, start) = (&http.chain.options, http.conn.start);
        let oldest = options.max_connection_duration.map(|limit| start + limit);
        let idle = options.idle_timeout.map(|limit| http.counts.idle_deadline(start, limit));
        let silent = pause.map(|pause| http.counts.rest_deadline(start, pause));
        let next = [idle, oldest, silent].into_iter().flatten().min();
        tokio::select! {
            () = leaving(drain, codec) => return Goodbye::Leaving,
            () = http.counts.used_up(), if codec == Codec::Http2 => return Goodbye::Outdated,
            Ok(()) = views.changed() => continue,
            () = until(next) => {}
        }
        let now = Instant::now();
        if oldest.is_some_and(|oldest| oldest <= now) {
            return Goodbye::Old;
        }
        if options.idle_timeout.is_some_and(|limit| http.counts.idle_deadline(start, limit) <= now) {
            return Goodbye::Idle;
        }
        if pause.is_some_and(|pause| http.counts.rest_deadline(start, pause) <= now) {
            return Goodbye::Silent;
        }
    }
}

/// HTTP/1 responses say `connection: close` for as long as there is time. HTTP/2 has only GOAWAY to say it with, and peers
/// need time to hear it: at the end it would come together with the cut.
async fn leaving(drain: &mut Watch, codec: Codec) {
    if codec == Codec::Http2 {
        drain.reached(Phase::Lame).await;
        // Either answer leads on.
        let _ = timeout(SPREAD.mul_f64(fastrand::f64()), drain.reached(Phase::Closing)).await;
        return;
    }
    drain.reached(Phase::Closing).await;
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// A connection that broke before a request of it was understood has nobody else to tell of it.
fn note_error(http: &HttpConn, error: &hyper::Error) {
    tracing::debug!(peer = %http.conn.peer, %error, "client connection failed");
    if !error.is_parse() {
        return;
    }
    http.metrics.cx_protocol_error.inc();
    let Some(sink) = http.conn.env.log().filter(|sink| sink.wants(&http.logs)) else { return };
    let mut record = http.conn.record(RecordKind::Http, http.conn.started, http.conn.start.elapsed());
    record.flags = Flags::DPE;
    record.details = Kind::DownstreamProtocol.row().details;
    record.code = if error.is_parse_too_large() { 431 } else { 400 };
    if error.is_parse_too_large() {
        record.details = "http1.headers_too_large";
    }
    record.protocol = "HTTP/1.1";
    sink.log(&record, &http.logs);
}
