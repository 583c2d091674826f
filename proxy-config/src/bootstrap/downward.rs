//! Files of the downward API: one `key="value"` a line, the value quoted as Go quotes it.

use std::collections::BTreeMap;

/// Reads labels or annotations; lines without `=` are left out.
///
/// # Errors
/// The line whose value is not quoted.
pub fn parse(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut out = BTreeMap::new();
    for (at, line) in text.lines().enumerate() {
        let Some((key, quoted)) = line.split_once('=') else { continue };
        let value =
            unquote(quoted).ok_or_else(|| format!("{}: {key}: expected a quoted text, not {quoted}", at + 1))?;
        out.insert(key.to_owned(), value);
    }
    Ok(out)
}

/// The text of a Go string literal.
fn unquote(quoted: &str) -> Option<String> {
    if let Some(raw) = quoted.strip_prefix('`') {
        return raw.strip_suffix('`').filter(|raw| !raw.contains('`')).map(str::to_owned);
    }
    let inner = quoted.strip_prefix('"')?.strip_suffix('"')?;
    let mut out: Vec<u8> = Vec::with_capacity(inner.len());
    let mut rest = inner.chars();
    while let Some(c) = rest.next() {
        match c {
            '"' => return None,
            '\\' => escape(&mut rest, &mut out)?,
            c => out.extend(c.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    Some(String::from_utf8_lossy(&out).into_owned())
}

/// What follows a backslash.
fn escape(rest: &mut std::str::Chars<'_>, out: &mut Vec<u8>) -> Option<()> {
    let plain = match rest.next()? {
        'a' => 7,
        'b' => 8,
        'f' => 12,
        'n' => b'\n',
        'r' => b'\r',
        't' => b'\t',
        'v' => 11,
        '\\' => b'\\',
        '"' => b'"',
        'x' => u8::try_from(number(rest, 2, 16)?).ok()?,
        c @ '0'..='7' => {
            let more = number(rest, 2, 8)?;
            u8::try_from(c.to_digit(8)? * 64 + more).ok()?
        }
        c @ ('u' | 'U') => {
            let code = number(rest, if c == 'u' { 4 } else { 8 }, 16)?;
            out.extend(char::from_u32(code)?.encode_utf8(&mut [0; 4]).bytes());
            return Some(());
        }
        _ => return None,
    };
    out.push(plain);
    Some(())
}

fn number(rest: &mut std::str::Chars<'_>, digits: usize, radix: u32) -> Option<u32> {
    (0..digits).try_fold(0_u32, |sum, _| sum.checked_mul(radix)?.checked_add(rest.next()?.to_digit(radix)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_unquoted() {
        let text =
            "a=\"b\"\n\nno line\nconfig=\"x: \\\"y\\\"\\n\\t\\u00e9\\xc3\\xa9\\303\\251=z\"\nraw=`q`\nempty=\"\"";
        let read = parse(text).unwrap();
        assert_eq!(read["config"], "x: \"y\"\n\téé\u{e9}=z");
        assert_eq!((&*read["a"], &*read["raw"], &*read["empty"], read.len()), ("b", "q", "", 4));
    }

    #[test]
    fn what_is_not_quoted_is_told() {
        for bad in ["b", "\"b", "\"b\"c\"", "\"\\q\"", "\"\\u12\"", "'b'"] {
            assert_eq!(
                parse(&format!("ok=\"1\"\na={bad}")).unwrap_err(),
                format!("2: a: expected a quoted text, not {bad}")
            );
        }
    }
}
