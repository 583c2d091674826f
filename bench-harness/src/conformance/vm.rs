//! Tables of what the agent makes of its environment: node metadata, service cluster, downward API, limits; and the
//! files of a VM as inputs of the start.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use proxy_config::Source;
use proxy_config::bootstrap::metadata::{self, Parts};
use proxy_config::bootstrap::{
    Bootstrap, Flags, ProxyConfig, Told, Variables, bootstrap, downward, proxy_config as config,
};
use serde_json::{Map, Value, json};

use super::tally::{Difference, Tally};
use super::{Bench, Set, cases, prototext};

/// Runs the tables.
///
/// # Errors
/// When a file of the set cannot be read.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    for case in cases(set) {
        let name = case["name"].as_str().unwrap_or_default();
        if !bench.wants(name) {
            continue;
        }
        if let Some(reason) = bench.rules.beyond(case) {
            tally.out_of_reach(reason, 1);
            continue;
        }
        let (expected, seen) = match case["kind"].as_str().unwrap_or_default() {
            "bootstrap" => rendered(set, case).with_context(|| name.to_owned())?,
            "nodeMetadata" => node_metadata(case),
            "serviceCluster" => service_cluster(case),
            "downwardApi" => downward_api(case),
            "connectionLimit" => connection_limit(case),
            "istioVersion" => istio_version(case),
            "vmBundle" => bundle(set, case).with_context(|| name.to_owned())?,
            kind => {
                tally.unsupported(format!("tables of kind {kind} are not known"));
                continue;
            }
        };
        let mut found = Vec::new();
        differences("", &expected, &seen, &mut found);
        tally.judge(bench.rules, name, case, found);
    }
    Ok(tally)
}

/// Field by field; numbers by value.
pub(super) fn differences(path: &str, expected: &Value, seen: &Value, out: &mut Vec<Difference>) {
    match (expected, seen) {
        (Value::Object(a), Value::Object(b)) => {
            let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for name in names {
                let inner = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                match (a.get(name), b.get(name)) {
                    (Some(a), Some(b)) => differences(&inner, a, b, out),
                    (Some(a), None) => out.push(Difference::new(inner, a, "absent")),
                    (None, Some(b)) => out.push(Difference::new(inner, "absent", b)),
                    (None, None) => {}
                }
            }
        }
        (Value::Number(a), Value::Number(b)) if a.as_f64() == b.as_f64() => {}
        (a, b) if a == b => {}
        (a, b) => out.push(Difference::new(path, a, b)),
    }
}

