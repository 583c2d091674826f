//! Sockets, handshakes, HTTP/2; services are asked by the name in the path.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tonic::Status;
use tonic::body::Body;

use super::Log;

/// Answers of a service.
pub type Reply = Pin<Box<dyn Future<Output = http::Response<Body>> + Send>>;

/// One gRPC service, all its methods.
pub trait Service: Send + Sync + 'static {
    /// Answers a call; `tonic::server::Grpc` turns messages into what is asked for.
    fn answer(self: Arc<Self>, call: Call) -> Reply;
}

/// A call with whom it came from.
#[derive(Debug)]
pub struct Call {
    /// Path, metadata, messages.
    pub request: http::Request<Incoming>,
    /// The connection.
    pub peer: Arc<Peer>,
}

/// Who is on a connection.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    /// Counts connections from 1.
    pub connection: usize,
    /// Its certificate chain, leaf first; empty when it presented none.
    pub certificates: Vec<CertificateDer<'static>>,
    /// Server name it asked for.
    pub sni: Option<String>,
    /// Protocol that was agreed on.
    pub alpn: Option<String>,
}

/// A connection that was tried.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Who; only the number when the handshake failed.
    pub peer: Arc<Peer>,
    /// Why the handshake failed, or that nobody was there.
    pub error: Option<String>,
}

/// A listening server; it and its connections end when dropped.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    tls: Option<TlsAcceptor>,
    services: HashMap<&'static str, Arc<dyn Service>>,
    connections: Log<Connection>,
    /// Connections are closed as soon as they are accepted.
    down: AtomicBool,
    /// Counts orders to close what is open.
    hang_up: watch::Sender<usize>,
}

impl Server {
    /// Listens on a free port of 127.0.0.1; plaintext without `tls`.
    ///
    /// # Errors
    /// When there is no socket.
    pub async fn start(tls: Option<ServerConfig>, services: Vec<(&'static str, Arc<dyn Service>)>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("no port for a server")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            tls: tls.map(|config| TlsAcceptor::from(Arc::new(config))),
            services: services.into_iter().collect(),
            connections: Log::default(),
            down: AtomicBool::new(false),
            hang_up: watch::Sender::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, accepting })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections so far, failed handshakes included.
    pub fn connections(&self) -> &Log<Connection> {
        &self.shared.connections
    }

    /// Down: open connections end, new ones are closed unanswered.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::Relaxed);
        if down {
            self.hang_up();
        }
    }

    /// Ends every open connection.
    pub fn hang_up(&self) {
        self.shared.hang_up.send_modify(|n| *n += 1);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        self.hang_up();
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut count = 0;
    while let Ok((socket, _)) = listener.accept().await {
        count += 1;
        if shared.down.load(Ordering::Relaxed) {
            let peer = Arc::new(Peer { connection: count, ..Peer::default() });
            shared.connections.push(Connection { peer, error: Some("down".to_owned()) });
            continue;
        }
        let shared = Arc::clone(&shared);
        let mut hang_up = shared.hang_up.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                () = serve(socket, count, shared) => {}
                _ = hang_up.changed() => {}
            }
        });
    }
}

async fn serve(socket: TcpStream, connection: usize, shared: Arc<Shared>) {
    let Some(acceptor) = &shared.tls else {
        return talk(socket, Peer { connection, ..Peer::default() }, shared).await;
    };
    match acceptor.accept(socket).await {
        Ok(stream) => {
            let session = stream.get_ref().1;
            let peer = Peer {
                connection,
                certificates: session.peer_certificates().unwrap_or_default().to_vec(),
                sni: session.server_name().map(str::to_owned),
                alpn: session.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned()),
            };
            talk(stream, peer, shared).await;
        }
        Err(e) => {
            let peer = Arc::new(Peer { connection, ..Peer::default() });
            shared.connections.push(Connection { peer, error: Some(e.to_string()) });
        }
    }
}

async fn talk<T>(io: T, peer: Peer, shared: Arc<Shared>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let peer = Arc::new(peer);
    shared.connections.push(Connection { peer: Arc::clone(&peer), error: None });
    let answer = service_fn(move |request: http::Request<Incoming>| {
        let (peer, shared) = (Arc::clone(&peer), Arc::clone(&shared));
        async move {
            let name = request.uri().path().trim_start_matches('/').split('/').next().unwrap_or_default();
            let Some(service) = shared.services.get(name) else {
                return Ok(Status::unimplemented(format!("unknown service {name}")).into_http());
            };
            Ok::<_, Infallible>(Arc::clone(service).answer(Call { request, peer }).await)
        }
    });
    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    // How a client leaves is its own affair.
    let _ = server.serve_connection(TokioIo::new(io), answer).await;
}
