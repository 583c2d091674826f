//! JWT authentication, as far as it can be decided without looking into a token: requests that carry none. Whoever
//! brings a token is refused, because a token that nobody has verified must not look verified.

use http::Method;
use http::header::{
    ACCESS_CONTROL_REQUEST_METHOD, AUTHORIZATION, COOKIE, HeaderName, HeaderValue, ORIGIN, WWW_AUTHENTICATE,
};
use proxy_config::model::{JwtAuthn, JwtProvider, JwtRequirement};

use super::head::Head;
use super::reply::Reply;
use crate::error::Kind;
use crate::snapshot::{query, url_path};

/// What can be said of a request.
pub(super) enum Outcome {
    /// Without a token it may pass.
    Pass,
    /// It needs a token and has none.
    Missing(Reply),
    /// It has a token, which is not verified.
    Token,
}

/// Judges a request. Headers that tell claims or payloads to the application are never the client's own.
pub(super) fn check(said: &JwtAuthn, head: &mut Head) -> Outcome {
    for provider in said.providers.values() {
        let claims = provider.claim_to_headers.iter().map(|(header, _)| header);
        for header in claims.chain([&provider.forward_payload_header]) {
            head.headers.remove(header.as_str());
        }
    }
    if said.bypass_cors_preflight && is_preflight(head) {
        return Outcome::Pass;
    }
    let path = url_path(head.path.as_str());
    let Some((_, requirement)) = said.rules.iter().find(|(prefix, _)| path.starts_with(prefix.as_str())) else {
        return Outcome::Pass;
    };
    if said.providers.values().any(|provider| has_token(provider, head)) {
        return Outcome::Token;
    }
    if may_be_missing(requirement) { Outcome::Pass } else { Outcome::Missing(missing(head)) }
}

fn is_preflight(head: &Head) -> bool {
    head.method == Method::OPTIONS
        && head.headers.contains_key(ORIGIN)
        && head.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

fn may_be_missing(requirement: &JwtRequirement) -> bool {
    match requirement {
        JwtRequirement::AllowMissing | JwtRequirement::AllowMissingOrFailed => true,
        JwtRequirement::Any(of) => of.iter().any(may_be_missing),
        JwtRequirement::All(of) => of.iter().all(may_be_missing),
        JwtRequirement::Provider(_) => false,
    }
}

/// Whether there is anything where this provider's tokens are.
fn has_token(provider: &JwtProvider, head: &Head) -> bool {
    let in_header = |name: &HeaderName, prefix: &str| {
        let mut lines = head.headers.get_all(name).iter();
        lines.any(|line| String::from_utf8_lossy(line.as_bytes()).contains(prefix))
    };
    let in_query = |name: &str| {
        query(head.path.as_str()).split('&').any(|pair| pair.split_once('=').map_or(pair, |(n, _)| n) == name)
    };
    let in_cookies = |name: &str| {
        let lines = head.headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
        let mut pairs = lines.flat_map(|line| line.split(';'));
        pairs.any(|pair| pair.split_once('=').is_some_and(|(n, _)| n.trim() == name))
    };
    if provider.from_headers.is_empty() && provider.from_params.is_empty() && provider.from_cookies.is_empty() {
        return in_header(&AUTHORIZATION, "Bearer ") || in_query("access_token");
    }
    let named = |name: &str| HeaderName::from_bytes(name.as_bytes()).ok();
    provider.from_headers.iter().any(|(name, prefix)| named(name).is_some_and(|name| in_header(&name, prefix)))
        || provider.from_params.iter().any(|name| in_query(name))
        || provider.from_cookies.iter().any(|name| in_cookies(name))
}

fn missing(head: &Head) -> Reply {
    let mut reply = Reply::of(Kind::JwtDenied);
    let realm = format!("Bearer realm=\"{}://{}{}\"", head.scheme, head.authority(), url_path(head.path.as_str()));
    reply.headers.extend(HeaderValue::try_from(realm).ok().map(|realm| (WWW_AUTHENTICATE, realm)));
    reply
}

#[cfg(test)]
mod tests {
    use super::super::head::tests::head;
    use super::*;

    fn shown(said: &JwtAuthn, uri: &str, headers: &[(&str, &str)]) -> &'static str {
        let mut head = head("GET", uri, headers);
        let outcome = check(said, &mut head);
        assert!(!head.headers.contains_key("x-claim") && !head.headers.contains_key("x-payload"));
        match outcome {
            Outcome::Pass => "pass",
            Outcome::Missing(_) => "missing",
            Outcome::Token => "token",
        }
    }

    #[test]
    fn requests_without_a_token() {
        let usual = JwtProvider {
            claim_to_headers: vec![("x-claim".into(), "sub".into())],
            forward_payload_header: "X-Payload".into(),
            ..JwtProvider::default()
        };
        let special = JwtProvider {
            from_headers: vec![("x-jwt".into(), "T ".into())],
            from_params: vec!["t".into()],
            from_cookies: vec!["c".into()],
            ..JwtProvider::default()
        };
        let provider = JwtRequirement::Provider("a".into());
        let lax = JwtRequirement::Any(vec![provider.clone(), JwtRequirement::AllowMissing]);
        let said = JwtAuthn {
            providers: [("a".to_owned(), usual), ("b".to_owned(), special)].into(),
            rules: vec![("/strict".into(), provider), ("/".into(), lax)],
            bypass_cors_preflight: true,
        };
        for (uri, headers, expected) in [
            ("/", &[("host", "a"), ("x-claim", "forged")][..], "pass"),
            ("/", &[("x-payload", "forged")], "pass"),
            ("/strict", &[("host", "a")], "missing"),
            ("/", &[("authorization", "bearer x")], "pass"),
            ("/", &[("authorization", "Bearer x")], "token"),
            ("/?access_token=x", &[], "token"),
            ("/?t=x", &[], "token"),
            ("/", &[("x-jwt", "T x")], "token"),
            ("/", &[("x-jwt", "x")], "pass"),
            ("/", &[("cookie", "d=1; c=2")], "token"),
        ] {
            assert_eq!(shown(&said, uri, headers), expected, "{uri} {headers:?}");
        }
    }
}
