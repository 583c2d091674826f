//! Small writes of one HTTP/2 connection, gathered into few.
//!
//! The codec writes and flushes each data frame by itself, so answers that are ready at the same time would cost a system
//! call each, and under TLS a record each. A [`Gather`] keeps what it is given, and keeps it over a flush, until the task
//! of its connection is polled once more: it asks for that itself, so other tasks that are ready before it add their
//! frames first. The price is one more poll of the task for each batch, and the copy of small frames; frames that fill a
//! record by themselves are not copied.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use pin_project::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most bytes that are kept: the payload of one TLS record.
const MOST: usize = 16 * 1024;

/// How often the task of a connection has been polled.
#[derive(Debug, Clone, Default)]
pub struct Turn(Arc<AtomicU32>);

impl Turn {
    /// A future that counts its polls here.
    pub fn count<F>(self, future: F) -> Counted<F> {
        Counted { future, turn: self }
    }

    fn now(&self) -> u32 {
        self.0.load(Relaxed)
    }
}

/// See [`Turn::count`].
#[derive(Debug)]
#[pin_project]
pub struct Counted<F> {
    #[pin]
    future: F,
    turn: Turn,
}

impl<F> Counted<F> {
    /// The future itself.
    pub fn inner(self: Pin<&mut Self>) -> Pin<&mut F> {
        self.project().future
    }
}

impl<F: Future> Future for Counted<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        this.turn.0.fetch_add(1, Relaxed);
        this.future.poll(cx)
    }
}

/// A stream that keeps small writes until the next turn.
#[derive(Debug)]
pub struct Gather<S> {
    inner: S,
    kept: Vec<u8>,
    /// So much of `kept` is written.
    written: usize,
    turn: Turn,
    /// The turn in which a flush was put off.
    put_off: Option<u32>,
}

impl<S: AsyncWrite + Unpin> Gather<S> {
    /// Gathers the writes of a connection whose task counts its polls in `turn`.
    pub fn new(inner: S, turn: Turn) -> Self {
        Self { inner, kept: Vec::new(), written: 0, turn, put_off: None }
    }

    /// Takes these bytes; `false`: there is no room, and they are too many to be kept at all.
    fn keep(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>], bytes: usize) -> Poll<io::Result<bool>> {
        if self.kept.len() + bytes > MOST {
            ready!(self.write_out(cx))?;
            if bytes > MOST {
                return Poll::Ready(Ok(false));
            }
        }
        if self.kept.capacity() == 0 {
            self.kept.reserve_exact(MOST);
        }
        for buf in bufs {
            self.kept.extend_from_slice(buf);
        }
        Poll::Ready(Ok(true))
    }

    /// Writes what is kept. An idle connection keeps no memory.
    fn write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.kept.len() {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, &self.kept[self.written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                bytes => self.written += bytes,
            }
        }
        self.kept = Vec::new();
        self.written = 0;
        self.put_off = None;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gather<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gather<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if ready!(self.keep(cx, &[IoSlice::new(buf)], buf.len()))? {
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes = bufs.iter().map(|buf| buf.len()).sum();
        if ready!(self.keep(cx, bufs, bytes))? {
            return Poll::Ready(Ok(bytes));
        }
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.kept.is_empty() {
            let now = self.turn.now();
            match self.put_off {
                None => {
                    self.put_off = Some(now);
                    cx.waker().wake_by_ref();
                    return Poll::Ready(Ok(()));
                }
                Some(turn) if turn == now => return Poll::Ready(Ok(())),
                Some(_) => ready!(self.write_out(cx))?,
            }
        }
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.write_out(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Remembers each write; takes at most `room` bytes of it.
    #[derive(Default)]
    struct Wire {
        writes: Vec<Vec<u8>>,
        room: usize,
        closed: bool,
    }

    impl AsyncWrite for Wire {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let taken = buf.len().min(self.room);
            self.writes.push(buf[..taken].to_vec());
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.closed = true;
            Poll::Ready(Ok(()))
        }
    }

    fn gather(room: usize) -> (Gather<Wire>, Turn) {
        let turn = Turn::default();
        (Gather::new(Wire { room, ..Wire::default() }, turn.clone()), turn)
    }

    fn write(gather: &mut Gather<Wire>, bytes: &[u8]) {
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(Ok(taken)) = Pin::new(&mut *gather).poll_write(&mut cx, bytes) else { panic!("not taken") };
        assert_eq!(taken, bytes.len());
        assert!(Pin::new(gather).poll_flush(&mut cx).is_ready());
    }

    /// One more poll of the connection's task, which flushes.
    fn turn(gather: &mut Gather<Wire>, turn: &Turn) {
        let mut cx = Context::from_waker(Waker::noop());
        let flush = turn.clone().count(std::future::poll_fn(|cx| Pin::new(&mut *gather).poll_flush(cx)));
        assert!(matches!(Box::pin(flush).as_mut().poll(&mut cx), Poll::Ready(Ok(()))));
    }

    #[test]
    fn writes_of_one_turn_are_one_write() {
        let (mut gather, now) = gather(usize::MAX);
        write(&mut gather, b"one ");
        write(&mut gather, b"two");
        assert!(gather.inner.writes.is_empty());
        turn(&mut gather, &now);
        assert_eq!(gather.inner.writes, [b"one two"]);
        write(&mut gather, b"three");
        turn(&mut gather, &now);
        assert_eq!(gather.inner.writes[1..], [b"three"]);
    }

    #[test]
    fn bytes_keep_their_order_whatever_their_size() {
        let (mut gather, now) = gather(usize::MAX);
        let (small, large) = (vec![1; MOST - 1], vec![2; MOST + 1]);
        for bytes in [&small, &large, &small] {
            write(&mut gather, bytes);
        }
        assert_eq!(gather.inner.writes, [small.clone(), large]);
        turn(&mut gather, &now);
        assert_eq!(gather.inner.writes[2..], [small]);
    }

    #[test]
    fn a_goodbye_takes_everything_along() {
        let (mut gather, _) = gather(2);
        write(&mut gather, b"bye");
        let mut cx = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut gather).poll_shutdown(&mut cx).is_ready());
        assert_eq!((gather.inner.writes.concat().as_slice(), gather.inner.closed), (&b"bye"[..], true));
    }
}
