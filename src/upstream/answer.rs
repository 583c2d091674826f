//! The response on its way back.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;

use crate::error::{Error, Kind};

/// A response whose body has not come yet.
#[derive(Debug)]
pub struct Answer {
    /// Status and headers, as the upstream sent them.
    pub head: http::response::Parts,
    /// Body; holds the request's place in the cluster until it ends or is dropped.
    pub body: AnswerBody,
    /// Resolves to the upstream's bytes after a 101.
    pub upgrade: Option<hyper::upgrade::OnUpgrade>,
}

/// The body of a response.
#[derive(Debug)]
pub struct AnswerBody {
    inner: Incoming,
}

impl AnswerBody {
    /// Bytes of data that have come so far.
    pub fn received(&self) -> u64 {
        0
    }
}

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        polled.map_err(|e| Error::upstream(Kind::UpstreamClosed).because(e))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
