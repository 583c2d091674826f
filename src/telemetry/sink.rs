//! From workers' buffers to files, by one writer thread.
//!
//! A worker appends to its own buffer under a lock that the writer takes only to swap the full buffer for an empty one,
//! so logging never waits for a disk or a pipe. The writer wakes every second and whenever a buffer passes 64 KB. A
//! buffer that has grown to 1 MB because the writer is stuck takes no more: records are dropped and counted.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::access_log::{AccessLogs, LogShape, STDOUT, SaidLog, To, canonical_path};
use super::attributes::Facts;
use super::json_log;
use super::metrics::{Telemetry, lock};
use super::outbox::Outbox;
use super::record::{Record, RecordKind};
use super::tracer::{SpanContext, SpanNames, Tracer};

/// Buffered bytes that wake the writer.
const FLUSH_AT: usize = 64 << 10;

/// Buffered bytes past which records are dropped: about 3 000 lines for each worker and file.
const FULL: usize = 1 << 20;

/// A buffer that grew beyond this is given back.
const KEEP: usize = 4 * FLUSH_AT;

/// The longest that a line waits in its buffer.
const INTERVAL: Duration = Duration::from_secs(1);

/// What is logged beside what the configuration says.
#[derive(Debug, Clone, Default)]
pub struct LogOptions {
    /// A file (or `-`) for the JSON record of everything (`--access-log`).
    pub record: Option<String>,
    /// A text format, written to standard output for what has no log configured (file mode).
    pub default_text: Option<String>,
}

/// The owner of the writer thread. Dropping it writes what is buffered and ends the thread.
#[derive(Debug)]
pub struct Logs {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    record: Option<Arc<str>>,
    default: AccessLogs,
    workers: Mutex<Vec<Arc<Mutex<Vec<Lane>>>>>,
    files: Mutex<BTreeMap<Arc<str>, Target>>,
    telemetry: Arc<Telemetry>,
    stop: AtomicBool,
    reopen: AtomicBool,
    writer: Mutex<Option<thread::Thread>>,
}

/// One worker's lines for one file.
#[derive(Debug)]
struct Lane {
    path: Arc<str>,
    bytes: Vec<u8>,
    /// What was written last, emptied: two buffers take turns, so that neither is grown anew.
    spare: Vec<u8>,
    dropped: u64,
}

/// An open file.
#[derive(Debug)]
enum Target {
    Stdout,
    Stderr,
    File(File),
}

impl Target {
    /// Standard output is used as it is: opening it by path fails where it belongs to another user.
    fn open(path: &str) -> io::Result<Self> {
        match path {
            STDOUT => Ok(Self::Stdout),
            "/dev/stderr" => Ok(Self::Stderr),
            _ => OpenOptions::new().create(true).append(true).open(path).map(Self::File),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()
            }
            Self::Stderr => io::stderr().lock().write_all(bytes),
            Self::File(file) => file.write_all(bytes),
        }
    }
}

impl Logs {
    /// Starts the writer. Fails when the record's file cannot be opened or no thread can be started.
    pub fn start(options: LogOptions, telemetry: &Arc<Telemetry>) -> io::Result<Self> {
        let default = options.default_text.as_deref().map(|format| SaidLog {
            path: STDOUT,
            shape: LogShape::Text(format),
            omit_empty: false,
            filter: None,
        });
        let record = options.record.as_deref().map(|path| Arc::<str>::from(canonical_path(path)));
        let mut files = BTreeMap::new();
        if let Some(path) = &record {
            files.insert(Arc::clone(path), Target::open(path)?);
        }
        let shared = Arc::new(Shared {
            record,
            default: AccessLogs::compile(default).0,
            workers: Mutex::default(),
            files: Mutex::new(files),
            telemetry: Arc::clone(telemetry),
            stop: AtomicBool::new(false),
            reopen: AtomicBool::new(false),
            writer: Mutex::default(),
        });
        let of_thread = Arc::clone(&shared);
        let writer = thread::Builder::new().name("access-log".to_owned()).spawn(move || of_thread.run())?;
        *lock(&shared.writer) = Some(writer.thread().clone());
        Ok(Self { shared, writer: Some(writer) })
    }

    /// A sink for one more worker. Clones share its buffer.
    pub fn sink(&self) -> LogSink {
        let lanes = Arc::default();
        lock(&self.shared.workers).push(Arc::clone(&lanes));
        let telemetry = &self.shared.telemetry;
        LogSink {
            outbox: Arc::new(Outbox::new(telemetry.process.clone(), telemetry.node().id.clone())),
            shared: Arc::clone(&self.shared),
            lanes,
            writer: self.writer.as_ref().map(|w| w.thread().clone()),
        }
    }

    /// Writes what is buffered now. Waits for the files; not for workers.
    pub fn flush(&self) {
        self.shared.flush();
    }

