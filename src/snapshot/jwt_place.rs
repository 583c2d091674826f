//! Where tokens are looked for, and how they are taken out of a request again.

use std::borrow::Cow;

use http::HeaderMap;
use http::header::{AUTHORIZATION, COOKIE, HeaderName};
use percent_encoding::percent_decode_str;
use proxy_config::model::JwtProvider;

use super::RequestView;
use super::matcher::query;

/// The places of one provider. All that is found there counts.
#[derive(Debug)]
pub(super) struct Places {
    /// Header, and the text in front of the token.
    headers: Box<[(HeaderName, Box<str>)]>,
    params: Box<[Box<str>]>,
    cookies: Box<[Box<str>]>,
}

/// Where one token was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A header.
    Header(HeaderName),
    /// A query parameter.
    Param(Box<str>),
    /// A cookie.
    Cookie,
}

impl Places {
    /// Compiles; a header name can be wrong.
    pub(super) fn compile(said: &JwtProvider) -> Result<Self, String> {
        let header = |(name, prefix): &(String, String)| {
            let name =
                HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("from_headers: {name:?} is no name"))?;
            Ok::<_, String>((name, Box::from(prefix.as_str())))
        };
        let mut headers: Vec<(HeaderName, Box<str>)> =
            said.from_headers.iter().map(header).collect::<Result<_, _>>()?;
        let mut params: Vec<Box<str>> = said.from_params.iter().map(|p| p.as_str().into()).collect();
        let mut cookies: Vec<Box<str>> = said.from_cookies.iter().map(|c| c.as_str().into()).collect();
        if headers.is_empty() && params.is_empty() && cookies.is_empty() {
            headers.push((AUTHORIZATION, "Bearer ".into()));
            params.push("access_token".into());
        }
        // Envoy keeps them in sorted maps.
        headers.sort_by(|a, b| (a.0.as_str(), &a.1).cmp(&(b.0.as_str(), &b.1)));
        headers.dedup();
        for list in [&mut params, &mut cookies] {
            list.sort();
            list.dedup();
        }
        Ok(Self { headers: headers.into(), params: params.into(), cookies: cookies.into() })
    }

    /// Every token, in the order headers, parameters, cookies. A name that comes twice brings two tokens: the application
    /// may read either.
    pub(super) fn find<'r>(&self, request: &RequestView<'r>) -> Vec<(Place, Cow<'r, str>)> {
        let mut found = Vec::new();
        for (name, prefix) in &self.headers {
            for line in request.headers.get_all(name) {
                let text = match line.to_str() {
                    Ok(text) => Cow::Borrowed(text),
                    Err(_) => String::from_utf8_lossy(line.as_bytes()),
                };
                let token = match text {
                    Cow::Borrowed(text) => behind(text, prefix).map(Cow::Borrowed),
                    Cow::Owned(text) => behind(&text, prefix).map(|token| Cow::Owned(token.to_owned())),
                };
                found.extend(token.map(|token| (Place::Header(name.clone()), token)));
            }
        }
        if !self.params.is_empty() {
            self.in_query(query(request.path), &mut found);
        }
        if !self.cookies.is_empty() {
            self.in_cookies(request.headers, &mut found);
        }
        found
    }

    fn in_query<'r>(&self, query: &'r str, found: &mut Vec<(Place, Cow<'r, str>)>) {
        if query.is_empty() {
            return;
        }
        for wanted in &self.params {
            for (name, value) in query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, ""))) {
                if decoded(name) == **wanted {
                    found.push((Place::Param(wanted.clone()), decoded(value)));
                }
            }
        }
    }

    fn in_cookies<'r>(&self, headers: &'r HeaderMap, found: &mut Vec<(Place, Cow<'r, str>)>) {
        for wanted in &self.cookies {
            let lines = headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
            for (name, value) in lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.split_once('=')) {
                if name.trim() == &**wanted {
                    let quoted = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
                    found.push((Place::Cookie, Cow::Borrowed(quoted.unwrap_or(value))));
                }
            }
        }
    }
}

