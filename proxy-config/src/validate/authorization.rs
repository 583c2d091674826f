//! AuthorizationPolicy.

use super::at::At;
use super::{Findings, names, selector};

/// Findings of a policy.
pub(super) fn check(found: &mut Findings, spec: &At<'_>) {
    selector::policy(found, spec);
    let (action, rules, provider) = (spec.get("action").text(), spec.get("rules"), spec.get("provider"));
    if action == "CUSTOM" {
        let name = provider.get("name");
        found.expect(name.has_text(), &name, "CUSTOM needs a provider");
    } else {
        found.expect(!provider.is_said(), &provider, "only CUSTOM takes a provider");
    }
    if matches!(action, "DENY" | "CUSTOM") && !rules.is_said() {
        found.tell(&rules, format!("{action} without rules never matches; a rule {{}} matches every request"));
    }
    for rule in rules.items() {
        self::rule(found, &rule, action);
    }
}

fn rule(found: &mut Findings, rule: &At<'_>, action: &str) {
    if rule.is_null() {
        found.add(rule, "a rule is expected; {} matches everything");
        return;
    }
    for list in ["from", "to"].map(|f| rule.get(f)) {
        let empty = list.is_said() && list.len() == 0;
        found.expect(!empty, &list, "the list is empty: leave it out for anyone or anything");
    }
    let (mut sources, mut operations) = (Vec::new(), Vec::new());
    for from in rule.get("from").items() {
        let at = from.get("source");
        source(found, &at, action);
        sources.extend(at.is_said().then_some(at));
    }
    for to in rule.get("to").items() {
        let at = to.get("operation");
        operation(found, &at);
        operations.extend(at.is_said().then_some(at));
    }
    for when in rule.get("when").items() {
        condition(found, &when, action);
    }
    if action == "DENY" {
        widened(found, rule, &sources, &operations);
    }
}

/// On TCP a DENY rule keeps only what TCP knows; with nothing left it denies everything.
fn widened(found: &mut Findings, rule: &At<'_>, sources: &[At<'_>], operations: &[At<'_>]) {
    const FROM: [&str; 10] = [
        "principals",
        "notPrincipals",
        "ipBlocks",
        "notIpBlocks",
        "namespaces",
        "notNamespaces",
        "remoteIpBlocks",
        "notRemoteIpBlocks",
        "serviceAccounts",
        "notServiceAccounts",
    ];
    let says = |list: &[At<'_>], fields: &[&str]| list.iter().any(|at| fields.iter().any(|f| at.get(f).is_said()));
    let (from, to) = (says(sources, &FROM), says(operations, &["ports", "notPorts"]));
    let only_from = !sources.is_empty() && operations.is_empty() && !from;
    if only_from || (!operations.is_empty() && !to) {
        found.warn(rule, "on TCP ports what only HTTP knows is left out: all their traffic is denied; say the ports");
    }
}

const SOURCE: [&str; 14] = [
    "principals",
    "notPrincipals",
    "requestPrincipals",
    "notRequestPrincipals",
    "namespaces",
    "notNamespaces",
    "ipBlocks",
    "notIpBlocks",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
    "serviceAccounts",
    "notServiceAccounts",
    "trustDomains",
    "notTrustDomains",
];

fn source(found: &mut Findings, at: &At<'_>, action: &str) {
    let said = |fields: &[&str]| fields.iter().any(|f| at.get(f).len() > 0);
    if !said(&SOURCE) {
        found.add(at, "a source is expected");
        return;
    }
    let accounts = said(&["serviceAccounts", "notServiceAccounts"]);
    if accounts && said(&["principals", "notPrincipals", "namespaces", "notNamespaces"]) {
        found.tell(at, "serviceAccounts excludes namespaces and principals");
    }
    for field in SOURCE {
        let list = at.get(field);
        if action == "CUSTOM" && list.len() > 0 && !field.to_ascii_lowercase().contains("ipblocks") {
            found.add(&list, "CUSTOM takes no identities: they are not known when the provider is asked");
        }
        match field {
            "ipBlocks" | "notIpBlocks" | "remoteIpBlocks" | "notRemoteIpBlocks" => {
                found.each(&list, "is no address and no network", names::is_network);
            }
            "serviceAccounts" | "notServiceAccounts" => self::accounts(found, &list),
            "trustDomains" | "notTrustDomains" => {
                found.each(&list, "is no trust domain, its beginning or its end", |v| {
                    is_edge_match(v) && !v.contains('/')
                });
            }
            _ => found.each(&list, "is empty", |v| !v.is_empty()),
        }
    }
}

/// A text that is not empty and has at most one star, at one of its ends.
fn is_edge_match(text: &str) -> bool {
    let stars = text.matches('*').count();
    !text.is_empty() && (stars == 0 || (stars == 1 && (text.starts_with('*') || text.ends_with('*'))))
}

fn accounts(found: &mut Findings, list: &At<'_>) {
    found.expect(list.len() <= 16, list, "at most 16 are expected");
    found.each(list, "is neither ACCOUNT nor NAMESPACE/ACCOUNT", |v| {
        !v.contains('*') && v.len() <= 320 && v.split('/').count() <= 2 && v.split('/').all(|p| !p.is_empty())
    });
}

fn operation(found: &mut Findings, at: &At<'_>) {
    const FIELDS: [&str; 8] = ["ports", "notPorts", "methods", "notMethods", "paths", "notPaths", "hosts", "notHosts"];
    if !FIELDS.iter().any(|f| at.get(f).len() > 0) {
        found.add(at, "an operation is expected");
        return;
    }
    for list in FIELDS.map(|f| at.get(f)) {
        found.each(&list, "is empty", |v| !v.is_empty());
    }
    for list in ["ports", "notPorts"].map(|f| at.get(f)) {
        found.each(&list, "is no port", |v| v.is_empty() || is_port(v));
    }
    for list in ["paths", "notPaths"].map(|f| at.get(f)) {
        for path in list.items().iter().filter(|p| !is_path(p.text())) {
            found.tell(path, format!("{:?} is no path template", path.text()));
        }
    }
}

/// A decimal number up to 65535.
fn is_port(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u16>().is_ok()
}

/// A path with `{*}` or `{**}` is a template: each operator a whole segment, `{**}` once and after every `{*}`, and
/// nothing but characters of a path beside them. Other braces are nowhere allowed.
fn is_path(path: &str) -> bool {
    let template = path.contains("{*}") || path.contains("{**}");
    let literal = |text: &str| {
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&b);
        !text.is_empty() && text.bytes().all(good)
    };
    let mut deep = false;
    path.trim_matches('/').split('/').all(|segment| match segment {
        "{*}" => !deep,
        "{**}" => !std::mem::replace(&mut deep, true),
        other => !other.contains(['{', '}']) && (!template || literal(other)),
    })
}

