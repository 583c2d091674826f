//! Collectors of ours hear of requests, through the same clusters as everything else and in their own words.

use ::http::Response;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use prost::encoding::{WireType, decode_key, decode_varint};
use serde_json::json;
use tokio::sync::mpsc;

use super::super::export;
use super::*;
use crate::telemetry::{LogOptions, Logs, NodeLabels, Telemetry, Value};

/// Takes everything: path and body.
struct Collector {
    address: SocketAddr,
    heard: mpsc::UnboundedReceiver<(String, Vec<u8>)>,
}

impl Collector {
    async fn start(grpc: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, heard) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let tell = tell.clone();
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let tell = tell.clone();
                    async move {
                        let path = request.uri().path().to_owned();
                        let body = request.into_body().collect().await?.to_bytes().to_vec();
                        tell.send((path, body)).unwrap();
                        let answer = Response::builder().header("grpc-status", "0");
                        Ok::<_, hyper::Error>(answer.body(Full::<Bytes>::default()).unwrap())
                    }
                });
                let io = TokioIo::new(socket);
                if grpc {
                    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    tokio::spawn(builder.serve_connection(io, service));
                } else {
                    tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
                }
            }
        });
        Self { address, heard }
    }

    async fn next(&mut self) -> (String, Vec<u8>) {
        tokio::time::timeout(LIMIT, self.heard.recv()).await.expect("a request").expect("a request")
    }
}

/// A proxy whose manager tells a collector at `to`.
fn telling(
    app: &App,
    manager: HttpConnectionManager,
    (to, protocol): (SocketAddr, UpstreamProtocol),
) -> (Mesh, Arc<Telemetry>) {
    let clusters = vec![cluster("app", app.address, UpstreamProtocol::Http1), cluster("collector", to, protocol)];
    let mesh = Mesh::new(vec![NetworkFilter::Http(Box::new(manager))], clusters);
    let telemetry = Telemetry::new(NodeLabels::default());
    let logs = Logs::start(LogOptions::default(), &telemetry).unwrap();
    let settings = Settings { worker: 0, view: mesh.env.view(), drain: mesh.env.drain().clone(), node: node() };
    let env = Env::new(settings).with_telemetry(telemetry.shard(), logs.sink());
    (Mesh { env: Arc::new(env), ..mesh }, telemetry)
}

/// Has the worker's task do its work now.
async fn deliver(mesh: &Mesh) {
    let outbox = Arc::clone(mesh.env.log().unwrap().outbox());
    tokio::time::timeout(LIMIT, outbox.arrived()).await.expect("an entry");
    export::deliver(&mesh.env, &outbox).await;
}

/// The first value under a path of field numbers.
fn at(mut bytes: &[u8], path: &[u32]) -> Option<Vec<u8>> {
    let Some((field, rest)) = path.split_first() else { return Some(bytes.to_vec()) };
    while !bytes.is_empty() {
        let (tag, kind) = decode_key(&mut bytes).unwrap();
        let length = match kind {
            WireType::LengthDelimited => decode_varint(&mut bytes).unwrap() as usize,
            WireType::SixtyFourBit => 8,
            _ => {
                decode_varint(&mut bytes).unwrap();
                continue;
            }
        };
        let (value, after) = bytes.split_at(length);
        bytes = after;
        if tag == *field {
            return at(value, rest);
        }
    }
    None
}

fn text(bytes: &[u8], path: &[u32]) -> String {
    String::from_utf8(at(bytes, path).unwrap_or_default()).unwrap()
}

fn log(sink: model::LogSink) -> model::AccessLog {
    model::AccessLog { sink, filter: None }
}

