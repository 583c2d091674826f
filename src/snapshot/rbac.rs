//! RBAC: compiled policies, looked at in name order.

use std::sync::Arc;

use super::{Attributes, Name};

/// A compiled `envoy.filters.{http,network}.rbac`.
#[derive(Debug, Default)]
pub struct Rbac {
    pub(super) rules: Option<Rules>,
    pub(super) shadow: Option<Rules>,
    /// Prefix of shadow results.
    pub shadow_prefix: Name,
    /// Statistics prefix (TCP).
    pub stat_prefix: Name,
}

#[derive(Debug)]
pub(super) struct Rules;

/// What policy says about a connection or a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict<'r> {
    /// May it pass.
    pub allowed: bool,
    /// The policy that decided; `None` when none matched.
    pub policy: Option<&'r Name>,
    /// What the shadow rules say: allowed, and the policy that matched.
    pub shadow: Option<(bool, Option<&'r Name>)>,
}

impl Verdict<'_> {
    /// `rbac_access_denied_matched_policy[NAME]`, with `none` when no policy matched.
    pub fn details(&self) -> String {
        format!("rbac_access_denied_matched_policy[{}]", self.policy.map_or("none", |name| name))
    }
}

impl Rbac {
    /// Judges.
    pub fn check(&self, _attributes: &Attributes<'_>) -> Verdict<'_> {
        let allowed = self.rules.is_none() && self.shadow.is_none();
        Verdict { allowed, policy: None, shadow: None }
    }
}

/// One for all chains without policy.
pub(super) fn none() -> Arc<Rbac> {
    Arc::default()
}
