//! Time limits of a request.

use std::time::Duration;

use http::HeaderMap;
use http::header::HeaderName;

use crate::snapshot::HttpOptions;
use crate::snapshot::action::Forward;

pub(super) const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The limits that apply to one request; `None` is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Limits {
    /// On the response, from the end of the request.
    pub(super) response: Option<Duration>,
    /// On the whole stream.
    pub(super) stream: Option<Duration>,
    /// On silence of the stream.
    pub(super) idle: Option<Duration>,
}

impl Limits {
    /// From the route, the connection manager and what a gRPC client asks for.
    pub(super) fn new(forward: &Forward, options: &HttpOptions, headers: &HeaderMap, grpc: bool) -> Self {
        let asked = || headers.get(GRPC_TIMEOUT).and_then(|v| grpc_timeout(v.as_bytes()));
        let response = match forward.max_grpc_timeout {
            // Without a wish of the client's, a gRPC route has no limit rather than the route's.
            Some(max) if grpc => capped(asked(), max),
            _ => forward.timeout,
        };
        let said = forward.max_stream_duration.unwrap_or(options.max_stream_duration);
        let stream = match (forward.grpc_timeout_header_max, asked()) {
            (Some(max), Some(asked)) => capped(Some(asked), max),
            _ => said,
        };
        Self {
            response: on(response),
            stream: on(stream),
            idle: forward.idle_timeout.unwrap_or(options.stream_idle_timeout),
        }
    }
}

/// Zero is off.
fn on(limit: Option<Duration>) -> Option<Duration> {
    limit.filter(|limit| !limit.is_zero())
}

/// What was asked for, at most `max`; a `max` of zero takes any wish.
fn capped(asked: Option<Duration>, max: Duration) -> Option<Duration> {
    if max.is_zero() {
        return asked;
    }
    Some(asked.filter(|asked| !asked.is_zero()).map_or(max, |asked| asked.min(max)))
}

/// `TimeoutValue TimeoutUnit` of the gRPC protocol: at most eight digits and one of `H M S m u n`.
fn grpc_timeout(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = digits.iter().fold(0u64, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(value * 3600),
        b'M' => Duration::from_secs(value * 60),
        b'S' => Duration::from_secs(value),
        b'm' => Duration::from_millis(value),
        b'u' => Duration::from_micros(value),
        b'n' => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts() {
        for (text, expected) in [
            ("1S", Some(1000)),
            ("20m", Some(20)),
            ("1H", Some(3_600_000)),
            ("2M", Some(120_000)),
            ("5000u", Some(5)),
            ("99999999S", Some(99_999_999_000)),
            ("100000000S", None),
            ("S", None),
            ("-1S", None),
            ("1", None),
            ("", None),
        ] {
            assert_eq!(grpc_timeout(text.as_bytes()).map(|d| d.as_millis() as u64), expected, "{text}");
        }
    }

    #[test]
    fn caps() {
        let second = Duration::from_secs(1);
        assert_eq!(capped(None, Duration::ZERO), None);
        assert_eq!(capped(Some(second), Duration::ZERO), Some(second));
        assert_eq!(capped(Some(second), second / 2), Some(second / 2));
        assert_eq!(capped(None, second), Some(second));
    }
}
