//! One entry of a VirtualService's `http`.

use super::at::At;
use super::{Findings, cors, duration, header, http_match, names};
use crate::istio::virtual_service::GRPC_CODES;

const KIB: usize = 1024;

/// Findings of a route; `delegate` when it stands in a VirtualService without hosts.
pub(super) fn check(found: &mut Findings, route: &At<'_>, delegate: bool) {
    conflicts(found, route, delegate);
    let matches = route.get("match").items();
    for one in &matches {
        http_match::request(found, one);
    }
    header::operations(found, &route.get("headers"));
    cors::check(found, &route.get("corsPolicy"));
    fault(found, &route.get("fault"));
    mirror(found, route);
    redirect(found, &route.get("redirect"), &matches);
    direct_response(found, &route.get("directResponse"));
    retries(found, &route.get("retries"));
    rewrite(found, &route.get("rewrite"));
    authority(found, route);
    destinations(found, &route.get("route"));
    timeout(found, &route.get("timeout"));
}

/// 0 has a meaning (none), though the API server does not let it pass.
fn timeout(found: &mut Findings, at: &At<'_>) {
    if duration::nanoseconds(at.text()) == Some(0) {
        found.tell(at, "a duration of at least 1ms is expected; none is waited for without the field");
    } else {
        duration::check(found, at);
    }
}

/// One action, and what goes with it.
fn conflicts(found: &mut Findings, route: &At<'_>, delegate: bool) {
    let said = |field: &str| route.get(field).is_said();
    if said("delegate") && !delegate {
        for field in ["redirect", "route"] {
            found.expect(!said(field), &route.get(field), "what another VirtualService decides is not said here");
        }
        return;
    }
    found.expect(!said("delegate"), &route.get("delegate"), "a delegate cannot delegate");
    let forwards = route.get("route").len() > 0;
    let answers = [("redirect", said("redirect")), ("directResponse", said("directResponse"))];
    match answers.iter().find(|(_, said)| *said) {
        Some((answer, _)) => {
            let reason = format!("{answer} answers the request: nothing else is done with it");
            found.expect(!forwards, &route.get("route"), &reason);
            for field in ["fault", "rewrite"] {
                found.expect(!said(field), &route.get(field), &reason);
            }
            let both = answers.iter().all(|(_, said)| *said);
            found.expect(!both, &route.get("directResponse"), "a route redirects or answers, not both");
        }
        None => found.expect(forwards, &route.get("route"), "route, redirect or directResponse is expected"),
    }
    let mirrors = route.get("mirrors");
    found.expect(!said("mirror") || mirrors.len() == 0, &mirrors, "only one of mirror and mirrors may be set");
}

/// The authority is written once.
fn authority(found: &mut Findings, route: &At<'_>) {
    let mut written = route.at("rewrite.authority").has_text();
    for how in ["set", "add"] {
        let names = route.at("headers.request").get(how).entries();
        for (_, value) in names.into_iter().filter(|(name, _)| header::is_authority(name)) {
            found.expect(!written, &value, "the authority is already written by this route");
            written = value.has_text();
        }
    }
}

/// Weighted destinations of an HTTP or TCP route.
pub(super) fn destinations(found: &mut Findings, list: &At<'_>) {
    let items = list.items();
    let mut total = 0;
    for item in &items {
        let to = item.get("destination");
        if to.is_said() {
            destination(found, &to);
        } else {
            found.add(&to, "a destination is missing");
        }
        header::operations(found, &item.get("headers"));
        let weight = item.get("weight");
        let value = weight.whole_or_zero();
        found.expect(value >= 0, &weight, "a weight of 0 or more is expected");
        total += value;
    }
    found.expect(items.len() < 2 || total != 0, list, "several destinations whose weights are all zero");
}

/// Host, subset and port.
pub(super) fn destination(found: &mut Findings, at: &At<'_>) {
    let (host, subset, port) = (at.get("host"), at.get("subset"), at.get("port"));
    if host.has_text() {
        let good = host.text() != "*" && names::is_wildcard_host(host.text());
        found.expect(good, &host, "a host name is expected");
    } else {
        found.add(&host, "a host is missing");
    }
    found.expect(!subset.has_text() || names::is_label(subset.text()), &subset, "no name of a subset");
    if port.is_said() {
        found.port(&port.get("number"));
    }
}