/// The values of an object as text.
pub(super) fn texts(of: &Value) -> BTreeMap<String, String> {
    let entries = of.as_object().into_iter().flatten();
    entries
        .map(|(name, value)| (name.clone(), value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
        .collect()
}

fn object(of: &Value) -> ProxyConfig {
    of.as_object().cloned().unwrap_or_default()
}

fn canonical(said: &Value) -> Result<ProxyConfig> {
    let mut out = Map::new();
    let wrong = |w: config::Wrong| anyhow!("{}: {}", w.field, w.reason);
    config::overlay(&mut out, said, &mut Vec::new()).map_err(wrong)?;
    Ok(out)
}

/// The node of a rendered bootstrap.
fn rendered(set: &Set, case: &Value) -> Result<(Value, Value)> {
    let input = &case["input"];
    let place = input["proxyConfig"].as_str().unwrap_or_default();
    let text = fs::read_to_string(set.folder.join(place)).with_context(|| place.to_owned())?;
    let mut said = prototext::parse(&text)?;
    let expected = &case["expect"]["node"];
    // The test renders into a folder of its own, and says so.
    for name in ["configPath", "customConfigFile"] {
        said[name] = expected["metadata"]["PROXY_CONFIG"][name].clone();
    }
    for path in ["config_path", "custom_config_file"] {
        said.as_object_mut().and_then(|fields| fields.remove(path));
    }
    let mut variables = texts(&input["env"]);
    if let Some(limit) = variables.get("ISTIO_META_GLOBAL_DOWNSTREAM_MAX_CONNECTIONS") {
        said["proxyMetadata"] = json!({"ISTIO_META_GLOBAL_DOWNSTREAM_MAX_CONNECTIONS": limit});
    }
    let mut proxy_config = canonical(&said)?;
    proxy_config.entry("statusPort").or_insert_with(|| input["statusPortDefault"].clone());
    let annotations = texts(&input["annotations"]);
    variables.insert("ISTIO_METAJSON_ANNOTATIONS".to_owned(), input["annotations"].to_string());
    for (variable, name) in [
        ("ENVOY_PROMETHEUS_PORT", "envoyPrometheusPort"),
        ("ENVOY_STATUS_PORT", "envoyStatusPort"),
        ("ENVOY_SECURE_METRICS_PORT", "secureMetricsPort"),
        ("ENVOY_SECURE_MERGED_METRICS_PORT", "secureMergedMetricsPort"),
    ] {
        variables.insert(variable.to_owned(), input[name].as_u64().unwrap_or(0).to_string());
    }
    let socket = input["workloadIdentitySocketFile"].as_str().unwrap_or_default();
    variables.insert("WORKLOAD_IDENTITY_SOCKET_FILE".to_owned(), socket.to_owned());
    variables.insert("ENVOY_SKIP_DEPRECATED_LOGS".to_owned(), "false".to_owned());
    let list = |name: &str| input[name].as_array().cloned().unwrap_or_default();
    let ips: Vec<IpAddr> = list("instanceIPs").iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect();
    let parts = Parts {
        proxy_config: proxy_config.clone(),
        annotations: Some(annotations),
        ips: &ips,
        pilot_sans: list("pilotSubjectAltName").iter().filter_map(|s| s.as_str().map(str::to_owned)).collect(),
        version: input["binaryVersion"].as_str().unwrap_or_default(),
        outlier_log_path: input["outlierLogPath"].as_str().unwrap_or_default(),
        ..Parts::default()
    };
    let built = metadata::build(parts, &Variables(variables), &mut Vec::new()).map_err(|e| anyhow!(e))?;
    let mut seen = json!({
        "id": input["nodeID"],
        "cluster": metadata::service_cluster(&proxy_config, &built.metadata),
        "metadata": built.metadata,
        "locality": {},
    });
    let mut expected = expected.clone();
    if case["expect"]["localityChecked"] == true {
        let at = built.locality;
        seen["locality"] = json!({"region": at.region, "zone": at.zone, "sub_zone": at.sub_zone});
    } else {
        expected["locality"] = json!({});
    }
    Ok((expected, seen))
}

fn node_metadata(case: &Value) -> (Value, Value) {
    let input = &case["input"];
    let mut variables = texts(&input["env"]);
    for (name, variable) in [
        ("secureMetricsPort", "ENVOY_SECURE_METRICS_PORT"),
        ("secureMergedMetricsPort", "ENVOY_SECURE_MERGED_METRICS_PORT"),
        ("exitOnZeroActiveConnections", "EXIT_ON_ZERO_ACTIVE_CONNECTIONS"),
    ] {
        if !input[name].is_null() {
            variables.insert(variable.to_owned(), input[name].to_string());
        }
    }
    let file = |name: &str| downward::parse(input["files"][format!("./etc/istio/pod/{name}")].as_str()?).ok();
    let parts = Parts { labels: file("labels"), annotations: file("annotations"), ..Parts::default() };
    let built = match metadata::build(parts, &Variables(variables), &mut Vec::new()) {
        Ok(built) => built.metadata,
        Err(e) => return (case["expect"].clone(), json!({ "error": e })),
    };
    let picked = |names: &Value| {
        let names = names.as_object().into_iter().flatten();
        names.filter_map(|(name, _)| Some((name.clone(), built.get(name)?.clone()))).collect::<Map<_, _>>()
    };
    let expect = &case["expect"];
    let absent = expect["absent"].as_array().into_iter().flatten();
    let there: Vec<&Value> = absent.filter(|name| name.as_str().is_some_and(|n| built.contains_key(n))).collect();
    let mut expected = json!({"metadata": expect["metadata"], "there": []});
    let mut seen = json!({"metadata": picked(&expect["metadata"]), "there": there});
    if expect["labels"].is_object() {
        expected["labels"] = expect["labels"].clone();
        seen["labels"] = built.get("LABELS").cloned().unwrap_or_default();
    }
    (expected, seen)
}

fn service_cluster(case: &Value) -> (Value, Value) {
    let input = &case["input"];
    let mut proxy_config = object(&input["proxyConfig"]);
    for name in ["serviceCluster", "tracingServiceName"] {
        if !input[name].is_null() {
            proxy_config.insert(name.to_owned(), input[name].clone());
        }
    }
    let metadata =
        json!({"NAMESPACE": input["namespace"], "WORKLOAD_NAME": input["workloadName"], "LABELS": input["labels"]});
    let seen = metadata::service_cluster(&proxy_config, &object(&metadata));
    (case["expect"]["nodeCluster"].clone(), Value::from(seen))
}

fn downward_api(case: &Value) -> (Value, Value) {
    let seen = match downward::parse(case["input"]["file"].as_str().unwrap_or_default()) {
        Ok(map) => json!({ "map": map }),
        Err(error) => json!({ "error": error }),
    };
    let expect = &case["expect"];
    if expect["map"].is_object() {
        (json!({"map": expect["map"]}), seen)
    } else {
        (json!(true), json!(seen["error"].is_string()))
    }
}

fn connection_limit(case: &Value) -> (Value, Value) {
    let seen = metadata::connection_limit(&object(&case["input"]["proxyConfig"]));
    (case["expect"]["globalDownstreamMaxConnections"].clone(), json!(seen))
}

fn istio_version(case: &Value) -> (Value, Value) {
    let input = &case["input"];
    let said = texts(&input["metadata"]).into_iter().map(|(name, value)| (format!("ISTIO_META_{name}"), value));
    let parts = Parts { version: input["binaryVersion"].as_str().unwrap_or_default(), ..Parts::default() };
    let built = metadata::build(parts, &Variables(said.collect()), &mut Vec::new()).unwrap_or_default();
    (case["expect"]["ISTIO_VERSION"].clone(), built.metadata.get("ISTIO_VERSION").cloned().unwrap_or_default())
}

/// Starts from the files of a bundle; what the node says must be what they say.
fn bundle(set: &Set, case: &Value) -> Result<(Value, Value)> {
    let expect = &case["expect"];
    let file = |name: &str| -> Result<String> {
        let place = expect["files"][name].as_str().unwrap_or_default();
        fs::read_to_string(set.folder.join(place)).with_context(|| place.to_owned())
    };
    let variables = cluster_env(&file("cluster.env")?);
    let said = texts(&expect["clusterEnvParsed"]);
    let started = start_script(variables.clone(), "vm");
    let vm = start(started, Some(file("mesh.yaml")?), None, None, &[])?;
    let metadata = &vm.node.metadata;
    let mut expected =
        json!({"env": said, "proxyMetadata": expect["meshYamlParsed"]["defaultConfig"]["proxyMetadata"]});
    let mut seen = json!({"env": variables, "proxyMetadata": vm.proxy_config.get("proxyMetadata")});
    let meta = said.iter().filter_map(|(name, value)| Some((name.strip_prefix("ISTIO_META_")?, value)));
    for (name, value) in meta.filter(|(name, _)| *name != "POD_PORTS") {
        expected[name] = json!(value);
        seen[name] = metadata.get(name).cloned().unwrap_or_default();
    }
    let ip = said.get("ISTIO_SVC_IP").cloned().unwrap_or_default();
    let namespace = said.get("POD_NAMESPACE").cloned().unwrap_or_default();
    let of_mesh = |name: &str| expect["meshYamlParsed"]["defaultConfig"][name].clone();
    let address = match of_mesh("discoveryAddress") {
        Value::Null => json!("istiod.istio-system.svc:15012"),
        said => said,
    };
    let labels: Value = serde_json::from_str(said.get("ISTIO_METAJSON_LABELS").map_or("{}", String::as_str))?;
    expected["node"] = json!({"id": format!("sidecar~{ip}~vm.{namespace}~{namespace}.svc.cluster.local"),
        "cluster": said.get("ISTIO_SERVICE"), "labels": labels, "discovery": address, "probe": of_mesh("readinessProbe")});
    seen["node"] = json!({"id": vm.node.id(), "cluster": vm.node.service_cluster, "labels": metadata.get("LABELS"),
        "discovery": vm.xds.address, "probe": vm.readiness_probe});
    Ok((expected, seen))
}

/// `K='shell-quoted'` lines.
pub(super) fn cluster_env(text: &str) -> BTreeMap<String, String> {
    let unquoted = |value: &str| {
        let plain = value.strip_prefix('\'').and_then(|v| v.strip_suffix('\''));
        plain.unwrap_or(value).replace(r"'\''", "'").replace(r#"'"'"'"#, "'")
    };
    text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), unquoted(v))).collect()
}

