//! What is told of a proxy's traffic, in each direction: Telemetry objects over mesh defaults over the mesh's own fields.
//!
//! Three levels, each the oldest object of its kind: the root namespace's without selector, the own namespace's without
//! selector, the own namespace's with a selector that fits. A later level overrides an earlier one section by section.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::view::Told;
use super::{telemetry_logs, telemetry_tracing};
use crate::istio::mesh_config::{ExtensionProvider, MeshConfig};
use crate::istio::proxy_config::ProxyConfig;
use crate::istio::telemetry::{Metric, Metrics, Mode, Operation, Provider, Telemetry};
use crate::model::{IstioStats, Reject, Severity};
use crate::registry::Proxy;

/// A Telemetry with its name.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Namespace of the object.
    pub namespace: &'a str,
    /// Name of the object.
    pub name: &'a str,
    /// What it says.
    pub spec: &'a Telemetry,
}

/// What decides beside the objects.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The mesh.
    pub mesh: &'a MeshConfig,
    /// The proxy's own configuration.
    pub config: &'a ProxyConfig,
    /// The proxy.
    pub proxy: &'a Proxy,
    /// Namespace of mesh-wide objects.
    pub root: &'a str,
    /// Whether a service exists: host, and namespace when said.
    pub knows: &'a dyn Fn(&str, Option<&str>) -> bool,
}

/// Both directions, and whether nothing was said about metrics at all.
pub struct Both {
    /// Towards the application.
    pub inbound: Told,
    /// From the application.
    pub outbound: Told,
    /// Nobody speaks of metrics.
    pub default_metrics: bool,
}

/// Compiles what holds for the proxy. `sources` are sorted, oldest first.
pub fn compile(sources: &[Source<'_>], context: Context<'_>, rejects: &mut Vec<Reject>) -> Both {
    let levels = levels(sources, context);
    let mut side = |inbound: bool| {
        let mut out = Told::default();
        telemetry_logs::fill(&levels, context, inbound, rejects, &mut out);
        telemetry_tracing::fill(&levels, context, inbound, rejects, &mut out);
        out.stats = stats(&levels, context, inbound);
        out
    };
    let (inbound, outbound) = (side(true), side(false));
    let said = levels.iter().any(|level| !level.spec.metrics.is_empty());
    let default_metrics = !said && default_providers(context.mesh, "metrics").is_empty();
    dedup(rejects);
    Both { inbound, outbound, default_metrics }
}

/// Both directions find the same faults.
fn dedup(rejects: &mut Vec<Reject>) {
    let mut kept: Vec<Reject> = Vec::with_capacity(rejects.len());
    for reject in rejects.drain(..) {
        if !kept.contains(&reject) {
            kept.push(reject);
        }
    }
    *rejects = kept;
}

fn levels<'a>(sources: &[Source<'a>], context: Context<'_>) -> Vec<Source<'a>> {
    let of_sidecars = || sources.iter().filter(|s| s.spec.target_ref.is_none() && s.spec.target_refs.is_empty());
    let selects_some = |s: &Source<'_>| s.spec.selector.as_ref().is_some_and(|s| !s.match_labels.is_empty());
    let own = context.proxy.namespace.as_str();
    let whole = |namespace: &str| of_sidecars().find(|s| s.namespace == namespace && !selects_some(s));
    let fits = |s: &&Source<'_>| {
        let selector = s.spec.selector.as_ref();
        s.namespace == own && selects_some(s) && selector.is_some_and(|s| s.selects(&context.proxy.labels))
    };
    let root = whole(context.root);
    let namespace = if own == context.root { None } else { whole(own) };
    [root, namespace, of_sidecars().find(fits)].into_iter().flatten().copied().collect()
}