fn mirror(found: &mut Findings, route: &At<'_>) {
    let percent = route.get("mirrorPercent");
    if percent.is_said() {
        found.expect(percent.whole_or_zero() <= 100, &percent, "at most 100 is expected");
        found.warn(&percent, "the field is outdated: say mirrorPercentage");
    }
    share(found, &route.get("mirrorPercentage"));
    let to = route.get("mirror");
    if to.is_said() {
        destination(found, &to);
    }
    mirrors(found, &route.get("mirrors"));
}

/// `mirrors`.
pub(super) fn mirrors(found: &mut Findings, list: &At<'_>) {
    for item in list.items() {
        let to = item.get("destination");
        if to.is_said() {
            destination(found, &to);
        } else {
            found.add(&to, "a destination is missing");
        }
        share(found, &item.get("percentage"));
    }
}

/// A share of requests to copy.
fn share(found: &mut Findings, at: &At<'_>) {
    let value = at.get("value");
    let percent = value.number().unwrap_or(0.0);
    found.expect((0.0..=100.0).contains(&percent), &value, "a percentage from 0 to 100 is expected");
}

/// `fault`: an abort, a delay or both.
pub(super) fn fault(found: &mut Findings, at: &At<'_>) {
    if !at.is_said() {
        return;
    }
    let some = at.get("abort").is_said() || at.get("delay").is_said();
    found.expect(some, at, "an abort or a delay is expected");
    abort(found, &at.get("abort"));
    delay(found, &at.get("delay"));
}

fn percentage(found: &mut Findings, at: &At<'_>) {
    let value = at.get("value");
    let percent = value.number().unwrap_or(0.0);
    let good = percent == 0.0 || (0.0001..=100.0).contains(&percent);
    found.expect(good, &value, "0 or a percentage from 0.0001 to 100 is expected");
}

/// `fault.abort`.
pub(super) fn abort(found: &mut Findings, at: &At<'_>) {
    if !at.is_said() {
        return;
    }
    percentage(found, &at.get("percentage"));
    let (http, grpc, http2) = (at.get("httpStatus"), at.get("grpcStatus"), at.get("http2Error"));
    if grpc.is_said() {
        found.expect(GRPC_CODES.contains(&grpc.text()), &grpc, "a gRPC status such as NOT_FOUND is expected");
    } else if http2.is_said() {
        found.add(&http2, "HTTP/2 errors were never supported by Istio");
    } else if http.is_said() {
        status(found, &http);
    } else {
        found.warn(at, "no status is said: nothing is aborted");
    }
}

/// `fault.delay`.
pub(super) fn delay(found: &mut Findings, at: &At<'_>) {
    percentage(found, &at.get("percentage"));
    let exponential = at.get("exponentialDelay");
    duration::check(found, &at.get("fixedDelay"));
    if exponential.is_said() {
        found.add(&exponential, "exponential delays were never supported by Istio");
    }
}

/// 600 is let pass, as Istio does.
fn status(found: &mut Findings, at: &At<'_>) {
    let good = (200..=600).contains(&at.whole_or_zero());
    found.expect(good, at, "a status from 200 to 599 is expected");
}

/// `redirect`; `matches` are those of its route.
pub(super) fn redirect(found: &mut Findings, at: &At<'_>, matches: &[At<'_>]) {
    if !at.is_said() {
        return;
    }
    let (uri, prefix, scheme) = (at.get("uri"), at.get("prefixRewrite"), at.get("scheme"));
    found.expect(!(uri.has_text() && prefix.has_text()), &uri, "only one of uri and prefixRewrite may be set");
    if prefix.has_text() {
        let whole = |m: &At<'_>| m.get("uri").is_said() && !m.get("uri").get("prefix").is_said();
        let reason = "the route's matches of the uri must be prefixes";
        found.expect(!matches.iter().any(whole), &prefix, reason);
    }
    let port = at.get("port").is_said() || at.get("derivePort").is_said();
    let some = uri.has_text() || prefix.has_text() || at.get("authority").has_text() || port || scheme.has_text();
    found.expect(some, at, "uri, authority, scheme or port is expected");
    let code = at.get("redirectCode");
    let value = code.whole_or_zero();
    found.expect(value == 0 || (300..400).contains(&value), &code, "a status from 300 to 399 is expected");
    found.expect(matches!(scheme.text(), "" | "http" | "https"), &scheme, "http or https is expected");
    if at.get("port").whole_or_zero() > 0 {
        found.port(&at.get("port"));
    }
}