    /// Opens the files anew at the next write (after rotation).
    pub fn reopen(&self) {
        self.shared.reopen.store(true, Ordering::Relaxed);
        self.shared.wake();
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.wake();
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has nothing to say that the panic hook has not said.
            let _ = writer.join();
        }
        self.shared.flush();
    }
}

impl Shared {
    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            thread::park_timeout(INTERVAL);
            self.flush();
        }
    }

    fn wake(&self) {
        if let Some(writer) = &*lock(&self.writer) {
            writer.unpark();
        }
    }

    fn flush(&self) {
        let mut files = lock(&self.files);
        if self.reopen.swap(false, Ordering::Relaxed) {
            files.clear();
        }
        let workers = lock(&self.workers).clone();
        for lanes in &workers {
            let count = lock(lanes).len();
            for at in 0..count {
                let (path, mut bytes, dropped) = lock(lanes)[at].take();
                self.telemetry.process.log_dropped(dropped);
                if !bytes.is_empty()
                    && let Err(error) = write(&mut files, &path, &bytes)
                {
                    files.remove(&path);
                    self.telemetry.process.log_failed();
                    tracing::warn!(path = &*path, %error, "access log lines are lost");
                }
                if bytes.capacity() <= KEEP {
                    bytes.clear();
                    lock(lanes)[at].spare = bytes;
                }
            }
        }
        // A worker that has ended leaves an empty buffer that nobody but us holds.
        drop(workers);
        lock(&self.workers).retain(|lanes| Arc::strong_count(lanes) > 1 || lock(lanes).iter().any(Lane::has_lines));
    }
}

impl Lane {
    fn has_lines(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// The lines so far, for the spare buffer.
    fn take(&mut self) -> (Arc<str>, Vec<u8>, u64) {
        let bytes = std::mem::replace(&mut self.bytes, std::mem::take(&mut self.spare));
        (Arc::clone(&self.path), bytes, std::mem::take(&mut self.dropped))
    }
}

fn write(files: &mut BTreeMap<Arc<str>, Target>, path: &Arc<str>, bytes: &[u8]) -> io::Result<()> {
    if !files.contains_key(path) {
        files.insert(Arc::clone(path), Target::open(path)?);
    }
    files.get_mut(path).map_or(Ok(()), |target| target.write(bytes))
}

/// One worker's way into the logs.
#[derive(Debug, Clone)]
pub struct LogSink {
    shared: Arc<Shared>,
    lanes: Arc<Mutex<Vec<Lane>>>,
    writer: Option<thread::Thread>,
    /// For collectors.
    outbox: Arc<Outbox>,
}

impl LogSink {
    /// Whether a record would be written anywhere: who builds records may spare the work.
    pub fn wants(&self, logs: &AccessLogs) -> bool {
        !logs.is_empty() || self.shared.record.is_some() || !self.shared.default.is_empty()
    }

    /// Writes a record to the logs of its chain or listener, and to those that take everything.
    pub fn log(&self, record: &Record<'_>, logs: &AccessLogs) {
        let logs = if logs.is_empty() && is_telling(record) { &self.shared.default } else { logs };
        let mut lanes = lock(&self.lanes);
        let facts = Facts { record, node: self.shared.telemetry.node() };
        for log in logs.wanted(&facts) {
            match &log.to {
                To::File(file) => self.append(&mut lanes, &file.path, |out| file.write(&facts, out)),
                To::Collector(remote) => {
                    if let Some(entry) = remote.encode(&facts) {
                        self.outbox.put(&remote.target, entry);
                    }
                }
            }
        }
        if let Some(path) = &self.shared.record {
            self.append(&mut lanes, path, |out| json_log::write(record, out));
        }
    }

    /// What waits for collectors on this worker.
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// Reports a span.
    pub fn span(&self, tracer: &Tracer, context: &SpanContext, record: &Record<'_>, names: SpanNames<'_>) {
        let facts = Facts { record, node: self.shared.telemetry.node() };
        let (target, span) = tracer.encode(context, &facts, names);
        self.outbox.put(target, span);
    }

