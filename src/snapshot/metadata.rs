//! Conditions on dynamic metadata: what earlier filters left behind, JWT payloads above all.

use std::fmt;

use proxy_config::model;
use serde_json::Value;

use super::matcher::StringMatch;

/// Dynamic metadata by filter name.
pub type Metadata = serde_json::Map<String, Value>;

/// A compiled [`model::MetadataMatcher`].
#[derive(Debug)]
pub(super) struct MetadataMatch {
    pub(super) filter: Box<str>,
    pub(super) path: Box<[Box<str>]>,
    value: Wanted,
    invert: bool,
}

#[derive(Debug)]
enum Wanted {
    Null,
    Text(StringMatch),
    Bool(bool),
    Present(bool),
    OneOf(Box<Self>),
    Or(Box<[Self]>),
    Number(f64),
}

impl MetadataMatch {
    /// Compiles; only a regular expression can fail.
    pub(super) fn compile(said: &model::MetadataMatcher) -> Result<Self, String> {
        Ok(Self {
            filter: said.filter.as_str().into(),
            path: said.path.iter().map(|key| key.as_str().into()).collect(),
            value: Wanted::compile(&said.value)?,
            invert: said.invert,
        })
    }

    /// Whether the metadata is as wanted; `None` is none at all.
    pub(super) fn matches(&self, metadata: Option<&Metadata>) -> bool {
        self.value.holds(self.find(metadata)) != self.invert
    }

    /// The value at the path.
    pub(super) fn find<'m>(&self, metadata: Option<&'m Metadata>) -> Option<&'m Value> {
        self.path.iter().try_fold(metadata?.get(&*self.filter)?, |at, key| at.get(&**key))
    }
}

impl Wanted {
    fn compile(said: &model::ValueMatcher) -> Result<Self, String> {
        Ok(match said {
            model::ValueMatcher::Null => Self::Null,
            model::ValueMatcher::String(text) => Self::Text(StringMatch::compile(text)?),
            model::ValueMatcher::Bool(wanted) => Self::Bool(*wanted),
            model::ValueMatcher::Present(wanted) => Self::Present(*wanted),
            model::ValueMatcher::ListOneOf(one) => Self::OneOf(Box::new(Self::compile(one)?)),
            model::ValueMatcher::Or(of) => Self::Or(of.iter().map(Self::compile).collect::<Result<_, _>>()?),
            model::ValueMatcher::Double(number) => Self::Number(*number),
        })
    }

    fn holds(&self, value: Option<&Value>) -> bool {
        match self {
            Self::Null => value.is_some_and(Value::is_null),
            Self::Text(text) => value.and_then(Value::as_str).is_some_and(|v| text.matches(v.as_bytes())),
            Self::Bool(wanted) => value.and_then(Value::as_bool) == Some(*wanted),
            Self::Present(wanted) => value.is_some() == *wanted,
            Self::OneOf(one) => {
                value.and_then(Value::as_array).is_some_and(|list| list.iter().any(|v| one.holds(Some(v))))
            }
            Self::Or(of) => of.iter().any(|one| one.holds(value)),
            Self::Number(wanted) => value.and_then(Value::as_f64) == Some(*wanted),
        }
    }
}

/// What the value must be, for people.
impl fmt::Display for MetadataMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.invert { "not " } else { "" })?;
        self.value.fmt(f)
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Text(text) => text.fmt(f),
            Self::Bool(wanted) => wanted.fmt(f),
            Self::Present(true) => f.write_str("any value"),
            Self::Present(false) => f.write_str("absent"),
            Self::OneOf(one) => write!(f, "a list with {one}"),
            Self::Or(of) => {
                for (i, one) in of.iter().enumerate() {
                    write!(f, "{}{one}", if i > 0 { " or " } else { "" })?;
                }
                Ok(())
            }
            Self::Number(wanted) => wanted.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use proxy_config::model::{MetadataMatcher, StringMatcher, ValueMatcher};
    use serde_json::json;

    use super::*;

    #[test]
    fn values() {
        let text = |t: &str| ValueMatcher::String(StringMatcher::exact(t));
        let payload = json!({"jwt": {"payload": {
            "iss": "me", "aud": ["a", "b"], "n": 1.5, "yes": true, "nil": null, "deep": {"role": "admin"}
        }}});
        let metadata = payload.as_object().unwrap();
        for (path, value, expected) in [
            ("iss", text("me"), true),
            ("iss", text("Me"), false),
            ("aud", text("a"), false),
            ("aud", ValueMatcher::ListOneOf(Box::new(text("b"))), true),
            ("iss", ValueMatcher::ListOneOf(Box::new(text("me"))), false),
            ("aud", ValueMatcher::Or(vec![text("x"), ValueMatcher::ListOneOf(Box::new(text("a")))]), true),
            ("n", ValueMatcher::Double(1.5), true),
            ("n", text("1.5"), false),
            ("yes", ValueMatcher::Bool(true), true),
            ("yes", ValueMatcher::Bool(false), false),
            ("nil", ValueMatcher::Null, true),
            ("none", ValueMatcher::Null, false),
            ("none", ValueMatcher::Present(false), true),
            ("nil", ValueMatcher::Present(true), true),
            ("deep.role", text("admin"), true),
            ("deep.role.more", text("admin"), false),
        ] {
            let path: Vec<String> = format!("payload.{path}").split('.').map(str::to_owned).collect();
            for invert in [false, true] {
                let said = MetadataMatcher { filter: "jwt".into(), path: path.clone(), value: value.clone(), invert };
                let found = MetadataMatch::compile(&said).unwrap().matches(Some(metadata));
                assert_eq!(found, expected != invert, "{path:?} {value:?}");
            }
        }
    }

    #[test]
    fn nothing_is_absent() {
        let said = |invert| MetadataMatcher {
            filter: "jwt".into(),
            path: vec!["payload".into()],
            value: ValueMatcher::String(StringMatcher::prefix("")),
            invert,
        };
        assert!(!MetadataMatch::compile(&said(false)).unwrap().matches(None));
        assert!(MetadataMatch::compile(&said(true)).unwrap().matches(None));
    }
}
