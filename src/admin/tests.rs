use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use proxy_config::model::{
    Address, CircuitBreakers, Cluster, ClusterKind, Endpoint, Endpoints, HealthStatus, LbPolicy, LocalityEndpoints,
    Transport,
};
use proxy_config::registry::Proxy;
use proxy_config::{Model, Reject, Severity};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::drain::Phase;
use crate::net::Stream;
use crate::proxy::Node;
use crate::snapshot;
use crate::telemetry::{LogOptions, Logs, NodeLabels};
use crate::tls::Secrets;
use crate::worker::{Settings, Workers};
use crate::xds::{Kept, Kind, Received, Refusal, Version};

struct Fixture {
    admin: Admin,
    publish: watch::Sender<Arc<Published>>,
    _workers: Workers,
}

fn fixture() -> Fixture {
    let (drain, leaving) = Drain::new();
    let (publish, published) = watch::channel(Arc::new(Published::nothing(Arc::new(Proxy::default()))));
    let (_, snapshots) = watch::channel(Arc::default());
    let telemetry = Telemetry::new(NodeLabels { istio_version: "1.27".to_owned(), ..NodeLabels::default() });
    let logs = Arc::new(Logs::start(LogOptions::default(), &telemetry).unwrap());
    let settings = Settings {
        snapshots,
        drain: leaving,
        node: Node::default(),
        telemetry: Arc::clone(&telemetry),
        logs,
        connections: 9,
        refuse_above: None,
    };
    let workers = Workers::start(1, &settings).unwrap();
    let admin = Admin {
        published,
        telemetry,
        drain: Arc::new(drain),
        workers: workers.handles().into(),
        levels: None,
        started: SystemTime::now(),
        failed: Arc::new(AtomicBool::new(false)),
    };
    Fixture { admin, publish, _workers: workers }
}

