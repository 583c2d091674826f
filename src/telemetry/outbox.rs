//! What waits to be sent to collectors: bounded, in batches, never in the way of a request.
//!
//! A worker appends to its own outbox; a task of the same worker takes what is there and sends it through the named
//! cluster. What does not fit is dropped and counted.

use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use super::metrics::lock;
use super::recorder::Process;
use super::wire::{Message, attribute, grpc_frame};

/// Bytes of a batch that are sent without waiting for more, as Envoy's default.
const SEND_AT: usize = 16 * 1024;
/// Bytes for one collector past which entries are dropped.
const FULL: usize = 1 << 20;

/// Where something is sent and how.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Cluster.
    pub cluster: Arc<str>,
    /// `:authority`
    pub authority: String,
    /// What it speaks.
    pub speaks: Speaks,
}

/// What a collector speaks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Speaks {
    /// Envoy's access log service; the log's name, the node's id, and whether entries are of TCP.
    AccessLogService {
        /// Name of the log.
        log: String,
        /// Entries are of TCP connections.
        tcp: bool,
    },
    /// OTLP logs over gRPC; attributes of the resource.
    OtlpLogs(Vec<(String, String)>),
    /// OTLP traces over gRPC; name of the service.
    OtlpTraces(String),
    /// OTLP traces over HTTP: path and name of the service.
    OtlpHttp(String, String),
    /// Zipkin's JSON, version 2: path.
    Zipkin(String),
}

/// A request for a collector.
#[derive(Debug)]
pub struct Parcel {
    /// Where to.
    pub target: Arc<Target>,
    /// `:path`
    pub path: String,
    /// `content-type`
    pub content_type: &'static str,
    /// Body.
    pub body: Vec<u8>,
    /// Entries in it.
    pub entries: u64,
}

/// What waits on one worker.
#[derive(Debug)]
pub struct Outbox {
    lanes: Mutex<Vec<Lane>>,
    /// Something is there.
    arrived: Notify,
    /// There is enough for a batch.
    enough: Notify,
    process: Process,
    /// Id of the node.
    node: String,
}

#[derive(Debug)]
struct Lane {
    target: Arc<Target>,
    entries: Vec<Vec<u8>>,
    bytes: usize,
    dropped: u64,
}

impl Outbox {
    pub(super) fn new(process: Process, node: String) -> Self {
        Self { lanes: Mutex::default(), arrived: Notify::new(), enough: Notify::new(), process, node }
    }

    /// Puts an encoded entry in.
    pub(super) fn put(&self, target: &Arc<Target>, entry: Vec<u8>) {
        let mut lanes = lock(&self.lanes);
        let known = lanes.iter().position(|lane| Arc::ptr_eq(&lane.target, target) || lane.target == *target);
        let at = known.unwrap_or_else(|| {
            lanes.push(Lane { target: Arc::clone(target), entries: Vec::new(), bytes: 0, dropped: 0 });
            lanes.len() - 1
        });
        let lane = &mut lanes[at];
        if lane.bytes + entry.len() > FULL {
            lane.dropped += 1;
            return;
        }
        let before = lane.bytes;
        lane.bytes += entry.len();
        lane.entries.push(entry);
        if before == 0 {
            self.arrived.notify_one();
        }
        if before < SEND_AT && lane.bytes >= SEND_AT {
            self.enough.notify_one();
        }
    }

    /// Waits until something is there.
    pub async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Waits until there is enough for a batch.
    pub async fn enough(&self) {
        self.enough.notified().await;
    }

    /// Takes everything, as requests; targets that nothing came for are forgotten.
    pub fn take(&self) -> Vec<Parcel> {
        let lanes = std::mem::take(&mut *lock(&self.lanes));
        let dropped: u64 = lanes.iter().map(|lane| lane.dropped).sum();
        self.process.export_dropped(dropped);
        lanes.into_iter().map(|lane| self.parcel(lane)).collect()
    }

    /// So many entries were not delivered.
    pub fn lost(&self, entries: u64) {
        self.process.export_dropped(entries);
    }

    fn parcel(&self, lane: Lane) -> Parcel {
        let entries = lane.entries.len() as u64;
        let (path, content_type, body) = match &lane.target.speaks {
            Speaks::AccessLogService { log, tcp } => (
                "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs".to_owned(),
                "application/grpc",
                grpc_frame(&self.access_logs(log, *tcp, &lane.entries)),
            ),
            Speaks::OtlpLogs(resource) => (
                "/opentelemetry.proto.collector.logs.v1.LogsService/Export".to_owned(),
                "application/grpc",
                grpc_frame(&otlp(resource.iter().map(|(key, value)| (&**key, &**value)), &lane.entries)),
            ),
            Speaks::OtlpTraces(service) => (
                "/opentelemetry.proto.collector.trace.v1.TraceService/Export".to_owned(),
                "application/grpc",
                grpc_frame(&otlp([("service.name", &**service)].into_iter(), &lane.entries)),
            ),
            Speaks::OtlpHttp(path, service) => (
                path.clone(),
                "application/x-protobuf",
                otlp([("service.name", &**service)].into_iter(), &lane.entries).0,
            ),
            Speaks::Zipkin(path) => {
                (path.clone(), "application/json", [&b"["[..], &lane.entries.join(&b","[..]), b"]"].concat())
            }
        };
        Parcel { target: lane.target, path, content_type, body, entries }
    }

    /// `StreamAccessLogsMessage`: one batch is one short stream, so there is none to be kept alive.
    fn access_logs(&self, log: &str, tcp: bool, entries: &[Vec<u8>]) -> Message {
        let (mut node, mut identifier, mut list, mut out) =
            (Message::default(), Message::default(), Message::default(), Message::default());
        node.text(1, &self.node);
        identifier.message(1, &node).text(2, log);
        for entry in entries {
            list.bytes(1, entry);
        }
        out.message(1, &identifier).message(if tcp { 3 } else { 2 }, &list);
        out
    }
}

/// `Export…ServiceRequest`; those of logs and of traces are numbered alike.
fn otlp<'a>(resource: impl Iterator<Item = (&'a str, &'a str)>, entries: &[Vec<u8>]) -> Message {
    let (mut about, mut scope, mut group, mut out) =
        (Message::default(), Message::default(), Message::default(), Message::default());
    for (key, value) in resource {
        about.message(1, &attribute(key, value));
    }
    for entry in entries {
        scope.bytes(2, entry);
    }
    group.message(1, &about).message(2, &scope);
    out.message(1, &group);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{NodeLabels, Telemetry, Value};

    #[test]
    fn what_does_not_fit_is_counted() {
        let telemetry = Telemetry::new(NodeLabels::default());
        let outbox = Outbox::new(telemetry.process.clone(), "n".to_owned());
        let speaks = Speaks::Zipkin("/spans".to_owned());
        let target = Arc::new(Target { cluster: "c".into(), authority: "a".to_owned(), speaks });
        for _ in 0..3 {
            outbox.put(&target, vec![b'1'; FULL / 2]);
        }
        let parcels = outbox.take();
        assert_eq!((parcels.len(), parcels[0].entries), (1, 2));
        assert!(parcels[0].body.starts_with(b"[1") && parcels[0].body.ends_with(b"1]"));
        let dropped = telemetry.process.samples().into_iter().find(|s| s.name == "telemetry_dropped_total").unwrap();
        assert_eq!(dropped.value, Value::Counter(1));
        assert!(outbox.take().is_empty());
    }
}
