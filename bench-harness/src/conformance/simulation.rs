//! The simulation tables: YAML in, which listener, chain, route and cluster a call meets.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Result;
use proxy_config::Model;
use serde_json::{Value, json};

use super::calls::{self, Question};
use super::explain::From;
use super::input::{Input, node_of};
use super::tally::{Difference, Tally};
use super::{Bench, Set, cases, models};

/// Runs the tables from YAML.
///
/// # Errors
/// When scratch files cannot be written.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    let scratch = tempfile::tempdir()?;
    for (number, case) in cases(set).iter().enumerate() {
        let name = case["name"].as_str().unwrap_or_default();
        if !bench.wants(name) {
            continue;
        }
        let folder = scratch.path().join(number.to_string());
        fs::create_dir(&folder)?;
        let input = lay_out(&folder, &case["input"])?;
        tally.add(judge(bench, case, &input)?);
    }
    Ok(tally)
}

/// Writes a case's input as files.
pub(super) fn lay_out(folder: &Path, input: &Value) -> Result<Input> {
    let write = |name: &str, text: &str| -> Result<_> {
        let path = folder.join(name);
        fs::write(&path, text)?;
        Ok(path)
    };
    let text = |key: &str| input[key].as_str().unwrap_or_default();
    let config = write("config.yaml", text("config"))?;
    let kube = write("kube.yaml", text("kubeConfig"))?;
    let mesh = write("mesh.yaml", &input["mesh"].to_string())?;
    let node = write("node.json", &node_of(&input["proxy"]).to_string())?;
    Ok(Input { files: vec![config, kube], mesh: Some(mesh), networks: None, node })
}

/// What rules may look at.
///
/// # Errors
/// When a scratch file cannot be read.
pub(super) fn content(case: &Value, input: &Input) -> Result<Value> {
    let mut content = input.content()?;
    content["kind"] = case["kind"].clone();
    content["features"] = case["input"]["features"].clone();
    Ok(content)
}

fn judge(bench: &Bench<'_>, case: &Value, input: &Input) -> Result<Tally> {
    let name = case["name"].as_str().unwrap_or_default();
    let content = content(case, input)?;
    let mut tally = Tally::default();
    let questions = questions(case);
    if let Some(reason) = bench.rules.beyond(&content) {
        tally.out_of_reach(reason, questions.len().max(1));
        return Ok(tally);
    }
    let from = From::Yaml { files: input.files.clone(), mesh: input.mesh.clone(), networks: input.networks.clone() };
    tally.add(calls::judge(bench, (name, &content), &from, &input.node, &questions));
    if case["expect"].is_object() {
        let found = models::from_yaml(input).map_or_else(
            |error| vec![Difference::new("load", "a model", format!("{error:#}"))],
            |loaded| shape(case, &loaded.model),
        );
        tally.judge(bench.rules, name, &content, found);
    }
    Ok(tally)
}

/// The calls of a case, in the words of `explain`.
pub(super) fn questions(case: &Value) -> Vec<Question> {
    let calls = case["calls"].as_array().map_or(&[][..], Vec::as_slice);
    calls.iter().map(question).collect()
}

fn question(said: &Value) -> Question {
    let call = &said["effectiveCall"];
    let headers = call["headers"].as_object().cloned().unwrap_or_default();
    let host = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host")).map(|(_, value)| value);
    let host = host.map(|value| value.as_array().and_then(|list| list.first()).unwrap_or(value));
    let mode = if call["callMode"] == "inbound" { "inbound" } else { "outbound" };
    let expect = &said["expect"];
    let mut wanted = serde_json::Map::new();
    for (theirs, ours) in [
        ("error", "error"),
        ("listenerMatched", "listener"),
        ("filterChainMatched", "filterChain"),
        ("routeConfigMatched", "routeConfig"),
        ("virtualHostMatched", "virtualHost"),
        ("routeMatched", "route"),
        ("clusterMatched", "cluster"),
    ] {
        if let Some(value) = expect.get(theirs) {
            wanted.insert(ours.to_owned(), value.clone());
        }
    }
    Question {
        name: said["name"].as_str().unwrap_or_default().to_owned(),
        call: without_nulls(json!({
            "mode": mode,
            "address": call["address"],
            "port": call["port"],
            // A call that says none sends opaque bytes.
            "protocol": call["protocol"].as_str().filter(|p| !p.is_empty()).unwrap_or("tcp"),
            "mtlsSecretConfigName": call["mtlsSecretConfigName"],
            "tls": call["tls"],
            "alpn": call["alpn"],
            "sni": call["sni"],
            "host": host,
            "path": call["path"],
            "headers": headers,
        })),
        expect: Value::Object(wanted),
        strict: expect["strictMatch"] == true,
    }
}

