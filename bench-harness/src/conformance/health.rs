//! Readiness probes: the application of a case is served, and the proxy's own probe asks it.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::tally::{Difference, Tally};
use super::{Bench, Set, cases};

/// Runs the cases.
///
/// # Errors
/// When the proxy cannot be run or an application cannot be served.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    for case in cases(set) {
        let name = case["name"].as_str().unwrap_or_default();
        if !bench.wants(name) {
            continue;
        }
        if let Some(reason) = bench.rules.beyond(case) {
            tally.out_of_reach(reason, 1);
            continue;
        }
        let app = match App::start(case, &runtime) {
            Ok(app) => app,
            Err(e) => {
                tally.unsupported(format!("{e:#}"));
                continue;
            }
        };
        let found = match case["kind"].as_str().unwrap_or_default() {
            "sequence" => sequence(bench, case, &app),
            _ => once(bench, case, &app),
        };
        tally.judge(bench.rules, name, case, found.with_context(|| name.to_owned())?);
    }
    Ok(tally)
}

/// An application, until it is dropped.
struct App {
    /// What `$PORT` stands for.
    port: u16,
    own: IpAddr,
    /// A gRPC server, whose port the next case may need.
    server: Option<JoinHandle<Result<()>>>,
    runtime: Handle,
}

impl Drop for App {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            // Ended one way or the other: its socket is closed.
            let _ = self.runtime.block_on(server);
        }
    }
}

impl App {
    fn start(case: &Value, runtime: &tokio::runtime::Runtime) -> Result<Self> {
        let input = &case["input"];
        let own: IpAddr = if input["ipv6"] == true { "::1".parse()? } else { "127.0.0.1".parse()? };
        let server = &input["server"];
        let mut app = Self { port: free_port(own)?, own, server: None, runtime: runtime.handle().clone() };
        if let Some(listens) = server["listens"].as_u64() {
            let port = u16::try_from(listens)?;
            app.server = Some(serve_grpc(runtime, (own, port), server["healthStatus"].clone())?);
        } else if let Some(status) = server["status"].as_i64() {
            if status > 0 {
                app.port = serve_http(own, vec![status], status)?;
            }
        } else if let Some(answers) = input["responsesInOrder"].as_array() {
            let answers = answers.iter().filter_map(Value::as_i64).collect();
            app.port = serve_http(own, answers, input["thenForever"].as_i64().unwrap_or(500))?;
        } else if server == "listening" {
            app.port = serve_http(own, Vec::new(), 200)?;
        } else if !(server.is_null() || server == "not listening") {
            bail!("an application like {server} is not known");
        }
        Ok(app)
    }

    /// The case's text with its ports and hosts.
    fn filled(&self, of: &Value) -> Result<Value> {
        let text = of.to_string().replace("\"$PORT\"", &self.port.to_string());
        Ok(serde_json::from_str(&text.replace("$HOST", &self.own.to_string()))?)
    }
}

/// A port that nobody listens at.
pub(super) fn free_port(own: IpAddr) -> Result<u16> {
    Ok(TcpListener::bind((own, 0))?.local_addr()?.port())
}

/// Answers requests with these statuses in order, then always with the last.
fn serve_http(own: IpAddr, answers: Vec<i64>, last: i64) -> Result<u16> {
    let listener = TcpListener::bind((own, 0))?;
    let port = listener.local_addr()?.port();
    let asked = Arc::new(AtomicUsize::new(0));
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let mut socket: TcpStream = socket;
            let mut request = [0; 4096];
            if socket.read(&mut request).is_ok_and(|n| n > 0) {
                let status = answers.get(asked.fetch_add(1, Ordering::Relaxed)).copied().unwrap_or(last);
                // A peer that has gone needs no answer.
                let _ = write!(socket, "HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            }
        }
    });
    Ok(port)
}

/// A health service; what it does not know is NOT_FOUND.
pub(super) fn serve_grpc(
    runtime: &tokio::runtime::Runtime,
    at: (IpAddr, u16),
    known: Value,
) -> Result<JoinHandle<Result<()>>> {
    let listener = TcpListener::bind(at).with_context(|| format!("port {}", at.1))?;
    listener.set_nonblocking(true)?;
    Ok(runtime.spawn(accept_grpc(listener, known)))
}