/// A small configuration: one listener, one cluster with a host, something refused, something inert.
fn published() -> Arc<Published> {
    let mut model = Model::default();
    let endpoints = Endpoints {
        localities: vec![LocalityEndpoints {
            endpoints: vec![Endpoint {
                address: Address::Socket("10.0.0.7:8080".parse().unwrap()),
                health: HealthStatus::Unhealthy,
                weight: 1,
                transport_labels: Default::default(),
                workload: Default::default(),
                hostname: String::new(),
                metadata: Default::default(),
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    let name: Arc<str> = "outbound|80||a.b".into();
    model.clusters.insert(Arc::clone(&name), Arc::new(cluster(&name, endpoints)));
    model.inert.insert("WasmPlugin a/b".to_owned());
    let rejects = vec![Reject {
        resource: "VirtualService a/b".to_owned(),
        place: Some("x.yaml:3:1".to_owned()),
        field: "spec.http[0]".to_owned(),
        reason: "not done".to_owned(),
        severity: Severity::Error,
        code: None,
    }];
    let (snapshot, _) = snapshot::compile(None, &model, &Secrets::new());
    Arc::new(Published {
        version: 1,
        model: Arc::new(model),
        snapshot: Arc::new(snapshot),
        rejects: rejects.into(),
        ..Published::nothing(Arc::new(Proxy { namespace: "shop".to_owned(), ..Proxy::default() }))
    })
}

fn cluster(name: &Arc<str>, endpoints: Endpoints) -> Cluster {
    Cluster {
        name: Arc::clone(name),
        kind: ClusterKind::Static(endpoints),
        lb: LbPolicy::Random,
        connect_timeout: None,
        limits: CircuitBreakers::default(),
        outlier: None,
        healthy_panic_threshold: None,
        locality_weighted: false,
        http: Default::default(),
        transport_matches: Vec::new(),
        transport: Transport::Raw,
        source_address: None,
        tcp_keepalive: None,
        upstream_port_override: None,
        istio: Default::default(),
        metadata_exchange: None,
        dns: None,
        close_on_host_failure: false,
        alt_stat_name: String::new(),
        tcp_idle_timeout: None,
        unsupported: Vec::new(),
    }
}

/// One exchange over memory; status line, headers and body.
async fn ask(admin: &Admin, port: Port, request: &str) -> (u16, String, Vec<u8>) {
    let (mut client, server) = tokio::io::duplex(1 << 16);
    let served = tokio::spawn(server::serve_connection(Stream::from(server), admin.clone(), port));
    let end = if request.contains("\r\n\r\n") { "" } else { "\r\nhost: x\r\nconnection: close\r\n\r\n" };
    client.write_all(format!("{request}{end}").as_bytes()).await.unwrap();
    let mut all = Vec::new();
    client.read_to_end(&mut all).await.unwrap();
    served.await.unwrap();
    let at = all.windows(4).position(|w| w == b"\r\n\r\n").expect("a head");
    let head = String::from_utf8(all[..at].to_vec()).unwrap();
    (head[9..12].parse().unwrap(), head.to_lowercase(), all[at + 4..].to_vec())
}

async fn get(admin: &Admin, path: &str) -> (u16, String) {
    let (status, _, body) = ask(admin, Port::Admin, &format!("GET {path} HTTP/1.1")).await;
    (status, String::from_utf8(body).unwrap())
}

async fn post(admin: &Admin, path: &str) -> (u16, String) {
    let (status, _, body) = ask(admin, Port::Admin, &format!("POST {path} HTTP/1.1\r\ncontent-length: 0")).await;
    (status, String::from_utf8(body).unwrap())
}

async fn get_json(admin: &Admin, path: &str) -> Value {
    let (status, body) = get(admin, path).await;
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

#[tokio::test]
async fn readiness_names_what_is_missing() {
    let Fixture { admin, publish, _workers } = fixture();
    let ready = || async {
        let (status, _, body) = ask(&admin, Port::Ready, "GET /healthz/ready HTTP/1.1").await;
        (status, String::from_utf8(body).unwrap())
    };
    assert_eq!(ready().await, (503, "no configuration yet\n".to_owned()));
    let waiting = admin.clone();
    let waiting = tokio::spawn(async move { wait_until_ready(&waiting).await });
    publish.send_replace(published());
    waiting.await.unwrap();
    assert_eq!(ready().await, (200, String::new()));
    assert_eq!(get(&admin, "/ready").await, (200, "LIVE\n".to_owned()));
    post(&admin, "/healthcheck/fail").await;
    assert_eq!(ready().await, (503, "failed by /healthcheck/fail\n".to_owned()));
    post(&admin, "/healthcheck/ok").await;
    assert_eq!(ready().await.0, 200);
    post(&admin, "/drain_listeners?graceful").await;
    assert_eq!((admin.drain.phase(), ready().await), (Phase::Lame, (503, "leaving\n".to_owned())));
    let none = Admin { workers: Arc::from([]), ..admin.clone() };
    assert!(reasons(&none).contains(&"workers have not yet started".to_owned()));
}

#[tokio::test]
async fn other_hosts_are_told_one_thing_on_each_port() {
    let Fixture { admin, publish, _workers } = fixture();
    publish.send_replace(published());
    for path in ["/config_dump", "/quitquitquit", "/stats", "/", "/stats/prometheus/x"] {
        for method in ["GET", "POST"] {
            let request = format!("{method} {path} HTTP/1.1");
            assert_eq!(ask(&admin, Port::Ready, &request).await.0, 404, "{request}");
            assert_eq!(ask(&admin, Port::Metrics, &request).await.0, 404, "{request}");
        }
    }
    let (status, head, body) = ask(&admin, Port::Metrics, "GET /stats/prometheus HTTP/1.1").await;
    assert!(status == 200 && head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    let body = String::from_utf8(body).unwrap();
    assert!(body.contains("istio_build{component=\"proxy\",tag=\"1.27\"} 1\n"), "{body}");
    assert!(body.contains("envoy_cluster_membership_total{cluster_name=\"outbound|80||a.b\"} 1\n"));
    assert_eq!(admin.drain.phase(), Phase::Serving);
}

#[tokio::test]
async fn every_line_for_prometheus_parses() {
    let Fixture { admin, publish, _workers } = fixture();
    publish.send_replace(published());
    let shard = admin.telemetry.shard();
    shard.cluster("outbound|80||a.b").rq_time.record(3);
    shard.http("outbound_0.0.0.0_80;").count_status(200);
    let (status, body) = get(&admin, "/stats/prometheus").await;
    assert_eq!(status, 200);
    let line = regex::Regex::new(
        r#"^(# TYPE [a-zA-Z_:][a-zA-Z0-9_:]* (counter|gauge|histogram)|[a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-z_]+="([^"\\\n]|\\.)*",?)+\})? -?[0-9]+)$"#,
    )
    .unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for text in body.lines() {
        assert!(line.is_match(text), "{text}");
        if let Some(family) = text.strip_prefix("# TYPE ") {
            assert!(seen.insert(family.to_owned()), "{family} stands twice");
        }
    }
    assert!(body.contains("envoy_http_downstream_rq{response_code_class=\"2xx\",http_conn_manager_prefix="));
}

#[tokio::test]
async fn long_answers_are_compressed_for_who_takes_it() {
    let Fixture { admin, publish, _workers } = fixture();
    publish.send_replace(published());
    let request = "GET /stats/prometheus HTTP/1.1\r\nhost: x\r\naccept-encoding: br, gzip\r\nconnection: close\r\n\r\n";
    let (_, head, small) = ask(&admin, Port::Metrics, request).await;
    assert!(head.contains("content-encoding: gzip"), "{head}");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&*small), &mut text).unwrap();
    assert!(text.contains("istio_build") && small.len() < text.len());
    let (_, head, _) = ask(&admin, Port::Admin, &request.replace("gzip", "gzip;q=0")).await;
    assert!(!head.contains("content-encoding"), "{head}");
}

#[tokio::test]
async fn stats_are_filtered() {
    let Fixture { admin, publish, _workers } = fixture();
    publish.send_replace(published());
    admin.telemetry.shard().cluster("outbound|80||a.b").rq_total.add(4);
    let (_, body) = get(&admin, "/stats?usedonly&filter=%5Ecluster%5C..*upstream_rq_total$").await;
    assert_eq!(body, "cluster.outbound|80||a.b.upstream_rq_total: 4\n");
    let (_, body) =
        get(&admin, "/stats?filter=server.state|workers_started|lds.update_success|cds.update_success").await;
    let wanted = "cluster_manager.cds.update_success: 1\nlistener_manager.lds.update_success: 1\n\
                  listener_manager.workers_started: 1\nserver.state: 0\n";
    assert_eq!(body, wanted);
    assert_eq!(get(&admin, "/stats?filter=(").await.0, 400);
    let json = get_json(&admin, "/stats?format=json&filter=server.state").await;
    assert_eq!(json["stats"][0]["value"], 0);
}

#[tokio::test]
async fn clusters_show_hosts_with_their_health() {
    let Fixture { admin, publish, _workers } = fixture();
    publish.send_replace(published());
    let host = &admin.now().snapshot.clusters().next().unwrap().hosts().all[0].clone();
    host.stats.ejection.until.store(9, Ordering::Relaxed);
    host.stats.totals.requests.store(5, Ordering::Relaxed);
    host.stats.totals.errors.store(2, Ordering::Relaxed);
    let (_, text) = get(&admin, "/clusters").await;
    for line in [
        "outbound|80||a.b::default_priority::max_connections::1024",
        "outbound|80||a.b::10.0.0.7:8080::health_flags::/failed_outlier_check/failed_eds_health",
        "outbound|80||a.b::10.0.0.7:8080::rq_success::3",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    let json = get_json(&admin, "/clusters?format=json").await;
    let status = &json["cluster_statuses"][0];
    assert_eq!(status["name"], "outbound|80||a.b");
    let host = &status["host_statuses"][0];
    assert_eq!(host["address"]["socket_address"]["port_value"], 8080);
    assert_eq!(host["health_status"]["failed_outlier_check"], true);
    assert_eq!(host["health_status"]["eds_health_status"], "UNHEALTHY");
}

#[tokio::test]
async fn the_dump_lists_what_is_not_served_as_said() {
    let Fixture { admin, publish, _workers } = fixture();
    publish.send_replace(published());
    let dump = get_json(&admin, "/config_dump").await;
    let own = &dump["istio_proxy"];
    assert_eq!(own["version"], 1);
    assert_eq!(own["rejects"][0]["reason"], "not done");
    assert_eq!(own["errors"]["VirtualService a/b"][0], "x.yaml:3:1: VirtualService a/b: spec.http[0]: not done");
    assert_eq!(own["inert"][0], "WasmPlugin a/b");
    assert_eq!(own["model"]["clusters"]["outbound|80||a.b"]["name"], "outbound|80||a.b");
}

/// The sections of a dump by type.
fn sections(dump: &Value) -> Vec<&str> {
    let configs = dump["configs"].as_array().unwrap().iter();
    configs.map(|config| config["@type"].as_str().unwrap().rsplit('.').next().unwrap()).collect()
}

#[tokio::test]
async fn the_dump_shows_what_was_received() {
    let Fixture { admin, publish, _workers } = fixture();
    let received = Arc::new(Received::default());
    let bytes = Bytes::from_static(b"\x0a\x03web\x2a\x02x9\x98\x06\x01");
    let version = Version { bytes: Kept::plain(bytes), push: "7".into(), at: SystemTime::UNIX_EPOCH };
    received.accept(Kind::Cluster, &"web".into(), version.clone());
    received.refuse(Kind::Listener, &"lost".into(), Refusal { version, why: "no filter chain".to_owned() });
    publish.send_replace(Arc::new(Published {
        received,
        ..Published::nothing(Arc::new(Proxy { name: "w".to_owned(), namespace: "shop".to_owned(), ..Proxy::default() }))
    }));
    let dump = get_json(&admin, "/config_dump").await;
    let kinds = ["Bootstrap", "Clusters", "Listeners", "Routes", "Ecds", "Secrets"].map(|k| format!("{k}ConfigDump"));
    assert_eq!(sections(&dump), kinds);
    assert_eq!(dump["configs"][0]["bootstrap"]["node"]["id"], "sidecar~~w.shop~");
    let cluster = &dump["configs"][1]["dynamic_active_clusters"][0];
    assert_eq!(cluster["cluster"]["name"], "web");
    assert_eq!(cluster["version_info"], "7");
    let listener = &dump["configs"][2]["dynamic_listeners"][0];
    assert_eq!(listener["error_state"]["details"], "no filter chain");
    let masked = get_json(&admin, "/config_dump?mask=dynamic_active_clusters,static_clusters").await;
    assert_eq!(sections(&masked), ["ClustersConfigDump"]);
    assert!(masked["configs"][0].get("dynamic_warming_clusters").is_none());
    let with_endpoints = get_json(&admin, "/config_dump?include_eds=true").await;
    assert!(sections(&with_endpoints).contains(&"EndpointsConfigDump"));
}

#[tokio::test]
async fn the_rest_answers() {
    let Fixture { admin, publish, _workers } = fixture();
    publish.send_replace(published());
    assert_eq!(get_json(&admin, "/server_info").await["state"], "LIVE");
    assert_eq!(get_json(&admin, "/debug/workers").await[0]["connections"], 0);
    assert_eq!(get_json(&admin, "/certs").await["certificates"], Value::Array(Vec::new()));
    assert_eq!(get_json(&admin, "/listeners?format=json").await["listener_statuses"], Value::Array(Vec::new()));
    assert!(get(&admin, "/help").await.1.contains("/config_dump"));
    assert!(get(&admin, "/memory").await.1.contains("VmRSS"));
    assert_eq!(get(&admin, "/nowhere").await.0, 404);
    assert_eq!(post(&admin, "/logging?level=debug").await.0, 501);
    assert_eq!(post(&admin, "/stats").await.0, 200);
    let (status, _, _) = ask(&admin, Port::Admin, "DELETE /stats HTTP/1.1").await;
    assert_eq!(status, 405);
}

#[tokio::test]
async fn what_changes_something_wants_post() {
    let Fixture { admin, _workers, .. } = fixture();
    for path in ["/quitquitquit", "/drain_listeners", "/healthcheck/fail"] {
        assert_eq!(get(&admin, path).await.0, 405, "{path}");
    }
    assert_eq!((admin.drain.phase(), admin.failed.load(Ordering::Relaxed)), (Phase::Serving, false));
    assert_eq!(post(&admin, "/drain_listeners").await, (200, "OK\n".to_owned()));
    assert_eq!(admin.drain.phase(), Phase::Closing);
    assert_eq!(post(&admin, "/quitquitquit").await.0, 200);
    assert_eq!(admin.drain.phase(), Phase::Gone);
}

#[tokio::test]
async fn a_crowd_that_says_nothing_does_not_keep_probes_out() {
    let fixture = fixture();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, fixture.admin.clone(), Port::Ready));
    let mut crowd = Vec::new();
    for _ in 0..300 {
        crowd.push(TcpStream::connect(at).await.unwrap());
    }
    let mut probe = TcpStream::connect(at).await.unwrap();
    probe.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    probe.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 503"), "{}", String::from_utf8_lossy(&answer));
    // The first of the crowd had to make room.
    assert_eq!(crowd[0].read(&mut [0]).await.unwrap_or(0), 0);
}
