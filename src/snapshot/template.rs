//! Envoy's URI templates as expressions: `*` is one segment, `**` any number, `{name}` and `{name=pattern}` are variables;
//! text may follow them at the very end (`/files/*.json`).

use regex::bytes::Regex;

use proxy_config::re2;

/// What a segment may consist of (RFC 3986 `pchar`): unreserved characters, percent escapes, `:@` and the delimiters.
const SEGMENT: &str = r"a-zA-Z0-9\-._~%!$&'()*+,;:@=";

/// Compiles a template that must match the whole path.
pub(super) fn compile(template: &str) -> Result<Regex, String> {
    let bad = |why: &str| format!("{template:?} is not a path template: {why}");
    let rest = template.strip_prefix('/').ok_or_else(|| bad("it does not begin with '/'"))?;
    let mut expression = String::from("/");
    let mut segments = segments(rest).map_err(bad)?.into_iter().peekable();
    let mut any_number = false;
    while let Some(segment) = segments.next() {
        let (segment, suffix) = suffix(segment);
        if !suffix.is_empty() && (segments.peek().is_some() || suffix.contains(['*', '{', '}'])) {
            return Err(bad("only text may follow '*' or a variable in a segment, and only in the last one"));
        }
        let pattern = variable(segment).map_err(bad)?;
        for (i, part) in pattern.split('/').enumerate() {
            if i > 0 {
                expression.push('/');
            }
            if any_number && matches!(part, "*" | "**") {
                return Err(bad("nothing but text may follow '**'"));
            }
            any_number |= part == "**";
            push(part, &mut expression).map_err(bad)?;
        }
        expression.push_str(&regex::escape(suffix));
        if segments.peek().is_some() {
            expression.push('/');
        }
    }
    re2::full_match(&expression)
}

/// Splits at the slashes outside braces.
fn segments(text: &str) -> Result<Vec<&str>, &'static str> {
    let (mut all, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            '{' if inside => return Err("braces are nested"),
            '}' if !inside => return Err("'}' without '{'"),
            '{' | '}' => inside = c == '{',
            '/' if !inside => {
                all.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("'{' without '}'");
    }
    all.push(&text[start..]);
    Ok(all)
}

/// What stands behind an operator or a variable that begins a segment (`*.json`).
fn suffix(segment: &str) -> (&str, &str) {
    let end = match segment.as_bytes() {
        [b'*', b'*', ..] => 2,
        [b'*', ..] => 1,
        [b'{', ..] => segment.find('}').map_or(segment.len(), |at| at + 1),
        _ => segment.len(),
    };
    segment.split_at(end)
}

/// The pattern of a variable; other segments are their own.
fn variable(segment: &str) -> Result<&str, &'static str> {
    let Some(inner) = segment.strip_prefix('{') else { return Ok(segment) };
    let inner = inner.strip_suffix('}').ok_or("a variable must be a whole segment")?;
    let (name, pattern) = inner.split_once('=').unwrap_or((inner, "*"));
    if name.is_empty() || pattern.is_empty() {
        return Err("a variable needs a name, and a pattern behind '='");
    }
    Ok(pattern)
}

fn push(part: &str, expression: &mut String) -> Result<(), &'static str> {
    match part {
        "*" => expression.push_str(&format!("[{SEGMENT}]+")),
        "**" => expression.push_str(&format!("[{SEGMENT}/]*")),
        text if text.contains(['*', '{', '}']) => return Err("'*' and variables must be whole segments"),
        text => expression.push_str(&regex::escape(text)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates() {
        for (template, yes, no) in [
            ("/u/*", &["/u/a", "/u/a.b", "/u/%2f", "/u/a~b!$&()*,:@="][..], &["/u/", "/u", "/u/a/b"][..]),
            ("/u/**", &["/u/", "/u/a", "/u/a/b"], &["/u", "/v/a"]),
            ("/v/**/end", &["/v//end", "/v/a/b/end"], &["/v/end", "/v/a/end/x"]),
            ("/*/x/*", &["/a/x/b"], &["//x/b", "/a/x/"]),
            ("/a/{id}/c", &["/a/1/c"], &["/a//c", "/a/1/2/c"]),
            ("/a/{rest=**}", &["/a/", "/a/1/2"], &["/a"]),
            ("/a/{x=b/*}/c", &["/a/b/1/c"], &["/a/x/1/c"]),
            ("/a.b", &["/a.b"], &["/axb"]),
            ("/w/*/*.json", &["/w/a/b.json", "/w/a/b.c.json"], &["/w/a/.json", "/w/a/bxjson", "/w/a/b/c.json"]),
            ("/w/**.m3u8", &["/w/a/b.m3u8", "/w/.m3u8"], &["/w/a"]),
            ("/w/{file}.vtt", &["/w/a.vtt"], &["/w/a/b.vtt"]),
        ] {
            let re = compile(template).unwrap();
            for path in yes {
                assert!(re.is_match(path.as_bytes()), "{template} {path}");
            }
            for path in no {
                assert!(!re.is_match(path.as_bytes()), "{template} {path}");
            }
        }
    }

    #[test]
    fn mistakes() {
        for template in ["a", "/a*", "/{a", "/a}", "/{=*}", "/x{a}", "/**/*", "/{a={b}}", "/*.x/a", "/*a*", "/{a}{b}"] {
            assert!(compile(template).is_err(), "{template}");
        }
    }
}
