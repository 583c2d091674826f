//! Who called whom, as the labels of Istio's standard metrics.

use std::hash::{Hash, Hasher};

use crate::error::Flags;

const UNKNOWN: &str = "unknown";

/// Who we are, in labels (node metadata).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeLabels {
    /// `WORKLOAD_NAME`
    pub workload: String,
    /// `NAMESPACE`
    pub namespace: String,
    /// Label `service.istio.io/canonical-name`
    pub canonical_service: String,
    /// Label `service.istio.io/canonical-revision`
    pub canonical_revision: String,
    /// Label `app`
    pub app: String,
    /// Label `version`
    pub version: String,
    /// `CLUSTER_ID`
    pub cluster: String,
    /// `ISTIO_VERSION`, for `istio_build`
    pub istio_version: String,
}

/// Which side tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's proxy (outbound listeners).
    Source,
    /// The server's proxy (inbound listeners).
    Destination,
}

/// `request_protocol`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP that is not gRPC.
    Http,
    /// `content-type: application/grpc`
    Grpc,
    /// Bytes.
    Tcp,
}

/// `filter_metadata.istio.services[0]` of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Service<'a> {
    /// FQDN.
    pub host: &'a str,
    /// Short name; empty: the first label of the host.
    pub name: &'a str,
    /// Namespace; empty: the peer's.
    pub namespace: &'a str,
}

/// The facts that labels are made of. An empty text means: not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Labels<'a> {
    /// Which side we are.
    pub reporter: Reporter,
    /// What was spoken.
    pub protocol: Protocol,
    /// The cluster's service.
    pub service: Option<Service<'a>>,
    /// Name of the cluster; used when there is no service.
    pub cluster: &'a str,
    /// Host of the request; used outbound when there is no service.
    pub authority: &'a str,
    /// `istio.workload` of the endpoint (outbound): `name;namespace;canonical service;revision;cluster`.
    pub workload: &'a str,
    /// URI SAN of our certificate on this connection.
    pub local_principal: &'a str,
    /// URI SAN of the peer's.
    pub peer_principal: &'a str,
    /// Status; 0: none was sent.
    pub code: u16,
    /// gRPC status.
    pub grpc_status: Option<u32>,
    /// Response flags.
    pub flags: Flags,
}

/// Names of the configuration and of certificates count with their length and eight telling bytes, which costs a third
/// of reading them whole; comparing is exact. What a client may choose counts whole, so that it cannot make collisions.
impl Hash for Labels<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let service = self.service.map_or("", |service| service.host);
        let flags = u64::from(self.flags.bits()) << 32 | u64::from(self.grpc_status.unwrap_or(u32::MAX));
        let kind = self.code as u64 | (self.reporter as u64) << 16 | (self.protocol as u64) << 20;
        for word in [
            flags,
            kind,
            first_bytes(service),
            first_bytes(self.workload),
            last_bytes(self.local_principal),
            last_bytes(self.peer_principal),
        ] {
            state.write_u64(word);
        }
        if self.service.is_none() {
            self.cluster.hash(state);
            self.authority.hash(state);
        }
    }
}

fn first_bytes(text: &str) -> u64 {
    let word = text.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    word.rotate_left(5) ^ text.len() as u64
}

fn last_bytes(text: &str) -> u64 {
    let word = text.as_bytes().last_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    word.rotate_left(5) ^ text.len() as u64
}

impl Labels<'_> {
    /// The same without what will not be printed, so that it does not split series.
    pub(super) fn essential(self) -> Self {
        if self.service.is_some() {
            return Self { cluster: "", authority: "", ..self };
        }
        if self.reporter == Reporter::Destination {
            return Self { authority: "", ..self };
        }
        self
    }
}

/// Appends `name="value"` with a comma between pairs; the value is escaped.
pub(super) fn push_label(out: &mut String, name: &str, value: &str) {
    if !out.is_empty() {
        out.push(',');
    }
    out.push_str(name);
    out.push_str("=\"");
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// One end of a call, as labels want it.
struct End<'a> {
    workload: &'a str,
    canonical_service: &'a str,
    canonical_revision: &'a str,
    namespace: &'a str,
    app: &'a str,
    version: &'a str,
    cluster: &'a str,
}

impl<'a> End<'a> {
    fn own(node: &'a NodeLabels) -> Self {
        Self {
            workload: &node.workload,
            canonical_service: &node.canonical_service,
            canonical_revision: &node.canonical_revision,
            namespace: &node.namespace,
            app: &node.app,
            version: &node.version,
            cluster: &node.cluster,
        }
    }

    /// What endpoint metadata and the peer's identity tell; the rest would need metadata exchange.
    fn peer(labels: &Labels<'a>) -> Self {
        let mut parts = labels.workload.split(';');
        let mut next = |absent: &'static str| parts.next().filter(|part| !part.is_empty()).unwrap_or(absent);
        let workload = next(UNKNOWN);
        let namespace = next("");
        let canonical_service = next(UNKNOWN);
        let canonical_revision = next("latest");
        let cluster = next(UNKNOWN);
        let of_identity = namespace_of(labels.peer_principal);
        let namespace = if namespace.is_empty() { of_identity.unwrap_or(UNKNOWN) } else { namespace };
        Self { workload, canonical_service, canonical_revision, namespace, app: UNKNOWN, version: UNKNOWN, cluster }
    }
}

