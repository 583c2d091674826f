//! `AuthorizationPolicy` → RBAC filters, as istiod builds them for a sidecar.
//!
//! Decides which policies select a workload, and what they become on an HTTP or TCP chain: one filter an action, in
//! the order CUSTOM, AUDIT, DENY, ALLOW. Never evaluates anything.

use std::collections::{BTreeMap, BTreeSet};

use super::authz_rule::{self, Refusal, RuleContext};
use super::trust_domain::TrustDomains;
use crate::istio::authorization_policy::{Action, AuthorizationPolicy};
use crate::istio::common::Selector;
use crate::model::{Name, Permission, Principal, Rbac, RbacAction, RbacPolicy, RbacRules, Reject, Severity};

/// A policy with its name.
#[derive(Debug, Clone, Copy)]
pub struct Policy<'a> {
    /// Namespace of the object.
    pub namespace: &'a str,
    /// Name of the object.
    pub name: &'a str,
    /// `istio.io/dry-run` of the object.
    pub dry_run: bool,
    /// What it says.
    pub spec: &'a AuthorizationPolicy,
}

/// The workload that policies are compiled for.
#[derive(Debug, Clone, Copy)]
pub struct Workload<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its labels.
    pub labels: &'a BTreeMap<String, String>,
    /// Policies of this namespace apply to every namespace.
    pub root_namespace: &'a str,
    /// Known trust domains.
    pub domains: &'a TrustDomains,
    /// External authorizers that the mesh declares.
    pub providers: &'a BTreeSet<String>,
}

/// What a chain carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Requests.
    Http,
    /// Bytes.
    Tcp,
}

/// Filters of one chain.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filters {
    /// For CUSTOM; they stand before token validation.
    pub custom: Vec<Rbac>,
    /// AUDIT, DENY, ALLOW in this order; they stand after token validation.
    pub rbac: Vec<Rbac>,
    /// Rules that could not be compiled: the chain must not serve.
    pub rejects: Vec<Reject>,
}

/// `istio.io/dry-run` as istiod reads it; anything that is no boolean is off.
pub fn dry_run(annotation: Option<&str>) -> bool {
    matches!(annotation, Some("1" | "t" | "T" | "true" | "TRUE" | "True"))
}

/// The filters that `policies` make for `workload`.
pub fn filters(policies: &[Policy<'_>], workload: &Workload<'_>, transport: Transport) -> Filters {
    let selected: Vec<&Policy<'_>> = policies.iter().filter(|p| selects(p, workload)).collect();
    let of = |action: Action| selected.iter().copied().filter(move |p| p.spec.action == action);
    let mut out = Filters::default();
    custom(of(Action::Custom), workload, transport, &mut out);
    for (action, means) in
        [(Action::Audit, RbacAction::Log), (Action::Deny, RbacAction::Deny), (Action::Allow, RbacAction::Allow)]
    {
        if let Some(rbac) = one_action(of(action), means, workload, transport, &mut out.rejects) {
            out.rbac.push(rbac);
        }
    }
    out
}

fn selects(policy: &Policy<'_>, workload: &Workload<'_>) -> bool {
    let in_scope = policy.namespace == workload.namespace || policy.namespace == workload.root_namespace;
    in_scope
        && policy.spec.target_ref.is_none()
        && policy.spec.target_refs.is_empty()
        && policy.spec.selector.as_ref().is_none_or(|s: &Selector| s.selects(workload.labels))
}

fn one_action<'a>(
    policies: impl Iterator<Item = &'a Policy<'a>>,
    action: RbacAction,
    workload: &Workload<'_>,
    transport: Transport,
    rejects: &mut Vec<Reject>,
) -> Option<Rbac> {
    let mut enforced: Option<BTreeMap<Name, RbacPolicy>> = None;
    let mut shadow: Option<BTreeMap<Name, RbacPolicy>> = None;
    for policy in policies {
        let rules = if policy.dry_run { &mut shadow } else { &mut enforced };
        rules.get_or_insert_default().extend(compile(policy, action, workload, transport, rejects));
    }
    if enforced.is_none() && shadow.is_none() {
        return None;
    }
    // istiod asks the shadow rules for their action even when there are none, and none reads as ALLOW.
    let shadow_action = if shadow.is_some() { action } else { RbacAction::Allow };
    let prefix = match shadow_action {
        RbacAction::Allow => "istio_dry_run_allow_",
        RbacAction::Deny => "istio_dry_run_deny_",
        RbacAction::Log => "",
    };
    Some(Rbac {
        rules: enforced.map(|policies| RbacRules { action, policies }),
        shadow_rules: shadow.map(|policies| RbacRules { action, policies }),
        shadow_rules_stat_prefix: prefix.to_owned(),
        stat_prefix: stat_prefix(transport),
    })
}

