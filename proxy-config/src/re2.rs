//! RE2 expressions as Envoy means them: the whole value must match, and `\d \w \s \b` are ASCII.

use regex::bytes::{Regex, RegexBuilder};

/// Compiled size that one expression may take; configuration is not trusted to be small.
const SIZE_LIMIT: usize = 4 << 20;

/// Compiles an expression that must match the whole value.
///
/// # Errors
/// What is wrong with the expression.
pub fn full_match(expression: &str) -> Result<Regex, String> {
    build(&format!(r"\A(?:{})\z", translate(expression)), expression)
}

/// Compiles an expression that may match anywhere (rewrites).
///
/// # Errors
/// What is wrong with the expression.
pub fn search(expression: &str) -> Result<Regex, String> {
    build(&translate(expression), expression)
}

/// RE2's substitution (`\1`, `\\`) in the words of [`Regex::replace_all`].
///
/// # Errors
/// What is wrong with the substitution.
pub fn substitution(said: &str) -> Result<String, String> {
    let mut out = String::with_capacity(said.len() + 4);
    let mut chars = said.chars();
    while let Some(c) = chars.next() {
        match c {
            '$' => out.push_str("$$"),
            '\\' => match chars.next() {
                Some('\\') => out.push('\\'),
                Some(digit) if digit.is_ascii_digit() => out.push_str(&format!("${{{digit}}}")),
                _ => return Err(format!("{said:?}: a backslash is followed by a digit or a backslash")),
            },
            _ => out.push(c),
        }
    }
    Ok(out)
}

fn build(translated: &str, said: &str) -> Result<Regex, String> {
    RegexBuilder::new(translated)
        .size_limit(SIZE_LIMIT)
        .build()
        .map_err(|e| format!("{said:?} is not a regular expression: {e}"))
}

/// Rewrites what the two dialects write alike and mean differently.
fn translate(expression: &str) -> String {
    let mut out = String::with_capacity(expression.len() + 8);
    let mut class = Class::Outside;
    let mut chars = expression.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\\' {
            match chars.next() {
                Some('Q') => quote(&mut chars, &mut out),
                Some(escaped) => escape(escaped, class != Class::Outside, &mut out),
                None => out.push('\\'),
            }
            class = class.after_first();
            continue;
        }
        match (class, c) {
            (Class::Outside, '[') => {
                out.push('[');
                if chars.next_if_eq(&'^').is_some() {
                    out.push('^');
                }
                class = Class::First;
                continue;
            }
            (Class::First, ']') => out.push_str(r"\]"),
            (Class::Inside, ']') => {
                out.push(']');
                class = Class::Outside;
                continue;
            }
            (Class::First | Class::Inside, '[') if chars.peek() == Some(&':') => posix(&mut chars, &mut out),
            (Class::First | Class::Inside, '[' | '&' | '~') => {
                out.push('\\');
                out.push(c);
            }
            _ => out.push(c),
        }
        class = class.after_first();
    }
    out
}

/// Where in a bracket expression the reader is.
#[derive(Clone, Copy, PartialEq)]
enum Class {
    Outside,
    /// Right behind `[` or `[^`: a `]` is a character.
    First,
    Inside,
}

impl Class {
    fn after_first(self) -> Self {
        if self == Self::First { Self::Inside } else { self }
    }
}

fn escape(c: char, in_class: bool, out: &mut String) {
    let (ascii, negated) = match c.to_ascii_lowercase() {
        'd' => ("0-9", c == 'D'),
        'w' => ("0-9A-Za-z_", c == 'W'),
        's' => (r"\t\n\f\r ", c == 'S'),
        _ => {
            match c {
                'b' | 'B' if !in_class => out.push_str(&format!(r"(?-u:\{c})")),
                '<' | '>' => out.push(c),
                _ => out.extend(['\\', c]),
            }
            return;
        }
    };
    match (in_class, negated) {
        (true, false) => out.push_str(ascii),
        (_, true) => out.push_str(&format!("[^{ascii}]")),
        (false, false) => out.push_str(&format!("[{ascii}]")),
    }
}

fn quote(chars: &mut std::iter::Peekable<std::str::Chars<'_>>, out: &mut String) {
    let mut text = String::new();
    while let Some(c) = chars.next() {
        if c == '\\' && chars.next_if_eq(&'E').is_some() {
            break;
        }
        text.push(c);
    }
    out.push_str(&regex::escape(&text));
}

fn posix(chars: &mut std::iter::Peekable<std::str::Chars<'_>>, out: &mut String) {
    out.push('[');
    for c in chars.by_ref() {
        out.push(c);
        if c == ']' {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn substitutions() {
        let re = search("a(b+)").unwrap();
        let replaced = |said: &str| {
            let with = substitution(said).unwrap();
            String::from_utf8(re.replace_all(b"xabby", with.as_bytes()).into_owned()).unwrap()
        };
        assert_eq!(replaced(r"[\1\0]"), "x[bbabb]y");
        assert_eq!(replaced(r"$1\\"), r"x$1\y");
        assert!(substitution(r"\x").is_err() && substitution(r"\").is_err());
    }

    #[test]
    fn classes_are_ascii() {
        for (expression, yes, no) in [
            (r"\d+", "12", "\u{663}"),
            (r"\w", "_", "\u{e4}"),
            (r"\W", "\u{e4}", "a"),
            (r"[\d.]+", "1.2", "1a"),
            (r"[^\s/]+", "ab", "a b"),
            (r"[\S]", "x", " "),
            (r"a\/b", "a/b", "ab"),
            (r"\<x\>", "<x>", "x"),
            (r"[]a]+", "]a", "b"),
            (r"[^]a]", "b", "]"),
            (r"[[a&&b]+", "[&b", "c"),
            (r"[[:alpha:]-]+", "a-", "1"),
            (r"\Qa.b\E+", "a.b", "axb"),
            ("a.c", "a\u{e4}c", "a\nc"),
            ("", "", "x"),
            ("a|ab", "ab", "abc"),
            (r"a\b", "a", "b"),
        ] {
            let re = full_match(expression).unwrap();
            assert!(re.is_match(yes.as_bytes()), "{expression} {yes}");
            assert!(!re.is_match(no.as_bytes()), "{expression} {no}");
        }
        assert!(full_match("(").is_err());
        assert!(full_match(r"\").is_err());
    }
}
