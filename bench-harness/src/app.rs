//! A small application: HTTP that says who answered and what it saw, TCP that echoes, health and faults on request.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What a slow answer takes.
const SLOW: Duration = Duration::from_millis(600);

/// Arguments of the application.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How it calls itself in answers.
    #[arg(long)]
    name: String,
    /// Where to serve HTTP/1 and HTTP/2.
    #[arg(long, value_name = "ADDRESS")]
    http: Vec<SocketAddr>,
    /// Where to echo bytes.
    #[arg(long, value_name = "ADDRESS")]
    tcp: Vec<SocketAddr>,
    /// Folder of switches: a file NAME.sick fails /health, NAME.fail answers 500 to everything else.
    #[arg(long, value_name = "DIR")]
    switches: Option<PathBuf>,
}

/// Arguments of the TCP client.
#[derive(Debug, Clone, clap::Args)]
pub struct TcpArgs {
    /// Where to.
    address: String,
    /// Text to send.
    text: String,
    /// Milliseconds to wait for the whole answer.
    #[arg(long, default_value_t = 3000)]
    wait_ms: u64,
    /// Milliseconds to hold the connection open after the answer.
    #[arg(long, default_value_t = 0)]
    hold_ms: u64,
}

struct Face {
    name: String,
    switches: Option<PathBuf>,
}

/// Serves until it is killed.
///
/// # Errors
/// When an address cannot be bound.
pub fn run(args: &Args) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let face = Arc::new(Face { name: args.name.clone(), switches: args.switches.clone() });
    runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for address in &args.http {
            tasks.spawn(serve_http(bind(*address).await?, Arc::clone(&face)));
        }
        for address in &args.tcp {
            tasks.spawn(echo(bind(*address).await?));
        }
        tasks.join_all().await;
        Ok(ExitCode::SUCCESS)
    })
}

async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

async fn serve_http(listener: TcpListener, face: Arc<Face>) {
    while let Ok((socket, _)) = listener.accept().await {
        let face = Arc::clone(&face);
        tokio::spawn(async move {
            socket.set_nodelay(true).ok();
            let service = service_fn(move |request| answer(Arc::clone(&face), request));
            let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            // A client that goes away is no failure of the application.
            server.serve_connection(TokioIo::new(socket), service).await.ok();
        });
    }
}

async fn answer(face: Arc<Face>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let path = request.uri().path().to_owned();
    let peer = request.headers().get("x-forwarded-client-cert").cloned();
    let version = format!("{:?}", request.version());
    request.into_body().collect().await?;
    let switched = |what: &str| {
        face.switches.as_ref().is_some_and(|dir| fs::exists(dir.join(format!("{}.{what}", face.name))).unwrap_or(false))
    };
    let status = match &*path {
        "/health" | "/healthz" if switched("sick") => StatusCode::SERVICE_UNAVAILABLE,
        "/health" | "/healthz" => StatusCode::OK,
        _ if switched("fail") => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::OK,
    };
    if path.ends_with("/slow") {
        tokio::time::sleep(SLOW).await;
    }
    let mut response = Response::new(Full::from(format!("{}\n", face.name)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    let mut set = |name: &'static str, value: &str| {
        if let Ok(value) = http::HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    set("x-app", &face.name);
    set("x-app-version", &version);
    if let Some(peer) = peer {
        headers.insert("x-app-saw-peer", peer);
    }
    Ok(response)
}

async fn echo(listener: TcpListener) {
    while let Ok((mut socket, _)) = listener.accept().await {
        tokio::spawn(async move {
            let (mut from, mut to) = socket.split();
            tokio::io::copy(&mut from, &mut to).await.ok();
            to.shutdown().await.ok();
        });
    }
}

/// Sends, half-closes after the answer, prints what came back. Exit code 1: the connection was refused or closed
/// before the whole answer.
///
/// # Errors
/// When there is no runtime.
pub fn tcp(args: &TcpArgs) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let talk = async {
        let mut stream = TcpStream::connect(&args.address).await?;
        stream.write_all(args.text.as_bytes()).await?;
        let mut answer = vec![0; args.text.len()];
        stream.read_exact(&mut answer).await?;
        tokio::time::sleep(Duration::from_millis(args.hold_ms)).await;
        stream.shutdown().await?;
        std::io::Result::Ok(answer)
    };
    let limit = Duration::from_millis(args.wait_ms + args.hold_ms);
    match runtime.block_on(async { tokio::time::timeout(limit, talk).await }) {
        Ok(Ok(answer)) => {
            println!("{}", String::from_utf8_lossy(&answer));
            Ok(ExitCode::SUCCESS)
        }
        Ok(Err(error)) => {
            println!("closed: {error}");
            Ok(ExitCode::FAILURE)
        }
        Err(_) => {
            println!("no answer within {} ms", args.wait_ms);
            Ok(ExitCode::FAILURE)
        }
    }
}
