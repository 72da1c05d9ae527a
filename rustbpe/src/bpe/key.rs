//! A short piece of text as one 128-bit number, and its hash.

/// Longest piece that fits a key: fifteen bytes, and the sixteenth holds the length.
pub const MAX_KEY_BYTES: usize = 15;

/// The lowest n bytes.
const MASKS: [u128; 16] = {
    let mut masks = [0; 16];
    let mut n = 1;
    while n < 16 {
        masks[n] = u128::MAX >> (8 * (16 - n));
        n += 1;
    }
    masks
};

/// `bytes[start..end]` as a number: its bytes, little end first, zeros, and its length in the top byte. Different pieces
/// have different keys, and no piece has key 0. The piece must have 1 to `MAX_KEY_BYTES` bytes.
#[inline]
pub fn key(bytes: &[u8], start: usize, end: usize) -> u128 {
    let len = end - start;
    debug_assert!((1..=MAX_KEY_BYTES).contains(&len));
    let raw = match bytes.get(start..start + 16) {
        // One load and a mask wherever sixteen bytes can be read.
        Some(sixteen) => u128::from_le_bytes(sixteen.try_into().expect("sixteen bytes")),
        None => {
            let mut padded = [0; 16];
            padded[..len].copy_from_slice(&bytes[start..end]);
            u128::from_le_bytes(padded)
        }
    };
    (raw & MASKS[len]) | ((len as u128) << 120)
}

/// The length of the piece that `key` stands for.
#[inline]
pub fn key_len(key: u128) -> usize {
    (key >> 120) as usize
}

/// Hash of a key: both halves multiplied and folded. All 64 bits are usable; take the upper ones for a table index.
#[inline]
pub fn hash_key(key: u128) -> u64 {
    let low = (key as u64) ^ 0x9e37_79b9_7f4a_7c15;
    let high = ((key >> 64) as u64) ^ 0xd1b5_4a32_d192_ed03;
    let product = u128::from(low).wrapping_mul(u128::from(high));
    (product as u64) ^ ((product >> 64) as u64)
}

/// Hasher for maps keyed by byte strings or by integers: fast, and the same in every run.
#[derive(Default, Clone, Copy)]
pub struct FastHasher(u64);

/// Builds `FastHasher`s.
pub type FastBuild = std::hash::BuildHasherDefault<FastHasher>;

impl std::hash::Hasher for FastHasher {
    fn write(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            self.write_u64(u64::from_le_bytes(chunk.try_into().expect("eight bytes")));
        }
        let mut last = [0; 8];
        last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
        self.write_u64(u64::from_le_bytes(last));
    }

    #[inline]
    fn write_u64(&mut self, x: u64) {
        self.0 = mix(self.0 ^ x);
    }

    #[inline]
    fn write_u128(&mut self, x: u128) {
        self.0 = mix(self.0 ^ hash_key(x));
    }

    #[inline]
    fn write_usize(&mut self, x: usize) {
        self.write_u64(x as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Spreads every input bit over the result (a multiplication folded on itself).
#[inline]
pub fn mix(x: u64) -> u64 {
    let product = u128::from(x ^ 0xa076_1d64_78bd_642f).wrapping_mul(0xe703_7ed1_a0b4_28db);
    (product as u64) ^ ((product >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_pieces_apart() {
        let text = b"aa\0bcdefghijklmnopqrstuvwxyz";
        let mut seen = std::collections::HashMap::new();
        for start in 0..text.len() {
            for end in start + 1..=text.len().min(start + MAX_KEY_BYTES) {
                let k = key(text, start, end);
                assert_ne!(k, 0);
                assert_eq!(key_len(k), end - start);
                // The same piece gives the same key wherever it stands, also at the very end of a text.
                assert_eq!(k, key(&text[start..end], 0, end - start));
                let piece = &text[start..end];
                assert_eq!(*seen.entry(k).or_insert(piece), piece);
            }
        }
    }
}
