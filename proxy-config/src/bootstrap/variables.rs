//! The environment as the agent reads it: what is set but empty stays empty, what is malformed is the default with a
//! warning.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::istio::common::parse_duration;

/// Variables by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Variables(pub BTreeMap<String, String>);

impl Variables {
    /// What is set, be it empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// What is set and not empty.
    pub fn said(&self, name: &str) -> Option<&str> {
        self.get(name).filter(|value| !value.is_empty())
    }

    /// What is set, be it empty, else the default.
    pub fn or<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.get(name).unwrap_or(default)
    }

    /// Variables whose names begin so, without the beginning.
    pub fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(name, value)| Some((name.strip_prefix(prefix)?, value.as_str())))
    }

    /// A switch.
    pub fn bool(&self, name: &str, default: bool, warnings: &mut Vec<String>) -> bool {
        self.parsed(name, default, "true or false", warnings, go_bool)
    }

    /// A number of 16 bits.
    pub fn number(&self, name: &str, default: u16, warnings: &mut Vec<String>) -> u16 {
        self.parsed(name, default, "a number up to 65535", warnings, |text| text.parse().ok())
    }

    /// A number with a fraction.
    pub fn fraction(&self, name: &str, default: f64, warnings: &mut Vec<String>) -> f64 {
        let finite = |text: &str| text.parse().ok().filter(|n: &f64| n.is_finite());
        self.parsed(name, default, "a number", warnings, finite)
    }

    /// A duration in Go's syntax.
    pub fn duration(&self, name: &str, default: Duration, warnings: &mut Vec<String>) -> Duration {
        self.parsed(name, default, "a duration such as 24h", warnings, parse_duration)
    }

    fn parsed<T>(
        &self,
        name: &str,
        default: T,
        expected: &str,
        warnings: &mut Vec<String>,
        parse: impl Fn(&str) -> Option<T>,
    ) -> T {
        let Some(text) = self.get(name) else { return default };
        parse(text).unwrap_or_else(|| {
            warnings.push(format!("{name}: expected {expected}, not {text:?}; the default stays"));
            default
        })
    }
}

/// Go's words for a boolean.
pub(super) fn go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}
