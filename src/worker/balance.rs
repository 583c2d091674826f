//! Which worker takes a connection: exact while connections are few, lax when they are many.
//!
//! The kernel spreads connections by a hash, so with few long ones a worker may get all of them: two of two with a chance
//! of one half. Moving a socket to another thread costs some microseconds and is worth it only while counts are uneven.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;

use crate::drain::{Guard, Watch};

/// What a worker carries.
#[derive(Debug, Default)]
pub struct Load {
    /// Open connections.
    pub active: AtomicUsize,
    /// Connections so far.
    pub total: AtomicU64,
    /// Connections that another worker had accepted.
    pub handed_over: AtomicU64,
    /// How late the last timer was, microseconds.
    pub lag_micros: AtomicU64,
}

/// Of all workers; each worker's own line.
pub(super) type Loads = Arc<[CachePadded<Load>]>;

/// The worker that should take a connection that `me` accepted.
pub(super) fn choose(loads: &Loads, me: usize) -> usize {
    let count = |load: &Load| load.active.load(Ordering::Relaxed);
    let mine = count(&loads[me]);
    let Some((least, min)) = loads.iter().map(|load| count(load)).enumerate().min_by_key(|(_, active)| *active) else {
        return me;
    };
    if mine <= min + min / 8 { me } else { least }
}

/// Whether all workers together have as many connections as they may.
pub(super) fn is_full(loads: &Loads, most: usize) -> bool {
    loads.iter().map(|load| load.active.load(Ordering::Relaxed)).sum::<usize>() >= most
}

/// A connection's place with its worker; dropping it leaves.
#[derive(Debug)]
pub(super) struct Seat {
    loads: Loads,
    index: usize,
    _waited_for: Guard,
}

impl Seat {
    /// Takes one. It counts from the moment of the decision, so that a burst is spread before its connections have
    /// arrived.
    pub(super) fn take(loads: &Loads, index: usize, drain: &Watch) -> Self {
        loads[index].active.fetch_add(1, Ordering::Relaxed);
        loads[index].total.fetch_add(1, Ordering::Relaxed);
        Self { loads: Arc::clone(loads), index, _waited_for: drain.guard() }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.loads[self.index].active.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain::Drain;

    fn loads(active: &[usize]) -> Loads {
        active.iter().map(|n| CachePadded::new(Load { active: AtomicUsize::new(*n), ..Load::default() })).collect()
    }

    #[test]
    fn exact_when_few_and_lax_when_many() {
        for (active, me, chosen) in [
            (&[0, 0][..], 1, 1),
            (&[0, 1], 1, 0),
            (&[1, 1], 1, 1),
            (&[7, 8], 1, 0),
            (&[8, 9], 1, 1),
            (&[100, 112], 1, 1),
            (&[100, 113], 1, 0),
            (&[5, 3, 4], 0, 1),
            (&[9], 0, 0),
        ] {
            assert_eq!(choose(&loads(active), me), chosen, "{active:?}");
        }
    }

    #[test]
    fn all_workers_share_one_limit() {
        assert!(!is_full(&loads(&[3, 4]), 8));
        assert!(is_full(&loads(&[4, 4]), 8));
    }

    #[test]
    fn connections_of_one_socket_are_spread_evenly_and_leave_again() {
        let loads = loads(&[0, 0, 0]);
        let (drain, watch) = Drain::new();
        let seats: Vec<Seat> = (0..9).map(|_| Seat::take(&loads, choose(&loads, 0), &watch)).collect();
        let active = || loads.iter().map(|l| l.active.load(Ordering::Relaxed)).collect::<Vec<_>>();
        assert_eq!(active(), [3, 3, 3]);
        assert_eq!(drain.active(), 9);
        drop(seats);
        assert_eq!((active(), drain.active()), (vec![0, 0, 0], 0));
    }
}
