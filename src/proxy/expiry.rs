//! The end of a stream by time: its longest life, a request that does not arrive, silence. Made only where such a limit
//! is configured.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use crate::error::{Error, Kind};
use crate::upstream::Progress;

/// Limits that run beside a stream; `None` is off.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Life {
    /// On all of it.
    pub(super) stream: Option<Duration>,
    /// On the arrival of the whole request.
    pub(super) request: Option<Duration>,
    /// On silence.
    pub(super) idle: Option<Duration>,
}

/// Running limits.
pub(super) struct Expiry {
    stream: Option<Instant>,
    request: Option<Instant>,
    idle: Option<Duration>,
    last: Instant,
    /// Request body bytes at `last`.
    received: u64,
    timer: Pin<Box<Sleep>>,
}

impl Expiry {
    /// Starts the clock of a stream that began at `begun`; `None` without limits.
    pub(super) fn new(life: Life, begun: Instant) -> Option<Box<Self>> {
        if life.stream.is_none() && life.request.is_none() && life.idle.is_none() {
            return None;
        }
        let (stream, request) = (life.stream.map(|limit| begun + limit), life.request.map(|limit| begun + limit));
        let last = Instant::now();
        // The first poll finds out when there is something to do.
        let timer = Box::pin(sleep_until(last));
        Some(Box::new(Self { stream, request, idle: life.idle, last, received: 0, timer }))
    }

    /// Something was sent.
    pub(super) fn active(&mut self) {
        if self.idle.is_some() {
            self.last = Instant::now();
        }
    }

    /// Ready when the stream has to end, with the reason.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, progress: Option<&Progress>) -> Poll<Error> {
        let received = progress.map_or(0, Progress::bytes);
        if received != self.received {
            self.received = received;
            self.active();
        }
        if progress.is_none_or(Progress::ended) {
            self.request = None;
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            let silent = self.idle.map(|idle| self.last + idle);
            for (end, kind) in [
                (self.stream, Kind::MaxStreamDuration),
                (self.request, Kind::RequestTimeout),
                (silent, Kind::StreamIdle),
            ] {
                if end.is_some_and(|end| end <= now) {
                    return Poll::Ready(Error::local(kind));
                }
            }
            // Nothing left to wait for: the request has arrived, and that was the only limit.
            let Some(next) = [self.stream, self.request, silent].into_iter().flatten().min() else {
                return Poll::Pending;
            };
            self.timer.as_mut().reset(next);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn end(expiry: &mut Expiry) -> Kind {
        poll_fn(|cx| expiry.poll(cx, None)).await.kind
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_limit_decides() {
        let second = Duration::from_secs(1);
        let begun = Instant::now();
        assert!(Expiry::new(Life::default(), begun).is_none());
        let life = Life { stream: Some(second), idle: Some(second * 5), request: None };
        assert_eq!(
            (end(&mut Expiry::new(life, begun).unwrap()).await, begun.elapsed()),
            (Kind::MaxStreamDuration, second)
        );
        let begun = Instant::now();
        let life = Life { stream: Some(second * 9), idle: Some(second), request: None };
        let mut idle = Expiry::new(life, begun).unwrap();
        tokio::time::advance(second / 2).await;
        idle.active();
        assert_eq!(end(&mut idle).await, Kind::StreamIdle);
        assert!(begun.elapsed() >= second * 3 / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_stays_away_is_given_up() {
        let life = Life { request: Some(Duration::from_secs(1)), ..Life::default() };
        let mut expiry = Expiry::new(life, Instant::now()).unwrap();
        let progress = Progress::default();
        let error = poll_fn(|cx| expiry.poll(cx, Some(&progress))).await;
        assert_eq!(error.kind, Kind::RequestTimeout);
    }
}
