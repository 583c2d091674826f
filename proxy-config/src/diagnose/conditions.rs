//! Status conditions that say no.

use super::{Message, World};
use crate::validate::At;

const NEGATIVE: &str = "IST0171";

/// Kinds with the conditions that must not be False, and where their conditions stand.
const KINDS: [(&str, &[&str], &str); 7] = [
    ("Service", &["istio.io/WaypointBound"], "status"),
    ("ServiceEntry", &["istio.io/WaypointBound"], "status"),
    ("WorkloadEntry", &["istio.io/WaypointBound"], "status"),
    ("AuthorizationPolicy", &["ZtunnelAccepted", "WaypointAccepted"], "status"),
    ("Gateway", &["Accepted", "Programmed", "ResolvedRefs"], "status"),
    ("HTTPRoute", &["Accepted", "Programmed", "ResolvedRefs"], "status.parents"),
    ("GRPCRoute", &["Accepted", "Programmed", "ResolvedRefs"], "status.parents"),
];

/// One message a condition.
pub(super) fn check(world: &World<'_>, out: &mut Vec<Message>) {
    for (kind, watched, at) in KINDS {
        for item in world.of(kind) {
            let holder = item.root.at(at);
            let holders = if at.ends_with("parents") { holder.items() } else { vec![holder] };
            for condition in holders.iter().flat_map(|h| h.get("conditions").items()) {
                if negative(kind, watched, &condition) {
                    let (name, why) = (condition.get("type").text(), condition.get("reason").text());
                    let text = condition.get("message").text();
                    out.push(item.message(NEGATIVE, &condition, format!("{name} is not so: {why}: {text}")));
                }
            }
        }
    }
}

fn negative(kind: &str, watched: &[&str], condition: &At<'_>) -> bool {
    let (name, status) = (condition.get("type").text(), condition.get("status").text());
    let partly = condition.get("reason").text() == "PartiallyInvalid";
    (watched.contains(&name) && status == "False")
        || (kind == "AuthorizationPolicy" && name == "WaypointAccepted" && partly)
}
