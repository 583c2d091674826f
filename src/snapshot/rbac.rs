//! RBAC: compiled policies, looked at in name order; the first that matches decides.
//!
//! Compiled once, read on every request: no allocation, and the texts that Istio makes most (whole identities, namespaces,
//! presence) are compared without running an expression.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_config::model::{self, RbacAction};
use regex::bytes::Regex;

use super::chain_match::lower;
use super::metadata::MetadataMatch;
use super::{Attributes, HeaderMatch, Name, StringMatch, template, url_path};
use crate::tls::Peer;

/// Filter state that holds the peer's identity on HBONE connections.
const PEER_PRINCIPAL: &str = "io.istio.peer_principal";

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

/// Policies with what a match means.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) action: RbacAction,
    /// In name order.
    pub(super) policies: Box<[Policy]>,
}

/// One policy: any permission and any principal.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) name: Name,
    pub(super) permissions: Box<[Condition]>,
    pub(super) principals: Box<[Condition]>,
}

/// A permission or a principal.
#[derive(Debug)]
pub(super) enum Condition {
    Any,
    And(Box<[Condition]>),
    Or(Box<[Condition]>),
    Not(Box<Condition>),
    Header(HeaderMatch),
    UrlPath(StringMatch),
    Template(Box<Regex>),
    Metadata(Box<MetadataMatch>),
    DestinationIp(IpNet),
    DestinationPort(u16),
    ServerName(StringMatch),
    /// `None`: any authenticated peer.
    Authenticated(Option<StringMatch>),
    DirectRemoteIp(IpNet),
    RemoteIp(IpNet),
    PeerPrincipal(StringMatch),
}

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
    /// Compiles. The error says which policy cannot be evaluated and why; whoever gets one lets nothing pass.
    pub fn compile(said: &model::Rbac) -> Result<Self, String> {
        Ok(Self {
            rules: said.rules.as_ref().map(Rules::compile).transpose()?,
            shadow: said.shadow_rules.as_ref().map(Rules::compile).transpose()?,
            shadow_prefix: said.shadow_rules_stat_prefix.as_str().into(),
            stat_prefix: said.stat_prefix.as_str().into(),
        })
    }

    /// Lets nothing pass: stands where a policy could not be compiled.
    pub(super) fn closed() -> Self {
        Self { rules: Some(Rules { action: RbacAction::Allow, policies: Box::default() }), ..Self::default() }
    }

    /// Judges.
    pub fn check(&self, attributes: &Attributes<'_>) -> Verdict<'_> {
        let (allowed, policy) = self.rules.as_ref().map_or((true, None), |rules| rules.judge(attributes));
        Verdict { allowed, policy, shadow: self.shadow.as_ref().map(|rules| rules.judge(attributes)) }
    }
}

impl Rules {
    fn compile(said: &model::RbacRules) -> Result<Self, String> {
        let policy = |(name, policy): (&Name, &model::RbacPolicy)| {
            Policy::compile(name, policy).map_err(|why| format!("{name}: {why}"))
        };
        Ok(Self { action: said.action, policies: said.policies.iter().map(policy).collect::<Result<_, _>>()? })
    }

    fn judge(&self, attributes: &Attributes<'_>) -> (bool, Option<&Name>) {
        let matched = self.policies.iter().find(|policy| policy.holds(attributes)).map(|policy| &policy.name);
        let allowed = match self.action {
            RbacAction::Allow => matched.is_some(),
            RbacAction::Deny => matched.is_none(),
            RbacAction::Log => true,
        };
        (allowed, matched)
    }
}

impl Policy {
    fn compile(name: &Name, said: &model::RbacPolicy) -> Result<Self, String> {
        Ok(Self {
            name: Arc::clone(name),
            permissions: said.permissions.iter().map(permission).collect::<Result<_, _>>()?,
            principals: said.principals.iter().map(principal).collect::<Result<_, _>>()?,
        })
    }

    pub(super) fn holds(&self, attributes: &Attributes<'_>) -> bool {
        self.permissions.iter().any(|c| c.holds(attributes)) && self.principals.iter().any(|c| c.holds(attributes))
    }
}

