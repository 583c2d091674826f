//! One HTTP/2 connection that carries gRPC calls.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{HeaderValue, USER_AGENT};
use http::uri::{Authority, Scheme};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tonic::body::Body;
use tower_service::Service;

use super::names;
use crate::net::{self, Stream, Target};
use crate::tls::{self, ClientTls, TlsError};

/// Begins the address of a Unix domain socket.
const UNIX: &str = "unix:";
/// Windows of a stream and of the connection, as the agent has them: a mesh's configuration arrives in one burst.
const WINDOW: u32 = 1 << 20;
/// What we call ourselves.
const AGENT: &str = concat!("istio-proxy/", env!("CARGO_PKG_VERSION"));
/// Protocol of the handshake.
const H2: &str = "h2";

/// Where a channel goes to, and how.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// `host:port`, `[v6]:port` or `unix:/path`.
    pub address: String,
    /// What `:authority` says.
    pub authority: String,
    /// The handshake; its server name is the one in the context. `None`: plaintext.
    pub tls: Option<ClientTls>,
    /// PINGs that find out whether the peer is still there.
    pub keepalive: Option<Keepalive>,
    /// Which of a name's addresses is tried first; counted up by those who come back after a failure.
    pub attempt: usize,
}

/// HTTP/2 PINGs, sent while no call is open too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before a PING.
    pub interval: Duration,
    /// How long its answer may take.
    pub timeout: Duration,
}

impl Default for Keepalive {
    /// The agent's, `GRPC_KEEPALIVE_INTERVAL` and `GRPC_KEEPALIVE_TIMEOUT`.
    fn default() -> Self {
        Self { interval: Duration::from_secs(30), timeout: Duration::from_secs(10) }
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub enum ConnectError {
    /// The address cannot be used: no port, a name that nothing here resolves, a file that cannot be read.
    Address(String),
    /// The socket failed.
    Io(io::Error),
    /// The handshake failed.
    Tls(TlsError),
    /// The peer does not speak HTTP/2.
    Protocol(hyper::Error),
    /// It took too long.
    Timeout,
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(why) => f.write_str(why),
            Self::Io(e) => write!(f, "connect: {e}"),
            Self::Tls(e) => e.fmt(f),
            Self::Protocol(e) => write!(f, "HTTP/2: {e}"),
            Self::Timeout => f.write_str("connect timeout"),
        }
    }
}

impl std::error::Error for ConnectError {}

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A connection; clones share it. It stays open while a clone or a stream of it lives.
#[derive(Clone)]
pub struct Channel {
    send: SendRequest<Body>,
    authority: Authority,
    scheme: Scheme,
    /// Its sender lives in the task that drives the connection.
    alive: watch::Receiver<()>,
}

impl Channel {
    /// Resolves, connects, shakes hands. The addresses of a name are tried one after another.
    ///
    /// # Errors
    /// When no connection came about within `limit`.
    pub async fn connect(endpoint: &Endpoint, limit: Duration) -> Result<Self, ConnectError> {
        let deadline = Instant::now() + limit;
        let attempt = Box::pin(dial(endpoint, deadline));
        timeout_at(deadline, attempt).await.unwrap_or(Err(ConnectError::Timeout))
    }

    /// Speaks over a transport that is there already, as tests do.
    ///
    /// # Errors
    /// When the transport ends, or `authority` is none.
    pub async fn over<T>(io: T, authority: &str) -> Result<Self, ConnectError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        open(io, Scheme::HTTP, authority, None).await
    }

    /// Returns when the connection has ended, whoever ended it.
    pub async fn closed(&self) {
        // Nothing is ever sent: the end of the sender is the message.
        let _ = self.alive.clone().changed().await;
    }

    /// Whether it has ended or takes no further calls, as after a GOAWAY.
    pub fn is_closed(&self) -> bool {
        self.send.is_closed()
    }
}

impl Service<http::Request<Body>> for Channel {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.send.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        *request.uri_mut() = parts.try_into().expect("scheme, authority and a path are a URI");
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(AGENT));
        Box::pin(self.send.send_request(request))
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("authority", &self.authority).finish_non_exhaustive()
    }
}

async fn dial(endpoint: &Endpoint, deadline: Instant) -> Result<Channel, ConnectError> {
    let stream = socket(endpoint, deadline).await?;
    let Some(context) = &endpoint.tls else {
        return open(stream, Scheme::HTTP, &endpoint.authority, endpoint.keepalive).await;
    };
    let handshake = tls::connect(stream, context, context.sni(), &[H2.to_owned()]).await;
    let (stream, _) = handshake.map_err(ConnectError::Tls)?;
    open(stream, Scheme::HTTPS, &endpoint.authority, endpoint.keepalive).await
}

async fn socket(endpoint: &Endpoint, deadline: Instant) -> Result<Stream, ConnectError> {
    if let Some(path) = endpoint.address.strip_prefix(UNIX) {
        return Ok(net::connect_unix(path).await?);
    }
    let mut all = names::resolve(&endpoint.address).await.map_err(ConnectError::Address)?;
    let first = endpoint.attempt % all.len();
    all.rotate_left(first);
    let mut last = ConnectError::Timeout;
    for (tried, address) in all.iter().enumerate() {
        // One that swallows packets must not use up the time of the others.
        let left = deadline.saturating_duration_since(Instant::now());
        let rest = u32::try_from(all.len() - tried).unwrap_or(u32::MAX);
        let target = Target { timeout: Some(left / rest), ..Target::new(*address) };
        match net::connect(&target).await {
            Ok(tcp) => return Ok(tcp.into()),
            Err(e) => last = e.into(),
        }
    }
    Err(last)
}

