//! Istio's standard metrics: one set of cells for each label set.
//!
//! Label sets are found by their small facts (cluster's service, peer, status, flags), not by their text, which is made
//! once. A hard cap bounds what strange peers and hosts can cost: past it, everything new counts in one series whose
//! labels read `overflow`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hashbrown::{Equivalent, HashMap};

use super::histogram::{Histogram, Merged};
use super::labels::{Labels, NodeLabels, Protocol, Reporter, Service, overflow_text, text};
use super::metrics::{Counter, lock};
use crate::error::Flags;

/// Most label sets of one kind on one worker: about 8 KB each with text, key and three histograms.
const CAP: usize = 2048;

/// Sizes and time of a request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sizes {
    /// From its first byte to the end of its response.
    pub duration: Duration,
    /// Bytes of the request, headers included.
    pub request_bytes: u64,
    /// Bytes of the response, headers included.
    pub response_bytes: u64,
}

/// Cells of one label set for requests.
#[derive(Debug, Default)]
pub(super) struct RequestSeries {
    /// Its samples are the requests.
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
}

impl RequestSeries {
    /// For whoever holds the cache's lock, which keeps other writers away.
    pub(super) fn record(&self, sizes: Sizes) {
        self.duration.record_alone(u64::try_from(sizes.duration.as_millis()).unwrap_or(u64::MAX));
        self.request_bytes.record_alone(sizes.request_bytes);
        self.response_bytes.record_alone(sizes.response_bytes);
    }

    fn total(&self) -> u64 {
        self.duration.count()
    }
}

/// Cells of one label set for TCP connections.
#[derive(Debug, Default)]
pub(super) struct TcpSeries {
    opened: Counter,
    closed: Counter,
    sent: Counter,
    received: Counter,
}

/// An open TCP connection in the metrics; dropped when it is closed.
#[derive(Debug)]
pub struct TcpReport(Arc<Series<TcpSeries>>);

impl TcpReport {
    pub(super) fn open(series: Arc<Series<TcpSeries>>) -> Self {
        series.cells.opened.inc();
        Self(series)
    }

    /// Bytes since the last call: `sent` to the client, `received` from it.
    pub fn bytes(&self, sent: u64, received: u64) {
        self.0.cells.sent.add(sent);
        self.0.cells.received.add(received);
    }
}

impl Drop for TcpReport {
    fn drop(&mut self) {
        self.0.cells.closed.inc();
    }
}

/// Cells with their label text.
#[derive(Debug)]
pub(super) struct Series<T> {
    text: Box<str>,
    cells: T,
}

/// Series of one worker by the facts of their labels.
#[derive(Debug)]
pub(super) struct Cache<T> {
    /// The worker's own; the reader never asks for this lock.
    by_facts: Mutex<Known<T>>,
    /// For the reader; the worker asks only when a series is new.
    all: Mutex<Vec<Arc<Series<T>>>>,
}

#[derive(Debug)]
struct Known<T> {
    series: HashMap<Owned, Arc<Series<T>>, foldhash::fast::RandomState>,
    /// By reporter.
    overflow: [Option<Arc<Series<T>>>; 2],
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        let known = Known { series: HashMap::default(), overflow: [None, None] };
        Self { by_facts: Mutex::new(known), all: Mutex::default() }
    }
}

impl<T: Default> Cache<T> {
    /// Calls `count` with the cells of these labels.
    pub(super) fn with(&self, labels: &Labels<'_>, node: &NodeLabels, count: impl FnOnce(&T)) {
        let essential = labels.essential();
        let mut known = lock(&self.by_facts);
        if let Some(series) = known.series.get(&essential) {
            return count(&series.cells);
        }
        count(&self.learn(&mut known, &essential, node).cells);
    }

    /// The cells of these labels, to keep.
    pub(super) fn handle(&self, labels: &Labels<'_>, node: &NodeLabels) -> Arc<Series<T>> {
        let essential = labels.essential();
        let mut known = lock(&self.by_facts);
        if let Some(series) = known.series.get(&essential) {
            return Arc::clone(series);
        }
        self.learn(&mut known, &essential, node)
    }

    fn learn(&self, known: &mut Known<T>, labels: &Labels<'_>, node: &NodeLabels) -> Arc<Series<T>> {
        let make = |text: String| {
            let series = Arc::new(Series { text: text.into(), cells: T::default() });
            lock(&self.all).push(Arc::clone(&series));
            series
        };
        if known.series.len() >= CAP {
            let slot = &mut known.overflow[labels.reporter as usize];
            return Arc::clone(slot.get_or_insert_with(|| make(overflow_text(labels))));
        }
        let series = make(text(labels, node));
        known.series.insert(Owned::new(labels), Arc::clone(&series));
        series
    }
}

