//! `v1.Service`.

use std::collections::BTreeMap;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer};

/// A Service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Service {
    /// What it says.
    pub spec: ServiceSpec,
}

/// `ServiceSpec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `ExternalName`.
    #[serde(rename = "type")]
    pub kind: String,
    /// VIP, `None` for headless, empty when not allocated.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    /// All VIPs.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// Target of `ExternalName`.
    pub external_name: String,
    /// Addresses from outside; they take no part in the mesh.
    #[serde(rename = "externalIPs")]
    pub external_ips: Vec<String>,
    /// Labels of its workloads; empty selects nothing.
    pub selector: BTreeMap<String, String>,
    /// Ports.
    pub ports: Vec<Port>,
    /// `Local` or `Cluster`.
    pub internal_traffic_policy: String,
    /// `PreferClose`, `PreferSameZone`, `PreferSameNode`.
    pub traffic_distribution: String,
    /// Endpoints count before they are ready.
    pub publish_not_ready_addresses: bool,
}

/// `ServicePort`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Port {
    /// Name.
    pub name: String,
    /// Number.
    pub port: u16,
    /// `TCP` (default), `UDP`, `SCTP`.
    pub protocol: String,
    /// Application protocol.
    pub app_protocol: String,
    /// Port of the workload.
    pub target_port: Option<IntOrString>,
}

/// A port by number or by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IntOrString {
    /// A number.
    Number(u16),
    /// A name.
    Name(String),
}

impl<'de> Deserialize<'de> for IntOrString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = IntOrString;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a port number or name")
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<IntOrString, E> {
                let number = u16::try_from(value).map_err(|_| E::custom(format!("{value} is no port number")))?;
                Ok(IntOrString::Number(number))
            }
            fn visit_str<E: Error>(self, value: &str) -> Result<IntOrString, E> {
                Ok(value.parse().map_or_else(|_| IntOrString::Name(value.to_owned()), IntOrString::Number))
            }
        }
        deserializer.deserialize_any(Either)
    }
}
