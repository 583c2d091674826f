//! The response as it goes to the client, with the account of its request.

use std::time::Duration;

use http::header::{CONNECTION, HeaderMap, HeaderValue};
use http::{Response, StatusCode, Version};
use hyper::upgrade::OnUpgrade;

use super::body::Body;
use super::ctx::Ctx;
use super::expiry::Expiry;
use super::headers;
use super::peer_metadata;
use super::reply::Reply;
use super::upgrade::{self, Switch};
use crate::error::Flags;
use crate::upstream;

/// A response of the upstream, ready but for its account.
pub(super) struct Answered {
    pub(super) head: http::response::Parts,
    pub(super) body: upstream::AnswerBody,
    pub(super) expiry: Option<Box<Expiry>>,
    pub(super) switch: Option<(OnUpgrade, OnUpgrade, Option<Duration>)>,
}

impl Answered {
    /// The response with its account.
    pub(super) fn write(self, mut ctx: Box<Ctx>, decorator: Option<HeaderValue>) -> Response<Body> {
        let mut head = self.head;
        finish_headers(&mut head.headers, &ctx, decorator);
        head.version = Version::HTTP_11;
        head.extensions.remove::<hyper::ext::ReasonPhrase>();
        if head.status.canonical_reason().is_none() {
            head.extensions.insert(hyper::ext::ReasonPhrase::from_static(b"Unknown"));
        }
        ctx.answered(head.status, &head.headers);
        if let Some((client, upstream, idle)) = self.switch {
            upgrade::spawn(ctx, Switch { client, upstream, place: self.body, idle });
            return Response::from_parts(head, Body::None);
        }
        if http_body::Body::is_end_stream(&self.body) {
            ctx.complete();
            return Response::from_parts(head, Body::None);
        }
        Response::from_parts(head, Body::Tracked(ctx, self.body, self.expiry))
    }
}

/// A reply of ours with its account.
pub(super) fn write_reply(mut reply: Reply, mut ctx: Box<Ctx>, decorator: Option<HeaderValue>) -> Response<Body> {
    let is_http1 = ctx.is_http1();
    // What is left of the body would be taken for the next request.
    reply.close = is_http1 && (reply.close || ctx.request_unfinished());
    ctx.flags.insert(reply.flags);
    ctx.details = std::mem::take(&mut reply.details);
    let is_codec_error = reply.flags.contains(Flags::DPE);
    if is_codec_error {
        // How the upstream saw it end says nothing new.
        ctx.trace.flags = Flags::NONE;
    }
    ctx.sent = if ctx.grpc && !reply.plain { 0 } else { reply.body.len() as u64 };
    let mut response = reply.write(ctx.grpc);
    finish_headers(response.headers_mut(), &ctx, decorator.filter(|_| !is_codec_error));
    if response.status().canonical_reason().is_none() || response.status() == StatusCode::IM_A_TEAPOT {
        response.extensions_mut().insert(hyper::ext::ReasonPhrase::from_static(b"Unknown"));
    }
    ctx.answered(response.status(), response.headers());
    ctx.complete();
    response
}

/// What every response gets, ours and the upstream's.
fn finish_headers(headers: &mut HeaderMap, ctx: &Ctx, decorator: Option<HeaderValue>) {
    let http = &ctx.http;
    headers::server(headers, &http.chain.options);
    peer_metadata::to_client(ctx, headers);
    if let Some(decorator) = decorator {
        headers.insert(headers::DECORATOR, decorator);
    } else if !http.conn.is_inbound() {
        headers.remove(headers::DECORATOR);
    }
    if ctx.is_http1() && http.is_last_request() && !headers.contains_key(http::header::UPGRADE) {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}
