//! What happened, counted and printed: metrics, access logs, exposition.
//!
//! It decides names, labels and formats, and never what is served. Counting costs an atomic addition on a line that
//! belongs to one worker; logging costs a formatted append to a buffer of that worker. Nothing here waits for a disk, a
//! pipe or a scraper: what cannot be written in time is dropped and counted.
//!
//! ```ignore
//! let telemetry = Telemetry::new(NodeLabels::default());
//! let logs = Logs::start(LogOptions::default(), &telemetry)?;
//! let (shard, log) = (telemetry.shard(), logs.sink()); // one pair for each worker
//! let cluster = shard.cluster("outbound|80||app.ns.svc.cluster.local"); // once for each cluster
//! cluster.rq_total.inc();
//! shard.record_request(&labels, sizes);
//! log.log(&record, &chain.access_log);
//! ```

mod access_log;
mod attributes;
mod cel;
mod cel_parse;
mod clock;
pub mod control_plane;
mod custom_series;
mod expose;
mod format;
mod histogram;
mod json_log;
mod labels;
pub mod logging;
mod metrics;
mod operator;
mod outbox;
mod overrides;
mod peer;
mod record;
mod recorder;
mod remote_log;
mod series;
mod sink;
mod tracer;
mod wire;

pub use access_log::{AccessLogs, Compare, LogFilter, LogShape, RemoteShape, SaidLog, SaidRemote};
pub use attributes::Facts;
pub use cel::{CelValue, Expression, Undefined};
pub use expose::{Sample, StatsQuery, Value, render_json, render_prometheus, render_text};
pub use format::{Format, Operator, Segment};
pub use histogram::Histogram;
pub use labels::{Labels, NodeLabels, Protocol, Reporter, Service};
pub use metrics::{
    ClusterMetrics, Counter, ExchangeMetrics, Gauge, HttpMetrics, ListenerMetrics, Shard, TcpMetrics, Telemetry,
};
pub use outbox::{Outbox, Parcel, Speaks, Target};
pub use overrides::{Metric, Overrides, Stats, Values};
pub use peer::{Additional, Peer, Peers};
pub use record::{Captured, Headers, Record, RecordKind};
pub use recorder::{Process, Recorder};
pub use series::{Moving, Sizes, TcpReport};
pub use sink::{LogOptions, LogSink, Logs};
pub use tracer::{SpanContext, SpanNames, Tracer};