fn stat_prefix(transport: Transport) -> String {
    if transport == Transport::Tcp { "tcp.".to_owned() } else { String::new() }
}

/// CUSTOM policies: one unknown provider, or several providers at once, deny what the rules match; a known provider
/// cannot be asked yet, so the policy is refused.
fn custom<'a>(
    policies: impl Iterator<Item = &'a Policy<'a>>,
    workload: &Workload<'_>,
    transport: Transport,
    out: &mut Filters,
) {
    let mut by_provider: BTreeMap<&str, Vec<&Policy<'_>>> = BTreeMap::new();
    for policy in policies {
        let provider = policy.spec.provider.as_ref().map_or("", |p| p.name.as_str());
        by_provider.entry(provider).or_default().push(policy);
    }
    let several = by_provider.len() > 1;
    for (provider, policies) in by_provider {
        if !several && workload.providers.contains(provider) {
            out.rejects.extend(policies.iter().map(|p| {
                reject(p, "spec.provider.name", &format!("external authorization by {provider} is not supported yet"))
            }));
            continue;
        }
        let mut denied = BTreeMap::new();
        for policy in policies.into_iter().filter(|p| !p.dry_run) {
            for (name, rule) in compile(policy, RbacAction::Deny, workload, transport, &mut out.rejects) {
                let name = if provider.is_empty() {
                    format!("istio-ext-authz-{name}-deny-due-to-bad-CUSTOM-action")
                } else {
                    format!("istio-ext-authz-{provider}-{name}-deny-due-to-bad-CUSTOM-action")
                };
                denied.insert(Name::from(name), rule);
            }
        }
        out.custom.push(Rbac {
            rules: Some(RbacRules { action: RbacAction::Deny, policies: denied }),
            stat_prefix: stat_prefix(transport),
            ..Rbac::default()
        });
    }
}

/// Rules of one policy under istiod's names.
fn compile(
    policy: &Policy<'_>,
    action: RbacAction,
    workload: &Workload<'_>,
    transport: Transport,
    rejects: &mut Vec<Reject>,
) -> Vec<(Name, RbacPolicy)> {
    let name = |index: usize| Name::from(format!("ns[{}]-policy[{}]-rule[{index}]", policy.namespace, policy.name));
    if policy.spec.rules.is_empty() {
        return vec![(name(0), never())];
    }
    let context = RuleContext {
        namespace: policy.namespace,
        domains: workload.domains,
        action,
        tcp: transport == Transport::Tcp,
    };
    let mut out = Vec::new();
    for (index, rule) in policy.spec.rules.iter().enumerate() {
        let Some(rule) = rule else { continue };
        match authz_rule::compile(rule, context) {
            Ok(compiled) => out.push((name(index), compiled)),
            Err(Refusal::HttpOnly(_)) => {}
            Err(Refusal::Invalid(field, reason)) => {
                rejects.push(reject(policy, &format!("spec.rules[{index}].{field}"), &reason));
            }
        }
    }
    out
}

/// Matches nothing: what a policy without rules says.
fn never() -> RbacPolicy {
    RbacPolicy {
        permissions: vec![Permission::Not(Box::new(Permission::Any))],
        principals: vec![Principal::Not(Box::new(Principal::Any))],
    }
}

