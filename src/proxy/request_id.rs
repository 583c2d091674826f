//! `x-request-id`: a random UUID whose 15th character carries the tracing decision, as Envoy packs it.

use http::HeaderValue;
use proxy_config::model::Tracing;

/// Whether a trace is wanted for a request whose id we make.
pub(super) fn sampled(tracing: Option<&Tracing>, draw: u64) -> bool {
    const PRECISION: u64 = 10_000;
    let Some(tracing) = tracing else { return false };
    let share = tracing.random_sampling.unwrap_or(100.0).min(tracing.overall_sampling.unwrap_or(100.0));
    ((draw % PRECISION) as f64) < share * (PRECISION as f64 / 100.0)
}

/// An id from 128 random bits.
pub(super) fn new(random: u128, sampled: bool) -> HeaderValue {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    const DECISION: usize = 14;
    const VARIANT: usize = 19;
    let mut text = [b'-'; 36];
    let mut bits = random;
    for (at, out) in text.iter_mut().enumerate() {
        if matches!(at, 8 | 13 | 18 | 23) {
            continue;
        }
        *out = HEX[(bits & 15) as usize];
        bits >>= 4;
    }
    text[DECISION] = if sampled { b'9' } else { b'4' };
    text[VARIANT] = HEX[8 | ((random >> 120) & 3) as usize];
    HeaderValue::from_bytes(&text).expect("hexadecimal digits and dashes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_version_4_and_carry_the_decision() {
        assert_eq!(new(0, false), "00000000-0000-4000-8000-000000000000");
        assert_eq!(new(u128::MAX, true), "ffffffff-ffff-9fff-bfff-ffffffffffff");
        assert_ne!(new(1 << 127, false), new(1 << 126, false));
    }

    #[test]
    fn sampling_is_a_share() {
        let one = Tracing { random_sampling: Some(1.0), ..Tracing::default() };
        let hits = (0..10_000).filter(|draw| sampled(Some(&one), *draw)).count();
        assert_eq!(hits, 100);
        assert!(!sampled(None, 0));
        assert!(sampled(Some(&Tracing::default()), 9_999));
    }
}
