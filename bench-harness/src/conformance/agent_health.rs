//! Health reports of a VM: the application goes up and down by a script, and the proxy's own probe tells what it would
//! report. The recorded address becomes one of the loopback's, ports become free ones.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::tally::{Difference, Tally};
use super::{Bench, Set, cases, health};

/// Stands for the recorded address.
const OWN: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 5);
const RECORDED: &str = "10.0.1.5";
/// Recorded port of the gRPC application, and what it knows.
const GRPC_PORT: u64 = 9095;
/// A hung application answers after this time.
const HANG: Duration = Duration::from_secs(8);
/// Between two looks at what the application shall be.
const LOOK: Duration = Duration::from_millis(20);

/// Runs the cases, all at once: they spend their time waiting.
///
/// # Errors
/// When the proxy cannot be run or an application cannot be served.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    let runtime = Runtime::new()?;
    thread::scope(|scope| -> Result<()> {
        let mut running = Vec::new();
        for case in cases(set) {
            let name = case["name"].as_str().unwrap_or_default();
            if !bench.wants(name) {
                continue;
            }
            let folder = set.folder.join(name);
            let text = fs::read_to_string(folder.join("case.json")).with_context(|| format!("{name}: no case.json"))?;
            let case: Value = serde_json::from_str(&text)?;
            if let Some(reason) = bench.rules.beyond(&case) {
                tally.out_of_reach(reason, 1);
                continue;
            }
            let (of, runtime) = (case.clone(), &runtime);
            running.push((name.to_owned(), case, scope.spawn(move || report(bench.proxy, &of, runtime))));
        }
        for (name, case, thread) in running {
            let found = thread.join().map_err(|_| anyhow::anyhow!("{name}: the case panicked"))?;
            tally.judge(bench.rules, &name, &case, found.with_context(|| name.clone())?);
        }
        Ok(())
    })?;
    Ok(tally)
}

/// What the application does.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Down,
    Status(u16),
    Hang,
}