fn permission(said: &model::Permission) -> Result<Condition, String> {
    use model::Permission as P;
    Ok(match said {
        P::Any => Condition::Any,
        P::And(of) => Condition::and(of.iter().map(permission).collect::<Result<_, _>>()?),
        P::Or(of) => Condition::or(of.iter().map(permission).collect::<Result<_, _>>()?),
        P::Not(of) => Condition::Not(Box::new(permission(of)?)),
        P::Header(header) => Condition::Header(HeaderMatch::compile(header)?),
        P::UrlPath(text) => Condition::UrlPath(StringMatch::compile(text)?),
        P::UriTemplate(text) => Condition::Template(Box::new(template::compile(text)?)),
        P::DestinationIp(net) => Condition::DestinationIp(*net),
        P::DestinationPort(port) => Condition::DestinationPort(*port),
        P::ServerName(text) => Condition::ServerName(StringMatch::compile(text)?),
        P::Metadata(metadata) => Condition::Metadata(Box::new(MetadataMatch::compile(metadata)?)),
    })
}

fn principal(said: &model::Principal) -> Result<Condition, String> {
    use model::Principal as P;
    Ok(match said {
        P::Any => Condition::Any,
        P::And(of) => Condition::and(of.iter().map(principal).collect::<Result<_, _>>()?),
        P::Or(of) => Condition::or(of.iter().map(principal).collect::<Result<_, _>>()?),
        P::Not(of) => Condition::Not(Box::new(principal(of)?)),
        P::Authenticated(name) => Condition::Authenticated(name.as_ref().map(StringMatch::compile).transpose()?),
        P::DirectRemoteIp(net) => Condition::DirectRemoteIp(*net),
        P::RemoteIp(net) => Condition::RemoteIp(*net),
        P::Header(header) => Condition::Header(HeaderMatch::compile(header)?),
        P::UrlPath(text) => Condition::UrlPath(StringMatch::compile(text)?),
        P::Metadata(metadata) => Condition::Metadata(Box::new(MetadataMatch::compile(metadata)?)),
        P::FilterState(key, text) if key == PEER_PRINCIPAL => Condition::PeerPrincipal(StringMatch::compile(text)?),
        P::FilterState(key, _) => return Err(format!("filter state {key} is not supported")),
    })
}

impl Condition {
    /// Istio wraps nearly everything in lists of one.
    fn and(mut of: Vec<Self>) -> Self {
        if of.len() == 1 { of.remove(0) } else { Self::And(of.into()) }
    }

    fn or(mut of: Vec<Self>) -> Self {
        if of.len() == 1 { of.remove(0) } else { Self::Or(of.into()) }
    }

    /// Whether it holds. What is absent satisfies nothing, so that a negation of it does.
    pub(super) fn holds(&self, attributes: &Attributes<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::And(of) => of.iter().all(|c| c.holds(attributes)),
            Self::Or(of) => of.iter().any(|c| c.holds(attributes)),
            Self::Not(of) => !of.holds(attributes),
            Self::Header(header) => {
                attributes.request.map_or_else(|| header.judge_absent(), |request| header.matches(request))
            }
            Self::UrlPath(text) => {
                attributes.request.is_some_and(|request| text.matches(url_path(request.path).as_bytes()))
            }
            Self::Template(template) => {
                attributes.request.is_some_and(|request| template.is_match(url_path(request.path).as_bytes()))
            }
            Self::Metadata(metadata) => metadata.matches(attributes.metadata),
            Self::DestinationIp(net) => contains(net, attributes.destination.ip()),
            Self::DestinationPort(port) => attributes.destination.port() == *port,
            Self::ServerName(text) => text.matches(lower(attributes.sni.unwrap_or_default()).as_bytes()),
            Self::Authenticated(None) => attributes.peer.is_some_and(is_authenticated),
            Self::Authenticated(Some(name)) => attributes.peer.is_some_and(|peer| has_name(peer, name)),
            Self::DirectRemoteIp(net) => contains(net, attributes.direct_remote.ip()),
            Self::RemoteIp(net) => contains(net, attributes.remote_ip),
            Self::PeerPrincipal(name) => {
                attributes.peer.and_then(|peer| peer.uri_sans.first()).is_some_and(|uri| name.matches(uri.as_bytes()))
            }
        }
    }
}

fn contains(net: &IpNet, ip: IpAddr) -> bool {
    net.contains(&ip.to_canonical())
}

/// A TLS connection alone proves nothing: a certificate must have been presented.
pub(super) fn is_authenticated(peer: &Peer) -> bool {
    peer.has_certificate() || !peer.uri_sans.is_empty() || !peer.dns_sans.is_empty()
}

/// The principal of a peer is its URI names; without one its DNS names; without these its subject.
fn has_name(peer: &Peer, wanted: &StringMatch) -> bool {
    let names = if peer.uri_sans.is_empty() { &peer.dns_sans } else { &peer.uri_sans };
    if names.is_empty() {
        return is_authenticated(peer) && wanted.matches(peer.subject.as_bytes());
    }
    names.iter().any(|name| wanted.matches(name.as_bytes()))
}
