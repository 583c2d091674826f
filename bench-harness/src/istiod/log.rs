//! A record that grows, and waiting for it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// How long an event may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// What happened, in order; clones share it.
#[derive(Debug)]
pub struct Log<T> {
    events: Arc<Mutex<Vec<T>>>,
    count: watch::Sender<usize>,
}

impl<T> Default for Log<T> {
    fn default() -> Self {
        Self { events: Arc::default(), count: watch::Sender::new(0) }
    }
}

impl<T> Clone for Log<T> {
    fn clone(&self) -> Self {
        Self { events: Arc::clone(&self.events), count: self.count.clone() }
    }
}

impl<T: Clone> Log<T> {
    /// Adds an event and wakes those who wait.
    pub fn push(&self, event: T) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(event);
        self.count.send_replace(events.len());
    }

    /// All so far.
    pub fn all(&self) -> Vec<T> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many so far.
    pub fn len(&self) -> usize {
        *self.count.borrow()
    }

    /// Whether nothing happened yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits for the first event from this one on (they count from 0) of which something holds.
    ///
    /// # Panics
    /// When it does not come within a minute: a test has failed.
    pub async fn find(&self, from: usize, is: impl Fn(&T) -> bool) -> T {
        let mut counted = self.count.subscribe();
        let found = async {
            let mut next = from;
            loop {
                // The guard must not be held while somebody pushes, who holds the events while it asks for the count.
                let many = *counted.borrow_and_update();
                if many > next {
                    let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(event) = events[next..many].iter().find(|event| is(event)) {
                        return event.clone();
                    }
                    next = many;
                }
                // The sender is ours.
                let _ = counted.changed().await;
            }
        };
        // Others may come for ever.
        tokio::time::timeout(LIMIT, found).await.expect("the event comes within a minute")
    }

    /// Waits until there are more than that many, for as long as it takes.
    pub async fn grows(&self, count: usize) {
        let mut counted = self.count.subscribe();
        // Whoever waits holds the log, and with it the sender.
        let _ = counted.wait_for(|n| *n > count).await;
    }

    /// Waits until there are that many, and returns all.
    ///
    /// # Panics
    /// When they do not come within a minute: a test has failed.
    pub async fn reach(&self, count: usize) -> Vec<T> {
        let mut counted = self.count.subscribe();
        // What `wait_for` returns is a guard; `push` holds the events while it asks for the count.
        let reached = tokio::time::timeout(LIMIT, counted.wait_for(|n| *n >= count)).await.is_ok();
        assert!(reached, "{} of {count} expected events within {LIMIT:?}", self.len());
        self.all()
    }
}