/// What istio-start.sh adds to the variables it has sourced.
pub(super) fn start_script(mut variables: BTreeMap<String, String>, host: &str) -> BTreeMap<String, String> {
    let said = |name: &str, default: &str| {
        variables.get(name).filter(|v| !v.is_empty()).cloned().unwrap_or_else(|| default.to_owned())
    };
    let service = said("ISTIO_SERVICE", "rawvm");
    let defaults = [
        ("CA_ADDR", "istiod.istio-system.svc:15012".to_owned()),
        ("PROV_CERT", "./etc/certs".to_owned()),
        ("OUTPUT_CERTS", "./etc/certs".to_owned()),
        ("PROXY_CONFIG", format!("\nserviceCluster: {service}\ncontrolPlaneAuthPolicy: MUTUAL_TLS\n")),
    ];
    let always = [
        ("INSTANCE_IP", said("ISTIO_SVC_IP", "")),
        ("POD_NAME", host.to_owned()),
        ("POD_NAMESPACE", said("ISTIO_NAMESPACE", "default")),
    ];
    for (name, value) in defaults {
        variables.entry(name.to_owned()).or_insert(value);
    }
    variables.extend(always.map(|(name, value)| (name.to_owned(), value)));
    variables
}

/// The start of a proxy on a machine with these addresses and every root in its place.
pub(super) fn start(
    variables: BTreeMap<String, String>,
    mesh: Option<String>,
    labels: Option<String>,
    annotations: Option<String>,
    addresses: &[IpAddr],
) -> Result<Bootstrap> {
    let own = variables.get("INSTANCE_IP").and_then(|ip| ip.parse().ok());
    let addresses = if addresses.is_empty() { own.into_iter().collect() } else { addresses.to_vec() };
    let roots = |path: &Path| path.ends_with("root-cert.pem");
    let told = Told {
        variables: Variables(variables),
        flags: Flags::default(),
        mesh: mesh.map(|text| Source { name: "mesh.yaml".to_owned(), text }),
        labels,
        annotations,
        addresses: addresses.into_iter().map(|ip| ("eth0".to_owned(), ip)).collect(),
        exists: &roots,
        credential_socket: false,
        identity_socket: false,
    };
    Ok(bootstrap(told)?)
}
