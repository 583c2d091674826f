//! The application behind either pair: says what it saw, echoes, switches to bytes, answers gRPC with trailers.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

type Body = BoxBody<Bytes, hyper::Error>;

/// Serves HTTP/1 and HTTP/2 on these addresses until the process ends.
pub(crate) fn serve(http1_at: &'static [&'static str], http2_at: &'static [&'static str]) {
    let (told, ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            for (at, h2) in http1_at.iter().map(|at| (at, false)).chain(http2_at.iter().map(|at| (at, true))) {
                let listener = TcpListener::bind(at).await.unwrap_or_else(|e| panic!("{at}: {e}"));
                tokio::spawn(accept(listener, h2));
            }
            told.send(()).expect("somebody waits");
            std::future::pending::<()>().await;
        });
    });
    ready.recv().expect("the application listens");
}

async fn accept(listener: TcpListener, h2: bool) {
    while let Ok((tcp, _)) = listener.accept().await {
        let io = TokioIo::new(tcp);
        // A connection that breaks is its client's to notice.
        if h2 {
            let serving = http2::Builder::new(TokioExecutor::new()).serve_connection(io, service_fn(answer));
            tokio::spawn(async move { drop(serving.await) });
        } else {
            let serving = http1::Builder::new().serve_connection(io, service_fn(answer)).with_upgrades();
            tokio::spawn(async move { drop(serving.await) });
        }
    }
}

async fn answer(mut request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let response = match request.uri().path() {
        "/echo" => Response::new(request.into_body().boxed()),
        "/ws" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let Ok(upgraded) = upgrade.await else { return };
                let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
                // Ends with the client.
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
            let mut switch = Response::new(text(String::new()));
            *switch.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            for (name, value) in [("connection", "upgrade"), ("upgrade", "websocket")] {
                switch.headers_mut().insert(name, HeaderValue::from_static(value));
            }
            switch
        }
        path if path.starts_with("/test.") => grpc(request).await,
        _ => {
            let mut seen = format!(
                "{} {} {:?}\n",
                request.method(),
                request.uri().path_and_query().map_or("", |p| p.as_str()),
                request.version()
            );
            for (name, value) in request.headers() {
                seen.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
            }
            Response::new(text(seen))
        }
    };
    Ok(response)
}

/// Sends the message back, status in trailers.
async fn grpc(request: Request<Incoming>) -> Response<Body> {
    let message = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    // No length is known, as servers of gRPC have it: curl stops listening at the last byte of one.
    let body = StreamBody::new(stream::iter([Ok(Frame::data(message)), Ok(Frame::trailers(trailers))])).boxed();
    let mut response = Response::new(body);
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

fn text(text: String) -> Body {
    Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed()
}
