//! Objects as they were loaded: typed, each once, in the order in which conflicts are decided.
//!
//! [`documents`] finds the objects in the texts, [`read`] gives them their types. What cannot be read is told with its
//! place; a security object that cannot be read is remembered as [`Broken`], because the workloads that it was meant
//! for must not serve without it.

mod documents;
mod read;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::istio::authorization_policy::AuthorizationPolicy;
use crate::istio::destination_rule::DestinationRule;
use crate::istio::mesh_config::MeshConfig;
use crate::istio::mesh_networks::MeshNetworks;
use crate::istio::peer_authentication::PeerAuthentication;
use crate::istio::request_authentication::RequestAuthentication;
use crate::istio::service_entry::ServiceEntry;
use crate::istio::sidecar::Sidecar;
use crate::istio::telemetry::Telemetry;
use crate::istio::virtual_service::VirtualService;
use crate::istio::workload_entry::WorkloadEntry;
use crate::istio::workload_group::WorkloadGroup;
use crate::k8s;

pub(crate) use documents::{Document, Documents, Key};
pub(crate) use read::{Reading, read};

/// A typed object.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Object<T> {
    /// Name and labels.
    pub(crate) meta: k8s::Meta,
    /// What it says.
    pub(crate) spec: Arc<T>,
}

/// A WorkloadEntry with the health that its status tells.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Entry {
    /// What it says.
    pub(crate) spec: WorkloadEntry,
    /// False only when health checks are on and the last one did not succeed.
    pub(crate) healthy: bool,
}

/// A security object that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Broken {
    /// `Kind namespace/name`.
    pub(crate) resource: String,
    /// Its namespace; `None` when not even that is known: then it is meant for everyone.
    pub(crate) namespace: Option<String>,
    /// Labels that it selects; empty for a whole namespace or when they cannot be read.
    pub(crate) selector: BTreeMap<String, String>,
}

impl Broken {
    /// Whether it was meant for such a workload.
    pub(crate) fn selects(&self, namespace: &str, root: &str, labels: &BTreeMap<String, String>) -> bool {
        let reaches = self.namespace.as_deref().is_none_or(|n| n == namespace || n == root);
        reaches && self.selector.iter().all(|(k, v)| labels.get(k) == Some(v))
    }
}

/// Everything that was loaded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Objects {
    pub(crate) mesh: MeshConfig,
    pub(crate) networks: MeshNetworks,
    pub(crate) services: Vec<Object<k8s::Service>>,
    pub(crate) slices: Vec<Object<k8s::EndpointSlice>>,
    pub(crate) pods: Vec<Object<k8s::Pod>>,
    pub(crate) nodes: Vec<Object<()>>,
    pub(crate) namespaces: Vec<Object<()>>,
    pub(crate) virtual_services: Vec<Object<VirtualService>>,
    pub(crate) destination_rules: Vec<Object<DestinationRule>>,
    pub(crate) service_entries: Vec<Object<ServiceEntry>>,
    pub(crate) workload_entries: Vec<Object<Entry>>,
    pub(crate) workload_groups: Vec<Object<WorkloadGroup>>,
    pub(crate) sidecars: Vec<Object<Sidecar>>,
    pub(crate) authorization_policies: Vec<Object<AuthorizationPolicy>>,
    pub(crate) peer_authentications: Vec<Object<PeerAuthentication>>,
    pub(crate) request_authentications: Vec<Object<RequestAuthentication>>,
    pub(crate) telemetries: Vec<Object<Telemetry>>,
    pub(crate) broken: Vec<Broken>,
}

impl Objects {
    /// Oldest first; of equal age by name, then namespace, as istiod decides conflicts.
    fn sort(&mut self) {
        fn by_age<T>(objects: &mut [Object<T>]) {
            objects.sort_by(|a, b| {
                let key =
                    |o: &Object<T>| (o.meta.creation_timestamp.clone(), o.meta.name.clone(), o.meta.namespace.clone());
                key(a).cmp(&key(b))
            });
        }
        by_age(&mut self.services);
        by_age(&mut self.virtual_services);
        by_age(&mut self.destination_rules);
        by_age(&mut self.service_entries);
        by_age(&mut self.workload_entries);
        by_age(&mut self.sidecars);
        by_age(&mut self.authorization_policies);
        by_age(&mut self.peer_authentications);
        by_age(&mut self.request_authentications);
        by_age(&mut self.telemetries);
    }
}
