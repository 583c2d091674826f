//! `match` of an HTTP route.

use super::at::At;
use super::{Findings, names, selector};

/// Findings of one match.
pub(super) fn request(found: &mut Findings, at: &At<'_>) {
    for (name, value) in at.get("headers").entries() {
        if value.is_null() {
            found.add(&value, "a match is expected; {} asks only whether the header is there");
        }
        header(found, &value, name);
        string(found, &value, false);
    }
    for (name, value) in at.get("withoutHeaders").entries() {
        header(found, &value, name);
        // A lone star is no expression: it asks whether the header is there.
        if value.get("regex").text() != "*" {
            string(found, &value, false);
        }
    }
    string(found, &at.get("uri"), true);
    for field in ["scheme", "method", "authority"] {
        string(found, &at.get(field), false);
    }
    for (_, value) in at.get("queryParams").entries() {
        string(found, &value, false);
    }
    let port = at.get("port");
    if port.whole_or_zero() != 0 {
        found.port(&port);
    }
    selector::labels(found, &at.get("sourceLabels"));
    selector::gateways(found, &at.get("gateways"));
    let namespace = at.get("sourceNamespace");
    found.expect(!namespace.has_text() || names::is_label(namespace.text()), &namespace, "no name of a namespace");
}

fn header(found: &mut Findings, at: &At<'_>, name: &str) {
    const PSEUDO: [&str; 5] = [":method", ":scheme", ":authority", ":path", ":status"];
    let good = PSEUDO.contains(&name) || names::is_claim_header(name) || names::is_token(name);
    if !good {
        found.add(at, format!("{name:?} is no header name"));
    }
}

/// A StringMatch; an empty prefix matches nothing but a path's beginning.
pub(super) fn string(found: &mut Findings, at: &At<'_>, empty_prefix: bool) {
    let (prefix, regex) = (at.get("prefix"), at.get("regex"));
    if regex.is_said() || regex.is_null() {
        if regex.has_text() {
            found.regex(&regex);
        } else {
            found.add(&regex, "an expression is expected");
        }
    } else if prefix.is_said() && !empty_prefix {
        found.expect(prefix.has_text(), &prefix, "a text is expected");
    }
}
