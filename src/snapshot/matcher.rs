//! String, header and query matchers, compiled once.

use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};
use proxy_config::model;
use regex::bytes::Regex;

use super::RequestView;
use super::re2;

/// A compiled [`model::StringMatcher`].
#[derive(Debug, Clone)]
pub struct StringMatch {
    pattern: Pattern,
    ignore_case: bool,
}

#[derive(Debug, Clone)]
enum Pattern {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Contains(Box<str>),
    Regex(Box<Regex>),
}

impl StringMatch {
    /// Compiles; only a regular expression can fail.
    pub fn compile(said: &model::StringMatcher) -> Result<Self, String> {
        let ignore_case = said.ignore_case;
        let text = |text: &String| if ignore_case { text.to_ascii_lowercase().into() } else { text.as_str().into() };
        let pattern = match &said.pattern {
            model::StringPattern::Exact(t) => Pattern::Exact(text(t)),
            model::StringPattern::Prefix(t) => Pattern::Prefix(text(t)),
            model::StringPattern::Suffix(t) => Pattern::Suffix(text(t)),
            model::StringPattern::Contains(t) => Pattern::Contains(text(t)),
            model::StringPattern::Regex(t) => Pattern::Regex(Box::new(re2::full_match(t)?)),
        };
        Ok(Self { pattern, ignore_case })
    }

    /// Whether a value matches.
    pub fn matches(&self, value: &[u8]) -> bool {
        if self.ignore_case && !matches!(self.pattern, Pattern::Regex(_)) {
            return self.matches_folded(value);
        }
        match &self.pattern {
            Pattern::Exact(t) => value == t.as_bytes(),
            Pattern::Prefix(t) => value.starts_with(t.as_bytes()),
            Pattern::Suffix(t) => value.ends_with(t.as_bytes()),
            Pattern::Contains(t) => contains(value, t.as_bytes()),
            Pattern::Regex(re) => re.is_match(value),
        }
    }

    /// The text that alone matches, when there is just one.
    pub fn exact(&self) -> Option<&str> {
        match &self.pattern {
            Pattern::Exact(text) if !self.ignore_case => Some(text),
            _ => None,
        }
    }

    fn matches_folded(&self, value: &[u8]) -> bool {
        match &self.pattern {
            Pattern::Exact(t) => value.eq_ignore_ascii_case(t.as_bytes()),
            Pattern::Prefix(t) => value.len() >= t.len() && value[..t.len()].eq_ignore_ascii_case(t.as_bytes()),
            Pattern::Suffix(t) => {
                value.len() >= t.len() && value[value.len() - t.len()..].eq_ignore_ascii_case(t.as_bytes())
            }
            Pattern::Contains(t) => contains(&value.to_ascii_lowercase(), t.as_bytes()),
            Pattern::Regex(re) => re.is_match(value),
        }
    }
}

fn contains(value: &[u8], part: &[u8]) -> bool {
    part.is_empty() || value.windows(part.len()).any(|window| window == part)
}

/// How repeated header lines are seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    /// Joined with commas: routes.
    Joined,
    /// Each by itself, one match is enough: RBAC.
    Single,
}

/// A compiled [`model::HeaderMatcher`].
#[derive(Debug, Clone)]
pub struct HeaderMatch {
    name: Field,
    value: Value,
    invert: bool,
    missing_is_empty: bool,
}

#[derive(Debug, Clone)]
enum Field {
    Method,
    Path,
    Authority,
    Scheme,
    Header(HeaderName),
    /// A name that no request can have.
    Never,
}

#[derive(Debug, Clone)]
enum Value {
    Present(bool),
    Text(StringMatch),
    Range(i64, i64),
}

impl HeaderMatch {
    /// Compiles; only a regular expression can fail.
    pub fn compile(said: &model::HeaderMatcher) -> Result<Self, String> {
        let value = match &said.value {
            model::HeaderValueMatch::Present(wanted) => Value::Present(*wanted),
            model::HeaderValueMatch::String(text) => Value::Text(StringMatch::compile(text)?),
            model::HeaderValueMatch::Range(start, end) => Value::Range(*start, *end),
        };
        Ok(Self {
            name: Field::new(&said.name),
            value,
            invert: said.invert,
            missing_is_empty: said.treat_missing_as_empty,
        })
    }

