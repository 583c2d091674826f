//! Telemetry that selects no Pod or the same, and providers that are missing or outdated.

use std::collections::BTreeMap;

use super::{Item, Message, World, selects};

const DEPRECATED: &str = "IST0002";
const NO_POD: &str = "IST0101";
const NO_PROVIDER: &str = "IST0157";
const SAME_POD: &str = "IST0159";
const SAME_NAMESPACE: &str = "IST0160";

/// One Telemetry without selector a namespace.
pub(super) fn defaults(world: &World<'_>, out: &mut Vec<Message>) {
    let mut by_namespace: BTreeMap<&str, Vec<&Item<'_>>> = BTreeMap::new();
    for item in world.of("Telemetry").iter().filter(|i| !i.spec.get("selector").is_said()) {
        by_namespace.entry(item.namespace()).or_default().push(item);
    }
    for (namespace, items) in by_namespace.iter().filter(|(_, items)| items.len() > 1) {
        for item in items {
            let reason = format!("namespace {namespace} has several Telemetries without selector: one of them holds");
            out.push(item.message(SAME_NAMESPACE, &item.spec, reason));
        }
    }
}

/// One Pod, one Telemetry.
pub(super) fn selectors(world: &World<'_>, out: &mut Vec<Message>) {
    let mut by_pod: BTreeMap<String, Vec<&Item<'_>>> = BTreeMap::new();
    for item in world.of("Telemetry") {
        let labels = item.spec.at("selector.matchLabels");
        if labels.len() == 0 {
            continue;
        }
        let own = |p: &&Item<'_>| p.namespace() == item.namespace() && selects(&labels, &p.labels());
        let pods: Vec<&Item<'_>> = world.of("Pod").iter().filter(own).collect();
        let machine = || world.machines().iter().any(|(n, of)| *n == item.namespace() && selects(&labels, of));
        if pods.is_empty() && !machine() {
            out.push(item.message(NO_POD, &labels, "no Pod of the namespace is selected").unsure());
        }
        for pod in pods {
            by_pod.entry(pod.full_name()).or_default().push(item);
        }
    }
    for (pod, items) in by_pod.iter().filter(|(_, items)| items.len() > 1) {
        for item in items {
            let at = item.spec.get("selector");
            out.push(item.message(SAME_POD, &at, format!("Pod {pod} is selected by several Telemetries")));
        }
    }
}

/// Access logs that nobody writes.
pub(super) fn providers(world: &World<'_>, out: &mut Vec<Message>) {
    let defaults = world.mesh().map_or(0, |m| m.at("defaultProviders.accessLogging").len());
    if defaults > 0 {
        return;
    }
    for item in world.of("Telemetry") {
        for log in item.spec.get("accessLogging").items() {
            if !log.get("disabled").is_true() && log.get("providers").len() == 0 {
                out.push(item.message(
                    NO_PROVIDER,
                    &log,
                    "no provider is said, and the mesh has no default: nothing is written",
                ));
            }
        }
    }
}

/// Tracing by a provider that Istio has given up.
pub(super) fn lightstep(world: &World<'_>, out: &mut Vec<Message>) {
    let providers = world.mesh().map(|m| m.get("extensionProviders").items()).unwrap_or_default();
    let old: Vec<&str> =
        providers.iter().filter(|p| p.get("lightstep").is_said()).map(|p| p.get("name").text()).collect();
    for item in world.of("Telemetry") {
        for provider in item.spec.get("tracing").items().iter().flat_map(|t| t.get("providers").items()) {
            let name = provider.get("name");
            if old.contains(&name.text()) {
                out.push(item.message(DEPRECATED, &name, "Lightstep is outdated: take OpenTelemetry"));
            }
        }
    }
}
