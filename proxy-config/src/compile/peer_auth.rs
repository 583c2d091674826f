//! `PeerAuthentication`: which mTLS mode a workload serves on a port.
//!
//! Asked for the proxy itself (inbound chains) and for the servers that a client talks to (automatic mTLS).

use std::collections::BTreeMap;

use crate::istio::common::Selector;
use crate::istio::peer_authentication::{Mode, PeerAuthentication};

/// An object with its name; a list of these is in conflict order (oldest first).
#[derive(Debug, Clone, Copy)]
pub struct Policy<'a> {
    /// Namespace of the object.
    pub namespace: &'a str,
    /// Name of the object.
    pub name: &'a str,
    /// What it says.
    pub spec: &'a PeerAuthentication,
}

/// Mode of a workload: one for all ports, and exceptions. Never holds [`Mode::Unset`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// All ports that are not named.
    pub mode: Mode,
    /// Named workload ports.
    pub ports: BTreeMap<u16, Mode>,
}

impl Effective {
    /// Mode of a workload port.
    pub fn port(&self, port: u16) -> Mode {
        self.ports.get(&port).copied().unwrap_or(self.mode)
    }
}

/// Mode of a workload with these labels.
pub fn effective(
    policies: &[Policy<'_>],
    root_namespace: &str,
    namespace: &str,
    labels: &BTreeMap<String, String>,
) -> Effective {
    let inherited = namespace_mode(policies, root_namespace, namespace);
    // A selector in the root namespace selects nothing, not even the workloads there.
    let workload = policies.iter().find(|p| {
        p.namespace == namespace && namespace != root_namespace && selector(p.spec).is_some_and(|s| s.selects(labels))
    });
    let Some(workload) = workload else {
        return Effective { mode: inherited, ports: BTreeMap::new() };
    };
    let mode = or(workload.spec.mtls.map_or(Mode::Unset, |m| m.mode), inherited);
    let ports = workload.spec.port_level_mtls.iter().map(|(port, m)| (*port, or(m.mode, mode))).collect();
    Effective { mode, ports }
}

/// Mode of a namespace, without workload policies: the mesh's where the namespace says nothing.
pub fn namespace_mode(policies: &[Policy<'_>], root_namespace: &str, namespace: &str) -> Mode {
    let level = |namespace: &str| {
        let found = policies.iter().find(|p| p.namespace == namespace && selector(p.spec).is_none());
        found.and_then(|p| p.spec.mtls).map_or(Mode::Unset, |m| m.mode)
    };
    let mesh = or(level(root_namespace), Mode::Permissive);
    if namespace == root_namespace { mesh } else { or(level(namespace), mesh) }
}

/// An empty selector counts as none.
fn selector(spec: &PeerAuthentication) -> Option<&Selector> {
    spec.selector.as_ref().filter(|s| !s.match_labels.is_empty())
}

fn or(mode: Mode, inherited: Mode) -> Mode {
    if mode == Mode::Unset { inherited } else { mode }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::peer_authentication::MutualTls;

    fn policy(selector: Option<(&str, &str)>, mode: Mode, ports: &[(u16, Mode)]) -> PeerAuthentication {
        PeerAuthentication {
            selector: selector.map(|(k, v)| Selector { match_labels: BTreeMap::from([(k.to_owned(), v.to_owned())]) }),
            mtls: Some(MutualTls { mode }),
            port_level_mtls: ports.iter().map(|(p, mode)| (*p, MutualTls { mode: *mode })).collect(),
        }
    }

    fn labels() -> BTreeMap<String, String> {
        BTreeMap::from([("app".to_owned(), "a".to_owned())])
    }

    #[test]
    fn levels_inherit() {
        let mesh = policy(None, Mode::Strict, &[]);
        let namespace = policy(None, Mode::Unset, &[]);
        let workload = policy(Some(("app", "a")), Mode::Unset, &[(80, Mode::Disable), (81, Mode::Unset)]);
        let all = [
            Policy { namespace: "root", name: "m", spec: &mesh },
            Policy { namespace: "n", name: "n", spec: &namespace },
            Policy { namespace: "n", name: "w", spec: &workload },
        ];
        let effective = effective(&all, "root", "n", &labels());
        assert_eq!(effective.mode, Mode::Strict);
        assert_eq!(
            (effective.port(80), effective.port(81), effective.port(82)),
            (Mode::Disable, Mode::Strict, Mode::Strict)
        );
    }

    #[test]
    fn a_selector_in_the_root_namespace_selects_nothing() {
        let workload = policy(Some(("app", "a")), Mode::Strict, &[]);
        let all = [Policy { namespace: "root", name: "w", spec: &workload }];
        assert_eq!(effective(&all, "root", "root", &labels()).mode, Mode::Permissive);
        assert_eq!(effective(&all, "root", "n", &labels()).mode, Mode::Permissive);
    }

    #[test]
    fn the_first_of_a_level_wins() {
        let (strict, disable) = (policy(None, Mode::Strict, &[]), policy(None, Mode::Disable, &[]));
        let all =
            [Policy { namespace: "n", name: "a", spec: &strict }, Policy { namespace: "n", name: "b", spec: &disable }];
        assert_eq!(effective(&all, "root", "n", &labels()).mode, Mode::Strict);
    }
}