fn reject(policy: &Policy<'_>, field: &str, reason: &str) -> Reject {
    Reject {
        resource: format!("AuthorizationPolicy {}/{}", policy.namespace, policy.name),
        place: None,
        field: field.to_owned(),
        reason: reason.to_owned(),
        severity: Severity::Security,
        code: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::authorization_policy::{ExtensionProvider, From, Operation, Rule, Source, To};
    use crate::model::{HeaderMatcher, HeaderValueMatch, StringMatcher};

    fn strings(of: &[&str]) -> Vec<String> {
        of.iter().map(|s| (*s).to_owned()).collect()
    }

    fn rule(principals: &[&str], methods: &[&str]) -> Option<Rule> {
        Some(Rule {
            from: vec![From { source: Some(Source { principals: strings(principals), ..Source::default() }) }],
            to: vec![To { operation: Some(Operation { methods: strings(methods), ..Operation::default() }) }],
            when: Vec::new(),
        })
    }

    fn build(policies: &[AuthorizationPolicy], transport: Transport) -> Filters {
        let domains = TrustDomains::new("td", &[]);
        let labels = BTreeMap::from([("app".to_owned(), "a".to_owned())]);
        let providers = BTreeSet::from(["known".to_owned()]);
        let workload = Workload {
            namespace: "n",
            labels: &labels,
            root_namespace: "root",
            domains: &domains,
            providers: &providers,
        };
        let named: Vec<Policy<'_>> =
            policies.iter().map(|spec| Policy { namespace: "n", name: "p", dry_run: false, spec }).collect();
        filters(&named, &workload, transport)
    }

    #[test]
    fn http_rules_vanish_or_widen_on_tcp() {
        let allow = AuthorizationPolicy { rules: vec![rule(&["a"], &["GET"])], ..Default::default() };
        let deny = AuthorizationPolicy { action: Action::Deny, ..allow.clone() };
        let built = build(&[allow, deny], Transport::Tcp);
        let rules = |i: usize| built.rbac[i].rules.clone().expect("enforced");
        assert_eq!(rules(0).action, RbacAction::Deny);
        let widened = &rules(0).policies["ns[n]-policy[p]-rule[0]"];
        assert_eq!(widened.permissions, [Permission::And(vec![Permission::Any])]);
        assert!(rules(1).policies.is_empty(), "an ALLOW rule about methods allows no TCP");
    }

    #[test]
    fn fields_become_matchers() {
        let allow =
            AuthorizationPolicy { rules: vec![rule(&["cluster.local/ns/x/sa/y", "*"], &["*"])], ..Default::default() };
        let built = build(&[allow], Transport::Http);
        let policy = &built.rbac[0].rules.clone().expect("enforced").policies["ns[n]-policy[p]-rule[0]"];
        let name = |m| Principal::Authenticated(Some(m));
        assert_eq!(
            policy.principals,
            [Principal::And(vec![Principal::Or(vec![
                name(StringMatcher::exact("spiffe://td/ns/x/sa/y")),
                name(StringMatcher::regex(".+")),
            ])])]
        );
        let method = HeaderMatcher {
            name: ":method".to_owned(),
            value: HeaderValueMatch::Present(true),
            invert: false,
            treat_missing_as_empty: false,
        };
        assert_eq!(policy.permissions, [Permission::And(vec![Permission::Or(vec![Permission::Header(method)])])]);
    }

    #[test]
    fn no_rules_match_nothing() {
        let built = build(&[AuthorizationPolicy::default()], Transport::Http);
        assert_eq!(built.rbac[0].rules.clone().expect("enforced").policies["ns[n]-policy[p]-rule[0]"], never());
    }

    #[test]
    fn an_unknown_provider_denies_and_a_known_one_is_refused() {
        let custom = |name: &str| AuthorizationPolicy {
            action: Action::Custom,
            provider: Some(ExtensionProvider { name: name.to_owned() }),
            rules: vec![Some(Rule::default())],
            ..Default::default()
        };
        let unknown = build(&[custom("other")], Transport::Http);
        let rules = unknown.custom[0].rules.clone().expect("enforced");
        assert_eq!(rules.action, RbacAction::Deny);
        assert!(
            rules.policies.contains_key("istio-ext-authz-other-ns[n]-policy[p]-rule[0]-deny-due-to-bad-CUSTOM-action")
        );
        let known = build(&[custom("known")], Transport::Http);
        assert!(known.custom.is_empty());
        assert_eq!(known.rejects[0].severity, Severity::Security);
    }

    #[test]
    fn a_mistake_is_refused_not_widened() {
        let mut deny = AuthorizationPolicy { action: Action::Deny, ..Default::default() };
        deny.rules = vec![Some(Rule {
            from: vec![From { source: Some(Source { ip_blocks: strings(&["10.0.0"]), ..Source::default() }) }],
            ..Rule::default()
        })];
        assert_eq!(build(&[deny], Transport::Http).rejects.len(), 1);
    }
}
