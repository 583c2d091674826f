//! Opening upstream connections and driving them.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use proxy_config::model::Cluster;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, sleep_until, timeout};

use super::body::Body;
use super::breaker::{Connected, Metrics};
use super::pool::{Key, Pool};
use crate::error::{Error, Kind, Source};
use crate::net::{self, Keepalive, Stream, Target, proxy_protocol};
use crate::snapshot::{Host, Name, Transport};
use crate::tls::{self, ClientTls, Peer, TlsError};

/// Envoy's connect timeout when configuration does not say.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Most response headers that are read.
const MAX_HEADERS: usize = 100;
/// Most bytes of response headers that are read, as a list of HTTP/2.
const MAX_HEADER_BYTES: u32 = 64 * 1024;

/// Why there is no connection.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    pub(super) source: Source,
    pub(super) text: Arc<str>,
}

impl Failure {
    fn upstream(kind: Kind, text: String) -> Self {
        Self { kind, source: Source::Upstream, text: text.into() }
    }

    pub(super) fn error(&self) -> Error {
        let error = match self.source {
            Source::Upstream => Error::upstream(self.kind),
            Source::Downstream | Source::Local => Error::local(self.kind),
        };
        error.because(&*self.text)
    }

    /// `delayed connect error: …` is how Envoy's logs put it. What the kernel refuses before it sends anything is ours.
    fn connect(error: &io::Error) -> Self {
        let ours = matches!(
            error.kind(),
            io::ErrorKind::AddrNotAvailable | io::ErrorKind::PermissionDenied | io::ErrorKind::AddrInUse
        ) || matches!(error.raw_os_error(), Some(TOO_MANY_FILES | TOO_MANY_FILES_IN_SYSTEM));
        let kind = if error.kind() == io::ErrorKind::TimedOut { Kind::ConnectTimeout } else { Kind::ConnectRefused };
        let why = match error.kind() {
            io::ErrorKind::ConnectionRefused => "Connection refused".to_owned(),
            io::ErrorKind::ConnectionReset => "Connection reset by peer".to_owned(),
            io::ErrorKind::HostUnreachable => "No route to host".to_owned(),
            io::ErrorKind::NetworkUnreachable => "Network is unreachable".to_owned(),
            _ => error.to_string(),
        };
        let source = if ours { Source::Local } else { Source::Upstream };
        Self { kind, source, text: format!("delayed connect error: {why}").into() }
    }

    fn tls(error: &TlsError) -> Self {
        let kind = match error {
            TlsError::Identity(_) => Kind::PeerIdentity,
            TlsError::Timeout => Kind::ConnectTimeout,
            TlsError::Io(_) | TlsError::Certificate(_) | TlsError::Protocol(_) => Kind::TlsHandshake,
        };
        Self::upstream(kind, format!("TLS_error:{error}"))
    }
}

const TOO_MANY_FILES: i32 = 24;
const TOO_MANY_FILES_IN_SYSTEM: i32 = 23;

/// What a connection is opened with: the host, its socket, and the cluster's settings.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) host: Arc<Host>,
    pub(super) transport: Transport,
    pub(super) config: Arc<Cluster>,
    pub(super) metrics: Metrics,
}

/// What one connection says and asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hello<'a> {
    /// Protocols to offer; `None` offers what the cluster says.
    pub(super) alpn: Option<&'a [String]>,
    /// The request's host, for automatic SNI.
    pub(super) host: Option<&'a str>,
    /// The client and its destination, for the PROXY protocol.
    pub(super) client: Option<(SocketAddr, SocketAddr)>,
}

/// An open transport.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) stream: Stream,
    pub(super) local: Option<SocketAddr>,
    pub(super) peer: Option<Arc<Peer>>,
}

