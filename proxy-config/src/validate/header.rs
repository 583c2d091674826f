//! Header operations of a route: names and the format strings of their values.

use super::Findings;
use super::at::At;

/// `headers`: what requests and responses get and lose.
pub(super) fn operations(found: &mut Findings, headers: &At<'_>) {
    for (side, authority) in [("request", true), ("response", false)] {
        let side = headers.get(side);
        for written in ["add", "set"] {
            for (name, value) in side.get(written).entries() {
                operation(found, &value, name, authority);
                if let Err(reason) = format(value.text()) {
                    found.add(&value, reason);
                }
            }
        }
        for name in side.get("remove").items() {
            operation(found, &name, name.text(), false);
        }
    }
}

/// The authority may be written, other pseudo-headers may not.
fn operation(found: &mut Findings, at: &At<'_>, name: &str, authority: bool) {
    if name.is_empty() {
        found.add(at, "a header's name is missing");
    } else if (name.starts_with(':') || name.eq_ignore_ascii_case("host")) && !(authority && is_authority(name)) {
        found.add(at, format!("{name:?} cannot be changed here"));
    }
}

/// The two names of the authority.
pub(super) fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case(":authority") || name.eq_ignore_ascii_case("host")
}

/// Where in a format string the reader is.
#[derive(Clone, Copy, PartialEq)]
enum In {
    Literal,
    Name,
    ArgumentsStart,
    Quote,
    Argument,
    Delimiter,
    ArgumentsEnd,
    End,
}

/// A header's value in Envoy's format: `%NAME%`, `%NAME(...)%`, and `%%` for the sign itself.
fn format(value: &str) -> Result<(), String> {
    if value.chars().any(|c| (c.is_ascii_control() && c != '\t') || c == '\u{7f}') {
        return Err("control characters have no place in a header".to_owned());
    }
    let mut state = In::Literal;
    let mut bytes = value.bytes().peekable();
    while let Some(byte) = bytes.next() {
        state = match (state, byte) {
            (In::Literal, b'%') => match bytes.peek() {
                None => return Err("a percent sign is written twice, or opens a %VARIABLE%".to_owned()),
                Some(b'%') => {
                    bytes.next();
                    In::Literal
                }
                Some(_) => In::Name,
            },
            (In::Name | In::End, b'%') => In::Literal,
            (In::Name, b'(') => In::ArgumentsStart,
            (In::ArgumentsStart, b'[') | (In::Delimiter, b',') => In::Quote,
            (In::ArgumentsStart, other) if other != b' ' => In::Argument,
            (In::Quote, b'"') => In::Argument,
            (In::Argument, b'\\') => {
                if bytes.next().is_none() {
                    return Err("a backslash ends the value".to_owned());
                }
                In::Argument
            }
            (In::Argument, b')') | (In::ArgumentsEnd, b')') => In::End,
            (In::Argument, b'"') => In::Delimiter,
            (In::Delimiter, b']') => In::ArgumentsEnd,
            (In::Quote | In::Delimiter | In::ArgumentsEnd | In::End, other) if other != b' ' => {
                return Err(format!("{:?} is not expected inside a %VARIABLE%", char::from(other)));
            }
            (same, _) => same,
        };
    }
    if state == In::Literal {
        Ok(())
    } else {
        Err(format!("{value:?} ends inside a %VARIABLE%; a percent sign is written twice"))
    }
}

#[cfg(test)]
mod tests {
    use super::format;

    #[test]
    fn formats() {
        for good in ["", "a", "100%%", "%HOSTNAME%", "a %START_TIME(%Y)% b", r#"%X(["a", "b"])%"#, "%REQ(a)%%%"] {
            assert!(format(good).is_ok(), "{good}");
        }
        for bad in ["%", "a%b", "abc%123", "%START_TIME%%", "%X(", r#"%X(["a" b])%"#, "%X(a)b%", "a\nb"] {
            assert!(format(bad).is_err(), "{bad}");
        }
    }
}
