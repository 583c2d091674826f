//! The response on its way back.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

use super::body::Progress;
use super::breaker::{Active, Permit};
use super::failure;
use super::lease::Lease;
use crate::error::{Error, Kind};

/// A response whose body has not come yet.
#[derive(Debug)]
pub struct Answer {
    /// Status and headers, as the upstream sent them.
    pub head: http::response::Parts,
    /// Body. It holds the request's place in the cluster until it ends or is dropped; after a 101 keep it as long as the
    /// upgraded connection is used.
    pub body: AnswerBody,
    /// Resolves to the upstream's bytes after a 101.
    pub upgrade: Option<hyper::upgrade::OnUpgrade>,
}

/// The body of a response.
#[derive(Debug)]
pub struct AnswerBody {
    inner: Incoming,
    hold: Option<Hold>,
    timer: Timer,
    received: u64,
}

/// What a request in flight holds.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) lease: Lease,
    pub(super) request: Option<Arc<Progress>>,
    pub(super) _active: Active,
    pub(super) _permit: Permit,
}

impl Hold {
    /// The response is complete. If the request is too, the connection serves the next one; else it is closed, because the
    /// rest of the request would stand in the way.
    pub(super) fn finish(self) {
        if self.request.is_none_or(|request| request.ended()) {
            self.lease.finish();
        }
    }
}

impl AnswerBody {
    pub(super) fn new(inner: Incoming, hold: Hold, timer: Timer) -> Self {
        let mut body = Self { inner, hold: Some(hold), timer, received: 0 };
        if body.inner.is_end_stream() {
            body.end();
        }
        body
    }

    /// The connection becomes the client's own.
    pub(super) fn upgraded(inner: Incoming, hold: Hold) -> Self {
        Self { inner, hold: Some(hold), timer: Timer::off(), received: 0 }
    }

    /// Bytes of data that have come so far.
    pub fn received(&self) -> u64 {
        self.received
    }

    fn end(&mut self) {
        if let Some(hold) = self.hold.take() {
            hold.finish();
        }
    }
}

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                if this.inner.is_end_stream() {
                    this.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                let hold = this.hold.take();
                let client_failed = hold.and_then(|hold| hold.request).is_some_and(|request| request.failed());
                Poll::Ready(Some(Err(failure::classify(error, client_failed, false))))
            }
            Poll::Ready(None) => {
                this.end();
                Poll::Ready(None)
            }
            Poll::Pending => match this.timer.poll(cx) {
                Poll::Ready(()) => {
                    this.hold = None;
                    Poll::Ready(Some(Err(Error::upstream(Kind::ResponseTimeout))))
                }
                Poll::Pending => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A limit that runs from the end of the request. Its timer is made when it is first waited for.
#[derive(Debug)]
pub(super) struct Timer {
    limit: Option<Duration>,
    request: Option<Arc<Progress>>,
    started: Option<Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer {
    pub(super) fn off() -> Self {
        Self { limit: None, request: None, started: None, sleep: None }
    }

    /// `request` is the body that is still to come; `None`: it is complete.
    pub(super) fn new(limit: Option<Duration>, request: Option<Arc<Progress>>) -> Self {
        let started = (limit.is_some() && request.is_none()).then(Instant::now);
        Self { limit, request, started, sleep: None }
    }

    /// The same limit without its timer, for telling it.
    pub(super) fn snapshot(&self) -> Self {
        Self { limit: self.limit, request: None, started: self.started, sleep: None }
    }

    /// What is left of it; `None`: it does not run.
    pub(super) fn left(&self) -> Option<Duration> {
        let limit = self.limit?;
        Some(self.started.map_or(limit, |started| limit.saturating_sub(started.elapsed())))
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(limit) = self.limit else { return Poll::Pending };
        if self.started.is_none() {
            if let Some(request) = &self.request {
                request.wake_at_end(cx);
                if !request.ended() {
                    return Poll::Pending;
                }
            }
            self.started = Some(Instant::now());
        }
        let started = self.started.unwrap_or_else(Instant::now);
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(started + limit)));
        sleep.as_mut().poll(cx)
    }

    /// Ready when the time is over; never if there is no limit.
    pub(super) async fn over(&mut self) {
        std::future::poll_fn(|cx| self.poll(cx)).await;
    }
}
