//! A map by name for what changes one at a time out of thousands.

use std::borrow::Borrow;
use std::ops::Index;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::Name;

/// Entries of a piece at most: a change copies one piece, a copy of the map one pointer for each piece.
const MOST: usize = 128;

/// A sorted map in pieces. Copies share every piece that neither of them has written to since, so that a push of one
/// resource costs the same beside five and beside fifty thousand others, but for a pointer for each hundred of them.
#[derive(Debug, Clone)]
pub struct Pieces<V>(Vec<Arc<Piece<V>>>);

/// In order, never empty.
type Piece<V> = Vec<(Name, V)>;

impl<V> Default for Pieces<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V> Pieces<V> {
    /// A value.
    pub fn get(&self, name: &str) -> Option<&V> {
        let piece = self.0.get(self.place(name))?;
        let at = find(piece, name).ok()?;
        Some(&piece[at].1)
    }

    /// Whether there is one of this name.
    pub fn contains_key(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Number of entries; counts pieces.
    pub fn len(&self) -> usize {
        self.0.iter().map(|piece| piece.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &V)> {
        self.0.iter().flat_map(|piece| piece.iter()).map(|(name, value)| (name, value))
    }

    /// In order of the names.
    pub fn keys(&self) -> impl Iterator<Item = &Name> {
        self.iter().map(|(name, _)| name)
    }

    /// In order of the names.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// Whether both are made of the same pieces; `false` says nothing about their content.
    pub fn same(&self, other: &Self) -> bool {
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(|(a, b)| Arc::ptr_eq(a, b))
    }

    /// The piece that has the name or would have it.
    fn place(&self, name: &str) -> usize {
        self.0.partition_point(|piece| &*piece[0].0 <= name).saturating_sub(1)
    }
}

impl<V: Clone> Pieces<V> {
    /// Puts in a value; the one that was there.
    pub fn insert(&mut self, name: Name, value: V) -> Option<V> {
        let place = self.place(&name);
        let last = place + 1 == self.0.len();
        let Some(piece) = self.0.get_mut(place).map(Arc::make_mut) else {
            self.0.push(Arc::new(vec![(name, value)]));
            return None;
        };
        match find(piece, &name) {
            Ok(at) => return Some(std::mem::replace(&mut piece[at].1, value)),
            Err(at) => piece.insert(at, (name, value)),
        }
        if piece.len() > MOST {
            // What comes in order leaves full pieces behind.
            let kept = if last { MOST } else { MOST / 2 };
            let more = piece.split_off(kept);
            self.0.insert(place + 1, Arc::new(more));
        }
        None
    }

    /// Takes out a value.
    pub fn remove(&mut self, name: &str) -> Option<V> {
        let place = self.place(name);
        let at = find(self.0.get(place)?, name).ok()?;
        let piece = Arc::make_mut(&mut self.0[place]);
        let (_, value) = piece.remove(at);
        if piece.is_empty() {
            self.0.remove(place);
        }
        Some(value)
    }

    /// A value, to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut V> {
        let place = self.place(name);
        let at = find(self.0.get(place)?, name).ok()?;
        Some(&mut Arc::make_mut(&mut self.0[place])[at].1)
    }

    /// All values, to be changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.0.iter_mut().flat_map(Arc::make_mut).map(|(_, value)| value)
    }
}

fn find<V>(piece: &Piece<V>, name: &str) -> Result<usize, usize> {
    piece.binary_search_by(|(known, _)| (**known).cmp(name))
}

impl<V: PartialEq> PartialEq for Pieces<V> {
    fn eq(&self, other: &Self) -> bool {
        self.same(other) || self.iter().eq(other.iter())
    }
}

impl<V, Q: Borrow<str> + ?Sized> Index<&Q> for Pieces<V> {
    type Output = V;

    /// # Panics
    /// When there is none of this name.
    fn index(&self, name: &Q) -> &V {
        self.get(name.borrow()).expect("an entry of this name")
    }
}

impl<V: Clone> Extend<(Name, V)> for Pieces<V> {
    fn extend<I: IntoIterator<Item = (Name, V)>>(&mut self, entries: I) {
        for (name, value) in entries {
            self.insert(name, value);
        }
    }
}

impl<V: Clone> FromIterator<(Name, V)> for Pieces<V> {
    fn from_iter<I: IntoIterator<Item = (Name, V)>>(entries: I) -> Self {
        let mut all = Self::default();
        all.extend(entries);
        all
    }
}

impl<V: Serialize> Serialize for Pieces<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn name(n: u16) -> Name {
        format!("outbound|{n}").into()
    }

    proptest! {
        /// Against the standard library's map, with a copy that must not see what comes later.
        #[test]
        fn it_is_a_map(steps in proptest::collection::vec((0_u16..600, any::<bool>()), 0..1500)) {
            let (mut ours, mut known) = (Pieces::default(), BTreeMap::new());
            let (mut copy, mut then) = (ours.clone(), known.clone());
            for (at, (n, put)) in steps.into_iter().enumerate() {
                if put {
                    prop_assert_eq!(ours.insert(name(n), at), known.insert(name(n), at));
                } else {
                    prop_assert_eq!(ours.remove(&name(n)), known.remove(&name(n)));
                }
                if at == 700 {
                    (copy, then) = (ours.clone(), known.clone());
                }
            }
            prop_assert!(ours.iter().eq(known.iter()) && copy.iter().eq(then.iter()));
            prop_assert_eq!(ours.len(), known.len());
            prop_assert!((0..600).all(|n| ours.get(&name(n)) == known.get(&name(n))));
        }
    }

    #[test]
    fn a_change_copies_one_piece() {
        let all: Pieces<u16> = (0..5000).map(|n| (name(n), n)).collect();
        let mut changed = all.clone();
        assert!(changed.same(&all));
        changed.insert(name(17), 0);
        let copied = all.0.iter().zip(&changed.0).filter(|(a, b)| !Arc::ptr_eq(a, b)).count();
        assert_eq!((copied, all[&name(17)], changed[&name(17)]), (1, 17, 0));
        assert!(all.0.len() <= 5000 / (MOST / 2), "pieces are not small: {}", all.0.len());
        assert!(changed != all);
        changed.insert(name(17), 17);
        assert!(changed == all, "by content");
    }
}
