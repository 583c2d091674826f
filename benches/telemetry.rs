//! What counting and logging cost a request: at most 100 ns and 500 ns.

use std::hint::black_box;
use std::time::{Duration, SystemTime};

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue};
use istio_proxy::error::Flags;
use istio_proxy::telemetry::{
    AccessLogs, Headers, Labels, LogOptions, LogShape, Logs, NodeLabels, Protocol, Record, RecordKind, Reporter,
    SaidLog, Service, Sizes, Telemetry,
};
use proxy_config::compile::settings::TEXT_FORMAT;

fn labels<'a>() -> Labels<'a> {
    Labels {
        reporter: Reporter::Source,
        protocol: Protocol::Http,
        service: Some(Service { host: "reviews.default.svc.cluster.local", name: "reviews", namespace: "default" }),
        cluster: "outbound|9080||reviews.default.svc.cluster.local",
        authority: "reviews:9080",
        peer: None,
        local_principal: "spiffe://cluster.local/ns/default/sa/productpage",
        peer_principal: "spiffe://cluster.local/ns/default/sa/reviews",
        code: 200,
        grpc_status: None,
        flags: Flags::NONE,
        changed: None,
    }
}

fn record(headers: &HeaderMap) -> Record<'_> {
    Record {
        method: "GET",
        path: "/reviews/0?x=1",
        protocol: "HTTP/1.1",
        authority: "reviews:9080",
        request_headers: Headers::Map(headers),
        code: 200,
        details: "via_upstream",
        bytes_sent: 295,
        upstream_service_time: Some(Duration::from_millis(21)),
        upstream_cluster: "outbound|9080||reviews.default.svc.cluster.local",
        upstream_host: "10.44.1.29:9080".parse().ok(),
        upstream_local: "10.44.1.23:45678".parse().ok(),
        downstream_local: "10.0.45.184:9080".parse().ok(),
        downstream_remote: "10.44.1.23:37912".parse().ok(),
        route: "default",
        attempts: 1,
        ..Record::new(RecordKind::Http, SystemTime::now(), Duration::from_millis(24))
    }
}

fn counting(c: &mut Criterion) {
    let telemetry = Telemetry::new(NodeLabels::default());
    let shard = telemetry.shard();
    let cluster = shard.cluster("outbound|9080||reviews.default.svc.cluster.local");
    let sizes = Sizes { duration: Duration::from_millis(24), request_bytes: 412, response_bytes: 707 };
    c.bench_function("one counter", |b| b.iter(|| black_box(&cluster).rq_total.inc()));
    c.bench_function("a request under Istio's labels", |b| {
        b.iter(|| shard.record_request(black_box(&labels()), black_box(sizes)));
    });
    c.bench_function("a cluster's part of a request", |b| {
        b.iter(|| {
            let cluster = black_box(&cluster);
            cluster.rq_total.inc();
            cluster.rq_active.inc();
            cluster.count_status(200);
            cluster.rq_time.record(24);
            cluster.rq_active.dec();
        });
    });
}

fn logging(c: &mut Criterion) {
    let telemetry = Telemetry::new(NodeLabels::default());
    let mut headers = HeaderMap::new();
    headers.insert("user-agent", HeaderValue::from_static("curl/8.5.0"));
    headers.insert("x-request-id", HeaderValue::from_static("4f1c9a52-8f6e-4d0c-9d2b-0d7a1c5e3b11"));
    let said = SaidLog { path: "/dev/null", shape: LogShape::Text(TEXT_FORMAT), omit_empty: false, filter: None };
    let (text, _) = AccessLogs::compile([said]);
    let logs = Logs::start(LogOptions::default(), &telemetry).expect("a writer thread");
    let sink = logs.sink();
    c.bench_function("headers that a line tells", |b| b.iter(|| text.capture_request(black_box(&headers))));
    c.bench_function("a line of Istio's text", |b| b.iter(|| sink.log(black_box(&record(&headers)), &text)));
    let options = LogOptions { record: Some("/dev/null".to_owned()), default_text: None };
    let everything = Logs::start(options, &telemetry).expect("a writer thread");
    let (sink, none) = (everything.sink(), AccessLogs::default());
    c.bench_function("the JSON record", |b| b.iter(|| sink.log(black_box(&record(&headers)), &none)));
}

criterion_group!(benches, counting, logging);
criterion_main!(benches);
