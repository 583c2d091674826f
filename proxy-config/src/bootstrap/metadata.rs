//! Node metadata as the agent builds it: what is said freely, then what has a type, which wins.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::node::parse_locality;
use super::proxy_config::ProxyConfig;
use super::variables::{Variables, go_bool};
use crate::model::Locality;

/// Labels by which a workload says where it is, the first wins.
const LOCALITY_LABELS: [&str; 2] = ["topology.istio.io/locality", "istio-locality"];
/// Set by ReplicaSets, without meaning to policies.
const TEMPLATE_HASH: &str = "pod-template-hash";
/// Metadata that istiod reads as a boolean: text, and an error in the agent when it is none.
const BOOLEANS: [&str; 8] = [
    "ENABLE_SELF_DISCOVERY",
    "DNS_CAPTURE",
    "DNS_AUTO_ALLOCATE",
    "ENABLE_HBONE",
    "DISABLE_HBONE_SEND",
    "INBOUND_LISTENER_EXACT_BALANCE",
    "OUTBOUND_LISTENER_EXACT_BALANCE",
    "EXIT_ON_ZERO_ACTIVE_CONNECTIONS",
];

/// What metadata is made from, besides the variables.
#[derive(Debug, Clone, Default)]
pub struct Parts<'a> {
    /// The effective ProxyConfig.
    pub proxy_config: ProxyConfig,
    /// The pod's labels, when the file is there.
    pub labels: Option<BTreeMap<String, String>>,
    /// The pod's annotations, when the file is there.
    pub annotations: Option<BTreeMap<String, String>>,
    /// The proxy's addresses, the main one first.
    pub ips: &'a [IpAddr],
    /// Names that istiod's certificate may have.
    pub pilot_sans: Vec<String>,
    /// `ISTIO_VERSION` when nobody says another.
    pub version: &'a str,
    /// `--outlierLogPath`; empty is none.
    pub outlier_log_path: &'a str,
    /// `--stsPort`; 0 is none.
    pub sts_port: u16,
    /// A credential socket is there.
    pub credential_socket: bool,
    /// Certificates come from a foreign socket, files from ours.
    pub file_credentials: bool,
}

/// Metadata and what is read from it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Built {
    /// Names without `ISTIO_META_`.
    pub metadata: Map<String, Value>,
    /// From the locality label.
    pub locality: Locality,
}

/// What is said freely: each `ISTIO_META_X` one field, each `ISTIO_METAJSON_X` the fields of its object. What is no
/// object is told in `warnings`.
pub(super) fn raw(proxy_config: &ProxyConfig, variables: &Variables, warnings: &mut Vec<String>) -> Map<String, Value> {
    let mut out = Map::new();
    let said = proxy_config.get("proxyMetadata").and_then(Value::as_object);
    for (name, value) in said.into_iter().flatten() {
        if let Some(name) = name.strip_prefix("ISTIO_META_") {
            out.insert(name.to_owned(), value.clone());
        }
    }
    for (name, value) in variables.with_prefix("ISTIO_META_") {
        out.insert(name.to_owned(), Value::String(value.to_owned()));
    }
    for (name, value) in variables.with_prefix("ISTIO_METAJSON_") {
        match serde_json::from_str(value) {
            Ok(Value::Object(fields)) => out.extend(fields),
            Ok(other) => warnings.push(format!("ISTIO_METAJSON_{name}: expected an object, not {other}")),
            Err(e) => warnings.push(format!("ISTIO_METAJSON_{name}: no JSON: {e}")),
        }
    }
    out
}

/// Labels of `ISTIO_METAJSON_LABELS`: those of its values that are text.
pub(super) fn static_labels(variables: &Variables) -> BTreeMap<String, String> {
    let said = variables.said("ISTIO_METAJSON_LABELS").unwrap_or_default();
    let Ok(Value::Object(fields)) = serde_json::from_str(said) else { return BTreeMap::new() };
    fields.into_iter().filter_map(|(name, value)| Some((name, value.as_str()?.to_owned()))).collect()
}

