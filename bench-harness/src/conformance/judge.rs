//! Compares what was recorded on the wire with what happened: conformance.md's rules, nothing about single cases.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::tally::Difference;

/// Everything that one case did.
#[derive(Debug, Default)]
pub(super) struct Happened {
    /// One answer for each step.
    pub(super) steps: Vec<Value>,
    /// The applications' notes.
    pub(super) report: Value,
    /// Lines of the access log.
    pub(super) log: Vec<Value>,
}

/// Differences between a case and what happened.
pub(super) fn differences(case: &Value, happened: &Happened) -> Vec<Difference> {
    let recorded = compare(case, happened);
    if recorded.is_empty() || case["alsoSeen"].is_null() {
        return recorded;
    }
    // Two runs of the real program differed; either will do, part by part.
    let mut other = case.clone();
    let also = &case["alsoSeen"];
    for (step, expect) in other["steps"].as_array_mut().into_iter().flatten().zip(list(&also["expect"])) {
        step["expect"] = expect.clone();
    }
    for part in ["upstream", "app_saw", "log"] {
        if !also[part].is_null() {
            other[part] = also[part].clone();
        }
    }
    let second = compare(&other, happened);
    let in_both = |d: &Difference| second.iter().any(|o| o.field == d.field);
    recorded.into_iter().filter(in_both).collect()
}

fn compare(case: &Value, happened: &Happened) -> Vec<Difference> {
    let mut out = Out::default();
    let refusal = is_parser_refusal(case);
    for (at, step) in list(&case["steps"]).iter().enumerate() {
        let seen = happened.steps.get(at).unwrap_or(&Value::Null);
        exchange(&step["expect"], seen, refusal, &mut out.at(format!("steps[{at}]")));
        for (number, more) in list(&step["more"]).iter().enumerate() {
            let seen = &seen["more"][number];
            exchange(&more["expect"], seen, refusal, &mut out.at(format!("steps[{at}].more[{number}]")));
        }
    }
    let noted = if case["app_saw"].is_array() { "app_saw" } else { "upstream" };
    apps(&case[noted], &happened.report, &mut out.at(noted.to_owned()));
    log(&case["log"], &happened.log, refusal, &mut out.at("log".to_owned()));
    out.found
}

/// Refusals by the HTTP parser: status and closing count, text and headers are free.
fn is_parser_refusal(case: &Value) -> bool {
    list(&case["log"]).iter().any(|line| {
        let details = text(&line["details"]);
        details.starts_with("http1.") || details.starts_with("http2.") || details.contains("codec_error")
    })
}

#[derive(Default)]
struct Out {
    found: Vec<Difference>,
}

struct At<'a> {
    path: String,
    out: &'a mut Out,
}

impl Out {
    fn at(&mut self, path: String) -> At<'_> {
        At { path, out: self }
    }
}

impl At<'_> {
    fn tell(&mut self, field: &str, expected: impl ToString, seen: impl ToString) {
        self.out.found.push(Difference::new(format!("{}{field}", self.path), expected, seen));
    }
}

fn list(of: &Value) -> &[Value] {
    of.as_array().map_or(&[], Vec::as_slice)
}

fn text(of: &Value) -> &str {
    of.as_str().unwrap_or_default()
}

fn exchange(expect: &Value, seen: &Value, refusal: bool, at: &mut At<'_>) {
    if expect.is_null() {
        return;
    }
    let handshake = text(&expect["handshake"]);
    if !matches!(handshake, "" | "ok") {
        if !was_refused(seen) {
            at.tell(".handshake", handshake, seen);
        }
        return;
    }
    let seen_handshake = text(&seen["handshake"]);
    if handshake == "ok" && !matches!(seen_handshake, "ok" | "") {
        return at.tell(".handshake", "ok", seen_handshake);
    }
    if !expect["counts"].is_null() {
        return counts(&expect["counts"], &seen["counts"], at);
    }
    if let Some(streams) = expect["streams"].as_array() {
        for (number, stream) in streams.iter().enumerate() {
            answer(stream, &seen["streams"][number], refusal, at);
        }
    } else {
        answer(expect, seen, refusal, at);
    }
    let (wanted, got) = (text(&expect["connection"]), text(&seen["connection"]));
    if !wanted.is_empty() && (wanted == "kept") != (got == "kept") {
        at.tell(".connection", wanted, got);
    }
}

