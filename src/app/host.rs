//! What the machine and the environment say: processors, durations, who we are.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use proxy_config::peer::Workload;
use proxy_config::registry::Proxy;
use rustix::process::{Resource, Rlimit};

use crate::proxy::Node;

/// Workers when nothing limits the CPU; more would not help a sidecar and cost upstream connections.
const DEFAULT_WORKERS: usize = 2;
/// File descriptors that are not connections': listeners, logs, watches, resolvers.
const OWN_FILES: usize = 512;

/// Istio's rule without an explicit number: the CPU limit, rounded up, else 2.
pub(super) fn concurrency(variables: &BTreeMap<String, String>) -> usize {
    let said = variables.get("ISTIO_CPU_LIMIT").and_then(|v| v.parse().ok()).filter(|n| *n > 0);
    said.or_else(cgroup_limit).unwrap_or(DEFAULT_WORKERS)
}

fn cgroup_limit() -> Option<usize> {
    let v2 = || cpu_max(&fs::read_to_string("/sys/fs/cgroup/cpu.max").ok()?);
    let v1 = || {
        let quota = fs::read_to_string("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").ok()?;
        let period = fs::read_to_string("/sys/fs/cgroup/cpu/cpu.cfs_period_us").ok()?;
        cpu_max(&format!("{} {}", quota.trim(), period.trim()))
    };
    v2().or_else(v1)
}

/// `QUOTA PERIOD` in microseconds, `max` for no limit.
fn cpu_max(text: &str) -> Option<usize> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
    usize::try_from(quota.checked_add(period - 1)?.checked_div(period)?).ok().filter(|n| *n > 0)
}

/// Takes as many file descriptors as the system lets us have, as the Go runtime of pilot-agent does, and says how many
/// connections they are good for: upstream connections serve several of them in turn, and some are for listeners, files and DNS. Without
/// such a limit a crowd of clients takes the descriptors that upstream connections of everybody else need.
pub(super) fn connections() -> usize {
    let now = rustix::process::getrlimit(Resource::Nofile);
    let most = Rlimit { current: now.maximum, ..now };
    let limit = match rustix::process::setrlimit(Resource::Nofile, most) {
        Ok(()) => most,
        Err(error) => {
            tracing::warn!(%error, "the limit of open files stays at {:?}", now.current);
            now
        }
    };
    limit.current.map_or(usize::MAX, |files| connections_of(usize::try_from(files).unwrap_or(usize::MAX)))
}

fn connections_of(files: usize) -> usize {
    files.saturating_sub((files / 8).min(OWN_FILES)) / 4 * 3
}

/// A duration as Go writes it: `1m30s`, `500ms`.
pub(super) fn go_duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (value, after) = rest.split_at(number);
        let unit = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" => 1e-6,
            _ => return None,
        };
        total += Duration::try_from_secs_f64(value.parse::<f64>().ok()? * seconds).ok()?;
        rest = after;
    }
    Some(total)
}

/// `terminationDrainDuration` of a ProxyConfig. The loader checks the document as a whole; this is the one field that
/// the process itself obeys.
pub(super) fn termination_drain(proxy_config: &str) -> Option<Duration> {
    const FIELD: &str = "terminationDrainDuration";
    let (_, after) = proxy_config.split_once(FIELD)?;
    let after = after.trim_start_matches(['"', '\'']).trim_start().strip_prefix(':')?;
    let value = after.trim_start().trim_start_matches(['"', '\'']);
    let end = value.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(value.len());
    go_duration(&value[..end])
}

/// Who we are, for peers and logs.
pub(super) fn node(proxy: &Proxy) -> Node {
    let id = HeaderValue::try_from(id(proxy)).ok();
    Node { id, workload: Arc::new(workload(proxy)), hostname: proxy.name.clone(), service: service(proxy) }
}

/// The name of this service in traces: `APP.NAMESPACE`, else the workload's.
fn service(proxy: &Proxy) -> String {
    let named = proxy.labels.get("app").or_else(|| proxy.labels.get("service.istio.io/canonical-name"));
    let workload = proxy.metadata.get("WORKLOAD_NAME").and_then(|name| name.as_str());
    let name = named.map(String::as_str).or(workload).unwrap_or(&proxy.name);
    format!("{name}.{}", proxy.namespace)
}

/// The node's id, as it is on the stream.
pub(super) fn id(proxy: &Proxy) -> String {
    let ip = proxy.ips.first().map(ToString::to_string).unwrap_or_default();
    format!("sidecar~{ip}~{}.{}~{}", proxy.name, proxy.namespace, proxy.dns_domain)
}

/// Our workload with all of its labels: what the node's metadata says, completed by what objects say of it.
fn workload(proxy: &Proxy) -> Workload {
    let all: Vec<String> = proxy.labels.keys().cloned().collect();
    let labels = proxy.labels.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
    let mut metadata = proxy.metadata.clone();
    metadata.insert("LABELS".to_owned(), serde_json::Value::Object(labels));
    let mut out = Workload::from_node(&metadata, &proxy.locality, &all);
    for (said, known) in [
        (&mut out.instance, &proxy.name),
        (&mut out.namespace, &proxy.namespace),
        (&mut out.workload, &proxy.name),
        (&mut out.cluster, &proxy.cluster_id),
    ] {
        if said.is_empty() {
            said.clone_from(known);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_files_for_upstreams() {
        for (files, connections) in [(1024, 672), (20_000, 14_616), (1 << 20, 786_048), (0, 0)] {
            assert_eq!(connections_of(files), connections);
        }
    }

    #[test]
    fn limits_are_rounded_up() {
        for (text, expected) in [
            ("max 100000\n", None),
            ("150000 100000\n", Some(2)),
            ("200000 100000", Some(2)),
            ("5000 100000", Some(1)),
            ("-1 100000", None),
        ] {
            assert_eq!(cpu_max(text), expected, "{text}");
        }
        let limit = BTreeMap::from([("ISTIO_CPU_LIMIT".to_owned(), "3".to_owned())]);
        assert_eq!(concurrency(&limit), 3);
    }

    #[test]
    fn durations() {
        for (text, expected) in
            [("5s", Some(5_000)), ("1m30s", Some(90_000)), ("1.5s", Some(1_500)), ("500ms", Some(500))]
        {
            assert_eq!(go_duration(text), expected.map(Duration::from_millis), "{text}");
        }
        for bad in ["", "5", "s", "5x", "-1s"] {
            assert_eq!(go_duration(bad), None, "{bad}");
        }
        assert_eq!(termination_drain(r#"{"terminationDrainDuration": "20s", "a": 1}"#), Some(Duration::from_secs(20)));
    }
}
