//! Request bodies: streamed, or kept while a retry may need them again.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;

use super::body_copy::{BodyCopy, Copies};
use crate::net::grpc::Messages;

/// How far a request body has come; shared with whoever asks.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: AtomicU64,
    ended: AtomicBool,
    failed: AtomicBool,
    waker: AtomicWaker,
    copies: std::sync::OnceLock<Copies>,
    /// gRPC messages, where somebody counts them.
    messages: std::sync::OnceLock<Mutex<Messages>>,
}

impl Progress {
    /// Bytes taken from the client so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Counts gRPC messages from now on.
    pub fn count_messages(&self) {
        self.messages.get_or_init(Mutex::default);
    }

    /// gRPC messages taken from the client so far; 0 unless they are counted.
    pub fn messages(&self) -> u64 {
        let counted = self.messages.get();
        counted.map_or(0, |messages| messages.lock().unwrap_or_else(PoisonError::into_inner).count())
    }

    /// The whole body, trailers included, has been taken.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// The client broke off.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Wakes `cx` when the body has ended.
    pub(super) fn wake_at_end(&self, cx: &Context<'_>) {
        self.waker.register(cx.waker());
    }

    fn note(&self, polled: &Option<Result<Frame<Bytes>, hyper::Error>>, last: bool) {
        if let Some(copies) = self.copies.get() {
            let data = polled.as_ref().and_then(|frame| frame.as_ref().ok()).and_then(Frame::data_ref);
            copies.note(data, last);
        }
        match polled {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
                    if let Some(messages) = self.messages.get() {
                        messages.lock().unwrap_or_else(PoisonError::into_inner).note(data);
                    }
                }
            }
            Some(Err(_)) => self.failed.store(true, Ordering::Relaxed),
            None => {}
        }
        if last {
            self.ended.store(true, Ordering::Relaxed);
            self.waker.wake();
        }
    }
}

/// A request body on its way to an upstream.
#[derive(Debug)]
pub struct Body {
    source: Source,
    progress: Option<Arc<Progress>>,
    /// Trailers are left out.
    bare: bool,
}

#[derive(Debug)]
enum Source {
    Empty,
    Full(Bytes),
    Client(Incoming),
    Replay(Replay),
    Copy(BodyCopy),
}

/// Why a body stops before its end.
#[derive(Debug)]
pub enum BodyError {
    /// The client's side failed.
    Client(hyper::Error),
    /// A later try has taken the body over.
    TakenOver,
    /// The body that this is a copy of ended early, or was faster.
    BrokenOff,
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(e) => write!(f, "request body: {e}"),
            Self::TakenOver => f.write_str("the request is sent again elsewhere"),
            Self::BrokenOff => f.write_str("the mirrored request ended early, or was faster"),
        }
    }
}

impl std::error::Error for BodyError {}

impl Body {
    /// No body.
    pub fn empty() -> Self {
        Self { source: Source::Empty, progress: None, bare: false }
    }

    /// These bytes.
    pub fn full(bytes: Bytes) -> Self {
        if bytes.is_empty() {
            return Self::empty();
        }
        Self { source: Source::Full(bytes), progress: None, bare: false }
    }

    /// What the client sends.
    pub fn from_client(incoming: Incoming) -> Self {
        if incoming.is_end_stream() {
            return Self::empty();
        }
        Self { source: Source::Client(incoming), progress: Some(Arc::default()), bare: false }
    }

    /// A second body that says the same, frame by frame as the first one is read, and never holds it up.
    pub fn copy(&self) -> Self {
        match (&self.source, &self.progress) {
            (Source::Full(bytes), _) => Self::full(bytes.clone()),
            (Source::Client(incoming), Some(progress)) => {
                let copy = progress.copies.get_or_init(Copies::default).add(incoming.size_hint());
                Self { source: Source::Copy(copy), progress: None, bare: false }
            }
            _ => Self::empty(),
        }
    }

    /// The count of a streamed body; `None` when it is known from the start.
    pub fn progress(&self) -> Option<&Arc<Progress>> {
        self.progress.as_ref()
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.source {
            Source::Empty => Poll::Ready(None),
            Source::Full(bytes) => {
                let all = std::mem::take(bytes);
                self.source = Source::Empty;
                Poll::Ready(Some(Ok(Frame::data(all))))
            }
            Source::Client(incoming) => {
                let polled = ready!(Pin::new(&mut *incoming).poll_frame(cx));
                if let Some(progress) = &self.progress {
                    progress.note(&polled, polled.is_none() || incoming.is_end_stream());
                }
                Poll::Ready(polled.map(|frame| frame.map_err(BodyError::Client)))
            }
            Source::Replay(replay) => replay.poll(self.progress.as_deref(), cx),
            Source::Copy(copy) => copy.poll(cx),
        }
    }

    /// The same with or without trailers.
    pub(super) fn with_trailers(self, wanted: bool) -> Self {
        Self { bare: !wanted, ..self }
    }

