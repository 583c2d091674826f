//! One rule of an `AuthorizationPolicy` as permissions and principals.
//!
//! A rule is lists of terms; each term knows its side (permission or principal) and whether it needs HTTP. On TCP
//! chains a term that needs HTTP makes an ALLOW rule vanish and is left out of any other rule, which widens it.

use std::net::IpAddr;

use ipnet::IpNet;

use super::trust_domain::TrustDomains;
use crate::istio::authorization_policy::{Condition, Operation, Rule, Source};
use crate::model::{
    HeaderMatcher, HeaderValueMatch, MetadataMatcher, Permission, Principal, RbacAction, RbacPolicy, StringMatcher,
    StringPattern, ValueMatcher,
};

const JWT_FILTER: &str = "envoy.filters.http.jwt_authn";

/// How a rule is to be compiled.
#[derive(Debug, Clone, Copy)]
pub(super) struct RuleContext<'a> {
    /// Namespace of the policy: default of `serviceAccounts`.
    pub(super) namespace: &'a str,
    /// Known trust domains.
    pub(super) domains: &'a TrustDomains,
    /// Action of the filter that the rule becomes part of.
    pub(super) action: RbacAction,
    /// For a chain that carries bytes instead of requests.
    pub(super) tcp: bool,
}

/// Why a term gives nothing here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It needs a request and this is a TCP chain; no mistake.
    HttpOnly(String),
    /// It cannot be understood: field or key, and why.
    Invalid(String, String),
}

/// A field with its values, before it becomes matchers.
struct Term {
    kind: Kind,
    values: Vec<String>,
    not_values: Vec<String>,
}

#[derive(Clone, PartialEq)]
enum Kind {
    DestinationIp,
    DestinationPort,
    Sni,
    EnvoyMetadata { filter: String, key: String },
    Path,
    Method,
    Host,
    SourceIp,
    RemoteIp,
    Namespace,
    TrustDomain,
    ServiceAccount,
    SourcePrincipal,
    RequestPrincipal,
    Claim(Vec<String>),
    Header(String),
}

/// Compiles a rule; `Ok(None)` never happens for a rule that is valid on this kind of chain.
pub(super) fn compile(rule: &Rule, context: RuleContext<'_>) -> Result<RbacPolicy, Refusal> {
    let (base_permission, base_principal) = conditions(&rule.when)?;
    let mut principals = Vec::new();
    for from in &rule.from {
        let terms = from.source.as_ref().map(source_terms).unwrap_or_default();
        principals.push(principal(terms.iter().chain(&base_principal), context)?);
    }
    if rule.from.is_empty() {
        principals.push(principal(base_principal.iter(), context)?);
    }
    let mut permissions = Vec::new();
    for to in &rule.to {
        let terms = to.operation.as_ref().map(operation_terms).unwrap_or_default();
        permissions.push(permission(terms.iter().chain(&base_permission), context)?);
    }
    if rule.to.is_empty() {
        permissions.push(permission(base_permission.iter(), context)?);
    }
    Ok(RbacPolicy { permissions, principals })
}

/// Terms of `when`, split by side; an unknown key is an error of the whole rule.
fn conditions(when: &[Condition]) -> Result<(Vec<Term>, Vec<Term>), Refusal> {
    let mut permissions = Vec::new();
    let mut principals = Vec::new();
    for condition in when {
        let (kind, is_permission) = condition_kind(&condition.key)?;
        let side = if is_permission { &mut permissions } else { &mut principals };
        push(side, kind, &condition.values, &condition.not_values);
    }
    Ok((permissions, principals))
}

/// Kind of a condition key, and whether it belongs to the permission side.
fn condition_kind(key: &str) -> Result<(Kind, bool), Refusal> {
    if let Some(rest) = key.strip_prefix("experimental.envoy.filters.") {
        return match rest.strip_suffix(']').unwrap_or(rest).split_once('[') {
            Some((filter, key)) => {
                Ok((Kind::EnvoyMetadata { filter: format!("envoy.filters.{filter}"), key: key.to_owned() }, true))
            }
            None => Err(invalid_key(key)),
        };
    }
    if let Some(rest) = key.strip_prefix("request.headers") {
        let name = bracketed(rest).ok_or_else(|| invalid_key(key))?;
        return Ok((Kind::Header(name.to_ascii_lowercase()), false));
    }
    if let Some(rest) = key.strip_prefix("request.auth.claims") {
        return Ok((Kind::Claim(claim_path(rest).ok_or_else(|| invalid_key(key))?), false));
    }
    Ok(match key {
        "destination.ip" => (Kind::DestinationIp, true),
        "destination.port" => (Kind::DestinationPort, true),
        "connection.sni" => (Kind::Sni, true),
        "source.ip" => (Kind::SourceIp, false),
        "remote.ip" => (Kind::RemoteIp, false),
        "source.namespace" => (Kind::Namespace, false),
        "source.trustDomain" => (Kind::TrustDomain, false),
        "source.serviceAccount" => (Kind::ServiceAccount, false),
        "source.principal" => (Kind::SourcePrincipal, false),
        "request.auth.principal" => (Kind::RequestPrincipal, false),
        "request.auth.audiences" => (Kind::Claim(vec!["aud".to_owned()]), false),
        "request.auth.presenter" => (Kind::Claim(vec!["azp".to_owned()]), false),
        _ => return Err(invalid_key(key)),
    })
}