    fn append(&self, lanes: &mut Vec<Lane>, path: &Arc<str>, write: impl FnOnce(&mut Vec<u8>)) {
        let found = lanes.iter().position(|lane| Arc::ptr_eq(&lane.path, path) || lane.path == *path);
        let at = found.unwrap_or_else(|| {
            lanes.push(Lane { path: Arc::clone(path), bytes: Vec::new(), spare: Vec::new(), dropped: 0 });
            lanes.len() - 1
        });
        let lane = &mut lanes[at];
        let before = lane.bytes.len();
        if before >= FULL {
            lane.dropped += 1;
            return;
        }
        write(&mut lane.bytes);
        if before < FLUSH_AT
            && lane.bytes.len() >= FLUSH_AT
            && let Some(writer) = &self.writer
        {
            writer.unpark();
        }
    }
}

/// Connections that ended before they were served are in the default text only when something was wrong.
fn is_telling(record: &Record<'_>) -> bool {
    record.kind != RecordKind::Conn || !record.flags.is_empty() || !record.downstream_failure.is_empty()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::error::Flags;
    use crate::telemetry::{NodeLabels, Value};

    fn request<'a>() -> Record<'a> {
        Record { code: 200, path: "/", ..Record::new(RecordKind::Http, SystemTime::UNIX_EPOCH, Duration::ZERO) }
    }

    fn start(record: &std::path::Path) -> (Logs, Arc<Telemetry>) {
        let telemetry = Telemetry::new(NodeLabels::default());
        let options = LogOptions { record: Some(record.to_str().unwrap().to_owned()), default_text: None };
        (Logs::start(options, &telemetry).unwrap(), telemetry)
    }

    fn lines(path: &std::path::Path) -> Vec<String> {
        std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_record_goes_to_its_logs_and_to_the_record_of_everything() {
        let dir = tempfile::tempdir().unwrap();
        let (everything, own) = (dir.path().join("all.json"), dir.path().join("own.log"));
        let (logs, _) = start(&everything);
        let said = SaidLog {
            path: own.to_str().unwrap(),
            shape: LogShape::Text("%RESPONSE_CODE%\n"),
            omit_empty: false,
            filter: None,
        };
        let (configured, _) = AccessLogs::compile([said]);
        let (one, two) = (logs.sink(), logs.sink());
        one.log(&request(), &configured);
        two.log(&Record { code: 503, ..request() }, &configured);
        two.log(&Record { code: 404, ..request() }, &AccessLogs::default());
        logs.flush();
        assert_eq!(lines(&own), ["200", "503"]);
        assert_eq!(lines(&everything).len(), 3);
        one.log(&request(), &configured);
        drop(logs);
        assert_eq!(lines(&own).len(), 3, "what is buffered at the end is written");
    }

    #[test]
    fn rotation_goes_on_in_a_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, rotated) = (dir.path().join("all.json"), dir.path().join("all.json.1"));
        let (logs, _) = start(&path);
        let sink = logs.sink();
        sink.log(&request(), &AccessLogs::default());
        logs.flush();
        std::fs::rename(&path, &rotated).unwrap();
        logs.reopen();
        sink.log(&request(), &AccessLogs::default());
        sink.log(&request(), &AccessLogs::default());
        drop(logs);
        // The writer may have run between the two lines, or not.
        assert_eq!(lines(&path).len() + lines(&rotated).len(), 3);
        assert!(!lines(&path).is_empty());
    }

    #[test]
    fn what_cannot_be_written_is_counted() {
        let telemetry = Telemetry::new(NodeLabels::default());
        let logs = Logs::start(LogOptions::default(), &telemetry).unwrap();
        let said = SaidLog { path: "/nowhere/at/all", shape: LogShape::Default, omit_empty: false, filter: None };
        let sink = logs.sink();
        sink.log(&request(), &AccessLogs::compile([said]).0);
        drop(logs);
        let failed =
            telemetry.process.samples().into_iter().find(|s| s.name == "access_log_write_errors_total").unwrap();
        assert_eq!(failed.value, Value::Counter(1));
        assert!(
            Logs::start(LogOptions { record: Some("/nowhere/x".to_owned()), ..LogOptions::default() }, &telemetry)
                .is_err()
        );
    }

    #[test]
    fn a_full_buffer_drops_and_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("all.json");
        let (logs, telemetry) = start(&path);
        let sink = logs.sink();
        let long = "x".repeat(FULL / 4);
        // A stuck writer holds the files.
        let files = lock(&logs.shared.files);
        for _ in 0..8 {
            sink.log(&Record { path: &long, ..request() }, &AccessLogs::default());
        }
        drop(files);
        logs.flush();
        let dropped = telemetry.process.samples().into_iter().find(|s| s.name == "access_log_dropped_total").unwrap();
        let Value::Counter(dropped) = dropped.value else { panic!("a counter") };
        assert_eq!(lines(&path).len() as u64 + dropped, 8);
        assert!(dropped >= 3, "{dropped}");
    }

    #[test]
    fn the_default_text_skips_connections_without_trouble() {
        let conn = Record::new(RecordKind::Conn, SystemTime::UNIX_EPOCH, Duration::ZERO);
        assert!(!is_telling(&conn) && is_telling(&request()));
        assert!(is_telling(&Record { flags: Flags::NR, ..conn }));
        assert!(is_telling(&Record { downstream_failure: "no certificate", ..conn }));
    }
}
