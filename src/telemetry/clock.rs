//! Points in time as text: `strftime` without a locale.

use std::io::Write as _;
use std::time::SystemTime;

/// A piece of a time format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TimePiece {
    Literal(Box<str>),
    /// `%Y`, `%m`, `%d`, `%H`, `%M`, `%S`, `%s`
    Field(char),
    /// `%3f`: that many digits of the fraction.
    Fraction(u32),
}

/// `strftime` with Envoy's `%3f`; empty: `%Y-%m-%dT%H:%M:%S.%3fZ`. `None` when it has a field that we do not know.
pub(super) fn time_format(said: &str) -> Option<Box<[TimePiece]>> {
    let said = if said.is_empty() { "%Y-%m-%dT%H:%M:%S.%3fZ" } else { said };
    let mut pieces = Vec::new();
    let mut literal = String::new();
    let mut chars = said.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            literal.push(c);
            continue;
        }
        let piece = match chars.next()? {
            '%' => {
                literal.push('%');
                continue;
            }
            'f' => TimePiece::Fraction(9),
            digit @ '1'..='9' => {
                chars.next_if_eq(&'f')?;
                TimePiece::Fraction(u32::from(digit) - u32::from('0'))
            }
            field @ ('Y' | 'm' | 'd' | 'H' | 'M' | 'S' | 's') => TimePiece::Field(field),
            _ => return None,
        };
        if !literal.is_empty() {
            pieces.push(TimePiece::Literal(std::mem::take(&mut literal).into()));
        }
        pieces.push(piece);
    }
    if !literal.is_empty() {
        pieces.push(TimePiece::Literal(literal.into()));
    }
    Some(pieces.into())
}

pub(super) fn write_time(at: SystemTime, pieces: &[TimePiece], out: &mut Vec<u8>) {
    let time = time::OffsetDateTime::from(at);
    let padded = |value: u64, width: usize, out: &mut Vec<u8>| {
        let mut buffer = itoa::Buffer::new();
        let digits = buffer.format(value);
        out.extend(std::iter::repeat_n(b'0', width.saturating_sub(digits.len())));
        out.extend_from_slice(digits.as_bytes());
    };
    for piece in pieces {
        let (value, width) = match piece {
            TimePiece::Literal(text) => {
                out.extend_from_slice(text.as_bytes());
                continue;
            }
            TimePiece::Fraction(digits) => {
                (u64::from(time.nanosecond()) / 10_u64.pow(9_u32.saturating_sub(*digits)), *digits as usize)
            }
            TimePiece::Field('Y') => (time.year().unsigned_abs().into(), 4),
            TimePiece::Field('m') => (u8::from(time.month()).into(), 2),
            TimePiece::Field('d') => (time.day().into(), 2),
            TimePiece::Field('H') => (time.hour().into(), 2),
            TimePiece::Field('M') => (time.minute().into(), 2),
            TimePiece::Field('S') => (time.second().into(), 2),
            TimePiece::Field(_) => (time.unix_timestamp().unsigned_abs(), 1),
        };
        padded(value, width, out);
    }
}

/// The start time as the default format prints it.
pub(super) fn default_time(at: SystemTime, out: &mut Vec<u8>) {
    let time = time::OffsetDateTime::from(at);
    // Writing to a vector cannot fail.
    let _ = write!(
        out,
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.millisecond()
    );
}
