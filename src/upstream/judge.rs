//! What a try was worth: one pure function that outlier detection, retries, flags and counts all read, so that they
//! cannot disagree.

use http::{HeaderMap, Method};

use super::outlier::Signal;
use crate::error::{Flags, Kind, Source};
use crate::snapshot::action::{RetryOn, RetryPolicy};

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome<'a> {
    /// A response head.
    Head(u16, &'a HeaderMap),
    /// No response: what failed, and whose doing it was.
    Failed(Kind, Source),
}

/// How a try went.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    pub(super) outcome: Outcome<'a>,
    pub(super) method: &'a Method,
    /// The connection had served before.
    pub(super) reused: bool,
    /// No byte of the request was written.
    pub(super) unsent: bool,
    /// A byte of a response came.
    pub(super) answered: bool,
}

/// What follows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Judgement {
    /// For outlier detection; `None` says nothing about the host.
    pub(super) signal: Option<Signal>,
    /// It may be sent again at once on a fresh connection, without asking the policy and without counting.
    pub(super) repeat: bool,
    /// The route's policy wants a retry.
    pub(super) retry: bool,
    /// Flags, if this try is the last.
    pub(super) flags: Flags,
    /// What failed.
    pub(super) why: Option<Kind>,
    /// It counts as an error of the host.
    pub(super) error: bool,
}

/// Judges one try.
pub(super) fn judge(facts: &Facts<'_>, policy: Option<&RetryPolicy>) -> Judgement {
    match facts.outcome {
        Outcome::Head(status, headers) => Judgement {
            signal: Some(Signal::Status(grpc_as_http(headers).unwrap_or(status))),
            repeat: false,
            retry: policy.is_some_and(|policy| wants_after_head(policy, status, headers)),
            flags: Flags::NONE,
            why: None,
            error: status >= 500,
        },
        Outcome::Failed(kind, source) => {
            let row = kind.row();
            let blamed = row.blames_host && source == Source::Upstream;
            let timeout = matches!(kind, Kind::PerTryTimeout | Kind::ResponseTimeout);
            let signal = if timeout { Signal::Timeout } else { Signal::Broken };
            Judgement {
                signal: blamed.then_some(signal),
                repeat: is_stale(facts, kind),
                retry: policy.is_some_and(|policy| wants_after_failure(policy, kind, facts.unsent)),
                flags: row.flag,
                why: Some(kind),
                error: blamed,
            }
        }
    }
}

/// A connection that had been waiting turned out dead: the request was surely not processed, or may be repeated because
/// its method says so and nothing came back.
fn is_stale(facts: &Facts<'_>, kind: Kind) -> bool {
    if !facts.reused || facts.answered || !matches!(kind, Kind::UpstreamClosed) {
        return false;
    }
    facts.unsent || facts.method.is_idempotent()
}

fn wants_after_head(policy: &RetryPolicy, status: u16, headers: &HeaderMap) -> bool {
    let on = policy.on;
    // The upstream has said that more of the same makes it worse.
    if headers.contains_key("x-envoy-overloaded") {
        return false;
    }
    if headers.contains_key("x-envoy-ratelimited") {
        return on.has(RetryOn::ENVOY_RATELIMITED);
    }
    let by_status = (on.has(RetryOn::SERVER_ERROR) && (500..600).contains(&status))
        || (on.has(RetryOn::GATEWAY_ERROR) && (502..=504).contains(&status))
        || (on.has(RetryOn::RETRIABLE_4XX) && status == 409)
        || (on.has(RetryOn::RETRIABLE_STATUS_CODES) && policy.statuses.contains(&status));
    by_status || grpc_status(headers).is_some_and(|grpc| wants_grpc(on, grpc))
}

fn wants_grpc(on: RetryOn, status: u32) -> bool {
    let word = match status {
        1 => RetryOn::GRPC_CANCELLED,
        4 => RetryOn::GRPC_DEADLINE_EXCEEDED,
        8 => RetryOn::GRPC_RESOURCE_EXHAUSTED,
        13 => RetryOn::GRPC_INTERNAL,
        14 => RetryOn::GRPC_UNAVAILABLE,
        _ => return false,
    };
    on.has(word)
}

fn wants_after_failure(policy: &RetryPolicy, kind: Kind, unsent: bool) -> bool {
    let on = policy.on;
    let any = on.has(RetryOn::RESET.and(RetryOn::SERVER_ERROR).and(RetryOn::GATEWAY_ERROR));
    match kind {
        Kind::ConnectRefused | Kind::ConnectTimeout | Kind::TlsHandshake | Kind::PeerIdentity => {
            any || on.has(RetryOn::CONNECT_FAILURE.and(RetryOn::RESET_BEFORE_REQUEST))
        }
        Kind::UpstreamRefused => any || on.has(RetryOn::REFUSED_STREAM),
        Kind::UpstreamReset | Kind::UpstreamClosed | Kind::UpstreamProtocol => {
            any || (unsent && on.has(RetryOn::RESET_BEFORE_REQUEST))
        }
        Kind::PerTryTimeout => any,
        // Nothing else is a try that failed: overflow, no host, the client's own doing.
        _ => false,
    }
}

