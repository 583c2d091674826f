//! Telemetry, and ProxyConfig, which is as small.

use super::at::At;
use super::{Findings, selector};

/// Findings of a Telemetry.
pub(super) fn check(found: &mut Findings, spec: &At<'_>) {
    selector::policy(found, spec);
    for one in spec.get("metrics").items().iter().filter(|m| !m.is_null()) {
        providers(found, one);
        metrics(found, &one.get("overrides"));
    }
    let tracing = spec.get("tracing");
    if tracing.len() > 1 {
        found.warn(&tracing, "only the first entry has an effect: multiple tracing is not supported");
    }
    for one in tracing.items().iter().filter(|t| !t.is_null()) {
        self::tracing(found, one);
    }
    for one in spec.get("accessLogging").items().iter().filter(|l| !l.is_null()) {
        providers(found, one);
        if one.get("filter").is_said() {
            expression(found, &one.at("filter.expression"));
        }
    }
}

fn providers(found: &mut Findings, of: &At<'_>) {
    for provider in of.get("providers").items() {
        let name = provider.get("name");
        found.expect(name.has_text(), &name, "a name is missing");
    }
}

/// CEL: brackets and quotes that close.
fn expression(found: &mut Findings, at: &At<'_>) {
    let (mut open, mut quote, mut escaped) = (Vec::new(), None, false);
    for c in at.text().chars() {
        match (quote, c) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(q), _) if q == c => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '(') => open.push(')'),
            (None, '[') => open.push(']'),
            (None, '{') => open.push('}'),
            (None, ')' | ']' | '}') if open.pop() != Some(c) => {
                found.add(at, format!("{c:?} closes nothing: a CEL expression is expected"));
                return;
            }
            _ => {}
        }
    }
    let whole = open.is_empty() && quote.is_none() && at.has_text();
    found.expect(whole, at, "the expression is not closed: a CEL expression is expected");
}

fn metrics(found: &mut Findings, overrides: &At<'_>) {
    for one in overrides.items() {
        if one.is_null() {
            found.add(&one, "an override is expected");
            continue;
        }
        for (name, tag) in one.get("tagOverrides").entries() {
            if name.is_empty() {
                found.warn(&tag, "a tag's name is missing");
            }
            if tag.is_null() {
                found.add(&tag, "an operation is expected");
                continue;
            }
            let value = tag.get("value");
            match tag.get("operation").text() {
                "REMOVE" => found.expect(!value.has_text(), &value, "what is removed has no value"),
                _ => found.expect(value.has_text(), &value, "a value must be set when operation is UPSERT"),
            }
        }
        let custom = one.at("match.customMetric");
        found.expect(!custom.is_said() || custom.has_text(), &custom, "a name is missing");
    }
}

fn tracing(found: &mut Findings, at: &At<'_>) {
    let list = at.get("providers");
    if list.len() > 1 {
        found.warn(&list, "only the first provider has an effect: multiple providers are not supported");
    }
    providers(found, at);
    let share = at.get("randomSamplingPercentage");
    let good = share.number().is_none_or(|s| (0.0..=100.0).contains(&s));
    found.expect(good, &share, "a percentage from 0 to 100 is expected");
    for (name, tag) in at.get("customTags").entries() {
        found.expect(!name.is_empty(), &tag, "a tag's name is missing");
        if tag.is_null() {
            found.add(&tag, "a literal, header, environment or formatter is expected");
            continue;
        }
        for (kind, field) in [("literal", "value"), ("header", "name"), ("environment", "name")] {
            let value = tag.get(kind).get(field);
            found.expect(!tag.get(kind).is_said() || value.has_text(), &value, "a text is expected");
        }
    }
}

/// Findings of a ProxyConfig.
pub(super) fn proxy_config(found: &mut Findings, spec: &At<'_>) {
    selector::workload(found, &spec.get("selector"));
    let threads = spec.get("concurrency");
    found.expect(threads.whole_or_zero() >= 0, &threads, "0 or more is expected");
}
