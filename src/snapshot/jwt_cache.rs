//! Verified tokens of one worker, so that a signature is checked once and not with every request.

use std::sync::Arc;

use super::jwt::Verified;

/// Verified tokens that are remembered, in each of two generations.
const REMEMBERED: usize = 512;
/// Longer tokens are verified every time.
const LONGEST_REMEMBERED: usize = 8 * 1024;

/// Tokens that were verified. Two generations: what is used stays, what is not goes, and neither costs a search.
#[derive(Debug, Default)]
pub struct JwtCache {
    young: Generation,
    old: Generation,
}

/// Only verified tokens get in, so nobody can fill a bucket with others.
type Generation = hashbrown::HashMap<Key, Arc<Verified>, foldhash::quality::RandomState>;

/// Provider and token.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key(u64, Box<str>);

/// The same, borrowed from a request.
#[derive(Hash)]
struct Asked<'t>(u64, &'t str);

impl hashbrown::Equivalent<Key> for Asked<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        self.0 == key.0 && *self.1 == *key.1
    }
}

impl JwtCache {
    pub(super) fn get(&mut self, provider: u64, token: &str) -> Option<Arc<Verified>> {
        let asked = Asked(provider, token);
        if let Some(found) = self.young.get(&asked) {
            return Some(Arc::clone(found));
        }
        let (key, found) = self.old.remove_entry(&asked)?;
        self.put(key, &found);
        Some(found)
    }

    pub(super) fn insert(&mut self, provider: u64, token: &str, verified: &Arc<Verified>) {
        if token.len() <= LONGEST_REMEMBERED {
            self.put(Key(provider, token.into()), verified);
        }
    }

    fn put(&mut self, key: Key, verified: &Arc<Verified>) {
        if self.young.len() >= REMEMBERED {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, Arc::clone(verified));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_rest_goes() {
        let verified = Arc::new(Verified::default());
        let mut cache = JwtCache::default();
        cache.insert(1, "used", &verified);
        for n in 0..5 * REMEMBERED {
            cache.insert(1, &n.to_string(), &verified);
            assert!(cache.get(1, "used").is_some() && cache.young.len() + cache.old.len() <= 2 * REMEMBERED);
        }
        assert!(cache.get(1, "0").is_none() && cache.get(2, "used").is_none() && cache.get(1, "use").is_none());
        let long = "x".repeat(LONGEST_REMEMBERED + 1);
        cache.insert(1, &long, &verified);
        assert!(cache.get(1, &long).is_none());
    }
}
