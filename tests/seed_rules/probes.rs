//! The guide's probes (Y2, Y6 to Y8, Y15) on a paused clock: when the first check is made, how often, what it takes.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::time::Duration;

use istio_proxy::probe::{self, Probe, Tracker};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use crate::world::{Yaml, closed};

const OWN: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The probe of a WorkloadGroup among the examples, as a machine that joins it gets it.
fn said(file: &str, namespace_and_group: &str) -> Value {
    let (namespace, group) = namespace_and_group.split_once('/').expect("NAMESPACE/GROUP");
    Yaml::only(&[file]).load_group(namespace, group).probe.expect("a probe")
}

fn probe_of(said: &Value) -> Probe {
    serde_json::from_value(said.clone()).expect("a probe")
}

/// Points the probe at a port of ours.
fn aimed(mut said: Value, port: u16) -> Value {
    for kind in ["httpGet", "tcpSocket"] {
        if said.get(kind).is_some() {
            said[kind]["port"] = Value::from(port);
        }
    }
    said
}

/// Seconds until a workload that is down is told to be, with nothing told before.
async fn told_down_after(said: &Value) -> u64 {
    let (_ready, watch) = watch::channel(true);
    let (send, mut events) = mpsc::unbounded_channel();
    let begin = Instant::now();
    let running = tokio::spawn(probe::run(probe_of(said), OWN, watch, move |event| drop(send.send(event))));
    let event = timeout(Duration::from_secs(600), events.recv()).await.expect("told").expect("running");
    running.abort();
    assert!(!event.healthy);
    begin.elapsed().as_secs()
}

#[tokio::test(start_paused = true)]
async fn when_a_workload_that_is_down_is_told() {
    for (t, file, group, seconds) in [
        // Initial delay, then two more periods up to the third failure.
        ("T2", "Y2", "payments/legacy-payment-service", 10 + 2 * 10),
        ("T12", "Y6", "gateway/api-gateway-vms", 5 + 2 * 10),
        ("T13", "Y7", "services/tcp-service-vms", 10 + 2 * 15),
        // The script of the guide is not there: a failure; the second one counts.
        ("T14", "Y8", "services/custom-health-vms", 30 + 60),
        // No delay, and one failure is enough.
        ("T62", "Y15", "hybrid-app/legacy-database", 0),
    ] {
        let (_held, at) = closed();
        let said = aimed(said(file, group), at.port());
        assert_eq!(told_down_after(&said).await, seconds, "{t} {said}");
    }
}

#[test]
fn t4_a_success_starts_the_count_anew() {
    let mut tracker = Tracker::new(&probe_of(&said("Y2", "payments/legacy-payment-service")));
    let told: Vec<Option<bool>> = [true, false, false, true, false, false, false, true]
        .map(|up| tracker.record(if up { Ok(()) } else { Err("down".to_owned()) }).map(|event| event.healthy))
        .into();
    assert_eq!(told, [Some(true), None, None, None, None, None, Some(false), Some(true)], "T4");
}

/// A server that accepts and stays silent.
fn silent() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    (listener, port)
}

#[tokio::test(start_paused = true)]
async fn how_long_an_answer_may_take() {
    let (_listener, port) = silent();
    for (t, file, group, seconds) in
        [("T3", "Y2", "payments/legacy-payment-service", 5), ("T12", "Y6", "gateway/api-gateway-vms", 3)]
    {
        let said = aimed(said(file, group), port);
        let begin = Instant::now();
        let answer = probe::ask(&probe_of(&said), OWN).await;
        let why = answer.expect_err("silence");
        assert!(why.contains("context deadline exceeded"), "{t}: {why}");
        assert_eq!(begin.elapsed().as_secs(), seconds, "{t}");
    }
}

#[tokio::test]
async fn t3_t14_what_counts_as_success() {
    for (status, healthy) in [(200, true), (399, true), (400, false), (500, false)] {
        let (listener, port) = silent();
        let served = std::thread::spawn(move || {
            use std::io::{Read, Write};
            let (mut stream, _) = listener.accept().expect("a probe");
            let mut request = [0; 1024];
            let length = stream.read(&mut request).expect("a request");
            let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).expect("an answer");
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let said = aimed(said("Y6", "gateway/api-gateway-vms"), port);
        assert_eq!(probe::ask(&probe_of(&said), OWN).await.is_ok(), healthy, "T3 {status}");
        let request = served.join().expect("served");
        assert!(request.starts_with("GET /healthz HTTP/1.1\r\n"), "T12 {request}");
        for header in ["x-health-check: istio\r\n", "user-agent: istio-probe/1.0\r\n"] {
            assert!(request.contains(header), "T5, T12 {request}");
        }
    }
    let (_listener, port) = silent();
    let tcp = aimed(said("Y7", "services/tcp-service-vms"), port);
    assert!(probe::ask(&probe_of(&tcp), OWN).await.is_ok(), "T13: an open port is enough");
    for (command, healthy) in [("true", true), ("false", false), ("/no/such/script", false)] {
        let mut exec = said("Y8", "services/custom-health-vms");
        exec["exec"]["command"] = serde_json::json!([command]);
        assert_eq!(probe::ask(&probe_of(&exec), OWN).await.is_ok(), healthy, "T14 {command}");
    }
}

#[tokio::test(start_paused = true)]
async fn t14_a_script_that_hangs_is_killed() {
    let mut exec = said("Y8", "services/custom-health-vms");
    exec["exec"]["command"] = serde_json::json!(["sleep", "600"]);
    let begin = Instant::now();
    let answer = probe::ask(&probe_of(&exec), OWN).await;
    assert_eq!(answer, Err("command timeout exceeded: signal: killed".to_owned()));
    assert_eq!(begin.elapsed().as_secs(), 10, "T14");
}
