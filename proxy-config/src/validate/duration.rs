//! Durations as the API's validation sees them: signed, to the nanosecond.

use super::Findings;
use super::at::At;

/// Nanoseconds of a duration in Go's syntax (`1h`, `-1.5s`, `100ms`); `None` when it is none.
pub(crate) fn nanoseconds(text: &str) -> Option<i128> {
    let (negative, mut rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(0);
    }
    let mut total = 0_i128;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let (number, tail) = rest.split_at(digits);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        total = total.checked_add(part(number, unit)?)?;
        rest = tail;
    }
    Some(if negative { -total } else { total })
}

fn part(number: &str, unit: &str) -> Option<i128> {
    let scale: i128 = match unit {
        "ns" => 1,
        "us" | "µs" | "μs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut sum = whole.checked_mul(scale)?;
    let mut place = scale;
    for digit in fraction.bytes() {
        place /= 10;
        sum += i128::from(digit.checked_sub(b'0').filter(|d| *d < 10)?) * place;
    }
    Some(sum)
}

/// One millisecond.
const MILLISECOND: i128 = 1_000_000;

/// A duration of at least one millisecond, to the millisecond; nothing said is fine.
pub(super) fn check(found: &mut Findings, at: &At<'_>) {
    if !at.is_said() {
        return;
    }
    match nanoseconds(at.text()) {
        None => found.add(at, format!("{:?} is no duration such as 1h30m, 1.5s or 100ms", at.text())),
        Some(ns) if ns < MILLISECOND => found.add(at, "a duration of at least 1ms is expected"),
        Some(ns) if ns % MILLISECOND != 0 => found.add(at, "durations are exact to the millisecond"),
        Some(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ns) in [
            ("1h", 3_600_000_000_000),
            ("5m30s", 330_000_000_000),
            ("1.5s", 1_500_000_000),
            ("-1s", -1_000_000_000),
            ("0.000000999s", 999),
            ("2.000000001s", 2_000_000_001),
            ("100ms", 100_000_000),
            ("0", 0),
            (".5s", 500_000_000),
        ] {
            assert_eq!(nanoseconds(text), Some(ns), "{text}");
        }
        for text in ["", "1", "s", "1x", "1s1", ".s", "-", "1..2s", "fast", "99999999999999999999999999999999999999h"] {
            assert_eq!(nanoseconds(text), None, "{text}");
        }
    }
}
