use super::*;
use crate::telemetry::Telemetry;
use crate::telemetry::labels::tests::{node, outbound};

#[test]
fn requests_of_all_workers_are_one_series() {
    let telemetry = Telemetry::new(node());
    let sizes = Sizes { duration: Duration::from_millis(7), request_bytes: 100, response_bytes: 2_000 };
    for shard in [telemetry.shard(), telemetry.shard()] {
        shard.record_request(&outbound(), sizes);
        // A subset's cluster has the same labels.
        shard.record_request(&Labels { cluster: "outbound|80|v1|x", ..outbound() }, sizes);
    }
    let mut out = String::new();
    telemetry.istio_families(&mut out);
    let lines: Vec<&str> = out.lines().filter(|l| l.starts_with("istio_requests_total")).collect();
    assert!(lines.len() == 1 && lines[0].ends_with("connection_security_policy=\"unknown\"} 4"), "{lines:?}");
    assert!(out.contains("# TYPE istio_request_duration_milliseconds histogram\n"));
    let bucket = |family: &str, le: &str| {
        let end = format!("le=\"{le}\"}} ");
        let line = out.lines().find(|l| l.starts_with(&format!("{family}_bucket")) && l.contains(&end)).unwrap();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!((bucket("istio_request_duration_milliseconds", "5"), bucket("istio_request_bytes", "+Inf")), (0, 4));
    assert_eq!(bucket("istio_request_duration_milliseconds", "10"), 4);
    assert_eq!((bucket("istio_response_bytes", "1000"), bucket("istio_response_bytes", "2500")), (0, 4));
}

#[test]
fn past_the_cap_everything_new_is_one_series_for_each_reporter() {
    let telemetry = Telemetry::new(node());
    let shard = telemetry.shard();
    for i in 0..CAP + 500 {
        let authority = format!("host-{i}.example");
        shard.record_request(&Labels { service: None, authority: &authority, ..outbound() }, Sizes::default());
    }
    shard.record_request(&Labels { reporter: Reporter::Destination, ..outbound() }, Sizes::default());
    let mut out = String::new();
    telemetry.istio_families(&mut out);
    let totals: Vec<&str> = out.lines().filter(|l| l.starts_with("istio_requests_total{")).collect();
    assert_eq!(totals.len(), CAP + 2);
    let overflow = |reporter: &str| {
        let start = format!("istio_requests_total{{reporter=\"{reporter}\",source_workload=\"overflow\"");
        totals.iter().find(|l| l.starts_with(&start)).unwrap().rsplit(' ').next().unwrap()
    };
    assert_eq!((overflow("source"), overflow("destination")), ("500", "1"));
    // What was known before the cap was met still has its own series.
    shard.record_request(&Labels { service: None, authority: "host-0.example", ..outbound() }, Sizes::default());
    out.clear();
    telemetry.istio_families(&mut out);
    let known = out.lines().find(|l| l.starts_with("istio_requests_total{") && l.contains("\"host-0.example\""));
    assert!(known.unwrap().ends_with(" 2"));
}

/// A connection whose bytes the test moves.
#[derive(Debug, Default)]
struct Bytes(std::sync::atomic::AtomicU64);

impl Moving for Bytes {
    fn moved(&self) -> (u64, u64) {
        let received = self.0.load(std::sync::atomic::Ordering::Relaxed);
        (2 * received, received)
    }
}

fn total(telemetry: &Telemetry, name: &str) -> Option<String> {
    let mut out = String::new();
    telemetry.istio_families(&mut out);
    let line = out.lines().find(|l| l.starts_with(name))?;
    Some(line.rsplit(' ').next().unwrap().to_owned())
}

#[test]
fn tcp_connections_are_counted_while_they_are_open_and_when_they_end() {
    let telemetry = Telemetry::new(node());
    let shard = telemetry.shard();
    let labels = Labels { protocol: Protocol::Tcp, ..outbound() };
    let (one, other) = (Arc::new(Bytes::default()), Arc::new(Bytes::default()));
    let report = shard.open_tcp(&labels, Arc::clone(&one) as _);
    let second = shard.open_tcp(&labels, Arc::clone(&other) as _);
    let total = |name: &str| total(&telemetry, name).unwrap();
    let bytes = || (total("istio_tcp_sent_bytes_total{"), total("istio_tcp_received_bytes_total{"));
    assert_eq!(total("istio_tcp_connections_opened_total{"), "2");
    one.0.store(6, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(bytes(), ("12".into(), "6".into()));
    drop(report);
    other.0.store(4, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(total("istio_tcp_connections_closed_total{"), "1");
    assert_eq!(bytes(), ("20".into(), "10".into()));
    // A place that was given back is used again.
    let third = shard.open_tcp(&labels, one as _);
    assert_eq!((third.place, lock(&third.series.cells.live).open.len()), (0, 2));
    drop(second);
}

#[test]
fn messages_know_nothing_of_the_end() {
    let telemetry = Telemetry::new(node());
    let shard = telemetry.shard();
    let grpc = Labels { protocol: Protocol::Grpc, ..outbound() };
    shard.record_messages(&grpc, (3, 13));
    shard.record_messages(&Labels { code: 500, grpc_status: Some(2), flags: Flags::UC, ..grpc }, (5, 14));
    let mut out = String::new();
    telemetry.istio_families(&mut out);
    let line = out.lines().find(|l| l.starts_with("istio_request_messages_total{")).unwrap();
    assert!(line.ends_with(" 8") && !line.contains("response_code") && line.contains("destination_cluster"), "{line}");
    assert_eq!(total(&telemetry, "istio_response_messages_total{").unwrap(), "27");
}

#[test]
fn what_is_not_used_is_forgotten() {
    let telemetry = Telemetry::new(node());
    let shard = telemetry.shard();
    let (limit, start) = (Duration::from_secs(10), Instant::now());
    let tcp = Labels { protocol: Protocol::Tcp, ..outbound() };
    let open = shard.open_tcp(&tcp, Arc::new(Bytes::default()));
    let at = |seconds| start + Duration::from_secs(seconds);
    shard.record_request(&outbound(), Sizes::default());
    telemetry.forget(limit, at(0));
    telemetry.forget(limit, at(9));
    assert_eq!(total(&telemetry, "istio_requests_total{").as_deref(), Some("1"));
    shard.record_request(&outbound(), Sizes::default());
    telemetry.forget(limit, at(11));
    telemetry.forget(limit, at(20));
    assert_eq!(total(&telemetry, "istio_requests_total{").as_deref(), Some("2"));
    telemetry.forget(limit, at(21));
    assert_eq!(total(&telemetry, "istio_requests_total{"), None);
    assert!(total(&telemetry, "istio_tcp_connections_opened_total{").is_some(), "an open connection stays");
    drop(open);
    shard.record_request(&outbound(), Sizes::default());
    assert_eq!(total(&telemetry, "istio_requests_total{").as_deref(), Some("1"));
}
