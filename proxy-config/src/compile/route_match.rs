//! A VirtualService match as a route match, and the part of it that is decided here and now.

use std::collections::BTreeMap;

use crate::istio::virtual_service::{HttpMatch, StringMatch};
use crate::model::{
    HeaderMatcher, HeaderValueMatch, MetadataMatcher, PathMatch, QueryMatcher, RouteMatch, StringMatcher, ValueMatcher,
};
use crate::registry::Proxy;

/// Matches everything.
pub(super) fn any() -> RouteMatch {
    RouteMatch {
        path: PathMatch::Prefix("/".to_owned()),
        case_sensitive: true,
        headers: Vec::new(),
        query: Vec::new(),
        dynamic_metadata: Vec::new(),
        grpc: false,
    }
}

/// Whether nothing that follows such a match can be reached.
pub(super) fn is_catch_all(m: &RouteMatch) -> bool {
    let path = match &m.path {
        PathMatch::Prefix(p) => p == "/",
        PathMatch::Regex(r) => r == ".*",
        PathMatch::Exact(_) | PathMatch::PathSeparatedPrefix(_) | PathMatch::Template(_) | PathMatch::Connect => false,
    };
    path && m.headers.is_empty() && m.query.is_empty() && m.dynamic_metadata.is_empty()
}

/// Port, gateway, labels and namespace do not change while a configuration lives: a match that asks for others is
/// left out of this proxy's table.
pub(super) fn applies(m: &HttpMatch, proxy: &Proxy, port: u16) -> bool {
    if m.port != 0 && m.port != u32::from(port) {
        return false;
    }
    if !m.gateways.is_empty() {
        return m.gateways.iter().any(|g| g == "mesh");
    }
    has_labels(&m.source_labels, proxy) && from_namespace(&m.source_namespace, proxy)
}

/// Whether the proxy has these labels.
pub(super) fn has_labels(wanted: &BTreeMap<String, String>, proxy: &Proxy) -> bool {
    wanted.iter().all(|(k, v)| proxy.labels.get(k) == Some(v))
}

/// Whether the proxy lives in the namespace, when one is asked for.
pub(super) fn from_namespace(wanted: &str, proxy: &Proxy) -> bool {
    wanted.is_empty() || wanted == proxy.namespace
}

/// What is left for the data path to decide.
pub(super) fn translate(m: &HttpMatch) -> RouteMatch {
    let mut out = any();
    for (name, value) in &m.headers {
        match claim_matcher(name, value.as_ref(), false) {
            Some(claim) => out.dynamic_metadata.push(claim),
            None => out.headers.push(header(name, value.as_ref())),
        }
    }
    for (name, value) in &m.without_headers {
        match claim_matcher(name, value.as_ref(), true) {
            Some(claim) => out.dynamic_metadata.push(claim),
            None => out.headers.push(HeaderMatcher {
                invert: true,
                treat_missing_as_empty: !is_presence(value.as_ref()),
                ..header(name, value.as_ref())
            }),
        }
    }
    out.headers.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(path) = m.uri.as_ref().and_then(path) {
        out.path = path;
    }
    out.case_sensitive = !m.ignore_uri_case;
    for (name, value) in [(":method", &m.method), (":authority", &m.authority), (":scheme", &m.scheme)] {
        if let Some(value) = value {
            out.headers.push(header(name, Some(value)));
        }
    }
    out.query = m.query_params.iter().map(|(name, value)| query(name, value.as_ref())).collect();
    out
}

fn path(m: &StringMatch) -> Option<PathMatch> {
    let StringMatch { exact, prefix, regex } = m;
    exact
        .clone()
        .map(PathMatch::Exact)
        .or_else(|| prefix.clone().map(PathMatch::Prefix))
        .or_else(|| regex.clone().map(PathMatch::Regex))
}

/// Nothing said, or the regular expression `*` (which is none), asks for presence only.
fn is_presence(m: Option<&StringMatch>) -> bool {
    m.is_none_or(|m| *m == StringMatch::default() || m.regex.as_deref() == Some("*"))
}