fn invalid_key(key: &str) -> Refusal {
    Refusal::Invalid(format!("when.key {key}"), "unknown attribute".to_owned())
}

fn bracketed(text: &str) -> Option<&str> {
    text.strip_prefix('[')?.strip_suffix(']')
}

/// `[a][b]` is a path of two; anything with nested brackets is one name.
fn claim_path(text: &str) -> Option<Vec<String>> {
    let inner = bracketed(text)?;
    let parts: Vec<String> = inner.split("][").map(str::to_owned).collect();
    if parts.iter().any(|p| p.contains(['[', ']'])) {
        return Some(vec![inner.to_owned()]);
    }
    Some(parts)
}

/// Order as istiod emits it: it prepends field by field.
fn source_terms(s: &Source) -> Vec<Term> {
    let mut terms = Vec::new();
    push(&mut terms, Kind::SourcePrincipal, &s.principals, &s.not_principals);
    push(&mut terms, Kind::RequestPrincipal, &s.request_principals, &s.not_request_principals);
    push(&mut terms, Kind::ServiceAccount, &s.service_accounts, &s.not_service_accounts);
    push(&mut terms, Kind::TrustDomain, &s.trust_domains, &s.not_trust_domains);
    push(&mut terms, Kind::Namespace, &s.namespaces, &s.not_namespaces);
    push(&mut terms, Kind::RemoteIp, &s.remote_ip_blocks, &s.not_remote_ip_blocks);
    push(&mut terms, Kind::SourceIp, &s.ip_blocks, &s.not_ip_blocks);
    terms
}

fn operation_terms(o: &Operation) -> Vec<Term> {
    let mut terms = Vec::new();
    push(&mut terms, Kind::Host, &o.hosts, &o.not_hosts);
    push(&mut terms, Kind::Method, &o.methods, &o.not_methods);
    push(&mut terms, Kind::Path, &o.paths, &o.not_paths);
    push(&mut terms, Kind::DestinationPort, &o.ports, &o.not_ports);
    terms
}

fn push(terms: &mut Vec<Term>, kind: Kind, values: &[String], not_values: &[String]) {
    if values.is_empty() && not_values.is_empty() {
        return;
    }
    terms.push(Term { kind, values: values.to_vec(), not_values: not_values.to_vec() });
}

fn permission<'a>(terms: impl Iterator<Item = &'a Term>, context: RuleContext<'_>) -> Result<Permission, Refusal> {
    let mut and = Vec::new();
    for term in terms {
        if let Some(any) = permission_any(term, &term.values, context)? {
            and.push(any);
        }
        if let Some(any) = permission_any(term, &term.not_values, context)? {
            and.push(Permission::Not(Box::new(any)));
        }
    }
    if and.is_empty() {
        and.push(Permission::Any);
    }
    Ok(Permission::And(and))
}

/// Any of the values; `None` when nothing is left to match.
fn permission_any(term: &Term, values: &[String], context: RuleContext<'_>) -> Result<Option<Permission>, Refusal> {
    if let Kind::EnvoyMetadata { filter, key } = &term.kind {
        if values.is_empty() {
            return Ok(None);
        }
        let value = or_value(values.iter().map(|v| list_or_string(v)).collect());
        let matcher = MetadataMatcher { filter: filter.clone(), path: vec![key.clone()], value, invert: false };
        return Ok(Some(Permission::Metadata(matcher)));
    }
    let mut or = Vec::new();
    for value in values {
        match permission_one(&term.kind, value, context.tcp) {
            Ok(p) => or.push(p),
            Err(refusal) => tolerate(refusal, context.action)?,
        }
    }
    Ok(if or.is_empty() { None } else { Some(Permission::Or(or)) })
}

fn principal<'a>(terms: impl Iterator<Item = &'a Term>, context: RuleContext<'_>) -> Result<Principal, Refusal> {
    let mut and = Vec::new();
    for term in terms {
        if let Some(any) = principal_any(term, &term.values, context)? {
            and.push(any);
        }
        if let Some(any) = principal_any(term, &term.not_values, context)? {
            and.push(Principal::Not(Box::new(any)));
        }
    }
    if and.is_empty() {
        and.push(Principal::Any);
    }
    Ok(Principal::And(and))
}

