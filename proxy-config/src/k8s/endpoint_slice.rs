//! `discovery.k8s.io/v1.EndpointSlice` and the older `v1.Endpoints`.

use serde::Deserialize;

/// An EndpointSlice; label `kubernetes.io/service-name` names its Service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    /// `IPv4`, `IPv6`, `FQDN`.
    pub address_type: String,
    /// Ports that every endpoint serves.
    pub ports: Vec<EndpointPort>,
    /// Endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// `EndpointPort`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointPort {
    /// Name of the service port.
    pub name: String,
    /// Port number; absent takes none.
    pub port: Option<u16>,
    /// `TCP` (default).
    pub protocol: String,
}

/// `Endpoint` of a slice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceEndpoint {
    /// Addresses of one and the same workload.
    pub addresses: Vec<String>,
    /// Readiness.
    pub conditions: Conditions,
    /// Host name of a StatefulSet's pod.
    pub hostname: String,
    /// Kubernetes node.
    pub node_name: String,
    /// Zone.
    pub zone: String,
    /// Pod behind it.
    pub target_ref: Option<TargetRef>,
}

/// `EndpointConditions`; absent counts as ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Conditions {
    /// Ready.
    pub ready: Option<bool>,
    /// Serving, even while it ends.
    pub serving: Option<bool>,
    /// Ends.
    pub terminating: Option<bool>,
}

/// `ObjectReference`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TargetRef {
    /// `Pod`.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
}

/// `v1.Endpoints`, named as its Service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoints {
    /// Groups of addresses with the same ports.
    pub subsets: Vec<Subset>,
}

/// `EndpointSubset`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Subset {
    /// Ready addresses.
    pub addresses: Vec<SubsetAddress>,
    /// Addresses that are not ready.
    pub not_ready_addresses: Vec<SubsetAddress>,
    /// Ports.
    pub ports: Vec<EndpointPort>,
}

/// `EndpointAddress`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SubsetAddress {
    /// Address.
    pub ip: String,
    /// Host name of a StatefulSet's pod.
    pub hostname: String,
    /// Kubernetes node.
    pub node_name: String,
    /// Pod behind it.
    pub target_ref: Option<TargetRef>,
}

impl Endpoints {
    /// The same as slices.
    pub fn slices(&self) -> Vec<EndpointSlice> {
        let endpoint = |a: &SubsetAddress, ready| SliceEndpoint {
            addresses: vec![a.ip.clone()],
            conditions: Conditions { ready: Some(ready), ..Conditions::default() },
            hostname: a.hostname.clone(),
            node_name: a.node_name.clone(),
            zone: String::new(),
            target_ref: a.target_ref.clone(),
        };
        let slice = |s: &Subset| EndpointSlice {
            address_type: String::new(),
            ports: s.ports.clone(),
            endpoints: s
                .addresses
                .iter()
                .map(|a| endpoint(a, true))
                .chain(s.not_ready_addresses.iter().map(|a| endpoint(a, false)))
                .collect(),
        };
        self.subsets.iter().map(slice).collect()
    }
}
