//! String, header and query matchers, compiled once.

use std::fmt;

use http::header::{HeaderName, HeaderValue};
use proxy_config::{model, re2};
use regex::bytes::Regex;

use super::RequestView;

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
    Regex(Box<Expression>),
}

/// A regular expression; most of those that Istio makes ask for something simpler.
#[derive(Debug, Clone)]
struct Expression {
    said: Box<str>,
    regex: Regex,
    simple: Option<Simple>,
}

/// What an expression comes to for one line of ASCII.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Simple {
    /// `.*`
    Any,
    /// `.+`
    NotEmpty,
    /// `.*text.*`
    Contains(Box<str>),
}

impl Expression {
    fn compile(said: &str) -> Result<Self, String> {
        Ok(Self { said: said.into(), regex: re2::full_match(said)?, simple: Simple::of(said) })
    }

    fn is_match(&self, value: &[u8]) -> bool {
        match &self.simple {
            Some(simple) if value.is_ascii() && !value.contains(&b'\n') => simple.matches(value),
            _ => self.regex.is_match(value),
        }
    }
}

impl Simple {
    fn of(said: &str) -> Option<Self> {
        match said {
            ".*" => return Some(Self::Any),
            ".+" => return Some(Self::NotEmpty),
            _ => {}
        }
        let text = said.strip_prefix(".*")?.strip_suffix(".*")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "/-_:".contains(c);
        (!text.is_empty() && text.chars().all(plain)).then(|| Self::Contains(text.into()))
    }

    fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::NotEmpty => !value.is_empty(),
            Self::Contains(text) => contains(value, text.as_bytes()),
        }
    }
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
            model::StringPattern::Regex(t) => Pattern::Regex(Box::new(Expression::compile(t)?)),
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

/// For people: `a`, `a*`, `*a`, `*a*`; expressions as they were said.
impl fmt::Display for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pattern {
            Pattern::Exact(t) => f.write_str(t)?,
            Pattern::Prefix(t) => write!(f, "{t}*")?,
            Pattern::Suffix(t) => write!(f, "*{t}")?,
            Pattern::Contains(t) => write!(f, "*{t}*")?,
            Pattern::Regex(expression) => match &expression.simple {
                Some(Simple::Any) => f.write_str("*")?,
                Some(Simple::NotEmpty) => f.write_str("any value")?,
                Some(Simple::Contains(t)) => write!(f, "*{t}*")?,
                None => write!(f, "/{}/", expression.said)?,
            },
        }
        f.write_str(if self.ignore_case { " (any case)" } else { "" })
    }
}

