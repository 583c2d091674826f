//! Istio's standard metrics: one set of cells for each label set.
//!
//! Label sets are found by their small facts (cluster's service, peer, status, flags), not by their text, which is made
//! once. A hard cap bounds what strange peers and hosts can cost: past it, everything new counts in one series whose
//! labels read `overflow`. Series that nothing was counted in for long can be forgotten.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hashbrown::{Equivalent, HashMap};
use tokio::time::Instant;

use super::histogram::{Histogram, Merged};
use super::labels::{ENDS, Labels, NodeLabels, Protocol, Reporter, Service, Tag, overflowed, tags, text};
use super::metrics::{Counter, lock};
use super::overrides::{Metric, Overrides, Values};
use super::peer::Peer;
use crate::error::Flags;

/// Most label sets of one kind on one worker: about 8 KB each with text, key and three histograms.
pub(super) const CAP: usize = 2048;

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

/// Cells that belong to families.
pub(super) trait Cells: Default {
    /// The families.
    const METRICS: &'static [Metric];
    /// Labels of how it ended are told.
    const OUTCOME: bool;
    /// A number that grows whenever something is counted.
    fn count(&self) -> u64;
}

/// Cells of one label set for requests.
#[derive(Debug, Default)]
pub(super) struct RequestSeries {
    /// Its samples are the requests.
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
}

impl Cells for RequestSeries {
    const METRICS: &'static [Metric] =
        &[Metric::RequestsTotal, Metric::RequestDuration, Metric::RequestBytes, Metric::ResponseBytes];
    const OUTCOME: bool = true;

    fn count(&self) -> u64 {
        self.duration.count()
    }
}

impl RequestSeries {
    /// For whoever holds the cache's lock, which keeps other writers away.
    pub(super) fn record(&self, sizes: Sizes) {
        self.duration.record_alone(u64::try_from(sizes.duration.as_millis()).unwrap_or(u64::MAX));
        self.request_bytes.record_alone(sizes.request_bytes);
        self.response_bytes.record_alone(sizes.response_bytes);
    }
}

/// Messages of gRPC streams.
#[derive(Debug, Default)]
pub(super) struct MessageSeries {
    pub(super) request: Counter,
    pub(super) response: Counter,
}

impl Cells for MessageSeries {
    const METRICS: &'static [Metric] = &[Metric::RequestMessages, Metric::ResponseMessages];
    const OUTCOME: bool = false;

    fn count(&self) -> u64 {
        self.request.value() + self.response.value()
    }
}

/// Cells of one label set for TCP connections.
#[derive(Debug, Default)]
pub(super) struct TcpSeries {
    opened: Counter,
    closed: Counter,
    live: Mutex<Live>,
}

/// What is open, so that bytes are known while they move: nobody has to report them from time to time.
#[derive(Debug, Default)]
struct Live {
    open: Vec<Option<Arc<dyn Moving>>>,
    free: Vec<usize>,
    /// Of connections that have ended.
    sent: u64,
    received: u64,
}

/// Bytes of a connection so far.
pub trait Moving: std::fmt::Debug + Send + Sync {
    /// Sent to the client, received from it.
    fn moved(&self) -> (u64, u64);
}

impl Cells for TcpSeries {
    const METRICS: &'static [Metric] = &[Metric::TcpOpened, Metric::TcpClosed, Metric::TcpSent, Metric::TcpReceived];
    const OUTCOME: bool = true;

    fn count(&self) -> u64 {
        let (sent, received) = self.moved();
        self.opened.value() + self.closed.value() + sent + received
    }
}

impl TcpSeries {
    fn moved(&self) -> (u64, u64) {
        let live = lock(&self.live);
        let open = live.open.iter().flatten().map(|connection| connection.moved());
        open.fold((live.sent, live.received), |(sent, received), (s, r)| (sent + s, received + r))
    }
}

/// An open TCP connection in the metrics; dropped when it is closed.
#[derive(Debug)]
pub struct TcpReport {
    series: Arc<Series<TcpSeries>>,
    place: usize,
}

impl TcpReport {
    pub(super) fn open(series: Arc<Series<TcpSeries>>, connection: Arc<dyn Moving>) -> Self {
        series.cells.opened.inc();
        let mut live = lock(&series.cells.live);
        let place = match live.free.pop() {
            Some(free) => {
                live.open[free] = Some(connection);
                free
            }
            None => {
                live.open.push(Some(connection));
                live.open.len() - 1
            }
        };
        drop(live);
        Self { series, place }
    }
}

impl Drop for TcpReport {
    fn drop(&mut self) {
        let mut live = lock(&self.series.cells.live);
        if let Some(connection) = live.open[self.place].take() {
            let (sent, received) = connection.moved();
            live.sent += sent;
            live.received += received;
            live.free.push(self.place);
        }
        self.series.cells.closed.inc();
    }
}

/// Cells with their label text.
#[derive(Debug)]
pub(super) struct Series<T> {
    /// The standard labels.
    text: Box<str>,
    /// Labels by family where configuration changes them; `None`: the family is left out.
    changed: Option<Box<[Option<Box<str>>]>>,
    pub(super) cells: T,
}

impl<T: Cells> Series<T> {
    fn new(mut standard: Vec<Tag<'_>>, changed: Option<(&Arc<Overrides>, &Values)>) -> Self {
        if !T::OUTCOME {
            standard.truncate(ENDS);
        }
        let changed = changed.map(|(overrides, values)| {
            let of = |metric: &Metric| Some(text(&overrides.apply(*metric, &standard, values)?).into());
            T::METRICS.iter().map(of).collect()
        });
        Self { text: text(&standard).into(), changed, cells: T::default() }
    }

