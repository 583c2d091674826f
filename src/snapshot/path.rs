//! Path normalisation before policy and routing, so that both and the application see the same path.
//!
//! The rules are those of URL canonicalisation in browsers, which Envoy follows: dot segments are resolved, escapes of
//! unreserved characters are decoded, `\` becomes `/`, and what has no place in a path is escaped. Queries are untouched.

use bytes::Bytes;
use http::uri::PathAndQuery;
use proxy_config::model::EscapedSlashes;

use super::HttpOptions;

/// Which steps run.
#[derive(Debug, Clone, Copy)]
struct Rules {
    normalize: bool,
    merge_slashes: bool,
    escaped_slashes: EscapedSlashes,
}

/// What became of a path.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it was.
    Same,
    /// Another one.
    Changed(PathAndQuery),
    /// The client has to ask again there.
    Redirect(PathAndQuery),
    /// 400.
    Refused,
}

impl HttpOptions {
    /// The path that policy, routes and the application see.
    pub fn normalise(&self, said: &PathAndQuery) -> Outcome {
        let rules = Rules {
            normalize: self.normalize_path,
            merge_slashes: self.merge_slashes,
            escaped_slashes: self.escaped_slashes,
        };
        normalise(said, rules)
    }
}

/// Normalises. The usual path costs one scan and no allocation.
fn normalise(said: &PathAndQuery, rules: Rules) -> Outcome {
    let path = said.path();
    if is_plain(path.as_bytes(), rules.merge_slashes) {
        return Outcome::Same;
    }
    let mut bytes = path.as_bytes().to_vec();
    let mut redirect = false;
    match rules.escaped_slashes {
        EscapedSlashes::KeepUnchanged => {}
        EscapedSlashes::Reject if unescape_slashes(path.as_bytes()).is_some() => return Outcome::Refused,
        EscapedSlashes::Reject => {}
        EscapedSlashes::UnescapeAndForward | EscapedSlashes::UnescapeAndRedirect => {
            if let Some(unescaped) = unescape_slashes(path.as_bytes()) {
                bytes = unescaped;
                redirect = rules.escaped_slashes == EscapedSlashes::UnescapeAndRedirect;
            }
        }
    }
    if rules.normalize {
        match canonical(&without_dot_parameters(&bytes)) {
            Some(canonical) => bytes = canonical,
            None => return Outcome::Refused,
        }
    }
    if rules.merge_slashes {
        bytes.dedup_by(|next, before| *next == b'/' && *before == b'/');
    }
    if bytes == path.as_bytes() {
        return Outcome::Same;
    }
    if let Some(query) = said.query() {
        bytes.push(b'?');
        bytes.extend_from_slice(query.as_bytes());
    }
    match PathAndQuery::from_maybe_shared(Bytes::from(bytes)) {
        Ok(path) if redirect => Outcome::Redirect(path),
        Ok(path) => Outcome::Changed(path),
        Err(_) => Outcome::Refused,
    }
}

/// Whether no rule can change it.
fn is_plain(path: &[u8], merge_slashes: bool) -> bool {
    let mut before = 0;
    path.iter().all(|&byte| {
        let plain = match CLASSES[byte as usize] {
            Class::Pass | Class::Unescape => true,
            Class::Special if byte == b'/' => !(merge_slashes && before == b'/'),
            Class::Special => byte == b'.' && before != b'/',
            Class::Escape => false,
        };
        before = byte;
        plain
    })
}

/// `%2F` and `%5C` decoded; `None` when there are none.
fn unescape_slashes(path: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(path.len());
    let mut at = 0;
    while at < path.len() {
        match decode(path, at) {
            Some(byte @ (b'/' | b'\\')) => {
                out.push(byte);
                at += 3;
            }
            _ => {
                out.push(path[at]);
                at += 1;
            }
        }
    }
    (out.len() != path.len()).then_some(out)
}

