//! HTTP/2 that no library would send: frames written by hand, only to see how they are refused.

use std::time::Duration;

use serde_json::Value;

use super::conn::{Conn, Got};
use super::value::{bytes_at, bytes_of, pairs};
use crate::frames::{
    ACK, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PREFACE, RST_STREAM, SETTINGS, block, frame, take,
};

/// What became of a request that breaks the protocol.
#[derive(Debug, Clone, Default)]
pub(super) struct Refusal {
    /// Response headers came on the stream.
    pub(super) answered: bool,
    /// The stream was reset, with this code.
    pub(super) reset: Option<u32>,
    /// The connection was told to go away.
    pub(super) goaway: Option<u32>,
    /// How the connection ended.
    pub(super) end: Option<Got>,
}

/// Whether a library would refuse to send this request.
pub(super) fn is_odd(request: &Value) -> bool {
    let headers = pairs(&request["headers"]);
    let names: Vec<&str> = headers.iter().map(|(n, _)| n.as_str()).collect();
    let connect = headers.iter().any(|(n, v)| n == ":method" && v == "CONNECT");
    let count = |name: &str| names.iter().filter(|n| **n == name).count();
    let lacks = [":method", ":path", ":scheme"].iter().any(|name| count(name) != 1) && !connect;
    let first_plain = names.iter().position(|n| !n.starts_with(':')).unwrap_or(names.len());
    let late = names[first_plain..].iter().any(|n| n.starts_with(':'));
    let banned = ["connection", "keep-alive", "transfer-encoding", "upgrade", "proxy-connection"];
    let bad = headers.iter().any(|(name, value)| {
        banned.contains(&name.as_str())
            || name.is_empty()
            || name.chars().any(|c| c.is_ascii_uppercase() || c == ' ')
            || (name == "te" && value != "trailers")
            || value.chars().any(|c| c.is_control())
    });
    // The library would make a path of anything.
    let path = headers.iter().find(|(n, _)| n == ":path").map_or("/", |(_, v)| v.as_str());
    lacks || late || bad || !(path.starts_with('/') || path == "*")
}

/// Sends one request and watches.
pub(super) async fn send(conn: &mut Conn, request: &Value, limit: Duration) -> Refusal {
    let mut out = PREFACE.to_vec();
    frame(&mut out, SETTINGS, 0, 0, &[]);
    let body = bytes_at(request, "data");
    let flags = END_HEADERS | if body.is_none() { END_STREAM } else { 0 };
    frame(&mut out, HEADERS, flags, 1, &block_of(request));
    if let Some(body) = body {
        frame(&mut out, DATA, END_STREAM, 1, &body);
    }
    let mut refusal = Refusal::default();
    if conn.write(&out).await.is_err() {
        refusal.end = Some(Got::Reset);
        return refusal;
    }
    let mut seen = Vec::new();
    loop {
        match conn.read(&mut seen, limit).await {
            Got::Bytes(_) => take_frames(&mut seen, &mut refusal),
            Got::Timeout => return refusal,
            end => {
                refusal.end = Some(end);
                return refusal;
            }
        }
        if refusal.answered || refusal.reset.is_some() {
            // The stream is over; the connection is watched for a moment.
            let end = conn.read(&mut seen, Duration::from_millis(300)).await;
            take_frames(&mut seen, &mut refusal);
            refusal.end = matches!(end, Got::End | Got::Reset | Got::Alert(_)).then_some(end);
            return refusal;
        }
    }
}

/// A GOAWAY that names the last stream that was looked at.
pub(super) fn goaway(last: u64, code: Option<u64>) -> Vec<u8> {
    let word = |number: u64| u32::try_from(number).unwrap_or_default().to_be_bytes();
    let mut out = Vec::new();
    frame(&mut out, GOAWAY, 0, 0, &[word(last), word(code.unwrap_or(0))].concat());
    out
}

fn block_of(request: &Value) -> Vec<u8> {
    let headers: Vec<_> = pairs(&request["headers"]).into_iter().map(|(n, v)| (n, bytes_of(&v))).collect();
    block(headers.iter().map(|(name, value)| (name.as_bytes(), &value[..])))
}

fn take_frames(seen: &mut Vec<u8>, refusal: &mut Refusal) {
    while let Some(frame) = take(seen) {
        match frame.kind {
            HEADERS => refusal.answered = true,
            RST_STREAM => refusal.reset = frame.word(0),
            GOAWAY => refusal.goaway = frame.word(4),
            SETTINGS if frame.flags & ACK == 0 => {}
            _ => {}
        }
    }
}
