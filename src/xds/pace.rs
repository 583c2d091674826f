//! When things happen: pure, with time and chance as arguments.

use std::time::Duration;

use tokio::time::Instant;

/// Quiet that ends a burst of responses.
const QUIET: Duration = Duration::from_millis(20);
/// Longest that a change waits for quiet.
const LONGEST: Duration = Duration::from_millis(200);
/// Envoy's first and longest limit of a wait before the next stream.
const FIRST: Duration = Duration::from_millis(500);
const MOST: Duration = Duration::from_secs(30);

/// Gathers the responses of one push, so that they are compiled once.
#[derive(Debug, Default)]
pub(super) struct Debounce {
    /// First and last change that nobody has seen.
    open: Option<(Instant, Instant)>,
}

impl Debounce {
    /// Something changed.
    pub(super) fn changed(&mut self, now: Instant) {
        let first = self.open.map_or(now, |(first, _)| first);
        self.open = Some((first, now));
    }

    /// When the changes are to be looked at.
    pub(super) fn due(&self) -> Option<Instant> {
        self.open.map(|(first, last)| (last + QUIET).min(first + LONGEST))
    }

    /// They are looked at now.
    pub(super) fn done(&mut self) {
        self.open = None;
    }
}

/// Waits between streams: a random part of a limit that doubles, so that a mesh does not return all at once.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// How long to wait after one more failure; `chance` is from 0 to 1.
    pub(super) fn next(&mut self, chance: f64) -> Duration {
        let limit = FIRST.saturating_mul(1 << self.failures.min(16)).min(MOST);
        self.failures += 1;
        limit.mul_f64(chance.clamp(0.0, 1.0))
    }

    /// A stream did its work.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_seen_once_and_soon() {
        let (mut debounce, start) = (Debounce::default(), Instant::now());
        assert_eq!(debounce.due(), None);
        debounce.changed(start);
        assert_eq!(debounce.due(), Some(start + QUIET));
        for i in 1..100 {
            debounce.changed(start + QUIET / 2 * i);
        }
        assert_eq!(debounce.due(), Some(start + LONGEST));
        debounce.done();
        assert_eq!(debounce.due(), None);
    }

    #[test]
    fn waits_grow_to_a_limit_and_begin_anew() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..9).map(|_| backoff.next(1.0).as_millis() as u64).collect();
        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]);
        backoff.reset();
        assert_eq!((backoff.next(0.5).as_millis(), backoff.next(0.0).as_millis()), (250, 0));
    }
}
