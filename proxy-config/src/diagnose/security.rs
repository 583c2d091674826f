//! Security kinds: a mistake in one of these must not open a door.

use super::{Finding, Findings, is_network, is_port};
use crate::istio::authorization_policy::{Action, AuthorizationPolicy, Condition, Operation, Rule, Source};
use crate::istio::common::{Selector, TargetRef};
use crate::istio::peer_authentication::PeerAuthentication;
use crate::istio::request_authentication::{JwtRule, RequestAuthentication};
use crate::yaml::{Data, Node};

/// Findings of an AuthorizationPolicy; `node` is its `spec`, in which an empty list differs from none.
pub(crate) fn authorization_policy(spec: &AuthorizationPolicy, node: Option<&Node>) -> Vec<Finding> {
    let mut found = Findings::default();
    attachment(&mut found, spec.selector.as_ref(), spec.target_ref.as_ref(), &spec.target_refs);
    let provider = spec.provider.as_ref().map(|p| p.name.as_str());
    match (spec.action, provider) {
        (Action::Custom, None | Some("")) => found.add("spec.provider.name", "CUSTOM needs a provider"),
        (Action::Allow | Action::Deny | Action::Audit, Some(_)) => {
            found.add("spec.provider", "only CUSTOM takes a provider");
        }
        _ => {}
    }
    for (index, rule) in spec.rules.iter().enumerate() {
        let field = format!("spec.rules[{index}]");
        let Some(rule) = rule else { continue };
        for list in ["from", "to"] {
            // Whoever writes an empty list of sources does not mean everyone.
            let written = node.and_then(|n| n.at(&format!("rules[{index}]")).get(list));
            let empty = matches!(written.map(|n| &n.data), Some(Data::List(items)) if items.is_empty());
            found.expect(!empty, format!("{field}.{list}"), "the list is empty: leave it out for anyone or anything");
        }
        self::rule(&mut found, rule, &field);
    }
    found.0
}

fn rule(found: &mut Findings, rule: &Rule, field: &str) {
    for (index, from) in rule.from.iter().enumerate() {
        let field = format!("{field}.from[{index}].source");
        match &from.source {
            Some(source) if *source != Source::default() => self::source(found, source, &field),
            _ => found.add(field, "no source is said"),
        }
    }
    for (index, to) in rule.to.iter().enumerate() {
        let field = format!("{field}.to[{index}].operation");
        match &to.operation {
            Some(operation) if *operation != Operation::default() => self::operation(found, operation, &field),
            _ => found.add(field, "no operation is said"),
        }
    }
    for (index, condition) in rule.when.iter().enumerate() {
        self::condition(found, condition, &format!("{field}.when[{index}]"));
    }
}

fn source(found: &mut Findings, source: &Source, field: &str) {
    let texts = [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
        ("trustDomains", &source.trust_domains),
        ("notTrustDomains", &source.not_trust_domains),
    ];
    for (name, values) in texts {
        each(found, &format!("{field}.{name}"), values, "is empty", |v| !v.is_empty());
    }
    let networks = [
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ];
    for (name, values) in networks {
        each(found, &format!("{field}.{name}"), values, "is no address and no network", is_network);
    }
    let accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
    let others = [&source.namespaces, &source.not_namespaces, &source.principals, &source.not_principals];
    let others = others.iter().any(|l| !l.is_empty());
    if accounts && others {
        found.tell(field, "serviceAccounts excludes namespaces and principals; all of them must hold");
    }
    for (name, values) in
        [("serviceAccounts", &source.service_accounts), ("notServiceAccounts", &source.not_service_accounts)]
    {
        each(found, &format!("{field}.{name}"), values, "is neither ACCOUNT nor NAMESPACE/ACCOUNT", |v| {
            !v.contains('*') && v.matches('/').count() <= 1 && !v.starts_with('/') && !v.ends_with('/')
        });
        found.expect(values.len() <= 16, format!("{field}.{name}"), "at most 16 are allowed");
    }
}

