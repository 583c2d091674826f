//! Comparing messages without their descriptors: which fields of some bytes did not survive decoding, and which
//! fields of a decoded message are set. Runs only where something is left, so it costs nothing on known messages.

use std::collections::BTreeMap;
use std::fmt::Debug;

/// Nesting that is followed to find the innermost field.
const MAX_DEPTH: usize = 32;

/// A field's value on the wire.
#[derive(Clone, Copy, PartialEq)]
enum Wire<'a> {
    /// Varint and both fixed widths: all that matters is whether it is zero.
    Number(u64),
    /// Strings, bytes, messages.
    Bytes(&'a [u8]),
}

/// Paths of field numbers (`12.3`) that `said` has and `kept`, its re-encoding, lacks. Zeros do not count.
pub(super) fn missing(said: &[u8], kept: &[u8]) -> impl Iterator<Item = String> + use<> {
    let mut out = Vec::new();
    compare(said, kept, "", 0, &mut out);
    out.sort();
    out.dedup();
    out.into_iter()
}

fn compare(said: &[u8], kept: &[u8], prefix: &str, depth: usize, out: &mut Vec<String>) {
    let (Some(said), Some(kept)) = (fields(said), fields(kept)) else { return };
    for (number, values) in &said {
        let path = format!("{prefix}{number}");
        let Some(left) = kept.get(number) else {
            if values.iter().any(|v| !is_zero(*v)) {
                out.push(path);
            }
            continue;
        };
        if depth == MAX_DEPTH || values == left {
            continue;
        }
        // Maps are re-encoded in another order: look for an equal element before the one at the same place.
        let differing = values.iter().zip(left).filter(|(v, _)| !left.contains(v));
        for (value, same_place) in differing {
            if let (Wire::Bytes(said), Wire::Bytes(kept)) = (value, same_place) {
                compare(said, kept, &format!("{path}."), depth + 1, out);
            }
        }
    }
}

fn is_zero(value: Wire<'_>) -> bool {
    match value {
        Wire::Number(n) => n == 0,
        Wire::Bytes(b) => b.is_empty(),
    }
}

/// Fields by number in order of appearance; `None` when the bytes are no message.
fn fields(mut bytes: &[u8]) -> Option<BTreeMap<u64, Vec<Wire<'_>>>> {
    let mut out: BTreeMap<u64, Vec<Wire<'_>>> = BTreeMap::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let value = match key & 7 {
            0 => Wire::Number(varint(&mut bytes)?),
            1 => Wire::Number(u64::from_le_bytes(*bytes.split_off_first_chunk()?)),
            5 => Wire::Number(u64::from(u32::from_le_bytes(*bytes.split_off_first_chunk()?))),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let (value, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                Wire::Bytes(value)
            }
            _ => return None,
        };
        out.entry(key >> 3).or_default().push(value);
    }
    Some(out)
}

/// Takes a fixed number of bytes off the front.
trait SplitFirst<'a> {
    fn split_off_first_chunk<const N: usize>(&mut self) -> Option<&'a [u8; N]>;
}

impl<'a> SplitFirst<'a> for &'a [u8] {
    fn split_off_first_chunk<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (first, rest) = self.split_first_chunk()?;
        *self = rest;
        Some(first)
    }
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut out = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        out |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(out);
        }
    }
    None
}

/// Names of the fields in which two messages differ. Generated types have no reflection but print their fields:
/// in the pretty form a line indented by four spaces opens a field, deeper ones continue it.
pub(super) fn differing<T: Debug>(message: &T, blank: &T) -> Vec<String> {
    let (message, blank) = (format!("{message:#?}"), format!("{blank:#?}"));
    let blank = printed_fields(&blank);
    let mut names: Vec<String> = printed_fields(&message)
        .into_iter()
        .filter(|(name, text)| blank.get(name) != Some(text))
        .map(|(name, _)| name.to_owned())
        .collect();
    names.sort();
    names
}

fn printed_fields(text: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut out: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut current = "";
    for line in text.lines() {
        let opens = line.strip_prefix("    ").filter(|l| l.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_'));
        if let Some((name, _)) = opens.and_then(|l| l.split_once(':')) {
            current = name;
        }
        if !current.is_empty() && line.starts_with(' ') {
            out.entry(current).or_default().push(line);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_losses_have_a_path() {
        // 1: {2: 7, 3: 0}, 4: "x" against 1: {}, 5 zero
        let said = [0x0a, 0x04, 0x10, 0x07, 0x18, 0x00, 0x22, 0x01, b'x', 0x28, 0x00];
        assert_eq!(missing(&said, &[0x0a, 0x00]).collect::<Vec<_>>(), ["1.2", "4"]);
        assert_eq!(missing(&said, &said).count(), 0);
    }

    #[test]
    fn no_message_is_no_loss() {
        for bytes in [&[0xff][..], &[0x0a, 0x7f], &[0x0b], &[0x09, 1]] {
            assert_eq!(missing(bytes, &[]).count(), 0);
        }
    }
}
