//! `docs/conformance.toml`: what is in reach, which differences are ours on purpose, which fields are inert.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use regex::Regex;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::tally::Difference;

/// All rules.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rules {
    /// Tags of wire cases.
    #[serde(default)]
    tags: Tags,
    /// Inputs that nobody expects yet.
    #[serde(default)]
    beyond: Vec<Beyond>,
    /// Differences that are meant.
    #[serde(default)]
    exception: Vec<Exception>,
    /// Fields that are read by nobody, on purpose.
    #[serde(default)]
    inert: Vec<Inert>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tags {
    /// A case with one of these is in reach ...
    reached: Vec<String>,
    /// ... unless it has one of these.
    blocking: Vec<String>,
}

/// A part of an input that puts a case out of reach.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Beyond {
    reason: String,
    /// Predicates over the case's content by JSON pointer (`*` stands for any key or index); all must hold.
    case: BTreeMap<String, Pattern>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Exception {
    reason: String,
    /// Predicates over the case's content, as above.
    #[serde(default)]
    case: BTreeMap<String, Pattern>,
    /// Which field differs.
    field: Option<Pattern>,
    /// What was recorded.
    expected: Option<Pattern>,
    /// What we did.
    seen: Option<Pattern>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Inert {
    /// Field path.
    path: Pattern,
    /// Why nobody reads it.
    #[allow(dead_code, reason = "required of whoever writes the file, read by whoever reads it")]
    reason: String,
}

/// A regular expression that must match the whole text.
#[derive(Debug)]
struct Pattern(Regex);

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Regex::new(&format!(r"(?s)\A(?:{text})\z")).map(Self).map_err(serde::de::Error::custom)
    }
}

impl Rules {
    /// Reads the file.
    ///
    /// # Errors
    /// When it is not there or says something that the runner does not know.
    pub(super) fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not as expected", path.display()))
    }

    /// Why a case is out of reach; `None`: it is in reach.
    pub(super) fn beyond(&self, content: &Value) -> Option<&str> {
        self.beyond.iter().find(|rule| all_hold(&rule.case, content)).map(|rule| rule.reason.as_str())
    }

    /// Whether the tags of a wire case put it in reach.
    pub(super) fn reaches(&self, tags: &[String]) -> bool {
        let any = |list: &[String]| tags.iter().any(|tag| list.contains(tag));
        any(&self.tags.reached) && !any(&self.tags.blocking)
    }

    /// The reason for a difference that is meant.
    pub(super) fn exception(&self, content: &Value, difference: &Difference) -> Option<&str> {
        let fits = |pattern: &Option<Pattern>, text: &str| pattern.as_ref().is_none_or(|p| p.0.is_match(text));
        let rule = self.exception.iter().find(|rule| {
            fits(&rule.field, &difference.field)
                && fits(&rule.expected, &difference.expected)
                && fits(&rule.seen, &difference.seen)
                && all_hold(&rule.case, content)
        });
        rule.map(|rule| rule.reason.as_str())
    }

    /// Whether a field that nobody reads is listed.
    pub(super) fn is_inert(&self, path: &str) -> bool {
        self.inert.iter().any(|rule| rule.path.0.is_match(path))
    }
}

fn all_hold(predicates: &BTreeMap<String, Pattern>, content: &Value) -> bool {
    predicates.iter().all(|(pointer, pattern)| {
        let keys: Vec<&str> = pointer.split('/').skip(1).collect();
        some_holds(content, &keys, pattern)
    })
}

/// Whether some value under the pointer matches; a text by its content, anything else by its JSON.
fn some_holds(at: &Value, keys: &[&str], pattern: &Pattern) -> bool {
    let Some((key, rest)) = keys.split_first() else {
        return match at {
            Value::String(text) => pattern.0.is_match(text),
            other => pattern.0.is_match(&other.to_string()),
        };
    };
    match at {
        Value::Array(items) if *key == "*" => items.iter().any(|item| some_holds(item, rest, pattern)),
        Value::Object(map) if *key == "*" => map.values().any(|item| some_holds(item, rest, pattern)),
        Value::Array(items) => {
            key.parse::<usize>().ok().and_then(|i| items.get(i)).is_some_and(|item| some_holds(item, rest, pattern))
        }
        Value::Object(map) => map.get(*key).is_some_and(|item| some_holds(item, rest, pattern)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn exceptions_look_at_content_and_difference() {
        let text = r#"
            [[exception]]
            reason = "two SANs"
            case = { "/certs/*/sans" = '.*a.*b.*' }
            field = 'steps\[\d+\]\.status'
            expected = "200"
        "#;
        let rules: Rules = toml::from_str(text).unwrap();
        let case = json!({"certs": [{"sans": ["x"]}, {"sans": ["a", "b"]}]});
        let differs = |field: &str, expected: &str| Difference::new(field, expected, "403");
        assert_eq!(rules.exception(&case, &differs("steps[3].status", "200")), Some("two SANs"));
        assert_eq!(rules.exception(&case, &differs("steps[3].status", "2000")), None);
        assert_eq!(rules.exception(&case, &differs("steps[3].body", "200")), None);
        assert_eq!(rules.exception(&json!({"certs": []}), &differs("steps[3].status", "200")), None);
    }

    #[test]
    fn unknown_rules_are_refused() {
        assert!(toml::from_str::<Rules>("[[exceptoin]]\nreason = 'x'").is_err());
    }
}
