//! Readiness probes of a WorkloadGroup: is the application behind this proxy able to serve?
//!
//! [`Tracker`] decides what an answer means and knows no I/O; [`run`] asks at the right times and tells transitions only.
//! Every probe comes from 127.0.0.6 (::6): from any other address the redirect rules would send it to the proxy's own
//! inbound port, which always accepts, and an application that is down would look alive.

mod grpc;

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Uri, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use proxy_config::model::UpstreamTls;
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::dns::{Family, Resolver};
use crate::net::{Stream, Target, connect};
use crate::tls::{self, ClientTls, Secrets};

const USER_AGENT: &str = "istio-probe/1.0";
const SOURCE_V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 6));
const SOURCE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));
/// As kubelet has it.
const MAX_REDIRECTS: usize = 10;

/// A probe as `WorkloadGroup.spec.probe` and `ProxyConfig.readinessProbe` say it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// Seconds before the first check.
    #[serde(default)]
    pub initial_delay_seconds: u32,
    /// Seconds an answer may take; 0 is the default, 1.
    #[serde(default)]
    pub timeout_seconds: u32,
    /// Seconds between checks; 0 is the default, 10.
    #[serde(default)]
    pub period_seconds: u32,
    /// Successes in a row that make it healthy; 0 is the default, 1.
    #[serde(default)]
    pub success_threshold: u32,
    /// Failures in a row that make it unhealthy; 0 is the default, 1 (and not the 3 of the API's comment).
    #[serde(default)]
    pub failure_threshold: u32,
    /// What is asked.
    #[serde(flatten)]
    pub check: Check,
}

/// What a probe asks.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Check {
    /// A GET whose status is 200 to 399.
    HttpGet(HttpGet),
    /// A connection.
    TcpSocket(TcpSocket),
    /// A command that ends with 0.
    Exec(Exec),
    /// `grpc.health.v1.Health/Check` that answers SERVING.
    Grpc(Grpc),
}

/// An HTTP probe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpGet {
    /// Path, `/` when empty.
    #[serde(default)]
    pub path: String,
    /// Port.
    pub port: u16,
    /// Address to ask, the workload's own when empty.
    #[serde(default)]
    pub host: String,
    /// `http` or `https` in any case, the former when empty. Certificates are not checked.
    #[serde(default)]
    pub scheme: String,
    /// Headers to send; `Host` and `User-Agent` replace ours.
    #[serde(default)]
    pub http_headers: Vec<HttpHeader>,
}

/// A header of an HTTP probe.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct HttpHeader {
    /// Name.
    pub name: String,
    /// Value.
    #[serde(default)]
    pub value: String,
}

/// A TCP probe.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TcpSocket {
    /// Address to connect to, the workload's own when empty.
    #[serde(default)]
    pub host: String,
    /// Port.
    pub port: u16,
}

/// A command.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Exec {
    /// Program and arguments; no shell.
    pub command: Vec<String>,
}

/// A gRPC probe.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Grpc {
    /// Port.
    pub port: u16,
    /// Service to ask about; empty is the server as a whole.
    #[serde(default)]
    pub service: String,
}

impl Probe {
    fn timeout(&self) -> Duration {
        seconds_or(self.timeout_seconds, 1)
    }
    fn period(&self) -> Duration {
        seconds_or(self.period_seconds, 10)
    }
}

fn seconds_or(said: u32, default: u64) -> Duration {
    Duration::from_secs(if said == 0 { default } else { u64::from(said) })
}

/// A change of health.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The new state.
    pub healthy: bool,
    /// Why it is unhealthy; empty when healthy.
    pub message: String,
}

/// Counts answers and tells when the state changes.
#[derive(Debug)]
pub struct Tracker {
    needed: [u32; 2],
    in_a_row: u32,
    last_was: Option<bool>,
    state: Option<bool>,
}

impl Tracker {
    /// Nothing is known yet; whatever reaches its threshold first is told.
    pub fn new(probe: &Probe) -> Self {
        let needed = [probe.failure_threshold.max(1), probe.success_threshold.max(1)];
        Self { needed, in_a_row: 0, last_was: None, state: None }
    }

