//! When to renew, and when to ask again. Pure: time and randomness are arguments.

use std::time::Duration;

use tonic::Code;

/// Calls that one attempt makes before it counts as failed (the agent's interceptor).
pub(super) const CALLS: u32 = 5;
/// Wait after the first failed call; doubles.
const FIRST_CALL_WAIT: Duration = Duration::from_millis(100);
/// Part of the wait between calls that is chance, up and down.
const CALL_JITTER: f64 = 0.1;

/// Wait after the first failed attempt.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Longest wait between attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Growth of the wait between attempts.
const GROWTH: f64 = 1.5;
/// Part of the wait between attempts that is chance, up and down.
const WAIT_JITTER: f64 = 0.5;
/// An old certificate's remaining life is worth this many attempts at least: the longest wait must not outlast it.
const ATTEMPTS_LEFT: u32 = 10;

/// At which part of a certificate's life the next one is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotation {
    /// Part of the life that is left then (`SECRET_GRACE_PERIOD_RATIO`).
    pub ratio: f64,
    /// Largest part that chance adds or takes (`SECRET_GRACE_PERIOD_RATIO_JITTER`), so that workloads that were started
    /// together do not ask together for ever.
    pub jitter: f64,
}

impl Default for Rotation {
    /// The agent's.
    fn default() -> Self {
        Self { ratio: 0.5, jitter: 0.01 }
    }
}

impl Rotation {
    /// How long from `issued` on, with a life that ends `lifetime` later. `chance` is from 0 to 1.
    pub fn delay(self, lifetime: Duration, chance: f64) -> Duration {
        let left = self.jitter.mul_add(2.0_f64.mul_add(chance, -1.0), self.ratio).clamp(0.0, 1.0);
        lifetime.mul_f64(1.0 - left)
    }
}

/// Whether the same call may succeed when it is made again at once.
pub(super) fn again(code: Code) -> bool {
    matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
    )
}

/// Wait after the `failed`th failed call of an attempt, counted from 1. `chance` is from 0 to 1.
pub(super) fn after_call(failed: u32, chance: f64) -> Duration {
    let wait = FIRST_CALL_WAIT * 2_u32.saturating_pow(failed.saturating_sub(1).min(16));
    spread(wait, CALL_JITTER, chance)
}

/// Wait after the `failed`th failed attempt in a row, counted from 1; `life` is what is left of the certificate in use.
/// `chance` is from 0 to 1.
pub(super) fn after_attempt(failed: u32, life: Option<Duration>, chance: f64) -> Duration {
    let grown = FIRST_WAIT.mul_f64(GROWTH.powi(i32::try_from(failed.saturating_sub(1).min(32)).unwrap_or(32)));
    let bound = life.map_or(LONGEST_WAIT, |life| (life / ATTEMPTS_LEFT).clamp(FIRST_WAIT, LONGEST_WAIT));
    spread(grown.min(bound), WAIT_JITTER, chance)
}

fn spread(wait: Duration, part: f64, chance: f64) -> Duration {
    wait.mul_f64(part.mul_add(2.0_f64.mul_add(chance, -1.0), 1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn renewal_comes_at_half_life_give_or_take_a_hundredth() {
        let rotation = Rotation::default();
        assert_eq!(rotation.delay(DAY, 0.5), DAY / 2);
        assert_eq!(rotation.delay(DAY, 0.0), DAY.mul_f64(0.51));
        assert_eq!(rotation.delay(DAY, 1.0), DAY.mul_f64(0.49));
        let late = Rotation { ratio: 0.9, jitter: 0.0 };
        assert_eq!(late.delay(Duration::from_secs(30), 0.3).as_millis(), 3_000);
    }

    #[test]
    fn calls_double_from_a_tenth_of_a_second() {
        let waits: Vec<u128> = (1..=4).map(|n| after_call(n, 0.5).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800]);
        assert_eq!(after_call(1, 0.0).as_millis(), 90);
    }

    #[test]
    fn attempts_grow_to_a_minute_and_never_outlast_the_certificate() {
        assert_eq!(after_attempt(1, None, 0.5).as_millis(), 500);
        assert_eq!(after_attempt(2, None, 0.5).as_millis(), 750);
        assert_eq!(after_attempt(40, None, 0.5), LONGEST_WAIT);
        assert_eq!(after_attempt(40, Some(Duration::from_secs(50)), 0.5), Duration::from_secs(5));
        assert_eq!(after_attempt(40, Some(Duration::ZERO), 0.5), FIRST_WAIT);
    }

    #[test]
    fn only_what_may_pass_is_asked_again_at_once() {
        assert!(again(Code::Unavailable) && again(Code::ResourceExhausted) && again(Code::DeadlineExceeded));
        assert!(!again(Code::Unauthenticated) && !again(Code::InvalidArgument) && !again(Code::Unimplemented));
    }

    proptest! {
        #[test]
        fn a_renewal_is_within_the_life(ratio in 0.0_f64..=2.0, jitter in 0.0_f64..=1.0, chance in 0.0_f64..=1.0) {
            let delay = Rotation { ratio, jitter }.delay(DAY, chance);
            prop_assert!(delay <= DAY);
        }
    }
}
