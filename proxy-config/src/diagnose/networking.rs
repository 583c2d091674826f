//! Kinds that say where workloads and services are.

use serde_json::Value;

use super::{Finding, Findings, is_fqdn, is_label, is_wildcard_fqdn};
use crate::istio::service_entry::{Resolution, ServiceEntry};
use crate::istio::workload_entry::WorkloadEntry;
use crate::istio::workload_group::WorkloadGroup;
use crate::yaml::Node;

const UNIX: &str = "unix://";

/// Findings of a WorkloadEntry.
pub(crate) fn workload_entry(spec: &WorkloadEntry) -> Vec<Finding> {
    let mut found = Findings::default();
    entry(&mut found, spec, "spec");
    found.0
}

fn entry(found: &mut Findings, spec: &WorkloadEntry, field: &str) {
    let address = format!("{field}.address");
    match spec.address.strip_prefix(UNIX) {
        Some(path) => {
            let absolute = path.starts_with(['/', '@']) && !path.ends_with('/');
            found.expect(absolute, address, "no absolute path of a socket");
            found.expect(spec.ports.is_empty(), format!("{field}.ports"), "a socket has no ports");
        }
        None if spec.address.is_empty() => {
            found.expect(!spec.network.is_empty(), address, "an address is missing");
        }
        None => {
            let known = spec.address.parse::<std::net::IpAddr>().is_ok() || is_fqdn(&spec.address);
            found.expect(known, address, "no IP address, host name or unix:// path");
        }
    }
    for (name, number) in &spec.ports {
        found.expect(is_label(name), format!("{field}.ports.{name}"), "no name of a port");
        found.expect(*number > 0, format!("{field}.ports.{name}"), "0 is no port");
    }
}

/// Findings of a WorkloadGroup; `node` is its `spec`.
pub(crate) fn workload_group(spec: &WorkloadGroup, node: Option<&Node>) -> Vec<Finding> {
    let mut found = Findings::default();
    found.expect(node.is_some_and(|n| n.get("template").is_some()), "spec.template", "a template is missing");
    if let Some(probe) = &spec.probe {
        self::probe(&mut found, probe);
    }
    found.0
}

fn probe(found: &mut Findings, probe: &Value) {
    const METHODS: [&str; 4] = ["httpGet", "tcpSocket", "exec", "grpc"];
    let said: Vec<&str> = METHODS.into_iter().filter(|m| probe.get(m).is_some()).collect();
    found.expect(said.len() == 1, "spec.probe", "exactly one of httpGet, tcpSocket, exec and grpc is needed");
    let port = |method: &str| probe.get(method).and_then(|m| m.get("port")).and_then(Value::as_u64);
    for method in said.iter().filter(|m| **m != "exec") {
        let good = port(method).is_some_and(|p| (1..=65535).contains(&p));
        found.expect(good, format!("spec.probe.{method}.port"), "no port from 1 to 65535");
    }
    if let Some(exec) = probe.get("exec") {
        let command = exec.get("command").and_then(Value::as_array).is_some_and(|c| !c.is_empty());
        found.expect(command, "spec.probe.exec.command", "a command is missing");
    }
    if let Some(scheme) = probe.pointer("/httpGet/scheme").and_then(Value::as_str) {
        let known = matches!(scheme, "" | "HTTP" | "HTTPS");
        found.expect(known, "spec.probe.httpGet.scheme", "neither HTTP nor HTTPS");
    }
    for field in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        let negative = probe.get(field).and_then(Value::as_i64).is_some_and(|v| v < 0);
        found.expect(!negative, format!("spec.probe.{field}"), "negative");
    }
}

/// Findings of a ServiceEntry.
pub(crate) fn service_entry(spec: &ServiceEntry) -> Vec<Finding> {
    let mut found = Findings::default();
    found.expect(!spec.hosts.is_empty(), "spec.hosts", "a host is missing");
    for (index, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{index}]");
        found.expect(is_wildcard_fqdn(host), field, "no host name");
    }
    if let Some(selector) = &spec.workload_selector {
        found.selector(&selector.labels, "spec.workloadSelector.labels");
    }
    addresses(&mut found, spec);
    ports(&mut found, spec);
    endpoints(&mut found, spec);
    found.0
}

fn addresses(found: &mut Findings, spec: &ServiceEntry) {
    for (index, address) in spec.addresses.iter().enumerate() {
        let field = format!("spec.addresses[{index}]");
        if address.contains('/') {
            found.expect(address.parse::<ipnet::IpNet>().is_ok(), field.as_str(), "no address and no network");
            let takes = matches!(spec.resolution, Resolution::None | Resolution::Static);
            found.expect(takes, field, "networks go with resolution NONE and STATIC only");
        } else {
            found.expect(address.parse::<std::net::IpAddr>().is_ok(), field, "no address and no network");
        }
    }
}

fn ports(found: &mut Findings, spec: &ServiceEntry) {
    for (index, port) in spec.ports.iter().enumerate() {
        let field = format!("spec.ports[{index}]");
        found.expect(port.number > 0, format!("{field}.number"), "no port from 1 to 65535");
        found.expect(is_label(&port.name), format!("{field}.name"), "no name of letters, digits and dashes");
        let before = &spec.ports[..index];
        let unique = before.iter().all(|p| p.number != port.number);
        found.expect(unique, format!("{field}.number"), "the number stands here twice");
        found.expect(before.iter().all(|p| p.name != port.name), format!("{field}.name"), "the name stands here twice");
    }
}

fn endpoints(found: &mut Findings, spec: &ServiceEntry) {
    const FIELD: &str = "spec.endpoints";
    let selects = spec.workload_selector.is_some();
    found.expect(!selects || spec.endpoints.is_empty(), FIELD, "endpoints and workloadSelector exclude each other");
    let some = !spec.endpoints.is_empty();
    match spec.resolution {
        Resolution::None => found.expect(!some, FIELD, "resolution NONE takes no endpoints"),
        Resolution::DynamicDns => found.expect(!some, FIELD, "resolution DYNAMIC_DNS takes no endpoints"),
        Resolution::Dns | Resolution::DnsRoundRobin if !some && !selects => {
            let named = spec.hosts.iter().all(|h| !h.starts_with('*'));
            found.expect(named, "spec.hosts", "a wildcard cannot be resolved: endpoints are needed");
        }
        Resolution::Static | Resolution::Dns | Resolution::DnsRoundRobin => {}
    }
    if spec.resolution == Resolution::DnsRoundRobin {
        found.expect(spec.endpoints.len() <= 1, FIELD, "resolution DNS_ROUND_ROBIN takes one endpoint");
    }
    for (index, endpoint) in spec.endpoints.iter().enumerate() {
        let field = format!("{FIELD}[{index}]");
        entry(found, endpoint, &field);
        let name = endpoint.address.parse::<std::net::IpAddr>().is_err() && !endpoint.address.starts_with(UNIX);
        if endpoint.address.starts_with(UNIX) {
            let fits = spec.resolution == Resolution::Static && spec.ports.len() == 1;
            found.expect(fits, format!("{field}.address"), "a socket takes resolution STATIC and one port");
        }
        let fixed = spec.resolution == Resolution::Static && !endpoint.address.is_empty();
        found.expect(!(fixed && name), format!("{field}.address"), "resolution STATIC takes addresses, not names");
        for name in endpoint.ports.keys().filter(|n| spec.ports.iter().all(|p| p.name != **n)) {
            found.add(format!("{field}.ports.{name}"), "no port of the service has this name");
        }
    }
}