impl Place {
    /// The server name for a connection.
    pub(super) fn sni<'a>(&'a self, host: Option<&'a str>) -> Option<&'a str> {
        let tls = tls_of(&self.transport)?;
        let automatic = tls.auto_sni() || self.config.http.auto_sni;
        Some(if automatic && tls.sni().is_empty() { host.unwrap_or_default() } else { tls.sni() })
    }

    /// Whether its connections name a client.
    pub(super) fn speaks_proxy_protocol(&self) -> bool {
        matches!(self.transport, Transport::ProxyProtocol(..))
    }

    /// Opens a transport: TCP, PROXY header, TLS, all within the cluster's connect timeout.
    pub(super) async fn open(&self, hello: Hello<'_>) -> Result<Opened, Failure> {
        let limit = self.config.connect_timeout.unwrap_or(CONNECT_LIMIT);
        let started = Instant::now();
        let result = match timeout(limit, Box::pin(self.open_in_time(hello))).await {
            Ok(result) => result,
            Err(_) => Err(Failure::upstream(Kind::ConnectTimeout, "connect timeout".to_owned())),
        };
        match &result {
            Ok(opened) => {
                self.metrics.cx_connect_ms.record(millis(started.elapsed()));
                if opened.peer.is_some() {
                    self.metrics.ssl_handshake.inc();
                }
            }
            Err(failure) => self.count(failure),
        }
        result
    }

    fn count(&self, failure: &Failure) {
        let metrics = &self.metrics;
        self.host.stats.totals.connect_failures.fetch_add(1, Relaxed);
        metrics.cx_connect_fail.inc();
        match failure.kind {
            Kind::ConnectTimeout => metrics.cx_connect_timeout.inc(),
            Kind::TlsHandshake => metrics.ssl_connection_error.inc(),
            Kind::PeerIdentity => {
                metrics.ssl_connection_error.inc();
                metrics.ssl_fail_verify_san.inc();
            }
            _ => {}
        }
    }

    async fn open_in_time(&self, hello: Hello<'_>) -> Result<Opened, Failure> {
        if let Some(why) = unusable(&self.transport) {
            return Err(Failure::upstream(Kind::TlsHandshake, format!("TLS_error:{why}")));
        }
        let (mut stream, local) = self.transport_stream().await?;
        if let Transport::ProxyProtocol(version, _) = &self.transport {
            let version = if *version == 1 { proxy_protocol::Version::V1 } else { proxy_protocol::Version::V2 };
            let ours = local.unwrap_or(self.host.address);
            let (source, destination) = hello.client.unwrap_or((ours, self.host.address));
            let header = proxy_protocol::header(version, source, destination);
            stream.write_all(&header).await.map_err(|e| Failure::connect(&e))?;
        }
        let Some(tls) = tls_of(&self.transport) else { return Ok(Opened { stream, local, peer: None }) };
        let sni = self.sni(hello.host).unwrap_or_default();
        let handshake = tls::connect(stream, tls, sni, hello.alpn.unwrap_or_else(|| tls.alpn()));
        let (stream, peer) = handshake.await.map_err(|e| Failure::tls(&e))?;
        Ok(Opened { stream, local, peer: Some(peer) })
    }

    async fn transport_stream(&self) -> Result<(Stream, Option<SocketAddr>), Failure> {
        if let Some(path) = &self.host.pipe {
            let stream = net::connect_unix(path).await.map_err(|e| Failure::connect(&e))?;
            return Ok((stream, None));
        }
        let tcp = net::connect(&self.target()).await.map_err(|e| Failure::connect(&e))?;
        let local = tcp.local_addr().ok();
        Ok((tcp.into(), local))
    }

    fn target(&self) -> Target {
        let seconds = |said: Option<u32>| said.map(|s| Duration::from_secs(s.into()));
        let mut target = Target::new(self.host.address);
        let source = self.config.source_address.filter(|ip| ip.is_ipv4() == target.address.is_ipv4());
        target.source = source.map(|ip| SocketAddr::new(ip, 0));
        target.keepalive = self.config.tcp_keepalive.map(|said| Keepalive {
            time: seconds(said.time),
            interval: seconds(said.interval),
            probes: said.probes,
        });
        target
    }
}