/// Providers that are used where none is named.
pub(super) fn default_providers(mesh: &MeshConfig, of: &str) -> Vec<String> {
    let list = mesh.default_providers.as_ref().and_then(|p| p.get(of)).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

pub(super) fn names(providers: &[Provider]) -> Vec<String> {
    providers.iter().map(|provider| provider.name.clone()).collect()
}

/// A provider by its name: the mesh's, else one that is always there.
pub(super) fn provider(mesh: &MeshConfig, name: &str) -> Option<ExtensionProvider> {
    let said = mesh.extension_providers.iter().find(|provider| provider.name == name).cloned();
    said.or_else(|| {
        let (kind, settings) = match name {
            "prometheus" => ("prometheus", json!({})),
            "envoy" => ("envoyFileAccessLog", json!({"path": "/dev/stdout"})),
            _ => return None,
        };
        Some(ExtensionProvider { name: name.to_owned(), kind: BTreeMap::from([(kind.to_owned(), settings)]) })
    })
}

/// The cluster of `service: [namespace/]host` and `port`, and the host; `None`: there is no such service.
pub(super) fn collector(settings: &Value, context: Context<'_>) -> Option<(String, String)> {
    let port = settings["port"].as_u64()?;
    let service = settings["service"].as_str()?;
    let (namespace, host) = match service.split_once('/') {
        Some((namespace, host)) => (Some(namespace), host),
        None => (None, service),
    };
    (context.knows)(host, namespace).then(|| (format!("outbound|{port}||{host}"), host.to_owned()))
}

/// Says that a provider cannot be used.
pub(super) fn refuse(name: &str, reason: &str, rejects: &mut Vec<Reject>) {
    rejects.push(Reject {
        resource: "MeshConfig".to_owned(),
        place: None,
        field: format!("extensionProviders[{name}]"),
        reason: reason.to_owned(),
        severity: Severity::Error,
        code: None,
    });
}

/// What is said about one metric.
#[derive(Default)]
struct Change {
    disabled: Option<bool>,
    /// Expression, or `None` for a label that goes.
    tags: BTreeMap<String, Option<String>>,
}

/// The metrics filter; `None`: none is wanted.
fn stats(levels: &[Source<'_>], context: Context<'_>, inbound: bool) -> Option<IstioStats> {
    let said: Vec<&Metrics> = levels.iter().flat_map(|level| &level.spec.metrics).collect();
    let mut providers = default_providers(context.mesh, "metrics");
    if providers.is_empty() && !said.is_empty() {
        // A mesh without defaults has its metrics all the same: so does every installation of Istio.
        providers.push("prometheus".to_owned());
    }
    let mut changes: BTreeMap<String, BTreeMap<String, Change>> = BTreeMap::new();
    let mut interval = None;
    if said.is_empty() {
        changes.extend(providers.iter().map(|name| (name.clone(), BTreeMap::new())));
    }
    for metrics in said {
        interval = metrics.reporting_interval.or(interval);
        if !metrics.providers.is_empty() {
            providers = names(&metrics.providers);
        }
        for provider in &providers {
            let changes = changes.entry(provider.clone()).or_default();
            metrics.overrides.iter().for_each(|said| apply(said, inbound, changes));
        }
    }
    let is_prometheus =
        |name: &str| provider(context.mesh, name).is_some_and(|provider| provider.kind.contains_key("prometheus"));
    let changes = changes.into_iter().find(|(name, _)| is_prometheus(name))?.1;
    let gone = |metric: &Metric| changes.get(&key(*metric)).is_some_and(|change| change.disabled == Some(true));
    if Metric::ALL.iter().all(gone) {
        return None;
    }
    let mut config = Map::new();
    if inbound {
        config.insert("disable_host_header_fallback".to_owned(), Value::Bool(true));
    }
    if let Some(interval) = interval {
        config.insert("tcp_reporting_duration".to_owned(), json!(crate::xds::duration_text(interval.0)));
    }
    let metrics: Vec<Value> = changes.iter().map(|(name, change)| metric(name, change)).collect();
    if !metrics.is_empty() {
        config.insert("metrics".to_owned(), Value::Array(metrics));
    }
    Some(IstioStats { config: Value::Object(config) })
}

/// Metrics are put in the order of their enum's names, those with names of their own beside them.
fn key(metric: Metric) -> String {
    format!("{metric:?}")
}

fn apply(said: &crate::istio::telemetry::Override, inbound: bool, changes: &mut BTreeMap<String, Change>) {
    let matches = said.matches.clone().unwrap_or_default();
    if !matches.mode.includes(inbound) {
        return;
    }
    let metrics: Vec<String> = match (matches.custom_metric, matches.metric) {
        (Some(custom), _) => vec![custom],
        (None, None | Some(Metric::AllMetrics)) => Metric::ALL.into_iter().map(key).collect(),
        (None, Some(metric)) => vec![key(metric)],
    };
    for metric in metrics {
        let change = changes.entry(metric).or_default();
        change.disabled = said.disabled.or(change.disabled);
        for (tag, tag_said) in &said.tag_overrides {
            let value = (tag_said.operation == Operation::Upsert).then(|| tag_said.value.clone());
            change.tags.insert(tag.clone(), value);
        }
    }
}

fn metric(key_said: &str, change: &Change) -> Value {
    let standard = Metric::ALL.into_iter().find(|metric| key(*metric) == key_said);
    let name = standard.map_or(key_said, |metric| metric.family());
    let mut out = Map::from_iter([("name".to_owned(), json!(name))]);
    let added: Map<String, Value> =
        change.tags.iter().filter_map(|(tag, value)| Some((tag.clone(), json!(value.as_ref()?)))).collect();
    if !added.is_empty() {
        out.insert("dimensions".to_owned(), Value::Object(added));
    }
    let removed: Vec<&String> = change.tags.iter().filter(|(_, value)| value.is_none()).map(|(tag, _)| tag).collect();
    if !removed.is_empty() {
        out.insert("tags_to_remove".to_owned(), json!(removed));
    }
    if change.disabled == Some(true) {
        out.insert("drop".to_owned(), Value::Bool(true));
    }
    Value::Object(out)
}

/// Whether a section's match speaks of a direction.
pub(super) fn matches(said: Option<crate::istio::telemetry::ModeMatch>, inbound: bool) -> bool {
    said.map_or(Mode::ClientAndServer, |said| said.mode).includes(inbound)
}

#[cfg(test)]
#[path = "telemetry_tests.rs"]
mod tests;
