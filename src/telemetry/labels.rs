//! Who called whom, as the labels of Istio's standard metrics.

use std::borrow::Cow;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use proxy_config::peer::Workload;

use super::overrides::{Overrides, Values};
use super::peer::Peer;
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
    /// Id of the node.
    pub id: String,
    /// Metadata of the node, for expressions.
    pub metadata: serde_json::Value,
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
    /// Host of the request, where it may name the destination; used when there is no service.
    pub authority: &'a str,
    /// What is known of the other side's workload.
    pub peer: Option<&'a Arc<Peer>>,
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
    /// What changes the metrics, with its values for this request or connection.
    pub changed: Option<(&'a Arc<Overrides>, &'a Values)>,
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
            self.peer.map_or(0, |peer| peer.number()),
            last_bytes(self.local_principal),
            last_bytes(self.peer_principal),
        ] {
            state.write_u64(word);
        }
        if self.service.is_none() {
            self.cluster.hash(state);
            self.authority.hash(state);
        }
        if let Some(changed) = self.changed {
            changed.hash(state);
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

/// Istio's labels in their order.
pub(super) const TAGS: [&str; 25] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_service_name",
    "destination_service_namespace",
    "destination_cluster",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
];

/// Labels that say who calls whom; the others say how it ended. Messages of a stream are counted before that is known.
pub(super) const ENDS: usize = 20;

/// A label with its value.
pub(super) type Tag<'a> = (&'a str, Cow<'a, str>);

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

    /// What the peer says of itself; its namespace by its identity first, which is authenticated.
    fn peer(labels: &Labels<'a>) -> Self {
        let said = |field: fn(&'a Workload) -> &'a str, absent: &'static str| {
            labels.peer.map(|peer| field(peer)).filter(|text| !text.is_empty()).unwrap_or(absent)
        };
        let of_identity = namespace_of(labels.peer_principal);
        Self {
            workload: said(|w| &w.workload, UNKNOWN),
            canonical_service: said(|w| &w.service, UNKNOWN),
            canonical_revision: said(|w| &w.revision, "latest"),
            namespace: of_identity.unwrap_or_else(|| said(|w| &w.namespace, UNKNOWN)),
            app: said(|w| &w.app, UNKNOWN),
            version: said(|w| &w.version, UNKNOWN),
            cluster: said(|w| &w.cluster, UNKNOWN),
        }
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
    let namespace = match labels.service.map(|service| service.namespace) {
        _ if inbound => node.namespace.as_str(),
        None | Some("") => to.namespace,
        Some(said) => said,
    };
    let (host, name) = match labels.service {
        Some(Service { host, name: "", .. }) => (host, host.split('.').next().unwrap_or_default()),
        Some(service) => (service.host, service.name),
        None => {
            let nowhere = ["PassthroughCluster", "BlackHoleCluster", "InboundPassthroughCluster"];
            let named = nowhere.into_iter().find(|name| labels.cluster.starts_with(name));
            (labels.authority, named.unwrap_or(labels.authority))
        }
    };
    let nobody = if inbound { node.canonical_service.as_str() } else { UNKNOWN };
    let or_nobody = |text: &'a str| if text.is_empty() { nobody } else { text };
    (or_nobody(host), or_nobody(name), namespace)
}

/// The labels with their values, in Istio's order.
pub(super) fn tags<'a>(labels: &Labels<'a>, node: &'a NodeLabels) -> Vec<Tag<'a>> {
    let inbound = labels.reporter == Reporter::Destination;
    let (own, peer) = (End::own(node), End::peer(labels));
    let principal = |principal: &'a str| if principal.is_empty() { UNKNOWN } else { principal };
    let (local, remote) = (principal(labels.local_principal), principal(labels.peer_principal));
    let (from, to) = if inbound { (peer, own) } else { (own, peer) };
    let (from_principal, to_principal) = if inbound { (remote, local) } else { (local, remote) };
    let (service, service_name, service_namespace) = destination(labels, node, &to);
    let ends: [&str; ENDS] = [
        if inbound { "destination" } else { "source" },
        from.workload,
        from.canonical_service,
        from.canonical_revision,
        from.namespace,
        from_principal,
        from.app,
        from.version,
        from.cluster,
        to.workload,
        to.namespace,
        to_principal,
        to.app,
        to.version,
        service,
        to.canonical_service,
        to.canonical_revision,
        service_name,
        service_namespace,
        to.cluster,
    ];
    let mut out: Vec<Tag<'a>> = TAGS.into_iter().zip(ends).map(|(name, value)| (name, Cow::Borrowed(value))).collect();
    outcome(labels, &mut out);
    out
}

/// The labels that say how it ended.
fn outcome(labels: &Labels<'_>, out: &mut Vec<Tag<'_>>) {
    let protocol = match labels.protocol {
        Protocol::Http => "http",
        Protocol::Grpc => "grpc",
        Protocol::Tcp => "tcp",
    };
    out.push(("request_protocol", protocol.into()));
    if labels.protocol != Protocol::Tcp {
        out.push(("response_code", labels.code.to_string().into()));
        let grpc = labels.grpc_status.filter(|_| labels.protocol == Protocol::Grpc);
        out.push(("grpc_response_status", grpc.map(|status| status.to_string()).unwrap_or_default().into()));
    }
    out.push(("response_flags", labels.flags.to_string().into()));
    let security = match labels.reporter {
        Reporter::Source => UNKNOWN,
        Reporter::Destination if !labels.local_principal.is_empty() && !labels.peer_principal.is_empty() => {
            "mutual_tls"
        }
        Reporter::Destination => "none",
    };
    out.push(("connection_security_policy", security.into()));
}

/// Labels as text.
pub(super) fn text(tags: &[Tag<'_>]) -> String {
    let mut out = String::with_capacity(1024);
    for (name, value) in tags {
        push_label(&mut out, name, value);
    }
    out
}

/// The labels of everything past the cap: the reporter is told, the rest reads `overflow`.
pub(super) fn overflowed<'a>(labels: &Labels<'a>) -> Vec<Tag<'a>> {
    let node = NodeLabels::default();
    let known = tags(labels, &node).into_iter().map(|(name, _)| name);
    let reporter = if labels.reporter == Reporter::Source { "source" } else { "destination" };
    let known: Vec<&'static str> = known.filter_map(|name| TAGS.into_iter().find(|tag| *tag == name)).collect();
    known.into_iter().map(|name| (name, if name == "reporter" { reporter } else { "overflow" }.into())).collect()
}

#[cfg(test)]
#[path = "labels_tests.rs"]
pub(super) mod tests;
