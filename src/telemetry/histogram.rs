//! Fixed-bucket histograms: recording is two additions, merging is adding, memory does not grow with samples.

use std::sync::atomic::{AtomicU64, Ordering};

/// Upper bounds of the buckets in halves (0.5 is the smallest bound of Envoy's defaults); the last bucket is infinite.
const HALVES: [u64; 19] = [
    1, 2, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 60_000, 120_000, 600_000, 1_200_000,
    3_600_000, 7_200_000,
];

/// Bounds as Prometheus prints them.
pub(super) const BOUNDS: [&str; 19] = [
    "0.5", "1", "5", "10", "25", "50", "100", "250", "500", "1000", "2500", "5000", "10000", "30000", "60000",
    "300000", "600000", "1800000", "3600000",
];

/// A histogram of whole numbers (milliseconds or bytes) over Envoy's default buckets. One of many that are merged when
/// somebody looks.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; HALVES.len() + 1],
    sum: AtomicU64,
}

/// The sum of several histograms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Merged {
    /// Samples by bucket, not cumulative; the last has no bound.
    pub buckets: [u64; HALVES.len() + 1],
    /// Sum of samples.
    pub sum: u64,
}

impl Histogram {
    /// Adds a sample.
    pub fn record(&self, value: u64) {
        self.buckets[bucket(value)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Adds a sample where nobody else writes: half the price, as nothing has to be locked.
    pub(super) fn record_alone(&self, value: u64) {
        let add = |cell: &AtomicU64, n| cell.store(cell.load(Ordering::Relaxed) + n, Ordering::Relaxed);
        add(&self.buckets[bucket(value)], 1);
        add(&self.sum, value);
    }

    /// Number of samples.
    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }
}

/// The bucket of a value: small ones are found first, as most are small.
fn bucket(value: u64) -> usize {
    let halves = value.saturating_mul(2);
    HALVES.iter().position(|bound| halves <= *bound).unwrap_or(HALVES.len())
}

impl Merged {
    /// Adds the samples of a histogram.
    pub fn add(&mut self, other: &Histogram) {
        for (sum, one) in self.buckets.iter_mut().zip(&other.buckets) {
            *sum += one.load(Ordering::Relaxed);
        }
        self.sum += other.sum.load(Ordering::Relaxed);
    }

    /// Number of samples.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Bound and number of samples at or below it, without the infinite one.
    pub fn cumulative(&self) -> impl Iterator<Item = (&'static str, u64)> {
        BOUNDS.into_iter().zip(&self.buckets).scan(0, |below, (bound, samples)| {
            *below += samples;
            Some((bound, *below))
        })
    }

    /// The bound below which `percent` of the samples lie; the last bound stands for what is above it.
    pub fn quantile(&self, percent: u64) -> &'static str {
        let wanted = (self.count() * percent).div_ceil(100);
        self.cumulative().find(|(_, below)| *below >= wanted).map_or(BOUNDS[BOUNDS.len() - 1], |(bound, _)| bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_on_a_bound_belongs_to_it() {
        for (value, bound) in [(0, "0.5"), (1, "1"), (2, "5"), (5, "5"), (6, "10"), (3_600_000, "3600000")] {
            assert_eq!(BOUNDS[bucket(value)], bound, "{value}");
        }
        assert_eq!(bucket(3_600_001), HALVES.len());
        assert_eq!(bucket(u64::MAX), HALVES.len());
        for (halves, text) in HALVES.iter().zip(BOUNDS) {
            assert_eq!(text.parse::<f64>().unwrap() * 2.0, *halves as f64);
        }
    }

    #[test]
    fn merging_adds_workers() {
        let (one, two) = (Histogram::default(), Histogram::default());
        one.record(1);
        two.record(1);
        two.record(40_000);
        let mut both = Merged::default();
        both.add(&one);
        both.add(&two);
        assert_eq!((both.count(), both.sum), (3, 40_002));
        let cumulative: Vec<_> =
            both.cumulative().filter(|(b, _)| ["0.5", "1", "30000", "60000"].contains(b)).collect();
        assert_eq!(cumulative, [("0.5", 0), ("1", 2), ("30000", 2), ("60000", 3)]);
        assert_eq!((both.quantile(50), both.quantile(99)), ("1", "60000"));
    }
}
