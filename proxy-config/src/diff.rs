//! What two models of one proxy disagree about, by field path: the file compiler against recorded resources.
//!
//! Works on the models' JSON, so no field can be forgotten. Lists whose order means nothing are compared as sets,
//! lists of named things by name; everything else (routes, filters, ALPN offers) by position.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use crate::model::Model;

/// One field that differs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// Where: `clusters[outbound|80||host].limits.max_connections`.
    pub path: String,
    /// Value from YAML as JSON, cut when long; `absent` when there is none.
    pub yaml: String,
    /// Value from the resources, alike.
    pub xds: String,
}

/// Longest value that is printed whole, bytes.
const MAX_VALUE: usize = 400;

/// Lists whose order has no meaning, by field name. `And` and `Or` are the matchers'.
const SETS: [&str; 25] = [
    "And",
    "Or",
    "additional_addresses",
    "application_protocols",
    "audiences",
    "direct_source_prefix_ranges",
    "domains",
    "dynamic_metadata",
    "error_statuses",
    "headers",
    "internal_cidrs",
    "ips",
    "permissions",
    "prefix_ranges",
    "principals",
    "query",
    "remove",
    "retriable_status_codes",
    "san",
    "server_names",
    "services",
    "set",
    "source_ports",
    "source_prefix_ranges",
    "upgrades",
];

/// Every field in which the models differ, in path order. Resources without a name table say nothing about names:
/// a proxy that does not answer DNS does not ask for it.
pub fn diff(yaml: &Model, xds: &Model) -> Vec<Difference> {
    let json = |model: &Model| serde_json::to_value(model).expect("every map of a model has text keys");
    let (mut said, recorded) = (sorted(json(yaml), ""), sorted(json(xds), ""));
    if xds.names.is_empty() {
        said["names"] = recorded["names"].clone();
    }
    let mut out = Vec::new();
    compare("", "", &said, &recorded, &mut out);
    out.sort();
    out
}

/// Sorts every list that is a set, innermost first, so that equal sets are equal values. An unknown health counts as
/// healthy everywhere, so here too.
fn sorted(value: Value, field: &str) -> Value {
    match value {
        Value::Object(fields) => Value::Object(fields.into_iter().map(|(k, v)| (k.clone(), sorted(v, &k))).collect()),
        Value::Array(items) => {
            let mut items: Vec<Value> = items.into_iter().map(|item| sorted(item, "")).collect();
            if SETS.contains(&field) {
                items.sort_by_cached_key(Value::to_string);
            }
            Value::Array(items)
        }
        Value::String(health) if field == "health" && health == "Unknown" => Value::from("Healthy"),
        other => other,
    }
}

fn compare(path: &str, field: &str, yaml: &Value, xds: &Value, out: &mut Vec<Difference>) {
    if yaml == xds {
        return;
    }
    match (yaml, xds) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                pair(&join(path, key), key, a.get(key), b.get(key), out);
            }
        }
        (Value::Array(a), Value::Array(b)) => match keyed(field, a).zip(keyed(field, b)) {
            Some((a, b)) => {
                for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                    pair(&format!("{path}[{key}]"), "", a.get(key).copied(), b.get(key).copied(), out);
                }
            }
            None if SETS.contains(&field) => sets(path, a, b, out),
            None => {
                for i in 0..a.len().max(b.len()) {
                    pair(&format!("{path}[{i}]"), "", a.get(i), b.get(i), out);
                }
            }
        },
        _ => pair(path, field, Some(yaml), Some(xds), out),
    }
}

fn pair(path: &str, field: &str, yaml: Option<&Value>, xds: Option<&Value>, out: &mut Vec<Difference>) {
    let nested = |v: Option<&Value>| v.is_some_and(|v| v.is_object() || v.is_array());
    match (yaml, xds) {
        (Some(a), Some(b)) if a == b || (nested(yaml) && nested(xds) && a.is_object() == b.is_object()) => {
            compare(path, field, a, b, out);
        }
        _ => out.push(Difference { path: path.to_owned(), yaml: text(yaml), xds: text(xds) }),
    }
}

/// What one set has and the other lacks; as many on both sides are compared with each other.
fn sets(path: &str, yaml: &[Value], xds: &[Value], out: &mut Vec<Difference>) {
    let mut only_xds: Vec<&Value> = xds.iter().collect();
    let mut only_yaml = Vec::new();
    for item in yaml {
        match only_xds.iter().position(|other| *other == item) {
            Some(at) => {
                only_xds.remove(at);
            }
            None => only_yaml.push(item),
        }
    }
    if only_yaml.len() == only_xds.len() {
        for (i, (a, b)) in only_yaml.into_iter().zip(only_xds).enumerate() {
            pair(&format!("{path}{{{i}}}"), "", Some(a), Some(b), out);
        }
        return;
    }
    for item in only_yaml {
        pair(&format!("{path}{{}}"), "", Some(item), None, out);
    }
    for item in only_xds {
        pair(&format!("{path}{{}}"), "", None, Some(item), out);
    }
}

