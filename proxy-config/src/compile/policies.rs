//! All security objects that select the proxy, as the filters of its inbound chains.

use super::authz::{self, Transport, Workload};
use super::jwt;
use super::view::Policies;
use crate::istio::request_authentication::RequestAuthentication;
use crate::model::{Reject, Severity};

/// A RequestAuthentication with its name.
#[derive(Debug, Clone, Copy)]
pub struct TokenPolicy<'a> {
    /// Namespace of the object.
    pub namespace: &'a str,
    /// Name of the object.
    pub name: &'a str,
    /// What it says.
    pub spec: &'a RequestAuthentication,
}

/// Compiles what selects `workload`. An object that cannot be compiled makes the inbound side unusable; what can be
/// compiled is still there, for sight.
pub fn compile(
    policies: &[authz::Policy<'_>],
    tokens: &[TokenPolicy<'_>],
    workload: &Workload<'_>,
    rejects: &mut Vec<Reject>,
) -> Policies {
    let http = authz::filters(policies, workload, Transport::Http);
    let tcp = authz::filters(policies, workload, Transport::Tcp);
    let mut found = http.rejects;
    // The same mistake shows on both kinds of chain.
    found.extend(tcp.rejects.into_iter().filter(|r| !found.contains(r)).collect::<Vec<_>>());
    let unusable = found.iter().find(|r| r.severity == Severity::Security).map(|r| r.resource.clone());
    rejects.extend(found);
    Policies {
        http_custom: http.custom,
        jwt: jwt::filter(tokens.iter().filter(|t| selects(t, workload)).map(|t| t.spec)),
        http: http.rbac,
        tcp: tcp.custom.into_iter().chain(tcp.rbac).collect(),
        unusable,
    }
}

fn selects(token: &TokenPolicy<'_>, workload: &Workload<'_>) -> bool {
    (token.namespace == workload.namespace || token.namespace == workload.root_namespace)
        && token.spec.target_ref.is_none()
        && token.spec.target_refs.is_empty()
        && token.spec.selector.as_ref().is_none_or(|s| s.selects(workload.labels))
}
