//! The guide's resources, changed as a case asks, loaded for one proxy and compiled.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use istio_proxy::ca::Root;
use istio_proxy::explain::{self, Answer};
use istio_proxy::snapshot::{self, Snapshot};
use istio_proxy::tls::{Identity, Roots, Secrets};
use proxy_config::model::Cluster;
use proxy_config::{Inputs, Loaded, Model, Severity, Source, WhoAmI};
use serde_json::{Value, json};
use tokio::net::TcpSocket;

/// Identities of callers.
pub(crate) const FE: &str = "spiffe://cluster.local/ns/frontend/sa/frontend-sa";
pub(crate) const ORD: &str = "spiffe://cluster.local/ns/orders/sa/orders-sa";
pub(crate) const PAY: &str = "spiffe://cluster.local/ns/payments/sa/payment-service-sa";
pub(crate) const OTH: &str = "spiffe://cluster.local/ns/other/sa/x";
pub(crate) const API: &str = "spiffe://cluster.local/ns/hybrid-app/sa/api-sa";
pub(crate) const DB: &str = "spiffe://cluster.local/ns/hybrid-app/sa/legacy-db-sa";

/// A pod behind the payment service, as a cluster would know it.
pub(crate) const POD2: &str = "apiVersion: v1
kind: Node
metadata:
  name: node-1
  labels: {topology.kubernetes.io/region: us-west-2, topology.kubernetes.io/zone: us-west-2a}
---
apiVersion: v1
kind: Pod
metadata:
  name: payment-v2-0
  namespace: payments
  labels: {app: payment-service, version: v2, runtime: kubernetes, security.istio.io/tlsMode: istio}
spec: {nodeName: node-1, serviceAccountName: payment-service-sa}
status: {phase: Running, podIP: 10.1.0.2, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: payment-service-1
  namespace: payments
  labels: {kubernetes.io/service-name: payment-service}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}, {name: grpc, port: 9090, protocol: TCP}]
endpoints:
- addresses: [10.1.0.2]
  conditions: {ready: true}
  nodeName: node-1
  targetRef: {kind: Pod, name: payment-v2-0, namespace: payments}
";

/// Proxies that a configuration is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// The payment service's virtual machine.
    Vm,
    /// The database's.
    Database,
    /// A client in namespace `frontend`, in us-west-2/us-west-2a.
    Frontend,
    /// One in namespace `payments`.
    Payments,
    /// One in namespace `hybrid-app`.
    HybridApp,
}

impl Who {
    fn node(self) -> String {
        let (name, namespace, ip, account, group) = match self {
            Self::Vm => ("vm1", "payments", "10.0.1.5", "payment-service-sa", "legacy-payment-service"),
            Self::Database => ("db1", "hybrid-app", "10.0.2.20", "legacy-db-sa", "legacy-database"),
            Self::Frontend => ("frontend-1", "frontend", "10.1.0.9", "frontend-sa", ""),
            Self::Payments => ("other-1", "payments", "10.1.0.10", "other-sa", ""),
            Self::HybridApp => ("api-1", "hybrid-app", "10.1.0.20", "api-sa", ""),
        };
        let mut node = json!({
            "id": format!("sidecar~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local"),
            "locality": {"region": "us-west-2", "zone": "us-west-2a"},
            "metadata": {"NAMESPACE": namespace, "INSTANCE_IPS": ip, "SERVICE_ACCOUNT": account,
                         "CLUSTER_ID": "Kubernetes", "LABELS": {"app": name}},
        });
        if !group.is_empty() {
            // What a virtual machine is told when it registers itself; the group completes it.
            node["metadata"]["AUTO_REGISTER_GROUP"] = Value::from(group);
            node["metadata"]["NETWORK"] = Value::from("vm-network");
            node["metadata"]["LABELS"] = json!({});
            node.as_object_mut().expect("an object").remove("locality");
        }
        node.to_string()
    }
}

/// Resources by name.
#[derive(Debug, Clone)]
pub(crate) struct Yaml {
    documents: BTreeMap<String, String>,
    mesh: Option<String>,
}