/// Elements of a list of named things by name; of several with one name the later get a number.
fn keyed<'v>(field: &str, items: &'v [Value]) -> Option<BTreeMap<String, &'v Value>> {
    let name: fn(&Value) -> String = match field {
        "filter_chains" => chain_name,
        "virtual_hosts" => |v| plain(&v["name"]),
        "clusters" => |v| plain(v.get("cluster").unwrap_or_else(|| &v["name"])),
        "localities" => |v| {
            let place = &v["locality"];
            format!(
                "{}/{}/{} {}",
                plain(&place["region"]),
                plain(&place["zone"]),
                plain(&place["sub_zone"]),
                v["priority"]
            )
        },
        "endpoints" => |v| v["address"].to_string(),
        _ => return None,
    };
    let mut out = BTreeMap::new();
    for item in items {
        let first = name(item);
        let mut key = first.clone();
        let mut n = 1;
        while out.contains_key(&key) {
            n += 1;
            key = format!("{first} #{n}");
        }
        out.insert(key, item);
    }
    Some(out)
}

/// A chain is known by its name and everything that it matches on.
fn chain_name(chain: &Value) -> String {
    let mut out = plain(&chain["name"]);
    let matches = chain["matches"].as_object().into_iter().flatten();
    for (field, value) in matches.filter(|(_, v)| !v.is_null() && **v != Value::Array(Vec::new())) {
        if (field.as_str(), value.as_str()) != ("source_type", Some("Any")) {
            out.push(' ');
            out.push_str(&value.to_string().replace('"', ""));
        }
    }
    out
}

fn plain(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn join(path: &str, key: &str) -> String {
    let simple = key.starts_with(|c: char| c.is_ascii_alphabetic())
        && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    match (path.is_empty(), simple) {
        (true, _) => key.to_owned(),
        (false, true) => format!("{path}.{key}"),
        (false, false) => format!("{path}[{key}]"),
    }
}

fn text(value: Option<&Value>) -> String {
    let Some(value) = value else { return "absent".to_owned() };
    let mut out = value.to_string();
    if out.len() > MAX_VALUE {
        let end = (0..=MAX_VALUE).rev().find(|at| out.is_char_boundary(*at)).unwrap_or(0);
        out.truncate(end);
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Name, NameInfo, RouteTable, VirtualHost};

    fn host(name: &str, domains: &[&str]) -> VirtualHost {
        VirtualHost {
            name: Name::from(name),
            domains: domains.iter().map(|d| (*d).to_owned()).collect(),
            ..VirtualHost::default()
        }
    }

    fn model(virtual_hosts: Vec<VirtualHost>) -> Model {
        let table = RouteTable { name: Name::from("80"), virtual_hosts, ..RouteTable::default() };
        let mut model = Model::default();
        model.routes.insert(Name::from("80"), Arc::new(table));
        model
    }

    fn lines(a: &Model, b: &Model) -> Vec<String> {
        diff(a, b).into_iter().map(|d| format!("{}: {} / {}", d.path, d.yaml, d.xds)).collect()
    }

    #[test]
    fn order_of_sets_and_of_named_things_means_nothing() {
        let a = model(vec![host("a", &["x", "y"]), host("b", &[])]);
        let b = model(vec![host("b", &[]), host("a", &["y", "x"])]);
        assert_eq!(lines(&a, &b), Vec::<String>::new());
    }

    #[test]
    fn differences_have_a_path() {
        let a = model(vec![host("a", &["x", "y"]), host("b", &[])]);
        let mut b = model(vec![host("a", &["x", "z", "w"])]);
        b.names.insert(Name::from("h.x"), NameInfo::default());
        assert_eq!(lines(&b, &Model::default()).len(), 1, "names without a name table");
        assert_eq!(
            lines(&a, &b),
            [
                "names[h.x]: absent / {\"ips\":[],\"namespace\":\"\",\"registry\":\"\",\"shortname\":\"\"}",
                "routes[80].virtual_hosts[a].domains{}: \"y\" / absent",
                "routes[80].virtual_hosts[a].domains{}: absent / \"w\"",
                "routes[80].virtual_hosts[a].domains{}: absent / \"z\"",
                "routes[80].virtual_hosts[b]: {\"domains\":[],\"include_request_attempt_count\":false,\"name\":\"b\",\
                 \"routes\":[]} / absent",
            ]
        );
    }

    #[test]
    fn as_many_on_both_sides_are_compared_with_each_other() {
        let a = model(vec![host("a", &["x", "y"])]);
        let b = model(vec![host("a", &["x", "z"])]);
        assert_eq!(lines(&a, &b), ["routes[80].virtual_hosts[a].domains{0}: \"y\" / \"z\""]);
    }

    #[test]
    fn one_name_twice_is_two_things() {
        let a = model(vec![host("a", &["x"]), host("a", &["y"])]);
        let b = model(vec![host("a", &["x"]), host("a", &["z"])]);
        assert_eq!(lines(&a, &b), ["routes[80].virtual_hosts[a #2].domains{0}: \"y\" / \"z\""]);
    }
}
