//! `istioctl analyze`: the complete messages of one analyzer on a set of files.

use std::fs;

use anyhow::{Context, Result};
use proxy_config::{Folder, Level, Message, Source};
use serde_json::Value;

use super::tally::{Difference, Tally};
use super::{Bench, Set, cases};

/// What an installation brings along: the default gateway's Pod and Service.
const DEFAULTS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: istio-ingressgateway-dummypod, namespace: istio-system, labels: {istio: ingressgateway}}
spec: {containers: [{name: istio-proxy}]}
---
apiVersion: v1
kind: Service
metadata: {name: istio-ingressgateway, namespace: istio-system}
spec:
  selector: {istio: ingressgateway}
  ports: [{name: http2, port: 80}, {name: https, port: 443}, {name: tcp, port: 31400}, {name: tls, port: 15443}]
";

/// Runs the set.
///
/// # Errors
/// When a file of the set cannot be read.
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
        let analyzer = case["analyzer"].as_str().unwrap_or_default();
        let folder = folder(set, &case["input"])?;
        match proxy_config::analyze(&folder, Some(analyzer)) {
            Some(messages) => tally.judge(bench.rules, name, case, compare(&case["expect"], &messages)),
            None => tally.unsupported(format!("no analyzer {analyzer}")),
        }
    }
    Ok(tally)
}

fn folder(set: &Set, input: &Value) -> Result<Folder> {
    let read = |place: &Value| -> Result<Source> {
        let path = set.folder.join(place.as_str().unwrap_or_default());
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Source { name: path.display().to_string(), text })
    };
    let all = |list: &Value| list.as_array().into_iter().flatten().map(read).collect::<Result<Vec<Source>>>();
    let one = |place: &Value| if place.is_null() { Ok(None) } else { read(place).map(Some) };
    let defaults = Source { name: "defaults".to_owned(), text: DEFAULTS.to_owned() };
    let mut clusters = Vec::new();
    match input["clusters"].as_object() {
        Some(map) => {
            for (name, files) in map {
                clusters.push((name.clone(), all(files)?));
            }
        }
        None => {
            let mut sources = all(&input["files"])?;
            sources.push(defaults);
            clusters.push((String::new(), sources));
        }
    }
    Ok(Folder { clusters, mesh: one(&input["meshConfig"])?, networks: one(&input["meshNetworks"])? })
}

/// Messages as a multiset; a manifest without namespace is in `default` here.
fn compare(expect: &Value, messages: &[Message]) -> Vec<Difference> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let lists = [&expect["messages"], &expect["otherMessages"]];
    let mut expected: Vec<String> = lists
        .iter()
        .flat_map(|l| l.as_array().into_iter().flatten())
        .map(|m| {
            let namespace = m["namespace"].as_str().unwrap_or("default");
            format!("{} {} {} {namespace}/{}", text(&m["code"]), text(&m["level"]), text(&m["kind"]), text(&m["name"]))
        })
        .collect();
    let mut seen: Vec<String> = messages
        .iter()
        .map(|m| {
            let level = match m.level {
                Level::Info => "Info",
                Level::Warning => "Warning",
                Level::Error => "Error",
            };
            format!("{} {level} {} {}/{}", m.code, m.kind, m.namespace, m.name)
        })
        .collect();
    expected.sort();
    seen.sort();
    if expected == seen { Vec::new() } else { vec![Difference::new("messages", expected.join("; "), seen.join("; "))] }
}
