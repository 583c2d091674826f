//! What attaches an object to workloads, and where it is visible.

use super::at::At;
use super::{Findings, names};

/// Labels in the words of Kubernetes.
pub(super) fn labels(found: &mut Findings, at: &At<'_>) {
    for (key, value) in at.entries() {
        if !names::is_label_key(key) {
            found.add(&value, format!("{key:?} is no key of a label"));
        }
        if !names::is_label_value(value.text()) {
            found.add(&value, format!("{:?} is no value of a label", value.text()));
        }
    }
}

/// A selector's labels are compared as they stand: a wildcard would select nothing.
fn plain(found: &mut Findings, at: &At<'_>) {
    for (key, value) in at.entries() {
        found.expect(!key.is_empty(), &value, "a label's name is empty");
        found.expect(!key.contains('*') && !value.text().contains('*'), &value, "labels know no wildcard");
    }
}

/// `workloadSelector` with `labels` (networking kinds); whether its labels are good.
pub(super) fn alpha(found: &mut Findings, spec: &At<'_>) -> bool {
    let at = spec.get("workloadSelector");
    let labels = at.get("labels");
    let before = found.0.len();
    plain(found, &labels);
    let good = found.0.len() == before;
    if at.is_said() && labels.len() == 0 {
        found.warn(&at, "a selector without labels selects every workload");
    }
    good
}

/// A selector with `matchLabels`.
pub(super) fn workload(found: &mut Findings, at: &At<'_>) {
    let labels = at.get("matchLabels");
    plain(found, &labels);
    for (_, value) in labels.entries() {
        if value.text().len() > 63 {
            found.schema(&value, "at most 63 characters are expected");
        }
    }
    if at.is_said() && labels.len() == 0 {
        found.warn(at, "a selector without labels selects every workload");
    }
}

/// Policies: one of `selector`, `targetRef` and `targetRefs`.
pub(super) fn policy(found: &mut Findings, spec: &At<'_>) {
    let (selector, one, many) = (spec.get("selector"), spec.get("targetRef"), spec.get("targetRefs"));
    let said = usize::from(selector.is_said()) + usize::from(one.is_said()) + usize::from(many.len() > 0);
    found.expect(said <= 1, &selector, "only one of selector, targetRef and targetRefs may be set");
    workload(found, &selector);
    if many.len() > 16 {
        found.schema(&many, "at most 16 are expected");
    }
    for target in std::iter::once(one).chain(many.items()).filter(At::is_said) {
        self::target(found, &target);
    }
}

fn target(found: &mut Findings, at: &At<'_>) {
    const KNOWN: [(&str, &str); 5] = [
        ("", "Service"),
        ("core", "Service"),
        ("networking.istio.io", "ServiceEntry"),
        ("gateway.networking.k8s.io", "Gateway"),
        ("gateway.networking.k8s.io", "GatewayClass"),
    ];
    found.expect(at.get("name").has_text(), &at.get("name"), "a name is missing");
    let namespace = at.get("namespace");
    found.expect(!namespace.has_text(), &namespace, "what is in another namespace cannot be referred to");
    let pair = (at.get("group").text(), at.get("kind").text());
    let field = if pair.1.is_empty() || KNOWN.iter().any(|k| k.1 == pair.1) { "group" } else { "kind" };
    found.expect(KNOWN.contains(&pair), &at.get(field), "a Service, ServiceEntry, Gateway or GatewayClass is expected");
}

/// What an `exportTo` is of.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Exported {
    /// A VirtualService, or a DestinationRule for everyone.
    Plain,
    /// A DestinationRule with a workload selector: it stays in its namespace.
    Selecting,
    /// A ServiceEntry: it may be hidden from everyone.
    Service,
}

/// `exportTo`: `.`, `*`, namespaces; for services `~`.
pub(super) fn export_to(found: &mut Findings, root: &At<'_>, of: Exported) {
    let list = root.at("spec.exportTo");
    let namespace = root.at("metadata.namespace").text();
    let mut seen: Vec<&str> = Vec::new();
    for item in list.items() {
        let key = if item.text() == "." { namespace } else { item.text() };
        // Without a namespace of its own a document's is not known: `.` is good for itself.
        let good = names::is_label(key) || key == "*" || item.text() == "." || (key == "~" && of == Exported::Service);
        if seen.contains(&key) {
            found.add(&item, format!("{:?} stands here twice", item.text()));
        } else if !good {
            found.add(&item, "., * or the name of a namespace is expected");
        } else {
            seen.push(key);
        }
    }
    if of == Exported::Selecting && !seen.is_empty() {
        found.expect(seen == [namespace], &list, "with a workload selector the rule stays in its own namespace");
    }
    for (all, who) in [("*", "everyone"), ("~", "no one")] {
        if seen.contains(&all) && list.len() > 1 {
            found.add(&list, format!("{all} is for {who} and stands alone"));
        }
    }
}

/// Names of gateways, `NAMESPACE/NAME`; a name without slash may be a host name.
pub(super) fn gateways(found: &mut Findings, list: &At<'_>) {
    for item in list.items() {
        let Some((namespace, name)) = item.text().split_once('/') else {
            if item.text().contains('.') {
                found.warn(&item, "the form is outdated: NAMESPACE/NAME is expected");
            }
            found.expect(names::is_fqdn(item.text()), &item, "no name of a gateway");
            continue;
        };
        found.expect(names::is_label(namespace), &item, "the part before the slash is no name of a namespace");
        found.expect(names::is_label(name), &item, "the part behind the slash is no name of a gateway");
    }
}
