//! The route's changes to a request and a response.

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::{PathAndQuery, Scheme};
use http::{Method, StatusCode};
use proxy_config::model::AppendAction;

use super::head::Head;
use super::headers::{FORWARDED_HOST, ORIGINAL_HOST, ORIGINAL_PATH};
use super::vars::Facts;
use crate::snapshot::action::{HeaderOps, HeaderSet, Rewrite, Target};

/// Applies header changes to a request: removals first, so that a header can be removed and set anew.
pub(super) fn on_request(ops: &HeaderOps, head: &mut Head, facts: Facts<'_>) {
    for name in &ops.remove {
        head.headers.remove(name);
    }
    for set in &ops.set {
        let Some(value) = value(set, || Facts { request: Some(head), ..facts }.render(&set.value)) else { continue };
        match &set.name {
            Target::Header(name) => put(&mut head.headers, name, value, set.action),
            Target::Authority => head.authority = value,
            Target::Path => {
                if let Ok(path) = PathAndQuery::try_from(value.as_bytes()) {
                    head.path = path;
                }
            }
            Target::Method => {
                if let Ok(method) = Method::from_bytes(value.as_bytes()) {
                    head.method = method;
                }
            }
            Target::Scheme => {
                if let Ok(scheme) = Scheme::try_from(value.as_bytes()) {
                    head.scheme = scheme;
                }
            }
        }
    }
}

/// Applies header changes to a response.
pub(super) fn on_response(ops: &HeaderOps, headers: &mut HeaderMap, status: StatusCode, facts: Facts<'_>) {
    for name in &ops.remove {
        headers.remove(name);
    }
    for set in &ops.set {
        let Target::Header(name) = &set.name else { continue };
        let response = Some((&*headers, status.as_u16()));
        let Some(value) = value(set, || Facts { response, ..facts }.render(&set.value)) else { continue };
        put(headers, name, value, set.action);
    }
}

/// The value to write; `None` for an empty one, which changes nothing, and for one that no header can hold.
fn value(set: &HeaderSet, render: impl FnOnce() -> String) -> Option<HeaderValue> {
    let value = match set.value.constant() {
        Some(constant) => constant.clone(),
        None => HeaderValue::try_from(render()).ok()?,
    };
    (!value.is_empty()).then_some(value)
}

fn put(headers: &mut HeaderMap, name: &HeaderName, value: HeaderValue, action: AppendAction) {
    match action {
        AppendAction::Append => {
            headers.append(name, value);
        }
        AppendAction::AddIfAbsent => {
            headers.entry(name).or_insert(value);
        }
        AppendAction::Overwrite => {
            headers.insert(name, value);
        }
        AppendAction::OverwriteIfExists => {
            if headers.contains_key(name) {
                headers.insert(name, value);
            }
        }
    }
}

/// Rewrites the host.
pub(super) fn rewrite_host(head: &mut Head, to: &HeaderValue, keep_forwarded: bool, tell_original: bool) {
    let old = std::mem::replace(&mut head.authority, to.clone());
    if keep_forwarded {
        head.headers.append(FORWARDED_HOST, old.clone());
    }
    if tell_original {
        head.headers.insert(ORIGINAL_HOST, old);
    }
}

/// Rewrites the path. `matched` is what the route matched of it.
pub(super) fn rewrite_path(head: &mut Head, rewrite: &Rewrite, matched: usize, tell_original: bool) {
    let (path, query) = (head.path.path(), head.path.query());
    let mut new: Vec<u8> = match rewrite {
        Rewrite::None => return,
        Rewrite::Prefix(prefix) => {
            let rest = path.get(matched..).unwrap_or_default();
            [prefix.as_bytes(), rest.as_bytes()].concat()
        }
        Rewrite::Regex(expression, substitution) => {
            expression.replace_all(path.as_bytes(), substitution.as_bytes()).into_owned()
        }
    };
    if let Some(query) = query {
        new.push(b'?');
        new.extend_from_slice(query.as_bytes());
    }
    if new.first() != Some(&b'/') {
        new.insert(0, b'/');
    }
    let Ok(new) = PathAndQuery::from_maybe_shared(Bytes::from(new)) else { return };
    let old = std::mem::replace(&mut head.path, new);
    if tell_original {
        let old = HeaderValue::from_str(old.as_str()).expect("a path is visible ASCII");
        head.headers.insert(ORIGINAL_PATH, old);
    }
}

#[cfg(test)]
mod tests {
    use super::super::head::tests::head;
    use super::*;
    use crate::snapshot::Format;

    #[test]
    fn paths() {
        let regex = |expression: &str, to: &str| {
            Rewrite::Regex(Box::new(regex::bytes::Regex::new(expression).unwrap()), to.into())
        };
        for (path, rewrite, matched, expected, original) in [
            ("/rw/a/b?q=1", Rewrite::Prefix("/".into()), 4, "/a/b?q=1", Some("/rw/a/b?q=1")),
            ("/rw//a", Rewrite::Prefix("/".into()), 4, "//a", Some("/rw//a")),
            ("/rw", Rewrite::Prefix("/x".into()), 3, "/x", Some("/rw")),
            ("/rw", Rewrite::Prefix("".into()), 3, "/", Some("/rw")),
            ("/one", Rewrite::None, 1, "/one", None),
            ("/a/1/b?c", regex("^/a/([0-9]+)", "/n/${1}"), 0, "/n/1/b?c", Some("/a/1/b?c")),
            ("/one", regex("zz", "y"), 0, "/one", Some("/one")),
        ] {
            let mut head = head("GET", path, &[("host", "a")]);
            rewrite_path(&mut head, &rewrite, matched, true);
            assert_eq!(head.path.as_str(), expected);
            assert_eq!(head.headers.get(ORIGINAL_PATH).map(|v| v.to_str().unwrap()), original);
        }
    }

    #[test]
    fn hosts() {
        let mut head = head("GET", "/", &[("host", "web")]);
        rewrite_host(&mut head, &HeaderValue::from_static("other"), true, true);
        assert_eq!(head.authority, "other");
        assert_eq!(
            (&head.headers[ORIGINAL_HOST], &head.headers[FORWARDED_HOST]),
            (&"web".parse().unwrap(), &"web".parse().unwrap())
        );
    }

    #[test]
    fn actions() {
        let set = |value: &str, action| HeaderSet {
            name: Target::Header(HeaderName::from_static("x")),
            value: Format::compile(value),
            action,
        };
        for (before, value, action, after) in [
            (&["o"][..], "n", AppendAction::Append, &["o", "n"][..]),
            (&[], "n", AppendAction::Append, &["n"]),
            (&["o", "p"], "n", AppendAction::Overwrite, &["n"]),
            (&["o"], "n", AppendAction::AddIfAbsent, &["o"]),
            (&[], "n", AppendAction::OverwriteIfExists, &[]),
            (&["o"], "n", AppendAction::OverwriteIfExists, &["n"]),
            (&["o"], "", AppendAction::Overwrite, &["o"]),
        ] {
            let mut headers = HeaderMap::new();
            for value in before {
                headers.append("x", HeaderValue::from_static(value));
            }
            let set = set(value, action);
            if let Some(value) = super::value(&set, || unreachable!("constants ask for nothing")) {
                put(&mut headers, &HeaderName::from_static("x"), value, action);
            }
            let all: Vec<_> = headers.get_all("x").iter().collect();
            assert_eq!(all, after, "{before:?} {value} {action:?}");
        }
    }
}