    /// Takes one answer; an event when the state changes.
    pub fn record(&mut self, answer: Result<(), String>) -> Option<Event> {
        let healthy = answer.is_ok();
        self.in_a_row = if self.last_was == Some(healthy) { self.in_a_row.saturating_add(1) } else { 1 };
        self.last_was = Some(healthy);
        if self.state == Some(healthy) || self.in_a_row < self.needed[usize::from(healthy)] {
            return None;
        }
        self.state = Some(healthy);
        Some(Event { healthy, message: answer.err().unwrap_or_default() })
    }
}

/// Probes for ever, from the moment the proxy is ready. `own` is the workload's address; `tell` gets each transition.
/// While `ready` is false the workload is unhealthy, whatever the application says.
pub async fn run(probe: Probe, own: IpAddr, mut ready: watch::Receiver<bool>, mut tell: impl FnMut(Event)) {
    if ready.wait_for(|ready| *ready).await.is_err() {
        return;
    }
    sleep(Duration::from_secs(u64::from(probe.initial_delay_seconds))).await;
    let mut tracker = Tracker::new(&probe);
    let mut ticks = interval(probe.period());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let proxy_ready = *ready.borrow();
        let answer = if proxy_ready { ask(&probe, own).await } else { Err("the proxy is not ready".to_owned()) };
        if let Some(event) = tracker.record(answer) {
            tell(event);
        }
    }
}

/// One check, within its time.
pub async fn ask(probe: &Probe, own: IpAddr) -> Result<(), String> {
    let limit = probe.timeout();
    match &probe.check {
        Check::HttpGet(get) => timeout(limit, Box::pin(http_get(get, own))).await.unwrap_or_else(|_| {
            let url = first_url(get, own)?;
            Err(format!("Get \"{url}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"))
        }),
        Check::TcpSocket(tcp) => within(limit, tcp_connect(tcp, own)).await,
        Check::Exec(exec) => exec_command(exec, limit).await,
        Check::Grpc(grpc) => grpc::check(grpc, own, limit).await,
    }
}

async fn within(limit: Duration, check: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    timeout(limit, check).await.unwrap_or_else(|_| Err("context deadline exceeded".to_owned()))
}

/// Connects from 127.0.0.6, to pass the redirect rules.
async fn dial(address: SocketAddr) -> io::Result<Stream> {
    let target = Target { source: Some(SocketAddr::new(source(address), 0)), ..Target::new(address) };
    connect(&target).await.map(Stream::from)
}

fn source(address: SocketAddr) -> IpAddr {
    if address.is_ipv4() { SOURCE_V4 } else { SOURCE_V6 }
}

/// The words that people search for.
fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::HostUnreachable => "no route to host".to_owned(),
        io::ErrorKind::InvalidInput => "invalid argument".to_owned(),
        _ => error.to_string(),
    }
}

async fn address(host: &str, port: u16, own: IpAddr) -> Result<SocketAddr, String> {
    if host.is_empty() {
        return Ok(SocketAddr::new(own, port));
    }
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = bare.parse() {
        return Ok(SocketAddr::new(ip, port));
    }
    let answer = Resolver::system().addresses(bare, Family::All).await.map_err(|e| format!("lookup {bare}: {e}"))?;
    let ip = answer.addresses.first().ok_or_else(|| format!("lookup {bare}: no address"))?;
    Ok(SocketAddr::new(*ip, port))
}

async fn tcp_connect(tcp: &TcpSocket, own: IpAddr) -> Result<(), String> {
    let address = address(&tcp.host, tcp.port, own).await?;
    dial(address).await.map(drop).map_err(|e| format!("dial tcp {address}: connect: {}", plain(&e)))
}

async fn exec_command(exec: &Exec, limit: Duration) -> Result<(), String> {
    let (program, args) = exec.command.split_first().ok_or("the command is empty")?;
    let mut child = tokio::process::Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|e| not_run(program, &e))?;
    let group = Group(child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)));
    let ended = timeout(limit, child.wait()).await;
    drop(group);
    match ended {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(status.code().map_or_else(|| status.to_string(), |code| format!("exit status {code}"))),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => {
            // Reaped here: a zombie for every missed deadline would add up.
            let _ = child.wait().await;
            Err("command timeout exceeded: signal: killed".to_owned())
        }
    }
}