#[tokio::test]
async fn access_logs_reach_their_collectors() {
    let app = App::start(OK, false).await;
    let mut collector = Collector::start(true).await;
    let mut manager = manager(vec![forward("/")], Vec::new());
    manager.access_log = vec![
        log(model::LogSink::Grpc {
            cluster: "collector".into(),
            log_name: "l".to_owned(),
            tcp: false,
            rest: json!({"authority": "c.x", "additional_request_headers_to_log": ["x-a"]}),
        }),
        log(model::LogSink::OpenTelemetry {
            cluster: "collector".into(),
            log_name: "o".to_owned(),
            rest: json!({"body": "%RESPONSE_CODE%", "attributes": {"a": "%PROTOCOL%"}, "disable_builtin_labels": true}),
        }),
    ];
    let (mesh, telemetry) = telling(&app, manager, (collector.address, UpstreamProtocol::Http2));
    let mut client = mesh.connect();
    client.send("GET /x HTTP/1.1\r\nhost: a\r\nx-a: 1\r\n\r\n").await;
    client.until("ok\n").await;
    deliver(&mesh).await;
    let mut heard = [collector.next().await, collector.next().await];
    heard.sort();
    let [(als, entry), (otlp, record)] = &heard;
    assert_eq!(als, "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs");
    assert_eq!(otlp, "/opentelemetry.proto.collector.logs.v1.LogsService/Export");
    let entry = &entry[5..];
    assert_eq!((text(entry, &[1, 2]), text(entry, &[2, 1, 3, 5])), ("l".to_owned(), "/x".to_owned()));
    assert_eq!((text(entry, &[2, 1, 3, 13, 1]), text(entry, &[2, 1, 3, 13, 2])), ("x-a".to_owned(), "1".to_owned()));
    assert_eq!(
        (text(entry, &[2, 1, 4, 6]), text(entry, &[2, 1, 1, 15])),
        ("via_upstream".to_owned(), "app".to_owned())
    );
    let record = &record[5..];
    assert_eq!((text(record, &[1, 2, 2, 5, 1]), text(record, &[1, 2, 2, 6, 1])), ("200".to_owned(), "a".to_owned()));
    assert_eq!(text(record, &[1, 2, 2, 6, 2, 1]), "HTTP/1.1");
    let dropped = telemetry.process.samples().into_iter().find(|s| s.name == "telemetry_dropped_total").unwrap();
    assert_eq!(dropped.value, Value::Counter(0));
}

fn traced(typed: serde_json::Value) -> HttpConnectionManager {
    let mut manager = manager(vec![forward("/")], Vec::new());
    let provider = Some(json!({"name": "t", "typed_config": typed}));
    manager.tracing = Some(model::Tracing { random_sampling: Some(100.0), provider, ..model::Tracing::default() });
    manager
}

#[tokio::test]
async fn spans_reach_zipkin() {
    let app = App::start(OK, false).await;
    let mut collector = Collector::start(false).await;
    let manager = traced(json!({
        "@type": "t/envoy.config.trace.v3.ZipkinConfig",
        "collector_service": {"http_uri": {"uri": "http://z.x/spans", "cluster": "collector"}},
    }));
    let (mesh, _) = telling(&app, manager, (collector.address, UpstreamProtocol::Http1));
    mesh.connect().get("/x", "ok\n").await;
    deliver(&mesh).await;
    let (path, body) = collector.next().await;
    let spans: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((path.as_str(), &spans[0]["name"], &spans[0]["kind"]), ("/spans", &json!("op"), &json!("SERVER")));
    let head = app.heads().remove(0);
    let trace = spans[0]["traceId"].as_str().unwrap();
    assert!(head.contains(&format!("x-b3-traceid: {trace}\r\n")) && head.contains("x-b3-sampled: 1\r\n"), "{head}");
}

#[tokio::test]
async fn spans_reach_opentelemetry() {
    let app = App::start(OK, false).await;
    let mut collector = Collector::start(true).await;
    let manager = traced(json!({
        "@type": "t/envoy.config.trace.v3.OpenTelemetryConfig",
        "grpc_service": {"cluster": "collector", "authority": "o.x"},
        "service_name": "web.app",
    }));
    let (mesh, _) = telling(&app, manager, (collector.address, UpstreamProtocol::Http2));
    mesh.connect().get("/x", "ok\n").await;
    deliver(&mesh).await;
    let (path, body) = collector.next().await;
    assert_eq!(path, "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
    let body = &body[5..];
    assert_eq!((text(body, &[1, 1, 1, 2, 1]), text(body, &[1, 2, 2, 5])), ("web.app".to_owned(), "op".to_owned()));
    let trace: String = at(body, &[1, 2, 2, 1]).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    let head = app.heads().remove(0);
    assert!(trace.len() == 32 && head.contains(&format!("traceparent: 00-{trace}-")), "{trace} {head}");
}

#[tokio::test]
async fn a_collector_that_is_gone_costs_entries_and_no_request() {
    let app = App::start(OK, false).await;
    let mut manager = manager(vec![forward("/")], Vec::new());
    let rest = json!({"authority": "c.x"});
    let sink = model::LogSink::Grpc { cluster: "collector".into(), log_name: "l".to_owned(), tcp: false, rest };
    manager.access_log = vec![log(sink)];
    let (mesh, telemetry) = telling(&app, manager, ("127.0.0.1:1".parse().unwrap(), UpstreamProtocol::Http2));
    assert!(mesh.connect().get("/x", "ok\n").await.starts_with("HTTP/1.1 200"));
    deliver(&mesh).await;
    let dropped = telemetry.process.samples().into_iter().find(|s| s.name == "telemetry_dropped_total").unwrap();
    assert_eq!(dropped.value, Value::Counter(1));
}
