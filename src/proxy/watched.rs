//! A client's HTTP stream that is watched while it is read: heads that lie about their length, floods of control frames,
//! heads that never end.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::live::Counts;
use crate::net::sniff::Codec;
use crate::net::{Frames, Heads, Stream};

/// How long a head may take from its first byte when configuration does not say. Envoy under Istio has no limit here, so
/// whoever sends a byte a minute keeps a connection for ever; no honest client needs that long.
pub(super) const HEAD_LIMIT: Duration = Duration::from_secs(60);

/// What is looked at.
enum Watch {
    Http1(Heads),
    /// Boxed: HTTP/1 connections are the many.
    Http2(Box<Frames>),
}

/// The stream. Reading fails when the client is to be cut off.
pub(super) struct Watched {
    inner: Stream,
    watch: Watch,
    counts: Arc<Counts>,
    /// Something was written and is not known to be flushed.
    unflushed: bool,
    limit: Duration,
    /// Runs while a head is unfinished, which is rarely seen: most heads come in one piece.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Watched {
    /// Watches a stream of this codec. `limit`: how long a head may take.
    pub(super) fn new(inner: Stream, codec: Codec, limit: Option<Duration>, counts: &Arc<Counts>) -> Self {
        let watch = match codec {
            Codec::Http1 => Watch::Http1(Heads::default()),
            Codec::Http2 => Watch::Http2(Box::new(Frames::new(Instant::now()))),
        };
        let counts = Arc::clone(counts);
        Self { inner, watch, counts, unflushed: false, limit: limit.unwrap_or(HEAD_LIMIT), timer: None }
    }

    /// The stream below, once it speaks something else.
    pub(super) fn into_inner(self) -> Stream {
        self.inner
    }

    /// Whether everything that was written is on its way.
    pub(super) fn is_flushed(&self) -> bool {
        !self.unflushed
    }

    fn look(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let inside = match &mut self.watch {
            Watch::Http1(heads) => {
                heads.feed(bytes);
                heads.is_inside()
            }
            Watch::Http2(frames) => {
                if frames.feed(bytes, Instant::now()).is_err() {
                    return Err(io::Error::other("the client floods us with control frames"));
                }
                if self.counts.is_flooded() {
                    return Err(io::Error::other("the client resets its requests as fast as it makes them"));
                }
                frames.is_inside()
            }
        };
        match (inside, &self.timer) {
            (false, Some(_)) => self.timer = None,
            (true, None) => self.timer = Some(Box::pin(sleep(self.limit))),
            _ => {}
        }
        self.tell_rest();
        Ok(())
    }

    /// A request whose body is still to come is no rest, whatever became of its answer.
    fn tell_rest(&self) {
        let between = matches!(&self.watch, Watch::Http1(heads) if heads.is_between());
        self.counts.rest(between && !self.unflushed);
    }

    /// Something is about to be written.
    fn unflushed(&mut self) {
        self.unflushed = true;
        self.tell_rest();
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        match Pin::new(&mut this.inner).poll_read(cx, buf) {
            Poll::Ready(read) => Poll::Ready(read.and_then(|()| this.look(&mut buf.filled_mut()[before..]))),
            Poll::Pending => {
                let Some(timer) = &mut this.timer else { return Poll::Pending };
                ready!(timer.as_mut().poll(cx));
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not finish its head")))
            }
        }
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.unflushed();
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, buf));
        self.note(&written);
        Poll::Ready(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.unflushed();
        let written = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, bufs));
        self.note(&written);
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The codec flushes when it has nothing left to write.
        ready!(Pin::new(&mut self.inner).poll_flush(cx))?;
        self.unflushed = false;
        self.tell_rest();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl Watched {
    fn note(&mut self, written: &io::Result<usize>) {
        if let (Watch::Http2(frames), Ok(bytes)) = (&mut self.watch, written) {
            frames.sent(*bytes);
        }
    }
}
