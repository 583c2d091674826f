//! Metrics, access log formats, metadata exchange: what one or two real proxies tell after some traffic, and what the
//! library makes of texts.

use std::collections::BTreeMap;

use anyhow::Result;
use proxy_config::compile::settings::{TEXT_FORMAT, json_format};
use proxy_config::peer::Workload;
use serde_json::{Map, Value, json};

use super::pair::{Pair, Traffic};
use super::tally::{Difference, Tally};
use super::{Bench, Set, cases};

/// Runs the set.
///
/// # Errors
/// When the proxies cannot be run.
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
        let case = &resolved(case, &set.index["common"]);
        let found = match case["kind"].as_str().unwrap_or_default() {
            "accessLogFormat" => access_log_format(case),
            "baggageParse" => fields(&case["expect"]["fields"], Some(&parsed(text(&case["input"]["baggage"])))),
            "baggageBuild" => baggage_build(case),
            "endpointWorkload" => fields(
                &case["expect"]["fields"],
                Workload::from_endpoint(text(&case["input"]["istio.workload"])).as_ref(),
            ),
            "metrics" => metrics(bench, case),
            "httpMx" => http_exchange(bench, case),
            "httpExchange" => answer(bench, case),
            kind => {
                tally.out_of_reach(format!("cases of kind {kind} are not judged yet"), 1);
                continue;
            }
        };
        tally.judge(bench.rules, name, case, found);
    }
    Ok(tally)
}

fn text(of: &Value) -> &str {
    of.as_str().unwrap_or_default()
}

/// The case with what the set's common part names put in.
fn resolved(case: &Value, common: &Value) -> Value {
    match case {
        Value::String(text) if text == "$SAMPLE" => common["sampleIstioHeader"].clone(),
        Value::String(text) if text == "base64 without padding of Struct(common.nodes.client)" => {
            let node = common["nodes"]["client"].as_object().cloned().unwrap_or_default();
            json!(Workload::from_node(&node, &Default::default(), &[]).to_header().trim_end_matches('='))
        }
        Value::String(text) => match text.strip_prefix("common.nodes.") {
            Some(node) => common["nodes"][node].clone(),
            None => case.clone(),
        },
        Value::Array(items) => items.iter().map(|item| resolved(item, common)).collect(),
        Value::Object(map) => Value::Object(map.iter().map(|(k, v)| (k.clone(), resolved(v, common))).collect()),
        other => other.clone(),
    }
}

fn access_log_format(case: &Value) -> Vec<Difference> {
    let (field, expected, seen) = if case["input"]["encoding"] == "JSON" {
        ("fields", case["expect"]["fields"].clone(), json_format())
    } else {
        let expected = case["expect"].as_object().and_then(|e| e.values().find(|v| v.is_string())).cloned();
        ("text", expected.unwrap_or_default(), json!(TEXT_FORMAT))
    };
    if expected == seen { Vec::new() } else { vec![Difference::new(field, expected, seen)] }
}

/// Baggage, that must say the same after it was told as a structure.
fn parsed(text: &str) -> Workload {
    let workload = Workload::from_baggage(text);
    Workload::from_bytes(&workload.to_bytes(), &[]).unwrap_or_default()
}

fn fields(expected: &Value, seen: Option<&Workload>) -> Vec<Difference> {
    let (Some(expected), Some(seen)) = (expected.as_object(), seen) else {
        let both = expected.is_null() && seen.is_none();
        return if both { Vec::new() } else { vec![Difference::new("fields", expected, format!("{seen:?}"))] };
    };
    let differs = |(name, value): (&String, &Value)| {
        let got = seen.get(name).unwrap_or_default();
        (text(value) != got).then(|| Difference::new(format!("fields.{name}"), text(value), got))
    };
    expected.iter().filter_map(differs).collect()
}

fn baggage_build(case: &Value) -> Vec<Difference> {
    let node = case["input"]["node"]["metadata"].as_object().cloned().unwrap_or_default();
    let built = Workload::from_node(&node, &Default::default(), &[]).baggage();
    let list = |key: &str| case["expect"][key].as_array().cloned().unwrap_or_default();
    // Where application and service have one name, or one version, it is told once, under the service's name.
    let has = |part: &str| {
        built.contains(part)
            || built.contains(&part.replace("app.name=", "service.name=").replace("app.version=", "service.version="))
    };
    let missing = list("contains").into_iter().filter(|part| !has(text(part)));
    let missing = missing.map(|part| Difference::new("contains", text(&part), &built));
    let there = list("notContains").into_iter().filter(|part| built.contains(text(part)));
    missing.chain(there.map(|part| Difference::new("notContains", text(&part), &built))).collect()
}

