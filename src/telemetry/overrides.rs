//! What `istio.stats` is told: metrics that are left out, labels that go, change or come, metrics of one's own.
//!
//! Order as in the filter: definitions first, then each entry of `metrics`; an entry without a name speaks of every metric.
//! Expressions are evaluated once for each request or connection that ends, and only where something was configured.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use serde_json::Value;

use super::attributes::Facts;
use super::cel::Expression;
use super::labels::{TAGS, Tag};

/// Istio's families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the families'")]
pub enum Metric {
    RequestsTotal,
    RequestDuration,
    RequestBytes,
    ResponseBytes,
    RequestMessages,
    ResponseMessages,
    TcpOpened,
    TcpClosed,
    TcpSent,
    TcpReceived,
}

/// Every family, by its number.
const METRICS: [(Metric, &str); 10] = [
    (Metric::RequestsTotal, "istio_requests_total"),
    (Metric::RequestDuration, "istio_request_duration_milliseconds"),
    (Metric::RequestBytes, "istio_request_bytes"),
    (Metric::ResponseBytes, "istio_response_bytes"),
    (Metric::RequestMessages, "istio_request_messages_total"),
    (Metric::ResponseMessages, "istio_response_messages_total"),
    (Metric::TcpOpened, "istio_tcp_connections_opened_total"),
    (Metric::TcpClosed, "istio_tcp_connections_closed_total"),
    (Metric::TcpSent, "istio_tcp_sent_bytes_total"),
    (Metric::TcpReceived, "istio_tcp_received_bytes_total"),
];

impl Metric {
    /// The family's name.
    pub const fn family(self) -> &'static str {
        METRICS[self as usize].1
    }

    /// By the name that configuration uses, the family's without `istio_`.
    fn named(name: &str) -> Option<Self> {
        METRICS.iter().find(|(_, family)| family.strip_prefix("istio_") == Some(name)).map(|(metric, _)| *metric)
    }
}

/// An `istio.stats` filter, compiled.
#[derive(Debug, Default, PartialEq)]
pub struct Stats {
    /// The request's host never names a destination.
    pub disable_host_header_fallback: bool,
    /// How often messages of a gRPC stream are reported while it goes on.
    pub reporting: Option<Duration>,
    /// Series that nothing was counted in for so long are forgotten.
    pub rotation: Option<Duration>,
    /// Changes; `None`: the standard labels.
    pub overrides: Option<Arc<Overrides>>,
}

/// Changes of metrics.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    expressions: Vec<Expression>,
    metrics: [Change; METRICS.len()],
    custom: Vec<Custom>,
    /// Hash of the configuration.
    id: u64,
}

/// Changes of one metric.
#[derive(Debug, Default, PartialEq, Eq)]
struct Change {
    dropped: bool,
    /// By number of the standard label: another value, or none.
    tags: BTreeMap<usize, Option<usize>>,
    /// Further labels, in order.
    added: Vec<(String, usize)>,
}

/// A metric of one's own.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Custom {
    pub(super) name: String,
    pub(super) kind: CustomKind,
    value: usize,
    labels: Vec<(String, usize)>,
}

/// What is done with the values of a metric of one's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CustomKind {
    Counter,
    Gauge,
    Histogram,
}

/// Values of a configuration's expressions; one for each.
pub type Values = Vec<Box<str>>;

impl Stats {
    /// Compiles `stats.PluginConfig` (its canonical JSON). The second value names what is left out and why.
    pub fn compile(config: &Value) -> (Self, Vec<String>) {
        let mut left_out = Vec::new();
        let list = |key: &str| config[key].as_array().map_or(&[][..], Vec::as_slice);
        let overrides = (!list("metrics").is_empty() || !list("definitions").is_empty()).then(|| {
            let mut build = Build { out: Overrides::default(), left_out: &mut left_out };
            list("definitions").iter().for_each(|said| build.define(said));
            list("metrics").iter().for_each(|said| build.change(said));
            build.out.id = foldhash_of(&config.to_string());
            Arc::new(build.out)
        });
        let rotation = config["rotation_interval"].as_str().and_then(seconds).filter(|interval| !interval.is_zero());
        let disable_host_header_fallback = config["disable_host_header_fallback"] == true;
        let reporting = config["tcp_reporting_duration"].as_str().and_then(seconds).filter(|every| !every.is_zero());
        (Self { disable_host_header_fallback, reporting, rotation, overrides }, left_out)
    }

    /// Request and response headers that expressions read.
    pub fn headers(&self) -> (Vec<HeaderName>, Vec<HeaderName>) {
        let mut out = (Vec::new(), Vec::new());
        for expression in self.overrides.iter().flat_map(|o| &o.expressions) {
            let (request, response) = expression.headers();
            out.0.extend(request);
            out.1.extend(response);
        }
        out
    }
}

impl std::hash::Hash for Overrides {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write_u64(self.id);
    }
}

impl Overrides {
    /// What the expressions say now; `unknown` where there is no value.
    pub fn evaluate(&self, facts: &Facts<'_>) -> Values {
        let print = |expression: &Expression| {
            let mut out = String::new();
            match expression.value(facts) {
                Ok(value) => value.print(&mut out),
                Err(_) => out.push_str("unknown"),
            }
            out.into()
        };
        self.expressions.iter().map(print).collect()
    }

