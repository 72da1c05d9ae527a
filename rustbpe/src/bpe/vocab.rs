//! A vocabulary of byte strings, and the merging of one piece of text into its tokens.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::bpe::key::{FastBuild, MAX_KEY_BYTES, key};
use crate::error::Error;

/// Ranks are below this.
pub const MAX_RANK: u32 = 1 << 24;
/// Pieces of up to this many bytes are merged by repeated scanning, longer ones with a queue.
const SCAN_BYTES: usize = 48;
const NO_RANK: u32 = u32::MAX;
const MODULUS: u64 = (1 << 61) - 1;

/// Byte strings and their ranks, which are also their ids.
pub struct Vocab {
    bytes: Vec<u8>,
    /// For each id where its bytes end; an id that is not used has none.
    ends: Vec<usize>,
    /// Tokens of at most `MAX_KEY_BYTES` bytes by their key, and all others by their bytes.
    short: HashMap<u128, u32, FastBuild>,
    long: HashMap<Box<[u8]>, u32, FastBuild>,
    of_byte: [u32; 256],
    /// Two neighbouring tokens whose concatenation is a token -> that token. Parts of a piece always are tokens, so this
    /// is the same as looking up the concatenated bytes (tiktoken's rule), at the price of two integers.
    joined: HashMap<u64, u32, FastBuild>,
    /// The same for two single bytes, as every piece starts: the token's id at index 256 * left + right.
    joined_bytes: Vec<u32>,
}

impl Vocab {
    /// Builds a vocabulary. Every single byte must be there, and ranks must be unique and below `MAX_RANK`. Of equal byte
    /// strings the later one counts for encoding, as in a Python dict made of the list; `unique` makes them an error.
    pub fn new(mut ranks: Vec<(&[u8], u32)>, unique: bool) -> Result<Self, Error> {
        let mut by_bytes: HashMap<Box<[u8]>, u32, FastBuild> =
            HashMap::with_capacity_and_hasher(ranks.len(), FastBuild::default());
        for &(token, rank) in &ranks {
            if rank >= MAX_RANK {
                return Err(Error::Value(format!("rank {rank} is too large: ranks must be below {MAX_RANK}")));
            }
            if token.is_empty() {
                return Err(Error::Value(format!("the token of rank {rank} is empty")));
            }
            if let Some(first) = by_bytes.insert(token.into(), rank)
                && unique
            {
                return Err(Error::Value(format!("ranks {first} and {rank} have the same bytes {token:?}")));
            }
        }
        let mut of_byte = [0; 256];
        for byte in 0..=255u8 {
            of_byte[byte as usize] = *by_bytes.get(&[byte][..]).ok_or_else(|| {
                Error::Value(format!("the single byte {byte} is missing: all 256 must be in the vocabulary"))
            })?;
        }
        ranks.sort_unstable_by_key(|&(_, rank)| rank);
        if let Some(twice) = ranks.windows(2).find(|pair| pair[0].1 == pair[1].1) {
            return Err(Error::Value(format!("rank {} is given to two tokens", twice[0].1)));
        }
        let size = ranks.last().map_or(0, |&(_, rank)| rank as usize + 1);
        let mut bytes = Vec::with_capacity(ranks.iter().map(|(token, _)| token.len()).sum());
        let mut ends = Vec::with_capacity(size);
        for (token, rank) in ranks {
            ends.resize(rank as usize, bytes.len());
            bytes.extend_from_slice(token);
            ends.push(bytes.len());
        }
        let joined = join(&by_bytes);
        let pair_of_bytes = |i: usize| pack(of_byte[i / 256], of_byte[i % 256]);
        let joined_bytes = (0..1 << 16).map(|i| joined.get(&pair_of_bytes(i)).copied().unwrap_or(NO_RANK)).collect();
        let is_short = |token: &[u8]| token.len() <= MAX_KEY_BYTES;
        let short = by_bytes.iter().filter(|(token, _)| is_short(token));
        let short = short.map(|(token, &id)| (key(token, 0, token.len()), id)).collect();
        by_bytes.retain(|token, _| !is_short(token));
        Ok(Vocab { bytes, ends, short, long: by_bytes, of_byte, joined, joined_bytes })
    }

    /// Largest id + 1.
    pub fn size(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of `id`, if there is such a token.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        let end = *self.ends.get(id as usize)?;
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        (start < end).then(|| &self.bytes[start..end])
    }

    /// Appends the tokens of `piece` to `out`: the piece itself if it is a token, else its bytes with the neighbours of
    /// lowest joint rank merged, the leftmost first, until nothing can be merged. The piece must not be empty.
    pub fn encode_piece(&self, piece: &[u8], out: &mut Vec<u32>) {
        let whole = if piece.len() <= MAX_KEY_BYTES {
            self.short.get(&key(piece, 0, piece.len()))
        } else {
            self.long.get(piece)
        };
        if let Some(&id) = whole {
            out.push(id);
        } else if piece.len() <= SCAN_BYTES {
            self.merge_by_scanning(piece, out);
        } else {
            self.merge_by_queue(piece, out);
        }
    }

    #[inline]
    fn rank_of_bytes(&self, left: u8, right: u8) -> u32 {
        self.joined_bytes[usize::from(left) << 8 | usize::from(right)]
    }

    #[inline]
    fn rank(&self, left: u32, right: u32) -> u32 {
        self.joined.get(&pack(left, right)).copied().unwrap_or(NO_RANK)
    }

