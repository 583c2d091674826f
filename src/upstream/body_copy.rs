//! Copies of a streamed request body, for mirrored requests. A copy never holds the request up: one that cannot keep
//! pace is broken off.

use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::mpsc;

use super::body::BodyError;

/// Frames that a copy may lag behind: 16 KiB each from an HTTP/1 client, so 1 MiB.
const LAG: usize = 64;

/// What a copy is told.
#[derive(Debug)]
enum Piece {
    Data(Bytes),
    End,
}

/// Where the frames of a body are copied to. One worker's lock, never contended.
#[derive(Debug, Default)]
pub(super) struct Copies(Mutex<Vec<mpsc::Sender<Piece>>>);

impl Copies {
    /// One more copy of a body of this length.
    pub(super) fn add(&self, size: SizeHint) -> BodyCopy {
        let (sender, receiver) = mpsc::channel(LAG);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        BodyCopy { receiver, size, ended: false }
    }

    /// Hands a frame on. Trailers are not mirrored.
    pub(super) fn note(&self, data: Option<&Bytes>, last: bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|copy| {
            let kept = data.is_none_or(|data| copy.try_send(Piece::Data(data.clone())).is_ok());
            // The last place is kept free for nothing: an end that finds no room breaks the copy off like any frame.
            kept && (!last || copy.try_send(Piece::End).is_ok())
        });
    }
}

/// A copy.
#[derive(Debug)]
pub(super) struct BodyCopy {
    receiver: mpsc::Receiver<Piece>,
    size: SizeHint,
    ended: bool,
}

impl BodyCopy {
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match ready!(Pin::new(&mut self.receiver).poll_recv(cx)) {
            Some(Piece::Data(data)) => Poll::Ready(Some(Ok(Frame::data(data)))),
            Some(Piece::End) => {
                self.ended = true;
                Poll::Ready(None)
            }
            None => Poll::Ready(Some(Err(BodyError::BrokenOff))),
        }
    }

    pub(super) fn is_end(&self) -> bool {
        self.ended
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.size
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn next(copy: &mut BodyCopy) -> Option<Result<Bytes, ()>> {
        let frame = poll_fn(|cx| copy.poll(cx)).await?;
        Some(frame.map(|frame| frame.into_data().unwrap()).map_err(|_| ()))
    }

    #[tokio::test]
    async fn a_copy_says_what_was_said() {
        let copies = Copies::default();
        let mut copy = copies.add(SizeHint::with_exact(2));
        copies.note(Some(&Bytes::from_static(b"a")), false);
        copies.note(Some(&Bytes::from_static(b"b")), true);
        assert_eq!(next(&mut copy).await, Some(Ok(Bytes::from_static(b"a"))));
        assert_eq!(next(&mut copy).await, Some(Ok(Bytes::from_static(b"b"))));
        assert_eq!(next(&mut copy).await, None);
    }

    #[tokio::test]
    async fn one_that_lags_or_loses_its_source_fails() {
        let copies = Copies::default();
        let mut slow = copies.add(SizeHint::default());
        for _ in 0..=LAG {
            copies.note(Some(&Bytes::from_static(b"x")), false);
        }
        for _ in 0..LAG {
            assert!(next(&mut slow).await.unwrap().is_ok());
        }
        assert_eq!(next(&mut slow).await, Some(Err(())));
        let mut orphan = copies.add(SizeHint::default());
        drop(copies);
        assert_eq!(next(&mut orphan).await, Some(Err(())));
    }
}