/// What is reported while the script runs, against what was.
fn report(proxy: &Path, case: &Value, runtime: &Runtime) -> Result<Vec<Difference>> {
    let scratch = tempfile::tempdir()?;
    let here = scratch.path().display().to_string();
    let state = Arc::new(Mutex::new(State::Down));
    let app_port = serve(case, &state)?;
    let grpc_port = health::free_port(OWN.into())?;
    let probe = &case["readinessProbe"];
    if probe["grpc"]["port"] == GRPC_PORT {
        let known = json!({"": "SERVING", "bad": "NOT_SERVING"});
        // Ends with the runtime.
        drop(health::serve_grpc(runtime, (OWN.into(), grpc_port), known)?);
    }
    let text = probe.to_string().replace("$RIG", &here);
    let ports = |text: &str| {
        let text = text.replace("\"port\":8080", &format!("\"port\":{app_port}"));
        let text = text.replace("\"port\":9000", &format!("\"port\":{app_port}"));
        text.replace(&format!("\"port\":{GRPC_PORT}"), &format!("\"port\":{grpc_port}"))
    };
    let probe: Value = serde_json::from_str(&ports(&text))?;
    let mesh = scratch.path().join("mesh");
    fs::write(&mesh, json!({"defaultConfig": {"readinessProbe": probe}}).to_string())?;
    let steps = case["script"].as_array().cloned().unwrap_or_default();
    act(&steps[..1.min(steps.len())], &state, &here)?;
    let mut asking = Command::new(proxy)
        .arg("probe")
        .arg(&mesh)
        .args(["--address", &OWN.to_string(), "--events", "1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("the proxy's probe")?;
    let out = asking.stdout.take().context("piped")?;
    act(steps.get(1..).unwrap_or_default(), &state, &here)?;
    thread::sleep(rest(case));
    asking.kill()?;
    asking.wait()?;
    let seen: Vec<String> = BufReader::new(out).lines().collect::<std::io::Result<_>>()?;
    let expected: Vec<String> = case["health_messages"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|message| match &message["json"]["error_detail"]["message"] {
            Value::String(why) => {
                let why = why.replace(&format!("{RECORDED}:9000"), &format!("{RECORDED}:{app_port}"));
                let why = why.replace(&format!("{RECORDED}:8080"), &format!("{RECORDED}:{app_port}"));
                format!("unhealthy: {}", why.replace(RECORDED, &OWN.to_string()))
            }
            _ => "healthy".to_owned(),
        })
        .collect();
    Ok(compare(&expected, &seen))
}

/// Does the steps; each has the seconds that pass before it.
fn act(steps: &[Value], state: &Arc<Mutex<State>>, here: &str) -> Result<()> {
    for step in steps {
        thread::sleep(Duration::from_secs_f64(step[0].as_f64().unwrap_or(0.0)));
        let action = step[1].as_str().unwrap_or_default();
        let new = match action {
            "up" => State::Status(200),
            "down" => State::Down,
            "hang" => State::Hang,
            _ => {
                if let Some(script) = action.strip_prefix("sh:") {
                    Command::new("sh").args(["-c", &script.replace("$RIG", here)]).status()?;
                }
                // What else there is happens to the stream, which is not here.
                match action.strip_prefix("status:").and_then(|code| code.parse().ok()) {
                    Some(code) => State::Status(code),
                    None => continue,
                }
            }
        };
        *state.lock().unwrap_or_else(PoisonError::into_inner) = new;
    }
    Ok(())
}

/// How long the recorded agent ran after its last step.
fn rest(case: &Value) -> Duration {
    let notes: Vec<u64> = case["notes"].as_array().into_iter().flatten().filter_map(|n| n["t_ms"].as_u64()).collect();
    let last = notes.iter().rev().take(2).copied().reduce(|end, before| end - before);
    Duration::from_millis(last.unwrap_or(2000)) + Duration::from_millis(1500)
}

/// The application; on another address than the workload's when the recorded one could not be reached.
fn serve(case: &Value, state: &Arc<Mutex<State>>) -> Result<u16> {
    let probe = &case["readinessProbe"];
    let up = case["script"].as_array().into_iter().flatten().any(|step| step[1] == "up");
    let unseen = case["app_saw"].as_array().is_some_and(Vec::is_empty) && up;
    let plain = probe["httpGet"].is_object() && probe["httpGet"]["scheme"] != "HTTPS";
    let address = if unseen && plain { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
    let port = health::free_port(address.into())?;
    let state = Arc::clone(state);
    thread::spawn(move || {
        let now = || state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        loop {
            while now() == State::Down {
                thread::sleep(LOOK);
            }
            let Ok(listener) = TcpListener::bind((address, port)) else { return };
            if listener.set_nonblocking(true).is_err() {
                return;
            }
            while now() != State::Down {
                match listener.accept() {
                    Ok((socket, _)) => {
                        let state = now();
                        thread::spawn(move || answer(socket, &state));
                    }
                    Err(_) => thread::sleep(LOOK),
                }
            }
        }
    });
    Ok(port)
}

/// Answers one request; a peer that has gone, or that speaks something else, needs no answer.
fn answer(mut socket: TcpStream, state: &State) {
    let mut request = Vec::new();
    let mut part = [0; 1024];
    if socket.set_nonblocking(false).is_err() || socket.set_read_timeout(Some(HANG)).is_err() {
        return;
    }
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match socket.read(&mut part) {
            Ok(n) if n > 0 => request.extend_from_slice(&part[..n]),
            _ => return,
        }
    }
    match state {
        State::Status(code) => {
            let _ = write!(socket, "HTTP/1.1 {code} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
        State::Hang => thread::sleep(HANG),
        State::Down => {}
    }
}

/// Message by message. Where one side has one more, the others are still compared.
fn compare(expected: &[String], seen: &[String]) -> Vec<Difference> {
    let mut found = Vec::new();
    let (mut at, mut of) = (0, 0);
    while at < expected.len() || of < seen.len() {
        let (e, s) = (expected.get(at), seen.get(of));
        match (e, s) {
            (Some(e), Some(s)) if e == s => {}
            (Some(e), s) if s.is_none() || expected.get(at + 1) == s => {
                found.push(Difference::new(format!("messages[{at}]"), e, "absent"));
                at += 1;
                continue;
            }
            (e, Some(s)) if e.is_none() || seen.get(of + 1) == e => {
                found.push(Difference::new(format!("messages[{at}]"), "absent", s));
                of += 1;
                continue;
            }
            (e, s) => {
                let text = |m: Option<&String>| m.cloned().unwrap_or_default();
                found.push(Difference::new(format!("messages[{at}]"), text(e), text(s)));
            }
        }
        (at, of) = (at + 1, of + 1);
    }
    found
}
