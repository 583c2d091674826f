//! When an idle connection is still good: what a host does to connections that wait, learned from watching.

use std::time::Duration;

/// Idle for longer than this, a connection is looked at once more before it is used.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Closings of connections that were idle for less say nothing: the host was being stopped, or answered and left.
const SHORTEST: Duration = Duration::from_millis(100);
/// Two closings at ages this close (a tenth of the age, at least this) are a habit.
const CLOSE: Duration = Duration::from_millis(50);

/// The idle age at which a host closes connections, if it has the habit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Habit {
    last: Option<Duration>,
    limit: Option<Duration>,
}

impl Habit {
    /// The host closed a connection that had been idle for `age`. One closing may be chance (a restart closes everything
    /// at once, whatever its age); the second at the same age is a timer.
    pub(super) fn closed(&mut self, age: Duration) {
        if age < SHORTEST {
            return;
        }
        let close = |a: Duration, b: Duration| a.abs_diff(b) <= CLOSE.max(a / 10);
        if let Some(last) = self.last.filter(|last| close(*last, age)) {
            self.limit = Some(last.min(age));
        }
        self.last = Some(age);
    }

    /// A connection was still alive at `age`.
    pub(super) fn survived(&mut self, age: Duration) {
        if self.limit.is_some_and(|limit| age > limit) {
            *self = Self::default();
        }
    }

    /// Idle age up to which connections are used again: four fifths of the habit's.
    pub(super) fn usable(&self) -> Duration {
        self.limit.map_or(Duration::MAX, |limit| limit * 4 / 5)
    }
}

/// The idle time of a `keep-alive: timeout=5` header, less a margin for the way: a second, or a quarter if that is less.
/// Milliseconds; `None` if it says nothing.
pub(super) fn announced(header: &str) -> Option<u64> {
    let timeout = header.split(',').find_map(|part| part.trim().strip_prefix("timeout="))?;
    let millis = timeout.trim().parse::<u32>().ok().map(u64::from)? * 1000;
    Some(millis.saturating_sub((millis / 4).min(1000)).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn the_second_closing_makes_a_habit() {
        let mut habit = Habit::default();
        habit.closed(ms(5000));
        assert_eq!(habit.usable(), Duration::MAX);
        habit.closed(ms(5100));
        assert_eq!(habit.usable(), ms(4000));
        habit.survived(ms(4900));
        assert_eq!(habit.usable(), ms(4000));
        habit.survived(ms(5300));
        assert_eq!(habit.usable(), Duration::MAX);
    }

    #[test]
    fn a_restart_is_no_habit() {
        let mut habit = Habit::default();
        for age in [ms(3), ms(5), ms(700), ms(3000), ms(90), ms(60_000)] {
            habit.closed(age);
        }
        assert_eq!(habit.usable(), Duration::MAX);
    }

    #[test]
    fn announcements() {
        for (header, millis) in [
            ("timeout=5, max=100", Some(4000)),
            ("max=7,timeout=1", Some(750)),
            ("timeout=0", Some(1)),
            ("max=7", None),
            ("timeout=x", None),
        ] {
            assert_eq!(announced(header), millis, "{header}");
        }
    }
}