fn tls_of(transport: &Transport) -> Option<&ClientTls> {
    match transport {
        Transport::Tls(tls) => Some(tls),
        Transport::ProxyProtocol(_, inner) => tls_of(inner),
        Transport::Raw | Transport::Unusable(_) => None,
    }
}

fn unusable(transport: &Transport) -> Option<&Name> {
    match transport {
        Transport::Unusable(why) => Some(why),
        Transport::ProxyProtocol(_, inner) => unusable(inner),
        Transport::Raw | Transport::Tls(_) => None,
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What is known about an open connection; shared by its driver, the pool and whoever uses it.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) local: Option<SocketAddr>,
    pub(super) peer: Option<Arc<Peer>>,
    pub(super) born: Instant,
    /// Bytes read and written, TLS taken off.
    pub(super) read: AtomicU64,
    pub(super) written: AtomicU64,
    /// Milliseconds since `born` when it became idle, plus 1; 0 is busy.
    pub(super) idle_since: AtomicU64,
    /// Idle time that the peer announced, in milliseconds; 0: it did not.
    pub(super) keep_alive: AtomicU64,
    /// Streams that the peer allows.
    pub(super) streams: AtomicU32,
    /// It serves no further request.
    pub(super) closing: AtomicBool,
    connected: Connected,
}

impl Line {
    fn new(opened: &mut Opened, connected: Connected) -> Arc<Self> {
        Arc::new(Self {
            local: opened.local,
            peer: opened.peer.take(),
            born: Instant::now(),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            idle_since: AtomicU64::new(1),
            keep_alive: AtomicU64::new(0),
            // HTTP/2's recommended least, until the peer has spoken.
            streams: AtomicU32::new(100),
            closing: AtomicBool::new(false),
            connected,
        })
    }

    /// Since when it is idle.
    pub(super) fn idle_from(&self) -> Option<Instant> {
        let since = self.idle_since.load(Relaxed).checked_sub(1)?;
        Some(self.born + Duration::from_millis(since))
    }

    pub(super) fn set_idle(&self, now: Option<Instant>) {
        let since = |now: Instant| u64::try_from(now.duration_since(self.born).as_millis()).unwrap_or(u64::MAX - 1) + 1;
        self.idle_since.store(now.map_or(0, since), Relaxed);
    }
}

/// The sending half of a new connection.
pub(super) enum Sender {
    H1(http1::SendRequest<Body>),
    H2(http2::SendRequest<Body>),
}

/// Opens a connection of a pool and puts its driver to work.
pub(super) async fn establish(
    pool: &Arc<Pool>,
    key: &Key,
    connected: Connected,
) -> Result<(Sender, Arc<Line>), Failure> {
    let hello = Hello {
        alpn: key.alpn().or_else(|| unsaid(&pool.place, key.h2)),
        host: key.sni.as_deref(),
        client: key.client,
    };
    let mut opened = pool.place.open(hello).await?;
    let line = Line::new(&mut opened, connected);
    let io = TokioIo::new(Metered { stream: opened.stream, line: Arc::clone(&line) });
    let broken = |e: hyper::Error| Failure::upstream(Kind::ConnectRefused, e.to_string());
    let metrics = &pool.place.metrics;
    if key.h2 {
        metrics.cx_http2_total.inc();
        let builder = h2_builder(&pool.place.config);
        let (sender, conn) = builder.handshake(io).await.map_err(broken)?;
        tokio::spawn(drive_h2(conn, Arc::clone(&line), Arc::downgrade(pool)));
        return Ok((Sender::H2(sender), line));
    }
    metrics.cx_http1_total.inc();
    let mut builder = http1::Builder::new();
    builder
        .preserve_header_case(pool.place.config.http.preserve_header_case)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER)
        .allow_obsolete_multiline_headers_in_responses(true);
    let (sender, conn) = builder.handshake(io).await.map_err(broken)?;
    tokio::spawn(drive(conn.with_upgrades(), Arc::clone(&line), Arc::downgrade(pool)));
    Ok((Sender::H1(sender), line))
}

