//! What `/config_dump` is made of: recorded bytes shown as the recorded JSON, and dumps of other proxies read as input.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result};
use prost::Message;
use proxy_config::Reject;
use proxy_config::describe::Descriptors;
use proxy_config::xds::{self, Any, DiscoveryResponse, Extensions};
use serde_json::Value;

use super::tally::{Difference, Tally};
use super::{Bench, Set, cases};

static DESCRIPTORS: LazyLock<Option<Descriptors>> = LazyLock::new(Descriptors::load);

/// Every recorded response of a folder must be shown as the JSON beside it.
///
/// # Errors
/// When the folder cannot be read.
pub(super) fn of_recording(bench: &Bench<'_>, name: &str, folder: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    let Some(descriptors) = &*DESCRIPTORS else {
        tally.unsupported("the build found no message descriptors");
        return Ok(tally);
    };
    for kind in ["cds", "eds", "lds", "rds", "ecds", "nds"] {
        let (bytes, text) = (folder.join(format!("{kind}.pb")), folder.join(format!("{kind}.json")));
        if !bytes.exists() || !text.exists() {
            continue;
        }
        let response = DiscoveryResponse::decode(&*fs::read(&bytes)?)?;
        let recorded: Value = serde_json::from_str(&fs::read_to_string(&text)?)
            .with_context(|| format!("{} is no JSON", text.display()))?;
        let recorded = recorded["resources"].as_array().map_or(&[][..], Vec::as_slice);
        let shown: Vec<Value> =
            response.resources.iter().map(|any| descriptors.json(&any.type_url, &any.value)).collect();
        let mut differences = Vec::new();
        if recorded.len() != shown.len() {
            differences.push(Difference::new("resources", recorded.len(), shown.len()));
        }
        for (i, (recorded, shown)) in recorded.iter().zip(&shown).enumerate() {
            differ(&format!("{kind}[{i}]"), recorded, shown, &mut differences);
        }
        tally.judge(bench.rules, &format!("{name} {kind} (dump)"), &Value::Null, differences);
    }
    Ok(tally)
}

/// Where two JSON values differ; numbers by value, since protojson may write `1` or `1.0`.
fn differ(path: &str, recorded: &Value, shown: &Value, out: &mut Vec<Difference>) {
    match (recorded, shown) {
        (Value::Object(a), Value::Object(b)) => {
            for name in a.keys().chain(b.keys().filter(|name| !a.contains_key(*name))) {
                let none = Value::Null;
                let (a, b) = (a.get(name).unwrap_or(&none), b.get(name).unwrap_or(&none));
                differ(&format!("{path}.{name}"), a, b, out);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                differ(&format!("{path}[{i}]"), a, b, out);
            }
        }
        (a, b) if a == b || (a.is_number() && a.as_f64() == b.as_f64()) => {}
        (a, b) => out.push(Difference::new(path, a, b)),
    }
}

/// Reads dumps that a tool or another proxy wrote: every resource in them must be understood, extensions of unknown type
/// included.
///
/// # Errors
/// When the vectors cannot be read.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    let Some(descriptors) = &*DESCRIPTORS else {
        tally.unsupported("the build found no message descriptors");
        return Ok(tally);
    };
    for case in cases(set) {
        let name = case["name"].as_str().unwrap_or_default();
        let Some(dump) = case["input"]["dump"].as_str().filter(|_| bench.wants(name)) else { continue };
        let text = fs::read_to_string(set.folder.join(dump)).with_context(|| format!("cannot read {dump}"))?;
        let mut dump: Value = serde_json::from_str(&text).with_context(|| format!("{dump} is no JSON"))?;
        if dump["bootstrap"].is_object() {
            // The section alone, as `istioctl` keeps it.
            dump["@type"] = Value::from("type.googleapis.com/envoy.admin.v3.BootstrapConfigDump");
        }
        let mut differences = Vec::new();
        let found = resources(&dump, "", descriptors, &mut differences);
        if found == 0 {
            differences.push(Difference::new("", "resources", "none"));
        }
        tally.judge(bench.rules, name, case, differences);
    }
    Ok(tally)
}

/// Goes through a dump and reads every resource; returns how many there were.
fn resources(value: &Value, path: &str, descriptors: &Descriptors, out: &mut Vec<Difference>) -> usize {
    match value {
        Value::Array(items) => {
            let each = |(i, item)| resources(item, &format!("{path}[{i}]"), descriptors, out);
            items.iter().enumerate().map(each).sum()
        }
        Value::Object(fields) => {
            if is_awaited(value) {
                return 1;
            }
            if let Some(read) = reader(fields.get("@type").and_then(Value::as_str).unwrap_or_default()) {
                let outcome =
                    descriptors.message(value).and_then(|any| read(&any).map_err(|reject| reject.to_string()));
                if let Err(e) = outcome {
                    out.push(Difference::new(path, "understood", e));
                }
                return 1;
            }
            fields.iter().map(|(name, field)| resources(field, &format!("{path}.{name}"), descriptors, out)).sum()
        }
        _ => 0,
    }
}

/// An extension that was subscribed to and has not come: there is nothing to understand.
fn is_awaited(value: &Value) -> bool {
    value["@type"] == "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
        && value.get("typed_config").or_else(|| value.get("typedConfig")).is_none()
}

type Reader = fn(&Any) -> Result<(), Reject>;

/// What reads a type; `None`: not a resource.
fn reader(type_url: &str) -> Option<Reader> {
    match type_url.strip_prefix("type.googleapis.com/")? {
        "envoy.config.listener.v3.Listener" => Some(|any| xds::listener(any, &Extensions::new()).map(drop)),
        "envoy.config.route.v3.RouteConfiguration" => Some(|any| xds::route_table(any).map(drop)),
        "envoy.config.cluster.v3.Cluster" => Some(|any| xds::cluster(any).map(drop)),
        "envoy.config.endpoint.v3.ClusterLoadAssignment" => Some(|any| xds::endpoints(any).map(drop)),
        "envoy.config.core.v3.TypedExtensionConfig" => Some(|any| xds::extension(any).map(drop)),
        // Shown, and not read by anybody: it is enough that it has the shape of its type.
        "envoy.extensions.transport_sockets.tls.v3.Secret" | "envoy.admin.v3.BootstrapConfigDump" => Some(|_| Ok(())),
        _ => None,
    }
}
