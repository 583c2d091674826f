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
    And(Box<[Self]>),
    Or(Box<[Self]>),
    Not(Box<Self>),
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

    /// Whether a verdict may rest on headers or tokens; on more than who asks, from where, and for what.
    pub fn asks_head(&self) -> bool {
        let policies = self.rules.iter().flat_map(|rules| &rules.policies);
        policies.flat_map(|policy| policy.permissions.iter().chain(&policy.principals)).any(Condition::asks_head)
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

    fn asks_head(&self) -> bool {
        match self {
            Self::And(of) | Self::Or(of) => of.iter().any(Self::asks_head),
            Self::Not(of) => of.asks_head(),
            Self::Header(header) => header.is_of_header(),
            Self::Metadata(_) => true,
            Self::Any
            | Self::UrlPath(_)
            | Self::Template(_)
            | Self::DestinationIp(_)
            | Self::DestinationPort(_)
            | Self::ServerName(_)
            | Self::Authenticated(_)
            | Self::DirectRemoteIp(_)
            | Self::RemoteIp(_)
            | Self::PeerPrincipal(_) => false,
        }
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

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method};
    use proxy_config::model::{
        HeaderMatcher, HeaderValueMatch, MetadataMatcher, Permission, Principal, RbacPolicy, RbacRules, StringMatcher,
        ValueMatcher,
    };
    use serde_json::json;

    use super::*;
    use crate::snapshot::RequestView;

    fn rules(action: RbacAction, policies: &[(&str, Permission, Principal)]) -> RbacRules {
        let policy = |(name, permission, principal): &(&str, Permission, Principal)| {
            let policy = RbacPolicy { permissions: vec![permission.clone()], principals: vec![principal.clone()] };
            (Name::from(*name), policy)
        };
        RbacRules { action, policies: policies.iter().map(policy).collect() }
    }

    fn with(action: RbacAction, policies: &[(&str, Permission, Principal)]) -> Rbac {
        let said = model::Rbac { rules: Some(rules(action, policies)), ..model::Rbac::default() };
        Rbac::compile(&said).unwrap()
    }

    fn attributes() -> Attributes<'static> {
        Attributes {
            peer: None,
            direct_remote: "10.0.0.9:4000".parse().unwrap(),
            remote_ip: "192.0.2.1".parse().unwrap(),
            destination: "[::ffff:10.1.0.1]:8080".parse().unwrap(),
            sni: None,
            request: None,
            metadata: None,
        }
    }

    fn holds_permission(permission: Permission, attributes: &Attributes<'_>) -> bool {
        with(RbacAction::Allow, &[("p", permission, Principal::Any)]).check(attributes).allowed
    }

    fn holds_principal(principal: Principal, attributes: &Attributes<'_>) -> bool {
        with(RbacAction::Allow, &[("p", Permission::Any, principal)]).check(attributes).allowed
    }

    fn header(name: &str, value: &str) -> HeaderMatcher {
        let value = HeaderValueMatch::String(StringMatcher::exact(value));
        HeaderMatcher { name: name.into(), value, invert: false, treat_missing_as_empty: false }
    }

    #[test]
    fn what_a_verdict_may_rest_on() {
        let header = |name: &str| {
            let value = HeaderValueMatch::Present(true);
            Permission::Header(HeaderMatcher { name: name.into(), value, invert: false, treat_missing_as_empty: false })
        };
        for (permission, asks) in [
            (Permission::Any, false),
            (header(":method"), false),
            (header("x"), true),
            (Permission::Not(Box::new(Permission::And(vec![Permission::Any, header("x")]))), true),
        ] {
            let rbac = with(RbacAction::Deny, &[("p", permission, Principal::Any)]);
            assert_eq!(rbac.asks_head(), asks, "{rbac:?}");
        }
    }

    #[test]
    fn actions() {
        let any = |name| (name, Permission::Any, Principal::Any);
        let none = |name| (name, Permission::Not(Box::new(Permission::Any)), Principal::Any);
        for (action, policies, allowed, policy) in [
            (RbacAction::Allow, vec![], false, None),
            (RbacAction::Allow, vec![none("a"), any("b")], true, Some("b")),
            (RbacAction::Allow, vec![none("a")], false, None),
            (RbacAction::Deny, vec![], true, None),
            (RbacAction::Deny, vec![none("a")], true, None),
            (RbacAction::Deny, vec![any("d1"), any("d0")], false, Some("d0")),
            (RbacAction::Log, vec![any("l")], true, Some("l")),
            (RbacAction::Log, vec![], true, None),
        ] {
            let rbac = with(action, &policies);
            let verdict = rbac.check(&attributes());
            assert_eq!((verdict.allowed, verdict.policy.map(|n| &**n)), (allowed, policy), "{action:?} {policies:?}");
            assert_eq!(verdict.shadow, None);
        }
        assert!(Rbac::default().check(&attributes()).allowed);
        assert!(!Rbac::closed().check(&attributes()).allowed);
    }

    #[test]
    fn shadow_rules_do_not_decide() {
        let said = model::Rbac {
            shadow_rules: Some(rules(RbacAction::Deny, &[("s", Permission::Any, Principal::Any)])),
            ..model::Rbac::default()
        };
        let rbac = Rbac::compile(&said).unwrap();
        let verdict = rbac.check(&attributes());
        assert!(verdict.allowed);
        assert_eq!(verdict.shadow, Some((false, Some(&Name::from("s")))));
        assert_eq!(verdict.details(), "rbac_access_denied_matched_policy[none]");
    }

    #[test]
    fn permissions_of_a_request() {
        let mut headers = HeaderMap::new();
        headers.append("x-a", "v".parse().unwrap());
        headers.append("x-a", "w".parse().unwrap());
        let request = RequestView {
            method: &Method::GET,
            scheme: "http",
            authority: "Web:8080",
            path: "/u/a?x=1#f",
            headers: &headers,
        };
        let a = Attributes { request: Some(&request), sni: Some("Outbound_.80"), ..attributes() };
        let not = |p| Permission::Not(Box::new(p));
        let ignoring_case = |value: &str| HeaderMatcher {
            value: HeaderValueMatch::String(StringMatcher { ignore_case: true, ..StringMatcher::exact(value) }),
            ..header(":authority", "")
        };
        for (permission, expected) in [
            (Permission::Header(header("x-a", "w")), true),
            (Permission::Header(header("x-a", "v,w")), false),
            (not(Permission::Header(header("x-a", "v"))), false),
            (not(Permission::Header(header("x-b", "v"))), true),
            (Permission::Header(header(":method", "GET")), true),
            (Permission::Header(header(":method", "get")), false),
            (Permission::Header(ignoring_case("wEB:8080")), true),
            (Permission::Header(ignoring_case("web")), false),
            (Permission::UrlPath(StringMatcher::exact("/u/a")), true),
            (Permission::UrlPath(StringMatcher::prefix("/u/a?")), false),
            (Permission::UriTemplate("/u/*".into()), true),
            (Permission::UriTemplate("/*".into()), false),
            (Permission::DestinationPort(8080), true),
            (Permission::DestinationPort(80), false),
            (Permission::DestinationIp("10.1.0.0/16".parse().unwrap()), true),
            (Permission::DestinationIp("10.2.0.0/16".parse().unwrap()), false),
            (Permission::ServerName(StringMatcher::prefix("outbound_")), true),
            (Permission::And(vec![]), true),
            (Permission::Or(vec![]), false),
            (Permission::And(vec![Permission::DestinationPort(8080), Permission::UriTemplate("/x".into())]), false),
            (Permission::Or(vec![Permission::DestinationPort(1), Permission::UriTemplate("/u/**".into())]), true),
        ] {
            assert_eq!(holds_permission(permission.clone(), &a), expected, "{permission:?}");
        }
    }

    #[test]
    fn a_connection_has_no_request() {
        let a = attributes();
        for permission in [
            Permission::Header(header(":method", "GET")),
            Permission::UrlPath(StringMatcher::prefix("")),
            Permission::UriTemplate("/**".into()),
            Permission::Metadata(MetadataMatcher {
                filter: "f".into(),
                path: vec!["k".into()],
                value: ValueMatcher::Present(true),
                invert: false,
            }),
        ] {
            assert!(!holds_permission(permission.clone(), &a), "{permission:?}");
            assert!(holds_permission(Permission::Not(Box::new(permission)), &a), "what is absent satisfies a negation");
        }
    }

    fn peer(uris: &[&str], dns: &[&str]) -> Peer {
        let mut peer = Peer::default();
        peer.uri_sans = uris.iter().map(|s| (*s).to_owned()).collect();
        peer.dns_sans = dns.iter().map(|s| (*s).to_owned()).collect();
        peer.subject = "CN=x".into();
        peer
    }

    #[test]
    fn principals_come_from_the_peer() {
        let exact = |s: &str| Principal::Authenticated(Some(StringMatcher::exact(s)));
        let namespace = Principal::Authenticated(Some(StringMatcher::regex(".*/ns/a/.*")));
        let (mesh, dns, tls) = (peer(&["spiffe://td/ns/a/sa/x"], &["d"]), peer(&[], &["d"]), peer(&[], &[]));
        let two = peer(&["spiffe://td/ns/b/sa/x", "spiffe://td/ns/a/sa/y"], &[]);
        for (peer, principal, expected) in [
            (Some(&mesh), exact("spiffe://td/ns/a/sa/x"), true),
            (Some(&mesh), exact("spiffe://td/ns/a/sa"), false),
            (Some(&mesh), exact("d"), false),
            (Some(&dns), exact("d"), true),
            (Some(&dns), exact("CN=x"), false),
            (Some(&tls), exact("CN=x"), false),
            (Some(&mesh), namespace.clone(), true),
            (Some(&two), namespace.clone(), true),
            (None, namespace.clone(), false),
            (None, Principal::Not(Box::new(namespace)), true),
            (Some(&mesh), Principal::Authenticated(None), true),
            (Some(&tls), Principal::Authenticated(None), false),
            (None, Principal::Authenticated(None), false),
            (
                Some(&mesh),
                Principal::FilterState(PEER_PRINCIPAL.into(), StringMatcher::exact("spiffe://td/ns/a/sa/x")),
                true,
            ),
            (None, Principal::FilterState(PEER_PRINCIPAL.into(), StringMatcher::prefix("")), false),
            (None, Principal::DirectRemoteIp("10.0.0.0/24".parse().unwrap()), true),
            (None, Principal::RemoteIp("10.0.0.0/24".parse().unwrap()), false),
            (None, Principal::RemoteIp("192.0.2.1/32".parse().unwrap()), true),
            (None, Principal::RemoteIp("::/0".parse().unwrap()), false),
        ] {
            let a = Attributes { peer, ..attributes() };
            assert_eq!(holds_principal(principal.clone(), &a), expected, "{peer:?} {principal:?}");
        }
    }

    #[test]
    fn claims() {
        let payload = json!({"jwt": {"payload": {"iss": "me", "sub": "s", "groups": ["g1", "g2"]}}});
        let claim = |name: &str, value| MetadataMatcher {
            filter: "jwt".into(),
            path: vec!["payload".into(), name.into()],
            value,
            invert: false,
        };
        let exact = |s: &str| ValueMatcher::String(StringMatcher::exact(s));
        let a = Attributes { metadata: payload.as_object(), ..attributes() };
        for (matcher, expected) in [
            (claim("iss", exact("me")), true),
            (claim("iss", exact("you")), false),
            (claim("groups", ValueMatcher::ListOneOf(Box::new(exact("g2")))), true),
            (claim("groups", exact("g2")), false),
        ] {
            assert_eq!(holds_principal(Principal::Metadata(matcher.clone()), &a), expected, "{matcher:?}");
            assert!(!holds_principal(Principal::Metadata(matcher), &attributes()), "without a token");
        }
    }

    #[test]
    fn what_cannot_be_compiled_names_its_policy() {
        for principal in [
            Principal::Authenticated(Some(StringMatcher::regex("("))),
            Principal::Not(Box::new(Principal::FilterState("other".into(), StringMatcher::exact("x")))),
        ] {
            let said = model::Rbac {
                rules: Some(rules(RbacAction::Deny, &[("ns[a]-policy[b]-rule[0]", Permission::Any, principal)])),
                ..model::Rbac::default()
            };
            assert!(Rbac::compile(&said).unwrap_err().starts_with("ns[a]-policy[b]-rule[0]: "));
        }
    }
}