fn contains(value: &[u8], part: &[u8]) -> bool {
    let Some((first, rest)) = part.split_first() else { return true };
    // Comparing only where the first byte fits saves a call for every byte of the value.
    let starts = value.iter().enumerate().filter(|(_, byte)| *byte == first);
    starts.map(|(at, _)| &value[at + 1..]).any(|tail| tail.starts_with(rest))
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
    /// Whether it asks for a header, and not for a part of the request line or the host.
    pub(super) fn is_of_header(&self) -> bool {
        matches!(self.name, Field::Header(_) | Field::Never)
    }

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

    /// Whether the request's header is as wanted. Each line of a repeated header is looked at by itself: one that
    /// matches is enough, and an inverted matcher fails on one.
    pub fn matches(&self, request: &RequestView<'_>) -> bool {
        let name = match &self.name {
            Field::Method => return self.judge(request.method.as_str().as_bytes()),
            Field::Path => return self.judge(request.path.as_bytes()),
            Field::Authority => return self.judge(request.authority.as_bytes()),
            Field::Scheme => return self.judge(request.scheme.as_bytes()),
            Field::Never => return self.judge_absent(),
            Field::Header(name) => name,
        };
        let mut values = request.headers.get_all(name).iter().map(HeaderValue::as_bytes);
        let Some(first) = values.next() else { return self.judge_absent() };
        if let Value::Present(_) = self.value {
            return self.judge(first);
        }
        (self.found(first) || values.any(|value| self.found(value))) != self.invert
    }

    /// The header, lower case, or pseudo-header; `None` for a name that no request can have.
    pub fn name(&self) -> Option<&str> {
        match &self.name {
            Field::Method => Some(":method"),
            Field::Path => Some(":path"),
            Field::Authority => Some(":authority"),
            Field::Scheme => Some(":scheme"),
            Field::Header(name) => Some(name.as_str()),
            Field::Never => None,
        }
    }

    /// What it says where there is no such header, or no request at all (TCP). Absence satisfies nothing but the wish
    /// for it, not even an inverted match, as Envoy has it.
    pub fn judge_absent(&self) -> bool {
        match self.value {
            Value::Present(wanted) => wanted == self.invert,
            _ if self.missing_is_empty => self.found(b"") != self.invert,
            _ => false,
        }
    }

    fn judge(&self, value: &[u8]) -> bool {
        self.found(value) != self.invert
    }

    fn found(&self, value: &[u8]) -> bool {
        match &self.value {
            Value::Text(text) => text.matches(value),
            Value::Range(start, end) => integer(value).is_some_and(|n| n >= *start && n < *end),
            Value::Present(wanted) => *wanted,
        }
    }
}

/// What the value must be, for people.
impl fmt::Display for HeaderMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.invert { "not " } else { "" })?;
        match &self.value {
            Value::Present(true) => f.write_str("any value"),
            Value::Present(false) => f.write_str("absent"),
            Value::Text(text) => text.fmt(f),
            Value::Range(start, end) => write!(f, "{start} to {end}"),
        }
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
    path.bytes().position(|b| b == b'?' || b == b'#').map_or(path, |end| &path[..end])
}

/// The query without `?` and fragment; empty when there is none.
pub fn query(path: &str) -> &str {
    let Some(start) = path.find('?') else { return "" };
    let query = &path[start + 1..];
    query.find('#').map_or(query, |end| &query[..end])
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method};
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

    #[test]
    fn simple_expressions_mean_what_the_expression_means() {
        for said in [".*", ".+", ".*/ns/a/.*", ".*a.b.*"] {
            let (fast, slow) = (text(StringPattern::Regex(said.into()), false), re2::full_match(said).unwrap());
            for value in
                ["", "x", "spiffe://td/ns/a/sa/b", "/ns/a/", "/ns/ab/", "x\n", "\u{e4}/ns/a/", "/ns/a/\n", "a.b"]
            {
                assert_eq!(fast.matches(value.as_bytes()), slow.is_match(value.as_bytes()), "{said} {value:?}");
            }
        }
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
        assert!(!header("a", exact("v,w"), false, false).matches(&r), "lines are not joined");
        assert!(header("a", exact("v"), false, false).matches(&r));
        assert!(header("a", exact("w"), false, false).matches(&r));
        assert!(!header("a", exact("w"), true, false).matches(&r), "one offending line is enough");
        assert!(header("a", exact("x"), true, false).matches(&r));
        assert!(header(":path", exact("/p?q"), false, false).matches(&r));
        assert!(header(":authority", exact("h:1"), false, false).matches(&r));
        assert!(header("n", HeaderValueMatch::Range(-7, 0), false, false).matches(&r));
        assert!(!header("n", HeaderValueMatch::Range(-6, 0), false, false).matches(&r));
        assert!(!header("zz", exact("v"), true, false).matches(&r), "missing never matches");
        assert!(header("zz", exact("v"), true, true).matches(&r), "missing is empty");
        assert!(header("zz", HeaderValueMatch::Present(false), false, false).matches(&r));
        assert!(header("zz", HeaderValueMatch::Present(true), true, false).matches(&r));
        assert!(!header("a", HeaderValueMatch::Present(true), true, false).matches(&r));
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