/// `..;x` and `.;x` lose their parameters: some servers ignore them, so policy must see what those servers will do.
fn without_dot_parameters(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    for (i, segment) in path.split(|b| *b == b'/').enumerate() {
        if i > 0 {
            out.push(b'/');
        }
        let dots = segment.iter().take_while(|b| **b == b'.').count();
        let is_dot = (1..=2).contains(&dots) && segment.get(dots) == Some(&b';');
        out.extend_from_slice(if is_dot { &segment[..dots] } else { segment });
    }
    out
}

/// What happens to a character.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Stays, and so does its escape.
    Pass,
    /// Stays; its escape is decoded.
    Unescape,
    /// Is escaped.
    Escape,
    /// `.`, `/`, `\`, `%`: has a meaning of its own.
    Special,
}

const CLASSES: [Class; 256] = classes();

const fn classes() -> [Class; 256] {
    let mut table = [Class::Escape; 256];
    let mut at = 0;
    while at < 128 {
        let byte = at as u8;
        table[at] = match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'_' | b'~' => Class::Unescape,
            b'.' | b'/' | b'\\' | b'%' => Class::Special,
            b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b':' | b';' | b'=' | b'@' | b'[' | b']' => {
                Class::Pass
            }
            _ => Class::Escape,
        };
        at += 1;
    }
    table
}

/// The canonical path; `None` for an escaped NUL.
fn canonical(path: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(path.len() + 8);
    let mut at = 0;
    while at < path.len() {
        if let Some(dot) = dot(path, at) {
            at = after_dot(path, at, dot, &mut out);
            continue;
        }
        let byte = path[at];
        match CLASSES[byte as usize] {
            Class::Special if byte == b'%' => match decode(path, at) {
                Some(0) => return None,
                Some(plain) if CLASSES[plain as usize] == Class::Unescape => {
                    out.push(plain);
                    at += 3;
                    continue;
                }
                Some(_) => {
                    out.extend_from_slice(&path[at..at + 3]);
                    at += 3;
                    continue;
                }
                None => out.push(b'%'),
            },
            Class::Special => out.push(b'/'),
            Class::Pass | Class::Unescape => out.push(byte),
            Class::Escape => {
                const HEX: &[u8; 16] = b"0123456789ABCDEF";
                out.extend([b'%', HEX[(byte >> 4) as usize], HEX[(byte & 15) as usize]]);
            }
        }
        at += 1;
    }
    Some(out)
}

/// Handles a dot of `dot` bytes at `at`; returns where to go on.
fn after_dot(path: &[u8], at: usize, dot_len: usize, out: &mut Vec<u8>) -> usize {
    let next = at + dot_len;
    if out.last() != Some(&b'/') {
        out.push(b'.');
        return next;
    }
    if next == path.len() {
        return next;
    }
    if is_slash(path[next]) {
        return next + 1;
    }
    if let Some(second) = dot(path, next) {
        let end = next + second;
        if end == path.len() || is_slash(path[end]) {
            back_up(out);
            return (end + 1).min(path.len());
        }
    }
    out.push(b'.');
    next
}

/// Length of the dot at `at`, escaped or not.
fn dot(path: &[u8], at: usize) -> Option<usize> {
    match path.get(at)? {
        b'.' => Some(1),
        b'%' if decode(path, at) == Some(b'.') => Some(3),
        _ => None,
    }
}

fn is_slash(byte: u8) -> bool {
    byte == b'/' || byte == b'\\'
}

/// Drops the last segment, but never the first slash.
fn back_up(out: &mut Vec<u8>) {
    if out.len() > 1 {
        out.pop();
        while out.last().is_some_and(|b| *b != b'/') {
            out.pop();
        }
    }
}

