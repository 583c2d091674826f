//! The service behind the proxies: the same kilobyte for every request, as cheaply as it can be had, so that it is never
//! what limits a measurement.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Result;
use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Bytes of a response's body.
const BODY: usize = 1024;
/// How an HTTP/2 client introduces itself; no HTTP/1.1 method starts so.
const PREFACE: &[u8] = b"PRI ";

/// Flags of `bench-backend`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Where to listen.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
}

/// Serves until killed.
///
/// # Errors
/// When it cannot listen.
pub fn run(args: &Args) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        accept(TcpListener::bind(args.listen).await?).await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Serves whoever comes, until there is an error.
pub(super) async fn accept(listener: TcpListener) -> std::io::Result<()> {
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        tokio::spawn(serve(socket));
    }
}

async fn serve(socket: TcpStream) {
    let mut start = [0; 4];
    // A client that leaves is no news here.
    if matches!(socket.peek(&mut start).await, Ok(4)) && start == *PREFACE {
        http2(socket).await;
    } else {
        http1(socket).await.ok();
    }
}

/// Requests without a body: an answer for each end of a head.
async fn http1(mut socket: TcpStream) -> std::io::Result<()> {
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {BODY}\r\nx-backend: bench\r\n\
         cache-control: no-store\r\n\r\n{}",
        "x".repeat(BODY)
    );
    let mut buffer = vec![0; 16 * 1024];
    let mut filled = 0;
    loop {
        let read = socket.read(&mut buffer[filled..]).await?;
        if read == 0 {
            return Ok(());
        }
        filled += read;
        let mut from = 0;
        while let Some(at) = find(&buffer[from..filled], b"\r\n\r\n") {
            from += at + 4;
            socket.write_all(answer.as_bytes()).await?;
        }
        buffer.copy_within(from..filled, 0);
        filled -= from;
    }
}

async fn http2(socket: TcpStream) {
    let body = Bytes::from("x".repeat(BODY));
    let service = service_fn(move |_| {
        let response = http::Response::builder()
            .header("content-type", "text/plain")
            .header("x-backend", "bench")
            .header("cache-control", "no-store")
            .body(Full::new(body.clone()))
            .expect("constant headers");
        async move { Ok::<_, Infallible>(response) }
    });
    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    server.serve_connection(TokioIo::new(socket), service).await.ok();
}

/// Where `what` starts in `text`.
pub(super) fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}
