//! `corsPolicy` of a route.

use super::at::At;
use super::{Findings, duration, names};

const METHODS: [&str; 10] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*"];

/// Findings of a policy.
pub(super) fn check(found: &mut Findings, policy: &At<'_>) {
    for origin in policy.get("allowOrigins").items() {
        let said = ["exact", "prefix", "regex"].into_iter().find(|k| origin.get(k).has_text());
        match said {
            None => found.add(&origin, "exact, prefix or regex is expected, and not empty"),
            Some("regex") => found.regex(&origin.get("regex")),
            Some(_) => {}
        }
    }
    found.each(&policy.get("allowMethods"), "is no HTTP method", |m| METHODS.contains(&m));
    for list in ["allowHeaders", "exposeHeaders"] {
        found.each(&policy.get(list), "is no header name", |h| h == "*" || names::is_token(h));
    }
    let age = policy.get("maxAge");
    duration::check(found, &age);
    let seconds = duration::nanoseconds(age.text()).is_none_or(|ns| ns % 1_000_000_000 == 0);
    found.expect(seconds, &age, "whole seconds are expected");
}