    fn merge_by_scanning(&self, piece: &[u8], out: &mut Vec<u32>) {
        let mut ids = [0; SCAN_BYTES];
        // ranks[i]: of ids[i] joined with ids[i + 1].
        let mut ranks = [NO_RANK; SCAN_BYTES];
        let mut len = piece.len();
        for (id, &byte) in ids.iter_mut().zip(piece) {
            *id = self.of_byte[byte as usize];
        }
        for i in 1..len {
            ranks[i - 1] = self.rank_of_bytes(piece[i - 1], piece[i]);
        }
        while len > 1 {
            let (mut at, mut best) = (0, NO_RANK);
            for (i, &rank) in ranks[..len - 1].iter().enumerate() {
                if rank < best {
                    (at, best) = (i, rank);
                }
            }
            if best == NO_RANK {
                break;
            }
            ids[at] = best;
            ids.copy_within(at + 2..len, at + 1);
            ranks.copy_within(at + 1..len, at);
            len -= 1;
            ranks[len - 1] = NO_RANK;
            if at + 1 < len {
                ranks[at] = self.rank(ids[at], ids[at + 1]);
            }
            if at > 0 {
                ranks[at - 1] = self.rank(ids[at - 1], ids[at]);
            }
        }
        out.extend_from_slice(&ids[..len]);
    }

    fn merge_by_queue(&self, piece: &[u8], out: &mut Vec<u32>) {
        // A doubly linked list over the bytes; a part lives at its first byte, and a part merged away has id NO_RANK.
        let len = piece.len();
        let mut ids: Vec<u32> = piece.iter().map(|&byte| self.of_byte[byte as usize]).collect();
        let mut next: Vec<usize> = (1..=len).collect();
        let mut previous: Vec<usize> = (0..len).map(|i| i.wrapping_sub(1)).collect();
        let mut queue = BinaryHeap::with_capacity(len);
        for i in 1..len {
            let rank = self.rank_of_bytes(piece[i - 1], piece[i]);
            if rank != NO_RANK {
                queue.push(Reverse((rank, i - 1)));
            }
        }
        while let Some(Reverse((rank, at))) = queue.pop() {
            let right = next[at];
            // Stale unless these two neighbours still join to this rank.
            if ids[at] == NO_RANK || right == len || self.rank(ids[at], ids[right]) != rank {
                continue;
            }
            ids[at] = rank;
            ids[right] = NO_RANK;
            let after = next[right];
            next[at] = after;
            if after < len {
                previous[after] = at;
                let rank = self.rank(ids[at], ids[after]);
                if rank != NO_RANK {
                    queue.push(Reverse((rank, at)));
                }
            }
            let before = previous[at];
            if before < len {
                let rank = self.rank(ids[before], ids[at]);
                if rank != NO_RANK {
                    queue.push(Reverse((rank, before)));
                }
            }
        }
        out.extend(ids.into_iter().filter(|&id| id != NO_RANK));
    }
}

/// All pairs of tokens whose concatenation is a token.
///
/// Halves are looked up by a polynomial hash that follows from the hashes of the prefixes, so that a token of n bytes
/// costs n steps and not n squared (degenerate corpora give tokens of a megabyte).
fn join(by_bytes: &HashMap<Box<[u8]>, u32, FastBuild>) -> HashMap<u64, u32, FastBuild> {
    let (base, by_hash) = hash_tokens(by_bytes);
    let mut joined: HashMap<u64, u32, FastBuild> = HashMap::default();
    let mut prefix = Vec::new();
    let mut power = Vec::new();
    for (token, &id) in by_bytes {
        prefix.clear();
        power.clear();
        prefix.push(0);
        power.push(1);
        for &byte in token {
            prefix.push(extend(*prefix.last().expect("starts with one"), byte, base));
            power.push(multiply(*power.last().expect("starts with one"), base));
        }
        for middle in 1..token.len() {
            let Some(&(left, left_id)) = by_hash.get(&prefix[middle]) else { continue };
            let right_hash =
                (prefix[token.len()] + MODULUS - multiply(prefix[middle], power[token.len() - middle])) % MODULUS;
            let Some(&(right, right_id)) = by_hash.get(&right_hash) else { continue };
            if left == &token[..middle] && right == &token[middle..] {
                joined.insert(pack(left_id, right_id), id);
            }
        }
    }
    joined.shrink_to_fit();
    joined
}

type ByHash<'a> = HashMap<u64, (&'a [u8], u32), FastBuild>;

/// A base of the polynomial hash under which no two tokens collide, and the tokens by hash.
fn hash_tokens(by_bytes: &HashMap<Box<[u8]>, u32, FastBuild>) -> (u64, ByHash<'_>) {
    let mut base = 0x1a2b_3c4d_5e6f_7081 % MODULUS;
    loop {
        let mut by_hash: ByHash = HashMap::with_capacity_and_hasher(by_bytes.len(), FastBuild::default());
        let unique = by_bytes.iter().all(|(token, &id)| {
            let hash = token.iter().fold(0, |hash, &byte| extend(hash, byte, base));
            by_hash.insert(hash, (token, id)).is_none()
        });
        if unique {
            return (base, by_hash);
        }
        base = crate::bpe::key::mix(base) % MODULUS;
    }
}

fn extend(hash: u64, byte: u8, base: u64) -> u64 {
    // Bytes count from 1, so that leading zero bytes matter.
    (multiply(hash, base) + u64::from(byte) + 1) % MODULUS
}

fn multiply(a: u64, b: u64) -> u64 {
    (u128::from(a) * u128::from(b) % u128::from(MODULUS)) as u64
}

#[inline]
fn pack(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}