async fn open<T>(io: T, scheme: Scheme, authority: &str, keepalive: Option<Keepalive>) -> Result<Channel, ConnectError>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let authority: Authority =
        authority.parse().map_err(|e| ConnectError::Address(format!("authority {authority:?}: {e}")))?;
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).initial_stream_window_size(WINDOW).initial_connection_window_size(WINDOW);
    if let Some(keepalive) = keepalive {
        builder
            .keep_alive_interval(keepalive.interval)
            .keep_alive_timeout(keepalive.timeout)
            .keep_alive_while_idle(true);
    }
    let (send, driver) = builder.handshake(TokioIo::new(io)).await.map_err(ConnectError::Protocol)?;
    let (living, alive) = watch::channel(());
    tokio::spawn(async move {
        if let Err(e) = driver.await {
            tracing::debug!("gRPC connection: {e}");
        }
        drop(living);
    });
    Ok(Channel { send, authority, scheme, alive })
}

#[cfg(test)]
mod tests {
    use hyper::service::service_fn;
    use tokio::io::DuplexStream;
    use tonic::client::Grpc;
    use tonic::{Request, Status, Streaming};
    use tonic_prost::ProstCodec;

    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Text {
        #[prost(string, tag = "1")]
        text: String,
    }

    /// Sends back what it gets, message by message; `/refuse` refuses.
    struct Echo;

    impl tonic::server::StreamingService<Text> for Echo {
        type Response = Text;
        type ResponseStream = Streaming<Text>;
        type Future = std::future::Ready<Result<tonic::Response<Streaming<Text>>, Status>>;

        fn call(&mut self, request: Request<Streaming<Text>>) -> Self::Future {
            std::future::ready(Ok(tonic::Response::new(request.into_inner())))
        }
    }

    async fn answer(request: http::Request<Incoming>) -> Result<http::Response<Body>, std::convert::Infallible> {
        if request.uri().path() == "/refuse" {
            return Ok(Status::permission_denied("not you").into_http());
        }
        assert_eq!(request.uri().authority().unwrap(), "echo.test");
        assert!(request.headers()[USER_AGENT].to_str().unwrap().starts_with("istio-proxy/"));
        Ok(tonic::server::Grpc::new(ProstCodec::default()).streaming(Echo, request).await)
    }

    fn serve(io: DuplexStream) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = server.serve_connection(TokioIo::new(io), service_fn(answer)).await;
        })
    }

    async fn channel() -> (Channel, tokio::task::JoinHandle<()>) {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let server = serve(far);
        (Channel::over(near, "echo.test").await.unwrap(), server)
    }

    fn text(text: &str) -> Text {
        Text { text: text.to_owned() }
    }

    #[tokio::test]
    async fn unary_calls_bring_answers_and_statuses() {
        let (channel, _server) = channel().await;
        let mut grpc = Grpc::new(channel);
        grpc.ready().await.unwrap();
        let codec = ProstCodec::<Text, Text>::default;
        let answer = grpc.unary(Request::new(text("hello")), "/echo".parse().unwrap(), codec()).await.unwrap();
        assert_eq!(answer.into_inner(), text("hello"));
        let refused = grpc.unary(Request::new(text("x")), "/refuse".parse().unwrap(), codec()).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (tonic::Code::PermissionDenied, "not you"));
    }

    #[tokio::test]
    async fn a_stream_answers_while_it_is_still_written() {
        let (channel, _server) = channel().await;
        let mut grpc = Grpc::new(channel);
        let (send, messages) = tokio::sync::mpsc::channel(1);
        let request = Request::new(tokio_stream::wrappers::ReceiverStream::new(messages));
        grpc.ready().await.unwrap();
        send.send(text("one")).await.unwrap();
        let codec = ProstCodec::<Text, Text>::default();
        let mut answers = grpc.streaming(request, "/echo".parse().unwrap(), codec).await.unwrap().into_inner();
        assert_eq!(answers.message().await.unwrap(), Some(text("one")));
        send.send(text("two")).await.unwrap();
        assert_eq!(answers.message().await.unwrap(), Some(text("two")));
        drop(send);
        assert_eq!(answers.message().await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_end_of_a_connection_is_told() {
        let (channel, server) = channel().await;
        assert!(!channel.is_closed());
        server.abort();
        channel.closed().await;
        assert!(channel.is_closed());
    }

    #[tokio::test]
    async fn a_peer_without_http2_is_told_as_such() {
        let (near, far) = tokio::io::duplex(1024);
        drop(far);
        assert!(matches!(Channel::over(near, "echo.test").await, Err(ConnectError::Protocol(_))));
        let nobody = Endpoint {
            address: "127.0.0.1:1".to_owned(),
            authority: "echo.test".to_owned(),
            tls: None,
            keepalive: None,
            attempt: 0,
        };
        let error = Channel::connect(&nobody, Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().contains("refused"), "{error}");
    }
}
