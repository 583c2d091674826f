//! The model: what was said, as plain data.
//!
//! One xDS resource is one entry; the file compiler makes the same entries under the same names. The shape is
//! Envoy's, closed: what is not in these types is either refused by name or listed as inert, never half kept.
//! Nothing here decides anything at run time; `snapshot` in the proxy crate compiles it.

mod cluster;
mod endpoint;
mod filter;
mod listener;
mod matcher;
mod pieces;
mod policy;
mod route;
mod shared;
mod tls;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;

pub use cluster::*;
pub use endpoint::*;
pub use filter::*;
pub use listener::*;
pub use matcher::*;
pub use pieces::Pieces;
pub use policy::*;
pub use route::*;
pub use shared::Shared;
pub use tls::*;

/// A resource name; cheap to clone, shared by everything that refers to it.
pub type Name = Arc<str>;

/// A whole configuration as one proxy sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Model {
    /// Listeners by name (`virtualInbound`, `0.0.0.0_80`, ...).
    pub listeners: Shared<BTreeMap<Name, Arc<Listener>>>,
    /// Route tables by RDS name (`80`, `host:port`). Inline tables live in their connection manager.
    pub routes: Shared<BTreeMap<Name, Arc<RouteTable>>>,
    /// Clusters by name (`outbound|80||host`, `inbound|8080||`, `PassthroughCluster`, ...).
    pub clusters: Shared<BTreeMap<Name, Arc<Cluster>>>,
    /// Load assignments by EDS service name.
    pub endpoints: Pieces<Arc<Endpoints>>,
    /// Mesh names for DNS (NDS).
    pub names: Shared<BTreeMap<Name, NameInfo>>,
    /// Objects that could not be served as they were said; see `inputs.md`, "A bad or not yet supported object".
    #[serde(skip)]
    pub rejects: Vec<Reject>,
    /// Things that are accepted and have no effect here, by kind and name, for `/config_dump` and a metric.
    #[serde(skip)]
    pub inert: BTreeSet<String>,
    /// Istio's metrics are kept where no `istio.stats` filter asks for them: nothing was said about metrics at all, as
    /// without a control plane nobody would say it. No resource has it.
    #[serde(skip)]
    pub default_metrics: bool,
}

/// One row of the mesh's name table (`istio.networking.nds.v1.NameTable.NameInfo`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct NameInfo {
    /// Addresses to answer with.
    pub ips: Vec<String>,
    /// Registry the name comes from (`Kubernetes`, `External`).
    pub registry: String,
    /// First label, for Kubernetes Services.
    pub shortname: String,
    /// Namespace, for Kubernetes Services.
    pub namespace: String,
}

/// How much a refused object endangers: decides what `inputs.md` says happens in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Severity {
    /// Accepted; worth a line.
    Warning,
    /// The smallest unit is left out or answers 501.
    Error,
    /// A security kind: the chains it selects must not serve.
    Security,
}

/// A configuration object, or part of one, that is not served as said.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Reject {
    /// What it is: `AuthorizationPolicy ns/name` or `Listener virtualInbound`.
    pub resource: String,
    /// `file:line:column`, when it came from a file.
    pub place: Option<String>,
    /// Field path inside the object, `spec.rules[0].to[0].operation.methods`.
    pub field: String,
    /// What was wrong and what was expected.
    pub reason: String,
    /// What follows from it.
    pub severity: Severity,
    /// Istio's analyzer code (`IST0101`), when one fits.
    pub code: Option<&'static str>,
}

impl std::fmt::Display for Reject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        write!(f, "{}", self.resource)?;
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.reason)
    }
}