/// `directResponse`.
pub(super) fn direct_response(found: &mut Findings, at: &At<'_>) {
    if !at.is_said() {
        return;
    }
    let (text, bytes) = (at.at("body.string"), at.at("body.bytes"));
    let padding = bytes.text().bytes().rev().take_while(|b| *b == b'=').count();
    let size = text.text().len().max(bytes.text().len() / 4 * 3 - padding.min(bytes.text().len() / 4 * 3));
    let body = if text.is_said() { text } else { bytes };
    if size > KIB * KIB {
        found.add(&body, "a body of at most 1 MiB is expected");
    } else if size > 100 * KIB {
        found.warn(&body, "bodies of more than 100 KiB burden whoever distributes the configuration");
    }
    status(found, &at.get("status"));
}

/// `retries`.
pub(super) fn retries(found: &mut Findings, at: &At<'_>) {
    if !at.is_said() {
        return;
    }
    let (attempts, on) = (at.get("attempts"), at.get("retryOn"));
    let count = attempts.whole_or_zero();
    found.expect(count >= 0, &attempts, "0 attempts or more are expected");
    let more = at.get("perTryTimeout").is_said() || on.has_text() || at.get("retryRemoteLocalities").is_said();
    found.expect(count != 0 || !more, &attempts, "0 attempts switch retries off: no other field goes with it");
    for field in ["perTryTimeout", "backoff"] {
        duration::check(found, &at.get(field));
    }
    for word in on.text().split(',').filter(|_| on.has_text()) {
        if !is_retry_word(word) {
            found.add(&on, format!("{word:?} is no condition of a retry; conditions are separated by commas alone"));
        }
    }
}

/// A condition, or a status that has a name.
fn is_retry_word(word: &str) -> bool {
    const WORDS: [&str; 16] = [
        "5xx",
        "gateway-error",
        "reset",
        "reset-before-request",
        "connect-failure",
        "retriable-4xx",
        "refused-stream",
        "retriable-status-codes",
        "retriable-headers",
        "envoy-ratelimited",
        "http3-post-connect-failure",
        "cancelled",
        "deadline-exceeded",
        "internal",
        "resource-exhausted",
        "unavailable",
    ];
    let named = |code: u16| {
        matches!(code, 100..=103 | 200..=208 | 226 | 300..=305 | 307 | 308 | 400..=418 | 421..=426 | 428 | 429 | 431)
            || matches!(code, 451 | 500..=508 | 510 | 511)
    };
    WORDS.contains(&word) || word.parse().is_ok_and(named)
}

/// `rewrite`.
pub(super) fn rewrite(found: &mut Findings, at: &At<'_>) {
    if !at.is_said() {
        return;
    }
    let (uri, regex) = (at.get("uri"), at.get("uriRegexRewrite"));
    found.expect(!(uri.has_text() && regex.is_said()), &uri, "only one of uri and uriRegexRewrite may be set");
    let some = uri.has_text() || regex.is_said() || at.get("authority").has_text();
    found.expect(some, at, "uri, uriRegexRewrite or authority is expected");
    regex_rewrite(found, &regex);
}

/// `rewrite.uriRegexRewrite`.
pub(super) fn regex_rewrite(found: &mut Findings, at: &At<'_>) {
    if !at.is_said() {
        return;
    }
    let (expression, rewrite) = (at.get("match"), at.get("rewrite"));
    if expression.has_text() {
        found.regex(&expression);
    } else {
        found.add(&expression, "an expression is expected");
    }
    found.expect(rewrite.has_text(), &rewrite, "a substitution is expected");
}