/// A field that is not said is absent.
fn without_nulls(mut of: Value) -> Value {
    if let Value::Object(map) = &mut of {
        map.retain(|_, value| !value.is_null());
    }
    of
}

/// Expectations about the configuration itself.
pub(super) fn shape(case: &Value, model: &Model) -> Vec<Difference> {
    let expect = &case["expect"];
    let mut out = Vec::new();
    if let Some(hosts) = expect["virtualHosts"].as_object() {
        virtual_hosts(case["routeName"].as_str().unwrap_or_default(), hosts, model, &mut out);
    }
    if let Some(clusters) = expect["inboundClusters"].as_object() {
        inbound_clusters(clusters, model, &mut out);
    }
    if let Some(least) = expect["listenersOnPort8080"]["atLeast"].as_u64() {
        let count = model.listeners.keys().filter(|name| name.ends_with("_8080")).count() as u64;
        if count < least {
            out.push(Difference::new("listenersOnPort8080", format!("at least {least}"), count));
        }
    }
    out
}

fn virtual_hosts(route: &str, hosts: &serde_json::Map<String, Value>, model: &Model, out: &mut Vec<Difference>) {
    let Some(table) = model.routes.get(route) else {
        if hosts.values().any(|clusters| !clusters.is_null()) {
            out.push(Difference::new(format!("routes[{route}]"), "a table", "none"));
        }
        return;
    };
    let table = serde_json::to_value(&**table).unwrap_or_default();
    for (domain, expected) in hosts {
        let host = table["virtual_hosts"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|h| h["domains"].as_array().is_some_and(|d| d.iter().any(|d| d == domain.as_str())));
        let seen = host.map_or(Value::Null, |h| json!(clusters_of(h)));
        let mut expected = expected.clone();
        if let Value::Array(list) = &mut expected {
            list.sort_by_key(ToString::to_string);
        }
        if expected != seen {
            out.push(Difference::new(format!("virtualHosts[{domain}]"), expected, seen));
        }
    }
}

/// Names of all clusters that a virtual host's routes lead to, sorted.
fn clusters_of(host: &Value) -> Vec<String> {
    let mut found = Vec::new();
    collect_clusters(&host["routes"], &mut found);
    found.sort();
    found
}

fn collect_clusters(at: &Value, found: &mut Vec<String>) {
    match at {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::Array(all) if key == "clusters" => {
                        found.extend(all.iter().filter_map(|c| c["name"].as_str()).map(str::to_owned));
                    }
                    _ if key == "mirrors" => {}
                    other => collect_clusters(other, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect_clusters(item, found)),
        _ => {}
    }
}

fn inbound_clusters(expected: &serde_json::Map<String, Value>, model: &Model, out: &mut Vec<Difference>) {
    let is_inbound = |name: &&str| name.starts_with("inbound|");
    let seen: BTreeSet<&str> = model.clusters.keys().map(|name| &**name).filter(is_inbound).collect();
    let wanted: BTreeSet<&str> = expected.keys().map(String::as_str).collect();
    if seen != wanted {
        out.push(Difference::new("inboundClusters", format!("{wanted:?}"), format!("{seen:?}")));
    }
}
