//! `/stats` in its three shapes: what workers counted, and what can be read off the configuration and its atomics.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use crate::drain::Phase;
use crate::snapshot::{ClusterShared, Gauge, Host};
use crate::telemetry::{self, Sample, StatsQuery, Value};
use crate::tls::{Identity, unix_now};

use super::Admin;

/// Every number under Envoy's names.
pub(super) fn samples(admin: &Admin) -> Vec<Sample> {
    let mut out = admin.telemetry.samples();
    out.extend(admin.telemetry.process.samples());
    server(admin, &mut out);
    for cluster in admin.now().snapshot.clusters() {
        of_cluster(cluster, &mut out);
    }
    out
}

/// Istio's families first, then Envoy's.
pub(super) fn prometheus(admin: &Admin, query: &StatsQuery) -> String {
    let mut out = String::new();
    admin.telemetry.istio_families(&mut out);
    let tag = &admin.telemetry.node().istio_version;
    let tag = if tag.is_empty() { env!("CARGO_PKG_VERSION") } else { tag };
    let labels = format!("component=\"proxy\",tag=\"{tag}\"");
    let mut all = samples(admin);
    all.push(Sample { instance: labels.into(), ..Sample::gauge("", "istio_build", 1) });
    telemetry::render_prometheus(&all, query, &mut out);
    out
}

fn server(admin: &Admin, out: &mut Vec<Sample>) {
    let published = admin.now();
    let leaving = admin.drain.phase() > Phase::Serving;
    // Envoy's enum: LIVE, DRAINING, PRE_INITIALIZING.
    let state = match (leaving, published.version) {
        (true, _) => 1,
        (false, 0) => 2,
        (false, _) => 0,
    };
    let uptime = SystemTime::now().duration_since(admin.started).unwrap_or_default().as_secs();
    let active: usize = admin.workers.iter().map(|w| w.load().active.load(Ordering::Relaxed)).sum();
    let taken: u64 = admin.workers.iter().map(|w| w.load().total.load(Ordering::Relaxed)).sum();
    out.extend([
        Sample::gauge("server", "state", state),
        Sample::gauge("server", "live", i64::from(!leaving)),
        Sample::gauge("server", "uptime", signed(uptime)),
        Sample::gauge("server", "concurrency", signed(admin.workers.len() as u64)),
        Sample::gauge("server", "total_connections", signed(active as u64)),
        Sample::counter("server", "connections_taken", taken),
        Sample::gauge("listener_manager", "workers_started", i64::from(!admin.workers.is_empty())),
        Sample::gauge(
            "listener_manager",
            "total_listeners_active",
            signed(published.snapshot.listeners().len() as u64),
        ),
        Sample::gauge("cluster_manager", "active_clusters", signed(published.snapshot.cluster_count() as u64)),
        // Whoever waits for the first configuration asks for these two.
        Sample::counter("cluster_manager", "cds.update_success", published.version),
        Sample::counter("listener_manager", "lds.update_success", published.version),
    ]);
    let now = unix_now();
    let days = published.snapshot.secrets().identities().flat_map(|(_, identity)| &identity.info);
    if let Some(days) = days.map(|certificate| certificate.days_left(now)).min() {
        out.push(Sample::gauge("server", "days_until_first_cert_expiring", signed(days)));
    }
    out.extend(published.snapshot.secrets().identities().filter_map(|(name, identity)| expiry(name, identity, now)));
}

/// What is left of a certificate chain, in seconds, negative when it has expired; under the agent's name for it.
fn expiry(name: &str, identity: &Identity, now: i64) -> Option<Sample> {
    let until = identity.info.iter().map(|certificate| certificate.not_after).min()?;
    let name = name.replace('\\', "\\\\").replace('"', "\\\"");
    let labels = format!("resource_name=\"{name}\"");
    Some(Sample { instance: labels.into(), ..Sample::gauge("", "istio_agent_cert_expiry_seconds", until - now) })
}

fn of_cluster(cluster: &Arc<ClusterShared>, out: &mut Vec<Sample>) {
    let mut gauge = |name: &'static str, value: u64| {
        let value = Value::Gauge(signed(value));
        out.push(Sample { scope: "cluster", instance: Arc::clone(&cluster.name), name: name.into(), value });
    };
    let usable = |host: &&Arc<Host>| host.is_eligible() && host.stats.ejection.until.load(Ordering::Relaxed) == 0;
    let (total, healthy) = cluster.hosts.look(|set| (set.all.len(), set.all.iter().filter(usable).count()));
    gauge("membership_total", total as u64);
    gauge("membership_healthy", healthy as u64);
    gauge("outlier_detection.ejections_active", cluster.breakers.ejected.load(Ordering::Relaxed).into());
    let open = |gauge: &Gauge| u64::from(gauge.used() >= gauge.limit());
    let left = |gauge: &Gauge| gauge.limit().saturating_sub(gauge.used()).into();
    let breakers = &cluster.breakers;
    gauge("circuit_breakers.default.cx_open", open(&breakers.connections));
    gauge("circuit_breakers.default.rq_pending_open", open(&breakers.pending));
    gauge("circuit_breakers.default.rq_open", open(&breakers.requests));
    gauge("circuit_breakers.default.rq_retry_open", open(&breakers.retries));
    gauge("circuit_breakers.default.remaining_cx", left(&breakers.connections));
    gauge("circuit_breakers.default.remaining_pending", left(&breakers.pending));
    gauge("circuit_breakers.default.remaining_rq", left(&breakers.requests));
    gauge("circuit_breakers.default.remaining_retries", left(&breakers.retries));
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_certificate_is_told_in_seconds_and_below_zero_when_it_is_over() {
        let (root, _) = crate::ca::Root::generate("test").unwrap();
        let hour = std::time::Duration::from_secs(3600);
        let (chain, key) = root.sign(&"spiffe://td/ns/a/sa/b".parse().unwrap(), hour).unwrap();
        let identity = Identity::from_pem(chain.as_bytes(), key.as_bytes()).unwrap();
        let end = identity.info[0].not_after;
        for left in [60, -1] {
            let sample = expiry("file-cert:a\"b", &identity, end - left).unwrap();
            assert_eq!(sample.value, Value::Gauge(left));
            let name = "istio_agent_cert_expiry_seconds{resource_name=\"file-cert:a\\\"b\"}";
            assert_eq!(sample.text_name(), name);
        }
    }
}
