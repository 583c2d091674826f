//! Requests and responses in the shapes that [`super::Ads`] thinks in.

use std::collections::BTreeSet;

use bytes::Bytes;
use proxy_config::xds::Any;
use proxy_config::{Name, Reject};

use super::ads::Health;
use super::kind::{HEALTH, Kind};
use super::messages::{DeltaDiscoveryRequest, DiscoveryRequest, Request, Response, Status};
use super::store::name_of;

/// istiod takes requests of 4 MiB at most; what is longer goes in parts.
const MAX_REQUEST: usize = 3 << 20;
/// gRPC's "internal", in refusals and reports of ill health.
const INTERNAL: i32 = 13;

/// The resources of a response in one shape.
pub(super) struct Batch {
    pub(super) version: String,
    pub(super) nonce: String,
    pub(super) resources: Vec<(Result<Name, Reject>, Any)>,
    pub(super) removed: Vec<Name>,
    /// What is not in it is gone.
    pub(super) complete: bool,
}

impl Batch {
    /// `complete` counts on delta streams; a state-of-the-world response is complete where the type is a wildcard.
    pub(super) fn of(kind: Kind, response: Response, complete: bool) -> Self {
        match response {
            Response::Delta(response) => Self {
                version: response.system_version_info,
                nonce: response.nonce,
                resources: (response.resources.into_iter())
                    .map(|r| (Ok(Name::from(r.name)), r.resource.unwrap_or_default()))
                    .collect(),
                removed: response.removed_resources.into_iter().map(Name::from).collect(),
                complete,
            },
            Response::Sotw(response) => Self {
                version: response.version_info,
                nonce: response.nonce,
                resources: response.resources.into_iter().map(|any| (name_of(kind, &any.value), any)).collect(),
                removed: Vec::new(),
                complete: kind.is_wildcard(),
            },
        }
    }
}

/// The first delta requests of a type: what is wanted, and what is there already. `true`: the second list did not fit, so
/// that only a complete answer tells what is gone.
pub(super) fn opening(kind: Kind, node: Option<Bytes>, add: &BTreeSet<Name>, held: &[Name]) -> (Vec<Request>, bool) {
    let mut parts = parts(add).into_iter();
    let subscribe = parts.next().unwrap_or_default();
    let size = |names: &mut dyn Iterator<Item = usize>| names.map(|length| length + 8).sum::<usize>();
    let fits = size(&mut subscribe.iter().map(String::len)) + size(&mut held.iter().map(|n| n.len())) <= MAX_REQUEST;
    let held = if fits { held } else { &[] };
    let first = Request::Delta(DeltaDiscoveryRequest {
        node,
        type_url: kind.url().to_owned(),
        resource_names_subscribe: subscribe,
        initial_resource_versions: held.iter().map(|name| (name.to_string(), String::new())).collect(),
        ..Default::default()
    });
    let more = parts.map(|names| subscription(kind, names, Vec::new()));
    (std::iter::once(first).chain(more).collect(), !fits)
}

/// Delta requests for a change of what is wanted.
pub(super) fn changes(kind: Kind, add: &BTreeSet<Name>, remove: &BTreeSet<Name>) -> Vec<Request> {
    let remove = parts(remove).into_iter().map(|names| subscription(kind, Vec::new(), names));
    remove.chain(parts(add).into_iter().map(|names| subscription(kind, names, Vec::new()))).collect()
}

fn subscription(kind: Kind, subscribe: Vec<String>, unsubscribe: Vec<String>) -> Request {
    Request::Delta(DeltaDiscoveryRequest {
        type_url: kind.url().to_owned(),
        resource_names_subscribe: subscribe,
        resource_names_unsubscribe: unsubscribe,
        ..Default::default()
    })
}

/// The report of the application's health.
pub(super) fn report(health: &Health, delta: bool) -> Request {
    let error_detail = (!health.healthy).then(|| Status { code: INTERNAL, message: health.message.clone() });
    let type_url = HEALTH.to_owned();
    if delta {
        Request::Delta(DeltaDiscoveryRequest { type_url, error_detail, ..Default::default() })
    } else {
        Request::Sotw(DiscoveryRequest { type_url, error_detail, ..Default::default() })
    }
}

/// The first line says which kind, then each resource with its field and what was expected there.
pub(super) fn refusal(kind: Kind, refused: &[Reject]) -> Option<Status> {
    if refused.is_empty() {
        return None;
    }
    let lines: Vec<String> = refused.iter().map(ToString::to_string).collect();
    Some(Status { code: INTERNAL, message: format!("{} {}", kind.refusal(), lines.join("\n")) })
}

pub(super) fn texts(names: &BTreeSet<Name>) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

/// Names in lists that fit into a request.
fn parts(names: &BTreeSet<Name>) -> Vec<Vec<String>> {
    let mut out: Vec<Vec<String>> = Vec::new();
    let mut room = 0;
    for name in names {
        let needed = name.len() + 8;
        if out.is_empty() || room < needed {
            out.push(Vec::new());
            room = MAX_REQUEST / 2;
        }
        room = room.saturating_sub(needed);
        out.last_mut().expect("one was pushed").push(name.to_string());
    }
    out
}
