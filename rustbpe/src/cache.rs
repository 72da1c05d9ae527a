//! A bounded memory of how short pieces were encoded.

use crate::key::MAX_KEY_BYTES;
use crate::prefetch::prefetch;

/// Bits of a remembered id: vocabularies of more than a million are encoded without the memory.
const ID_BITS: u32 = 20;
/// Ids from here on cannot be remembered.
pub const MAX_CACHED_ID: u32 = 1 << ID_BITS;
/// Most tokens a remembered piece can have.
pub const MAX_CACHED_TOKENS: usize = 6;
const BUCKETS: usize = 1 << 15;

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

/// Remembers up to 65,536 pieces of at most `MAX_KEY_BYTES` bytes in two megabytes; new ones push old ones out.
pub struct PieceCache {
    buckets: Vec<Bucket>,
}

const _: () = assert!(MAX_KEY_BYTES < 16);

impl PieceCache {
    pub fn new() -> Self {
        let empty = Entry { key: 0, tokens: Tokens(0) };
        PieceCache { buckets: vec![Bucket([empty; 2]); BUCKETS] }
    }

    #[inline]
    fn home(hash: u64) -> usize {
        (hash >> (64 - BUCKETS.trailing_zeros())) as usize
    }

    /// Starts loading the place where a key with this hash would be.
    #[inline]
    pub fn prefetch(&self, hash: u64) {
        prefetch(&self.buckets, Self::home(hash));
    }

    #[inline]
    pub fn get(&self, key: u128, hash: u64) -> Option<Tokens> {
        let Bucket([first, second]) = &self.buckets[Self::home(hash)];
        if first.key == key {
            Some(first.tokens)
        } else if second.key == key {
            Some(second.tokens)
        } else {
            None
        }
    }

    pub fn insert(&mut self, key: u128, hash: u64, tokens: Tokens) {
        let Bucket([first, second]) = &mut self.buckets[Self::home(hash)];
        *second = *first;
        *first = Entry { key, tokens };
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
}