/// The processes of one command. Whoever starts a shell hangs in what the shell has started, so all of them end with the
/// check, also when the check itself is given up.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // Fails when none of them is left.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// Go's words.
fn not_run(program: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound if !program.contains('/') => {
            format!("exec: \"{program}\": executable file not found in $PATH")
        }
        io::ErrorKind::NotFound => format!("fork/exec {program}: no such file or directory"),
        io::ErrorKind::PermissionDenied => format!("fork/exec {program}: permission denied"),
        _ => format!("fork/exec {program}: {error}"),
    }
}

async fn http_get(get: &HttpGet, own: IpAddr) -> Result<(), String> {
    let first = first_url(get, own)?;
    let mut url = first.clone();
    for _ in 0..=MAX_REDIRECTS {
        let response = get_once(get, &url, own).await.map_err(|e| format!("Get \"{url}\": {e}"))?;
        let status = response.status();
        let next = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok()).filter(|_| redirects(status));
        let Some(next) = next else {
            let good = (200..400).contains(&status.as_u16());
            let bad = || format!("status code was not from [200,400), bad code {}", status.as_u16());
            return good.then_some(()).ok_or_else(bad);
        };
        url = resolve(&url, next)?;
        if url.host() != first.host() {
            // Somebody else's page says nothing about us, and our headers are none of their business.
            return Ok(());
        }
    }
    Err(format!("Get \"{url}\": stopped after {MAX_REDIRECTS} redirects"))
}

