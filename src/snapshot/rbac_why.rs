//! Why a policy refused, in words. Computed only when something was denied: it allocates freely.

use std::fmt;
use std::sync::Arc;

use proxy_config::model::RbacAction;

use super::rbac::{Condition, Policy, Rules};
use super::{Attributes, HeaderMatch, Name, Rbac, url_path};
use crate::tls::Peer;

/// Expectations that are listed before the rest is only counted.
const LISTED: usize = 5;
/// Longest value that is quoted, in characters.
const QUOTED: usize = 200;
/// Headers whose values belong into no log.
const SECRET: [&str; 4] = ["authorization", "cookie", "proxy-authorization", "x-api-key"];

/// Why something was denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// The DENY policy that matched; where no ALLOW policy matched, the one that came nearest. `None`: there is none.
    pub policy: Option<Name>,
    /// A DENY policy matched; otherwise no ALLOW policy did.
    pub explicit: bool,
    /// What matched, or the first condition of that policy that failed.
    pub reason: String,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.policy, self.explicit) {
            (Some(policy), true) => write!(f, "denied by {policy}: {}", self.reason),
            (Some(policy), false) => write!(f, "no ALLOW policy matches; {policy} comes nearest: {}", self.reason),
            (None, _) => f.write_str(&self.reason),
        }
    }
}

impl Rbac {
    /// Why [`Rbac::check`] denies; `None` when it does not.
    pub fn why(&self, attributes: &Attributes<'_>) -> Option<Denial> {
        let verdict = self.check(attributes);
        let rules = self.rules.as_ref().filter(|_| !verdict.allowed)?;
        Some(match verdict.policy {
            Some(name) => Denial {
                policy: Some(Arc::clone(name)),
                explicit: true,
                reason: rules.policies.iter().find(|p| p.name == *name).map_or_else(String::new, |p| {
                    let mut facts = Vec::new();
                    collect(&p.principals, attributes, &mut facts);
                    collect(&p.permissions, attributes, &mut facts);
                    if facts.is_empty() { "it matches everything".to_owned() } else { facts.join(", ") }
                }),
            },
            None => no_match(rules, attributes),
        })
    }
}

fn no_match(rules: &Rules, attributes: &Attributes<'_>) -> Denial {
    debug_assert_eq!(rules.action, RbacAction::Allow, "a DENY without a match allows");
    let judged = rules.policies.iter().map(|policy| (Distance::of(policy, attributes), policy));
    match judged.min_by_key(|(distance, _)| *distance) {
        Some((_, policy)) => Denial {
            policy: Some(Arc::clone(&policy.name)),
            explicit: false,
            reason: miss(policy, attributes).map_or_else(|| "it matches nothing".to_owned(), |miss| miss.to_string()),
        },
        None => Denial {
            policy: None,
            explicit: false,
            reason: "there is an ALLOW policy without rules, which lets nothing pass".to_owned(),
        },
    }
}

/// How far a policy is from matching: conditions that fail, then fewest that hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Distance {
    failed: usize,
    held: std::cmp::Reverse<usize>,
}

impl Distance {
    fn of(policy: &Policy, attributes: &Attributes<'_>) -> Self {
        let (mut failed, mut held) = (0, 0);
        for alternatives in [&policy.principals, &policy.permissions] {
            let counts = alternatives.iter().map(|c| count(c, attributes));
            let best = counts.min_by_key(|(failed, held)| (*failed, std::cmp::Reverse(*held)));
            let (f, h) = best.unwrap_or((1, 0));
            failed += f;
            held += h;
        }
        Self { failed, held: std::cmp::Reverse(held) }
    }
}

/// Conditions that fail and that hold.
fn count(condition: &Condition, attributes: &Attributes<'_>) -> (usize, usize) {
    match condition {
        Condition::And(of) => of.iter().map(|c| count(c, attributes)).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)),
        // A rule that Istio empties says "not any": nothing is farther away.
        Condition::Not(of) if matches!(**of, Condition::Any) => (usize::MAX >> 8, 0),
        Condition::Any => (0, 0),
        other if other.holds(attributes) => (0, 1),
        _ => (1, 0),
    }
}

