//! String, header, query and path matchers, Envoy's semantics.

use serde::Serialize;

/// `envoy.type.matcher.v3.StringMatcher` without its deprecated forms.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct StringMatcher {
    /// What to compare with.
    pub pattern: StringPattern,
    /// ASCII case is ignored; never set for regular expressions.
    pub ignore_case: bool,
}

/// The pattern of a [`StringMatcher`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum StringPattern {
    /// Equal.
    Exact(String),
    /// Starts with.
    Prefix(String),
    /// Ends with.
    Suffix(String),
    /// Contains.
    Contains(String),
    /// RE2 full match.
    Regex(String),
}

impl StringMatcher {
    /// A case-sensitive exact matcher.
    pub fn exact(value: impl Into<String>) -> Self {
        Self { pattern: StringPattern::Exact(value.into()), ignore_case: false }
    }
    /// A case-sensitive prefix matcher.
    pub fn prefix(value: impl Into<String>) -> Self {
        Self { pattern: StringPattern::Prefix(value.into()), ignore_case: false }
    }
    /// A case-sensitive suffix matcher.
    pub fn suffix(value: impl Into<String>) -> Self {
        Self { pattern: StringPattern::Suffix(value.into()), ignore_case: false }
    }
    /// An RE2 full-match.
    pub fn regex(value: impl Into<String>) -> Self {
        Self { pattern: StringPattern::Regex(value.into()), ignore_case: false }
    }
}

/// `envoy.config.route.v3.HeaderMatcher`. `name` is lower case and may be a pseudo-header (`:method`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct HeaderMatcher {
    /// Lower-case header name or pseudo-header.
    pub name: String,
    /// What the value must be.
    pub value: HeaderValueMatch,
    /// The result is negated.
    pub invert: bool,
    /// An absent header counts as present and empty.
    pub treat_missing_as_empty: bool,
}

/// The value part of a [`HeaderMatcher`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum HeaderValueMatch {
    /// The header is there (`true`) or is not (`false`).
    Present(bool),
    /// A string match on the value.
    String(StringMatcher),
    /// An integer in `[start, end)`.
    Range(i64, i64),
}

/// `envoy.config.route.v3.QueryParameterMatcher`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QueryMatcher {
    /// Parameter name.
    pub name: String,
    /// `None`: presence only.
    pub value: Option<StringMatcher>,
    /// Presence asked for explicitly: `Some(false)` wants it absent.
    pub present: Option<bool>,
}
