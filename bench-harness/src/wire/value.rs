//! Bytes in JSON: text where each character is one byte, or base64.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

/// Bytes of a text of the recordings: one character, one byte; what does not fit a byte is UTF-8.
pub(super) fn bytes_of(text: &str) -> Vec<u8> {
    if text.chars().all(|c| u32::from(c) < 256) {
        return text.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or_default()).collect();
    }
    text.as_bytes().to_vec()
}

/// Bytes under `NAME` or `NAMEBase64` of an object.
pub(super) fn bytes_at(of: &Value, name: &str) -> Option<Vec<u8>> {
    if let Some(text) = of[name].as_str() {
        return Some(bytes_of(text));
    }
    let text = of[format!("{name}Base64")].as_str()?;
    STANDARD.decode(text).ok()
}

/// Everything a step or a script entry sends, with the pause after each part in milliseconds.
pub(super) fn parts_of(of: &Value) -> Vec<(Vec<u8>, u64)> {
    let whole = bytes_at(of, "send").map(|bytes| (bytes, 0));
    if let Some(parts) = of["sendParts"].as_array() {
        let part = |p: &Value| (bytes_of(p[0].as_str().unwrap_or_default()), p[1].as_u64().unwrap_or(0));
        return whole.into_iter().chain(parts.iter().map(part)).collect();
    }
    if let Some(text) = of["sendRepeat"][0].as_str() {
        let times = usize::try_from(of["sendRepeat"][1].as_u64().unwrap_or(1)).unwrap_or(1);
        return vec![(bytes_of(text).repeat(times), 0)];
    }
    whole.into_iter().collect()
}

/// Writes bytes under `NAME` (one character a byte).
pub(super) fn put_bytes(into: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    let text: String = bytes.iter().map(|b| char::from(*b)).collect();
    into.insert(name.to_owned(), json!(text));
}

/// Headers as pairs.
pub(super) fn pairs(of: &Value) -> Vec<(String, String)> {
    let pair = |p: &Value| (p[0].as_str().unwrap_or_default().to_owned(), p[1].as_str().unwrap_or_default().to_owned());
    of.as_array().map(|list| list.iter().map(pair).collect()).unwrap_or_default()
}
