//! What the process counts as a whole, behind the `metrics` facade: rare events, from any thread.
//!
//! The facade's handles cost twice a plain atomic and its macros a lookup, so requests are counted in
//! [`super::Shard`]s instead; this recorder takes everything else, libraries included.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ::metrics::{CounterFn, GaugeFn, HistogramFn, Key, KeyName, Label, Level, Metadata, SharedString, Unit};

use super::expose::{Sample, Value};
use super::histogram::{Histogram, Merged};
use super::metrics::lock;

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

/// A recorder of the `metrics` crate. Clones share what they record.
#[derive(Debug, Clone, Default)]
pub struct Recorder(Arc<Mutex<BTreeMap<Key, Entry>>>);

#[derive(Debug, Clone)]
enum Entry {
    Counter(Arc<Plain>),
    Gauge(Arc<Float>),
    Histogram(Arc<Rounded>),
}

#[derive(Debug, Default)]
struct Plain(AtomicU64);

impl CounterFn for Plain {
    fn increment(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }
    fn absolute(&self, value: u64) {
        self.0.fetch_max(value, Ordering::Relaxed);
    }
}

/// Bits of an `f64`, as the facade speaks floats.
#[derive(Debug, Default)]
struct Float(AtomicU64);

impl Float {
    fn change(&self, change: impl Fn(f64) -> f64) {
        let update = |bits| Some(change(f64::from_bits(bits)).to_bits());
        // It never declines, so there is nothing to learn from the answer.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
    }
}

impl GaugeFn for Float {
    fn increment(&self, value: f64) {
        self.change(|now| now + value);
    }
    fn decrement(&self, value: f64) {
        self.change(|now| now - value);
    }
    fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Rounded(Histogram);

impl HistogramFn for Rounded {
    fn record(&self, value: f64) {
        self.0.record(value.max(0.0).round() as u64);
    }
}

impl ::metrics::Recorder for Recorder {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> ::metrics::Counter {
        let new = || Entry::Counter(Arc::default());
        match lock(&self.0).entry(key.clone()).or_insert_with(new) {
            Entry::Counter(cell) => ::metrics::Counter::from_arc(Arc::clone(cell)),
            Entry::Gauge(_) | Entry::Histogram(_) => ::metrics::Counter::noop(),
        }
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> ::metrics::Gauge {
        let new = || Entry::Gauge(Arc::default());
        match lock(&self.0).entry(key.clone()).or_insert_with(new) {
            Entry::Gauge(cell) => ::metrics::Gauge::from_arc(Arc::clone(cell)),
            Entry::Counter(_) | Entry::Histogram(_) => ::metrics::Gauge::noop(),
        }
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> ::metrics::Histogram {
        let new = || Entry::Histogram(Arc::default());
        match lock(&self.0).entry(key.clone()).or_insert_with(new) {
            Entry::Histogram(cell) => ::metrics::Histogram::from_arc(Arc::clone(cell)),
            Entry::Counter(_) | Entry::Gauge(_) => ::metrics::Histogram::noop(),
        }
    }
}

impl Recorder {
    /// Everything recorded. The instance of a sample is its labels in Prometheus form.
    pub fn samples(&self) -> Vec<Sample> {
        let sample = |(key, entry): (&Key, &Entry)| Sample {
            scope: "",
            instance: label_text(key.labels()).into(),
            name: key.name().to_owned().into(),
            value: match entry {
                Entry::Counter(cell) => Value::Counter(cell.0.load(Ordering::Relaxed)),
                Entry::Gauge(cell) => Value::Gauge(f64::from_bits(cell.0.load(Ordering::Relaxed)).round() as i64),
                Entry::Histogram(cell) => {
                    let mut merged = Merged::default();
                    merged.add(&cell.0);
                    Value::Histogram(Box::new(merged))
                }
            },
        };
        lock(&self.0).iter().map(sample).collect()
    }
}

fn label_text<'a>(labels: impl Iterator<Item = &'a Label>) -> String {
    let mut out = String::new();
    for label in labels {
        super::labels::push_label(&mut out, label.key(), label.value());
    }
    out
}

/// Typed handles of the process.
#[derive(Clone)]
pub struct Process {
    recorder: Recorder,
    panics: ::metrics::Counter,
    log_dropped: ::metrics::Counter,
    log_failed: ::metrics::Counter,
    export_dropped: ::metrics::Counter,
    config_updates: ::metrics::Counter,
    config_version: ::metrics::Gauge,
    config_kept: ::metrics::Gauge,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process").field("recorder", &self.recorder).finish_non_exhaustive()
    }
}

impl Process {
    pub(super) fn new() -> Self {
        use ::metrics::Recorder as _;
        let recorder = Recorder::default();
        let counter = |name: &'static str| recorder.register_counter(&Key::from_static_name(name), &METADATA);
        Self {
            panics: counter("panics_total"),
            log_dropped: counter("access_log_dropped_total"),
            log_failed: counter("access_log_write_errors_total"),
            export_dropped: counter("telemetry_dropped_total"),
            config_updates: counter("config_updates_total"),
            config_version: recorder.register_gauge(&Key::from_static_name("config_version"), &METADATA),
            config_kept: recorder.register_gauge(&Key::from_static_name("config_last_good_served"), &METADATA),
            recorder,
        }
    }