/// The token of a header line: what follows the prefix wherever that stands, from the first character on that a token can
/// have. `None`: the prefix is not there.
fn behind<'t>(text: &'t str, prefix: &str) -> Option<&'t str> {
    if prefix.is_empty() {
        return Some(text);
    }
    let rest = &text[text.find(prefix)? + prefix.len()..];
    let starts = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    Some(rest.find(starts).map_or(text, |at| &rest[at..]))
}

fn decoded(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

/// The path without these query parameters; the others stay as they were written.
pub fn without_param(path: &str, name: &str) -> String {
    let (before, after) = path.split_once('?').unwrap_or((path, ""));
    let keeps = |pair: &&str| decoded(pair.split_once('=').map_or(*pair, |(n, _)| n)) != name;
    let rest: Vec<&str> = after.split('&').filter(keeps).collect();
    let rest = rest.join("&");
    if rest.is_empty() { before.to_owned() } else { format!("{before}?{rest}") }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Method};

    use super::*;

    fn found(said: &JwtProvider, path: &str, headers: &[(&str, &str)]) -> Vec<(Place, String)> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        let request = RequestView { method: &Method::GET, scheme: "http", authority: "a", path, headers: &map };
        let places = Places::compile(said).unwrap();
        places.find(&request).into_iter().map(|(place, token)| (place, token.into_owned())).collect()
    }

    #[test]
    fn the_usual_places() {
        let said = JwtProvider::default();
        let one = |path: &str, value: &str| found(&said, path, &[("authorization", value)]);
        let in_header = |token: &str| vec![(Place::Header(AUTHORIZATION), token.to_owned())];
        assert_eq!(one("/", "Bearer a.b.c"), in_header("a.b.c"));
        assert_eq!(one("/", "x Bearer  a.b"), in_header("a.b"));
        assert_eq!(one("/", "Bearer !"), in_header("Bearer !"), "nothing that a token can have: the whole line");
        for none in ["Bearer", "bearer a.b.c", "Basic a", ""] {
            assert_eq!(one("/", none), [], "{none}");
        }
        let param = |token: &str| (Place::Param("access_token".into()), token.to_owned());
        assert_eq!(found(&said, "/?a=1&access%5Ftoken=x%2Ey", &[]), [param("x.y")]);
        assert_eq!(found(&said, "/?access_token=x&access_token=y", &[]), [param("x"), param("y")]);
        assert_eq!(found(&said, "/?access_token", &[]), [param("")]);
        let twice = found(&said, "/", &[("authorization", "Bearer a"), ("authorization", "Bearer b")]);
        assert_eq!(twice.len(), 2);
    }

    #[test]
    fn places_of_ones_own() {
        let said = JwtProvider {
            from_headers: vec![("x-jwt".into(), "T ".into()), ("x-raw".into(), String::new())],
            from_params: vec!["t".into()],
            from_cookies: vec!["c".into()],
            ..JwtProvider::default()
        };
        assert_eq!(found(&said, "/?access_token=x", &[("authorization", "Bearer x"), ("x-jwt", "x")]), []);
        let all =
            found(&said, "/?t=p", &[("x-jwt", "T h"), ("x-raw", "r"), ("cookie", "d=1; c=\"k\""), ("cookie", "c=l")]);
        let tokens: Vec<&str> = all.iter().map(|(_, token)| &**token).collect();
        assert_eq!(tokens, ["h", "r", "p", "k", "l"]);
        let wrong = JwtProvider { from_headers: vec![("a b".into(), String::new())], ..JwtProvider::default() };
        assert!(Places::compile(&wrong).is_err());
    }

    #[test]
    fn parameters_are_taken_out() {
        for (path, expected) in [
            ("/x?t=1", "/x"),
            ("/x?a=%20&t=1&b&t=2", "/x?a=%20&b"),
            ("/x?%74=1&a=t", "/x?a=t"),
            ("/x", "/x"),
            ("/x?tt=1", "/x?tt=1"),
        ] {
            assert_eq!(without_param(path, "t"), expected, "{path}");
        }
    }
}
