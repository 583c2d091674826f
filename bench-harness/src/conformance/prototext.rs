//! protobuf's text format, as far as tables of inputs are written in it, as JSON in protojson's manner.

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

/// Reads a message. Without descriptors nothing tells a list with one item from a single value: repeated names become
/// lists, `[a, b]` is one. `{seconds}` is a duration, `{key, value}` entries make a map, a lone `value` that is no text
/// is a wrapper.
///
/// # Errors
/// What is no text format.
pub(super) fn parse(text: &str) -> Result<Value> {
    let mut tokens = tokens(text)?;
    tokens.reverse();
    let fields = message(&mut tokens, None)?;
    Ok(Value::Object(fields))
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Mark(char),
    Word(String),
    Text(String),
}

fn tokens(text: &str) -> Result<Vec<Token>> {
    let mut out = Vec::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '#' => while rest.next_if(|c| *c != '\n').is_some() {},
            '{' | '}' | '[' | ']' | ':' => out.push(Token::Mark(c)),
            c if c.is_whitespace() || c == ',' || c == ';' => {}
            '"' | '\'' => {
                let mut said = String::new();
                loop {
                    match rest.next() {
                        Some('\\') => said.extend(rest.next()),
                        Some(end) if end == c => break,
                        Some(other) => said.push(other),
                        None => bail!("a text without an end"),
                    }
                }
                out.push(Token::Text(said));
            }
            c => {
                let mut word = c.to_string();
                while let Some(c) = rest.next_if(|c| c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '+')) {
                    word.push(c);
                }
                out.push(Token::Word(word));
            }
        }
    }
    Ok(out)
}

fn message(tokens: &mut Vec<Token>, end: Option<char>) -> Result<Map<String, Value>> {
    let mut out = Map::new();
    loop {
        match tokens.pop() {
            None if end.is_none() => return Ok(out),
            Some(Token::Mark(mark)) if Some(mark) == end => return Ok(out),
            Some(Token::Word(name)) => {
                if tokens.last() == Some(&Token::Mark(':')) {
                    tokens.pop();
                }
                let value = value(tokens)?;
                match out.get_mut(&name) {
                    None => drop(out.insert(name, value)),
                    Some(Value::Array(items)) => items.push(value),
                    Some(other) => *other = json!([other.take(), value]),
                }
            }
            other => bail!("expected a field's name, not {other:?}"),
        }
    }
}

fn value(tokens: &mut Vec<Token>) -> Result<Value> {
    match tokens.pop() {
        Some(Token::Text(text)) => Ok(Value::from(text)),
        Some(Token::Word(word)) => Ok(scalar(&word)),
        Some(Token::Mark('{')) => Ok(meant(message(tokens, Some('}'))?)),
        Some(Token::Mark('[')) => {
            let mut items = Vec::new();
            while tokens.last() != Some(&Token::Mark(']')) {
                items.push(value(tokens)?);
            }
            tokens.pop();
            Ok(map(&items).unwrap_or(Value::Array(items)))
        }
        other => bail!("expected a value, not {other:?}"),
    }
}

fn scalar(word: &str) -> Value {
    match word {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        _ => serde_json::from_str(word).ok().filter(Value::is_number).unwrap_or_else(|| Value::from(word)),
    }
}

/// Durations and wrappers, whose JSON is not their message.
fn meant(fields: Map<String, Value>) -> Value {
    let known = |names: &[&str]| !fields.is_empty() && fields.keys().all(|name| names.contains(&name.as_str()));
    let number = |name: &str| fields.get(name).and_then(Value::as_u64).unwrap_or(0);
    if known(&["seconds", "nanos"]) {
        return Value::from(format!("{}.{:09}s", number("seconds"), number("nanos")));
    }
    match fields.get("value") {
        Some(inner) if known(&["value"]) && !inner.is_string() => inner.clone(),
        _ => Value::Object(fields),
    }
}

/// A list of entries is a map.
fn map(items: &[Value]) -> Option<Value> {
    let entry = |item: &Value| {
        let fields = item.as_object().filter(|f| f.len() == 2)?;
        Some((fields.get("key")?.as_str()?.to_owned(), fields.get("value")?.clone()))
    };
    let entries: Option<Map<String, Value>> = items.iter().map(entry).collect();
    entries.filter(|e| !e.is_empty()).map(Value::Object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message() {
        let text = "a: \"x\\\"y\" # no\nd {seconds: 2}\nm: [{key: \"k\" value: \"v\"}]\nw: {value: false}\n\
            l: [\"p\", \"q\"] t: { z: { address: \"h:1\" } mode: SIMPLE } r: 1 r: -2.5 e: {}";
        let expected = json!({"a": "x\"y", "d": "2.000000000s", "m": {"k": "v"}, "w": false, "l": ["p", "q"],
            "t": {"z": {"address": "h:1"}, "mode": "SIMPLE"}, "r": [1, -2.5], "e": {}});
        assert_eq!(parse(text).unwrap(), expected);
        assert!(parse("a: }").is_err());
    }
}