    /// Whether the request's header is as wanted.
    pub fn matches(&self, request: &RequestView<'_>, lines: Lines) -> bool {
        let name = match &self.name {
            Field::Method => return self.judge(Some(request.method.as_str().as_bytes())),
            Field::Path => return self.judge(Some(request.path.as_bytes())),
            Field::Authority => return self.judge(Some(request.authority.as_bytes())),
            Field::Scheme => return self.judge(Some(request.scheme.as_bytes())),
            Field::Never => return self.judge(None),
            Field::Header(name) => name,
        };
        let mut values = request.headers.get_all(name).iter();
        let first = values.next().map(HeaderValue::as_bytes);
        if values.next().is_none() {
            return self.judge(first);
        }
        match lines {
            Lines::Joined => self.judge(Some(&joined(request.headers, name))),
            Lines::Single => request.headers.get_all(name).iter().any(|v| self.judge(Some(v.as_bytes()))),
        }
    }

    /// A missing header satisfies nothing but the wish for its absence, not even an inverted match, as Envoy has it.
    fn judge(&self, value: Option<&[u8]>) -> bool {
        if let Value::Present(wanted) = self.value {
            return (value.is_some() == wanted) != self.invert;
        }
        let value = match value {
            Some(value) => value,
            None if self.missing_is_empty => b"",
            None => return false,
        };
        let found = match &self.value {
            Value::Text(text) => text.matches(value),
            Value::Range(start, end) => integer(value).is_some_and(|n| n >= *start && n < *end),
            Value::Present(_) => true,
        };
        found != self.invert
    }
}

impl Field {
    fn new(name: &str) -> Self {
        match name {
            ":method" => Self::Method,
            ":path" => Self::Path,
            ":authority" | "host" => Self::Authority,
            ":scheme" => Self::Scheme,
            _ => HeaderName::from_bytes(name.as_bytes()).map_or(Self::Never, Self::Header),
        }
    }
}

fn integer(value: &[u8]) -> Option<i64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// All lines of a header, joined with commas. Allocates, so callers with one line do not ask.
pub fn joined(headers: &HeaderMap, name: &HeaderName) -> Vec<u8> {
    let mut all = Vec::new();
    for (i, value) in headers.get_all(name).iter().enumerate() {
        if i > 0 {
            all.push(b',');
        }
        all.extend_from_slice(value.as_bytes());
    }
    all
}

/// A compiled [`model::QueryMatcher`]. Values are compared as they stand, without percent-decoding, and the first
/// occurrence counts.
#[derive(Debug, Clone)]
pub struct QueryMatch {
    name: Box<str>,
    value: Option<StringMatch>,
    present: bool,
}

impl QueryMatch {
    /// Compiles; only a regular expression can fail.
    pub fn compile(said: &model::QueryMatcher) -> Result<Self, String> {
        Ok(Self {
            name: said.name.as_str().into(),
            value: said.value.as_ref().map(StringMatch::compile).transpose()?,
            present: said.present != Some(false),
        })
    }

    /// Whether the query (without `?`) has it.
    pub fn matches(&self, query: &str) -> bool {
        let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let found = pairs.find(|(name, _)| *name == &*self.name);
        match (&self.value, found) {
            (Some(wanted), Some((_, value))) => wanted.matches(value.as_bytes()),
            (Some(_), None) => false,
            (None, found) => found.is_some() == self.present,
        }
    }
}

/// The path without query and fragment.
pub fn url_path(path: &str) -> &str {
    path.find(['?', '#']).map_or(path, |end| &path[..end])
}

/// The query without `?` and fragment; empty when there is none.
pub fn query(path: &str) -> &str {
    let Some(start) = path.find('?') else { return "" };
    let query = &path[start + 1..];
    query.find('#').map_or(query, |end| &query[..end])
}

#[cfg(test)]
mod tests {
    use http::Method;
    use proxy_config::model::{HeaderMatcher, HeaderValueMatch, QueryMatcher, StringMatcher, StringPattern};

