//! Counting and logging for the whole process: who we are in labels, what is written where, what is not served as said.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use proxy_config::Severity;
use proxy_config::compile::settings::TEXT_FORMAT;
use proxy_config::istio::common::parse_duration;
use proxy_config::registry::Proxy;
use tokio::time::Instant;

use crate::control::Published;
use crate::telemetry::{LogOptions, Logs, NodeLabels, Telemetry};

/// Series are not looked through more often.
const SHORTEST_LOOK: Duration = Duration::from_millis(100);

/// Counters, with every panic among them.
pub(super) fn telemetry(proxy: &Proxy) -> Arc<Telemetry> {
    let telemetry = Telemetry::new(labels(proxy));
    telemetry.process.install();
    let process = telemetry.process.clone();
    let print = std::panic::take_hook();
    // A panic costs one task. It must not go unseen.
    std::panic::set_hook(Box::new(move |info| {
        process.panicked();
        print(info);
    }));
    telemetry
}

/// Forgets series that nobody counted in for as long as the pod's annotation says; for ever, when it says nothing.
pub(super) fn forget_unused(proxy: &Proxy, telemetry: &Arc<Telemetry>) {
    let annotations = proxy.metadata.get("ANNOTATIONS");
    let said = annotations.and_then(|all| all.get("sidecar.istio.io/statsEvictionInterval")?.as_str());
    let Some(interval) = said.and_then(parse_duration).filter(|interval| !interval.is_zero()) else { return };
    let telemetry = Arc::clone(telemetry);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval((interval / 2).max(SHORTEST_LOOK));
        loop {
            ticks.tick().await;
            telemetry.forget(interval, Instant::now());
        }
    });
}

/// Access logs. Without a control plane (`alone`) the text log is on, as Istio's default configuration has it; a record
/// on standard output has standard output for itself.
pub(super) fn logs(record: Option<&Path>, alone: bool, telemetry: &Arc<Telemetry>) -> Result<Logs> {
    let record = record.map(|path| path.to_string_lossy().into_owned());
    let default_text = (alone && record.as_deref() != Some("-")).then(|| TEXT_FORMAT.to_owned());
    Logs::start(LogOptions { record, default_text }, telemetry).context("--access-log")
}

fn labels(proxy: &Proxy) -> NodeLabels {
    let metadata = |key: &str| proxy.metadata.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
    let label = |key: &str| proxy.labels.get(key).cloned().unwrap_or_default();
    NodeLabels {
        workload: Some(metadata("WORKLOAD_NAME")).filter(|name| !name.is_empty()).unwrap_or_else(|| proxy.name.clone()),
        namespace: proxy.namespace.clone(),
        canonical_service: label("service.istio.io/canonical-name"),
        canonical_revision: label("service.istio.io/canonical-revision"),
        app: label("app"),
        version: label("version"),
        cluster: proxy.cluster_id.clone(),
        istio_version: metadata("ISTIO_VERSION"),
        id: super::host::id(proxy),
        metadata: serde_json::Value::Object(proxy.metadata.clone()),
    }
}

/// Puts a publication into the metrics.
pub(super) fn published(news: &Published, telemetry: &Telemetry) {
    telemetry.process.published(news.version, news.kept.is_some());
    let mut rejected = BTreeMap::new();
    for reject in news.rejects.iter().filter(|reject| reject.severity != Severity::Warning) {
        count(&reject.resource, &mut rejected);
    }
    let mut unsupported = BTreeMap::new();
    news.model.inert.iter().for_each(|what| count(what, &mut unsupported));
    telemetry.process.unserved(&unsupported, &rejected);
    telemetry.retain_clusters(|name| news.snapshot.cluster_id(name).is_some());
}

/// `AuthorizationPolicy ns/name` counts as `AuthorizationPolicy`: names would make the metric grow without end.
fn count(what: &str, by_kind: &mut BTreeMap<String, u64>) {
    let kind = what.split([' ', '.']).next().unwrap_or_default();
    *by_kind.entry(kind.to_owned()).or_default() += 1;
}