    /// The labels of a family; `None`: it is left out.
    pub(super) fn apply<'a>(
        &'a self,
        metric: Metric,
        tags: &[Tag<'a>],
        values: &'a [Box<str>],
    ) -> Option<Vec<Tag<'a>>> {
        let change = &self.metrics[metric as usize];
        if change.dropped {
            return None;
        }
        let standard = tags.iter().filter_map(|(name, value)| {
            let number = TAGS.iter().position(|tag| tag == name);
            match number.and_then(|number| change.tags.get(&number)) {
                None => Some((*name, value.clone())),
                Some(None) => None,
                Some(Some(id)) => Some((*name, value_of(values, *id).into())),
            }
        });
        let added = change.added.iter().map(|(name, id)| (name.as_str(), value_of(values, *id).into()));
        Some(standard.chain(added).collect())
    }

    /// Metrics of one's own with their labels and values.
    pub(super) fn custom<'a>(
        &'a self,
        values: &'a [Box<str>],
    ) -> impl Iterator<Item = (&'a Custom, Vec<Tag<'a>>, u64)> {
        self.custom.iter().map(move |custom| {
            let tags = custom.labels.iter().map(|(name, id)| (name.as_str(), value_of(values, *id).into())).collect();
            (custom, tags, value_of(values, custom.value).parse().unwrap_or(0))
        })
    }
}

/// Adds a label, or gives it another value: none may come twice.
fn put(labels: &mut Vec<(String, usize)>, name: &str, id: usize) {
    match labels.iter_mut().find(|(known, _)| known == name) {
        Some((_, value)) => *value = id,
        None => labels.push((name.to_owned(), id)),
    }
}

fn value_of(values: &[Box<str>], id: usize) -> &str {
    values.get(id).map_or("unknown", |value| value)
}

fn foldhash_of(text: &str) -> u64 {
    use std::hash::BuildHasher as _;
    foldhash::quality::FixedState::default().hash_one(text)
}

/// `10s`, `0.500s`
fn seconds(text: &str) -> Option<Duration> {
    text.strip_suffix('s')?.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
}

struct Build<'a> {
    out: Overrides,
    left_out: &'a mut Vec<String>,
}

impl Build<'_> {
    fn expression(&mut self, text: &str) -> Option<usize> {
        if let Some(known) = self.out.expressions.iter().position(|known| known.text() == text) {
            return Some(known);
        }
        match Expression::compile(text) {
            Ok(expression) => {
                self.out.expressions.push(expression);
                Some(self.out.expressions.len() - 1)
            }
            Err(why) => {
                self.left_out.push(format!("expression `{text}`: {why}"));
                None
            }
        }
    }

    fn define(&mut self, said: &Value) {
        let name = said["name"].as_str().unwrap_or_default();
        if Metric::named(name).is_some() {
            self.left_out.push(format!("definition of the standard metric {name}"));
            return;
        }
        let Some(value) = self.expression(said["value"].as_str().unwrap_or_default()) else { return };
        let kind = match said["type"].as_str() {
            Some("GAUGE") => CustomKind::Gauge,
            Some("HISTOGRAM") => CustomKind::Histogram,
            _ => CustomKind::Counter,
        };
        self.out.custom.push(Custom { name: format!("istio_{name}"), kind, value, labels: Vec::new() });
    }

    fn change(&mut self, said: &Value) {
        let name = said["name"].as_str().unwrap_or_default();
        if said["match"].as_str().is_some_and(|text| !text.is_empty()) {
            self.left_out.push(format!("condition `{}`", said["match"].as_str().unwrap_or_default()));
        }
        if said["drop"] == true {
            if let Some(metric) = Metric::named(name) {
                self.out.metrics[metric as usize].dropped = true;
            }
            return;
        }
        for tag in said["tags_to_remove"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            match TAGS.iter().position(|known| *known == tag) {
                Some(number) => self.standard(name, |change| {
                    change.tags.insert(number, None);
                }),
                None => self.left_out.push(format!("removal of the label {tag}, which is none of the standard ones")),
            }
        }
        for (tag, text) in said["dimensions"].as_object().into_iter().flatten() {
            let id = self.expression(text.as_str().unwrap_or_default());
            match TAGS.iter().position(|known| known == tag) {
                // The filter lets a standard label go whose expression it does not understand.
                Some(number) => self.standard(name, |change| {
                    change.tags.insert(number, id);
                }),
                None => {
                    let Some(id) = id else { continue };
                    self.standard(name, |change| put(&mut change.added, tag, id));
                }
            }
            let Some(id) = id else { continue };
            for custom in
                self.out.custom.iter_mut().filter(|c| name.is_empty() || c.name.strip_prefix("istio_") == Some(name))
            {
                put(&mut custom.labels, tag, id);
            }
        }
    }

    /// Changes the standard metric of a name; without a name all of them.
    fn standard(&mut self, name: &str, change: impl Fn(&mut Change)) {
        match Metric::named(name) {
            Some(metric) => change(&mut self.out.metrics[metric as usize]),
            None if name.is_empty() => self.out.metrics.iter_mut().for_each(change),
            None => {}
        }
    }
}

#[cfg(test)]
#[path = "overrides_tests.rs"]
mod tests;