    use super::*;

    fn text(pattern: StringPattern, ignore_case: bool) -> StringMatch {
        StringMatch::compile(&StringMatcher { pattern, ignore_case }).unwrap()
    }

    #[test]
    fn strings() {
        assert!(text(StringPattern::Exact("a".into()), false).matches(b"a"));
        assert!(!text(StringPattern::Exact("a".into()), false).matches(b"A"));
        assert!(text(StringPattern::Exact("aB".into()), true).matches(b"Ab"));
        assert!(text(StringPattern::Prefix("/x".into()), true).matches(b"/X/y"));
        assert!(text(StringPattern::Suffix("y".into()), true).matches(b"/X/Y"));
        assert!(!text(StringPattern::Suffix("long".into()), true).matches(b"ng"));
        assert!(text(StringPattern::Contains("bC".into()), true).matches(b"aBcd"));
        assert!(text(StringPattern::Contains(String::new()), false).matches(b""));
        assert!(text(StringPattern::Regex("a|bc".into()), false).matches(b"bc"));
        assert!(!text(StringPattern::Regex("a|bc".into()), false).matches(b"abc"));
    }

    fn header(name: &str, value: HeaderValueMatch, invert: bool, missing: bool) -> HeaderMatch {
        HeaderMatch::compile(&HeaderMatcher { name: name.into(), value, invert, treat_missing_as_empty: missing })
            .unwrap()
    }

    #[test]
    fn headers() {
        let mut headers = HeaderMap::new();
        headers.append("a", "v".parse().unwrap());
        headers.append("a", "w".parse().unwrap());
        headers.append("n", "-7".parse().unwrap());
        let r = RequestView { method: &Method::GET, scheme: "http", authority: "h:1", path: "/p?q", headers: &headers };
        let exact = |v: &str| HeaderValueMatch::String(StringMatcher::exact(v));
        assert!(header("a", exact("v,w"), false, false).matches(&r, Lines::Joined));
        assert!(!header("a", exact("v"), false, false).matches(&r, Lines::Joined));
        assert!(header("a", exact("w"), false, false).matches(&r, Lines::Single));
        assert!(!header("a", exact("v,w"), false, false).matches(&r, Lines::Single));
        assert!(header(":path", exact("/p?q"), false, false).matches(&r, Lines::Joined));
        assert!(header(":authority", exact("h:1"), false, false).matches(&r, Lines::Joined));
        assert!(header("n", HeaderValueMatch::Range(-7, 0), false, false).matches(&r, Lines::Joined));
        assert!(!header("n", HeaderValueMatch::Range(-6, 0), false, false).matches(&r, Lines::Joined));
        assert!(!header("zz", exact("v"), true, false).matches(&r, Lines::Joined), "missing never matches");
        assert!(header("zz", exact("v"), true, true).matches(&r, Lines::Joined), "missing is empty");
        assert!(header("zz", HeaderValueMatch::Present(false), false, false).matches(&r, Lines::Joined));
        assert!(header("zz", HeaderValueMatch::Present(true), true, false).matches(&r, Lines::Joined));
        assert!(!header("a", HeaderValueMatch::Present(true), true, false).matches(&r, Lines::Joined));
    }

    #[test]
    fn queries() {
        let q = |value: Option<StringMatcher>, present| {
            QueryMatch::compile(&QueryMatcher { name: "a".into(), value, present }).unwrap()
        };
        assert!(q(None, None).matches("b=1&a"));
        assert!(!q(None, Some(false)).matches("b=1&a=2"));
        assert!(q(None, Some(false)).matches("b=1"));
        assert!(q(Some(StringMatcher::exact("1")), None).matches("a=1&a=2"));
        assert!(!q(Some(StringMatcher::exact("2")), None).matches("a=1&a=2"));
        assert!(!q(Some(StringMatcher::exact(" ")), None).matches("a=%20"));
        assert_eq!((url_path("/a?b#c"), query("/a?b#c"), url_path("/a#x?y"), query("/a")), ("/a", "b", "/a", ""));
    }
}