fn condition(found: &mut Findings, at: &At<'_>, action: &str) {
    let key = at.get("key");
    let name = key.text();
    if name.is_empty() {
        found.add(&key, "an attribute is expected");
        return;
    }
    let identities = ["source.namespace", "source.serviceAccount", "source.trustDomain", "source.principal"];
    if action == "CUSTOM" && (identities.contains(&name) || name.starts_with("request.auth.")) {
        found.add(&key, "CUSTOM takes no identities: they are not known when the provider is asked");
    }
    let lists = ["values", "notValues"].map(|f| at.get(f));
    found.expect(lists.iter().any(|l| l.len() > 0), at, "values or notValues are expected");
    if !is_attribute(name) {
        found.add(&key, format!("{name:?} is no attribute that a condition can ask for"));
    }
    for list in lists {
        match name {
            "source.ip" | "remote.ip" | "destination.ip" => {
                found.each(&list, "is no address and no network", names::is_network);
            }
            "destination.port" => found.each(&list, "is no port", |v| !v.is_empty() && is_port(v)),
            "source.serviceAccount" => accounts(found, &list),
            "source.trustDomain" => found.each(&list, "is no trust domain, its beginning or its end", is_edge_match),
            _ => found.each(&list, "is empty", |v| !v.is_empty()),
        }
    }
}

fn is_attribute(name: &str) -> bool {
    const PLAIN: [&str; 12] = [
        "source.ip",
        "remote.ip",
        "source.namespace",
        "source.serviceAccount",
        "source.principal",
        "source.trustDomain",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "destination.ip",
        "destination.port",
        "connection.sni",
    ];
    let keyed = ["request.headers", "request.auth.claims", "experimental.envoy.filters."].iter().any(|prefix| {
        let open = name.find('[').unwrap_or(0);
        name.starts_with(prefix) && name.ends_with(']') && open > 0 && open + 2 < name.len()
    });
    PLAIN.contains(&name) || keyed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_templates() {
        for good in ["/a", "/a*", "*b", "*", "/{*}/b", "/a/{**}", "/a/{*}/b/{**}/c", "/{**}/a"] {
            assert!(is_path(good), "{good}");
        }
        for bad in ["/{**}/{*}", "/{**}/{**}", "/a{*}", "/{*}/b*", "/{*}/{a}", "/{a}", "/{*}//a", "/{*}/a b"] {
            assert!(!is_path(bad), "{bad}");
        }
    }

    #[test]
    fn attributes() {
        for good in ["source.ip", "request.headers[a]", "request.auth.claims[a][b]", "experimental.envoy.filters.a[b]"]
        {
            assert!(is_attribute(good), "{good}");
        }
        for bad in ["source.ips", "request.headers", "request.headers[]", "destination.labels[a]", "x[a]"] {
            assert!(!is_attribute(bad), "{bad}");
        }
    }
}
