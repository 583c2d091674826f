//! `MeshNetworks`: which addresses are on which network, and the gateways between networks.

use std::collections::BTreeMap;

use serde::Deserialize;

/// `istio.mesh.v1alpha1.MeshNetworks`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshNetworks {
    /// Networks by name.
    pub networks: BTreeMap<String, Network>,
}

/// `Network`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Network {
    /// Which endpoints are on it.
    pub endpoints: Vec<NetworkEndpoints>,
    /// How others reach it.
    pub gateways: Vec<NetworkGateway>,
}

/// `Network.NetworkEndpoints`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkEndpoints {
    /// Addresses.
    pub from_cidr: String,
    /// A cluster's endpoints.
    pub from_registry: String,
}

/// `Network.IstioNetworkGateway`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkGateway {
    /// Service whose addresses are the gateway's.
    pub registry_service_name: String,
    /// Address.
    pub address: String,
    /// Port.
    pub port: u16,
    /// Where it is.
    pub locality: String,
}
