//! Counting how often each piece occurs.

use std::collections::HashMap;

use crate::bpe::huge;
use crate::bpe::key::{FastBuild, MAX_KEY_BYTES, hash_key, key, key_len};
use crate::bpe::prefetch::prefetch;

/// Pieces whose table slots are fetched ahead together.
const BATCH: usize = 32;
const FIRST_SLOTS: usize = 1 << 14;

#[derive(Clone, Copy)]
#[repr(align(32))]
struct Slot {
    /// 0: empty.
    key: u128,
    count: u64,
}

const EMPTY: Slot = Slot { key: 0, count: 0 };

/// A multiset of pieces. Short ones (nearly all) live inside an open-addressing table, longer ones in a `HashMap`.
pub struct PieceCounter {
    slots: Vec<Slot>,
    used: usize,
    long: HashMap<Box<[u8]>, u64, FastBuild>,
    batch: [(u128, u64); BATCH],
    batched: usize,
}

impl Default for PieceCounter {
    fn default() -> Self {
        PieceCounter {
            slots: vec![EMPTY; FIRST_SLOTS],
            used: 0,
            long: HashMap::default(),
            batch: [(0, 0); BATCH],
            batched: 0,
        }
    }
}

impl PieceCounter {
    /// Counts one occurrence of `bytes[start..end]`.
    #[inline]
    pub fn add(&mut self, bytes: &[u8], start: usize, end: usize) {
        if end - start <= MAX_KEY_BYTES {
            let key = key(bytes, start, end);
            let hash = hash_key(key);
            prefetch(&self.slots, self.home(hash));
            self.batch[self.batched] = (key, hash);
            self.batched += 1;
            if self.batched == BATCH {
                self.flush();
            }
        } else {
            self.add_long(&bytes[start..end], 1);
        }
    }

    /// Counts `count` occurrences of `piece`.
    pub fn add_many(&mut self, piece: &[u8], count: u64) {
        if piece.len() <= MAX_KEY_BYTES {
            self.flush();
            let key = key(piece, 0, piece.len());
            self.bump(key, hash_key(key), count);
        } else {
            self.add_long(piece, count);
        }
    }

    /// Counts what is still in the batch. Call it before reading the counts.
    pub fn flush(&mut self) {
        // Room for the whole batch first, so that the table cannot move in the loop.
        if (self.used + BATCH) * 10 > self.slots.len() * 7 {
            self.grow();
        }
        for i in 0..self.batched {
            let (key, hash) = self.batch[i];
            self.bump(key, hash, 1);
        }
        self.batched = 0;
    }

    /// Takes over the counts of `other`.
    pub fn absorb(&mut self, mut other: PieceCounter) {
        self.flush();
        other.flush();
        for slot in other.slots.iter().filter(|slot| slot.key != 0) {
            if (self.used + 1) * 10 > self.slots.len() * 7 {
                self.grow();
            }
            self.bump(slot.key, hash_key(slot.key), slot.count);
        }
        for (piece, count) in other.long {
            *self.long.entry(piece).or_insert(0) += count;
        }
    }

    /// Number of different pieces.
    pub fn num_different(&self) -> usize {
        self.used + self.long.len()
    }

    /// Calls `f(piece, count)` for every piece, in no particular order.
    pub fn for_each(&self, mut f: impl FnMut(&[u8], u64)) {
        debug_assert_eq!(self.batched, 0);
        for slot in self.slots.iter().filter(|slot| slot.key != 0) {
            f(&slot.key.to_le_bytes()[..key_len(slot.key)], slot.count);
        }
        for (piece, &count) in &self.long {
            f(piece, count);
        }
    }

    fn add_long(&mut self, piece: &[u8], count: u64) {
        match self.long.get_mut(piece) {
            Some(have) => *have += count,
            None => {
                self.long.insert(piece.into(), count);
            }
        }
    }

    #[inline]
    fn home(&self, hash: u64) -> usize {
        (hash >> (64 - self.slots.len().trailing_zeros())) as usize
    }

    /// Adds `count` to `key`. The caller has made sure of a free slot.
    #[inline]
    fn bump(&mut self, key: u128, hash: u64, count: u64) {
        let mask = self.slots.len() - 1;
        let mut i = self.home(hash);
        loop {
            let slot = &mut self.slots[i & mask];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.key == 0 {
                *slot = Slot { key, count };
                self.used += 1;
                return;
            }
            i += 1;
        }
    }

    #[cold]
    fn grow(&mut self) {
        let double = huge::filled(EMPTY, self.slots.len() * 2);
        let old = std::mem::replace(&mut self.slots, double);
        self.used = 0;
        for slot in old.iter().filter(|slot| slot.key != 0) {
            self.bump(slot.key, hash_key(slot.key), slot.count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_a_hash_map_counts() {
        let mut state = 1u64;
        let mut random = move || {
            state = crate::bpe::key::mix(state.wrapping_add(0x9e37_79b9_7f4a_7c15));
            state
        };
        let (mut a, mut b) = (PieceCounter::default(), PieceCounter::default());
        let mut expected: HashMap<Vec<u8>, u64> = HashMap::new();
        for i in 0..60_000 {
            let len = 1 + random() as usize % if i % 50 == 0 { 40 } else { 4 };
            let piece: Vec<u8> = (0..len).map(|_| b'a' + (random() % 12) as u8).collect();
            let counter = if i % 3 == 0 { &mut a } else { &mut b };
            counter.add(&piece, 0, len);
            *expected.entry(piece).or_insert(0) += 1;
        }
        a.absorb(b);
        let mut found = HashMap::new();
        a.for_each(|piece, count| assert!(found.insert(piece.to_vec(), count).is_none()));
        assert_eq!(a.num_different(), expected.len());
        assert_eq!(found, expected);
    }
}