fn was_refused(seen: &Value) -> bool {
    let handshake = text(&seen["handshake"]);
    let silent = seen["status"].is_null() && text(&seen["bytes"]).is_empty();
    handshake != "ok" || (silent && text(&seen["connection"]) != "kept")
}

fn counts(expected: &Value, seen: &Value, at: &mut At<'_>) {
    // The spaces of `-  reset` and the word for a closed connection are the recorders' own.
    let tidy = |of: &Value| -> Map<String, Value> {
        let map = of.as_object().cloned().unwrap_or_default();
        let mut out = Map::new();
        for (key, count) in map {
            let key = key.replace("closed  closed", "-  closed").replace("ok ok kept", "- ok kept");
            let key = key.replace(" reset", " closed");
            let before = out.get(&key).and_then(Value::as_u64).unwrap_or(0);
            out.insert(key, Value::from(before + count.as_u64().unwrap_or(0)));
        }
        out
    };
    let (expected, seen) = (tidy(expected), tidy(seen));
    // Which of several equal endpoints gets how much is no part of any case: the same answers with each status, and the same
    // numbers of them, are the same.
    let shape = |of: &Map<String, Value>| -> Vec<(String, u64)> {
        let status = |key: &String| key.split(' ').next().unwrap_or_default().to_owned();
        let mut all: Vec<_> = of.iter().map(|(key, count)| (status(key), count.as_u64().unwrap_or(0))).collect();
        all.sort();
        all
    };
    let same_answers = expected.keys().eq(seen.keys());
    if expected != seen && !(same_answers && shape(&expected) == shape(&seen)) {
        at.tell(".counts", Value::Object(expected), Value::Object(seen));
    }
}

fn answer(expect: &Value, seen: &Value, refusal: bool, at: &mut At<'_>) {
    if expect["reply"] == "none" {
        if !seen["status"].is_null() || !text(&seen["bytes"]).is_empty() {
            at.tell(".reply", "none", seen);
        }
        return;
    }
    for field in ["status", "reset", "goaway", "upgraded", "incomplete"] {
        if !expect[field].is_null() && expect[field] != seen[field] {
            at.tell(&format!(".{field}"), &expect[field], &seen[field]);
        }
    }
    if expect["status"].is_null() && !seen["status"].is_null() && expect["bytes"].is_null() {
        at.tell(".status", "none", &seen["status"]);
    }
    if refusal {
        return;
    }
    if !expect["reason"].is_null() && expect["reason"] != seen["reason"] {
        at.tell(".reason", &expect["reason"], &seen["reason"]);
    }
    // Of a body that was cut between its chunks the recordings keep the chunks.
    let chunked = list(&expect["headers"]).iter().any(|h| h[0] == "transfer-encoding");
    if let (true, true, Some(raw)) = (chunked, expect["incomplete"] == true, expect["body"].as_str()) {
        bytes("body", &json!({"body": unchunked(raw)}), seen, at);
    } else {
        bytes("body", expect, seen, at);
    }
    bytes("bytes", expect, seen, at);
    for field in ["headers", "trailers"] {
        if expect[field].is_array() {
            headers(field, &expect[field], &seen[field], at);
        }
    }
    let early = list(&expect["informational"]);
    for (number, info) in early.iter().enumerate() {
        let seen = &seen["informational"][number];
        if info["status"] != seen["status"] {
            at.tell(&format!(".informational[{number}].status"), &info["status"], &seen["status"]);
        }
        headers(&format!("informational[{number}].headers"), &info["headers"], &seen["headers"], at);
    }
    if early.is_empty() && !list(&seen["informational"]).is_empty() {
        at.tell(".informational", "none", &seen["informational"]);
    }
}