async fn accept_grpc(listener: TcpListener, known: Value) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (socket, _) = listener.accept().await?;
        tokio::spawn(answer_grpc(socket, known.clone()));
    }
}

async fn answer_grpc(socket: tokio::net::TcpStream, known: Value) -> Result<()> {
    let mut connection = h2::server::handshake(socket).await?;
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let mut body = request.into_body();
        let known = known.clone();
        tokio::spawn(async move {
            let asked = match body.data().await {
                Some(Ok(data)) => service(&data),
                _ => String::new(),
            };
            let head = http::Response::builder().header("content-type", "application/grpc").body(())?;
            let mut stream = respond.send_response(head, false)?;
            let mut trailers = http::HeaderMap::new();
            match known[&asked].as_str().map(number) {
                Some(status) => {
                    stream.send_data(Bytes::from(vec![0, 0, 0, 0, 2, 8, status]), false)?;
                    trailers.insert("grpc-status", "0".parse()?);
                }
                None => {
                    trailers.insert("grpc-status", "5".parse()?);
                    trailers.insert("grpc-message", "unknown service".parse()?);
                }
            }
            stream.send_trailers(trailers)?;
            Ok::<(), anyhow::Error>(())
        });
    }
    Ok(())
}

/// The name in a HealthCheckRequest's frame.
fn service(frame: &[u8]) -> String {
    frame.get(7..).map(|name| String::from_utf8_lossy(name).into_owned()).unwrap_or_default()
}

fn number(status: &str) -> u8 {
    ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"].iter().position(|s| *s == status).unwrap_or(0) as u8
}

/// Lines of `probe`.
fn ask(bench: &Bench<'_>, readiness: &Value, own: IpAddr, events: Option<usize>) -> Result<Vec<String>> {
    let scratch = tempfile::tempdir()?;
    let file = scratch.path().join("mesh");
    fs::write(&file, json!({"defaultConfig": {"readinessProbe": readiness}}).to_string())?;
    let mut command = Command::new(bench.proxy);
    command.arg("probe").arg(&file).args(["--address", &own.to_string()]);
    if let Some(events) = events {
        command.args(["--events", &events.to_string()]);
    }
    let output = command.output().context("the proxy's probe")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok(text.lines().map(str::to_owned).collect())
}

fn once(bench: &Bench<'_>, case: &Value, app: &App) -> Result<Vec<Difference>> {
    let input = &case["input"];
    let kind = match case["kind"].as_str().unwrap_or_default() {
        "http" => "httpGet",
        "tcp" => "tcpSocket",
        other => other,
    };
    let seconds = input["timeoutMs"].as_u64().unwrap_or(1000).div_ceil(1000);
    let readiness = json!({"timeoutSeconds": seconds, kind: app.filled(&input["config"])?});
    let lines = ask(bench, &readiness, app.own, None)?;
    let line = lines.last().map(String::as_str).unwrap_or_default();
    let (result, error) = match line.split_once(": ") {
        None if line == "healthy" => ("Healthy", Value::Null),
        Some(("unhealthy", reason)) => ("Unhealthy", Value::from(reason)),
        _ => ("Unknown", Value::from(line)),
    };
    let expect = &case["expect"];
    let mut found = Vec::new();
    if expect["result"] != result {
        found.push(Difference::new("result", &expect["result"], result));
    }
    let same = if case["expect"]["errorText"] == "exact" {
        expect["error"] == error
    } else {
        expect["error"].is_null() == error.is_null()
    };
    if !same {
        found.push(Difference::new("error", &expect["error"], &error));
    }
    Ok(found)
}

fn sequence(bench: &Bench<'_>, case: &Value, app: &App) -> Result<Vec<Difference>> {
    let readiness = app.filled(&case["input"]["readinessProbe"])?;
    let expected = case["expect"]["events"].as_array().map_or(&[][..], Vec::as_slice);
    let lines = ask(bench, &readiness, app.own, Some(expected.len()))?;
    let seen: Vec<bool> = lines.iter().map(|line| line == "healthy").collect();
    if *expected == *seen.iter().map(|h| json!(h)).collect::<Vec<_>>() {
        return Ok(Vec::new());
    }
    Ok(vec![Difference::new("events", json!(expected), json!(seen))])
}
