//! What Istio has taken back.

use super::{Message, World};

const DEPRECATED: &str = "IST0002";

/// Fields and kinds that are outdated.
pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    for item in world.of("VirtualService") {
        for route in item.spec.get("http").items() {
            let percent = route.at("fault.delay.percent");
            if percent.whole_or_zero() > 0 {
                out.push(item.message(DEPRECATED, &percent, "the field is outdated: say percentage"));
            }
        }
    }
    for item in world.of("Sidecar") {
        let proxy = item.spec.at("outboundTrafficPolicy.egressProxy");
        if proxy.is_said() {
            out.push(item.message(DEPRECATED, &proxy, "the field is outdated: istiod ignores it"));
        }
    }
    for item in world.of("CustomResourceDefinition") {
        let kind = item.spec.at("names.kind");
        let old = ["ClusterRbacConfig", "RbacConfig", "ServiceRole", "ServiceRoleBinding"];
        if item.spec.get("group").text() == "rbac.istio.io" && old.contains(&kind.text()) {
            out.push(item.message(DEPRECATED, &kind, "Istio has no such kind any more"));
        }
    }
}