/// Both proxies' families after the traffic.
fn metrics(bench: &Bench<'_>, case: &Value) -> Vec<Difference> {
    let mut pair = match Pair::start(bench.proxy, case) {
        Ok(pair) => pair,
        Err(error) => return vec![Difference::new("start", "two proxies", format!("{error:#}"))],
    };
    let traffic = match pair.traffic() {
        Ok(traffic) => traffic,
        Err(error) => return vec![Difference::new("traffic", "served", format!("{error:#}"))],
    };
    let mut found = Vec::new();
    // Numbers are there a moment after the last byte.
    for _ in 0..60 {
        found = compare(case, &pair, &traffic);
        if found.is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    drop(traffic);
    found
}

fn compare(case: &Value, pair: &Pair, traffic: &Traffic) -> Vec<Difference> {
    let mut out = Vec::new();
    for side in ["client", "server"] {
        let Ok(told) = pair.families(side) else { return vec![Difference::new(side, "metrics", "none")] };
        let told = told.replace(&traffic.client_port, "$CLIENT_PORT");
        for family in case["expect"][side].as_array().into_iter().flatten() {
            let name = text(&family["name"]);
            let counted = if family["type"] == "HISTOGRAM" { format!("{name}_count") } else { name.to_owned() };
            let seen = series(&told, &counted);
            let exact = case["expect"]["valueIgnored"] != true && family["type"] != "HISTOGRAM";
            let wanted: BTreeMap<String, Option<u64>> = family["metrics"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|metric| (labels(&metric["labels"]), metric["value"].as_u64().filter(|_| exact)))
                .collect();
            let same = wanted.len() == seen.len()
                && wanted.iter().all(|(labels, value)| seen.get(labels).is_some_and(|v| value.is_none_or(|w| w == *v)));
            if !same {
                out.push(Difference::new(format!("{side}.{name}"), format!("{wanted:?}"), format!("{seen:?}")));
            }
        }
        let missing = &case["expect"][format!("{side}Missing")];
        let names: Vec<&str> =
            missing.as_array().map_or_else(|| vec![text(missing)], |all| all.iter().map(text).collect());
        for name in names.into_iter().filter(|name| !name.is_empty()) {
            if !series(&told, name).is_empty() {
                out.push(Difference::new(format!("{side}Missing"), "no series", name));
            }
        }
    }
    out
}

fn labels(pairs: &Value) -> String {
    let pairs = pairs.as_array().into_iter().flatten();
    let sorted: BTreeMap<&str, &str> = pairs.map(|pair| (text(&pair[0]), text(&pair[1]))).collect();
    format!("{sorted:?}")
}

/// Series of a family by their labels, in any order.
fn series(told: &str, family: &str) -> BTreeMap<String, u64> {
    let one = |line: &str| {
        let rest = line.strip_prefix(family)?;
        let (inner, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once("} ")?,
            None => ("", rest.strip_prefix(' ')?),
        };
        let pairs = inner.split("\",").filter_map(|pair| pair.split_once("=\""));
        let sorted: BTreeMap<&str, &str> = pairs.map(|(name, value)| (name, value.trim_end_matches('"'))).collect();
        Some((format!("{sorted:?}"), value.trim().parse::<f64>().ok()? as u64))
    };
    told.lines().filter_map(one).collect()
}

/// The filter between a client and an application of ours.
fn http_exchange(bench: &Bench<'_>, case: &Value) -> Vec<Difference> {
    let seen = match Pair::exchange(bench.proxy, case) {
        Ok(seen) => seen,
        Err(error) => return vec![Difference::new("start", "a proxy", format!("{error:#}"))],
    };
    let expect = &case["expect"];
    let mut out = Vec::new();
    for (field, has, headers) in
        [("requestHeadersLeft", "requestHas", &seen.request), ("responseHeadersLeft", "responseHas", &seen.response)]
    {
        if let Some(left) = expect[field].as_u64().filter(|left| *left != headers.len() as u64) {
            out.push(Difference::new(field, left, format!("{headers:?}")));
        }
        for name in expect[has].as_array().into_iter().flatten().filter(|name| !headers.contains_key(text(name))) {
            out.push(Difference::new(has, text(name), "absent"));
        }
    }
    for (side, peer) in [("downstreamPeer", &seen.downstream), ("upstreamPeer", &seen.upstream)] {
        let Some(peer) = peer.as_ref().filter(|_| expect.get(side).is_some()) else { continue };
        let empty = Map::new();
        let fields = expect[side].as_object().unwrap_or(&empty);
        if expect[side].is_null() && peer["namespace"] != "unknown" {
            out.push(Difference::new(side, "none", format!("{peer:?}")));
        }
        for (field, value) in fields {
            let got = peer.get(field).map_or("", String::as_str);
            if got != text(value) {
                out.push(Difference::new(format!("{side}.{field}"), text(value), got));
            }
        }
    }
    out
}

/// What a client that tells of itself is told.
fn answer(bench: &Bench<'_>, case: &Value) -> Vec<Difference> {
    let seen = match Pair::exchange(bench.proxy, case) {
        Ok(seen) => seen,
        Err(error) => return vec![Difference::new("start", "a proxy", format!("{error:#}"))],
    };
    let wanted = case["expect"]["responseHeaders"].as_object().into_iter().flatten();
    let differs = |(name, value): (&String, &Value)| {
        let got = seen.response.get(name);
        let fits = match value.as_str() {
            None => got.is_none(),
            Some("*") => got.is_some(),
            // The node's id is what the proxy was given.
            Some(_) if name.ends_with("-id") => got == Some(&seen.id),
            Some(exact) => got.is_some_and(|got| got == exact),
        };
        (!fits).then(|| Difference::new(format!("responseHeaders.{name}"), value, format!("{got:?}")))
    };
    wanted.filter_map(differs).collect()
}
