//! A bounded memory of how short pieces were encoded.

use crate::key::{MAX_KEY_BYTES, hash_key};
use crate::prefetch::prefetch;

/// Bits of a remembered id: vocabularies of more than a million are encoded without the memory.
const ID_BITS: u32 = 20;
/// Ids from here on cannot be remembered.
pub const MAX_CACHED_ID: u32 = 1 << ID_BITS;
/// Most tokens a remembered piece can have.
pub const MAX_CACHED_TOKENS: usize = 6;
const FIRST_BUCKETS: usize = 1 << 12;
const MAX_BUCKETS: usize = 1 << 17;

/// The tokens of a piece in one number: how many in the lowest four bits, then twenty bits for each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tokens(u128);

impl Tokens {
    /// Packs `ids`, unless there are too many or one is too large.
    pub fn pack(ids: &[u32]) -> Option<Self> {
        if ids.len() > MAX_CACHED_TOKENS || ids.iter().any(|&id| id >= MAX_CACHED_ID) {
            return None;
        }
        let packed = ids.iter().rev().fold(0, |packed, &id| packed << ID_BITS | u128::from(id));
        Some(Tokens(packed << 4 | ids.len() as u128))
    }

    #[inline]
    pub fn len(self) -> usize {
        (self.0 & 15) as usize
    }

    /// The ids in order, without end: zeros follow the last.
    #[inline]
    pub fn ids(self) -> impl Iterator<Item = u32> {
        let mut rest = self.0 >> 4;
        std::iter::repeat_with(move || {
            let id = rest as u32 & (MAX_CACHED_ID - 1);
            rest >>= ID_BITS;
            id
        })
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

/// Remembers pieces of at most `MAX_KEY_BYTES` bytes. It grows from a quarter of a megabyte to at most eight megabytes
/// (262,144 pieces) as more of them are met; then new ones push old ones out.
pub struct PieceCache {
    buckets: Vec<Bucket>,
    /// Insertions since it last grew.
    inserted: usize,
}

const _: () = assert!(MAX_KEY_BYTES < 16);

const EMPTY: Bucket = Bucket([Entry { key: 0, tokens: Tokens(0) }; 2]);

impl PieceCache {
    pub fn new() -> Self {
        PieceCache { buckets: vec![EMPTY; FIRST_BUCKETS], inserted: 0 }
    }

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
        let double = vec![EMPTY; self.buckets.len() * 2];
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
        for ids in [&[][..], &[0], &[MAX_CACHED_ID - 1], &[1, 0, 3], &[9, 8, 7, 6, 5, MAX_CACHED_ID - 1]] {
            let packed = Tokens::pack(ids).unwrap();
            assert_eq!(packed.len(), ids.len());
            assert_eq!(packed.ids().take(packed.len()).collect::<Vec<_>>(), ids);
        }
        assert_eq!(Tokens::pack(&[MAX_CACHED_ID]), None);
        assert_eq!(Tokens::pack(&[1; MAX_CACHED_TOKENS + 1]), None);
    }

    #[test]
    fn what_it_remembers_is_right() {
        let mut cache = PieceCache::new();
        let of = |key: u128| Tokens::pack(&[key as u32, 1]).unwrap();
        for key in 1..400_000u128 {
            let hash = hash_key(key);
            assert_eq!(cache.get(key, hash), None);
            cache.insert(key, hash, of(key));
            assert_eq!(cache.get(key, hash), Some(of(key)));
        }
        assert_eq!(cache.buckets.len(), MAX_BUCKETS);
        let kept = (1..400_000u128).filter_map(|key| Some((key, cache.get(key, hash_key(key))?)));
        let kept: Vec<_> = kept.collect();
        assert!(kept.iter().all(|&(key, tokens)| tokens == of(key)));
        assert!(kept.len() > 150_000, "{} remembered", kept.len());
    }
}