/// [`Labels`] that own their texts, one behind the other.
#[derive(Debug)]
struct Owned {
    texts: Box<str>,
    /// Ends of the texts.
    ends: [u32; 8],
    has_service: bool,
    rest: (Reporter, Protocol, u16, Option<u32>, Flags),
}

impl Owned {
    fn new(labels: &Labels<'_>) -> Self {
        let service = labels.service.unwrap_or(Service { host: "", name: "", namespace: "" });
        let parts = [
            service.host,
            service.name,
            service.namespace,
            labels.cluster,
            labels.authority,
            labels.workload,
            labels.local_principal,
            labels.peer_principal,
        ];
        let mut end = 0;
        let ends = parts.map(|part| {
            end += part.len() as u32;
            end
        });
        Self {
            texts: parts.concat().into(),
            ends,
            has_service: labels.service.is_some(),
            rest: (labels.reporter, labels.protocol, labels.code, labels.grpc_status, labels.flags),
        }
    }

    fn part(&self, index: usize) -> &str {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.texts[start as usize..self.ends[index] as usize]
    }

    fn view(&self) -> Labels<'_> {
        let service = Service { host: self.part(0), name: self.part(1), namespace: self.part(2) };
        Labels {
            reporter: self.rest.0,
            protocol: self.rest.1,
            service: self.has_service.then_some(service),
            cluster: self.part(3),
            authority: self.part(4),
            workload: self.part(5),
            local_principal: self.part(6),
            peer_principal: self.part(7),
            code: self.rest.2,
            grpc_status: self.rest.3,
            flags: self.rest.4,
        }
    }
}

impl Hash for Owned {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.view().hash(state);
    }
}

impl PartialEq for Owned {
    fn eq(&self, other: &Self) -> bool {
        self.view() == other.view()
    }
}

impl Eq for Owned {}

impl Equivalent<Owned> for Labels<'_> {
    fn equivalent(&self, key: &Owned) -> bool {
        *self == key.view()
    }
}

type ByText<'a, T> = BTreeMap<&'a str, Vec<&'a T>>;

fn all<'a, T: 'a>(caches: impl Iterator<Item = &'a Cache<T>>) -> Vec<Arc<Series<T>>> {
    caches.flat_map(|cache| lock(&cache.all).clone()).collect()
}

fn by_text<T>(series: &[Arc<Series<T>>]) -> ByText<'_, T> {
    let mut out = ByText::new();
    for one in series {
        out.entry(&one.text).or_default().push(&one.cells);
    }
    out
}

fn counter<T>(out: &mut String, name: &str, series: &ByText<'_, T>, read: fn(&T) -> u64) {
    if series.is_empty() {
        return;
    }
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(out, "# TYPE {name} counter");
    for (text, cells) in series {
        let value: u64 = cells.iter().map(|cells| read(cells)).sum();
        let _ = writeln!(out, "{name}{{{text}}} {value}");
    }
}

fn histogram<T>(out: &mut String, name: &str, series: &ByText<'_, T>, read: fn(&T) -> &Histogram) {
    if series.is_empty() {
        return;
    }
    let _ = writeln!(out, "# TYPE {name} histogram");
    for (text, cells) in series {
        let mut merged = Merged::default();
        cells.iter().for_each(|cells| merged.add(read(cells)));
        super::expose::histogram_lines(out, name, text, &merged);
    }
}

/// The request families of all workers.
pub(super) fn expose_requests<'a>(caches: impl Iterator<Item = &'a Cache<RequestSeries>>, out: &mut String) {
    let series = all(caches);
    let series = by_text(&series);
    counter(out, "istio_requests_total", &series, RequestSeries::total);
    histogram(out, "istio_request_duration_milliseconds", &series, |s| &s.duration);
    histogram(out, "istio_request_bytes", &series, |s| &s.request_bytes);
    histogram(out, "istio_response_bytes", &series, |s| &s.response_bytes);
}

/// The TCP families of all workers.
pub(super) fn expose_tcp<'a>(caches: impl Iterator<Item = &'a Cache<TcpSeries>>, out: &mut String) {
    let series = all(caches);
    let series = by_text(&series);
    counter(out, "istio_tcp_connections_opened_total", &series, |s| s.opened.value());
    counter(out, "istio_tcp_connections_closed_total", &series, |s| s.closed.value());
    counter(out, "istio_tcp_sent_bytes_total", &series, |s| s.sent.value());
    counter(out, "istio_tcp_received_bytes_total", &series, |s| s.received.value());
}

#[cfg(test)]
#[path = "series_tests.rs"]
mod tests;
