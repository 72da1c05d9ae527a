//! A bounded memory of how short pieces were encoded.

use crate::bpe::huge;
use crate::bpe::key::{MAX_KEY_BYTES, hash_key};
use crate::bpe::prefetch::prefetch;
use crate::bpe::vocab::MAX_RANK;

/// Bits of a remembered id; enough for every rank (`vocab::MAX_RANK`).
const ID_BITS: u32 = 24;
const ID_MASK: u32 = (1 << ID_BITS) - 1;
/// Most tokens a remembered piece can have.
pub const MAX_CACHED_TOKENS: usize = 5;
const FIRST_BUCKETS: usize = 1 << 12;
const MAX_BUCKETS: usize = 1 << 18;

/// The tokens of a piece in sixteen bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tokens {
    /// The number of tokens above the id of the first.
    first: u32,
    /// The ids of the others, `ID_BITS` each.
    rest: [u32; 3],
}

const _: () = assert!(MAX_RANK <= 1 << ID_BITS && ID_BITS as usize * (MAX_CACHED_TOKENS - 1) <= 96);

impl Tokens {
    const NONE: Tokens = Tokens { first: 0, rest: [0; 3] };

    /// Packs 1 to `MAX_CACHED_TOKENS` ids below `MAX_RANK`; other numbers of ids cannot be packed.
    pub fn pack(ids: &[u32]) -> Option<Self> {
        let (&first, others) = ids.split_first()?;
        if others.len() >= MAX_CACHED_TOKENS {
            return None;
        }
        let bits = others.iter().rev().fold(0, |bits: u128, &id| bits << ID_BITS | u128::from(id));
        let rest = [bits as u32, (bits >> 32) as u32, (bits >> 64) as u32];
        Some(Tokens { first: (ids.len() as u32) << ID_BITS | first, rest })
    }

    /// How many there are.
    #[inline]
    pub fn count(self) -> usize {
        (self.first >> ID_BITS) as usize
    }

    /// The first id.
    #[inline]
    pub fn first(self) -> u32 {
        self.first & ID_MASK
    }

    /// The ids after the first.
    pub fn others(self) -> impl Iterator<Item = u32> {
        let [a, b, c] = self.rest;
        let bits = u128::from(a) | u128::from(b) << 32 | u128::from(c) << 64;
        (0..self.count() as u32 - 1).map(move |i| (bits >> (i * ID_BITS)) as u32 & ID_MASK)
    }
}

#[derive(Clone, Copy)]
struct Entry {
    /// See `key.rs`; 0: empty.
    key: u128,
    tokens: Tokens,
}

/// One cache line: the entry used or made last, and the one before.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Bucket([Entry; 2]);

/// Remembers pieces of at most `MAX_KEY_BYTES` bytes. It grows from a quarter of a megabyte to at most sixteen megabytes
/// (524,288 pieces) as more of them are met; then new ones push old ones out.
pub struct PieceCache {
    buckets: Vec<Bucket>,
    /// Insertions since it last grew.
    inserted: usize,
}

const _: () = assert!(MAX_KEY_BYTES < 16);

const EMPTY: Bucket = Bucket([Entry { key: 0, tokens: Tokens::NONE }; 2]);

impl Default for PieceCache {
    fn default() -> Self {
        PieceCache { buckets: vec![EMPTY; FIRST_BUCKETS], inserted: 0 }
    }
}

impl PieceCache {
    #[inline]
    fn home(&self, hash: u64) -> usize {
        // The upper bits, so that a doubled table splits each bucket in two.
        (hash >> (64 - self.buckets.len().trailing_zeros())) as usize
    }

    /// Starts loading the place where a key with this hash would be.
    #[inline]
    pub fn prefetch(&self, hash: u64) {
        prefetch(&self.buckets, self.home(hash));
    }

    /// The tokens of the piece with this key and hash, if it is remembered.
    #[inline]
    pub fn get(&self, key: u128, hash: u64) -> Option<Tokens> {
        let Bucket([first, second]) = &self.buckets[self.home(hash)];
        if first.key == key {
            Some(first.tokens)
        } else if second.key == key {
            Some(second.tokens)
        } else {
            None
        }
    }

    /// Remembers the tokens of a piece that is not remembered yet.
    pub fn insert(&mut self, key: u128, hash: u64, tokens: Tokens) {
        if self.inserted >= self.buckets.len() && self.buckets.len() < MAX_BUCKETS {
            self.grow();
        }
        self.inserted += 1;
        self.put(Entry { key, tokens }, hash);
    }

    fn put(&mut self, entry: Entry, hash: u64) {
        let home = self.home(hash);
        let Bucket([first, second]) = &mut self.buckets[home];
        *second = *first;
        *first = entry;
    }

    #[cold]
    fn grow(&mut self) {
        let double = huge::filled(EMPTY, self.buckets.len() * 2);
        let old = std::mem::replace(&mut self.buckets, double);
        self.inserted = 0;
        for Bucket([first, second]) in old {
            for entry in [second, first] {
                if entry.key != 0 {
                    self.put(entry, hash_key(entry.key));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_lossless() {
        let last = MAX_RANK - 1;
        for ids in [&[0][..], &[last], &[1, 0, 3], &[9, 8, 7, 6, last], &[last; MAX_CACHED_TOKENS], &[0; 5]] {
            let packed = Tokens::pack(ids).unwrap();
            assert_eq!(packed.count(), ids.len());
            assert_eq!(std::iter::once(packed.first()).chain(packed.others()).collect::<Vec<_>>(), ids);
        }
        assert_eq!(Tokens::pack(&[]), None);
        assert_eq!(Tokens::pack(&[1; MAX_CACHED_TOKENS + 1]), None);
    }

    #[test]
    fn what_it_remembers_is_right() {
        let mut cache = PieceCache::default();
        let of = |key: u128| Tokens::pack(&[key as u32, 1]).unwrap();
        for key in 1..900_000u128 {
            let hash = hash_key(key);
            assert_eq!(cache.get(key, hash), None);
            cache.insert(key, hash, of(key));
            assert_eq!(cache.get(key, hash), Some(of(key)));
        }
        assert_eq!(cache.buckets.len(), MAX_BUCKETS);
        let kept = (1..900_000u128).filter_map(|key| Some((key, cache.get(key, hash_key(key))?)));
        let kept: Vec<_> = kept.collect();
        assert!(kept.iter().all(|&(key, tokens)| tokens == of(key)));
        assert!(kept.len() > 300_000, "{} remembered", kept.len());
    }
}
