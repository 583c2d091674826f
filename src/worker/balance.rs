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

/// Connections that all workers together may have. One count that they share, touched once when a connection comes and
/// once when it goes, and only where somebody said a number.
#[derive(Debug)]
pub(super) struct Limit {
    open: AtomicUsize,
    most: usize,
}

/// Room for one connection; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Room(Arc<Limit>);

impl Limit {
    pub(super) fn new(most: usize) -> Self {
        Self { open: AtomicUsize::new(0), most }
    }

    /// Room for one more, if there is any.
    pub(super) fn room(self: &Arc<Self>) -> Option<Room> {
        let more = |open: usize| (open < self.most).then_some(open + 1);
        self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Room(Arc::clone(self)))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection's place with its worker; dropping it leaves.
#[derive(Debug)]
pub(super) struct Seat {
    loads: Loads,
    index: usize,
    _room: Option<Room>,
    _waited_for: Guard,
}

impl Seat {
    /// Takes one. It counts from the moment of the decision, so that a burst is spread before its connections have
    /// arrived.
    pub(super) fn take(loads: &Loads, index: usize, drain: &Watch, room: Option<Room>) -> Self {
        loads[index].active.fetch_add(1, Ordering::Relaxed);
        loads[index].total.fetch_add(1, Ordering::Relaxed);
        Self { loads: Arc::clone(loads), index, _room: room, _waited_for: drain.guard() }
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
    fn a_limit_lets_in_as_many_as_it_says_and_again_when_one_has_gone() {
        let limit = Arc::new(Limit::new(2));
        let first = limit.room();
        let second = limit.room();
        assert!(first.is_some() && second.is_some() && limit.room().is_none());
        drop(first);
        assert!(limit.room().is_some(), "and what was not kept is given back");
        assert!(limit.room().is_some());
    }

    #[test]
    fn connections_of_one_socket_are_spread_evenly_and_leave_again() {
        let loads = loads(&[0, 0, 0]);
        let (drain, watch) = Drain::new();
        let seats: Vec<Seat> = (0..9).map(|_| Seat::take(&loads, choose(&loads, 0), &watch, None)).collect();
        let active = || loads.iter().map(|l| l.active.load(Ordering::Relaxed)).collect::<Vec<_>>();
        assert_eq!(active(), [3, 3, 3]);
        assert_eq!(drain.active(), 9);
        drop(seats);
        assert_eq!((active(), drain.active()), (vec![0, 0, 0], 0));
    }
}
