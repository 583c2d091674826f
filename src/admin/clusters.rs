//! `/clusters`: hosts with their health and totals, as text for people and as JSON for istioctl.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proxy_config::model::{ClusterKind, HealthStatus};
use serde_json::{Value, json};

use crate::snapshot::{ClusterShared, Host, Snapshot};

fn health(host: &Host) -> &'static str {
    match host.health {
        HealthStatus::Unknown | HealthStatus::Healthy => "HEALTHY",
        HealthStatus::Unhealthy => "UNHEALTHY",
        HealthStatus::Draining => "DRAINING",
        HealthStatus::Degraded => "DEGRADED",
    }
}

fn ejected(host: &Host) -> bool {
    host.stats.ejection.until.load(Ordering::Relaxed) != 0
}

fn flags(host: &Host) -> String {
    let mut flags = Vec::new();
    if ejected(host) {
        flags.push("/failed_outlier_check");
    }
    match host.health {
        HealthStatus::Unknown | HealthStatus::Healthy => {}
        HealthStatus::Unhealthy => flags.push("/failed_eds_health"),
        HealthStatus::Draining => flags.push("/eds_status_draining"),
        HealthStatus::Degraded => flags.push("/degraded_eds_health"),
    }
    if flags.is_empty() { "healthy".to_owned() } else { flags.concat() }
}

/// A host's numbers under Envoy's names.
fn totals(host: &Host) -> [(&'static str, u64); 7] {
    let totals = &host.stats.totals;
    let requests = totals.requests.load(Ordering::Relaxed);
    let errors = totals.errors.load(Ordering::Relaxed);
    [
        ("cx_active", totals.connections.load(Ordering::Relaxed).into()),
        ("cx_connect_fail", totals.connect_failures.load(Ordering::Relaxed)),
        ("cx_total", totals.connections_total.load(Ordering::Relaxed)),
        ("rq_active", host.stats.active.load(Ordering::Relaxed).into()),
        ("rq_error", errors),
        ("rq_success", requests.saturating_sub(errors)),
        ("rq_total", requests),
    ]
}

fn limits(cluster: &ClusterShared) -> [(&'static str, u32); 4] {
    let breakers = &cluster.breakers;
    [
        ("max_connections", breakers.connections.limit()),
        ("max_pending_requests", breakers.pending.limit()),
        ("max_requests", breakers.requests.limit()),
        ("max_retries", breakers.retries.limit()),
    ]
}

fn eds_name(cluster: &ClusterShared) -> Option<&Arc<str>> {
    match &cluster.config.kind {
        ClusterKind::Eds(name) => Some(name),
        _ => None,
    }
}

fn place(host: &Host) -> String {
    host.pipe.as_deref().map_or_else(|| host.address.to_string(), str::to_owned)
}

/// `cluster::host::field::value` lines.
pub(super) fn text(snapshot: &Snapshot) -> String {
    let mut out = String::new();
    for cluster in snapshot.clusters() {
        let name = &cluster.name;
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(out, "{name}::observability_name::{name}");
        for (limit, value) in limits(cluster) {
            let _ = writeln!(out, "{name}::default_priority::{limit}::{value}");
        }
        let _ = writeln!(out, "{name}::added_via_api::true");
        if let Some(eds) = eds_name(cluster) {
            let _ = writeln!(out, "{name}::eds_service_name::{eds}");
        }
        cluster.hosts.look(|set| set.all.iter().for_each(|host| host_text(name, host, &mut out)));
    }
    out
}

fn host_text(cluster: &str, host: &Host, out: &mut String) {
    let place = place(host);
    for (field, value) in totals(host) {
        let _ = writeln!(out, "{cluster}::{place}::{field}::{value}");
    }
    for (field, value) in [
        ("hostname", host.hostname.to_string()),
        ("health_flags", flags(host)),
        ("weight", host.weight.to_string()),
        ("region", host.locality.region.clone()),
        ("zone", host.locality.zone.clone()),
        ("sub_zone", host.locality.sub_zone.clone()),
        ("priority", host.priority.to_string()),
    ] {
        let _ = writeln!(out, "{cluster}::{place}::{field}::{value}");
    }
}

/// `envoy.admin.v3.Clusters`.
pub(super) fn json(snapshot: &Snapshot) -> Value {
    let statuses: Vec<Value> = snapshot.clusters().map(|cluster| status(cluster)).collect();
    json!({ "cluster_statuses": statuses })
}

fn status(cluster: &ClusterShared) -> Value {
    let threshold: serde_json::Map<String, Value> =
        limits(cluster).into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    let mut out = json!({
        "name": &*cluster.name,
        "observability_name": &*cluster.name,
        "added_via_api": true,
        "circuit_breakers": { "thresholds": [threshold] },
        "host_statuses": cluster.hosts.look(|set| set.all.iter().map(|host| host_status(host)).collect::<Vec<_>>()),
    });
    if let Some(eds) = eds_name(cluster) {
        out["eds_service_name"] = (&**eds).into();
    }
    out
}

fn host_status(host: &Host) -> Value {
    let address = match &host.pipe {
        Some(path) => json!({ "pipe": { "path": path } }),
        None => json!({
            "socket_address": { "address": host.address.ip().to_string(), "port_value": host.address.port() }
        }),
    };
    let stats = totals(host).map(|(name, value)| {
        let kind = if name.ends_with("_active") { "GAUGE" } else { "COUNTER" };
        json!({ "name": name, "type": kind, "value": value.to_string() })
    });
    json!({
        "address": address,
        "stats": stats,
        "health_status": { "eds_health_status": health(host), "failed_outlier_check": ejected(host) },
        "weight": host.weight,
        "hostname": &*host.hostname,
        "priority": host.priority,
        "locality": {
            "region": host.locality.region, "zone": host.locality.zone, "sub_zone": host.locality.sub_zone,
        },
    })
}
