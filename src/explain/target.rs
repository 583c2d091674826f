//! Where a call goes once it is routed: clusters with weights, their hosts, limits.

use std::sync::Arc;
use std::time::Duration;

use proxy_config::model::{Address, ClusterKind};

use super::Asked;
use super::answer::{Answer, Endpoint, Response, Weighted};
use crate::error::Kind;
use crate::snapshot::action::{Action, Forward, RetryPolicy};
use crate::snapshot::{ClusterRef, ClusterShared, Found, Host, HttpChain, RequestView, TcpChain};

/// The clusters of a TCP proxy.
pub(super) fn tcp(asked: &Asked<'_>, tcp: &TcpChain, answer: &mut Answer) {
    timer(answer, "idle limit", tcp.idle_timeout);
    timer(answer, "longest connection", tcp.max_duration);
    clusters(asked, tcp.clusters.iter(), answer);
}

/// What a route does.
pub(super) fn route(
    asked: &Asked<'_>,
    found: &Found<'_>,
    request: &RequestView<'_>,
    http: &HttpChain,
    answer: &mut Answer,
) {
    if let Some(name) = &found.route.unsupported {
        unsupported(name, answer);
    }
    match &found.route.action {
        Action::Forward(forward) => {
            timers(forward, http, answer);
            clusters(asked, forward.clusters.iter().map(|w| (&w.cluster, u64::from(w.weight))), answer);
        }
        Action::Redirect(redirect) => {
            let location = redirect.location(request, found.route.matched(request.path));
            respond(answer, redirect.status(), "direct_response", Some(location));
        }
        Action::Direct { status, .. } => respond(answer, *status, "direct_response", None),
        Action::Unsupported(name) => unsupported(name, answer),
    }
}

fn unsupported(name: &str, answer: &mut Answer) {
    answer.notes.push(format!("the route asks for {name}, which is not supported"));
    answer.response.get_or_insert_with(|| super::local(Kind::UnsupportedConfig));
}

fn respond(answer: &mut Answer, status: u16, details: &str, location: Option<String>) {
    // A policy that refuses comes first.
    answer.response.get_or_insert_with(|| Response {
        status,
        flags: "-".to_owned(),
        details: details.to_owned(),
        location,
    });
}

fn clusters<'a>(asked: &Asked<'_>, all: impl Iterator<Item = (&'a ClusterRef, u64)>, answer: &mut Answer) {
    let all: Vec<(&ClusterRef, u64)> = all.collect();
    if let [(only, _)] = &all[..] {
        answer.cluster = Some(only.name.to_string());
    }
    for (cluster, weight) in all {
        answer.clusters.push(Weighted { name: cluster.name.to_string(), weight });
        hosts(asked, cluster, answer);
    }
}

fn hosts(asked: &Asked<'_>, cluster: &ClusterRef, answer: &mut Answer) {
    let Some(id) = asked.snapshot.resolve(cluster) else {
        answer.notes.push(format!("cluster {} is not there", cluster.name));
        answer.response.get_or_insert_with(|| super::local(Kind::NoCluster));
        return;
    };
    let shared = asked.snapshot.cluster(id);
    timer(answer, "connect limit", shared.config.connect_timeout);
    if matches!(shared.config.kind, ClusterKind::OriginalDst) {
        answer.notes.push(format!("{}: to the original destination, {}", cluster.name, asked.call.destination()));
        return;
    }
    shared.hosts.look(|set| listed(&set.all, shared, answer));
}

fn listed(all: &[Arc<Host>], shared: &ClusterShared, answer: &mut Answer) {
    if all.is_empty() {
        answer.notes.push(nobody(&shared.name, &shared.config.kind));
    }
    for host in all {
        let locality = &host.locality;
        let parts = [&*locality.region, &locality.zone, &locality.sub_zone];
        answer.endpoints.push(Endpoint {
            cluster: shared.name.to_string(),
            address: host.pipe.as_deref().map_or_else(|| host.address.to_string(), str::to_owned),
            weight: host.weight,
            priority: host.priority,
            locality: parts.join("/").trim_end_matches('/').to_owned(),
            health: format!("{:?}", host.health).to_lowercase(),
            transport: format!("{:?}", shared.transport(host)),
        });
    }
}

/// Why there is no host to list.
fn nobody(cluster: &str, kind: &ClusterKind) -> String {
    let (ClusterKind::StrictDns(inline) | ClusterKind::LogicalDns(inline)) = kind else {
        return format!("cluster {cluster} has no endpoint");
    };
    let endpoints = inline.localities.iter().flat_map(|l| &l.endpoints);
    let names: Vec<String> = endpoints
        .filter_map(|e| match &e.address {
            Address::Host(name, port) => Some(format!("{name}:{port}")),
            _ => None,
        })
        .collect();
    format!("cluster {cluster}: a running proxy asks DNS for {}", names.join(", "))
}

fn timers(forward: &Forward, http: &HttpChain, answer: &mut Answer) {
    timer(answer, "route timeout", forward.timeout);
    timer(answer, "stream idle limit", forward.idle_timeout.unwrap_or(http.options.stream_idle_timeout));
    timer(answer, "longest stream", forward.max_stream_duration.unwrap_or(http.options.max_stream_duration));
    timer(answer, "request limit", http.options.request_timeout);
    if let Some(retry) = &forward.retry {
        answer.timers.insert("retries".to_owned(), retries(retry));
    }
}

fn retries(retry: &RetryPolicy) -> String {
    let per_try = retry.per_try_timeout.map(|limit| format!(", {limit:?} each")).unwrap_or_default();
    format!("{} on {}{per_try}", retry.retries, retry.on)
}

fn timer(answer: &mut Answer, name: &str, limit: Option<Duration>) {
    if let Some(limit) = limit {
        answer.timers.insert(name.to_owned(), format!("{limit:?}"));
    }
}