    /// Makes libraries that use the facade record here too. `false`: another recorder was there first.
    pub fn install(&self) -> bool {
        ::metrics::set_global_recorder(self.recorder.clone()).is_ok()
    }

    /// A task panicked: a bug, and one connection or request lost.
    pub fn panicked(&self) {
        self.panics.increment(1);
    }

    /// Log records were dropped because the writer could not keep up.
    pub fn log_dropped(&self, records: u64) {
        self.log_dropped.increment(records);
    }

    /// Entries for collectors were dropped: there were too many, or the collector did not take them.
    pub fn export_dropped(&self, entries: u64) {
        self.export_dropped.increment(entries);
    }

    /// A log could not be written.
    pub fn log_failed(&self) {
        self.log_failed.increment(1);
    }

    /// A configuration was published. `kept`: it is that of an earlier process, for want of a control plane.
    pub fn published(&self, version: u64, kept: bool) {
        self.config_updates.increment(1);
        self.config_version.set(version as f64);
        self.config_kept.set(f64::from(u8::from(kept)));
    }

    /// How many objects of the configuration in force are not served as said, by type: `config_unsupported_total{type}`
    /// for what has no effect and `config_rejected{type}` for what was refused. Both are gauges over the present
    /// configuration; a type that is no longer there reads 0.
    pub fn unserved(&self, unsupported: &BTreeMap<String, u64>, rejected: &BTreeMap<String, u64>) {
        use ::metrics::Recorder as _;
        for (name, counts) in [("config_unsupported_total", unsupported), ("config_rejected", rejected)] {
            for (key, entry) in lock(&self.recorder.0).iter() {
                if let Entry::Gauge(cell) = entry
                    && key.name() == name
                {
                    cell.set(0.0);
                }
            }
            for (kind, count) in counts {
                let key = Key::from_parts(name, vec![Label::new("type", kind.clone())]);
                self.recorder.register_gauge(&key, &METADATA).set(*count as f64);
            }
        }
    }

    /// Everything recorded.
    pub fn samples(&self) -> Vec<Sample> {
        self.recorder.samples()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(process: &Process, name: &str, labels: &str) -> Option<Value> {
        process.samples().into_iter().find(|s| s.name == name && &*s.instance == labels).map(|s| s.value)
    }

    #[test]
    fn handles_and_facade_record_in_one_place() {
        let process = Process::new();
        process.panicked();
        process.published(7, false);
        ::metrics::with_local_recorder(&process.recorder, || {
            ::metrics::counter!("panics_total").increment(2);
            ::metrics::histogram!("lag_ms", "worker" => "0").record(3.2);
        });
        assert_eq!(read(&process, "panics_total", ""), Some(Value::Counter(3)));
        assert_eq!(read(&process, "config_version", ""), Some(Value::Gauge(7)));
        let Some(Value::Histogram(lag)) = read(&process, "lag_ms", "worker=\"0\"") else { panic!("a histogram") };
        assert_eq!((lag.count(), lag.sum), (1, 3));
    }

    #[test]
    fn what_is_unserved_follows_the_present_configuration() {
        let process = Process::new();
        let one = BTreeMap::from([("EnvoyFilter".to_owned(), 2)]);
        process.unserved(&one, &BTreeMap::new());
        assert_eq!(read(&process, "config_unsupported_total", "type=\"EnvoyFilter\""), Some(Value::Gauge(2)));
        process.unserved(&BTreeMap::new(), &one);
        assert_eq!(read(&process, "config_unsupported_total", "type=\"EnvoyFilter\""), Some(Value::Gauge(0)));
        assert_eq!(read(&process, "config_rejected", "type=\"EnvoyFilter\""), Some(Value::Gauge(2)));
    }
}
