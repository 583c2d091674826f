//! Accepted and rejected resources: the verdict of the configuration's own validation on one document or part of one.

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use proxy_config::{Reject, Verdict};
use serde_json::Value;

use super::tally::{Difference, Tally};
use super::{Bench, Set, cases};

/// Runs the set.
///
/// # Errors
/// When a case is not of a known form.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    for case in cases(set) {
        let name = case["name"].as_str().unwrap_or_default();
        if !bench.wants(name) {
            continue;
        }
        if let Some(reason) = bench.rules.beyond(case) {
            tally.out_of_reach(reason, 1);
            continue;
        }
        match verdict(case) {
            Ok(Some(verdict)) => tally.judge(bench.rules, name, case, compare(case, &verdict)),
            Ok(None) => tally.unsupported(format!("no validation of {}", case["kind"].as_str().unwrap_or_default())),
            Err(error) => {
                let difference = Difference::new("document", "a document", format!("{error:#}"));
                tally.judge(bench.rules, name, case, vec![difference]);
            }
        }
    }
    Ok(tally)
}

/// What the configuration crate says; `None` when it does not know the message.
fn verdict(case: &Value) -> Result<Option<Verdict>> {
    let input = &case["input"];
    let said = |error: String| anyhow::anyhow!(error);
    if let Some(manifest) = input["manifest"].as_str() {
        return proxy_config::verdict(manifest).map(Some).map_err(said);
    }
    let mut value =
        input.get("resource").or_else(|| input.get("fragment")).context("neither resource nor fragment")?.clone();
    expand(&mut value, false);
    let text = value.to_string();
    if case["form"] == "resource" {
        return proxy_config::verdict(&text).map(Some).map_err(said);
    }
    proxy_config::fragment_verdict(case["kind"].as_str().unwrap_or_default(), &text).map_err(said)
}

/// `$repeat(a,N)` stands for N times that letter, in a field of bytes before base64.
fn expand(value: &mut Value, bytes: bool) {
    match value {
        Value::String(text) => {
            let repeat =
                text.strip_prefix("$repeat(").and_then(|t| t.strip_suffix(')')).and_then(|t| t.split_once(','));
            let Some((letter, count)) = repeat.and_then(|(l, n)| Some((l, n.parse::<usize>().ok()?))) else { return };
            let long = letter.repeat(count);
            *text = if bytes { STANDARD.encode(long) } else { long };
        }
        Value::Array(items) => items.iter_mut().for_each(|i| expand(i, false)),
        Value::Object(map) => map.iter_mut().for_each(|(k, v)| expand(v, k == "bytes")),
        _ => {}
    }
}

/// Tables of istiod's webhook know nothing of what only the schema refuses.
fn compare(case: &Value, verdict: &Verdict) -> Vec<Difference> {
    let webhook = case["input"].get("manifest").is_none();
    let expect = &case["expect"];
    let schema: &[Reject] = if webhook { &[] } else { &verdict.schema };
    let against: Vec<&Reject> = schema.iter().chain(&verdict.rules).collect();
    let told = |list: &[&Reject]| {
        let lines: Vec<String> = list.iter().map(|r| format!("{}: {}", r.field, r.reason)).collect();
        lines.join("; ")
    };
    let mut out = Vec::new();
    let accepted = against.is_empty();
    if expect["accepted"] != accepted {
        let seen = if accepted { "accepted".to_owned() } else { told(&against) };
        out.push(Difference::new("accepted", &expect["accepted"], seen));
    }
    if let Some(warning) = expect["warning"].as_bool() {
        let warnings: Vec<&Reject> = verdict.warnings.iter().collect();
        if warning == warnings.is_empty() {
            out.push(Difference::new("warning", warning, told(&warnings)));
        }
    }
    if let Some(field) = expect["errorContains"].as_str().and_then(named_field)
        && !accepted
        && !against.iter().any(|r| fits(&r.field, field))
    {
        out.push(Difference::new("field", field, told(&against)));
    }
    out
}

/// The field that a text begins with, when it begins with one.
fn named_field(text: &str) -> Option<&str> {
    let field = text.split([':', ' ']).next()?;
    field.starts_with("spec").then_some(field)
}

/// A mistake may be told where it stands or where it is felt.
fn fits(seen: &str, expected: &str) -> bool {
    seen.starts_with(expected) || expected.starts_with(seen)
}
