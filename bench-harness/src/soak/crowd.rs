//! Many connections, each in a task of its own, that speak when they are told to and tell at once when they end.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::live::Live;
use super::side::LIMIT;

/// Events that may wait to be counted.
const EVENTS: usize = 4096;

/// Whom an order is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Order {
    round: usize,
    /// Those who otherwise say nothing, too.
    everybody: bool,
}

enum Event {
    Answered,
    Gone { kind: &'static str, why: String },
}

/// The connections.
pub(super) struct Crowd {
    orders: watch::Sender<Order>,
    events: mpsc::Receiver<Event>,
    tell: mpsc::Sender<Event>,
    /// How many of each kind live; and of them, who talks.
    living: BTreeMap<&'static str, usize>,
    silent: Vec<&'static str>,
    /// Messages that came back.
    pub(super) messages: u64,
    /// The first few ends, as they were told.
    pub(super) ends: Vec<String>,
}

impl Crowd {
    /// Nobody yet; members of these kinds speak only when everybody is asked.
    pub(super) fn new(silent: &[&'static str]) -> Self {
        let (tell, events) = mpsc::channel(EVENTS);
        Self {
            orders: watch::Sender::new(Order::default()),
            events,
            tell,
            living: BTreeMap::new(),
            silent: silent.to_vec(),
            messages: 0,
            ends: Vec::new(),
        }
    }

    /// One more of a kind.
    pub(super) fn add(&mut self, kind: &'static str, mut live: Live) {
        *self.living.entry(kind).or_default() += 1;
        let talks = !self.silent.contains(&kind);
        let (mut orders, tell) = (self.orders.subscribe(), self.tell.clone());
        tokio::spawn(async move {
            let why = loop {
                tokio::select! {
                    changed = orders.changed() => if changed.is_err() { return },
                    why = live.ended() => break why,
                }
                let order = *orders.borrow_and_update();
                if !talks && !order.everybody {
                    continue;
                }
                if let Err(why) = live.exchange(order.round).await {
                    break why;
                }
                // Whoever counts has gone.
                let _ = tell.send(Event::Answered).await;
            };
            let _ = tell.send(Event::Gone { kind, why: format!("{why:#}") }).await;
        });
    }

    /// How many of a kind live.
    pub(super) fn living(&self, kind: &str) -> usize {
        self.living.get(kind).copied().unwrap_or_default()
    }

    /// How many live.
    pub(super) fn all(&self) -> usize {
        self.living.values().sum()
    }

    /// Has everybody who talks, or everybody, say something; ends when all of them were answered or are gone.
    ///
    /// # Errors
    /// When they are neither.
    pub(super) async fn speak(&mut self, round: usize, everybody: bool) -> Result<()> {
        let silent: usize = self.silent.iter().map(|kind| self.living(kind)).sum();
        let talking = if everybody { self.all() } else { self.all() - silent };
        let (mut answered, before) = (0, self.all());
        self.orders.send_replace(Order { round, everybody });
        // Whoever ends had been counted among those who talk; the silent ones who end are found by their kind.
        let mut silent_gone = 0;
        while answered + (before - self.all()) - silent_gone < talking {
            let event = timeout(LIMIT * 2, self.events.recv()).await.context("connections hang")?;
            match event.context("somebody tells")? {
                Event::Answered => answered += 1,
                Event::Gone { kind, why } => {
                    silent_gone += usize::from(!everybody && self.silent.contains(&kind));
                    self.gone(kind, &why);
                }
            }
        }
        self.messages += answered as u64;
        Ok(())
    }

    /// Waits until so many are left.
    ///
    /// # Errors
    /// When they stay.
    pub(super) async fn shrinks_to(&mut self, left: usize) -> Result<()> {
        while self.all() > left {
            let event = timeout(LIMIT, self.events.recv()).await;
            let event = event.with_context(|| format!("{} are left instead of {left}", self.all()))?;
            if let Event::Gone { kind, why } = event.context("somebody tells")? {
                self.gone(kind, &why);
            }
        }
        Ok(())
    }

    fn gone(&mut self, kind: &'static str, why: &str) {
        if let Some(living) = self.living.get_mut(kind) {
            *living -= 1;
        }
        if self.ends.len() < 10 {
            self.ends.push(format!("{kind}: {why}"));
        }
    }
}

/// Opens many at once, a few at a time, and adds them.
///
/// # Errors
/// When one cannot be opened.
pub(super) async fn open<F, O>(crowd: &mut Crowd, kind: &'static str, count: usize, open: O) -> Result<()>
where
    O: Fn(usize) -> F,
    F: Future<Output = Result<Live>> + Send + 'static,
{
    let places = Arc::new(tokio::sync::Semaphore::new(32));
    let mut opening = tokio::task::JoinSet::new();
    for n in 0..count {
        let place = Arc::clone(&places).acquire_owned().await?;
        let one = open(n);
        opening.spawn(async move {
            let _place = place;
            one.await
        });
    }
    while let Some(opened) = opening.join_next().await {
        crowd.add(kind, opened.context("a task")?.with_context(|| format!("one of {count} {kind}"))?);
    }
    Ok(())
}