/// Bytes under `NAME`, `NAMEBase64` or as a hash.
fn bytes(name: &str, expect: &Value, seen: &Value, at: &mut At<'_>) {
    let length = &expect[format!("{name}Length")];
    let expected = decoded(name, expect);
    let Some(expected) = expected else {
        if let Some(length) = length.as_u64() {
            let got = decoded(name, seen).map_or(0, |b| b.len() as u64);
            if got != length {
                at.tell(&format!(".{name}Length"), length, got);
            }
        }
        return;
    };
    let got = decoded(name, seen).unwrap_or_default();
    if expected != got && !stands_for(&expected, &got) {
        let show = |b: &[u8]| format!("{:?}", String::from_utf8_lossy(b));
        at.tell(&format!(".{name}"), show(&expected), show(&got));
    }
}

/// What the recordings write for bytes that are long or change from run to run.
fn stands_for(expected: &[u8], got: &[u8]) -> bool {
    let text = String::from_utf8_lossy(expected);
    if text == "<TLS ClientHello>" {
        return got.starts_with(&[0x16, 3]);
    }
    if let Some(length) = text.strip_prefix('<').and_then(|t| t.strip_suffix(" bytes>")) {
        return length.parse() == Ok(got.len());
    }
    // A message whole: its header lines in any order, as elsewhere.
    let seen = String::from_utf8_lossy(got);
    let (Some((head, body)), Some((seen_head, seen_body))) = (text.split_once("\r\n\r\n"), seen.split_once("\r\n\r\n"))
    else {
        return false;
    };
    let lines = |head: &str| -> (String, Value) {
        let mut lines = head.split("\r\n");
        let first = lines.next().unwrap_or_default().to_owned();
        let pair = |line: &str| line.split_once(": ").map(|(name, value)| Value::from(vec![name, value]));
        (first, lines.filter_map(pair).collect())
    };
    let ((first, wanted), (seen_first, headers_seen)) = (lines(head), lines(seen_head));
    let mut out = Out::default();
    headers("", &wanted, &headers_seen, &mut out.at(String::new()));
    first == seen_first && body == seen_body && out.found.is_empty()
}

/// The data of chunks, of which the last may be missing.
fn unchunked(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((size, after)) = rest.split_once("\r\n") {
        let Ok(size @ 1..) = usize::from_str_radix(size, 16) else { break };
        out.extend(after.chars().take(size));
        rest = after.get(size..).map_or("", |r| r.trim_start_matches("\r\n"));
    }
    out
}

fn decoded(name: &str, of: &Value) -> Option<Vec<u8>> {
    use base64::Engine as _;
    if let Some(text) = of[name].as_str() {
        let narrow: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect();
        return Some(narrow.unwrap_or_else(|| text.as_bytes().to_vec()));
    }
    base64::engine::general_purpose::STANDARD.decode(of[format!("{name}Base64")].as_str()?).ok()
}

/// Names and values in any order; values that change from run to run are tokens.
fn headers(field: &str, expected: &Value, seen: &Value, at: &mut At<'_>) {
    let pairs = |of: &Value| -> Vec<(String, String)> {
        let pair = |h: &Value| (text(&h[0]).to_ascii_lowercase(), text(&h[1]).to_owned());
        let ours = |(name, _): &(String, String)| !name.starts_with("x-envoy-peer-metadata");
        // The client's HTTP/2 library keeps pseudo-headers of informational answers to itself.
        let plain = |(name, _): &(String, String)| name != ":status";
        list(of).iter().map(pair).filter(ours).filter(plain).collect()
    };
    let mut left = pairs(seen);
    for (name, value) in pairs(expected) {
        match left.iter().position(|(n, v)| *n == name && fits(&value, v)) {
            Some(found) => {
                left.remove(found);
            }
            None => {
                let other = left.iter().position(|(n, _)| *n == name).map(|found| left.remove(found).1);
                at.tell(&format!(".{field}.{name}"), value, other.unwrap_or_else(|| "absent".to_owned()));
            }
        }
    }
    for (name, value) in left {
        at.tell(&format!(".{field}.{name}"), "absent", value);
    }
}

