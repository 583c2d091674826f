//! Envoy's format strings (`%DOWNSTREAM_REMOTE_ADDRESS%`), compiled once.

use http::header::HeaderValue;

/// A compiled format string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format {
    segments: Box<[Segment]>,
    /// The whole value when nothing is computed.
    constant: Option<HeaderValue>,
}

/// A piece of a format string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// As it stands.
    Literal(Box<str>),
    /// A command operator.
    Operator(Operator),
}

/// `%NAME(ARGUMENT):MAX%`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    /// `REQ`, `DOWNSTREAM_REMOTE_ADDRESS`, ...
    pub name: Box<str>,
    /// Between the parentheses; empty without them.
    pub argument: Box<str>,
    /// Longest result.
    pub max: Option<usize>,
}

impl Format {
    /// Compiles. `%%` is a percent sign; a lone `%` is taken literally (Envoy refuses the whole table).
    pub fn compile(said: &str) -> Self {
        let mut segments: Vec<Segment> = Vec::new();
        let mut literal = String::new();
        let mut rest = said;
        while let Some(at) = rest.find('%') {
            literal.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                literal.push('%');
                rest = after;
                continue;
            }
            let Some((operator, after)) = operator(rest) else {
                literal.push('%');
                continue;
            };
            if !literal.is_empty() {
                segments.push(Segment::Literal(std::mem::take(&mut literal).into()));
            }
            segments.push(Segment::Operator(operator));
            rest = after;
        }
        literal.push_str(rest);
        let constant = if segments.is_empty() { HeaderValue::from_str(&literal).ok() } else { None };
        if !literal.is_empty() || segments.is_empty() {
            segments.push(Segment::Literal(literal.into()));
        }
        Self { segments: segments.into(), constant }
    }

    /// Whether there is a `%` that begins neither `%%` nor an operator.
    pub fn has_stray_percent(said: &str) -> bool {
        let mut rest = said;
        while let Some(at) = rest.find('%') {
            rest = &rest[at + 1..];
            rest = match rest.strip_prefix('%').or_else(|| operator(rest).map(|(_, after)| after)) {
                Some(after) => after,
                None => return true,
            };
        }
        false
    }

    /// The value when nothing is computed.
    pub fn constant(&self) -> Option<&HeaderValue> {
        self.constant.as_ref()
    }

    /// The pieces.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The text, with operators computed by `resolve`, which appends and says whether there was a value (`-` if not).
    pub fn render(&self, mut resolve: impl FnMut(&Operator, &mut String) -> bool) -> String {
        let mut out = String::new();
        for segment in &self.segments {
            let operator = match segment {
                Segment::Literal(text) => {
                    out.push_str(text);
                    continue;
                }
                Segment::Operator(operator) => operator,
            };
            let start = out.len();
            if !resolve(operator, &mut out) {
                out.truncate(start);
                out.push('-');
            }
            if let Some(max) = operator.max
                && out.len() > start + max
            {
                let mut end = start + max;
                while !out.is_char_boundary(end) {
                    end -= 1;
                }
                out.truncate(end);
            }
        }
        out
    }
}

/// Reads `NAME(ARG):MAX%`; `None` when it is not one.
fn operator(text: &str) -> Option<(Operator, &str)> {
    let name_len = text.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))?;
    let (name, mut rest) = text.split_at(name_len);
    if name.is_empty() {
        return None;
    }
    let mut argument = "";
    if let Some(inner) = rest.strip_prefix('(') {
        // Expressions have parentheses of their own.
        let ends = |at: &usize| matches!(inner.as_bytes().get(at + 1), Some(b'%' | b':'));
        let close = inner.match_indices(')').map(|(at, _)| at).find(ends)?;
        argument = &inner[..close];
        rest = &inner[close + 1..];
    }
    let mut max = None;
    if let Some(digits) = rest.strip_prefix(':') {
        let end = digits.find('%')?;
        max = Some(digits[..end].parse().ok()?);
        rest = &digits[end..];
    }
    let rest = rest.strip_prefix('%')?;
    Some((Operator { name: name.into(), argument: argument.into(), max }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(said: &str) -> String {
        Format::compile(said).render(|op, out| {
            out.push_str(&format!("<{}|{}>", op.name, op.argument));
            &*op.name != "NONE"
        })
    }

    #[test]
    fn segments() {
        assert_eq!(shown("a"), "a");
        assert_eq!(shown("100%% %REQ(x-a?b)% %PROTOCOL% 5%"), "100% <REQ|x-a?b> <PROTOCOL|> 5%");
        assert_eq!(shown("%NONE%"), "-");
        assert_eq!(shown("%REQ(a):3%"), "<RE");
        assert_eq!(shown("%lower% %BROKEN"), "%lower% %BROKEN");
        assert_eq!(shown(""), "");
        assert_eq!(Format::compile("v").constant().unwrap(), "v");
        assert!(Format::compile("%PROTOCOL%").constant().is_none());
        for (said, stray) in [("100%", true), ("100%% %PROTOCOL%", false), ("%%%", true), ("a", false)] {
            assert_eq!(Format::has_stray_percent(said), stray, "{said}");
        }
    }
}