fn redirects(status: http::StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn first_url(get: &HttpGet, own: IpAddr) -> Result<Uri, String> {
    let scheme = if get.scheme.is_empty() { "http".to_owned() } else { get.scheme.to_ascii_lowercase() };
    let host = match (get.host.is_empty(), own) {
        (false, _) => get.host.clone(),
        (true, IpAddr::V4(ip)) => ip.to_string(),
        (true, IpAddr::V6(ip)) => format!("[{ip}]"),
    };
    let text = format!("{scheme}://{host}:{}/{}", get.port, get.path.trim_start_matches('/'));
    text.parse().map_err(|e| format!("{text}: {e}"))
}

/// A Location against the page that sent it.
fn resolve(base: &Uri, location: &str) -> Result<Uri, String> {
    let authority = base.authority().map_or("", |a| a.as_str());
    let scheme = base.scheme_str().unwrap_or("http");
    let text = if location.contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let without_fragment = text.split('#').next().unwrap_or_default();
    without_fragment.parse().map_err(|e| format!("Location {location:?}: {e}"))
}

async fn get_once(get: &HttpGet, url: &Uri, own: IpAddr) -> Result<http::Response<hyper::body::Incoming>, String> {
    let https = url.scheme_str() == Some("https");
    let port = url.port_u16().unwrap_or(if https { 443 } else { 80 });
    let address = address(url.host().unwrap_or_default(), port, own).await?;
    let failed =
        |e: io::Error| format!("dial tcp {}->{address}: connect: {}", SocketAddr::new(source(address), 0), plain(&e));
    let mut stream = dial(address).await.map_err(failed)?;
    if https {
        let unchecked = ClientTls::compile(&UpstreamTls::default(), &Secrets::new())?;
        stream = tls::connect(stream, &unchecked, "", &[]).await.map_err(|e| e.to_string())?.0;
    }
    let request = http_request(get, url)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    // The answer's head is all that counts; the connection ends with this future, or has delivered it and is over.
    let mut response = std::pin::pin!(sender.send_request(request));
    let answer = tokio::select! {
        biased;
        answer = &mut response => answer,
        _ = connection => response.await,
    };
    answer.map_err(|e| e.to_string())
}

fn http_request(get: &HttpGet, url: &Uri) -> Result<Request<Empty<Bytes>>, String> {
    let path = url.path_and_query().map_or("/", |p| p.as_str());
    let authority = url.authority().map_or("", |a| a.as_str());
    let mut request = Request::get(path)
        .header(header::HOST, authority)
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::ACCEPT_ENCODING, "gzip")
        .header(header::CONNECTION, "close")
        .body(Empty::new())
        .map_err(|e| e.to_string())?;
    let mut replaced: Vec<HeaderName> = Vec::new();
    for said in &get.http_headers {
        let name: HeaderName = said.name.parse().map_err(|e| format!("header {:?}: {e}", said.name))?;
        let value: HeaderValue = said.value.parse().map_err(|e| format!("header {:?}: {e}", said.name))?;
        // The first of a name replaces ours, further ones of it add to it.
        if replaced.contains(&name) && name != header::HOST {
            request.headers_mut().append(name, value);
        } else {
            request.headers_mut().insert(name.clone(), value);
            replaced.push(name);
        }
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const OWN: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn probe(json: &str) -> Probe {
        serde_json::from_str(json).unwrap()
    }

    fn states(failure: u32, success: u32, answers: &str) -> Vec<(usize, bool)> {
        let mut said = probe(r#"{"tcpSocket":{"port":1}}"#);
        (said.failure_threshold, said.success_threshold) = (failure, success);
        let mut tracker = Tracker::new(&said);
        let answer = |c| if c == '+' { Ok(()) } else { Err("down".to_owned()) };
        let told = answers.chars().enumerate().filter_map(|(i, c)| Some((i, tracker.record(answer(c))?.healthy)));
        told.collect()
    }

    #[test]
    fn transitions_are_told_once_at_the_threshold() {
        assert_eq!(states(0, 0, "+--+--"), [(0, true), (1, false), (3, true), (4, false)]);
        assert_eq!(states(3, 2, "++--+---++"), [(1, true), (7, false), (9, true)]);
        assert_eq!(states(2, 1, "----+"), [(1, false), (4, true)]);
        assert_eq!(states(1, 1, "++++"), [(0, true)]);
    }

    #[test]
    fn defaults_are_those_of_the_code() {
        let said = probe(r#"{"httpGet":{"port":8080}}"#);
        assert_eq!((said.timeout(), said.period()), (Duration::from_secs(1), Duration::from_secs(10)));
        assert_eq!(Tracker::new(&said).needed, [1, 1]);
        let Check::HttpGet(get) = said.check else { panic!("not http") };
        assert_eq!(first_url(&get, OWN).unwrap(), "http://127.0.0.1:8080/");
    }

    #[test]
    fn locations() {
        let base: Uri = "http://10.0.0.1:80/a/b?c".parse().unwrap();
        for (location, expected) in [
            ("/x?y#z", "http://10.0.0.1:80/x?y"),
            ("x", "http://10.0.0.1:80/a/x"),
            ("https://other/x", "https://other/x"),
            ("//other/x", "http://other/x"),
        ] {
            assert_eq!(resolve(&base, location).unwrap(), expected);
        }
    }

    /// Serves one canned answer to each connection and returns the requests, with the peer's address.
    async fn app(answers: Vec<&'static str>) -> (u16, tokio::task::JoinHandle<Vec<(IpAddr, String)>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = tokio::spawn(async move {
            let mut seen = Vec::new();
            for answer in answers {
                let (mut socket, peer) = listener.accept().await.unwrap();
                let mut request = vec![0; 2048];
                let n = socket.read(&mut request).await.unwrap();
                socket.write_all(answer.as_bytes()).await.unwrap();
                seen.push((peer.ip(), String::from_utf8_lossy(&request[..n]).into_owned()));
            }
            seen
        });
        (port, served)
    }

    #[tokio::test]
    async fn an_http_probe_comes_from_127_0_0_6_with_its_headers() {
        let (port, served) = app(vec!["HTTP/1.1 204 No Content\r\n\r\n"]).await;
        let said = format!(
            r#"{{"httpGet":{{"path":"health","port":{port},"httpHeaders":[{{"name":"Host","value":"my.app"}},{{"name":"X","value":"1"}}]}}}}"#
        );
        ask(&probe(&said), OWN).await.unwrap();
        let (peer, request) = served.await.unwrap().remove(0);
        assert_eq!(peer, SOURCE_V4);
        assert!(
            request.starts_with("GET /health HTTP/1.1\r\nhost: my.app\r\nuser-agent: istio-probe/1.0\r\n"),
            "{request}"
        );
        assert!(request.contains("connection: close\r\nx: 1\r\n"), "{request}");
    }

    #[tokio::test]
    async fn statuses_and_redirects() {
        for (answers, healthy) in [
            (vec!["HTTP/1.1 399 X\r\ncontent-length: 0\r\n\r\n"], true),
            (vec!["HTTP/1.1 400 X\r\ncontent-length: 0\r\n\r\n"], false),
            (vec!["HTTP/1.1 302 X\r\ncontent-length: 0\r\n\r\n"], true),
            (vec!["HTTP/1.1 302 X\r\nlocation: http://elsewhere.example/\r\ncontent-length: 0\r\n\r\n"], true),
            (vec!["HTTP/1.1 302 X\r\nlocation: /y\r\ncontent-length: 0\r\n\r\n", "HTTP/1.1 500 X\r\n\r\n"], false),
            (vec!["HTTP/1.1 302 X\r\nlocation: /y\r\ncontent-length: 0\r\n\r\n"; 11], false),
            (vec!["garbage"], false),
        ] {
            let (port, served) = app(answers.clone()).await;
            let result = ask(&probe(&format!(r#"{{"httpGet":{{"port":{port}}}}}"#)), OWN).await;
            assert_eq!(result.is_ok(), healthy, "{answers:?} {result:?}");
            served.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_closed_port_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let tcp = probe(&format!(r#"{{"tcpSocket":{{"port":{port}}}}}"#));
        ask(&tcp, OWN).await.unwrap();
        drop(listener);
        let error = ask(&tcp, OWN).await.unwrap_err();
        assert_eq!(error, format!("dial tcp 127.0.0.1:{port}: connect: connection refused"));
    }

    #[tokio::test]
    async fn commands() {
        assert!(ask(&probe(r#"{"exec":{"command":["true"]}}"#), OWN).await.is_ok());
        let failed = ask(&probe(r#"{"exec":{"command":["sh","-c","exit 3"]}}"#), OWN).await;
        assert_eq!(failed.unwrap_err(), "exit status 3");
        let Check::Exec(slow) = probe(r#"{"exec":{"command":["sleep","60"]}}"#).check else { panic!("not exec") };
        let killed = exec_command(&slow, Duration::from_millis(20)).await;
        assert_eq!(killed.unwrap_err(), "command timeout exceeded: signal: killed");
        let missing = ask(&probe(r#"{"exec":{"command":["no-such-program"]}}"#), OWN).await;
        assert_eq!(missing.unwrap_err(), "exec: \"no-such-program\": executable file not found in $PATH");
    }

    #[tokio::test]
    async fn what_a_command_has_started_ends_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        // The grandchild holds the fifo's write end for as long as it lives.
        let script = format!("sleep 600 > {} & wait", fifo.display());
        let exec = Exec { command: vec!["sh".to_owned(), "-c".to_owned(), script] };
        let (send, read) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || send.send(std::fs::read(fifo)));
        assert!(exec_command(&exec, Duration::from_secs(1)).await.is_err());
        let ended = timeout(Duration::from_secs(30), read).await.expect("nobody holds the fifo any more");
        assert_eq!(ended.unwrap().unwrap(), b"");
    }

    /// A health server that answers every check with this status.
    async fn grpc_server(status: i32) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(socket).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                let mut stream = respond.send_response(http::Response::new(()), false).unwrap();
                let message = if status == 0 { vec![] } else { vec![8, u8::try_from(status).unwrap()] };
                let frame = [&[0, 0, 0, 0, message.len() as u8], &message[..]].concat();
                stream.send_data(Bytes::from(frame), false).unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                stream.send_trailers(trailers).unwrap();
            }
        });
        port
    }

    #[tokio::test]
    async fn grpc_health() {
        for (status, expected) in [(1, None), (2, Some("NOT_SERVING")), (3, Some("SERVICE_UNKNOWN"))] {
            let port = grpc_server(status).await;
            let result = ask(&probe(&format!(r#"{{"grpc":{{"port":{port},"service":"x"}}}}"#)), OWN).await;
            match expected {
                None => result.unwrap(),
                Some(word) => assert!(result.unwrap_err().contains(word)),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn checks_begin_when_the_proxy_is_ready_and_after_the_delay() {
        let (ready, watch) = watch::channel(false);
        let said = probe(r#"{"initialDelaySeconds":3,"periodSeconds":2,"exec":{"command":[]}}"#);
        let (events, mut told) = tokio::sync::mpsc::channel(8);
        let running = tokio::spawn(run(said, OWN, watch, move |event| events.try_send(event).unwrap()));
        sleep(Duration::from_secs(60)).await;
        assert!(told.try_recv().is_err());
        let begin = tokio::time::Instant::now();
        ready.send(true).unwrap();
        let event = told.recv().await.unwrap();
        assert_eq!((event.healthy, begin.elapsed()), (false, Duration::from_secs(3)));
        running.abort();
    }
}
