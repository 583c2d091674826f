//! Routes of a VirtualService that no request reaches, and matches that say what an earlier one has said.

use std::collections::BTreeMap;

use super::Findings;
use super::at::At;
use crate::yaml::{Data, Node};

/// A rule that is never used.
const UNREACHABLE: &str = "IST0130";
/// A match that is never used.
const INEFFECTIVE: &str = "IST0131";

/// Warnings about `http`, `tcp` and `tls`.
pub(super) fn check(found: &mut Findings, spec: &At<'_>) {
    for field in ["http", "tcp", "tls"] {
        routes(found, &spec.get(field).items());
    }
    covered(found, &spec.get("http").items());
}

/// What a route or match is called: by its name, else by its number.
fn called(at: &At<'_>, index: usize) -> String {
    match at.get("name").text() {
        "" => format!("#{index}"),
        name => format!("{name:?}"),
    }
}

fn routes(found: &mut Findings, routes: &[At<'_>]) {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut open = false;
    for (index, route) in routes.iter().enumerate() {
        let matches = route.get("match").items();
        if matches.is_empty() {
            if open {
                unreachable(found, route, "an earlier route takes everything: only the last may have no match");
            }
            open = true;
            continue;
        }
        let mut repeated = 0;
        for one in &matches {
            if open {
                unreachable(found, one, "an earlier route without match takes everything");
                continue;
            }
            let said = one.node().map(canonical).unwrap_or_default();
            if let Some(first) = seen.get(&said) {
                let whose = called(&routes[*first], *first);
                found.warn(one, format!("the same match stands in route {whose}: this one has no effect"));
                found.coded(INEFFECTIVE);
                repeated += 1;
            } else {
                seen.insert(said, index);
            }
        }
        if repeated == matches.len() {
            unreachable(found, route, "earlier routes have all its matches");
        }
    }
}

fn unreachable(found: &mut Findings, at: &At<'_>, reason: &str) {
    found.warn(at, reason);
    found.coded(UNREACHABLE);
}

/// A match without its name, as text in which only what it asks for counts.
fn canonical(node: &Node) -> String {
    fn write(node: &Node, top: bool, out: &mut String) {
        match &node.data {
            Data::Scalar { text, .. } => out.push_str(&format!("{text:?}")),
            Data::List(items) => {
                out.push('[');
                items.iter().for_each(|item| write(item, false, out));
                out.push(']');
            }
            Data::Map(entries) => {
                let mut entries: Vec<&(String, Node)> = entries.iter().filter(|(k, _)| !top || k != "name").collect();
                entries.sort_by(|a, b| a.0.cmp(&b.0));
                out.push('{');
                for (key, value) in entries {
                    out.push_str(&format!("{key:?}:"));
                    write(value, false, out);
                }
                out.push('}');
            }
        }
    }
    let mut out = String::new();
    write(node, true, &mut out);
    out
}

/// A match by prefix, as far as one can cover another.
struct Prefix<'r, 'n> {
    at: &'r At<'n>,
    prefix: &'n str,
    port: i64,
    method: String,
    authority: String,
    maps: [BTreeMap<&'n str, String>; 3],
    route: String,
}

/// How a text match begins: exact or prefix; anything else is the same nothing.
fn start(at: &At<'_>) -> String {
    let exact = at.get("exact");
    let prefix = at.get("prefix");
    match (exact.text(), prefix.text()) {
        ("", "") => String::new(),
        ("", prefix) => format!("prefix:{prefix}"),
        (exact, _) => format!("exact:{exact}"),
    }
}

/// A prefix that an earlier, shorter prefix has taken.
fn covered(found: &mut Findings, routes: &[At<'_>]) {
    let matches: Vec<Vec<At<'_>>> = routes.iter().map(|r| r.get("match").items()).collect();
    let mut seen: Vec<String> = Vec::new();
    let mut prefixes: Vec<Prefix<'_, '_>> = Vec::new();
    for (index, (route, matches)) in routes.iter().zip(&matches).enumerate() {
        if matches.is_empty() {
            break;
        }
        for one in matches {
            let said = one.node().map(canonical).unwrap_or_default();
            let prefix = one.at("uri.prefix").text();
            if seen.contains(&said) || prefix.is_empty() {
                continue;
            }
            seen.push(said);
            let method = start(&one.get("method"));
            let map = |field: &str| one.get(field).entries().into_iter().map(|(k, v)| (k, start(&v))).collect();
            prefixes.push(Prefix {
                at: one,
                prefix,
                port: one.get("port").whole_or_zero(),
                method: if method.is_empty() { "exact:GET".to_owned() } else { method },
                authority: start(&one.get("authority")),
                maps: [map("headers"), map("queryParams"), map("withoutHeaders")],
                route: called(route, index),
            });
        }
    }
    for (index, later) in prefixes.iter().enumerate() {
        for earlier in prefixes[..index].iter().filter(|e| e.prefix != later.prefix && covers(e, later)) {
            let (shorter, whose) = (earlier.prefix, &earlier.route);
            found.warn(later.at, format!("prefix {shorter:?} of route {whose} takes these requests already"));
            found.coded(INEFFECTIVE);
        }
    }
}

fn covers(a: &Prefix<'_, '_>, b: &Prefix<'_, '_>) -> bool {
    let map = |a: &BTreeMap<&str, String>, b: &BTreeMap<&str, String>| {
        a.len() == b.len() && a.iter().all(|(k, v)| b.get(k).is_some_and(|w| v.starts_with(w.as_str())))
    };
    b.prefix.starts_with(a.prefix)
        && a.port == b.port
        && a.method.starts_with(&b.method)
        && a.authority.starts_with(&b.authority)
        && a.maps.iter().zip(&b.maps).all(|(x, y)| map(x, y))
}
