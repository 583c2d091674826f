//! Saying goodbye in order: Lame, Closing, Gone.
//!
//! `Lame`: readiness fails, HTTP/1 responses say `connection: close`, HTTP/2 gets GOAWAY; accepting goes on, because
//! peers learn late that we leave. `Closing`: no more accepting, every connection is asked to end. `Gone`: what is left
//! is dropped. Whoever holds a [`Guard`] is waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

/// How far the goodbye has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not leaving.
    Serving,
    /// Leaving, still accepting.
    Lame,
    /// No longer accepting; connections are asked to end.
    Closing,
    /// Over: what still runs is dropped.
    Gone,
}

/// How long the phases take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// From the start to `Closing`.
    pub min: Duration,
    /// From the start to `Gone`.
    pub max: Duration,
    /// `Gone` comes as soon as nothing is active after `min` (`EXIT_ON_ZERO_ACTIVE_CONNECTIONS`).
    pub exit_on_zero: bool,
}

/// The side that decides.
#[derive(Debug)]
pub struct Drain {
    phase: watch::Sender<Phase>,
    active: Arc<Active>,
}

/// The side that obeys; cheap to clone, one for each worker and loop.
#[derive(Debug, Clone)]
pub struct Watch {
    phase: watch::Receiver<Phase>,
    active: Arc<Active>,
}

/// Something that is waited for, such as a connection.
#[derive(Debug)]
pub struct Guard(Arc<Active>);

#[derive(Debug, Default)]
struct Active {
    count: AtomicUsize,
    zero: Notify,
}

impl Drain {
    /// A pair that serves.
    pub fn new() -> (Self, Watch) {
        let (sender, receiver) = watch::channel(Phase::Serving);
        let active = Arc::new(Active::default());
        (Self { phase: sender, active: Arc::clone(&active) }, Watch { phase: receiver, active })
    }

    /// Goes through the phases; returns at `Gone`. Call it once; a second call would start the clock anew.
    pub async fn run(&self, plan: Plan) {
        let start = Instant::now();
        self.enter(Phase::Lame);
        sleep_until(start + plan.min).await;
        self.enter(Phase::Closing);
        let end = start + plan.max.max(plan.min);
        if plan.exit_on_zero {
            // Either answer leads on: nobody is left, or the time is over.
            let _ = timeout_at(end, self.active.wait_for_zero()).await;
        } else {
            sleep_until(end).await;
        }
        self.enter(Phase::Gone);
    }

    /// Goes to a phase by hand (`/drain_listeners`, `/quitquitquit`); never back.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let forward = phase > *now;
            if forward {
                *now = phase;
            }
            forward
        });
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Guards that are alive.
    pub fn active(&self) -> usize {
        self.active.count.load(Ordering::Relaxed)
    }

    /// Waits until every guard is dropped.
    pub async fn wait_for_zero(&self) {
        self.active.wait_for_zero().await;
    }
}

impl Watch {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Whether we are leaving, in any phase.
    pub fn is_leaving(&self) -> bool {
        self.phase() > Phase::Serving
    }

    /// Waits for a phase, or for a later one. A [`Drain`] that was dropped counts as `Gone`: nobody is left to say so.
    pub async fn reached(&mut self, phase: Phase) {
        // An error means that the sender is gone, which is the end as well.
        let _ = self.phase.wait_for(|now| *now >= phase).await;
    }

    /// Registers something that is waited for.
    pub fn guard(&self) -> Guard {
        self.active.count.fetch_add(1, Ordering::Relaxed);
        Guard(Arc::clone(&self.active))
    }

    /// Guards that are alive.
    pub fn active(&self) -> usize {
        self.active.count.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.zero.notify_waiters();
        }
    }
}

impl Active {
    async fn wait_for_zero(&self) {
        loop {
            let zero = self.zero.notified();
            if self.count.load(Ordering::Acquire) == 0 {
                return;
            }
            zero.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan { min: Duration::from_secs(5), max: Duration::from_secs(45), exit_on_zero: true };

    #[tokio::test(start_paused = true)]
    async fn phases_come_in_time() {
        let (drain, mut watch) = Drain::new();
        let guard = watch.guard();
        let start = Instant::now();
        let run = tokio::spawn(async move { drain.run(PLAN).await });
        watch.reached(Phase::Lame).await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        watch.reached(Phase::Closing).await;
        assert_eq!(start.elapsed(), PLAN.min);
        watch.reached(Phase::Gone).await;
        assert_eq!(start.elapsed(), PLAN.max);
        run.await.unwrap();
        drop(guard);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_left_ends_it_early() {
        let (drain, watch) = Drain::new();
        let guard = watch.guard();
        let start = Instant::now();
        let leave = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(7)).await;
            drop(guard);
        });
        drain.run(PLAN).await;
        leave.await.unwrap();
        assert_eq!(start.elapsed(), Duration::from_secs(7));
        assert_eq!((watch.phase(), drain.active()), (Phase::Gone, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn without_exit_on_zero_the_whole_time_passes() {
        let (drain, _watch) = Drain::new();
        let start = Instant::now();
        drain.run(Plan { exit_on_zero: false, ..PLAN }).await;
        assert_eq!(start.elapsed(), PLAN.max);
    }

    #[tokio::test]
    async fn phases_never_go_back_and_a_lost_drain_is_the_end() {
        let (drain, mut watch) = Drain::new();
        drain.enter(Phase::Closing);
        drain.enter(Phase::Lame);
        assert_eq!(watch.phase(), Phase::Closing);
        drop(drain);
        watch.reached(Phase::Gone).await;
    }
}