/// The byte of the escape at `at`; `None` when it is not one.
fn decode(path: &[u8], at: usize) -> Option<u8> {
    let [b'%', high, low] = path.get(at..at + 3)? else { return None };
    let digit = |b: u8| char::from(b).to_digit(16);
    Some((digit(*high)? * 16 + digit(*low)?) as u8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: Rules = Rules { normalize: true, merge_slashes: false, escaped_slashes: EscapedSlashes::KeepUnchanged };
    const DECODE: Rules =
        Rules { normalize: true, merge_slashes: true, escaped_slashes: EscapedSlashes::UnescapeAndForward };

    fn run(path: &str, rules: Rules) -> String {
        let said: PathAndQuery = path.parse().unwrap();
        match normalise(&said, rules) {
            Outcome::Same => said.to_string(),
            Outcome::Changed(new) => new.to_string(),
            Outcome::Redirect(new) => format!("-> {new}"),
            Outcome::Refused => "400".to_owned(),
        }
    }

    #[test]
    fn base_as_observed() {
        for (path, expected) in [
            ("/", "/"),
            ("/?", "/?"),
            ("/a+b?c+d", "/a+b?c+d"),
            ("/path%2Dexact", "/path-exact"),
            ("/./path-exact", "/path-exact"),
            ("/x/../path-exact?q=/../%61", "/path-exact?q=/../%61"),
            ("/path-exact%00", "400"),
            ("/path-exact\\", "/path-exact/"),
            ("/x%2f..%2fpath-exact", "/x%2f..%2fpath-exact"),
            ("/a%2Fb", "/a%2Fb"),
            ("/x/..;/y", "/y"),
            ("/x/..;a=b/y", "/y"),
            ("/x/.;/y", "/x/y"),
            ("/x/%2e%2e;/y", "/x/..;/y"),
            ("/x/...;/y", "/x/...;/y"),
            ("/x/..%3b/y", "/x/..%3b/y"),
            ("/a/;x/../b", "/a/b"),
            ("/x//../admin", "/x/admin"),
            ("/a//b", "/a//b"),
            ("/%", "/%"),
            ("/a%2", "/a%2"),
            ("/%2e%2e/%2e%2e", "/"),
            ("/a/%2E/b", "/a/b"),
            ("/a/./", "/a/"),
            ("/a/b/..", "/a/"),
            ("/a/b/.", "/a/b/"),
            ("/../..", "/"),
            ("/a\\b", "/a/b"),
            ("/a\\..\\b", "/b"),
            ("/%5cb", "/%5cb"),
            ("/a/.../b", "/a/.../b"),
            ("/%252e%252e/a", "/%252e%252e/a"),
            ("/a%7Eb%2e", "/a~b."),
            ("/a|b^c{d}", "/a%7Cb%5Ec%7Bd%7D"),
        ] {
            assert_eq!(run(path, BASE), expected, "{path}");
        }
    }

    #[test]
    fn other_modes() {
        let none = Rules { normalize: false, ..BASE };
        assert_eq!(run("/a\\..\\%61//b", none), "/a\\..\\%61//b");
        assert_eq!(run("/x%2f..%2fadmin", DECODE), "/admin");
        assert_eq!(run("/x%5C..%5cadmin", DECODE), "/admin");
        assert_eq!(run("//a//b", DECODE), "/a/b");
        assert_eq!(run("/x//../admin", Rules { merge_slashes: true, ..BASE }), "/x/admin");
        let reject = Rules { escaped_slashes: EscapedSlashes::Reject, ..BASE };
        assert_eq!(run("/a%2fb", reject), "400");
        assert_eq!(run("/a%2eb", reject), "/a.b");
        let redirect = Rules { escaped_slashes: EscapedSlashes::UnescapeAndRedirect, ..BASE };
        assert_eq!(run("/a%2fb?q", redirect), "-> /a/b?q");
    }

    proptest! {
        #[test]
        fn a_normalised_path_has_no_dot_segments_and_is_stable(path in "(/|\\.|%2e|%2E|;|a|%5c|\\\\|%25|%41){0,12}") {
            let first = run(&format!("/{path}"), BASE);
            prop_assert!(first.starts_with('/'));
            for segment in first.split('/') {
                prop_assert!(segment != "." && segment != "..");
            }
        }
    }
}