    /// Labels in a family; `None`: it is left out.
    fn text(&self, metric: Metric) -> Option<&str> {
        let Some(changed) = &self.changed else { return Some(&self.text) };
        let at = T::METRICS.iter().position(|known| *known == metric)?;
        changed[at].as_deref()
    }
}

/// Series of one worker by the facts of their labels.
#[derive(Debug)]
pub(super) struct Cache<T> {
    /// The worker's own; others ask for this lock only to forget.
    by_facts: Mutex<Known<T>>,
    /// For the reader; the worker asks only when a series is new.
    all: Mutex<Vec<Seen<T>>>,
}

#[derive(Debug)]
struct Known<T> {
    series: HashMap<Owned, Arc<Series<T>>, foldhash::fast::RandomState>,
    /// By reporter.
    overflow: [Option<Arc<Series<T>>>; 2],
}

/// A series with what was in it when somebody last looked whether it is still used.
#[derive(Debug)]
struct Seen<T> {
    series: Arc<Series<T>>,
    count: u64,
    since: Option<Instant>,
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        let known = Known { series: HashMap::default(), overflow: [None, None] };
        Self { by_facts: Mutex::new(known), all: Mutex::default() }
    }
}

impl<T: Cells> Cache<T> {
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
        let keep = |series: Series<T>| {
            let series = Arc::new(series);
            lock(&self.all).push(Seen { series: Arc::clone(&series), count: 0, since: None });
            series
        };
        if known.series.len() >= CAP {
            let slot = &mut known.overflow[labels.reporter as usize];
            return Arc::clone(slot.get_or_insert_with(|| keep(Series::new(overflowed(labels), None))));
        }
        let series = keep(Series::new(tags(labels, node), labels.changed));
        known.series.insert(Owned::new(labels), Arc::clone(&series));
        series
    }

    /// Forgets series that nothing was counted in since `limit` ago, as far as was seen by calls of this. What is in use
    /// and what collects the overflow stays.
    pub(super) fn forget(&self, limit: Duration, now: Instant) {
        let mut known = lock(&self.by_facts);
        let mut all = lock(&self.all);
        let mut gone: Vec<Arc<Series<T>>> = Vec::new();
        all.retain_mut(|seen| {
            let count = seen.series.cells.count();
            let since = *seen.since.get_or_insert(now);
            if count != seen.count {
                seen.count = count;
                seen.since = Some(now);
                return true;
            }
            // One reference here, one in the map.
            let stays = now.saturating_duration_since(since) < limit || Arc::strong_count(&seen.series) > 2;
            if !stays {
                gone.push(Arc::clone(&seen.series));
            }
            stays
        });
        if !gone.is_empty() {
            known.series.retain(|_, series| !gone.iter().any(|gone| Arc::ptr_eq(gone, series)));
            for slot in &mut known.overflow {
                *slot = slot.take().filter(|series| !gone.iter().any(|gone| Arc::ptr_eq(gone, series)));
            }
        }
    }
}

/// [`Labels`] that own their texts, one behind the other.
#[derive(Debug)]
struct Owned {
    texts: Box<str>,
    /// Ends of the texts.
    ends: [u32; 7],
    has_service: bool,
    peer: Option<Arc<Peer>>,
    changed: Option<(Arc<Overrides>, Values)>,
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
            peer: labels.peer.cloned(),
            changed: labels.changed.map(|(overrides, values)| (Arc::clone(overrides), values.clone())),
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
            peer: self.peer.as_ref(),
            local_principal: self.part(5),
            peer_principal: self.part(6),
            code: self.rest.2,
            grpc_status: self.rest.3,
            flags: self.rest.4,
            changed: self.changed.as_ref().map(|(overrides, values)| (overrides, values)),
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
    caches.flat_map(|cache| lock(&cache.all).iter().map(|seen| Arc::clone(&seen.series)).collect::<Vec<_>>()).collect()
}

fn by_text<T: Cells>(series: &[Arc<Series<T>>], metric: Metric) -> ByText<'_, T> {
    let mut out = ByText::new();
    for one in series {
        if let Some(text) = one.text(metric) {
            out.entry(text).or_default().push(&one.cells);
        }
    }
    out
}

fn counter<T: Cells>(out: &mut String, metric: Metric, series: &[Arc<Series<T>>], read: fn(&T) -> u64) {
    let (series, name) = (by_text(series, metric), metric.family());
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

fn histogram<T: Cells>(out: &mut String, metric: Metric, series: &[Arc<Series<T>>], read: fn(&T) -> &Histogram) {
    let (series, name) = (by_text(series, metric), metric.family());
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
    counter(out, Metric::RequestsTotal, &series, Cells::count);
    histogram(out, Metric::RequestDuration, &series, |s| &s.duration);
    histogram(out, Metric::RequestBytes, &series, |s| &s.request_bytes);
    histogram(out, Metric::ResponseBytes, &series, |s| &s.response_bytes);
}

/// The message families of all workers.
pub(super) fn expose_messages<'a>(caches: impl Iterator<Item = &'a Cache<MessageSeries>>, out: &mut String) {
    let series = all(caches);
    counter(out, Metric::RequestMessages, &series, |s| s.request.value());
    counter(out, Metric::ResponseMessages, &series, |s| s.response.value());
}

/// The TCP families of all workers.
pub(super) fn expose_tcp<'a>(caches: impl Iterator<Item = &'a Cache<TcpSeries>>, out: &mut String) {
    let series = all(caches);
    counter(out, Metric::TcpOpened, &series, |s| s.opened.value());
    counter(out, Metric::TcpClosed, &series, |s| s.closed.value());
    counter(out, Metric::TcpSent, &series, |s| s.moved().0);
    counter(out, Metric::TcpReceived, &series, |s| s.moved().1);
}

#[cfg(test)]
#[path = "series_tests.rs"]
mod tests;
