//! The application behind the proxies: sends back what comes, on websockets, on gRPC streams and on plain TCP.

use std::convert::Infallible;
use std::net::SocketAddr;

use anyhow::Result;
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use http::{Request, Response, StatusCode};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};

/// Serves until the process ends: where HTTP is spoken, and where bytes come back.
///
/// # Errors
/// When there are no ports.
pub(super) async fn start() -> Result<(SocketAddr, SocketAddr)> {
    let (http, tcp) = (TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?);
    let at = (http.local_addr()?, tcp.local_addr()?);
    tokio::spawn(async move {
        while let Ok((socket, _)) = http.accept().await {
            tokio::spawn(serve(socket));
        }
    });
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = tcp.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = socket.split();
                tokio::io::copy(&mut reader, &mut writer).await
            });
        }
    });
    Ok(at)
}

async fn serve(socket: TcpStream) {
    // Messages are small and waited for.
    let _ = socket.set_nodelay(true);
    let service = service_fn(|request| async { Ok::<_, Infallible>(answer(request)) });
    // How a client leaves is told by the client.
    let _ =
        auto::Builder::new(TokioExecutor::new()).serve_connection_with_upgrades(TokioIo::new(socket), service).await;
}

fn answer(mut request: Request<Incoming>) -> Response<Either<Incoming, Full<Bytes>>> {
    let nothing = || Either::Right(Full::new(Bytes::new()));
    let mut response = Response::new(nothing());
    if request.headers().contains_key(UPGRADE) {
        let switch = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let Ok(switched) = switch.await else { return };
            let (mut reader, mut writer) = tokio::io::split(TokioIo::new(switched));
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        });
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(CONNECTION, http::HeaderValue::from_static("Upgrade"));
        response.headers_mut().insert(UPGRADE, http::HeaderValue::from_static("websocket"));
        return response;
    }
    if let Some(kind) = request.headers().get(CONTENT_TYPE).cloned() {
        *response.body_mut() = Either::Left(request.into_body());
        response.headers_mut().insert(CONTENT_TYPE, kind);
        return response;
    }
    *response.body_mut() = Either::Right(Full::new(Bytes::from_static(b"ok")));
    response
}
