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

#[test]
fn tcp_connections_are_counted_when_they_open_and_when_they_end() {
    let telemetry = Telemetry::new(node());
    let shard = telemetry.shard();
    let report = shard.open_tcp(&Labels { protocol: Protocol::Tcp, ..outbound() });
    report.bytes(12, 6);
    report.bytes(12, 6);
    let total = |name: &str| {
        let mut out = String::new();
        telemetry.istio_families(&mut out);
        out.lines().find(|l| l.starts_with(name)).unwrap().rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(total("istio_tcp_connections_opened_total{"), "1");
    assert_eq!(total("istio_tcp_connections_closed_total{"), "0");
    drop(report);
    assert_eq!(total("istio_tcp_connections_closed_total{"), "1");
    assert_eq!(
        (total("istio_tcp_sent_bytes_total{"), total("istio_tcp_received_bytes_total{")),
        ("24".into(), "12".into())
    );
}