/// Builds the metadata.
///
/// # Errors
/// The variable that says something that istiod could not read.
pub fn build(parts: Parts<'_>, variables: &Variables, warnings: &mut Vec<String>) -> Result<Built, String> {
    let mut raw = raw(&parts.proxy_config, variables, warnings);
    if let Some(address) = variables.said("DNS_PROXY_ADDR") {
        raw.insert("DNS_PROXY_ADDR".to_owned(), address.into());
    }
    let mut typed = typed(&raw)?;
    if raw.get("ISTIO_VERSION").and_then(Value::as_str).is_none_or(str::is_empty) {
        typed.text("ISTIO_VERSION", parts.version);
    }
    let mut ips: Vec<String> = Vec::new();
    for ip in parts.ips.iter().map(ToString::to_string) {
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    typed.text("INSTANCE_IPS", &ips.join(","));
    if parts.sts_port != 0 {
        typed.text("STS_PORT", &parts.sts_port.to_string());
    }
    ports(&mut typed, variables, warnings);
    typed.switch("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", variables.bool("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", false, warnings));
    typed.switch("ENVOY_SKIP_DEPRECATED_LOGS", variables.bool("ENVOY_SKIP_DEPRECATED_LOGS", true, warnings));
    let hbone = raw.get("ENABLE_HBONE").and_then(Value::as_str).and_then(go_bool).unwrap_or(false);
    let discovery = match variables.get("PEER_METADATA_DISCOVERY") {
        Some(_) => variables.bool("PEER_METADATA_DISCOVERY", false, warnings),
        None => hbone,
    };
    typed.0.insert("METADATA_DISCOVERY".to_owned(), discovery.to_string().into());
    typed.text("WORKLOAD_IDENTITY_SOCKET_FILE", variables.or("WORKLOAD_IDENTITY_SOCKET_FILE", "socket"));
    typed.0.insert("PROXY_CONFIG".to_owned(), parts.proxy_config.into());
    for (field, variable) in
        [("NAME", "POD_NAME"), ("NAMESPACE", "POD_NAMESPACE"), ("SERVICE_ACCOUNT", "SERVICE_ACCOUNT")]
    {
        typed.text(field, variables.or(variable, ""));
    }
    let locality = labels(&mut typed, static_labels(variables), parts.labels);
    typed.texts("ANNOTATIONS", &parts.annotations.unwrap_or_default());
    if !parts.pilot_sans.is_empty() {
        typed.0.insert("PILOT_SAN".to_owned(), parts.pilot_sans.into());
    }
    typed.text("OUTLIER_LOG_PATH", parts.outlier_log_path);
    for (said, name) in [(parts.credential_socket, "credential"), (parts.file_credentials, "file-credential")] {
        if said {
            raw.insert(name.to_owned(), "true".into());
        }
    }
    raw.extend(typed.0);
    Ok(Built { metadata: raw, locality })
}

/// Fields that have a type; a default is not said, so that what was said freely under the name stays.
struct Typed(Map<String, Value>);

impl Typed {
    fn text(&mut self, name: &str, value: &str) {
        if !value.is_empty() {
            self.0.insert(name.to_owned(), value.into());
        }
    }

    fn number(&mut self, name: &str, value: u16) {
        if value != 0 {
            self.0.insert(name.to_owned(), value.into());
        }
    }

    fn switch(&mut self, name: &str, on: bool) {
        if on {
            self.text(name, "true");
        }
    }

    fn texts(&mut self, name: &str, values: &BTreeMap<String, String>) {
        if !values.is_empty() {
            let values = values.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
            self.0.insert(name.to_owned(), Value::Object(values));
        }
    }
}

fn ports(typed: &mut Typed, variables: &Variables, warnings: &mut Vec<String>) {
    for (name, default) in [
        ("ENVOY_STATUS_PORT", 15021),
        ("ENVOY_PROMETHEUS_PORT", 15090),
        ("ENVOY_SECURE_METRICS_PORT", 0),
        ("ENVOY_SECURE_MERGED_METRICS_PORT", 0),
    ] {
        typed.number(name, variables.number(name, default, warnings));
    }
}

/// What was said freely under a name that has a type: read and written again.
fn typed(raw: &Map<String, Value>) -> Result<Typed, String> {
    let mut typed = Typed(Map::new());
    for name in BOOLEANS {
        let Some(value) = raw.get(name) else { continue };
        let said = value.as_str().and_then(go_bool);
        let on = said.ok_or_else(|| format!("ISTIO_META_{name}: expected true or false as text, not {value}"))?;
        typed.switch(name, on);
    }
    if let Some(value) = raw.get("POD_PORTS") {
        let ports: Vec<PodPort> = value
            .as_str()
            .ok_or_else(|| "a text".to_owned())
            .and_then(|text| serde_json::from_str(text).map_err(|e| e.to_string()))
            .map_err(|e| format!("ISTIO_META_POD_PORTS: expected a text that holds a list of ports: {e}"))?;
        typed.text("POD_PORTS", &serde_json::to_string(&ports).map_err(|e| e.to_string())?);
    }
    Ok(typed)
}

/// A port of the pod, as the metadata has it.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodPort {
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    container_port: i64,
    protocol: String,
}