fn principal_any(term: &Term, values: &[String], context: RuleContext<'_>) -> Result<Option<Principal>, Refusal> {
    if values.is_empty() {
        return Ok(None);
    }
    let token = match &term.kind {
        Kind::Claim(path) => Some(claim(path, or_value(values.iter().map(|v| string_value(v)).collect()))),
        Kind::RequestPrincipal => Some(request_principals(values)),
        _ => None,
    };
    if let Some(principal) = token {
        if context.tcp {
            tolerate(Refusal::HttpOnly("request.auth".to_owned()), context.action)?;
            return Ok(None);
        }
        return Ok(Some(principal));
    }
    let values = match &term.kind {
        Kind::SourcePrincipal => context.domains.expand_principals(values),
        Kind::TrustDomain => context.domains.expand_domains(values),
        _ => values.to_vec(),
    };
    let mut or = Vec::new();
    for value in &values {
        match principal_one(&term.kind, value, context) {
            Ok(p) => or.push(p),
            Err(refusal) => tolerate(refusal, context.action)?,
        }
    }
    Ok(if or.is_empty() { None } else { Some(Principal::Or(or)) })
}

/// ALLOW shrinks by the whole rule; DENY and AUDIT widen by the term. A mistake is an error either way: what istiod
/// would widen silently is refused here.
fn tolerate(refusal: Refusal, action: RbacAction) -> Result<(), Refusal> {
    match refusal {
        Refusal::HttpOnly(_) if action != RbacAction::Allow => Ok(()),
        other => Err(other),
    }
}

fn permission_one(kind: &Kind, value: &str, tcp: bool) -> Result<Permission, Refusal> {
    let http = |p: Permission, what: &str| if tcp { Err(Refusal::HttpOnly(what.to_owned())) } else { Ok(p) };
    match kind {
        Kind::DestinationIp => Ok(Permission::DestinationIp(cidr("destination.ip", value)?)),
        Kind::DestinationPort => Ok(Permission::DestinationPort(port(value)?)),
        Kind::Sni => Ok(Permission::ServerName(string(value, ""))),
        Kind::Host => http(Permission::Header(header(":authority", value, true)), "hosts"),
        Kind::Method => http(Permission::Header(header(":method", value, false)), "methods"),
        Kind::Path if value.contains("{*}") || value.contains("{**}") => {
            http(Permission::UriTemplate(value.replace("{**}", "**").replace("{*}", "*")), "paths")
        }
        Kind::Path => http(Permission::UrlPath(string(value, "")), "paths"),
        _ => Err(Refusal::Invalid(value.to_owned(), "not a property of an operation".to_owned())),
    }
}

fn principal_one(kind: &Kind, value: &str, context: RuleContext<'_>) -> Result<Principal, Refusal> {
    Ok(match kind {
        Kind::SourceIp => Principal::DirectRemoteIp(cidr("ipBlocks", value)?),
        Kind::RemoteIp => Principal::RemoteIp(cidr("remoteIpBlocks", value)?),
        Kind::Namespace => {
            let pattern: Vec<String> = value.split('*').map(regex_literal).collect();
            authenticated(StringMatcher::regex(format!(".*/ns/{}/.*", pattern.join(".*"))))
        }
        Kind::ServiceAccount => authenticated(StringMatcher::regex(service_account_regex(context.namespace, value))),
        Kind::TrustDomain => authenticated(trust_domain(value)),
        Kind::SourcePrincipal => authenticated(string(value, "spiffe://")),
        Kind::Header(_) if context.tcp => return Err(Refusal::HttpOnly("request.headers".to_owned())),
        Kind::Header(name) => Principal::Header(header(name, value, false)),
        _ => return Err(Refusal::Invalid(value.to_owned(), "not a property of a source".to_owned())),
    })
}

fn authenticated(name: StringMatcher) -> Principal {
    Principal::Authenticated(Some(name))
}

fn service_account_regex(policy_namespace: &str, value: &str) -> String {
    let (namespace, account) = value.split_once('/').unwrap_or((policy_namespace, value));
    format!("spiffe://.+/ns/{}/(.+/|)sa/{}(/.+)?", regex_literal(namespace), regex_literal(account))
}

fn trust_domain(value: &str) -> StringMatcher {
    if value == "*" {
        return StringMatcher::prefix("spiffe://");
    }
    match value.split_once('*') {
        None => StringMatcher::prefix(format!("spiffe://{value}/")),
        Some((before, after)) => {
            StringMatcher::regex(format!("spiffe://{}[^/]*{}/.*", regex_literal(before), regex_literal(after)))
        }
    }
}

