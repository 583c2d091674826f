//! `RequestAuthentication` → the token filter, as istiod builds it. Keys are taken as given; fetching is elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::istio::request_authentication::{JwtRule, RequestAuthentication};
use crate::model::{HttpFilter, JwksSource, JwtAuthn, JwtProvider, JwtRequirement, Name};

/// How long fetched keys are good: istiod's refresh period.
const JWKS_CACHE: Duration = Duration::from_secs(20 * 60);
/// Limit on fetching keys that says none itself.
const JWKS_TIMEOUT: Duration = Duration::from_secs(5);

/// The filter that the objects which select a workload make together; `None` without any rule.
pub fn filter<'a>(selected: impl Iterator<Item = &'a RequestAuthentication>) -> Option<HttpFilter> {
    let mut rules: Vec<&JwtRule> = selected.flat_map(|r| &r.jwt_rules).collect();
    if rules.is_empty() {
        return None;
    }
    rules.sort_by(|a, b| a.issuer.cmp(&b.issuer));
    let names: Vec<String> = (0..rules.len()).map(|i| format!("origins-{i}")).collect();
    let providers: BTreeMap<String, JwtProvider> = names.iter().cloned().zip(rules.into_iter().map(provider)).collect();
    Some(HttpFilter::JwtAuthn(Box::new(JwtAuthn {
        providers,
        rules: vec![("/".to_owned(), requirement(&names))],
        bypass_cors_preflight: true,
    })))
}

/// One issuer: its token or none. Several: one valid token is enough; without one, no bad token may be there.
fn requirement(names: &[String]) -> JwtRequirement {
    let provider = |n: &String| JwtRequirement::Provider(n.clone());
    let or_missing = |n: &String| JwtRequirement::Any(vec![provider(n), JwtRequirement::AllowMissing]);
    if let [only] = names {
        return or_missing(only);
    }
    let mut any: Vec<JwtRequirement> = names.iter().map(provider).collect();
    any.push(JwtRequirement::All(names.iter().map(or_missing).collect()));
    JwtRequirement::Any(any)
}

fn provider(rule: &JwtRule) -> JwtProvider {
    let claims: BTreeSet<&str> =
        rule.space_delimited_claims.iter().map(String::as_str).chain(["permission", "scope"]).collect();
    JwtProvider {
        issuer: rule.issuer.clone(),
        audiences: rule.audiences.clone(),
        jwks: keys(rule),
        forward: rule.forward_original_token,
        forward_payload_header: rule.output_payload_to_header.clone(),
        from_headers: rule.from_headers.iter().map(|h| (h.name.clone(), h.prefix.clone())).collect(),
        from_params: rule.from_params.clone(),
        from_cookies: rule.from_cookies.clone(),
        payload_in_metadata: "payload".to_owned(),
        space_delimited_claims: claims.into_iter().map(str::to_owned).collect(),
        claim_to_headers: rule.output_claim_to_headers.iter().map(|c| (c.header.clone(), c.claim.clone())).collect(),
        clock_skew: None,
    }
}

fn keys(rule: &JwtRule) -> JwksSource {
    if !rule.jwks.is_empty() {
        return JwksSource::Inline(rule.jwks.clone());
    }
    let uri = if rule.jwks_uri.is_empty() {
        format!("{}/.well-known/openid-configuration", rule.issuer.trim_end_matches('/'))
    } else {
        rule.jwks_uri.clone()
    };
    JwksSource::Remote {
        uri,
        cluster: Name::from(""),
        timeout: Some(rule.timeout.map_or(JWKS_TIMEOUT, |t| t.0)),
        cache: Some(JWKS_CACHE),
        keys: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_issuers_are_one_choice() {
        let rule = |issuer: &str| JwtRule { issuer: issuer.to_owned(), jwks: "{}".to_owned(), ..JwtRule::default() };
        let object = RequestAuthentication { jwt_rules: vec![rule("two"), rule("one")], ..Default::default() };
        let Some(HttpFilter::JwtAuthn(filter)) = filter(std::iter::once(&object)) else { panic!("no filter") };
        assert_eq!(filter.providers["origins-0"].issuer, "one");
        let JwtRequirement::Any(any) = &filter.rules[0].1 else { panic!("no choice") };
        assert_eq!(any.len(), 3);
        assert!(filter.providers["origins-1"].space_delimited_claims.iter().eq(["permission", "scope"]));
    }
}