fn operation(found: &mut Findings, operation: &Operation, field: &str) {
    let texts = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    for (name, values) in texts {
        each(found, &format!("{field}.{name}"), values, "is empty", |v| !v.is_empty());
    }
    for (name, values) in [("ports", &operation.ports), ("notPorts", &operation.not_ports)] {
        each(found, &format!("{field}.{name}"), values, "is no port", is_port);
    }
    for (name, values) in [("paths", &operation.paths), ("notPaths", &operation.not_paths)] {
        for (index, path) in values.iter().enumerate().filter(|(_, p)| !is_path(p)) {
            found.tell(format!("{field}.{name}[{index}]"), format!("{path:?} is no path template"));
        }
    }
}

/// A path with `{*}` or `{**}` is a template: each operator a whole segment, `{**}` once and after every `{*}`, and
/// no bare `*` beside them. Other braces are nowhere allowed.
fn is_path(path: &str) -> bool {
    let template = path.contains("{*}") || path.contains("{**}");
    let mut deep = false;
    path.split('/').all(|segment| match segment {
        "{*}" => !deep,
        "{**}" => !std::mem::replace(&mut deep, true),
        literal => !literal.contains(if template { &['{', '}', '*'][..] } else { &['{', '}'] }),
    })
}

fn condition(found: &mut Findings, condition: &Condition, field: &str) {
    found.expect(!condition.key.is_empty(), format!("{field}.key"), "no attribute is named");
    let none = condition.values.is_empty() && condition.not_values.is_empty();
    found.expect(!none, field, "neither values nor notValues");
    for (name, values) in [("values", &condition.values), ("notValues", &condition.not_values)] {
        let field = format!("{field}.{name}");
        match condition.key.as_str() {
            "source.ip" | "remote.ip" | "destination.ip" => {
                each(found, &field, values, "is no address and no network", is_network);
            }
            "destination.port" => each(found, &field, values, "is no port", is_port),
            _ => each(found, &field, values, "is empty", |v| !v.is_empty()),
        }
    }
}

fn each(found: &mut Findings, field: &str, values: &[String], wrong: &str, good: impl Fn(&str) -> bool) {
    for (index, value) in values.iter().enumerate().filter(|(_, v)| !good(v)) {
        found.add(format!("{field}[{index}]"), format!("{value:?} {wrong}"));
    }
}

fn attachment(found: &mut Findings, selector: Option<&Selector>, one: Option<&TargetRef>, many: &[TargetRef]) {
    let labels = selector.map(|s| &s.match_labels).filter(|l| !l.is_empty());
    if let Some(labels) = labels {
        found.selector(labels, "spec.selector.matchLabels");
    }
    let attached = usize::from(one.is_some()) + usize::from(!many.is_empty()) + usize::from(labels.is_some());
    found.expect(attached <= 1, "spec.selector", "only one of selector, targetRef and targetRefs may be set");
    let targets = one.map(|t| ("spec.targetRef".to_owned(), t)).into_iter();
    let targets = targets.chain(many.iter().enumerate().map(|(i, t)| (format!("spec.targetRefs[{i}]"), t)));
    for (field, target) in targets {
        found.expect(!target.name.is_empty(), format!("{field}.name"), "a name is missing");
        found.expect(target.namespace.is_empty(), format!("{field}.namespace"), "another namespace is not allowed");
        let known = [
            ("", "Service"),
            ("gateway.networking.k8s.io", "Gateway"),
            ("gateway.networking.k8s.io", "GatewayClass"),
            ("networking.istio.io", "ServiceEntry"),
        ];
        let pair = (target.group.as_str(), target.kind.as_str());
        let known = known.contains(&pair) || pair == ("core", "Service");
        found.expect(known, format!("{field}.kind"), "not a Service, Gateway, GatewayClass or ServiceEntry");
    }
}