/// `iss/sub`, split at the last slash because issuers are URLs.
fn request_principals(values: &[String]) -> Principal {
    let mut or: Vec<Principal> = values
        .iter()
        .map(|value| {
            let (issuer, subject) = issuer_and_subject(value);
            let claim_is = |name: &str, matcher| {
                Principal::Metadata(MetadataMatcher {
                    filter: JWT_FILTER.to_owned(),
                    path: vec!["payload".to_owned(), name.to_owned()],
                    value: ValueMatcher::String(matcher),
                    invert: false,
                })
            };
            Principal::And(vec![claim_is("iss", issuer), claim_is("sub", subject)])
        })
        .collect();
    if or.len() == 1 { or.remove(0) } else { Principal::Or(or) }
}

fn issuer_and_subject(value: &str) -> (StringMatcher, StringMatcher) {
    let any = || StringMatcher::regex(".+");
    let split = value.rsplit_once('/');
    if value == "*" {
        return (any(), any());
    }
    if let Some(suffix) = value.strip_prefix('*') {
        return match split {
            Some(("*", subject)) => (any(), StringMatcher::exact(subject)),
            Some((issuer, subject)) => (StringMatcher::suffix(&issuer[1..]), StringMatcher::exact(subject)),
            None => (any(), StringMatcher::suffix(suffix)),
        };
    }
    if let Some(prefix) = value.strip_suffix('*') {
        return match split {
            Some((issuer, "*")) => (StringMatcher::exact(issuer), any()),
            Some((issuer, subject)) => {
                (StringMatcher::exact(issuer), StringMatcher::prefix(subject.strip_suffix('*').unwrap_or(subject)))
            }
            None => (StringMatcher::prefix(prefix), any()),
        };
    }
    let (issuer, subject) = split.unwrap_or((value, ""));
    (StringMatcher::exact(issuer), StringMatcher::exact(subject))
}

/// A claim that is the value, or a list that holds it.
fn claim(path: &[String], value: ValueMatcher) -> Principal {
    let path = std::iter::once("payload".to_owned()).chain(path.iter().cloned()).collect();
    let value = ValueMatcher::Or(vec![ValueMatcher::ListOneOf(Box::new(value.clone())), value]);
    Principal::Metadata(MetadataMatcher { filter: JWT_FILTER.to_owned(), path, value, invert: false })
}

fn or_value(mut of: Vec<ValueMatcher>) -> ValueMatcher {
    if of.len() == 1 { of.remove(0) } else { ValueMatcher::Or(of) }
}

fn string_value(value: &str) -> ValueMatcher {
    ValueMatcher::String(string(value, ""))
}

fn list_or_string(value: &str) -> ValueMatcher {
    if value.starts_with('[') && value.ends_with(']') {
        return ValueMatcher::ListOneOf(Box::new(string_value(value.trim_matches(['[', ']']))));
    }
    string_value(value)
}

/// Istio's value syntax; `*` needs at least one character.
fn string(value: &str, prefix: &str) -> StringMatcher {
    if value == "*" {
        return StringMatcher::regex(".+");
    }
    if let Some(suffix) = value.strip_prefix('*') {
        if prefix.is_empty() {
            return StringMatcher::suffix(suffix);
        }
        return StringMatcher::regex(format!("{prefix}.*{}", regex_literal(suffix)));
    }
    match value.strip_suffix('*') {
        Some(start) => StringMatcher::prefix(format!("{prefix}{start}")),
        None => StringMatcher::exact(format!("{prefix}{value}")),
    }
}

fn header(name: &str, value: &str, ignore_case: bool) -> HeaderMatcher {
    let value = if value == "*" {
        HeaderValueMatch::Present(true)
    } else {
        let pattern = match (value.strip_prefix('*'), value.strip_suffix('*')) {
            (Some(suffix), _) => StringPattern::Suffix(suffix.to_owned()),
            (None, Some(prefix)) => StringPattern::Prefix(prefix.to_owned()),
            (None, None) => StringPattern::Exact(value.to_owned()),
        };
        HeaderValueMatch::String(StringMatcher { pattern, ignore_case })
    };
    HeaderMatcher { name: name.to_owned(), value, invert: false, treat_missing_as_empty: false }
}

fn cidr(field: &str, value: &str) -> Result<IpNet, Refusal> {
    let parsed = if value.contains('/') { value.parse().ok() } else { value.parse::<IpAddr>().ok().map(IpNet::from) };
    parsed.ok_or_else(|| Refusal::Invalid(field.to_owned(), format!("{value} is neither an IP address nor a CIDR")))
}

fn port(value: &str) -> Result<u16, Refusal> {
    value.parse().map_err(|_| Refusal::Invalid("ports".to_owned(), format!("{value} is no port number")))
}

/// Escapes what RE2 and Go's `QuoteMeta` escape, no more: the text is compared with istiod's.
fn regex_literal(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}
