//! Metrics that configuration defines itself; rare, so they are found by their text.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;

use super::histogram::{Histogram, Merged};
use super::labels::text;
use super::metrics::lock;
use super::overrides::{CustomKind, Overrides, Values};
use super::series::CAP;

/// Metrics of somebody's own on one worker, by family and label text.
#[derive(Debug, Default)]
pub(super) struct CustomSeries(Mutex<BTreeMap<(String, String), CustomCell>>);

#[derive(Debug)]
struct CustomCell {
    kind: CustomKind,
    /// Counters and gauges.
    number: u64,
    histogram: Histogram,
}

impl CustomSeries {
    /// Counts what a configuration defines; past the cap nothing new is.
    pub(super) fn record(&self, overrides: &Overrides, values: &Values) {
        let mut cells = lock(&self.0);
        for (custom, tags, value) in overrides.custom(values) {
            let key = (custom.name.clone(), text(&tags));
            if cells.len() >= CAP && !cells.contains_key(&key) {
                continue;
            }
            let new = || CustomCell { kind: custom.kind, number: 0, histogram: Histogram::default() };
            let cell = cells.entry(key).or_insert_with(new);
            match custom.kind {
                CustomKind::Counter => cell.number += value,
                CustomKind::Gauge => cell.number = value,
                CustomKind::Histogram => cell.histogram.record_alone(value),
            }
        }
    }
}

/// Number and distribution by labels.
type Family = BTreeMap<String, (u64, Merged)>;

/// The families that configuration defines, of all workers.
pub(super) fn expose_custom<'a>(shards: impl Iterator<Item = &'a CustomSeries>, out: &mut String) {
    let mut families: BTreeMap<String, (CustomKind, Family)> = BTreeMap::new();
    for shard in shards {
        for ((family, text), cell) in lock(&shard.0).iter() {
            let (_, series) = families.entry(family.clone()).or_insert((cell.kind, BTreeMap::new()));
            let (number, merged) = series.entry(text.clone()).or_default();
            *number += cell.number;
            merged.add(&cell.histogram);
        }
    }
    for (name, (kind, series)) in families {
        let kind_name = match kind {
            CustomKind::Counter => "counter",
            CustomKind::Gauge => "gauge",
            CustomKind::Histogram => "histogram",
        };
        let _ = writeln!(out, "# TYPE {name} {kind_name}");
        for (text, (number, merged)) in series {
            if kind == CustomKind::Histogram {
                super::expose::histogram_lines(out, &name, &text, &merged);
            } else if text.is_empty() {
                let _ = writeln!(out, "{name} {number}");
            } else {
                let _ = writeln!(out, "{name}{{{text}}} {number}");
            }
        }
    }
}