/// The first condition that failed.
#[derive(Debug)]
struct Miss {
    attribute: String,
    actual: Option<String>,
    expected: Vec<String>,
    negated: bool,
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.actual {
            Some(actual) => write!(f, "{} is {actual}", self.attribute)?,
            None => write!(f, "{} is absent", self.attribute)?,
        }
        let more = self.expected.len().saturating_sub(LISTED);
        let mut list = self.expected[..self.expected.len() - more].join(", ");
        if more > 0 {
            list.push_str(&format!(" and {more} more"));
        }
        match (self.negated, self.expected.len()) {
            (false, 1) => write!(f, ", expected {list}"),
            (false, _) => write!(f, ", expected one of [{list}]"),
            (true, 1) => write!(f, ", expected anything but {list}"),
            (true, _) => write!(f, ", expected none of [{list}]"),
        }
    }
}

fn miss(policy: &Policy, attributes: &Attributes<'_>) -> Option<Miss> {
    [&policy.principals, &policy.permissions]
        .into_iter()
        .find(|alternatives| !alternatives.iter().any(|c| c.holds(attributes)))
        .and_then(|alternatives| any_miss(alternatives, attributes))
}

/// None of several alternatives holds: the nearest speaks, and those about the same attribute join in.
fn any_miss(alternatives: &[Condition], attributes: &Attributes<'_>) -> Option<Miss> {
    let mut misses = alternatives.iter().filter_map(|c| Some((count(c, attributes), condition_miss(c, attributes)?)));
    let (mut nearest, mut best) = misses.next()?;
    for (distance, miss) in misses {
        if miss.attribute == best.attribute && miss.negated == best.negated {
            best.expected.extend(miss.expected);
        } else if (distance.0, std::cmp::Reverse(distance.1)) < (nearest.0, std::cmp::Reverse(nearest.1)) {
            (nearest, best) = (distance, miss);
        }
    }
    best.expected.dedup();
    Some(best)
}

fn condition_miss(condition: &Condition, attributes: &Attributes<'_>) -> Option<Miss> {
    match condition {
        Condition::Any => None,
        Condition::And(of) => of.iter().find(|c| !c.holds(attributes)).and_then(|c| condition_miss(c, attributes)),
        Condition::Or(of) => any_miss(of, attributes),
        Condition::Not(of) => {
            let (attribute, expected) = wanted(of)?;
            Some(Miss { actual: actual(leaf(of)?, attributes), attribute, expected, negated: true })
        }
        leaf => {
            let (attribute, expected) = wanted(leaf)?;
            Some(Miss { actual: actual(leaf, attributes), attribute, expected, negated: false })
        }
    }
}

/// The attribute that a condition is about first of all, and what it wants of it.
fn wanted(condition: &Condition) -> Option<(String, Vec<String>)> {
    match condition {
        Condition::And(of) => of.first().and_then(wanted),
        Condition::Or(of) => {
            let mut all = of.iter().filter_map(wanted);
            let (attribute, mut expected) = all.next()?;
            expected.extend(all.filter(|(other, _)| *other == attribute).flat_map(|(_, more)| more));
            Some((attribute, expected))
        }
        Condition::Not(of) => wanted(of),
        leaf => Some((attribute(leaf)?, vec![expected(leaf)])),
    }
}

fn leaf(condition: &Condition) -> Option<&Condition> {
    match condition {
        Condition::And(of) | Condition::Or(of) => of.first().and_then(leaf),
        Condition::Not(of) => leaf(of),
        leaf => Some(leaf),
    }
}

/// Istio's word for what a condition looks at.
fn attribute(leaf: &Condition) -> Option<String> {
    Some(match leaf {
        Condition::Header(header) => match header.name()? {
            ":method" => "operation.method".to_owned(),
            ":authority" => "operation.host".to_owned(),
            ":path" => "operation.path".to_owned(),
            name => format!("request.headers[{name}]"),
        },
        Condition::UrlPath(_) | Condition::Template(_) => "operation.path".to_owned(),
        Condition::Metadata(metadata) => match &*metadata.path {
            [payload, claims @ ..] if &**payload == "payload" => format!("request.auth.claims[{}]", claims.join("][")),
            path => format!("{}[{}]", metadata.filter, path.join("][")),
        },
        Condition::DestinationIp(_) => "destination.ip".to_owned(),
        Condition::DestinationPort(_) => "destination.port".to_owned(),
        Condition::ServerName(_) => "connection.sni".to_owned(),
        Condition::Authenticated(_) | Condition::PeerPrincipal(_) => "source.principal".to_owned(),
        Condition::DirectRemoteIp(_) => "source.ip".to_owned(),
        Condition::RemoteIp(_) => "remote.ip".to_owned(),
        Condition::Any | Condition::And(_) | Condition::Or(_) | Condition::Not(_) => return None,
    })
}