fn fits(expected: &str, seen: &str) -> bool {
    match expected {
        "<date>" => seen.ends_with(" GMT"),
        "<ms>" => !seen.is_empty() && seen.bytes().all(|b| b.is_ascii_digit()),
        "<uuid>" => seen.len() == 36 && seen.bytes().filter(|b| *b == b'-').count() == 4,
        _ => expected == seen,
    }
}

fn apps(expected: &Value, report: &Value, at: &mut At<'_>) {
    let expected: Vec<&Value> = list(expected)
        .iter()
        // What Envoy's own admin page says of its endpoints is no observation of an application.
        .filter(|e| e["emptyConnection"] != true && (e["endpoints"].is_null() || e["summary"] == true))
        .collect();
    if let Some(summary) = expected.iter().find(|e| e["summary"] == true) {
        return summaries(summary, report, at);
    }
    let sorted = |mut all: Vec<Value>| -> Vec<Value> {
        all.sort_by_key(|e| (e["port"].as_u64(), text(&e["backend"]).to_owned(), e["conn"].as_u64()));
        all
    };
    let is_empty = |e: &Value| e["version"] == "tcp" && text(&e["bytes"]).is_empty() && e["bytesBase64"].is_null();
    let expected = sorted(expected.into_iter().cloned().collect());
    let wants_empty = expected.iter().any(is_empty);
    let seen: Vec<Value> = list(&report["saw"]).iter().filter(|e| wants_empty || !is_empty(e)).cloned().collect();
    let seen = sorted(seen);
    if expected.len() != seen.len() {
        let show = |all: &[Value]| {
            let one = |e: &Value| format!("{} {} {}", text(&e["version"]), text(&e["method"]), text(&e["path"]));
            format!("{} ({})", all.len(), all.iter().map(one).collect::<Vec<_>>().join("; "))
        };
        return at.tell("", show(&expected), show(&seen));
    }
    for (number, (expected, seen)) in expected.iter().zip(&seen).enumerate() {
        entry(expected, seen, &mut At { path: format!("{}[{number}]", at.path), out: at.out });
    }
}

fn entry(expected: &Value, seen: &Value, at: &mut At<'_>) {
    for field in ["port", "backend", "peer", "version", "method", "path", "incomplete"] {
        if !expected[field].is_null() && expected[field] != seen[field] {
            at.tell(&format!(".{field}"), &expected[field], &seen[field]);
        }
    }
    if expected["headers"].is_array() {
        headers("headers", &expected["headers"], &seen["headers"], at);
    }
    if expected["trailers"].is_array() || seen["trailers"].is_array() {
        headers("trailers", &expected["trailers"], &seen["trailers"], at);
    }
    bytes("body", expected, seen, at);
    bytes("bytes", expected, seen, at);
    if expected["tls"].is_object() {
        tls(expected, seen, at);
    }
}

/// The recording lacks Istio's own ALPN filter: for HTTP its lists are expected.
fn tls(expected: &Value, seen: &Value, at: &mut At<'_>) {
    let (wanted, got) = (&expected["tls"], &seen["tls"]);
    for field in ["sni", "peerUri"] {
        if !wanted[field].is_null() && wanted[field] != got[field] {
            at.tell(&format!(".tls.{field}"), &wanted[field], &got[field]);
        }
    }
    let offered: Vec<&str> = list(&wanted["alpnOffered"]).iter().map(text).collect();
    let in_mesh = offered.contains(&"istio");
    let list_of = |names: &[&str]| Value::from(names.to_vec());
    let expected_alpn = match text(&expected["version"]) {
        "HTTP/1.1" if in_mesh => list_of(&["istio-http/1.1", "istio", "http/1.1"]),
        "HTTP/1.0" if in_mesh => list_of(&["istio-http/1.0", "istio", "http/1.0"]),
        "HTTP/2" if in_mesh => list_of(&["istio-h2", "istio", "h2"]),
        _ => wanted["alpnOffered"].clone(),
    };
    if !expected_alpn.is_null() && expected_alpn != got["alpnOffered"] {
        at.tell(".tls.alpnOffered", &expected_alpn, &got["alpnOffered"]);
    }
}

