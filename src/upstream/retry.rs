//! Retries of one request: how many are left, how long to wait, whom to avoid.

use std::time::Duration;

use smallvec::SmallVec;

use super::lb::Wish;
use crate::snapshot::action::RetryPolicy;

/// The state of one request's retries.
#[derive(Debug)]
pub(super) struct Retries<'a> {
    policy: Option<&'a RetryPolicy>,
    left: u32,
    next: Duration,
    tried: SmallVec<[u32; 4]>,
    tries: u32,
    /// Priorities of the hosts tried so far, and those of them that are passed over, a bit each.
    seen: u32,
    passed: u32,
}

impl<'a> Retries<'a> {
    pub(super) fn new(policy: Option<&'a RetryPolicy>) -> Self {
        Self {
            policy,
            left: policy.map_or(0, |p| p.retries),
            next: policy.map_or(Duration::ZERO, |p| p.backoff_base),
            tried: SmallVec::new(),
            tries: 0,
            seen: 0,
            passed: 0,
        }
    }

    /// Whether a retry is left; takes it.
    pub(super) fn take(&mut self) -> bool {
        let Some(left) = self.left.checked_sub(1) else { return false };
        self.left = left;
        true
    }

    /// A host is being tried.
    pub(super) fn tries(&mut self, host: u32, priority: u32) {
        self.tries += 1;
        self.seen |= 1_u32.checked_shl(priority).unwrap_or(0);
        let every = self.policy.and_then(|p| p.previous_priorities).unwrap_or(0);
        if self.tries.checked_rem(every) == Some(0) {
            self.passed = self.seen;
        }
        if self.policy.is_some_and(|p| p.avoid_previous_hosts) {
            self.tried.push(host);
        }
    }

    /// The wish for the next choice.
    pub(super) fn wish(&self, hash: Option<u64>) -> Wish<'_> {
        let attempts =
            if self.tried.is_empty() { 0 } else { self.policy.map_or(0, |p| p.host_selection_attempts.max(1)) };
        Wish { hash, avoid: &self.tried, attempts, pass_over: self.passed }
    }

    /// The pause before the next try: anything up to an interval that doubles with each. `draw` is in 0..1.
    pub(super) fn pause(&mut self, draw: f64) -> Duration {
        let longest = self.policy.map_or(Duration::ZERO, |p| p.backoff_max);
        let interval = self.next;
        self.next = interval.saturating_mul(2).min(longest);
        // Whole milliseconds, as Envoy draws them.
        Duration::from_millis(interval.mul_f64(draw).as_millis().try_into().unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::action::RetryOn;

    fn policy() -> RetryPolicy {
        RetryPolicy {
            on: RetryOn::RESET,
            retries: 2,
            per_try_timeout: None,
            statuses: Box::default(),
            avoid_previous_hosts: true,
            host_selection_attempts: 5,
            previous_priorities: None,
            backoff_base: Duration::from_millis(25),
            backoff_max: Duration::from_millis(80),
        }
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let policy = policy();
        let mut retries = Retries::new(Some(&policy));
        let pauses: Vec<_> = (0..4).map(|_| retries.pause(0.999_999).as_millis()).collect();
        assert_eq!(pauses, [24, 49, 79, 79]);
        assert_eq!(Retries::new(Some(&policy)).pause(0.0), Duration::ZERO);
    }

    #[test]
    fn priorities_are_passed_over_after_some_tries() {
        let policy = RetryPolicy { previous_priorities: Some(2), ..policy() };
        let mut retries = Retries::new(Some(&policy));
        let mut passed = Vec::new();
        for priority in [0, 0, 1, 2, 2] {
            retries.tries(7, priority);
            passed.push(retries.wish(None).pass_over);
        }
        assert_eq!(passed, [0, 0b1, 0b1, 0b111, 0b111]);
    }

    #[test]
    fn retries_run_out_and_remember_hosts() {
        let policy = policy();
        let mut retries = Retries::new(Some(&policy));
        assert_eq!(retries.wish(None).attempts, 0);
        retries.tries(3, 0);
        assert_eq!((retries.wish(None).avoid, retries.wish(None).attempts), (&[3][..], 5));
        assert!(retries.take() && retries.take() && !retries.take());
        assert!(!Retries::new(None).take());
    }
}