/// `grpc-status` of a response head; trailers-only responses have it there.
pub(super) fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.trim().parse().ok()
}

/// The HTTP status that a gRPC status counts as.
fn grpc_as_http(headers: &HeaderMap) -> Option<u16> {
    Some(match grpc_status(headers)? {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn policy(words: &str) -> RetryPolicy {
        let on = words.split(',').map(|w| RetryOn::word(w).unwrap()).fold(RetryOn::default(), RetryOn::and);
        RetryPolicy {
            on,
            retries: 2,
            per_try_timeout: None,
            statuses: [418].into(),
            avoid_previous_hosts: true,
            host_selection_attempts: 5,
            previous_priorities: None,
            backoff_base: Duration::from_millis(25),
            backoff_max: Duration::from_millis(250),
        }
    }

    fn facts(outcome: Outcome<'_>) -> Facts<'_> {
        Facts { outcome, method: &Method::GET, reused: false, unsent: false, answered: false }
    }

    #[test]
    fn heads() {
        const ISTIO: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
        for (words, status, header, retry) in [
            (ISTIO, 503, None, false),
            (ISTIO, 418, None, true),
            (ISTIO, 200, Some(("grpc-status", "14")), true),
            (ISTIO, 200, Some(("grpc-status", "0")), false),
            (ISTIO, 200, Some(("grpc-status", "13")), false),
            ("5xx", 500, None, true),
            ("5xx", 404, None, false),
            ("5xx", 503, Some(("x-envoy-overloaded", "true")), false),
            ("5xx", 503, Some(("x-envoy-ratelimited", "true")), false),
            ("envoy-ratelimited", 429, Some(("x-envoy-ratelimited", "true")), true),
            ("gateway-error", 500, None, false),
            ("gateway-error", 504, None, true),
            ("retriable-4xx", 409, None, true),
            ("reset", 503, None, false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some((name, value)) = header {
                headers.insert(name, value.parse().unwrap());
            }
            let judged = judge(&facts(Outcome::Head(status, &headers)), Some(&policy(words)));
            assert_eq!(judged.retry, retry, "{words} on {status} {header:?}");
        }
    }

    #[test]
    fn failures() {
        use Kind::*;
        for (words, kind, unsent, retry) in [
            ("connect-failure", ConnectRefused, true, true),
            ("connect-failure", TlsHandshake, true, true),
            ("connect-failure", UpstreamClosed, false, false),
            ("refused-stream", UpstreamRefused, false, true),
            ("refused-stream", UpstreamReset, false, false),
            ("reset", UpstreamReset, false, true),
            ("reset", PerTryTimeout, false, true),
            ("5xx", UpstreamProtocol, false, true),
            ("reset-before-request", UpstreamClosed, false, false),
            ("reset-before-request", UpstreamClosed, true, true),
            ("reset,5xx", Overflow(crate::error::Limit::Pending), true, false),
            ("reset,5xx", NoHealthyHost, true, false),
            ("reset,5xx", ResponseTimeout, false, false),
        ] {
            let failed = Facts { unsent, ..facts(Outcome::Failed(kind, Source::Upstream)) };
            assert_eq!(judge(&failed, Some(&policy(words))).retry, retry, "{words} on {kind:?}");
        }
    }

    #[test]
    fn who_is_blamed() {
        let headers = HeaderMap::new();
        let mut unavailable = HeaderMap::new();
        unavailable.insert("grpc-status", "14".parse().unwrap());
        for (outcome, signal) in [
            (Outcome::Head(200, &headers), Some(Signal::Status(200))),
            (Outcome::Head(200, &unavailable), Some(Signal::Status(503))),
            (Outcome::Failed(Kind::ConnectRefused, Source::Upstream), Some(Signal::Broken)),
            // No port left on our side is nobody else's fault.
            (Outcome::Failed(Kind::ConnectRefused, Source::Local), None),
            (Outcome::Failed(Kind::PerTryTimeout, Source::Upstream), Some(Signal::Timeout)),
            (Outcome::Failed(Kind::Overflow(crate::error::Limit::Requests), Source::Local), None),
            (Outcome::Failed(Kind::DownstreamReset, Source::Downstream), None),
        ] {
            assert_eq!(judge(&facts(outcome), None).signal, signal, "{outcome:?}");
        }
    }

    #[test]
    fn only_what_is_surely_safe_is_repeated() {
        let closed = facts(Outcome::Failed(Kind::UpstreamClosed, Source::Upstream));
        let reused = Facts { reused: true, ..closed };
        let post = Facts { method: &Method::POST, ..reused };
        for (name, facts, repeat) in [
            ("a fresh connection", closed, false),
            ("an idempotent request without an answer", reused, true),
            ("half an answer", Facts { answered: true, ..reused }, false),
            ("a POST that may have been read", post, false),
            ("a POST that was not sent", Facts { unsent: true, ..post }, true),
            ("a reset", Facts { outcome: Outcome::Failed(Kind::UpstreamReset, Source::Upstream), ..reused }, false),
        ] {
            assert_eq!(judge(&facts, None).repeat, repeat, "{name}");
        }
    }
}
