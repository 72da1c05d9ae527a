//! Random text that is hard on a splitter, from a fixed seed.

use rustbpe::bpe::key::mix;

/// A small deterministic random number generator.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(mix(self.0)) % n as u64) as usize
    }
}

/// Building blocks: every class of the split pattern in one, two, three and four bytes, contractions and near misses.
const PARTS: &[&str] = &[
    "a",
    "b",
    "Z",
    "the",
    "letters",
    "é",
    "ß",
    "ſ",
    "K",
    "İ",
    "你",
    "好吗",
    "ไทย",
    "עברית",
    "𐐀",
    "ª", //
    "0",
    "7",
    "12",
    "345",
    "٣",
    "½",
    "Ⅷ",
    "𝟗",
    "²", //
    " ",
    "  ",
    "   ",
    "\t",
    "\u{b}",
    "\u{c}",
    "\u{85}",
    "\u{a0}",
    "\u{1680}",
    "\u{2003}",
    "\u{2028}",
    "\u{3000}", //
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    " \n",
    "\n ", //
    "'",
    "'s",
    "'S",
    "'ſ",
    "'ll",
    "'LL",
    "'lL",
    "'l",
    "'ve",
    "'V",
    "'re",
    "'rE",
    "'d",
    "'m",
    "'T",
    "''",
    "’s", //
    "!",
    ".",
    "...",
    "-",
    "(",
    ")",
    "_",
    "😀",
    "e\u{301}",
    "\u{301}",
    "\u{200b}",
    "\u{1c}",
    "\0",
    "\u{feff}",
    "€",
    "|",
];

pub fn random_text(random: &mut Random, parts: usize) -> String {
    let mut text = String::new();
    for _ in 0..parts {
        match random.below(24) {
            0 => text.extend(char::from_u32(random.below(0x11_0000) as u32)),
            1 => text.extend(char::from_u32(random.below(0x500) as u32)),
            2 => text.push_str(&"abcdefghijklmnopqrstuvwxyz".repeat(2)[..random.below(40)]),
            _ => text.push_str(PARTS[random.below(PARTS.len())]),
        }
    }
    text
}
