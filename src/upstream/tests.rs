//! Real sockets on the loopback: requests, connections, limits and failures end to end.
#![cfg(test)]

mod streaming;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Version};
use http_body_util::BodyExt;
use proxy_config::model::{Cluster, ClusterKind, OutlierDetection, UpstreamProtocol};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};

use super::fixture::{cluster, endpoint, endpoints, group, joined, shared};
use super::*;
use crate::error::{Kind, Limit};
use crate::snapshot::ClusterShared;
use crate::snapshot::action::RetryOn;

/// What a scripted server does with the next request.
#[derive(Clone)]
enum Reply {
    /// These bytes.
    Say(&'static str),
    /// These bytes, then the connection ends.
    SayAndClose(&'static str),
    /// Nothing, and the connection ends.
    Close,
    /// Nothing until told; then the first reply's bytes.
    Hold(Arc<Notify>, &'static str),
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const BAD: &str = "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n";

/// A server that speaks HTTP/1.1 by a script, whichever connection a request comes on; after the script it says OK.
struct Server {
    address: SocketAddr,
    /// Number of the connection, and the request with its body.
    requests: mpsc::UnboundedReceiver<(usize, String)>,
    /// Numbers of connections that the client has closed.
    closed: mpsc::UnboundedReceiver<usize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(script: impl IntoIterator<Item = Reply>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let script = Arc::new(Mutex::new(script.into_iter().collect::<VecDeque<_>>()));
        let (seen, requests) = mpsc::unbounded_channel();
        let (gone, closed) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let mut number = 0;
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                number += 1;
                let (script, seen, gone) = (Arc::clone(&script), seen.clone(), gone.clone());
                tokio::spawn(async move {
                    converse(stream, number, &script, &seen).await;
                    let _ = gone.send(number);
                });
            }
        });
        Self { address, requests, closed, task }
    }

    async fn request(&mut self) -> (usize, String) {
        self.requests.recv().await.unwrap()
    }

    fn port(&self) -> u16 {
        self.address.port()
    }
}

async fn converse(
    mut stream: TcpStream,
    number: usize,
    script: &Mutex<VecDeque<Reply>>,
    seen: &mpsc::UnboundedSender<(usize, String)>,
) {
    loop {
        let Some(request) = read_request(&mut stream).await else { return };
        let _ = seen.send((number, request));
        let reply = script.lock().unwrap().pop_front().unwrap_or(Reply::Say(OK));
        match reply {
            Reply::Say(bytes) => stream.write_all(bytes.as_bytes()).await.unwrap(),
            Reply::SayAndClose(bytes) => {
                let _ = stream.write_all(bytes.as_bytes()).await;
                return;
            }
            Reply::Close => return,
            Reply::Hold(until, bytes) => {
                until.notified().await;
                if stream.write_all(bytes.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with("\r\n\r\n") {
        if stream.read(&mut byte).await.ok()? == 0 {
            return None;
        }
        text.push(char::from(byte[0]));
    }
    let length = text.lines().find_map(|l| l.strip_prefix("content-length: ")).map_or(0, |l| l.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    text.push_str(std::str::from_utf8(&body).unwrap());
    Some(text)
}

fn local(config: Cluster, ports: &[u16]) -> Arc<ClusterLocal> {
    joined(shared(config, &endpoints(ports)), None)
}

fn parts(method: Method) -> http::request::Parts {
    Request::builder().method(method).uri("/path?q").header("host", "svc:80").body(()).unwrap().into_parts().0
}

async fn text(answer: Answer) -> String {
    String::from_utf8(answer.body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

async fn get(cluster: &Arc<ClusterLocal>) -> Result<(u16, Trace), (Error, Trace)> {
    ask(&Call::new(cluster), Method::GET, Body::empty()).await
}

async fn ask(call: &Call<'_>, method: Method, body: Body) -> Result<(u16, Trace), (Error, Trace)> {
    let mut trace = Trace::default();
    match send(call, parts(method), body, &mut trace).await {
        Ok(answer) => {
            let status = answer.head.status.as_u16();
            text(answer).await;
            Ok((status, trace))
        }
        Err(error) => Err((error, trace)),
    }
}

fn policy(on: RetryOn) -> RetryPolicy {
    RetryPolicy {
        on,
        retries: 2,
        per_try_timeout: None,
        statuses: Box::default(),
        avoid_previous_hosts: true,
        host_selection_attempts: 60,
        previous_priorities: None,
        backoff_base: Duration::from_millis(1),
        backoff_max: Duration::from_millis(2),
    }
}

/// Nothing is in use any more.
fn assert_settled(shared: &ClusterShared) {
    let breakers = &shared.breakers;
    assert_eq!((breakers.requests.used(), breakers.pending.used(), breakers.retries.used()), (0, 0, 0));
    assert!(shared.hosts().all.iter().all(|host| host.stats.active.load(Relaxed) == 0));
}

/// A port that refuses connections.
async fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn a_connection_serves_one_request_after_the_other() {
    let mut server = Server::start([]).await;
    let cluster = local(cluster("c"), &[server.port()]);
    for _ in 0..3 {
        let (status, trace) = get(&cluster).await.unwrap();
        assert_eq!((status, trace.attempts, trace.flags), (200, 1, Flags::NONE));
        let (connection, request) = server.request().await;
        assert_eq!(connection, 1);
        assert!(request.starts_with("GET /path?q HTTP/1.1\r\nhost: svc:80\r\n"), "{request}");
        assert!(trace.upstream_local.is_some());
    }
    assert_settled(&cluster.shared);
    assert_eq!(cluster.shared.breakers.connections.used(), 1);
    let totals = &cluster.shared.hosts().all[0].stats.totals;
    assert_eq!((totals.requests.load(Relaxed), totals.connections_total.load(Relaxed)), (3, 1));
}

#[tokio::test]
async fn requests_per_connection_are_limited() {
    let mut server = Server::start([]).await;
    let mut config = cluster("c");
    config.http.max_requests_per_connection = Some(2);
    let cluster = local(config, &[server.port()]);
    let mut connections = Vec::new();
    for _ in 0..5 {
        get(&cluster).await.unwrap();
        connections.push(server.request().await.0);
    }
    assert_eq!(connections, [1, 1, 2, 2, 3]);
}

#[tokio::test]
async fn an_unfinished_response_closes_its_connection() {
    let mut server = Server::start([Reply::Say("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel")]).await;
    let cluster = local(cluster("c"), &[server.port()]);
    let mut trace = Trace::default();
    let answer = send(&Call::new(&cluster), parts(Method::GET), Body::empty(), &mut trace).await.unwrap();
    assert_eq!(cluster.shared.breakers.requests.used(), 1);
    drop(answer);
    assert_settled(&cluster.shared);
    assert_eq!(server.closed.recv().await, Some(1));
}

#[tokio::test]
async fn a_request_that_is_given_up_gives_everything_back() {
    let hold = Arc::new(Notify::new());
    let mut server = Server::start([Reply::Hold(Arc::clone(&hold), OK)]).await;
    let cluster = local(cluster("c"), &[server.port()]);
    tokio::select! {
        _ = get(&cluster) => panic!("nobody answers"),
        _ = server.request() => {}
    }
    assert_settled(&cluster.shared);
    hold.notify_one();
    assert_eq!(server.closed.recv().await, Some(1));
}

/// The server reads the request on the reused connection and closes: whether that may be sent again is a matter of the
/// method.
#[tokio::test]
async fn a_reused_connection_that_dies_is_replaced_where_that_is_safe() {
    for (method, safe) in [(Method::GET, true), (Method::PUT, true), (Method::POST, false)] {
        let mut server = Server::start([Reply::Say(OK), Reply::Close]).await;
        let cluster = local(cluster("c"), &[server.port()]);
        get(&cluster).await.unwrap();
        server.request().await;
        let body = if method == Method::GET { Body::empty() } else { Body::full(Bytes::from_static(b"x")) };
        let result = ask(&Call::new(&cluster), method.clone(), body).await;
        assert_eq!(server.request().await.0, 1);
        if safe {
            assert_eq!(result.unwrap().1.attempts, 1, "{method}");
            assert_eq!(server.request().await.0, 2);
        } else {
            let (error, trace) = result.unwrap_err();
            assert_eq!((error.kind, trace.flags), (Kind::UpstreamClosed, Flags::UC));
        }
        assert!(server.requests.try_recv().is_err(), "sent too often");
        assert_settled(&cluster.shared);
    }
}

#[tokio::test]
async fn a_fresh_connection_that_dies_is_not_repeated() {
    let mut server = Server::start([Reply::Close]).await;
    let cluster = local(cluster("c"), &[server.port()]);
    let (error, trace) = get(&cluster).await.unwrap_err();
    assert_eq!((error.kind, trace.flags, trace.attempts), (Kind::UpstreamClosed, Flags::UC, 1));
    server.request().await;
    assert!(server.requests.try_recv().is_err());
}

/// The server closes right behind its answer. Without a look before reuse a POST would be lost now and then.
#[tokio::test]
async fn a_connection_closed_while_idle_is_not_used() {
    let mut server = Server::start((0..50).map(|_| Reply::SayAndClose(OK))).await;
    let cluster = local(cluster("c"), &[server.port()]);
    for _ in 0..50 {
        let call = Call::new(&cluster);
        assert_eq!(ask(&call, Method::POST, Body::full(Bytes::from_static(b"x"))).await.unwrap().0, 200);
        server.closed.recv().await.unwrap();
    }
}

#[tokio::test]
async fn an_announced_idle_time_is_kept() {
    const BRIEF: &str = "HTTP/1.1 200 OK\r\nkeep-alive: timeout=0\r\ncontent-length: 0\r\n\r\n";
    let mut server = Server::start([Reply::Say(BRIEF)]).await;
    let cluster = local(cluster("c"), &[server.port()]);
    get(&cluster).await.unwrap();
    // The announced time, one millisecond by our margin, passes.
    tokio::time::sleep(Duration::from_millis(2)).await;
    get(&cluster).await.unwrap();
    assert_eq!((server.request().await.0, server.request().await.0), (1, 2));
}

#[tokio::test]
async fn idle_connections_are_closed_in_time() {
    let mut server = Server::start([]).await;
    let mut config = cluster("c");
    config.http.idle_timeout = Some(Duration::from_millis(30));
    let cluster = local(config, &[server.port()]);
    get(&cluster).await.unwrap();
    assert_eq!(server.closed.recv().await, Some(1));
    assert_eq!(cluster.connections(), 0);
    assert_eq!(cluster.shared.breakers.connections.used(), 0);
}

#[tokio::test]
async fn what_waits_is_limited() {
    let hold = Arc::new(Notify::new());
    let mut server = Server::start([Reply::Hold(Arc::clone(&hold), OK)]).await;
    let mut config = cluster("c");
    config.limits.max_connections = 1;
    config.limits.max_pending_requests = 1;
    let cluster = local(config, &[server.port()]);
    let first = tokio::spawn({
        let cluster = Arc::clone(&cluster);
        async move { get(&cluster).await.unwrap().0 }
    });
    server.request().await;
    let second = tokio::spawn({
        let cluster = Arc::clone(&cluster);
        async move { get(&cluster).await.unwrap().0 }
    });
    while cluster.shared.breakers.pending.used() == 0 {
        tokio::task::yield_now().await;
    }
    let (error, trace) = get(&cluster).await.unwrap_err();
    assert_eq!((error.kind, trace.flags), (Kind::Overflow(Limit::Pending), Flags::UO));
    hold.notify_one();
    assert_eq!((first.await.unwrap(), second.await.unwrap()), (200, 200));
    assert_eq!(server.request().await.0, 1, "one connection served both");
    assert_settled(&cluster.shared);
}

#[tokio::test]
async fn active_requests_are_limited() {
    let mut server = Server::start([Reply::Say("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel")]).await;
    let mut config = cluster("c");
    config.limits.max_requests = 1;
    let cluster = local(config, &[server.port()]);
    let mut trace = Trace::default();
    let held = send(&Call::new(&cluster), parts(Method::GET), Body::empty(), &mut trace).await.unwrap();
    server.request().await;
    assert_eq!(get(&cluster).await.unwrap_err().0.kind, Kind::Overflow(Limit::Requests));
    drop(held);
    assert_eq!(get(&cluster).await.unwrap().0, 200);
    // The connection that was opened for the refused request was kept.
    assert_eq!(server.request().await.0, 2);
}

#[tokio::test]
async fn refused_connections_go_to_another_host() {
    let server = Server::start([]).await;
    let cluster = local(cluster("c"), &[closed_port().await, server.port()]);
    let policy = policy(RetryOn::CONNECT_FAILURE);
    let call = Call { retry: Some(&policy), ..Call::new(&cluster) };
    for _ in 0..20 {
        let (status, trace) = ask(&call, Method::GET, Body::empty()).await.unwrap();
        assert_eq!((status, trace.flags), (200, Flags::NONE));
        assert!(trace.attempts <= 2);
    }
    assert_settled(&cluster.shared);
}

#[tokio::test]
async fn retries_run_out() {
    let cluster = local(cluster("c"), &[closed_port().await]);
    let policy = policy(RetryOn::CONNECT_FAILURE);
    let call = Call { retry: Some(&policy), ..Call::new(&cluster) };
    let (error, trace) = ask(&call, Method::GET, Body::empty()).await.unwrap_err();
    assert_eq!((error.kind, trace.attempts), (Kind::ConnectRefused, 3));
    assert_eq!(trace.flags.to_string(), "UF,URX");
    assert_eq!(trace.transport_failure.as_deref(), Some("delayed connect error: Connection refused"));
    assert_eq!(cluster.shared.hosts().all[0].stats.totals.connect_failures.load(Relaxed), 3);
    assert_settled(&cluster.shared);
}

#[tokio::test]
async fn a_retry_sends_the_body_and_the_count_again() {
    let mut server = Server::start([Reply::Say(BAD), Reply::Say(BAD), Reply::Say(BAD)]).await;
    let cluster = local(cluster("c"), &[server.port()]);
    let policy = policy(RetryOn::SERVER_ERROR);
    let call = Call { retry: Some(&policy), ..Call::new(&cluster) };
    let mut head = parts(Method::POST);
    head.headers.insert("x-envoy-attempt-count", "1".parse().unwrap());
    let mut trace = Trace::default();
    let answer = send(&call, head, Body::full(Bytes::from_static(b"body")), &mut trace).await.unwrap();
    assert_eq!((answer.head.status.as_u16(), trace.attempts, trace.flags), (500, 3, Flags::URX));
    for attempt in 1..=3 {
        let (_, request) = server.request().await;
        assert!(request.contains(&format!("x-envoy-attempt-count: {attempt}\r\n")), "{request}");
        assert!(request.ends_with("\r\n\r\nbody"), "{request}");
    }
    drop(answer);
    assert_settled(&cluster.shared);
}

#[tokio::test]
async fn concurrent_retries_are_limited() {
    let server = Server::start([Reply::Say(BAD)]).await;
    let mut config = cluster("c");
    config.limits.max_retries = 0;
    let cluster = local(config, &[server.port()]);
    let policy = policy(RetryOn::SERVER_ERROR);
    let call = Call { retry: Some(&policy), ..Call::new(&cluster) };
    let (status, trace) = ask(&call, Method::GET, Body::empty()).await.unwrap();
    assert_eq!((status, trace.attempts, trace.flags), (500, 1, Flags::UO));
}

#[tokio::test]
async fn limits_on_time() {
    let hold = Arc::new(Notify::new());
    let silent = || Server::start((0..3).map(|_| Reply::Hold(Arc::clone(&hold), OK)));
    let server = silent().await;
    let cluster_ = local(cluster("c"), &[server.port()]);
    let call = Call { timeout: Some(Duration::from_millis(20)), ..Call::new(&cluster_) };
    let (error, trace) = ask(&call, Method::GET, Body::empty()).await.unwrap_err();
    assert_eq!((error.kind, trace.flags), (Kind::ResponseTimeout, Flags::UT));
    assert_settled(&cluster_.shared);

    let mut policy = policy(RetryOn::RESET);
    policy.per_try_timeout = Some(Duration::from_millis(10));
    let server = silent().await;
    let cluster_ = local(cluster("c"), &[server.port()]);
    let call = Call { retry: Some(&policy), ..Call::new(&cluster_) };
    let (error, trace) = ask(&call, Method::GET, Body::empty()).await.unwrap_err();
    assert_eq!((error.kind, trace.attempts), (Kind::PerTryTimeout, 3));
    assert_eq!(trace.flags.to_string(), "UT,URX");

    // The route's limit also ends a response that has begun.
    let server = Server::start([Reply::Say("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel")]).await;
    let cluster_ = local(cluster("c"), &[server.port()]);
    let call = Call { timeout: Some(Duration::from_millis(20)), ..Call::new(&cluster_) };
    let mut trace = Trace::default();
    let answer = send(&call, parts(Method::GET), Body::empty(), &mut trace).await.unwrap();
    assert_eq!(answer.body.collect().await.unwrap_err().kind, Kind::ResponseTimeout);
    assert_settled(&cluster_.shared);
}

#[tokio::test]
async fn failures_have_their_names() {
    for (reply, kind) in [
        (Reply::SayAndClose("HTTP/1.1 20"), Kind::UpstreamProtocol),
        (Reply::Say("SSH-2.0-OpenSSH_9\r\n\r\n"), Kind::UpstreamProtocol),
        (Reply::Close, Kind::UpstreamClosed),
    ] {
        let server = Server::start([reply]).await;
        let cluster = local(cluster("c"), &[server.port()]);
        assert_eq!(get(&cluster).await.unwrap_err().0.kind, kind);
    }
    let none = local(cluster("c"), &[]);
    let (error, trace) = get(&none).await.unwrap_err();
    assert_eq!((error.kind, trace.flags), (Kind::NoHealthyHost, Flags::UH));
}

#[tokio::test]
async fn a_failing_host_is_left_alone() {
    let bad = Server::start((0..100).map(|_| Reply::Say(BAD))).await;
    let good = Server::start([]).await;
    let mut config = cluster("c");
    config.outlier = Some(OutlierDetection { max_ejection_percent: Some(50), ..OutlierDetection::default() });
    let cluster = local(config, &[bad.port(), good.port()]);
    let mut failures = 0;
    for _ in 0..100 {
        failures += u32::from(get(&cluster).await.unwrap().0 == 500);
    }
    assert_eq!(failures, 5);
    assert_eq!(cluster.shared.breakers.ejected.load(Relaxed), 1);
}

#[tokio::test]
async fn connections_follow_the_host_set() {
    let (mut stays, mut goes) = (Server::start([]).await, Server::start([]).await);
    let before = shared(cluster("c"), &endpoints(&[stays.port(), goes.port()]));
    let old = joined(Arc::clone(&before), None);
    while stays.requests.is_empty() || goes.requests.is_empty() {
        get(&old).await.unwrap();
    }
    let after = Arc::new(before.with_hosts(&endpoints(&[stays.port()])));
    let new = joined(after, Some(&old));
    old.retire(Some(&new));
    assert_eq!(goes.closed.recv().await, Some(1));
    while stays.requests.try_recv().is_ok() {}
    get(&new).await.unwrap();
    assert_eq!(stays.request().await.0, 1, "the connection came along");
    // A request that still has the old view may finish there, and leaves nothing behind.
    drop(new);
    let picked = old.pick(lb::Wish { hash: None, avoid: &[1], attempts: 50, pass_over: 0 }, None).unwrap();
    assert_eq!(picked.at, Some(0));
}

#[tokio::test]
async fn original_destinations_are_dialled() {
    let mut server = Server::start([]).await;
    let mut config = cluster("c");
    config.kind = ClusterKind::OriginalDst;
    config.source_address = Some("127.0.0.6".parse().unwrap());
    let cluster = local(config, &[]);
    let call = Call { original_dst: Some(server.address), ..Call::new(&cluster) };
    for _ in 0..2 {
        let (status, trace) = ask(&call, Method::GET, Body::empty()).await.unwrap();
        assert_eq!(status, 200);
        assert_eq!(trace.upstream_local.unwrap().ip().to_string(), "127.0.0.6");
        assert_eq!(server.request().await.0, 1);
    }
    assert_eq!(get(&cluster).await.unwrap_err().0.kind, Kind::NoHealthyHost);
}

#[tokio::test]
async fn streams_share_a_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let hold = Arc::new(Notify::new());
    let (release, accepted) = (Arc::clone(&hold), Arc::new(Mutex::new(0)));
    let count = Arc::clone(&accepted);
    let serve = async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            *count.lock().unwrap() += 1;
            let hold = Arc::clone(&release);
            let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                let hold = Arc::clone(&hold);
                async move {
                    assert_eq!(request.version(), Version::HTTP_2);
                    assert_eq!(request.uri().to_string(), "http://svc:80/path?q");
                    hold.notified().await;
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    let body = http_body_util::Full::new(Bytes::from_static(b"hello"));
                    let body = body.with_trailers(async move { Some(Ok(trailers)) });
                    Ok::<_, std::convert::Infallible>(http::Response::new(body))
                }
            });
            let io = hyper_util::rt::TokioIo::new(stream);
            let exec = hyper_util::rt::TokioExecutor::new();
            tokio::spawn(hyper::server::conn::http2::Builder::new(exec).serve_connection(io, service));
        }
    };
    let server = tokio::spawn(serve);
    let mut config = cluster("c");
    config.http.protocol = UpstreamProtocol::Http2;
    let cluster = local(config, &[port]);
    let streams: Vec<_> = (0..5)
        .map(|_| {
            let cluster = Arc::clone(&cluster);
            tokio::spawn(async move {
                let mut trace = Trace::default();
                let call = Call::new(&cluster);
                let answer = send(&call, parts(Method::GET), Body::empty(), &mut trace).await.unwrap();
                answer.body.collect().await.unwrap().trailers().unwrap()["grpc-status"].clone()
            })
        })
        .collect();
    while cluster.shared.breakers.requests.used() < 5 {
        tokio::task::yield_now().await;
    }
    // Each permit wakes one; those that are not waiting yet find it.
    for stream in streams {
        while !stream.is_finished() {
            hold.notify_one();
            tokio::task::yield_now().await;
        }
        assert_eq!(stream.await.unwrap(), "0");
    }
    assert_eq!(*accepted.lock().unwrap(), 1);
    assert_settled(&cluster.shared);
    server.abort();
}

#[tokio::test]
async fn relayed_connections() {
    let server = Server::start([]).await;
    let mut config = cluster("c");
    config.limits.max_connections = 1;
    let cluster_ = local(config, &[server.port()]);
    let call = TcpCall { cluster: &cluster_, max_connect_attempts: 1, hash: None, original_dst: None, client: None };
    let mut trace = Trace::default();
    let mut upstream = connect_tcp(&call, &mut trace).await.unwrap();
    upstream.stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = [0; 15];
    upstream.stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    let mut second = Trace::default();
    let error = connect_tcp(&call, &mut second).await.unwrap_err();
    assert_eq!((error.kind, second.flags), (Kind::Overflow(Limit::Connections), Flags::UO));
    drop(upstream);
    assert_eq!(cluster_.shared.breakers.connections.used(), 0);
    assert_settled(&cluster_.shared);

    let cluster_ = local(cluster("c"), &[closed_port().await]);
    let call = TcpCall { cluster: &cluster_, ..call };
    let mut trace = Trace::default();
    let error = connect_tcp(&call, &mut trace).await.unwrap_err();
    assert_eq!((error.kind, trace.attempts), (Kind::ConnectRefused, 1));
    assert_eq!(trace.flags.to_string(), "UF,URX");
    assert_settled(&cluster_.shared);
}

/// A TLS server for one exchange that selects HTTP/1.1; says what the client offered it.
async fn tls_server(listener: TcpListener, tls: crate::tls::ServerTls) -> Option<Arc<Peer>> {
    let (stream, _) = listener.accept().await.unwrap();
    let (mut stream, peer) = crate::tls::accept(stream.into(), &tls, Duration::from_secs(5)).await.ok()?;
    let mut request = [0; 512];
    if stream.read(&mut request).await.ok()? > 0 {
        stream.write_all(OK.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
    }
    Some(peer)
}

#[tokio::test]
async fn encrypted_connections_offer_what_the_filter_says() {
    use proxy_config::model::{CommonTls, DownstreamTls, Transport, UpstreamTls, Validation};
    let root = crate::ca::Root::generate("test root").unwrap().0;
    let now = time::OffsetDateTime::now_utc();
    let day = Duration::from_secs(86_400);
    let (chain, key) = root.sign_between(&["spiffe://cluster.local/ns/a/sa/b"], now - day, now + day).unwrap();
    let secrets = crate::tls::Secrets::new()
        .with_identity("default", crate::tls::Identity::from_pem(chain.as_bytes(), key.as_bytes()).unwrap())
        .with_roots("ROOTCA", crate::tls::Roots::from_pem(root.certificate().as_bytes()).unwrap());
    let common = |alpn: &[&str]| CommonTls {
        certificates: vec!["default".into()],
        validation: Some(Validation { roots: Some("ROOTCA".into()), san: Vec::new(), accept_untrusted: false }),
        alpn: alpn.iter().map(|name| (*name).to_owned()).collect(),
        ..CommonTls::default()
    };
    let said = DownstreamTls { common: common(&["http/1.1"]), require_client_certificate: true };
    let server = crate::tls::ServerTls::compile(&said, &secrets, "test").unwrap();
    let rewrite =
        Arc::new(AlpnRewrite { http11: vec!["istio-http/1.1".into(), "http/1.1".into()], ..AlpnRewrite::default() });
    // (name checked automatically, filter wanted, what was agreed on)
    for (checked, no_override, agreed) in
        [(false, false, Some(Some("http/1.1"))), (false, true, Some(None)), (true, false, None)]
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let said = endpoints(&[listener.local_addr().unwrap().port()]);
        let mut config = cluster("c");
        let sni = if checked { "" } else { "outbound_.80_._.svc" };
        let tls = UpstreamTls { common: common(&["istio"]), sni: sni.to_owned(), ..UpstreamTls::default() };
        config.transport = Transport::Tls(Box::new(tls));
        config.istio.no_alpn_override = no_override;
        config.http.auto_sni = checked;
        config.http.auto_san_validation = checked;
        let cluster = joined(Arc::new(ClusterShared::alone(config, &said, &secrets)), None);
        let call = Call { alpn: Some(&rewrite), host: Some("svc"), ..Call::new(&cluster) };
        let asked = ask(&call, Method::GET, Body::empty());
        let (result, peer) = tokio::join!(asked, tls_server(listener, server.clone()));
        let Some(alpn) = agreed else {
            let (error, trace) = result.unwrap_err();
            assert_eq!((error.kind, trace.flags), (Kind::PeerIdentity, Flags::UF), "the certificate does not say svc");
            continue;
        };
        let (status, trace) = result.unwrap();
        assert_eq!(status, 200);
        assert_eq!(trace.peer.unwrap().alpn.as_deref(), alpn);
        assert_eq!(peer.unwrap().sni.as_deref(), Some("outbound_.80_._.svc"));
        assert_eq!(cluster.metrics.ssl_handshake.value(), 1);
    }
}

#[tokio::test]
async fn unix_sockets() {
    let path = std::env::temp_dir().join(format!("upstream-{}.sock", std::process::id()));
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let mut host = endpoint(([0, 0, 0, 0], 0).into(), 1);
    host.address = proxy_config::model::Address::Pipe(path.to_str().unwrap().to_owned());
    let said = proxy_config::model::Endpoints { localities: vec![group(0, None, vec![host])], ..Default::default() };
    let cluster = joined(shared(cluster("c"), &said), None);
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 512];
        assert!(stream.read(&mut request).await.unwrap() > 0);
        stream.write_all(OK.as_bytes()).await.unwrap();
        stream
    };
    let (result, _stream) = tokio::join!(get(&cluster), serve);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(result.unwrap().0, 200);
}
