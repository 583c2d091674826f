//! Bodies that come while they are sent, connections that say goodbye or stop being HTTP.

use std::convert::Infallible;

use http_body_util::{Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::DuplexStream;
use tokio::sync::oneshot;

use super::*;

/// A request body that is still on its way, with the client's end of its connection.
async fn streamed(framing: &str) -> (DuplexStream, Body) {
    let (mut client, server) = tokio::io::duplex(1024);
    let (told, request) = oneshot::channel();
    let told = Arc::new(Mutex::new(Some(told)));
    let service = service_fn(move |request: Request<Incoming>| {
        told.lock().unwrap().take().unwrap().send(request.into_body()).unwrap();
        std::future::pending::<Result<http::Response<Empty<Bytes>>, Infallible>>()
    });
    tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), service));
    let head = format!("POST / HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n");
    client.write_all(head.as_bytes()).await.unwrap();
    (client, Body::from_client(request.await.unwrap()))
}

/// What was taken from the client once is said again to the next host, up to the limit.
#[tokio::test]
async fn a_streamed_body_is_said_again() {
    for (limit, status, attempts) in [(8, 200, 2), (7, 500, 1)] {
        let mut server = Server::start([Reply::Say(BAD)]).await;
        let cluster = local(cluster("c"), &[server.port()]);
        let policy = policy(RetryOn::SERVER_ERROR);
        let call = Call { retry: Some(&policy), replay_limit: limit, ..Call::new(&cluster) };
        let (mut client, body) = streamed("content-length: 8").await;
        let feed = async {
            for part in ["four", "more"] {
                client.write_all(part.as_bytes()).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let (answer, ()) = tokio::join!(ask(&call, Method::POST, body), feed);
        let (got, trace) = answer.unwrap();
        assert_eq!((got, trace.attempts), (status, attempts), "limit {limit}");
        for _ in 0..attempts {
            let (_, request) = server.request().await;
            assert!(request.ends_with("\r\n\r\nfourmore"), "{request}");
        }
        assert_settled(&cluster.shared);
    }
}

/// Over HTTP/1 trailers end here.
#[tokio::test]
async fn trailers_end_with_http1() {
    let mut server = Server::start([]).await;
    let cluster = local(cluster("c"), &[server.port()]);
    let (mut client, body) = streamed("transfer-encoding: chunked").await;
    client.write_all(b"0\r\nx-t: 1\r\n\r\n").await.unwrap();
    let mut head = parts(Method::POST);
    head.headers.insert("trailer", "x-t".parse().unwrap());
    let mut trace = Trace::default();
    send(&Call::new(&cluster), head, body, &mut trace).await.unwrap();
    // Chunks are not read by the server: they stand where the next request would.
    server.request().await;
    assert_eq!(server.request().await.1, "0\r\n\r\n");
}

/// Two lengths, or a length where there is no body.
#[tokio::test]
async fn responses_of_doubtful_length_are_refused() {
    for doubtful in [
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "HTTP/1.1 204 No Content\r\ncontent-length: 3\r\n\r\nabc",
    ] {
        let mut server = Server::start([Reply::Say(doubtful)]).await;
        let cluster = local(cluster("c"), &[server.port()]);
        assert_eq!(get(&cluster).await.unwrap_err().0.kind, Kind::UpstreamProtocol, "{doubtful}");
        server.request().await;
        assert_eq!(server.closed.recv().await.unwrap(), 1);
        assert_settled(&cluster.shared);
    }
}

/// Serves HTTP/2; each answer is the number of its connection. A POST waits for `release`; `goodbye` sends GOAWAY on the
/// first connection.
async fn leaving(goodbye: Arc<Notify>, release: Arc<Notify>) -> (u16, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = async move {
        for number in 1.. {
            let (stream, _) = listener.accept().await.unwrap();
            let (goodbye, release) = (Arc::clone(&goodbye), Arc::clone(&release));
            let service = service_fn(move |request: Request<Incoming>| {
                let release = Arc::clone(&release);
                async move {
                    if request.method() == Method::POST {
                        release.notified().await;
                    }
                    Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from(number.to_string()))))
                }
            });
            let exec = TokioExecutor::new();
            let connection =
                hyper::server::conn::http2::Builder::new(exec).serve_connection(TokioIo::new(stream), service);
            tokio::spawn(async move {
                let mut connection = Box::pin(connection);
                tokio::select! {
                    _ = connection.as_mut() => return,
                    () = goodbye.notified(), if number == 1 => connection.as_mut().graceful_shutdown(),
                }
                let _ = connection.await;
            });
        }
    };
    (port, tokio::spawn(serve))
}

/// After GOAWAY new streams go to a new connection, none is lost, and those under way come to their end.
#[tokio::test]
async fn goaway_ends_no_stream() {
    let (goodbye, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (port, server) = leaving(Arc::clone(&goodbye), Arc::clone(&release)).await;
    let mut config = cluster("c");
    config.http.protocol = UpstreamProtocol::Http2;
    let cluster = local(config, &[port]);
    let number = |method: Method| {
        let cluster = Arc::clone(&cluster);
        async move {
            let answer = send(&Call::new(&cluster), parts(method), Body::empty(), &mut Trace::default()).await.unwrap();
            text(answer).await
        }
    };
    assert_eq!(number(Method::GET).await, "1");
    let held = tokio::spawn(number(Method::POST));
    while cluster.shared.breakers.requests.used() < 1 {
        tokio::task::yield_now().await;
    }
    goodbye.notify_one();
    while number(Method::GET).await == "1" {}
    assert!(!held.is_finished());
    release.notify_one();
    assert_eq!(held.await.unwrap(), "1");
    assert_settled(&cluster.shared);
    server.abort();
}

/// After 101 the bytes are the client's own, and so is the connection.
#[tokio::test]
async fn an_upgraded_connection_is_nobody_elses() {
    const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\nhello";
    let mut server = Server::start([Reply::Say(SWITCH)]).await;
    let cluster = local(cluster("c"), &[server.port()]);
    let call = Call { upgrade: true, ..Call::new(&cluster) };
    let mut head = parts(Method::GET);
    head.headers.insert("connection", "upgrade".parse().unwrap());
    head.headers.insert("upgrade", "chat".parse().unwrap());
    let answer = send(&call, head, Body::empty(), &mut Trace::default()).await.unwrap();
    assert_eq!(answer.head.status, 101);
    let mut stream = TokioIo::new(answer.upgrade.unwrap().await.unwrap());
    stream.write_all(b"ping\r\n\r\n").await.unwrap();
    let mut said = vec![0; 5 + OK.len()];
    stream.read_exact(&mut said).await.unwrap();
    assert_eq!(said, [b"hello", OK.as_bytes()].concat());
    assert_eq!(server.request().await.0, 1);
    assert_eq!(server.request().await.1, "ping\r\n\r\n");
    get(&cluster).await.unwrap();
    assert_eq!(server.request().await.0, 2, "the upgraded connection was taken");
    drop((stream, answer.body));
    assert_eq!(server.closed.recv().await.unwrap(), 1);
    assert_settled(&cluster.shared);
}