/// `None` for presence.
pub(super) fn string(m: Option<&StringMatch>) -> Option<StringMatcher> {
    if is_presence(m) {
        return None;
    }
    let StringMatch { exact, prefix, regex } = m?;
    exact
        .as_ref()
        .map(StringMatcher::exact)
        .or_else(|| prefix.as_ref().map(StringMatcher::prefix))
        .or_else(|| regex.as_ref().map(StringMatcher::regex))
}

fn header(name: &str, value: Option<&StringMatch>) -> HeaderMatcher {
    let value = string(value).map_or(HeaderValueMatch::Present(true), HeaderValueMatch::String);
    HeaderMatcher { name: name.to_ascii_lowercase(), value, invert: false, treat_missing_as_empty: false }
}

fn query(name: &str, value: Option<&StringMatch>) -> QueryMatcher {
    let value = string(value);
    let present = value.is_none().then_some(true);
    QueryMatcher { name: name.to_owned(), value, present }
}

/// `@request.auth.claims.a.b` and `@request.auth.claims[a][b]` look at a token's claims instead of a header.
fn claim_matcher(name: &str, value: Option<&StringMatch>, invert: bool) -> Option<MetadataMatcher> {
    const PREFIX: &str = "@request.auth.claims";
    let rest = name.get(..PREFIX.len()).filter(|p| p.eq_ignore_ascii_case(PREFIX)).map(|p| &name[p.len()..])?;
    let claims: Vec<&str> = match rest.strip_prefix('.').filter(|r| !r.is_empty()) {
        Some(dotted) => dotted.split('.').collect(),
        None => rest.strip_prefix('[')?.strip_suffix(']').filter(|r| !r.is_empty())?.split("][").collect(),
    };
    let value = ValueMatcher::String(string(value).unwrap_or_else(|| StringMatcher::regex(".*")));
    let path = std::iter::once("payload").chain(claims).map(str::to_owned).collect();
    Some(MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".to_owned(),
        path,
        value: ValueMatcher::Or(vec![ValueMatcher::ListOneOf(Box::new(value.clone())), value]),
        invert,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exact(v: &str) -> Option<StringMatch> {
        Some(StringMatch { exact: Some(v.to_owned()), ..StringMatch::default() })
    }

    #[test]
    fn order_of_headers_and_absence() {
        let m = HttpMatch {
            headers: BTreeMap::from([("X-B".to_owned(), exact("1")), ("x-c".to_owned(), None)]),
            without_headers: BTreeMap::from([("x-a".to_owned(), exact("2"))]),
            method: exact("GET"),
            ..HttpMatch::default()
        };
        let out = translate(&m);
        let names: Vec<&str> = out.headers.iter().map(|h| h.name.as_str()).collect();
        assert_eq!(names, ["x-a", "x-b", "x-c", ":method"]);
        assert!(out.headers[0].invert && out.headers[0].treat_missing_as_empty);
        assert_eq!(out.headers[2].value, HeaderValueMatch::Present(true));
    }

    #[test]
    fn claims_are_no_headers() {
        let m = HttpMatch {
            headers: BTreeMap::from([("@request.auth.claims[a][b]".to_owned(), exact("1"))]),
            ..HttpMatch::default()
        };
        let out = translate(&m);
        assert!(out.headers.is_empty());
        assert_eq!(out.dynamic_metadata[0].path, ["payload", "a", "b"]);
        assert!(!is_catch_all(&out));
    }

    #[test]
    fn static_parts_prune() {
        let proxy = Proxy { namespace: "n".to_owned(), ..Proxy::default() };
        let on_port = HttpMatch { port: 80, ..HttpMatch::default() };
        assert!(applies(&on_port, &proxy, 80) && !applies(&on_port, &proxy, 81));
        let gateway = HttpMatch { gateways: vec!["g".to_owned()], ..HttpMatch::default() };
        assert!(!applies(&gateway, &proxy, 80));
        let elsewhere = HttpMatch { source_namespace: "m".to_owned(), ..HttpMatch::default() };
        assert!(!applies(&elsewhere, &proxy, 80));
    }
}
