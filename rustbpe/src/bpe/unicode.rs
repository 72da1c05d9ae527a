//! Which of the split pattern's four classes a character belongs to.
//!
//! The tables are taken, once per process, from `regex-syntax`: the very tables the regex engine compiles `\p{L}`,
//! `\p{N}` and `\s` from. The hand-written splitter can therefore not disagree with the regex about a character, whatever
//! Unicode version is linked in.

use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

/// Neither letter, number nor white space: punctuation, symbols, combining marks, controls.
pub const OTHER: u8 = 0;
/// `\p{L}`.
pub const LETTER: u8 = 1;
/// `\p{N}`.
pub const NUMBER: u8 = 2;
/// `\s` without carriage return and line feed.
pub const SPACE: u8 = 3;
/// Carriage return or line feed.
pub const NEWLINE: u8 = 4;

const BLOCK: usize = 256;

/// Two-level table: code point / 256 -> block number -> class of each of the 256 characters. Equal blocks are shared,
/// which keeps it at a few tens of kilobytes.
pub struct Classes {
    block_of: Vec<u16>,
    blocks: Vec<[u8; BLOCK]>,
}

impl Classes {
    fn build() -> Self {
        let mut flat = vec![OTHER; char::MAX as usize + 1];
        for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)] {
            let hir = regex_syntax::parse(pattern).expect("a constant pattern parses");
            let HirKind::Class(Class::Unicode(set)) = hir.kind() else { unreachable!("{pattern} is a Unicode class") };
            for range in set.ranges() {
                flat[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        flat['\r' as usize] = NEWLINE;
        flat['\n' as usize] = NEWLINE;

        let mut blocks: Vec<[u8; BLOCK]> = Vec::new();
        let mut block_of = Vec::with_capacity(flat.len() / BLOCK);
        for chunk in flat.chunks_exact(BLOCK) {
            let found = blocks.iter().position(|b| b == chunk).unwrap_or_else(|| {
                blocks.push(chunk.try_into().expect("chunks_exact gives whole blocks"));
                blocks.len() - 1
            });
            block_of.push(found as u16);
        }
        Classes { block_of, blocks }
    }

    /// The class of `c`.
    #[inline]
    pub fn of(&self, c: char) -> u8 {
        let c = c as usize;
        self.blocks[self.block_of[c / BLOCK] as usize][c % BLOCK]
    }
}

/// The table, built on first use (a few milliseconds).
pub fn classes() -> &'static Classes {
    static TABLE: OnceLock<Classes> = OnceLock::new();
    TABLE.get_or_init(Classes::build)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_characters() {
        let t = classes();
        for (c, class) in [
            ('a', LETTER),
            ('ſ', LETTER),
            ('你', LETTER),
            ('7', NUMBER),
            ('½', NUMBER),
            ('٣', NUMBER),
            (' ', SPACE),
            ('\u{a0}', SPACE),
            ('\u{85}', SPACE),
            ('\u{2028}', SPACE),
            ('\u{b}', SPACE),
            ('\u{1c}', OTHER),
            ('\u{200b}', OTHER),
            ('\u{301}', OTHER),
            ('😀', OTHER),
            ('\r', NEWLINE),
            ('\n', NEWLINE),
        ] {
            assert_eq!(t.of(c), class, "{c:?}");
        }
    }

    #[test]
    fn every_character_agrees_with_the_regex_engine() {
        let t = classes();
        let letter = fancy_regex::Regex::new(r"^\p{L}$").unwrap();
        let number = fancy_regex::Regex::new(r"^\p{N}$").unwrap();
        let space = fancy_regex::Regex::new(r"^\s$").unwrap();
        for c in '\0'..=char::MAX {
            let s = c.to_string();
            let class = t.of(c);
            assert_eq!(letter.is_match(&s).unwrap(), class == LETTER, "{c:?}");
            assert_eq!(number.is_match(&s).unwrap(), class == NUMBER, "{c:?}");
            assert_eq!(space.is_match(&s).unwrap(), class == SPACE || class == NEWLINE, "{c:?}");
        }
    }
}
