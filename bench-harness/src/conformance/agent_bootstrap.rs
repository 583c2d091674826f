//! What the agent hands to its proxy, against what ours is started with from the same environment and files.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::tally::Tally;
use super::{Bench, Set, cases, vm};

/// Runs the cases.
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
        let folder = set.folder.join(name);
        let read = |file: &str| fs::read_to_string(folder.join(file)).ok();
        let text = read("envoy-rev.json").with_context(|| format!("{name}: no envoy-rev.json"))?;
        let recorded: Value = serde_json::from_str(&text)?;
        let node = &recorded["node"];
        let mut variables = vm::texts(&case["env"]);
        if let Some(env) = read("cluster.env") {
            let mut sourced = variables;
            sourced.extend(vm::cluster_env(&env));
            // The machine's name and first address are facts that only the recording tells.
            let id: Vec<&str> = node["id"].as_str().unwrap_or_default().split('~').collect();
            let host = id.get(2).and_then(|n| n.split('.').next()).unwrap_or_default();
            let address = id.get(1).copied().unwrap_or_default();
            sourced.entry("ISTIO_SVC_IP".to_owned()).or_insert_with(|| address.to_owned());
            variables = vm::start_script(sourced, host);
        }
        // So is the version that the recorded agent was built as.
        let version = node["metadata"]["ISTIO_VERSION"].as_str().unwrap_or_default();
        variables.insert("ISTIO_META_ISTIO_VERSION".to_owned(), version.to_owned());
        let ips = node["metadata"]["INSTANCE_IPS"].as_str().unwrap_or_default();
        let addresses: Vec<_> = ips.split(',').filter_map(|ip| ip.parse().ok()).collect();
        let mesh = read("mesh.yaml");
        let started = vm::start(variables, mesh, read("pod-labels.txt"), read("pod-annotations.txt"), &addresses)?;
        let place = &started.node.locality;
        let locality = json!({"region": place.region, "zone": place.zone, "sub_zone": place.sub_zone});
        let said = |value: &Value| {
            let parts = value.as_object().into_iter().flatten().filter(|(_, part)| *part != "");
            parts.map(|(name, part)| (name.clone(), part.clone())).collect::<serde_json::Map<_, _>>()
        };
        let expected = json!({
            "node": {"id": node["id"], "cluster": node["cluster"], "metadata": node["metadata"],
                "locality": said(&node["locality"])},
            "drain": argument(case, "--drain-time-s").and_then(|s| s.parse::<u64>().ok()),
            "concurrency": argument(case, "--concurrency").and_then(|s| s.parse::<u64>().ok()),
        });
        let seen = json!({
            "node": {"id": started.node.id(), "cluster": started.node.service_cluster,
                "metadata": started.node.metadata, "locality": said(&locality)},
            "drain": started.drain.drain.as_secs(),
            "concurrency": started.concurrency,
        });
        let mut found = Vec::new();
        vm::differences("", &expected, &seen, &mut found);
        tally.judge(bench.rules, name, case, found);
    }
    Ok(tally)
}

/// The value of a flag of the proxy that the agent started.
fn argument<'a>(case: &'a Value, flag: &str) -> Option<&'a str> {
    let words = case["proxy_argv"].as_array()?;
    let at = words.iter().position(|word| word == flag)?;
    words.get(at + 1)?.as_str()
}
