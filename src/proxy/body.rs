//! Response bodies: our own, and the upstream's with its account.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::ctx::Ctx;
use super::expiry::Expiry;
use super::running;
use crate::error::Error;
use crate::upstream::AnswerBody;

/// What goes to the client.
pub(super) enum Body {
    /// Nothing. It does not say that its length is 0, because HTTP/2 would then tell the client so.
    None,
    /// These bytes, at once.
    Full(Bytes),
    /// What the upstream sends; the account is settled with its end.
    Tracked(Box<Ctx>, AnswerBody, Option<Box<Expiry>>),
    /// As it was, until the end.
    Done,
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        match this {
            Self::None | Self::Done => Poll::Ready(None),
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *this = Self::Done;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Tracked(ctx, inner, expiry) => {
                if ctx.grpc && ctx.is_denied() {
                    let trailers = running::farewell();
                    ctx.note_grpc_status(&trailers);
                    ctx.complete();
                    *this = Self::Done;
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                let polled = Pin::new(&mut *inner).poll_frame(cx);
                if polled.is_pending() && ctx.grpc {
                    ctx.poll_report(cx);
                }
                if let (Poll::Pending, Some(expiry)) = (&polled, expiry.as_deref_mut()) {
                    let error = ready!(expiry.poll(cx, ctx.progress.as_deref()));
                    ctx.failed(&error);
                    *this = Self::Done;
                    return Poll::Ready(Some(Err(error)));
                }
                let frame = ready!(polled);
                if let Some(expiry) = expiry {
                    expiry.active();
                }
                let ended = note(ctx, &frame) || inner.is_end_stream();
                if ended {
                    ctx.complete();
                    // The account is settled and the upstream's place given back now, not when the codec lets go.
                    *this = Self::Done;
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::None | Self::Done => true,
            Self::Full(_) => false,
            Self::Tracked(_, inner, _) => inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::None | Self::Done => SizeHint::default(),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Tracked(_, inner, _) => inner.size_hint(),
        }
    }
}

/// Notes a frame; whether it was the last.
fn note(ctx: &mut Ctx, frame: &Option<Result<Frame<Bytes>, Error>>) -> bool {
    match frame {
        Some(Ok(frame)) => {
            if let Some(data) = frame.data_ref() {
                ctx.sent += data.len() as u64;
                if ctx.grpc {
                    ctx.response_messages.note(data);
                }
            } else if let Some(trailers) = frame.trailers_ref() {
                ctx.note_grpc_status(trailers);
                return true;
            }
            false
        }
        Some(Err(error)) => {
            ctx.failed(error);
            true
        }
        None => true,
    }
}