    /// Makes it a body for several tries, of which up to `limit` bytes are kept.
    pub(super) fn for_tries(self, limit: Option<usize>) -> Repeat {
        match (self.source, limit) {
            (Source::Empty, _) => Repeat::Empty,
            (Source::Full(bytes), _) => Repeat::Full(bytes),
            (Source::Client(source), Some(limit)) => {
                let kept = Kept { source, limit, frames: Vec::new(), bytes: 0, ended: false, lost: false, turn: 0 };
                Repeat::Kept(Arc::new(Mutex::new(kept)), self.progress)
            }
            (source @ (Source::Client(_) | Source::Replay(_) | Source::Copy(_)), _) => {
                Repeat::Once(Some(Self { source, progress: self.progress, bare: false }))
            }
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        loop {
            let polled = ready!(this.poll_source(cx));
            if !(this.bare && matches!(&polled, Some(Ok(frame)) if frame.is_trailers())) {
                return Poll::Ready(polled);
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty => true,
            Source::Full(_) => false,
            Source::Client(incoming) => incoming.is_end_stream(),
            Source::Replay(replay) => replay.is_end(),
            Source::Copy(copy) => copy.is_end(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Client(incoming) => incoming.size_hint(),
            Source::Replay(replay) => replay.size_hint(),
            Source::Copy(copy) => copy.size_hint(),
        }
    }
}

/// A body that can be asked for once for each try.
#[derive(Debug)]
pub(super) enum Repeat {
    Empty,
    Full(Bytes),
    Kept(Arc<Mutex<Kept>>, Option<Arc<Progress>>),
    Once(Option<Body>),
}

impl Repeat {
    /// The body for the next try; `None` if there is none to be had any more. An earlier body that is still around fails.
    pub(super) fn next(&mut self) -> Option<Body> {
        match self {
            Self::Empty => Some(Body::empty()),
            Self::Full(bytes) => Some(Body::full(bytes.clone())),
            Self::Once(body) => body.take(),
            Self::Kept(kept, progress) => {
                let mut inner = lock(kept);
                if inner.lost {
                    return None;
                }
                inner.turn += 1;
                let replay = Replay { kept: Arc::clone(kept), turn: inner.turn, at: 0 };
                drop(inner);
                Some(Body { source: Source::Replay(replay), progress: progress.clone(), bare: false })
            }
        }
    }

    /// Whether [`Repeat::next`] has a body.
    pub(super) fn is_left(&self) -> bool {
        match self {
            Self::Empty | Self::Full(_) => true,
            Self::Once(body) => body.is_some(),
            Self::Kept(kept, _) => !lock(kept).lost,
        }
    }

    /// A body that came back unsent is as good as new.
    pub(super) fn give_back(&mut self, body: Body) {
        if let Self::Once(place) = self {
            *place = Some(body);
        }
    }
}

/// What has been taken from the client so far, and the rest.
#[derive(Debug)]
pub(super) struct Kept {
    source: Incoming,
    limit: usize,
    frames: Vec<Piece>,
    bytes: usize,
    ended: bool,
    /// More came than is kept: this body cannot be sent again.
    lost: bool,
    /// Which try may read; earlier ones may not.
    turn: u32,
}

#[derive(Debug, Clone)]
enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

#[derive(Debug)]
struct Replay {
    kept: Arc<Mutex<Kept>>,
    turn: u32,
    at: usize,
}

/// One worker's lock: never contended, and never held across a wait.
fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Replay {
    fn poll(
        &mut self,
        progress: Option<&Progress>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut kept = lock(&self.kept);
        if kept.turn != self.turn {
            return Poll::Ready(Some(Err(BodyError::TakenOver)));
        }
        if let Some(piece) = kept.frames.get(self.at) {
            self.at += 1;
            return Poll::Ready(Some(Ok(match piece.clone() {
                Piece::Data(data) => Frame::data(data),
                Piece::Trailers(trailers) => Frame::trailers(trailers),
            })));
        }
        if kept.ended {
            return Poll::Ready(None);
        }
        let polled = ready!(Pin::new(&mut kept.source).poll_frame(cx));
        kept.ended = polled.is_none() || kept.source.is_end_stream();
        if let Some(progress) = progress {
            progress.note(&polled, kept.ended);
        }
        if let Some(Ok(frame)) = &polled {
            self.at += kept.keep(frame);
        }
        Poll::Ready(polled.map(|frame| frame.map_err(BodyError::Client)))
    }

    fn is_end(&self) -> bool {
        let kept = lock(&self.kept);
        kept.ended && self.at >= kept.frames.len()
    }

    fn size_hint(&self) -> SizeHint {
        let kept = lock(&self.kept);
        let rest: u64 = kept.frames.iter().skip(self.at).map(Piece::len).sum();
        match kept.source.size_hint().exact() {
            Some(to_come) => SizeHint::with_exact(rest + to_come),
            None if kept.ended => SizeHint::with_exact(rest),
            None => SizeHint::default(),
        }
    }
}

impl Piece {
    fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Trailers(_) => 0,
        }
    }
}

impl Kept {
    /// Keeps a frame; returns how many were kept. Data is shared, not copied.
    fn keep(&mut self, frame: &Frame<Bytes>) -> usize {
        if self.lost {
            return 0;
        }
        let piece = match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => Piece::Data(data.clone()),
            (None, Some(trailers)) => Piece::Trailers(trailers.clone()),
            (None, None) => return 0,
        };
        self.bytes += frame.data_ref().map_or(0, Bytes::len);
        if self.bytes > self.limit {
            self.lost = true;
            self.frames = Vec::new();
            return 0;
        }
        self.frames.push(piece);
        1
    }
}