/// What one connection may hold of a response that its client does not take, bytes; response heads have to fit. The
/// library's own 400 KiB would let a crowd of slow readers take a megabyte each.
const MAX_BUFFER: usize = 128 * 1024;

/// What HTTP offers where the cluster names no protocols: its version's own. (A relayed connection offers nothing then.)
fn unsaid(place: &Place, h2: bool) -> Option<&'static [String]> {
    static OWN: LazyLock<[[String; 1]; 2]> = LazyLock::new(|| [["http/1.1".to_owned()], ["h2".to_owned()]]);
    let none = tls_of(&place.transport).is_some_and(|tls| tls.alpn().is_empty());
    none.then(|| &OWN[usize::from(h2)][..])
}

fn h2_builder(config: &Cluster) -> http2::Builder<TokioExecutor> {
    let said = &config.http.http2;
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).max_header_list_size(MAX_HEADER_BYTES);
    if let Some(bytes) = said.initial_stream_window_size {
        builder.initial_stream_window_size(bytes);
    }
    if let Some(bytes) = said.initial_connection_window_size {
        builder.initial_connection_window_size(bytes);
    }
    if let Some(interval) = said.keepalive_interval {
        builder.keep_alive_interval(interval).keep_alive_while_idle(true);
    }
    if let Some(limit) = said.keepalive_timeout {
        builder.keep_alive_timeout(limit);
    }
    builder
}

type Io = TokioIo<Metered>;

async fn drive_h2(mut conn: http2::Connection<Io, Body, TokioExecutor>, line: Arc<Line>, pool: Weak<Pool>) {
    let watched = Arc::clone(&line);
    let observed = std::future::poll_fn(move |cx| {
        let polled = Pin::new(&mut conn).poll(cx);
        let streams = u32::try_from(conn.current_max_send_streams()).unwrap_or(u32::MAX);
        watched.streams.store(streams, Relaxed);
        polled
    });
    drive(observed, line, pool).await;
}

/// Runs a connection until it ends, or until it has been idle or alive for too long. One timer per connection, which is
/// not touched by requests: when it fires it looks how long the connection has really been idle.
async fn drive<C: Future<Output = hyper::Result<()>>>(conn: C, line: Arc<Line>, pool: Weak<Pool>) {
    let mut conn = std::pin::pin!(conn);
    let mut next = pool.upgrade().and_then(|pool| pool.deadline(&line));
    loop {
        let timer = async {
            match next {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // How it ended is told to its requests.
            _ = &mut conn => break,
            () = timer => {}
        }
        let Some(pool) = pool.upgrade() else {
            next = None;
            continue;
        };
        if pool.expire(&line) {
            return pool.closed(&line, false);
        }
        next = pool.deadline(&line);
    }
    if let Some(pool) = pool.upgrade() {
        pool.closed(&line, true);
    }
}

/// Counts the bytes of a connection. Two relaxed additions for each read and write tell whether a request went out and
/// whether an answer began, which decides what may be sent again.
pub(super) struct Metered {
    stream: Stream,
    line: Arc<Line>,
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        let read = (buf.filled().len() - before) as u64;
        self.line.read.fetch_add(read, Relaxed);
        self.line.connected.metrics.cx_rx_bytes.add(read);
        polled
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.count(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.count(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Metered {
    fn count(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(n)) = &polled {
            self.line.written.fetch_add(*n as u64, Relaxed);
            self.line.connected.metrics.cx_tx_bytes.add(*n as u64);
        }
        polled
    }
}
