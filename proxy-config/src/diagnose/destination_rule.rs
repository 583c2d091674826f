//! DestinationRules: servers that nobody verifies, subsets that select nothing.

use std::collections::BTreeMap;

use super::destinations::{Hosts, find};
use super::{Item, Message, World};
use crate::validate::At;

const UNVERIFIED: &str = "IST0128";
const UNVERIFIED_PORT: &str = "IST0129";
const EMPTY_SUBSET: &str = "IST0173";
const UNKNOWN_HOST: &str = "IST0174";

/// TLS without a root to verify the server with.
pub(super) fn unverified(world: &World<'_>, out: &mut Vec<Message>) {
    for item in world.of("DestinationRule") {
        let policy = item.spec.get("trafficPolicy");
        let selects = item.spec.get("workloadSelector").is_said();
        let ports = policy.get("portLevelSettings").items();
        let levels = std::iter::once((UNVERIFIED, policy)).chain(ports.into_iter().map(|p| (UNVERIFIED_PORT, p)));
        for (code, level) in levels {
            let tls = level.get("tls");
            let verifies = tls.get("caCertificates").has_text() || (tls.get("credentialName").has_text() && selects);
            if matches!(tls.get("mode").text(), "SIMPLE" | "MUTUAL") && !verifies {
                out.push(item.message(
                    code,
                    &tls,
                    "caCertificates are not said: the server's are verified by the system's",
                ));
            }
        }
    }
}

/// Hosts that nobody has, and subsets that no Pod is of.
pub(super) fn subsets(world: &World<'_>, out: &mut Vec<Message>) {
    let hosts = Hosts::new(world);
    let pods: Vec<BTreeMap<&str, &str>> = world.of("Pod").iter().map(|p| pod_labels(world, p)).collect();
    for item in world.of("DestinationRule") {
        let host = item.spec.get("host");
        let export = item.spec.get("exportTo").texts();
        let Some(service) = find(&hosts, item.namespace(), &export, host.text()) else {
            let reason = format!("no Service or ServiceEntry has the host {:?}", host.text());
            out.push(item.message(UNKNOWN_HOST, &host, reason));
            continue;
        };
        for subset in item.spec.get("subsets").items() {
            let wanted = |at: &At<'_>| {
                at.entries().iter().map(|(k, v)| ((*k).to_owned(), v.text().to_owned())).collect::<Vec<_>>()
            };
            let mut selector = wanted(&service.selector);
            selector.extend(wanted(&subset.get("labels")));
            let selected =
                |pod: &BTreeMap<&str, &str>| selector.iter().all(|(k, v)| pod.get(k.as_str()).is_some_and(|w| w == v));
            if !pods.iter().any(selected) {
                let reason = format!("subset {:?} selects no Pod: calls to it get 503", subset.get("name").text());
                out.push(item.message(EMPTY_SUBSET, &subset.get("labels"), reason).unsure());
            }
        }
    }
}

/// Labels of a Pod with those of the place that it runs at.
fn pod_labels<'d>(world: &World<'d>, pod: &Item<'d>) -> BTreeMap<&'d str, &'d str> {
    let mut out: BTreeMap<&str, &str> = pod.labels().entries().iter().map(|(k, v)| (*k, v.text())).collect();
    let node = pod.spec.get("nodeName").text();
    if node.is_empty() {
        return out;
    }
    out.insert("kubernetes.io/hostname", node);
    for item in world.of("Node").iter().filter(|n| n.name() == node) {
        for label in ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"] {
            if !item.label(label).is_empty() {
                out.insert(label, item.label(label));
            }
        }
    }
    out
}
