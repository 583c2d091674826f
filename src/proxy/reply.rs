//! Answers of our own: text for people, trailers-only for gRPC, with the headers that mesh peers expect.

use std::borrow::Cow;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use super::body::Body;
use super::head::Malformed;
use crate::error::{Flags, Kind, grpc_status};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// gRPC's percent-encoding of a message.
const MESSAGE: &AsciiSet = &CONTROLS.add(b'%');

/// An answer of ours, before it is written down.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Cow<'static, str>,
    /// `%RESPONSE_CODE_DETAILS%`
    pub(super) details: Cow<'static, str>,
    pub(super) flags: Flags,
    /// Further headers, in front of the others.
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    /// gRPC status when it is not the one that belongs to the HTTP status.
    pub(super) grpc: Option<u32>,
    /// The connection ends with it.
    pub(super) close: bool,
    /// gRPC clients get it as it is.
    pub(super) plain: bool,
}

impl Reply {
    /// A reply without flags.
    pub(super) fn new(status: u16, details: impl Into<Cow<'static, str>>, body: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            body: body.into(),
            details: details.into(),
            flags: Flags::NONE,
            headers: Vec::new(),
            grpc: None,
            close: false,
            plain: false,
        }
    }

    /// The row of the error table.
    pub(super) fn of(kind: Kind) -> Self {
        let row = kind.row();
        Self { flags: row.flag, ..Self::new(row.status, row.details, row.body) }
    }

    /// An upstream failure after so many tries; the body names the reason.
    pub(super) fn of_upstream(kind: Kind, details: &str, retried: bool, suppress: bool) -> Self {
        let mut reply = Self::of(kind);
        reply.details = details.to_owned().into();
        let reason = kind.reset_reason();
        if !reason.is_empty() {
            let how = if retried { "retried and the latest reset reason" } else { "reset reason" };
            reply.body = format!("upstream connect error or disconnect/reset before headers. {how}: {reason}").into();
        }
        if matches!(kind, Kind::Overflow(_)) && !suppress {
            reply.headers.push((super::headers::OVERLOADED, HeaderValue::from_static("true")));
        }
        reply
    }

    /// A head that was refused before routing.
    pub(super) fn of_malformed(why: Malformed) -> Self {
        let codec = |status, details, body| Self {
            flags: Flags::DPE,
            close: true,
            plain: true,
            ..Self::new(status, details, body)
        };
        match why {
            Malformed::Codec => codec(400, "http1.codec_error", "Bad Request"),
            Malformed::Underscore => codec(400, "http1.unexpected_underscore", "Bad Request"),
            Malformed::Url => codec(400, "http1.invalid_url", "Bad Request"),
            Malformed::Authority => codec(400, "http.invalid_authority", "Bad Request"),
            Malformed::Version => codec(426, "low_version", "Upgrade Required"),
            Malformed::TransferEncoding => codec(501, "http1.invalid_transfer_encoding", "Not Implemented"),
            Malformed::NoHost => Self { close: true, ..Self::new(400, "missing_host_header", "") },
            Malformed::QueryContentType => Self { close: true, ..Self::new(400, "query_missing_content_type", "") },
            Malformed::Asterisk => Self::new(404, "absolute_path_rejected", ""),
            Malformed::Connect => Self { close: true, ..Self::of(Kind::NoRoute) },
        }
    }

    /// The response; `for_grpc`: the client reads errors from trailers.
    pub(super) fn write(self, for_grpc: bool) -> Response<Body> {
        let mut headers = HeaderMap::with_capacity(6 + self.headers.len());
        for (name, value) in self.headers {
            headers.append(name, value);
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let mut response = Response::new(Body::None);
        if for_grpc && !self.plain {
            let status = self.grpc.unwrap_or_else(|| grpc_status(self.status));
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(GRPC_STATUS, HeaderValue::from(status));
            if !self.body.is_empty() {
                let message = utf8_percent_encode(&self.body, MESSAGE).to_string();
                headers.insert(GRPC_MESSAGE, HeaderValue::try_from(message).expect("percent-encoded text"));
            }
            *response.headers_mut() = headers;
            return response;
        }
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if !self.body.is_empty() {
            headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
            *response.body_mut() = Body::Full(match self.body {
                Cow::Borrowed(text) => Bytes::from_static(text.as_bytes()),
                Cow::Owned(text) => Bytes::from(text),
            });
        }
        *response.headers_mut() = headers;
        response
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;

    use super::*;
    use crate::error::Limit;

    #[test]
    fn text_for_people() {
        let response = Reply::of(Kind::RbacDenied).write(false);
        assert_eq!(
            (response.status().as_u16(), &response.headers()["content-type"]),
            (403, &"text/plain".parse().unwrap())
        );
        assert_eq!(response.body().size_hint().exact(), Some(19));
        let empty = Reply::of(Kind::NoRoute).write(false);
        assert!(empty.body().is_end_stream() && empty.headers().is_empty());
    }

    #[test]
    fn trailers_only_for_grpc() {
        for (reply, status, message) in [
            (Reply::of(Kind::RbacDenied), "7", Some("RBAC: access denied")),
            (Reply::of(Kind::NoHealthyHost), "14", Some("no healthy upstream")),
            (Reply::new(502, "direct_response", ""), "14", None),
            (Reply { grpc: Some(9), ..Reply::new(200, "x", "100%\n") }, "9", Some("100%25%0A")),
        ] {
            let response = reply.write(true);
            assert_eq!(response.status(), 200);
            assert_eq!(response.headers()["grpc-status"], status);
            assert_eq!(response.headers().get("grpc-message").map(|v| v.to_str().unwrap()), message);
            assert!(response.body().is_end_stream());
        }
        assert_eq!(Reply::of_malformed(Malformed::Codec).write(true).status(), 400);
    }

    #[test]
    fn upstream_failures_name_their_reason() {
        let body = |kind, retried| Reply::of_upstream(kind, "d", retried, false).body;
        assert_eq!(
            body(Kind::Overflow(Limit::Pending), false),
            "upstream connect error or disconnect/reset before headers. reset reason: overflow"
        );
        assert_eq!(
            body(Kind::ConnectTimeout, true),
            "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: connection timeout"
        );
        assert_eq!(body(Kind::ResponseTimeout, true), "upstream request timeout");
        let overflow = Reply::of_upstream(Kind::Overflow(Limit::Requests), "d", false, false);
        assert_eq!(overflow.write(false).headers()["x-envoy-overloaded"], "true");
    }
}
