//! Points in time as text: `strftime` without a locale.

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
    let (year, month, day) = time.to_calendar_date();
    for piece in pieces {
        match piece {
            TimePiece::Literal(text) => out.extend_from_slice(text.as_bytes()),
            TimePiece::Fraction(digits) => padded(time.nanosecond(), 9, *digits as usize, out),
            TimePiece::Field('Y') => padded(year.unsigned_abs(), 4, 4, out),
            TimePiece::Field('m') => padded(u8::from(month).into(), 2, 2, out),
            TimePiece::Field('d') => padded(day.into(), 2, 2, out),
            TimePiece::Field('H') => padded(time.hour().into(), 2, 2, out),
            TimePiece::Field('M') => padded(time.minute().into(), 2, 2, out),
            TimePiece::Field('S') => padded(time.second().into(), 2, 2, out),
            TimePiece::Field(_) => {
                out.extend_from_slice(itoa::Buffer::new().format(time.unix_timestamp()).as_bytes());
            }
        }
    }
}

/// The first `shown` of `width` digits, at most ten.
fn padded(mut value: u32, width: usize, shown: usize, out: &mut Vec<u8>) {
    let mut digits = [b'0'; 10];
    for digit in digits[..width].iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
    out.extend_from_slice(&digits[..shown.min(width)]);
}

/// The start time as the default format prints it.
pub(super) fn default_time(at: SystemTime, out: &mut Vec<u8>) {
    let time = time::OffsetDateTime::from(at);
    let (year, month, day) = time.to_calendar_date();
    for (value, width, shown, after) in [
        (year.unsigned_abs(), 4, 4, b'-'),
        (u8::from(month).into(), 2, 2, b'-'),
        (day.into(), 2, 2, b'T'),
        (time.hour().into(), 2, 2, b':'),
        (time.minute().into(), 2, 2, b':'),
        (time.second().into(), 2, 2, b'.'),
        (time.nanosecond(), 9, 3, b'Z'),
    ] {
        padded(value, width, shown, out);
        out.push(after);
    }
}
