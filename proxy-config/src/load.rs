//! Texts in, one proxy's [`Model`] out: what `proxy`, `explain` and `validate` ask of a folder of YAML.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Model, Reject, Severity};
use crate::registry::Proxy;

/// One text of configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// Path, for messages; its last part tells `mesh.yaml` and `networks.yaml`.
    pub name: String,
    /// YAML, several documents allowed.
    pub text: String,
}

/// Everything that a proxy is told without a control plane.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Istio and Kubernetes objects, in the order in which they were given.
    pub sources: Vec<Source>,
    /// `MeshConfig`; wins over a `mesh.yaml` among the sources.
    pub mesh: Option<Source>,
    /// `MeshNetworks`; wins over a `networks.yaml` among the sources.
    pub networks: Option<Source>,
    /// The proxy.
    pub who: WhoAmI,
}

/// How the proxy says who it is.
#[derive(Debug, Clone)]
pub enum WhoAmI {
    /// An Envoy `Node` in protojson.
    Node(String),
    /// pilot-agent's environment.
    Env(BTreeMap<String, String>),
}

/// What was understood.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What the proxy serves, with everything that was refused.
    pub model: Model,
    /// Who it is, completed from the objects.
    pub proxy: Proxy,
    /// `spec.probe` of the WorkloadGroup that the proxy belongs to.
    pub probe: Option<serde_json::Value>,
    /// The WorkloadEntry that `--publish-health` writes.
    pub auto_entry: Option<AutoEntry>,
    /// Fields that nothing reads: `VirtualService.spec.http[].foo`.
    pub unread: BTreeSet<String>,
    /// The objects as last understood, for the next reload.
    pub objects: Store,
}

/// Objects by kind, namespace and name, as they were last understood.
#[derive(Debug, Clone, Default)]
pub struct Store {}

/// The WorkloadEntry of an auto-registered proxy.
#[derive(Debug, Clone, PartialEq)]
pub struct AutoEntry {
    /// Namespace of the entry.
    pub namespace: String,
    /// Name of the entry: `GROUP-IP[-NETWORK]`.
    pub name: String,
    /// The whole object without `status`.
    pub object: serde_json::Value,
}

impl AutoEntry {
    /// The object with its `Healthy` condition, as one YAML (JSON) document. `now` is RFC 3339.
    pub fn document(&self, healthy: bool, message: &str, now: &str) -> String {
        let mut object = self.object.clone();
        object["status"] = serde_json::json!({"conditions": [{
            "type": "Healthy",
            "status": if healthy { "True" } else { "False" },
            "lastProbeTime": now,
            "lastTransitionTime": now,
            "message": message,
        }]});
        format!("{object}\n")
    }
}

/// Compiles what `inputs` say for the proxy that they name.
///
/// # Errors
/// Only when nothing can be served: the proxy's identity is unknown. What is wrong with single objects is in
/// `model.rejects`; with `previous` their last good version stays.
pub fn from_yaml(inputs: &Inputs, previous: Option<&Loaded>) -> Result<Loaded, Vec<Reject>> {
    let _ = (inputs, previous);
    Err(vec![Reject {
        resource: "Node".to_owned(),
        place: None,
        field: String::new(),
        reason: "YAML is not loaded yet".to_owned(),
        severity: Severity::Error,
        code: None,
    }])
}

/// Everything that is wrong with the objects, whatever proxy they are for.
pub fn validate(sources: &[Source]) -> Vec<Reject> {
    let _ = sources;
    Vec::new()
}
