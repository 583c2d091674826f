//! Consistent hashing: Envoy's ketama ring and Maglev table over XXH64, so that a key goes to the same host through us
//! as through a real sidecar.

use twox_hash::XxHash64;

/// Smallest ring when configuration does not say.
const MINIMUM_RING: u64 = 1024;
/// Largest ring, and the default of its limit.
const MAXIMUM_RING: u64 = 8 * 1024 * 1024;
/// Maglev's table when configuration does not say; a prime.
const MAGLEV_TABLE: u64 = 65_537;

/// The hash of a key, as Envoy takes it.
pub fn xx_hash(key: &[u8]) -> u64 {
    XxHash64::oneshot(0, key)
}

/// A host as hashing sees it: the text that is hashed, and its share of the whole (all shares sum up to 1).
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Share {
    pub(super) key: String,
    pub(super) share: f64,
    pub(super) host: u32,
}

/// Ketama: the host of the first point at or after a hash.
#[derive(Debug, Default)]
pub(super) struct Ring {
    points: Box<[(u64, u32)]>,
}

impl Ring {
    pub(super) fn build(shares: &[Share], minimum: Option<u64>, maximum: Option<u64>) -> Self {
        let least = shares.iter().map(|s| s.share).fold(f64::INFINITY, f64::min);
        if shares.is_empty() || least <= 0.0 {
            return Self::default();
        }
        let minimum = minimum.unwrap_or(MINIMUM_RING) as f64;
        let maximum = maximum.unwrap_or(MAXIMUM_RING).min(MAXIMUM_RING) as f64;
        // The least host gets a whole number of points, so that equal hosts get equally many.
        let scale = ((least * minimum).ceil() / least).min(maximum);
        let mut points = Vec::with_capacity(scale.ceil() as usize);
        let (mut current, mut target) = (0.0, 0.0);
        let mut text = String::new();
        for share in shares {
            target += scale * share.share;
            let mut index = 0_u64;
            while current < target {
                text.clear();
                text.push_str(&share.key);
                text.push('_');
                text.push_str(itoa::Buffer::new().format(index));
                points.push((xx_hash(text.as_bytes()), share.host));
                index += 1;
                current += 1.0;
            }
        }
        points.sort_by_key(|(hash, _)| *hash);
        Self { points: points.into() }
    }

    /// The host for a hash; later attempts walk on along the ring.
    pub(super) fn pick(&self, hash: u64, attempt: u32) -> Option<u32> {
        let at = self.points.partition_point(|(point, _)| *point < hash) + attempt as usize;
        self.points.get(at.checked_rem(self.points.len())?).map(|(_, host)| *host)
    }
}

/// Maglev: a table that each host fills in the order of a permutation of its own.
#[derive(Debug, Default)]
pub(super) struct Maglev {
    table: Box<[u32]>,
}

struct Filling {
    host: u32,
    offset: u64,
    skip: u64,
    share: f64,
    target: f64,
    next: u64,
}

impl Filling {
    fn slot(&self, size: u64) -> usize {
        (self.offset.wrapping_add(self.skip.wrapping_mul(self.next)) % size) as usize
    }
}

impl Maglev {
    const EMPTY: u32 = u32::MAX;

    pub(super) fn build(shares: &[Share], size: Option<u64>) -> Self {
        let size = size.unwrap_or(MAGLEV_TABLE).max(2);
        let largest = shares.iter().map(|s| s.share).fold(0.0, f64::max);
        if largest <= 0.0 {
            return Self::default();
        }
        // The order of discovery must not matter.
        let mut sorted: Vec<&Share> = shares.iter().collect();
        sorted.sort_by(|a, b| a.key.cmp(&b.key));
        let mut fillings: Vec<Filling> = sorted.into_iter().map(|share| filling(share, size)).collect();
        let mut table = vec![Self::EMPTY; size as usize];
        let mut filled = 0;
        let mut round = 0.0;
        while filled < table.len() {
            round += 1.0;
            for entry in &mut fillings {
                if filled == table.len() {
                    break;
                }
                // The largest host takes a turn in every round, the others as often as their shares say.
                if round * entry.share < entry.target {
                    continue;
                }
                entry.target += largest;
                while table[entry.slot(size)] != Self::EMPTY {
                    entry.next += 1;
                }
                table[entry.slot(size)] = entry.host;
                entry.next += 1;
                filled += 1;
            }
        }
        Self { table: table.into() }
    }

