//! Sidecars that select no Pod, or the same.

use std::collections::{BTreeMap, BTreeSet};

use super::{Item, Message, World, selects};

const NO_POD: &str = "IST0101";
const SAME_POD: &str = "IST0110";
const SAME_NAMESPACE: &str = "IST0111";
const NO_IMPACT: &str = "IST0167";

/// One Pod, one Sidecar; one Sidecar a namespace without labels.
pub(super) fn selectors(world: &World<'_>, out: &mut Vec<Message>) {
    let mut by_pod: BTreeMap<String, (&Item<'_>, Vec<&Item<'_>>)> = BTreeMap::new();
    let mut by_namespace: BTreeMap<&str, Vec<&Item<'_>>> = BTreeMap::new();
    for item in world.of("Sidecar") {
        let labels = item.spec.at("workloadSelector.labels");
        if labels.len() == 0 {
            by_namespace.entry(item.namespace()).or_default().push(item);
            continue;
        }
        let own = |p: &&Item<'_>| p.namespace() == item.namespace() && selects(&labels, &p.labels());
        let pods: Vec<&Item<'_>> = world.of("Pod").iter().filter(own).collect();
        let machine = || world.machines().iter().any(|(n, of)| *n == item.namespace() && selects(&labels, of));
        if pods.is_empty() && !machine() {
            out.push(item.message(NO_POD, &labels, "no Pod of the namespace is selected").unsure());
        }
        for pod in pods {
            by_pod.entry(pod.full_name()).or_insert((pod, Vec::new())).1.push(item);
        }
    }
    let mut told = BTreeSet::new();
    for (name, (pod, sidecars)) in &by_pod {
        let ambient = pod.annotation("ambient.istio.io/redirection") == "enabled";
        for item in sidecars {
            if ambient && told.insert(item.full_name()) {
                out.push(item.message(NO_IMPACT, &item.spec, format!("Pod {name} is served by its node")));
            } else if !ambient && sidecars.len() > 1 {
                let at = item.spec.get("workloadSelector");
                out.push(item.message(SAME_POD, &at, format!("Pod {name} is selected by several Sidecars")));
            }
        }
    }
    without_labels(world, &by_namespace, &mut told, out);
}

fn without_labels(
    world: &World<'_>,
    by_namespace: &BTreeMap<&str, Vec<&Item<'_>>>,
    told: &mut BTreeSet<String>,
    out: &mut Vec<Message>,
) {
    for (namespace, sidecars) in by_namespace {
        let ambient = world.of("Namespace").iter().any(|n| n.name() == *namespace && is_ambient(n));
        for item in sidecars {
            if ambient && told.insert(item.full_name()) {
                out.push(item.message(NO_IMPACT, &item.spec, "the namespace is served by its nodes"));
            } else if !ambient && sidecars.len() > 1 {
                let reason = format!("namespace {namespace} has several Sidecars without labels: one of them holds");
                out.push(item.message(SAME_NAMESPACE, &item.spec, reason));
            }
        }
    }
}

/// Without sidecars: served by what runs on its nodes.
fn is_ambient(namespace: &Item<'_>) -> bool {
    namespace.label("istio-injection") != "enabled"
        && namespace.label("istio.io/rev").is_empty()
        && namespace.label("istio.io/dataplane-mode") == "ambient"
}