fn expected(leaf: &Condition) -> String {
    match leaf {
        Condition::Header(header) => header.to_string(),
        Condition::UrlPath(text) | Condition::ServerName(text) | Condition::PeerPrincipal(text) => text.to_string(),
        Condition::Authenticated(Some(text)) => text.to_string(),
        Condition::Authenticated(None) => "any authenticated peer".to_owned(),
        Condition::Template(template) => format!("/{template}/"),
        Condition::Metadata(metadata) => metadata.to_string(),
        Condition::DestinationIp(net) | Condition::DirectRemoteIp(net) | Condition::RemoteIp(net) => net.to_string(),
        Condition::DestinationPort(port) => port.to_string(),
        Condition::Any | Condition::And(_) | Condition::Or(_) | Condition::Not(_) => String::new(),
    }
}

/// What the attribute is; `None`: it is absent.
fn actual(leaf: &Condition, attributes: &Attributes<'_>) -> Option<String> {
    let request = attributes.request;
    let text = match leaf {
        Condition::Header(header) => header_value(header, attributes)?,
        Condition::UrlPath(_) | Condition::Template(_) => url_path(request?.path).to_owned(),
        Condition::Metadata(metadata) => metadata.find(attributes.metadata)?.to_string(),
        Condition::DestinationIp(_) => attributes.destination.ip().to_string(),
        Condition::DestinationPort(_) => attributes.destination.port().to_string(),
        Condition::ServerName(_) => attributes.sni?.to_owned(),
        Condition::Authenticated(_) | Condition::PeerPrincipal(_) => principal(attributes.peer?)?.to_owned(),
        Condition::DirectRemoteIp(_) => attributes.direct_remote.ip().to_string(),
        Condition::RemoteIp(_) => attributes.remote_ip.to_string(),
        Condition::Any | Condition::And(_) | Condition::Or(_) | Condition::Not(_) => return None,
    };
    Some(quoted(&text))
}

fn header_value(header: &HeaderMatch, attributes: &Attributes<'_>) -> Option<String> {
    let request = attributes.request?;
    let name = header.name()?;
    Some(match name {
        ":method" => request.method.to_string(),
        ":authority" => request.authority.to_owned(),
        ":path" => request.path.to_owned(),
        ":scheme" => request.scheme.to_owned(),
        _ => {
            let lines: Vec<_> =
                request.headers.get_all(name).iter().map(|v| String::from_utf8_lossy(v.as_bytes())).collect();
            if lines.is_empty() {
                return None;
            }
            if SECRET.contains(&name) { "another value".to_owned() } else { lines.join(" and ") }
        }
    })
}

fn principal(peer: &Peer) -> Option<&str> {
    Some(peer.principal()).filter(|principal| !principal.is_empty())
}

/// Nobody's request may fill our log.
fn quoted(text: &str) -> String {
    let mut out: String = text.chars().filter(|c| !c.is_control()).take(QUOTED).collect();
    if out.len() < text.len() {
        out.push_str("...");
    }
    out
}

