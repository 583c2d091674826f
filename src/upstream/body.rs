//! Request bodies: streamed, or kept while a retry may need them again.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;

/// How far a request body has come; shared with whoever asks.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: AtomicU64,
    ended: AtomicBool,
    failed: AtomicBool,
    waker: AtomicWaker,
}

impl Progress {
    /// Bytes taken from the client so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The whole body, trailers included, has been taken.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// The client broke off.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

/// A request body on its way to an upstream.
#[derive(Debug)]
pub struct Body {
    source: Source,
    progress: Option<Arc<Progress>>,
}

#[derive(Debug)]
enum Source {
    Empty,
    Full(Bytes),
    Client(Incoming),
}

impl Body {
    /// No body.
    pub fn empty() -> Self {
        Self { source: Source::Empty, progress: None }
    }

    /// These bytes.
    pub fn full(bytes: Bytes) -> Self {
        if bytes.is_empty() {
            return Self::empty();
        }
        Self { source: Source::Full(bytes), progress: None }
    }

    /// What the client sends.
    pub fn from_client(incoming: Incoming) -> Self {
        if http_body::Body::is_end_stream(&incoming) {
            return Self::empty();
        }
        Self { source: Source::Client(incoming), progress: Some(Arc::default()) }
    }

    /// The count of a streamed body; `None` when it is known from the start.
    pub fn progress(&self) -> Option<&Arc<Progress>> {
        self.progress.as_ref()
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.source {
            Source::Empty => Poll::Ready(None),
            Source::Full(bytes) => {
                let all = std::mem::take(bytes);
                self.source = Source::Empty;
                Poll::Ready(Some(Ok(Frame::data(all))))
            }
            Source::Client(incoming) => {
                let polled = ready!(Pin::new(incoming).poll_frame(cx));
                if let Some(progress) = &self.progress {
                    progress.note(&polled);
                }
                Poll::Ready(polled)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty => true,
            Source::Full(_) => false,
            Source::Client(incoming) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Client(incoming) => incoming.size_hint(),
        }
    }
}

impl Progress {
    fn note(&self, polled: &Option<Result<Frame<Bytes>, hyper::Error>>) {
        match polled {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
                }
            }
            Some(Err(_)) => self.failed.store(true, Ordering::Relaxed),
            None => {
                self.ended.store(true, Ordering::Relaxed);
                self.waker.wake();
            }
        }
    }
}
