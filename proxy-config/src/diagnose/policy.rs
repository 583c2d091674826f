//! Policies that select nothing, name nothing, or are not heard.

use super::{Item, Message, World, selects};
use crate::validate::At;

const MISSING: &str = "IST0101";
const NO_WORKLOAD: &str = "IST0127";
const INEFFECTIVE: &str = "IST0166";
const UNRESTRICTED: &str = "IST0175";

/// AuthorizationPolicies without workloads, and namespaces in them that are not there.
pub(super) fn authorization(world: &World<'_>, out: &mut Vec<Message>) {
    for item in world.of("AuthorizationPolicy") {
        let selector = item.spec.get("selector");
        let labels = selector.get("matchLabels");
        let pods = world.of("Pod").iter().filter(|p| in_mesh(world, p)).map(|p| (p.namespace(), p.labels()));
        let mut workloads = pods.chain(world.machines());
        let everywhere = item.namespace() == world.root_namespace();
        let selected = (everywhere && !selector.is_said())
            || workloads.any(|(namespace, of)| (everywhere || namespace == item.namespace()) && selects(&labels, &of));
        if !selected {
            out.push(item.message(NO_WORKLOAD, &selector, "no workload of the mesh is selected").unsure());
        }
        namespaces(world, item, out);
    }
}

fn namespaces(world: &World<'_>, item: &Item<'_>, out: &mut Vec<Message>) {
    let sources = item.spec.get("rules").items().into_iter().flat_map(|r| r.get("from").items());
    for source in sources.map(|f| f.get("source")) {
        for name in ["namespaces", "notNamespaces"].iter().flat_map(|f| source.get(f).items()) {
            if !world.of("Namespace").iter().any(|n| matches(n.name(), name.text())) {
                let reason = format!("no Namespace {:?} is among the objects", name.text());
                out.push(item.message(MISSING, &name, reason).unsure());
            }
        }
    }
}

/// A name, its beginning or its end.
fn matches(name: &str, pattern: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => name.ends_with(end),
        (None, Some(start)) => name.starts_with(start),
        (None, None) => name.eq_ignore_ascii_case(pattern),
    }
}

/// Whether a Pod has a sidecar, will get one, or is served by its node.
pub(super) fn in_mesh(world: &World<'_>, pod: &Item<'_>) -> bool {
    const INJECT: &str = "sidecar.istio.io/inject";
    if pod.annotation("ambient.istio.io/redirection") == "enabled" {
        return true;
    }
    let lists = ["containers", "initContainers"].iter().flat_map(|f| pod.spec.get(f).items());
    let proxy = lists.into_iter().find(|c| c.get("name").text() == "istio-proxy");
    if proxy.is_some_and(|c| c.get("image").has_text()) {
        return true;
    }
    let said = [pod.label(INJECT), pod.annotation(INJECT)].into_iter().find(|v| !v.is_empty());
    if let Some(said) = said {
        return said == "true";
    }
    let own = world.of("Namespace").iter().find(|n| n.name() == pod.namespace());
    own.is_some_and(|n| n.label("istio-injection") == "enabled")
}

/// Selectors of policies that pick a gateway of the Kubernetes API, which hears `targetRef` only.
pub(super) fn gateway_selectors(world: &World<'_>, out: &mut Vec<Message>) {
    const GATEWAY: &str = "gateway.networking.k8s.io/gateway-name";
    let pods: Vec<&Item<'_>> = world.of("Pod").iter().filter(|p| !p.label(GATEWAY).is_empty()).collect();
    for kind in ["AuthorizationPolicy", "RequestAuthentication", "Telemetry", "WasmPlugin"] {
        for item in world.of(kind) {
            let selector = item.spec.get("selector");
            if item.spec.get("targetRef").is_said() || !selector.is_said() {
                continue;
            }
            let labels: At<'_> = selector.get("matchLabels");
            for pod in pods.iter().filter(|p| p.namespace() == item.namespace() && selects(&labels, &p.labels())) {
                let reason = format!("Gateway {:?} does not hear selectors: say targetRef", pod.label(GATEWAY));
                out.push(item.message(INEFFECTIVE, &selector, reason));
            }
        }
    }
}

/// An istiod that fetches keys from wherever a RequestAuthentication says.
pub(super) fn unrestricted_key_fetches(world: &World<'_>, out: &mut Vec<Message>) {
    let count = world.of("RequestAuthentication").len();
    if count == 0 {
        return;
    }
    for item in world.of("Deployment").iter().filter(|d| d.label("app") == "istiod") {
        let containers = item.spec.at("template.spec.containers");
        let variables = containers.items().into_iter().flat_map(|c| c.get("env").items());
        let restricted = |v: At<'_>| v.get("name").text() == "BLOCKED_CIDRS_IN_JWKS_URIS" && v.get("value").has_text();
        if !variables.into_iter().any(restricted) {
            let reason = format!("{count} RequestAuthentications may make it fetch keys from anywhere");
            out.push(item.message(UNRESTRICTED, &containers, reason));
        }
    }
}