impl Yaml {
    /// All of the guide's.
    pub(crate) fn seed() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("proxy-config/examples/seed");
        let mut documents = BTreeMap::new();
        for entry in std::fs::read_dir(folder).expect("the examples") {
            let path = entry.expect("readable").path();
            let text = std::fs::read_to_string(&path).expect("text");
            let name = path.file_name().expect("a file").to_string_lossy();
            let number: u32 = name[1..3].parse().expect("yNN-…");
            // The guide shows y12 as two resources; those after it count one more.
            if number == 12 {
                let (service, rule) = text.split_once("\n---\n").expect("two documents");
                documents.insert("Y12".to_owned(), service.to_owned());
                documents.insert("Y13".to_owned(), rule.to_owned());
            } else {
                documents.insert(format!("Y{}", if number > 12 { number + 1 } else { number }), text);
            }
        }
        assert_eq!(documents.len(), 15);
        Self { documents, mesh: None }
    }

    /// Only these.
    pub(crate) fn only(names: &[&str]) -> Self {
        let mut all = Self::seed();
        all.documents.retain(|name, _| names.contains(&name.as_str()));
        assert_eq!(all.documents.len(), names.len());
        all
    }

    /// Without these.
    pub(crate) fn without(mut self, names: &[&str]) -> Self {
        for name in names {
            self.documents.remove(*name).expect("it was there");
        }
        self
    }

    /// With one more.
    pub(crate) fn with(mut self, name: &str, text: &str) -> Self {
        self.documents.insert(name.to_owned(), text.to_owned());
        self
    }

    /// With a text replaced in one of them.
    pub(crate) fn edit(mut self, name: &str, from: &str, to: &str) -> Self {
        let text = self.documents.get_mut(name).expect("it was there");
        assert!(text.contains(from), "{name} has no {from:?}");
        *text = text.replace(from, to);
        self
    }

    /// With these mesh settings.
    pub(crate) fn mesh(mut self, text: &str) -> Self {
        self.mesh = Some(text.to_owned());
        self
    }

    /// The label that the canary's subset asks for, on the virtual machine.
    pub(crate) fn labelled(self) -> Self {
        self.edit("Y3", "  labels:\n    app: payment-service\n    version: v1\n", VM_LABELS)
    }

    /// Loads it for a machine that joins a WorkloadGroup of these resources.
    pub(crate) fn load_group(&self, namespace: &str, group: &str) -> Loaded {
        let node = json!({
            "id": format!("sidecar~10.9.9.9~{group}.{namespace}~{namespace}.svc.cluster.local"),
            "metadata": {"NAMESPACE": namespace, "AUTO_REGISTER_GROUP": group},
        });
        proxy_config::from_yaml(&self.inputs(node.to_string()), None).expect("an identity")
    }

    /// Loads it for a proxy.
    pub(crate) fn load(&self, who: Who) -> World {
        World::new(proxy_config::from_yaml(&self.inputs(who.node()), None).expect("an identity"))
    }

    fn inputs(&self, node: String) -> Inputs {
        let source = |(name, text): (&String, &String)| Source { name: format!("{name}.yaml"), text: text.clone() };
        Inputs {
            sources: self.documents.iter().map(source).collect(),
            mesh: self.mesh.clone().map(|text| Source { name: "mesh.yaml".to_owned(), text }),
            networks: None,
            who: WhoAmI::Node(node),
        }
    }
}

const VM_LABELS: &str = "  labels:\n    app: payment-service\n    version: v1\n    runtime: vm\n";

/// A configuration in force.
pub(crate) struct World {
    pub(crate) loaded: Loaded,
    pub(crate) snapshot: Arc<Snapshot>,
}

impl World {
    fn new(loaded: Loaded) -> Self {
        let snapshot = Arc::new(compile(&loaded.model));
        Self { loaded, snapshot }
    }

    /// The same with another model.
    pub(crate) fn changed(&self, change: impl FnOnce(&mut Model)) -> Self {
        let mut loaded = self.loaded.clone();
        change(&mut loaded.model);
        Self::new(loaded)
    }

    /// What would happen to a call.
    pub(crate) fn ask(&self, call: &Value) -> Answer {
        let calls = explain::parse(&call.to_string()).unwrap_or_else(|e| panic!("{call}: {e:#}"));
        explain::explain(&self.snapshot, &calls[0])
    }

    /// A cluster as said.
    pub(crate) fn cluster(&self, name: &str) -> &Cluster {
        self.loaded.model.clusters.get(name).unwrap_or_else(|| {
            let all: Vec<_> = self.loaded.model.clusters.keys().collect();
            panic!("no cluster {name} among {all:?}")
        })
    }

    /// Hosts of a cluster with priority, in order.
    pub(crate) fn hosts(&self, cluster: &str) -> Vec<(String, u32)> {
        let id = self.snapshot.cluster_id(cluster).unwrap_or_else(|| panic!("no cluster {cluster}"));
        let hosts = &self.snapshot.cluster(id).hosts().all;
        let mut all: Vec<_> = hosts.iter().map(|h| (h.address.to_string(), h.priority)).collect();
        all.sort();
        all
    }

    /// Warnings, one a line.
    pub(crate) fn warnings(&self) -> String {
        let warnings = self.loaded.model.rejects.iter().filter(|r| r.severity == Severity::Warning);
        warnings.map(|r| format!("{} {r}\n", r.code.unwrap_or("-"))).collect()
    }

    /// What is not served as said.
    pub(crate) fn errors(&self) -> Vec<String> {
        let errors = self.loaded.model.rejects.iter().filter(|r| r.severity != Severity::Warning);
        errors.map(ToString::to_string).collect()
    }
}

/// In one line what an answer comes to: the clusters, or who refuses.
pub(crate) fn outcome(answer: &Answer) -> String {
    if let Some(error) = &answer.error {
        return error.clone();
    }
    if let Some(response) = &answer.response {
        let details = response.details.strip_prefix("rbac_access_denied_matched_policy").unwrap_or(&response.details);
        let status = response.status;
        return if status == 0 { format!("closed {details}") } else { format!("{status} {details}") };
    }
    let names: Vec<&str> = answer.clusters.iter().map(|c| c.name.as_str()).collect();
    names.join(" ")
}

fn compile(model: &Model) -> Snapshot {
    let root = Root::generate("root").expect("a root").0;
    let id = FE.parse().expect("an identity");
    let (chain, key) = root.sign(&id, std::time::Duration::from_secs(3600)).expect("a certificate");
    let secrets = Secrets::new()
        .with_identity("default", Identity::from_pem(chain.as_bytes(), key.as_bytes()).expect("PEM"))
        .with_roots("ROOTCA", Roots::from_pem(root.certificate().as_bytes()).expect("PEM"));
    let (snapshot, rejects) = snapshot::compile(None, model, &secrets);
    assert!(rejects.is_empty(), "{rejects:?}");
    snapshot
}

/// An address that nobody listens on, and that nobody else gets while the socket is there.
pub(crate) fn closed() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a port");
    let at = socket.local_addr().expect("bound");
    (socket, at)
}
