//! The end of a stream by time: its longest life, and silence. Made only where such a limit is configured.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::ctx::Ctx;
use crate::error::{Error, Kind};

/// A running limit.
pub(super) struct Expiry {
    end: Option<Instant>,
    idle: Option<Duration>,
    last: Instant,
    /// Request body bytes at `last`.
    received: u64,
    timer: Pin<Box<Sleep>>,
}

impl Expiry {
    /// Starts the clock; `None` without limits. `begun` is when the stream did.
    pub(super) fn new(life: Option<Duration>, idle: Option<Duration>, begun: Instant) -> Option<Box<Self>> {
        let last = Instant::now();
        let end = life.map(|life| begun + life);
        let next = [end, idle.map(|idle| last + idle)].into_iter().flatten().min()?;
        Some(Box::new(Self { end, idle, last, received: 0, timer: Box::pin(sleep_until(next)) }))
    }

    /// Something was sent.
    pub(super) fn active(&mut self) {
        if self.idle.is_some() {
            self.last = Instant::now();
        }
    }

    /// Ready when the stream has to end, with the reason.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, ctx: &Ctx) -> Poll<Error> {
        self.poll_with(cx, ctx.progress.as_ref().map_or(0, |p| p.bytes()))
    }

    /// The same for whoever has the count of request bytes.
    pub(super) fn poll_with(&mut self, cx: &mut Context<'_>, received: u64) -> Poll<Error> {
        if received != self.received {
            self.received = received;
            self.active();
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.end.is_some_and(|end| end <= now) {
                return Poll::Ready(Error::local(Kind::MaxStreamDuration));
            }
            let silent = self.idle.map(|idle| self.last + idle);
            if silent.is_some_and(|silent| silent <= now) {
                return Poll::Ready(Error::local(Kind::StreamIdle));
            }
            if let Some(next) = [self.end, silent].into_iter().flatten().min() {
                self.timer.as_mut().reset(next);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn end(expiry: &mut Expiry, received: u64) -> Kind {
        poll_fn(|cx| expiry.poll_with(cx, received)).await.kind
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_limit_decides() {
        let second = Duration::from_secs(1);
        let begun = Instant::now();
        assert!(Expiry::new(None, None, begun).is_none());
        let mut life = Expiry::new(Some(second), Some(second * 5), begun).unwrap();
        assert_eq!((end(&mut life, 0).await, begun.elapsed()), (Kind::MaxStreamDuration, second));
        let begun = Instant::now();
        let mut idle = Expiry::new(Some(second * 9), Some(second), begun).unwrap();
        tokio::time::advance(second / 2).await;
        idle.active();
        assert_eq!(end(&mut idle, 0).await, Kind::StreamIdle);
        assert!(begun.elapsed() >= second * 3 / 2);
    }
}
