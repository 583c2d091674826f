//! What is configured and what runs, for people and tools.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use serde::Serialize;
use serde_json::{Value, json};

use super::Admin;
use crate::control::Published;
use crate::drain::Phase;
use crate::snapshot::Snapshot;
use crate::tls::{CertInfo, unix_now};

/// Whose configuration it is. Node metadata is not repeated: it may hold what nobody meant to show.
#[derive(Serialize)]
struct Whose<'a> {
    name: &'a str,
    namespace: &'a str,
    ips: Vec<String>,
    labels: &'a BTreeMap<String, String>,
    service_account: &'a str,
    cluster_id: &'a str,
}

fn whose(published: &Published) -> Whose<'_> {
    let proxy = &*published.proxy;
    Whose {
        name: &proxy.name,
        namespace: &proxy.namespace,
        ips: proxy.ips.iter().map(ToString::to_string).collect(),
        labels: &proxy.labels,
        service_account: &proxy.service_account,
        cluster_id: &proxy.cluster_id,
    }
}

fn addresses(snapshot: &Snapshot) -> impl Iterator<Item = (&str, SocketAddr)> {
    let of = |listener: &'_ std::sync::Arc<crate::snapshot::Listener>| {
        listener.address.iter().chain(&listener.additional).copied().collect::<Vec<_>>()
    };
    snapshot.listeners().iter().flat_map(move |l| of(l).into_iter().map(move |address| (&*l.name, address)))
}

/// `name::address` lines.
pub(super) fn listeners_text(snapshot: &Snapshot) -> String {
    addresses(snapshot).fold(String::new(), |mut out, (name, address)| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{name}::{address}");
        out
    })
}

/// `envoy.admin.v3.Listeners`.
pub(super) fn listeners_json(snapshot: &Snapshot) -> Value {
    let status = |(name, address): (&str, SocketAddr)| {
        let address = json!({ "address": address.ip().to_string(), "port_value": address.port() });
        json!({ "name": name, "local_address": { "socket_address": address } })
    };
    json!({ "listener_statuses": addresses(snapshot).map(status).collect::<Vec<_>>() })
}

/// `envoy.admin.v3.Certificates`, with the SDS name as path.
pub(super) fn certs(snapshot: &Snapshot) -> Value {
    let now = unix_now();
    let secrets = snapshot.secrets();
    let chains =
        secrets.identities().map(|(name, identity)| json!({ "cert_chain": details(name, &identity.info, now) }));
    let roots = secrets.all_roots().map(|(name, roots)| json!({ "ca_cert": details(name, &roots.info, now) }));
    json!({ "certificates": chains.chain(roots).collect::<Vec<_>>() })
}

fn details(name: &str, chain: &[CertInfo], now: i64) -> Vec<Value> {
    let detail = |certificate: &CertInfo| {
        let sans = certificate.sans.iter().map(|san| {
            let kind = if san.contains("://") { "uri" } else { "dns" };
            json!({ kind: san })
        });
        json!({
            "path": name,
            "subject": certificate.subject,
            "serial_number": certificate.serial,
            "subject_alt_names": sans.collect::<Vec<_>>(),
            "days_until_expiration": certificate.days_left(now).to_string(),
            "valid_from": rfc3339(certificate.not_before),
            "expiration_time": rfc3339(certificate.not_after),
        })
    };
    chain.iter().map(detail).collect()
}

pub(super) fn rfc3339(seconds: i64) -> String {
    let time = time::OffsetDateTime::from_unix_timestamp(seconds).ok();
    time.and_then(|t| t.format(&time::format_description::well_known::Rfc3339).ok()).unwrap_or_default()
}

/// `envoy.admin.v3.ServerInfo`, as far as it means something here.
pub(super) fn server_info(admin: &Admin) -> Value {
    let published = admin.now();
    let uptime = SystemTime::now().duration_since(admin.started).unwrap_or_default().as_secs();
    json!({
        "version": format!("istio-proxy/{}", env!("CARGO_PKG_VERSION")),
        "state": state(admin, &published),
        "hot_restart_version": "disabled",
        "uptime_current_epoch": format!("{uptime}s"),
        "uptime_all_epochs": format!("{uptime}s"),
        "command_line_options": { "concurrency": admin.workers.len() },
        "node": whose(&published),
        "config_version": published.version,
    })
}

/// Envoy's word for how the server is.
pub(super) fn state(admin: &Admin, published: &Published) -> &'static str {
    match admin.drain.phase() {
        Phase::Serving if published.version == 0 => "PRE_INITIALIZING",
        Phase::Serving => "LIVE",
        Phase::Lame | Phase::Closing | Phase::Gone => "DRAINING",
    }
}

/// What each worker carries: tells whether connections are spread and loops are on time.
pub(super) fn workers(admin: &Admin) -> Value {
    let worker = |worker: &crate::worker::Handle| {
        let load = worker.load();
        json!({
            "worker": worker.index(),
            "connections": load.active.load(Ordering::Relaxed),
            "connectionsTotal": load.total.load(Ordering::Relaxed),
            "handedOver": load.handed_over.load(Ordering::Relaxed),
            "lagMicros": load.lag_micros.load(Ordering::Relaxed),
        })
    };
    Value::Array(admin.workers.iter().map(worker).collect())
}
