//! `AuthorizationPolicy` (`security.istio.io`).

use serde::Deserialize;

use super::common::{Selector, TargetRef};

/// Who may do what to the selected workloads.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AuthorizationPolicy {
    /// Workloads; absent selects the whole namespace.
    pub selector: Option<Selector>,
    /// Gateway-style attachment: such a policy never applies to a sidecar.
    pub target_ref: Option<TargetRef>,
    /// Gateway-style attachment: such a policy never applies to a sidecar.
    pub target_refs: Vec<TargetRef>,
    /// What a matching rule means.
    pub action: Action,
    /// Provider of a CUSTOM policy.
    pub provider: Option<ExtensionProvider>,
    /// Any rule matches; a null element matches nothing.
    pub rules: Vec<Option<Rule>>,
}

/// `action`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// A match allows; without one the request is denied.
    #[default]
    Allow,
    /// A match denies.
    Deny,
    /// A match is logged.
    Audit,
    /// A match asks an external authorizer.
    Custom,
}

/// The authorizer of a CUSTOM policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionProvider {
    /// A name of `meshConfig.extensionProviders`.
    pub name: String,
}

/// One rule: any `from`, any `to` and every `when`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    /// Sources; empty is any.
    pub from: Vec<From>,
    /// Operations; empty is any.
    pub to: Vec<To>,
    /// Conditions.
    pub when: Vec<Condition>,
}

/// An element of `from`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct From {
    /// The source.
    pub source: Option<Source>,
}

/// Peer and request identity; all fields that are set must hold.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Source {
    /// Peer identities without `spiffe://`.
    pub principals: Vec<String>,
    /// Peer identities that must not be.
    pub not_principals: Vec<String>,
    /// `iss/sub` of the request's token.
    pub request_principals: Vec<String>,
    /// Token identities that must not be.
    pub not_request_principals: Vec<String>,
    /// Peer namespaces.
    pub namespaces: Vec<String>,
    /// Peer namespaces that must not be.
    pub not_namespaces: Vec<String>,
    /// Peer service accounts, `sa` or `ns/sa`.
    pub service_accounts: Vec<String>,
    /// Peer service accounts that must not be.
    pub not_service_accounts: Vec<String>,
    /// Peer trust domains.
    pub trust_domains: Vec<String>,
    /// Peer trust domains that must not be.
    pub not_trust_domains: Vec<String>,
    /// Connection's source addresses.
    pub ip_blocks: Vec<String>,
    /// Connection's source addresses that must not be.
    pub not_ip_blocks: Vec<String>,
    /// Client addresses by x-forwarded-for or PROXY protocol.
    pub remote_ip_blocks: Vec<String>,
    /// Client addresses that must not be.
    pub not_remote_ip_blocks: Vec<String>,
}

/// An element of `to`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct To {
    /// The operation.
    pub operation: Option<Operation>,
}

/// What is asked for; all fields that are set must hold.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Operation {
    /// `:authority`, case-insensitive.
    pub hosts: Vec<String>,
    /// Hosts that must not be.
    pub not_hosts: Vec<String>,
    /// Workload ports.
    pub ports: Vec<String>,
    /// Workload ports that must not be.
    pub not_ports: Vec<String>,
    /// Methods.
    pub methods: Vec<String>,
    /// Methods that must not be.
    pub not_methods: Vec<String>,
    /// Paths: exact, `prefix*`, `*suffix` or template.
    pub paths: Vec<String>,
    /// Paths that must not be.
    pub not_paths: Vec<String>,
}

/// An element of `when`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// Attribute name.
    pub key: String,
    /// Any must match.
    pub values: Vec<String>,
    /// None may match.
    pub not_values: Vec<String>,
}
