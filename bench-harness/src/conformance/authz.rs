//! AuthorizationPolicy tables: YAML in, the RBAC filters of a workload's inbound chains out.

use std::fs;

use anyhow::{Context, Result};
use proxy_config::model::{HttpFilter, NetworkFilter, Rbac};
use proxy_config::{Inputs, Model, Source, WhoAmI};
use serde_json::{Map, Value, json};

use super::tally::{Difference, Tally};
use super::{Bench, Set, cases};

/// Address of the workload in question; nothing depends on it.
const ADDRESS: &str = "10.9.9.9";

/// Runs the tables.
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
        let read = |place: &Value| -> Result<String> {
            let path = set.folder.join(place.as_str().unwrap_or_default());
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        if let Some(reason) = bench.rules.beyond(case) {
            tally.out_of_reach(reason, 1);
            continue;
        }
        let policies = read(&case["input"]["policies"])?;
        let mut expected = Vec::new();
        for file in case["expect"]["filters"].as_array().into_iter().flatten() {
            let golden: Value = serde_saphyr::from_str(&read(file)?).context("a golden filter is no YAML")?;
            expected.push(filter(&golden["typedConfig"]));
        }
        let seen = seen(case, policies);
        let found = match seen {
            Ok(seen) => compare(&expected, &seen),
            Err(error) => vec![Difference::new("load", "filters", format!("{error:#}"))],
        };
        tally.judge(bench.rules, name, case, found);
    }
    Ok(tally)
}

fn compare(expected: &[Value], seen: &[Value]) -> Vec<Difference> {
    let (expected, seen): (Vec<Value>, Vec<Value>) =
        (expected.iter().map(sorted).collect(), seen.iter().map(sorted).collect());
    if expected == seen {
        return Vec::new();
    }
    vec![Difference::new("filters", Value::from(expected), Value::from(seen))]
}

/// What the public face makes of the policies, on the chain of the case's transport.
fn seen(case: &Value, policies: String) -> Result<Vec<Value>> {
    let workload = &case["input"]["workload"];
    let namespace = workload["namespace"].as_str().unwrap_or_default();
    let bundle = &case["input"]["trustDomainBundle"];
    let mesh = if bundle.is_null() {
        json!({})
    } else {
        json!({"trustDomain": bundle["trustDomain"], "trustDomainAliases": bundle["aliases"]})
    };
    let node = json!({
        "id": format!("sidecar~{ADDRESS}~{}.{namespace}~{namespace}.svc.cluster.local", workload["id"].as_str().unwrap_or_default()),
        "metadata": {"NAMESPACE": namespace, "LABELS": workload["labels"], "INSTANCE_IPS": ADDRESS},
    });
    let inputs = Inputs {
        sources: vec![Source { name: "policies".to_owned(), text: policies }],
        mesh: Some(Source { name: "mesh.yaml".to_owned(), text: mesh.to_string() }),
        networks: None,
        who: WhoAmI::Node(node.to_string()),
    };
    let loaded = proxy_config::from_yaml(&inputs, None).map_err(|rejects| {
        let told: Vec<String> = rejects.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("{}", told.join("; "))
    })?;
    Ok(filters(&loaded.model, case["transport"] == "HTTP"))
}

/// RBAC filters of the first inbound chain of a transport.
fn filters(model: &Model, http: bool) -> Vec<Value> {
    let json = |rbac: &Rbac| serde_json::to_value(rbac).unwrap_or_default();
    let listener = model.listeners.get("virtualInbound");
    for chain in listener.iter().flat_map(|l| &l.filter_chains) {
        let manager = chain.filters.iter().find_map(|f| match f {
            NetworkFilter::Http(manager) => Some(manager),
            _ => None,
        });
        match (http, manager) {
            (true, Some(manager)) => {
                let rbac = |f: &HttpFilter| if let HttpFilter::Rbac(rbac) = f { Some(json(rbac)) } else { None };
                return manager.filters.iter().filter_map(rbac).collect();
            }
            // The first chain of all swallows what was sent to the proxy's own port.
            (false, None) if chain.matches.destination_port.is_none() => {
                let rbac = |f: &NetworkFilter| if let NetworkFilter::Rbac(rbac) = f { Some(json(rbac)) } else { None };
                return chain.filters.iter().filter_map(rbac).collect();
            }
            _ => {}
        }
    }
    Vec::new()
}

/// Lists whose order means nothing, in an order.
fn sorted(of: &Value) -> Value {
    match of {
        Value::Object(map) => Value::Object(map.iter().map(|(k, v)| (k.clone(), sorted(v))).collect()),
        Value::Array(items) => {
            let mut items: Vec<Value> = items.iter().map(sorted).collect();
            items.sort_by_key(ToString::to_string);
            Value::Array(items)
        }
        other => other.clone(),
    }
}

/// A golden filter in the model's words.
fn filter(said: &Value) -> Value {
    json!({
        "rules": rules(&said["rules"]),
        "shadow_rules": rules(&said["shadowRules"]),
        "shadow_rules_stat_prefix": text(&said["shadowRulesStatPrefix"]),
        "stat_prefix": text(&said["statPrefix"]),
    })
}

