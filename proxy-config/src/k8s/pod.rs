//! `v1.Pod`.

use serde::Deserialize;

/// A Pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pod {
    /// What was asked for.
    pub spec: PodSpec,
    /// What became of it.
    pub status: PodStatus,
}

impl Pod {
    /// Its addresses, the main one first.
    pub fn ips(&self) -> impl Iterator<Item = &str> {
        let main = Some(self.status.pod_ip.as_str()).filter(|ip| !ip.is_empty());
        let others = self.status.pod_ips.iter().map(|p| p.ip.as_str()).filter(move |ip| Some(*ip) != main);
        main.into_iter().chain(others)
    }

    /// Whether its `Ready` condition holds; without conditions a pod counts as ready, since files seldom carry them.
    pub fn is_ready(&self) -> bool {
        self.status.conditions.iter().find(|c| c.kind == "Ready").is_none_or(|c| c.status == "True")
    }

    /// Number of a named container port.
    pub fn port(&self, name: &str) -> Option<u16> {
        let mut ports = self.spec.containers.iter().flat_map(|c| &c.ports);
        ports.find(|p| p.name == name && matches!(p.protocol.as_str(), "" | "TCP")).map(|p| p.container_port)
    }
}

/// `PodSpec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// Kubernetes node.
    pub node_name: String,
    /// Service account.
    pub service_account_name: String,
    /// Containers.
    pub containers: Vec<Container>,
    /// Host name.
    pub hostname: String,
    /// Headless Service that names it.
    pub subdomain: String,
    /// The pod has its node's addresses.
    pub host_network: bool,
}

/// `Container`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    /// Ports.
    pub ports: Vec<ContainerPort>,
}

/// `ContainerPort`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// Name.
    pub name: String,
    /// Number.
    pub container_port: u16,
    /// `TCP` (default).
    pub protocol: String,
}

/// `PodStatus`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// `Running`, `Succeeded`, `Failed`, ...
    pub phase: String,
    /// Main address.
    #[serde(rename = "podIP")]
    pub pod_ip: String,
    /// All addresses.
    #[serde(rename = "podIPs")]
    pub pod_ips: Vec<PodIp>,
    /// Conditions.
    pub conditions: Vec<PodCondition>,
}

/// `PodIP`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PodIp {
    /// Address.
    pub ip: String,
}

/// `PodCondition`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodCondition {
    /// `Ready`, ...
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False`, `Unknown`.
    pub status: String,
}
