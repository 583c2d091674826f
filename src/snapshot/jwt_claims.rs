//! What a verified token tells others: headers for the application, metadata for policies and routes.

use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::header::{HeaderName, HeaderValue};
use proxy_config::model::JwtProvider;
use serde_json::{Map, Value};

use super::jwt_token::Token;
use super::metadata::Metadata;

/// Under which name policies find it.
const FILTER: &str = "envoy.filters.http.jwt_authn";

/// Keys to descend.
type Path = Box<[Box<str>]>;

/// What one provider's tokens tell.
#[derive(Debug)]
pub(super) struct Claims {
    payload_header: Option<HeaderName>,
    /// Header, and the claim's path.
    headers: Box<[(HeaderName, Path)]>,
    /// Key of the payload in the metadata; empty: not there.
    metadata_key: Box<str>,
    space_delimited: Box<[Box<str>]>,
}

/// Headers in order, and metadata.
type Told = (Box<[(HeaderName, HeaderValue)]>, Option<Arc<Metadata>>);

impl Claims {
    /// Compiles; a header name can be wrong.
    pub(super) fn compile(said: &JwtProvider) -> Result<Self, String> {
        let name =
            |text: &str| HeaderName::from_bytes(text.as_bytes()).map_err(|_| format!("{text:?} is no header name"));
        let header = |(header, claim): &(String, String)| {
            Ok::<_, String>((name(header)?, claim.split('.').map(Box::from).collect::<Path>()))
        };
        let payload = &said.forward_payload_header;
        Ok(Self {
            payload_header: if payload.is_empty() { None } else { Some(name(payload)?) },
            headers: said.claim_to_headers.iter().map(header).collect::<Result<_, _>>()?,
            metadata_key: said.payload_in_metadata.as_str().into(),
            space_delimited: said.space_delimited_claims.iter().map(|claim| claim.as_str().into()).collect(),
        })
    }

    /// What this token tells. A claim that cannot be a header's value is left out: bytes of a token never become a header
    /// line of their own.
    pub(super) fn of(&self, token: &Token<'_>) -> Told {
        let payload = self.payload_header.iter().map(|name| (name, Some(token.payload_text.to_owned())));
        let claims = self.headers.iter().map(|(name, path)| (name, find(&token.payload, path).and_then(text)));
        let headers = payload.chain(claims).filter_map(|(name, value)| {
            let value = HeaderValue::from_bytes(value?.as_bytes()).ok()?;
            Some((name.clone(), value))
        });
        (headers.collect(), self.metadata(&token.payload))
    }

    fn metadata(&self, payload: &Map<String, Value>) -> Option<Arc<Metadata>> {
        if self.metadata_key.is_empty() {
            return None;
        }
        let mut payload = payload.clone();
        for claim in &self.space_delimited {
            let Some(value) = payload.get_mut(&**claim) else { continue };
            let words: Vec<Value> = value
                .as_str()
                .into_iter()
                .flat_map(|v| v.split(' '))
                .filter(|w| !w.is_empty())
                .map(Value::from)
                .collect();
            if !words.is_empty() {
                *value = Value::Array(words);
            }
        }
        let by_key = Map::from_iter([(self.metadata_key.to_string(), Value::Object(payload))]);
        Some(Arc::new(Map::from_iter([(FILTER.to_owned(), Value::Object(by_key))])))
    }
}

fn find<'v>(payload: &'v Map<String, Value>, path: &[Box<str>]) -> Option<&'v Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(payload.get(&**first)?, |at, key| at.as_object()?.get(&**key))
}

/// A claim as header value; lists and objects as base64 of their JSON. Empty ones are no header.
fn text(value: &Value) -> Option<String> {
    let text = match value {
        Value::Null => return None,
        Value::Bool(yes) => yes.to_string(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match (number.as_u64(), number.as_f64()) {
            (Some(whole), _) => whole.to_string(),
            (None, Some(float)) => decimal(float),
            (None, None) => return None,
        },
        Value::Array(_) | Value::Object(_) => BASE64_STANDARD.encode(value.to_string()),
    };
    (!text.is_empty()).then_some(text)
}

/// Envoy's way: whole numbers plainly, others with six decimals.
fn decimal(number: f64) -> String {
    if number >= 0.0 && number.fract() == 0.0 && number < 1e18 {
        format!("{number:.0}")
    } else {
        format!("{number:.6}")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::jwt_token::tests::joined;
    use super::*;

    #[test]
    fn what_applications_and_policies_are_told() {
        let claim = |claim: &str| (format!("x-{}", claim.replace('.', "-")), claim.to_owned());
        let said = JwtProvider {
            forward_payload_header: "x-payload".into(),
            claim_to_headers: ["s", "n", "f", "m", "b", "l", "o.i", "o", "nil", "none", "s.x", "bad", "empty"]
                .map(claim)
                .to_vec(),
            payload_in_metadata: "payload".into(),
            space_delimited_claims: vec!["scope".into(), "n".into()],
            ..JwtProvider::default()
        };
        let payload = r#"{"s":"a","n":7,"f":1.5,"m":-2,"b":true,"l":["a","b"],"o":{"i":"in"},"nil":null,"bad":"a\r\nb","empty":"","scope":" r  w"}"#;
        let token = joined(r#"{"alg":"RS256"}"#, payload, b"s");
        let (headers, metadata) = Claims::compile(&said).unwrap().of(&Token::parse(&token).unwrap());
        let shown: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
        let sent = token.split('.').nth(1).unwrap();
        assert_eq!(
            shown,
            [
                ("x-payload", sent),
                ("x-s", "a"),
                ("x-n", "7"),
                ("x-f", "1.500000"),
                ("x-m", "-2.000000"),
                ("x-b", "true"),
                ("x-l", "WyJhIiwiYiJd"),
                ("x-o-i", "in"),
                ("x-o", "eyJpIjoiaW4ifQ=="),
            ]
        );
        let metadata = metadata.unwrap();
        let told = &metadata[FILTER]["payload"];
        assert_eq!((&told["scope"], &told["n"], &told["s"]), (&json!(["r", "w"]), &json!(7), &json!("a")));
        assert!(Claims::compile(&JwtProvider::default()).unwrap().of(&Token::parse(&token).unwrap()).1.is_none());
    }
}