fn text(of: &Value) -> &str {
    of.as_str().unwrap_or_default()
}

fn rules(said: &Value) -> Value {
    if said.is_null() {
        return Value::Null;
    }
    let action = match said["action"].as_str() {
        Some("DENY") => "Deny",
        Some("LOG") => "Log",
        _ => "Allow",
    };
    let policies: Map<String, Value> = said["policies"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, policy)| {
            let each = |list: &Value, of: fn(&Value) -> Value| -> Vec<Value> {
                list.as_array().map(|l| l.iter().map(of).collect()).unwrap_or_default()
            };
            let value = json!({
                "permissions": each(&policy["permissions"], permission),
                "principals": each(&policy["principals"], principal),
            });
            (name.clone(), value)
        })
        .collect();
    json!({"action": action, "policies": policies})
}

fn many(list: &Value, of: fn(&Value) -> Value) -> Value {
    list.as_array().map(|l| Value::Array(l.iter().map(of).collect())).unwrap_or_default()
}

fn permission(said: &Value) -> Value {
    let Some((key, value)) = said.as_object().and_then(|m| m.iter().next()) else { return Value::Null };
    match key.as_str() {
        "andRules" => json!({"And": many(&value["rules"], permission)}),
        "orRules" => json!({"Or": many(&value["rules"], permission)}),
        "notRule" => json!({"Not": permission(value)}),
        "header" => json!({"Header": header(value)}),
        "urlPath" => json!({"UrlPath": string(&value["path"])}),
        "uriTemplate" => json!({"UriTemplate": text(&value["typedConfig"]["pathTemplate"])}),
        "destinationIp" => json!({"DestinationIp": cidr(value)}),
        "destinationPort" => json!({"DestinationPort": value}),
        "requestedServerName" => json!({"ServerName": string(value)}),
        "metadata" => json!({"Metadata": metadata(value)}),
        _ => json!("Any"),
    }
}

fn principal(said: &Value) -> Value {
    let Some((key, value)) = said.as_object().and_then(|m| m.iter().next()) else { return Value::Null };
    match key.as_str() {
        "andIds" => json!({"And": many(&value["ids"], principal)}),
        "orIds" => json!({"Or": many(&value["ids"], principal)}),
        "notId" => json!({"Not": principal(value)}),
        "authenticated" => {
            let name = &value["principalName"];
            json!({"Authenticated": if name.is_null() { Value::Null } else { string(name) }})
        }
        "directRemoteIp" => json!({"DirectRemoteIp": cidr(value)}),
        "remoteIp" => json!({"RemoteIp": cidr(value)}),
        "header" => json!({"Header": header(value)}),
        "urlPath" => json!({"UrlPath": string(&value["path"])}),
        "metadata" => json!({"Metadata": metadata(value)}),
        "filterState" => json!({"FilterState": [text(&value["key"]), string(&value["stringMatch"])]}),
        _ => json!("Any"),
    }
}

fn string(said: &Value) -> Value {
    let pattern = ["exact", "prefix", "suffix", "contains"].iter().find_map(|key| {
        let value = said[*key].as_str()?;
        let name = format!("{}{}", key[..1].to_uppercase(), &key[1..]);
        Some(json!({name: value}))
    });
    let pattern = pattern.unwrap_or_else(|| json!({"Regex": text(&said["safeRegex"]["regex"])}));
    json!({"pattern": pattern, "ignore_case": said["ignoreCase"] == true})
}

fn header(said: &Value) -> Value {
    let value = if said["presentMatch"].is_boolean() {
        json!({"Present": said["presentMatch"]})
    } else if said["stringMatch"].is_object() {
        json!({"String": string(&said["stringMatch"])})
    } else {
        json!({"String": string(&json!({"safeRegex": said["safeRegexMatch"]}))})
    };
    json!({
        "name": text(&said["name"]).to_ascii_lowercase(),
        "value": value,
        "invert": said["invertMatch"] == true,
        "treat_missing_as_empty": said["treatMissingHeaderAsEmpty"] == true,
    })
}

fn cidr(said: &Value) -> String {
    format!("{}/{}", text(&said["addressPrefix"]), said["prefixLen"].as_u64().unwrap_or(0))
}

fn metadata(said: &Value) -> Value {
    let path: Vec<&str> = said["path"].as_array().into_iter().flatten().map(|p| text(&p["key"])).collect();
    json!({
        "filter": said["filter"],
        "path": path,
        "value": value_matcher(&said["value"]),
        "invert": said["invert"] == true,
    })
}

fn value_matcher(said: &Value) -> Value {
    let Some((key, value)) = said.as_object().and_then(|m| m.iter().next()) else { return Value::Null };
    match key.as_str() {
        "stringMatch" => json!({"String": string(value)}),
        "boolMatch" => json!({"Bool": value}),
        "presentMatch" => json!({"Present": value}),
        "listMatch" => json!({"ListOneOf": value_matcher(&value["oneOf"])}),
        "orMatch" => json!({"Or": many(&value["valueMatchers"], value_matcher)}),
        _ => json!("Null"),
    }
}