/// What a condition that holds is about: attributes with their values.
fn collect(alternatives: &[Condition], attributes: &Attributes<'_>, facts: &mut Vec<String>) {
    let Some(held) = alternatives.iter().find(|c| c.holds(attributes)) else { return };
    match held {
        Condition::Any => {}
        Condition::And(of) => of.iter().for_each(|c| collect(std::slice::from_ref(c), attributes, facts)),
        Condition::Or(of) => collect(of, attributes, facts),
        other => {
            let Some((attribute, _)) = wanted(other) else { return };
            let value = leaf(other).and_then(|leaf| actual(leaf, attributes));
            let fact = value.map_or_else(|| format!("{attribute} is absent"), |v| format!("{attribute} is {v}"));
            if !facts.contains(&fact) {
                facts.push(fact);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method};
    use proxy_config::model::{
        self, HeaderMatcher, HeaderValueMatch, Permission, Principal, RbacPolicy, RbacRules, StringMatcher,
    };

    use super::*;
    use crate::snapshot::RequestView;

    fn rbac(action: RbacAction, policies: Vec<(&str, Permission, Principal)>) -> Rbac {
        let policies = policies.into_iter().map(|(name, permission, principal)| {
            (Name::from(name), RbacPolicy { permissions: vec![permission], principals: vec![principal] })
        });
        let rules = RbacRules { action, policies: policies.collect() };
        Rbac::compile(&model::Rbac { rules: Some(rules), ..model::Rbac::default() }).unwrap()
    }

    fn name_is(name: &str) -> Principal {
        Principal::Authenticated(Some(StringMatcher::exact(name)))
    }

    fn header(name: &str, value: &str) -> Permission {
        let value = HeaderValueMatch::String(StringMatcher::exact(value));
        Permission::Header(HeaderMatcher { name: name.into(), value, invert: false, treat_missing_as_empty: false })
    }

    fn why(rbac: &Rbac, peer: Option<&Peer>) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", "Bearer secret".parse().unwrap());
        let request =
            RequestView { method: &Method::PUT, scheme: "http", authority: "web", path: "/a?b", headers: &headers };
        let attributes = Attributes {
            peer,
            direct_remote: "10.0.0.9:4000".parse().unwrap(),
            remote_ip: "10.0.0.9".parse().unwrap(),
            destination: "10.1.0.1:8080".parse().unwrap(),
            sni: None,
            request: Some(&request),
            metadata: None,
        };
        rbac.why(&attributes).map(|denial| denial.to_string())
    }

    #[test]
    #[allow(clippy::too_many_lines, reason = "a table")]
    fn the_nearest_rule_and_its_first_failed_condition() {
        let mut peer = Peer::default();
        peer.uri_sans = vec!["spiffe://td/ns/a/sa/x".into()];
        let paths = |list: &[&str]| {
            Permission::Or(list.iter().map(|p| Permission::UrlPath(StringMatcher::prefix(*p))).collect())
        };
        let near = Permission::And(vec![paths(&["/a"]), Permission::Or(vec![header(":method", "GET")])]);
        let principals = Principal::Or(vec![name_is("spiffe://td/ns/b/sa/y"), name_is("spiffe://td/ns/b/sa/z")]);
        let allow = |policies| rbac(RbacAction::Allow, policies);
        let not_ip = Principal::Not(Box::new(Principal::DirectRemoteIp("10.0.0.0/8".parse().unwrap())));
        for (rbac, peer, expected) in [
            (
                allow(vec![
                    ("far", header(":method", "GET"), principals.clone()),
                    ("near", near, name_is("spiffe://td/ns/a/sa/x")),
                ]),
                Some(&peer),
                "no ALLOW policy matches; near comes nearest: operation.method is PUT, expected GET",
            ),
            (
                allow(vec![("p", Permission::Any, principals.clone())]),
                Some(&peer),
                "no ALLOW policy matches; p comes nearest: source.principal is spiffe://td/ns/a/sa/x, \
                 expected one of [spiffe://td/ns/b/sa/y, spiffe://td/ns/b/sa/z]",
            ),
            (
                allow(vec![("p", Permission::Any, principals)]),
                None,
                "no ALLOW policy matches; p comes nearest: source.principal is absent, \
                 expected one of [spiffe://td/ns/b/sa/y, spiffe://td/ns/b/sa/z]",
            ),
            (
                allow(vec![("p", Permission::Any, not_ip)]),
                None,
                "no ALLOW policy matches; p comes nearest: source.ip is 10.0.0.9, expected anything but 10.0.0.0/8",
            ),
            (
                allow(vec![("p", header("authorization", "x"), Principal::Any)]),
                None,
                "no ALLOW policy matches; p comes nearest: request.headers[authorization] is another value, expected x",
            ),
            (
                allow(vec![("p", Permission::Not(Box::new(Permission::Any)), Principal::Any)]),
                None,
                "no ALLOW policy matches; p comes nearest: it matches nothing",
            ),
            (allow(vec![]), None, "there is an ALLOW policy without rules, which lets nothing pass"),
            (
                rbac(
                    RbacAction::Deny,
                    vec![("d", paths(&["/a"]), Principal::Not(Box::new(name_is("spiffe://td/ns/b/sa/y"))))],
                ),
                Some(&peer),
                "denied by d: source.principal is spiffe://td/ns/a/sa/x, operation.path is /a",
            ),
            (
                rbac(RbacAction::Deny, vec![("d", Permission::Any, Principal::Any)]),
                None,
                "denied by d: it matches everything",
            ),
        ] {
            assert_eq!(why(&rbac, peer).unwrap(), expected);
        }
        assert_eq!(why(&rbac(RbacAction::Deny, vec![]), None), None);
    }

    #[test]
    fn long_values_are_cut() {
        assert_eq!(quoted("a\nb"), "ab...");
        assert_eq!(quoted(&"x".repeat(300)).len(), QUOTED + 3);
    }
}
