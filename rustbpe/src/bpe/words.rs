//! All different pieces of a corpus laid out as one array of symbols in which merges happen in place.
//!
//! Every piece takes one slot per byte and is preceded by a separator. A symbol that spans several bytes has its id in its
//! first and in its last slot, so its neighbours are one step away on either side: the symbol that ends just before slot
//! `p` is the one named in `p - 1`, and its start is its length further left. The slots between are void. No links, no
//! shifting: a merge writes at most four slots.

use crate::bpe::count::PieceCounter;
use crate::bpe::huge;
use crate::error::Error;

/// Marks the slot before each piece, and the end of the array.
pub const SEPARATOR: u32 = u32::MAX;
/// Marks the inner slots of a symbol of more than two bytes.
const VOID: u32 = u32::MAX - 1;
/// Ids are below this.
pub const MAX_IDS: u32 = 1 << 31;
/// Weights from here on are kept aside: the slot then holds this bit and an index.
const BIG_WEIGHT: u32 = 1 << 31;

#[derive(Clone, Copy)]
struct Slot {
    symbol: u32,
    /// How often the piece occurs in the corpus (or an index into `big_weights`).
    weight: u32,
}

/// The pieces of a corpus, each with its number of occurrences, as sequences of symbols.
pub struct Words {
    slots: Vec<Slot>,
    big_weights: Vec<u64>,
    /// Length in bytes of each symbol.
    lengths: Vec<u32>,
}

impl Words {
    /// Lays out the pieces of two bytes or more; a single byte has nothing to merge.
    pub fn new(pieces: PieceCounter) -> Result<Self, Error> {
        let mut size = 1u64;
        pieces.for_each(|piece, _| size += if piece.len() > 1 { piece.len() as u64 + 1 } else { 0 });
        if size > u64::from(u32::MAX) {
            return Err(Error::Overflow(format!(
                "the corpus has {size} bytes of different pieces; at most {} are supported: train on less text",
                u32::MAX
            )));
        }
        let separator = Slot { symbol: SEPARATOR, weight: 0 };
        let mut slots = huge::with_capacity(size as usize);
        let mut big_weights = Vec::new();
        slots.push(separator);
        pieces.for_each(|piece, count| {
            if piece.len() < 2 {
                return;
            }
            let weight = if count < u64::from(BIG_WEIGHT) {
                count as u32
            } else {
                big_weights.push(count);
                BIG_WEIGHT | (big_weights.len() - 1) as u32
            };
            slots.extend(piece.iter().map(|&b| Slot { symbol: u32::from(b), weight }));
            slots.push(separator);
        });
        Ok(Words { slots, big_weights, lengths: vec![1; 256] })
    }

    /// Number of different symbols so far.
    pub fn num_symbols(&self) -> usize {
        self.lengths.len()
    }

    /// Makes the symbol that stands for `left` followed by `right`, and returns its id.
    pub fn new_symbol(&mut self, left: u32, right: u32) -> u32 {
        self.lengths.push(self.length(left) + self.length(right));
        (self.lengths.len() - 1) as u32
    }

    /// Length of `symbol` in bytes (and slots).
    #[inline]
    pub fn length(&self, symbol: u32) -> u32 {
        self.lengths[symbol as usize]
    }

    /// Occurrences in the corpus of the piece that slot `pos` belongs to.
    #[inline]
    pub fn weight(&self, pos: u32) -> u64 {
        let weight = self.slots[pos as usize].weight;
        if weight < BIG_WEIGHT { u64::from(weight) } else { self.big_weights[(weight ^ BIG_WEIGHT) as usize] }
    }

    /// The symbol whose first or last slot is `pos`; `SEPARATOR` outside of pieces.
    #[inline]
    pub fn symbol(&self, pos: u32) -> u32 {
        self.slots[pos as usize].symbol
    }

    /// Replaces `left` at slot `pos` and `right` after it by `merged`, if they are (still) there.
    ///
    /// `pos` must once have been the start of a `left`. Should that `left` have become part of a longer symbol since, the
    /// slot holds that symbol's id or is void, so one comparison tells.
    #[inline]
    pub fn merge_at(&mut self, pos: u32, left: u32, right: u32, merged: u32) -> bool {
        let start = pos as usize;
        let middle = start + self.length(left) as usize;
        if self.slots[start].symbol != left || self.slots[middle].symbol != right {
            return false;
        }
        let last = start + self.length(merged) as usize - 1;
        self.slots[middle - 1].symbol = VOID;
        self.slots[middle].symbol = VOID;
        self.slots[start].symbol = merged;
        self.slots[last].symbol = merged;
        true
    }

    /// Calls `f(pos, left, right, weight)` for every two neighbouring symbols of every piece, by ascending position.
    pub fn for_each_pair(&self, mut f: impl FnMut(u32, u32, u32, u64)) {
        let mut pos = 1;
        while (pos as usize) < self.slots.len() {
            let symbol = self.symbol(pos);
            if symbol == SEPARATOR {
                pos += 1;
                continue;
            }
            let next = pos + self.length(symbol);
            let right = self.symbol(next);
            if right != SEPARATOR {
                f(pos, symbol, right, self.weight(pos));
            }
            pos = next;
        }
    }

    /// Starts loading slot `pos`.
    #[inline(always)]
    pub fn prefetch(&self, pos: u32) {
        crate::bpe::prefetch::prefetch(&self.slots, pos as usize);
    }
}
