//! Response bodies.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::error::Error;

/// What goes to the client.
pub(super) enum Body {
    /// Nothing. It does not say that its length is 0, because HTTP/2 would then tell the client so.
    None,
    /// These bytes, at once.
    Full(Bytes),
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match std::mem::replace(&mut *self, Self::None) {
            Self::None => Poll::Ready(None),
            Self::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::None)
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::None => SizeHint::default(),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
        }
    }
}