/// Findings of a PeerAuthentication; `node` is its `spec`.
pub(crate) fn peer_authentication(spec: &PeerAuthentication, node: Option<&Node>) -> Vec<Finding> {
    let mut found = Findings::default();
    if let Some(selector) = &spec.selector {
        found.selector(&selector.match_labels, "spec.selector.matchLabels");
    }
    const PORTS: &str = "spec.portLevelMtls";
    let written = node.and_then(|n| n.get("portLevelMtls")).map(|n| &n.data);
    found.expect(!matches!(written, Some(Data::Map(m)) if m.is_empty()), PORTS, "the map is empty");
    found.expect(!spec.port_level_mtls.contains_key(&0), format!("{PORTS}.0"), "0 is no port");
    let selects = spec.selector.as_ref().is_some_and(|s| !s.match_labels.is_empty());
    found.expect(spec.port_level_mtls.is_empty() || selects, PORTS, "ports have modes only where a selector is");
    found.0
}

/// Findings of a RequestAuthentication.
pub(crate) fn request_authentication(spec: &RequestAuthentication) -> Vec<Finding> {
    let mut found = Findings::default();
    attachment(&mut found, spec.selector.as_ref(), spec.target_ref.as_ref(), &spec.target_refs);
    for (index, rule) in spec.jwt_rules.iter().enumerate() {
        jwt_rule(&mut found, rule, &format!("spec.jwtRules[{index}]"));
    }
    found.0
}

fn jwt_rule(found: &mut Findings, rule: &JwtRule, field: &str) {
    let known = !rule.issuer.is_empty() || !rule.jwks_uri.is_empty();
    found.expect(known, format!("{field}.issuer"), "neither issuer nor jwksUri");
    each(found, &format!("{field}.audiences"), &rule.audiences, "is empty", |v| !v.is_empty());
    found.expect(rule.jwks_uri.is_empty() || is_url(&rule.jwks_uri), format!("{field}.jwksUri"), "no http(s) URL");
    let keys = |text: &str| serde_json::from_str::<serde_json::Value>(text).is_ok_and(|v| v.is_object());
    found.expect(rule.jwks.is_empty() || keys(&rule.jwks), format!("{field}.jwks"), "no JSON Web Key Set");
    for (index, header) in rule.from_headers.iter().enumerate() {
        found.expect(!header.name.is_empty(), format!("{field}.fromHeaders[{index}].name"), "a name is missing");
    }
    each(found, &format!("{field}.fromParams"), &rule.from_params, "is empty", |v| !v.is_empty());
    each(found, &format!("{field}.fromCookies"), &rule.from_cookies, "is empty", |v| !v.is_empty());
    let mut headers: Vec<String> = Vec::new();
    for (index, out) in rule.output_claim_to_headers.iter().enumerate() {
        let field = format!("{field}.outputClaimToHeaders[{index}]");
        let token = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let good = !out.header.is_empty() && out.header.chars().all(token);
        found.expect(good, format!("{field}.header"), "no header name of letters, digits, - and _");
        found.expect(!out.claim.is_empty(), format!("{field}.claim"), "a claim is missing");
        let name = out.header.to_ascii_lowercase();
        found.expect(!headers.contains(&name), format!("{field}.header"), "the header is written twice");
        headers.push(name);
    }
}

/// Scheme http or https, a host, and a port that is a number if there is one.
fn is_url(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")) else { return false };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    match host.rsplit_once(':') {
        Some((name, port)) if !host.ends_with(']') => !name.is_empty() && is_port(port),
        _ => !host.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_templates() {
        for good in ["/a", "/a*", "*b", "/{*}/b", "/a/{**}", "/a/{*}/b/{**}/c"] {
            assert!(is_path(good), "{good}");
        }
        for bad in ["/{**}/{*}", "/{**}/{**}", "/a{*}", "/{*}/b*", "/{*}/{a}", "/{a}"] {
            assert!(!is_path(bad), "{bad}");
        }
    }

    #[test]
    fn urls() {
        assert!(is_url("https://a.b:443/c") && is_url("http://a") && is_url("http://[::1]:80"));
        assert!(!is_url("https://a:b") && !is_url("ftp://a") && !is_url("a.b") && !is_url("http://"));
    }
}