/// Totals; which of several equal endpoints is picked is no part of any case.
fn summaries(expected: &Value, report: &Value, at: &mut At<'_>) {
    let sum = |of: &Value| -> u64 {
        of.as_u64().unwrap_or_else(|| of.as_object().into_iter().flatten().filter_map(|(_, v)| v.as_u64()).sum())
    };
    for field in ["requests", "connections"] {
        let (wanted, got) = (&expected[field], sum(&report[field]));
        let empty = wanted.as_object().is_some_and(Map::is_empty) && field == "connections";
        // Of connections that carried nothing some recordings keep count, others do not.
        let carried = field == "connections" && sum(wanted) == carrying(report);
        if !wanted.is_null() && !empty && sum(wanted) != got && !carried {
            at.tell(&format!(".{field}"), sum(wanted), got);
        }
    }
}

/// Connections on which something came.
fn carrying(report: &Value) -> u64 {
    let key = |e: &Value| format!("{} {} {}", e["port"], e["backend"], e["conn"]);
    list(&report["saw"]).iter().map(key).collect::<BTreeSet<_>>().len() as u64
}

fn log(expected: &Value, seen: &[Value], refusal: bool, at: &mut At<'_>) {
    let mut left: Vec<(String, Value)> = seen.iter().map(|l| (line(l), l.clone())).collect();
    for wanted in list(expected) {
        let count = wanted["count"].as_u64().unwrap_or(1);
        let kind = text(&wanted["kind"]);
        // A listener's own line beside a request's or a connection's says nothing new.
        if kind == "conn" && (text(&wanted["flags"]) == "-" || has_other(expected)) {
            continue;
        }
        for _ in 0..count {
            let found = left.iter().position(|(_, l)| same_line(wanted, l, refusal));
            match found {
                Some(found) => {
                    left.remove(found);
                }
                None => {
                    let nearest = left.iter().find(|(_, l)| text(&l["kind"]) == kind).map(|(shown, _)| shown.clone());
                    at.tell("", line(wanted), nearest.unwrap_or_else(|| "absent".to_owned()));
                    return;
                }
            }
        }
    }
}

fn has_other(expected: &Value) -> bool {
    list(expected).iter().any(|l| l["kind"] != "conn")
}

fn same_line(wanted: &Value, seen: &Value, refusal: bool) -> bool {
    let kind = text(&wanted["kind"]) == text(&seen["kind"]) || wanted["kind"] == "conn";
    let set = |of: &Value| -> BTreeSet<String> { text(&of["flags"]).split(',').map(str::to_owned).collect() };
    let flags = set(wanted) == set(seen);
    let code = wanted["code"].as_u64().is_none_or(|code| seen["code"].as_u64() == Some(code));
    let details = text(&wanted["details"]);
    let free = refusal || details.is_empty() || details == "-";
    kind && flags && code && (free || without_text(details) == without_text(text(&seen["details"])))
}

/// Details without the library's own words about a failed connection.
fn without_text(details: &str) -> &str {
    details.split('|').next().unwrap_or_default().trim_end_matches('}')
}