    /// The host for a hash; later attempts look elsewhere in the table.
    pub(super) fn pick(&self, hash: u64, attempt: u32) -> Option<u32> {
        let hash = if attempt > 0 { hash ^ (u64::MAX - u64::from(attempt) + 1) } else { hash };
        let at = hash.checked_rem(self.table.len() as u64)?;
        self.table.get(at as usize).copied()
    }
}

fn filling(share: &Share, size: u64) -> Filling {
    Filling {
        host: share.host,
        offset: xx_hash(share.key.as_bytes()) % size,
        skip: XxHash64::oneshot(1, share.key.as_bytes()) % (size - 1) + 1,
        share: share.share,
        target: 0.0,
        next: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(weights: &[u32]) -> Vec<Share> {
        let sum: u32 = weights.iter().sum();
        let share = |(i, w): (usize, &u32)| Share {
            key: format!("127.0.0.1:{}", 90 + i),
            share: f64::from(*w) / f64::from(sum),
            host: u32::try_from(i).unwrap(),
        };
        weights.iter().enumerate().map(share).collect()
    }

    /// Envoy's own test "Basic": six hosts, ring of 12, and where its hashes go.
    #[test]
    fn the_ring_is_envoys() {
        let ring = Ring::build(&shares(&[1; 6]), Some(12), None);
        let expected: [(u64, u32); 12] = [
            (833_437_586_790_550_860, 94),
            (928_266_305_478_181_108, 92),
            (1_033_482_794_131_418_490, 90),
            (3_551_244_743_356_806_947, 95),
            (3_851_675_632_748_031_481, 93),
            (5_583_722_120_771_150_861, 91),
            (6_311_230_543_546_372_928, 91),
            (7_700_377_290_971_790_572, 93),
            (13_144_177_310_400_110_813, 95),
            (13_444_792_449_719_432_967, 92),
            (15_516_499_411_664_133_160, 94),
            (16_117_243_373_044_804_889, 90),
        ];
        assert_eq!(*ring.points, expected.map(|(hash, port)| (hash, port - 90)));
    }

    #[test]
    fn the_ring_wraps_and_walks_on() {
        let ring = Ring { points: [(10, 0), (20, 1), (30, 2)].into() };
        for (hash, attempt, host) in [(0, 0, 0), (10, 0, 0), (11, 0, 1), (30, 0, 2), (31, 0, 0), (31, 1, 1), (30, 2, 1)]
        {
            assert_eq!(ring.pick(hash, attempt), Some(host), "{hash} attempt {attempt}");
        }
        assert_eq!(Ring::default().pick(1, 0), None);
    }

    #[test]
    fn weights_share_the_ring_and_the_table() {
        let shares = shares(&[1, 3]);
        let ring = Ring::build(&shares, None, None);
        let heavy = ring.points.iter().filter(|(_, host)| *host == 1).count();
        assert_eq!((ring.points.len(), heavy), (1024, 768));
        let maglev = Maglev::build(&shares, Some(1009));
        let heavy = maglev.table.iter().filter(|host| **host == 1).count();
        assert!((755..=759).contains(&heavy), "{heavy}");
    }

    #[test]
    fn maglev_moves_little_and_ignores_order() {
        let five = shares(&[1; 5]);
        let mut turned = five.clone();
        turned.reverse();
        let (a, b) = (Maglev::build(&five, None), Maglev::build(&turned, None));
        assert_eq!(a.table, b.table);
        let mut four: Vec<Share> = five[..4].to_vec();
        four.iter_mut().for_each(|s| s.share = 0.25);
        let c = Maglev::build(&four, None);
        let moved = (0..a.table.len()).filter(|i| a.table[*i] != 4 && a.table[*i] != c.table[*i]).count();
        assert!(moved * 100 < a.table.len() * 10, "{moved} of {}", a.table.len());
        assert_eq!(Maglev::build(&[], None).pick(1, 0), None);
    }
}
