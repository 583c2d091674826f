//! Earliest deadline first: weighted turns without randomness, as Envoy's scheduler takes them.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

#[derive(Debug)]
struct Entry {
    deadline: f64,
    order: u64,
    item: u32,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The earliest deadline is the greatest, for the heap; entries of equal deadline go in order of entry.
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        other.deadline.total_cmp(&self.deadline).then_with(|| other.order.cmp(&self.order))
    }
}

/// Items that take turns.
#[derive(Debug, Default)]
pub(super) struct Edf {
    heap: BinaryHeap<Entry>,
    now: f64,
    order: u64,
}

impl Edf {
    /// Items with their weights; those without weight take no turns. `turns` are taken at once, so that workers do not all
    /// begin with the same item.
    pub(super) fn new(items: impl IntoIterator<Item = (u32, f64)>, turns: u64, weight: impl Fn(u32) -> f64) -> Self {
        let mut edf = Self::default();
        for (item, weight) in items {
            edf.add(item, weight);
        }
        for _ in 0..turns.checked_rem(2 * edf.heap.len() as u64).unwrap_or(0) {
            edf.pick(&weight);
        }
        edf
    }

    fn add(&mut self, item: u32, weight: f64) {
        if weight > 0.0 {
            self.order += 1;
            self.heap.push(Entry { deadline: self.now + 1.0 / weight, order: self.order, item });
        }
    }

    /// Whose turn it is; the next turn is by the weight of now.
    pub(super) fn pick(&mut self, weight: impl Fn(u32) -> f64) -> Option<u32> {
        let entry = self.heap.pop()?;
        self.now = entry.deadline;
        // What has lost its weight keeps a far place, so that it comes back when it has weight again.
        self.add(entry.item, weight(entry.item).max(f64::MIN_POSITIVE));
        Some(entry.item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_follow_weights() {
        let weights = [1.0, 3.0, 0.0, 2.0];
        let weight = |item: u32| weights[item as usize];
        let mut edf = Edf::new((0..4).map(|i| (i, weight(i))), 0, weight);
        let mut counts = [0; 4];
        (0..600).for_each(|_| counts[edf.pick(weight).unwrap() as usize] += 1);
        assert_eq!(counts, [100, 300, 0, 200]);
        assert_eq!(Edf::default().pick(weight), None);
    }

    #[test]
    fn equal_weights_go_round() {
        let mut edf = Edf::new((0..3).map(|i| (i, 1.0)), 4, |_| 1.0);
        let turns: Vec<_> = (0..6).map(|_| edf.pick(|_| 1.0).unwrap()).collect();
        assert_eq!(turns, [1, 2, 0, 1, 2, 0]);
    }
}
