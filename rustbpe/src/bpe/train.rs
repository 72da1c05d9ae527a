//! The merge loop: exact greedy byte-pair encoding.
//!
//! Each step merges the pair with the largest count, among equals the smallest `(left id, right id)`. Counts weigh every
//! piece by its occurrences; overlapping pairs count (`aaa` holds `aa` twice); within a piece a merge goes left to right.
//! Source: Sennrich, Haddow and Birch 2016 (arXiv:1508.07909), reference behaviour for ties and overlaps.
//!
//! What makes it fast:
//! - Every pair knows the slots where it starts, so a step touches just the places that change.
//! - Only pairs with the new symbol can gain, and they do so in the step that makes it. A pair's count therefore is
//!   largest at its birth, and a pair born below the count at which training will end can be forgotten at once: no entry,
//!   no list. That count is guessed (`threshold`); should the queue run dry early, pairs are counted anew with a lower
//!   guess, so the result never depends on it.
//! - The changes of a step are summed per neighbour before any table is consulted.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Instant;

use crate::bpe::key::FastBuild;
use crate::bpe::words::{MAX_IDS, SEPARATOR, Words};

/// The first threshold is such that this many times the merges still to do could each have it.
const FIRST_GUESS: u64 = 64;
/// By how much the threshold falls when the queue runs dry.
const NEXT_GUESS: u64 = 16;
/// How many slots ahead the merge loop fetches.
const AHEAD: usize = 12;

type Pair = (u32, u32);

struct PairInfo {
    pair: Pair,
    count: u64,
    /// Slots where the pair starts or once started, ascending.
    places: Vec<u32>,
}

/// What one step adds to the pairs of the new symbol with one neighbour.
#[derive(Clone, Copy, Default)]
struct Change {
    weight: u64,
    places: u32,
    /// Index into `pairs` plus one, 0 for a pair not worth keeping.
    kept: u32,
}

/// A training run in progress.
pub struct Trainer {
    words: Words,
    merges: Vec<Pair>,
    threshold: u64,
    pairs: Vec<PairInfo>,
    index: HashMap<u64, u32, FastBuild>,
    /// (count when pushed, pair) with the larger count and then the smaller pair on top, and the index into `pairs`.
    queue: BinaryHeap<(u64, Reverse<Pair>, u32)>,
    // Scratch of `merge`: changes by left and by right neighbour, and which of them are in use.
    left: Vec<Change>,
    right: Vec<Change>,
    left_used: Vec<u32>,
    right_used: Vec<u32>,
    merged_at: Vec<u32>,
}

impl Trainer {
    /// Prepares `words` for about `num_merges` merges (a hint: any number may be asked of `run`).
    pub fn new(words: Words, num_merges: usize) -> Self {
        let mut total = 0;
        words.for_each_pair(|_, _, _, weight| total += weight);
        let guess = total / (num_merges as u64).saturating_mul(FIRST_GUESS).max(1);
        Self::with_threshold(words, guess.max(1))
    }

    /// As `new`, with a given first guess of the count below which no pair will be merged. It affects speed only.
    pub fn with_threshold(words: Words, threshold: u64) -> Self {
        let symbols = words.num_symbols();
        let mut trainer = Trainer {
            words,
            merges: Vec::new(),
            threshold,
            pairs: Vec::new(),
            index: HashMap::default(),
            queue: BinaryHeap::new(),
            left: vec![Change::default(); symbols],
            right: vec![Change::default(); symbols],
            left_used: Vec::new(),
            right_used: Vec::new(),
            merged_at: Vec::new(),
        };
        trainer.count_pairs();
        trainer
    }

    /// The merges so far: merge i makes symbol 256 + i.
    pub fn merges(&self) -> &[Pair] {
        &self.merges
    }

    pub fn into_merges(self) -> Vec<Pair> {
        self.merges
    }

    /// Merges until `num_merges` are done or no pair is left (then it returns false), or until `deadline` (true: call it
    /// again).
    pub fn run(&mut self, num_merges: usize, deadline: Instant) -> bool {
        while self.merges.len() < num_merges {
            match self.pop() {
                Some(best) => self.merge(best),
                None if self.threshold > 1 => {
                    self.threshold = (self.threshold / NEXT_GUESS).max(1);
                    self.count_pairs();
                }
                None => return false,
            }
            if Instant::now() >= deadline {
                return true;
            }
        }
        false
    }

    /// The most frequent pair, taken out of the queue.
    fn pop(&mut self) -> Option<usize> {
        while let Some((stored, pair, i)) = self.queue.pop() {
            let count = self.pairs[i as usize].count;
            if count < self.threshold {
                continue;
            }
            // Counts only fall, so an entry that is still right beats all others, whatever they have lost.
            if count == stored {
                return Some(i as usize);
            }
            self.queue.push((count, pair, i));
        }
        None
    }