fn line(of: &Value) -> String {
    let code = of["code"].as_u64().map_or_else(|| "-".to_owned(), |c| c.to_string());
    format!("{} {} {code} {}", text(&of["kind"]), text(&of["flags"]), text(&of["details"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> Value {
        json!({
            "steps": [{"expect": {"handshake": "ok", "status": 200, "headers": [["date", "<date>"], ["x", "1"]],
                                   "body": "ok", "connection": "kept"}}],
            "app_saw": [{"port": 1, "version": "tcp", "emptyConnection": true}],
            "log": [{"kind": "http", "flags": "-", "code": 200, "details": "via_upstream"}],
        })
    }

    fn happened() -> Happened {
        let step = json!({"handshake": "ok", "status": 200, "body": "ok", "connection": "kept",
                          "headers": [["x", "1"], ["date", "Wed, 25 Nov 2026 10:00:00 GMT"]]});
        let log = vec![json!({"kind": "http", "flags": "-", "code": 200, "details": "via_upstream"})];
        Happened { steps: vec![step], report: json!({"saw": []}), log }
    }

    #[test]
    fn equal_is_equal_and_every_part_can_differ() {
        assert_eq!(differences(&case(), &happened()).len(), 0);
        let with = |change: &dyn Fn(&mut Happened)| {
            let mut h = happened();
            change(&mut h);
            differences(&case(), &h).into_iter().map(|d| d.field).collect::<Vec<_>>()
        };
        assert_eq!(with(&|h| h.steps[0]["status"] = json!(403)), ["steps[0].status"]);
        assert_eq!(with(&|h| h.steps[0]["headers"][0][1] = json!("2")), ["steps[0].headers.x"]);
        assert_eq!(with(&|h| h.steps[0]["connection"] = json!("closed")), ["steps[0].connection"]);
        assert_eq!(with(&|h| h.report["saw"] = json!([{"port": 1, "version": "HTTP/1.1"}])), ["app_saw"]);
        assert_eq!(with(&|h| h.log[0]["details"] = json!("other")), ["log"]);
        assert_eq!(with(&|h| h.log.clear()), ["log"]);
        assert_eq!(with(&|h| h.steps[0]["handshake"] = json!("alert:x")), ["steps[0].handshake"]);
    }

    #[test]
    fn tokens_stand_for_bytes() {
        let fits = |expected: &str, got: &str| stands_for(expected.as_bytes(), got.as_bytes());
        assert!(fits("<TLS ClientHello>", "\u{16}\u{3}x") && !fits("<TLS ClientHello>", "GET"));
        assert!(fits("<3 bytes>", "abc") && !fits("<3 bytes>", "ab"));
        let message = "HTTP/1.1 200 OK\r\na: <ms>\r\nb: 2\r\n\r\nok";
        assert!(fits(message, "HTTP/1.1 200 OK\r\nb: 2\r\na: 17\r\n\r\nok"));
        assert!(!fits(message, "HTTP/1.1 200 OK\r\nb: 2\r\na: 17\r\n\r\nno"));
        assert!(!fits(message, "HTTP/1.1 200 OK\r\nb: 2\r\n\r\nok"));
        assert_eq!(unchunked("3\r\nabc\r\n2\r\nde"), "abcde");
    }

    #[test]
    fn equal_endpoints_may_change_places() {
        let differ = |expected: Value, seen: Value| {
            let mut out = Out::default();
            counts(&expected, &seen, &mut out.at(String::new()));
            !out.found.is_empty()
        };
        assert!(!differ(json!({"500 A": 5, "500 B": 55}), json!({"500 A": 55, "500 B": 5})));
        assert!(differ(json!({"500 A": 5, "500 B": 55}), json!({"500 A": 30, "500 B": 30})));
        assert!(differ(json!({"200 A": 20}), json!({"200 B": 20})));
    }

    #[test]
    fn a_refusal_may_come_after_the_clients_last_word() {
        let case = json!({"steps": [{"expect": {"handshake": "alert:unknown ca"}}], "app_saw": [], "log": []});
        let with = |step: Value| {
            let happened = Happened { steps: vec![step], report: json!({"saw": []}), log: Vec::new() };
            differences(&case, &happened).len()
        };
        assert_eq!(with(json!({"handshake": "alert:bad certificate"})), 0);
        assert_eq!(with(json!({"handshake": "ok", "connection": "reset"})), 0);
        assert_eq!(with(json!({"handshake": "ok", "status": 200, "connection": "kept"})), 1);
        assert_eq!(with(json!({"handshake": "ok", "connection": "kept"})), 1);
    }
}