/// The namespace in `spiffe://domain/ns/NAMESPACE/sa/ACCOUNT`.
fn namespace_of(principal: &str) -> Option<&str> {
    let (_, path) = principal.strip_prefix("spiffe://")?.split_once('/')?;
    let (namespace, _) = path.strip_prefix("ns/")?.split_once('/')?;
    Some(namespace).filter(|namespace| !namespace.is_empty())
}

/// `destination_service`, `destination_service_name`, `destination_service_namespace`.
fn destination<'a>(labels: &Labels<'a>, node: &'a NodeLabels, to: &End<'a>) -> (&'a str, &'a str, &'a str) {
    let inbound = labels.reporter == Reporter::Destination;
    if let Some(service) = labels.service {
        let first_label = service.host.split('.').next().unwrap_or_default();
        let name = if service.name.is_empty() { first_label } else { service.name };
        let namespace = match service.namespace {
            _ if inbound => &node.namespace,
            "" => to.namespace,
            said => said,
        };
        return (service.host, name, namespace);
    }
    let namespace = if inbound { node.namespace.as_str() } else { to.namespace };
    let nowhere = ["PassthroughCluster", "BlackHoleCluster", "InboundPassthroughCluster"];
    let named = nowhere.into_iter().find(|name| labels.cluster.starts_with(name));
    let host = match (labels.authority, named) {
        _ if inbound => &node.canonical_service,
        ("", Some(cluster)) => cluster,
        ("", None) => UNKNOWN,
        (authority, _) => authority,
    };
    (host, named.unwrap_or_else(|| host.split('.').next().unwrap_or_default()), namespace)
}

/// The label set in Istio's order.
pub(super) fn text(labels: &Labels<'_>, node: &NodeLabels) -> String {
    let mut out = String::with_capacity(1024);
    let inbound = labels.reporter == Reporter::Destination;
    let (own, peer) = (End::own(node), End::peer(labels));
    let principal = |principal: &'_ str| if principal.is_empty() { UNKNOWN } else { principal }.to_owned();
    let (local, remote) = (principal(labels.local_principal), principal(labels.peer_principal));
    let (from, to) = if inbound { (peer, own) } else { (own, peer) };
    let (from_principal, to_principal) = if inbound { (remote, local) } else { (local, remote) };
    let (service, service_name, service_namespace) = destination(labels, node, &to);
    let (security, reporter) = match labels.reporter {
        Reporter::Source => (UNKNOWN, "source"),
        Reporter::Destination if !labels.local_principal.is_empty() && !labels.peer_principal.is_empty() => {
            ("mutual_tls", "destination")
        }
        Reporter::Destination => ("none", "destination"),
    };
    let protocol = match labels.protocol {
        Protocol::Http => "http",
        Protocol::Grpc => "grpc",
        Protocol::Tcp => "tcp",
    };
    for (name, value) in [
        ("reporter", reporter),
        ("source_workload", from.workload),
        ("source_canonical_service", from.canonical_service),
        ("source_canonical_revision", from.canonical_revision),
        ("source_workload_namespace", from.namespace),
        ("source_principal", &from_principal),
        ("source_app", from.app),
        ("source_version", from.version),
        ("source_cluster", from.cluster),
        ("destination_workload", to.workload),
        ("destination_workload_namespace", to.namespace),
        ("destination_principal", &to_principal),
        ("destination_app", to.app),
        ("destination_version", to.version),
        ("destination_service", service),
        ("destination_canonical_service", to.canonical_service),
        ("destination_canonical_revision", to.canonical_revision),
        ("destination_service_name", service_name),
        ("destination_service_namespace", service_namespace),
        ("destination_cluster", to.cluster),
        ("request_protocol", protocol),
    ] {
        push_label(&mut out, name, value);
    }
    if labels.protocol != Protocol::Tcp {
        push_label(&mut out, "response_code", &labels.code.to_string());
        let grpc = labels.grpc_status.filter(|_| labels.protocol == Protocol::Grpc);
        push_label(&mut out, "grpc_response_status", &grpc.map(|status| status.to_string()).unwrap_or_default());
    }
    push_label(&mut out, "response_flags", &labels.flags.to_string());
    push_label(&mut out, "connection_security_policy", security);
    out
}

/// The label set of everything past the cap: the reporter is told, the rest reads `overflow`.
pub(super) fn overflow_text(labels: &Labels<'_>) -> String {
    let node = NodeLabels::default();
    let mut out = String::new();
    for pair in text(labels, &node).split("\",") {
        let name = pair.split('=').next().unwrap_or_default();
        let value = match labels.reporter {
            Reporter::Source if name == "reporter" => "source",
            Reporter::Destination if name == "reporter" => "destination",
            _ => "overflow",
        };
        push_label(&mut out, name, value);
    }
    out
}

#[cfg(test)]
#[path = "labels_tests.rs"]
pub(super) mod tests;