/// Puts labels in and takes the locality from them. A locality with dots is rewritten with slashes in `istio-locality`;
/// without a file of labels, in the static ones too.
fn labels(typed: &mut Typed, mut fixed: BTreeMap<String, String>, file: Option<BTreeMap<String, String>>) -> Locality {
    let mut labels = fixed.clone();
    let from_file = file.is_some();
    labels.extend(file.unwrap_or_default().into_iter().filter(|(name, _)| name != TEMPLATE_HASH));
    let said = LOCALITY_LABELS.iter().find_map(|name| labels.get(*name)).cloned().unwrap_or_default();
    let said = if said.contains('/') { said } else { said.replace('.', "/") };
    if !said.is_empty() {
        labels.insert("istio-locality".to_owned(), said.clone());
        if !from_file {
            fixed.insert("istio-locality".to_owned(), said.clone());
        }
    }
    typed.texts("LABELS", &labels);
    typed.texts("STATIC_LABELS", &fixed);
    parse_locality(&said)
}

/// The service cluster: what ProxyConfig names, else the application's label, else the workload's name.
pub fn service_cluster(proxy_config: &ProxyConfig, metadata: &Map<String, Value>) -> String {
    let text = |name: &str| metadata.get(name).and_then(Value::as_str).unwrap_or_default();
    let (namespace, workload) = (text("NAMESPACE"), text("WORKLOAD_NAME"));
    let label = |names: [&str; 3]| {
        let labels = metadata.get("LABELS").and_then(Value::as_object)?;
        names.iter().find_map(|name| labels.get(*name)?.as_str())
    };
    let or_default = |name: &str| {
        if !matches!(name, "" | "istio-proxy") {
            return name.to_owned();
        }
        if let Some(app) = label(["app", "app.kubernetes.io/name", "service.istio.io/canonical-name"]) {
            return format!("{app}.{namespace}");
        }
        match (workload, namespace) {
            ("", "") => "istio-proxy".to_owned(),
            ("", namespace) => format!("istio-proxy.{namespace}"),
            (workload, namespace) => format!("{workload}.{namespace}"),
        }
    };
    let said = |name: &str| proxy_config.get(name).and_then(Value::as_str).unwrap_or_default();
    let canonical = || {
        let named = label(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
        named.unwrap_or(if workload.is_empty() { "istio-proxy" } else { workload })
    };
    match said("tracingServiceName") {
        "CANONICAL_NAME_ONLY" => or_default(canonical()),
        "CANONICAL_NAME_AND_NAMESPACE" if !namespace.is_empty() => format!("{}.{namespace}", canonical()),
        "CANONICAL_NAME_AND_NAMESPACE" => or_default(canonical()),
        _ => or_default(said("serviceCluster")),
    }
}

/// Connections that all listeners together may hold: ProxyConfig's own field, then the metadata, then the runtime value.
pub fn connection_limit(proxy_config: &ProxyConfig) -> Option<u64> {
    let own = proxy_config.get("connectionSettings").and_then(|s| s.get("globalDownstreamConnectionLimit"));
    let text = |map: &str, name: &str| proxy_config.get(map)?.get(name)?.as_str()?.parse().ok();
    own.and_then(Value::as_u64)
        .or_else(|| text("proxyMetadata", "ISTIO_META_GLOBAL_DOWNSTREAM_MAX_CONNECTIONS"))
        .or_else(|| text("runtimeValues", "overload.global_downstream_max_connections"))
}