    /// Builds the table of pairs, their places and the queue from the present state of the words.
    fn count_pairs(&mut self) {
        self.pairs.clear();
        self.queue.clear();
        let (pairs, threshold) = (&mut self.pairs, self.threshold);
        let mut index: HashMap<u64, u32, FastBuild> = HashMap::default();
        let mut totals: Vec<(u64, u32)> = Vec::new();
        self.words.for_each_pair(|_, a, b, weight| {
            let i = *index.entry(pack(a, b)).or_insert_with(|| {
                totals.push((0, 0));
                (totals.len() - 1) as u32
            });
            let total = &mut totals[i as usize];
            total.0 += weight;
            total.1 += 1;
        });
        // Keep the frequent ones only, renumbered.
        index.retain(|&packed, i| {
            let (count, places) = totals[*i as usize];
            if count < threshold {
                return false;
            }
            *i = pairs.len() as u32;
            pairs.push(PairInfo { pair: unpack(packed), count, places: Vec::with_capacity(places as usize) });
            true
        });
        drop(totals);
        index.shrink_to_fit();
        self.words.for_each_pair(|pos, a, b, _| {
            if let Some(&i) = index.get(&pack(a, b)) {
                pairs[i as usize].places.push(pos);
            }
        });
        self.index = index;
        self.queue = (0u32..).zip(self.pairs.iter()).map(|(i, p)| (p.count, Reverse(p.pair), i)).collect();
    }

    /// Merges pair number `best` everywhere and brings all counts up to date.
    fn merge(&mut self, best: usize) {
        let (a, b) = self.pairs[best].pair;
        let places = std::mem::take(&mut self.pairs[best].places);
        self.forget(best);
        let new = self.words.new_symbol(a, b);
        debug_assert!(new < MAX_IDS);
        self.merges.push((a, b));
        self.left.push(Change::default());
        self.right.push(Change::default());

        // 1. Rewrite. Ascending places make it left to right; an overlapping place is no longer `a` when its turn comes.
        self.merged_at.clear();
        for (i, &pos) in places.iter().enumerate() {
            if let Some(&ahead) = places.get(i + AHEAD) {
                self.words.prefetch(ahead);
            }
            if self.words.merge_at(pos, a, b, new) {
                self.merged_at.push(pos);
            }
        }
        drop(places);

        // 2. Sum up what changed, by neighbour. Two new symbols side by side are one pair: the right one reports it.
        let new_length = self.words.length(new);
        for (i, &pos) in self.merged_at.iter().enumerate() {
            if let Some(&ahead) = self.merged_at.get(i + AHEAD) {
                self.words.prefetch(ahead);
            }
            let weight = self.words.weight(pos);
            let x = self.words.symbol(pos - 1);
            if x != SEPARATOR {
                add(&mut self.left[x as usize], &mut self.left_used, x, weight);
            }
            let y = self.words.symbol(pos + new_length);
            if y != SEPARATOR && y != new {
                add(&mut self.right[y as usize], &mut self.right_used, y, weight);
            }
        }

        // 3. Old pairs lose, new pairs are born. A new symbol on the left was `b` where it touched.
        let mut any_kept = false;
        for i in 0..self.left_used.len() {
            let x = self.left_used[i];
            let Change { weight, places, .. } = self.left[x as usize];
            self.lose(if x == new { (b, a) } else { (x, a) }, weight);
            let kept = self.born((x, new), weight, places);
            any_kept |= kept != 0;
            self.left[x as usize].kept = kept;
        }
        for i in 0..self.right_used.len() {
            let y = self.right_used[i];
            let Change { weight, places, .. } = self.right[y as usize];
            self.lose((b, y), weight);
            let kept = self.born((new, y), weight, places);
            any_kept |= kept != 0;
            self.right[y as usize].kept = kept;
        }

        // 4. Note where the kept ones are.
        if any_kept {
            for &pos in &self.merged_at {
                let x = self.words.symbol(pos - 1);
                if x != SEPARATOR {
                    let kept = self.left[x as usize].kept;
                    if kept != 0 {
                        self.pairs[kept as usize - 1].places.push(pos - self.words.length(x));
                    }
                }
                let y = self.words.symbol(pos + new_length);
                if y != SEPARATOR && y != new {
                    let kept = self.right[y as usize].kept;
                    if kept != 0 {
                        self.pairs[kept as usize - 1].places.push(pos);
                    }
                }
            }
        }
        for x in self.left_used.drain(..) {
            self.left[x as usize] = Change::default();
        }
        for y in self.right_used.drain(..) {
            self.right[y as usize] = Change::default();
        }
    }

    /// Takes `weight` from the count of `pair`, if that is kept.
    fn lose(&mut self, pair: Pair, weight: u64) {
        if let Some(&i) = self.index.get(&pack(pair.0, pair.1)) {
            self.pairs[i as usize].count -= weight;
            if self.pairs[i as usize].count < self.threshold {
                self.forget(i as usize);
            }
        }
    }

    /// Enters a new pair if it is frequent enough. Returns its number plus one, or 0.
    fn born(&mut self, pair: Pair, count: u64, places: u32) -> u32 {
        if count < self.threshold {
            return 0;
        }
        let i = self.pairs.len() as u32;
        self.pairs.push(PairInfo { pair, count, places: Vec::with_capacity(places as usize) });
        self.index.insert(pack(pair.0, pair.1), i);
        self.queue.push((count, Reverse(pair), i));
        i + 1
    }

    /// Drops a pair that cannot be merged (again) under the present threshold.
    fn forget(&mut self, i: usize) {
        let info = &mut self.pairs[i];
        self.index.remove(&pack(info.pair.0, info.pair.1));
        info.count = 0;
        info.places = Vec::new();
    }
}

#[inline]
fn add(change: &mut Change, used: &mut Vec<u32>, neighbour: u32, weight: u64) {
    if change.places == 0 {
        used.push(neighbour);
    }
    change.weight += weight;
    change.places += 1;
}

fn pack(a: u32, b: u32) -> u64 {
    u64::from(a) << 32 | u64::from(b)
}

fn unpack(packed: u64) -> Pair {
    ((packed >> 32) as u32, packed as u32)
}
