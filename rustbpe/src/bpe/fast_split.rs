//! The default split pattern without a regex engine.
//!
//! At each position the pattern's alternatives are tried in order:
//!
//! 1. `'(?i:[sdmt]|ll|ve|re)`      an English contraction ending (`(?i:s)` also matches the long s, U+017F)
//! 2. `[^\r\n\p{L}\p{N}]?+\p{L}+`  letters, with at most one character before them that is no letter, number or line end
//! 3. `\p{N}{1,k}`                 up to k numbers
//! 4. ` ?[^\s\p{L}\p{N}]++[\r\n]*` symbols, with one space before and line ends after
//! 5. `\s*[\r\n]`                  white space up to its last line end
//! 6. `\s+(?!\S)`                  white space, leaving one character to what follows
//! 7. `\s+`                        white space
//!
//! Between them they cover every character, so pieces are contiguous and only their ends need finding. ASCII is decided
//! by bytes (runs of letters eight at a time), everything else by characters; `tests` below and the Python tests compare
//! the result with the regex on random text.

use crate::bpe::unicode::{Classes, LETTER, NEWLINE, NUMBER, OTHER, SPACE, classes};

/// Class of a byte that begins or continues a multi-byte character.
const HIGH: u8 = 5;

const ASCII: [u8; 256] = {
    let mut table = [OTHER; 256];
    let mut b = 0;
    while b < 256 {
        table[b] = match b as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            b'0'..=b'9' => NUMBER,
            b'\r' | b'\n' => NEWLINE,
            b' ' | b'\t' | 0x0b | 0x0c => SPACE,
            0x80..=0xff => HIGH,
            _ => OTHER,
        };
        b += 1;
    }
    table
};

const HEAD: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,";
const TAIL: &str = r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Splits as the default pattern does, with up to `max_digits` numbers in a piece.
#[derive(Clone, Copy)]
pub struct FastSplitter {
    max_digits: usize,
    classes: &'static Classes,
}

impl FastSplitter {
    /// The splitter for `pattern` if it is the default one or differs from it only in the number of digits (1 to 9).
    pub fn for_pattern(pattern: &str) -> Option<Self> {
        let digits = pattern.strip_prefix(HEAD)?.strip_suffix(TAIL)?;
        match digits.as_bytes() {
            [d @ b'1'..=b'9'] => Some(FastSplitter { max_digits: (d - b'0') as usize, classes: classes() }),
            _ => None,
        }
    }

    /// Calls `f(start, end)` with the byte range of every piece, in order.
    #[inline]
    pub fn for_each(&self, text: &str, mut f: impl FnMut(usize, usize)) {
        let mut start = 0;
        while start < text.len() {
            let end = self.piece_end(text, start);
            f(start, end);
            start = end;
        }
    }

    /// The end of the piece that begins at `start`, a character boundary before the end of `text`.
    #[inline]
    pub fn piece_end(&self, text: &str, start: usize) -> usize {
        let bytes = text.as_bytes();
        let first = ASCII[bytes[start] as usize];
        match first {
            LETTER => return self.letters_end(text, start + 1),
            SPACE | OTHER => {
                // The commonest piece of all: a space and a word.
                let next = bytes.get(start + 1).map_or(NEWLINE, |&b| ASCII[b as usize]);
                if next == LETTER && bytes[start] != b'\'' {
                    return self.letters_end(text, start + 2);
                }
            }
            NUMBER => return self.numbers_end(text, start + 1, 1),
            _ => {}
        }
        self.rare_end(text, start)
    }

    /// Everything that is not plain letters, a space and letters, or digits.
    fn rare_end(&self, text: &str, start: usize) -> usize {
        let (class, width) = self.class_at(text, start);
        let after = start + width;
        if text.as_bytes()[start] == b'\''
            && let Some(end) = contraction_end(text, start)
        {
            return end;
        }
        match class {
            LETTER => return self.letters_end(text, after),
            NUMBER => return self.numbers_end(text, after, 1),
            NEWLINE => return self.space_end(text, start),
            _ => {}
        }
        // One character that is no letter, number or line end: letters after it belong to it.
        if after < text.len() {
            let (next, next_width) = self.class_at(text, after);
            if next == LETTER {
                return self.letters_end(text, after + next_width);
            }
            if text.as_bytes()[start] == b' ' && next == OTHER {
                return self.symbols_end(text, after + next_width);
            }
        }
        if class == OTHER { self.symbols_end(text, after) } else { self.space_end(text, start) }
    }

    /// The end of the run of letters that continues at `pos`.
    #[inline]
    fn letters_end(&self, text: &str, mut pos: usize) -> usize {
        let bytes = text.as_bytes();
        loop {
            while let Some(eight) = bytes.get(pos..pos + 8) {
                let run = leading_letters(u64::from_le_bytes(eight.try_into().expect("eight bytes")));
                pos += run;
                if run < 8 {
                    break;
                }
            }
            while pos < bytes.len() && ASCII[bytes[pos] as usize] == LETTER {
                pos += 1;
            }
            if pos == bytes.len() || bytes[pos] < 0x80 {
                return pos;
            }
            let (class, width) = self.class_at(text, pos);
            if class != LETTER {
                return pos;
            }
            pos += width;
        }
    }

    /// The end of a piece of numbers of which `have` were read before `pos`.
    #[inline]
    fn numbers_end(&self, text: &str, mut pos: usize, mut have: usize) -> usize {
        while have < self.max_digits && pos < text.len() {
            let (class, width) = self.class_at(text, pos);
            if class != NUMBER {
                break;
            }
            pos += width;
            have += 1;
        }
        pos
    }

    /// The end of a run of symbols that continues at `pos`, with the line ends behind it.
    fn symbols_end(&self, text: &str, mut pos: usize) -> usize {
        while pos < text.len() {
            let (class, width) = self.class_at(text, pos);
            if class != OTHER {
                break;
            }
            pos += width;
        }
        while matches!(text.as_bytes().get(pos), Some(b'\r' | b'\n')) {
            pos += 1;
        }
        pos
    }

    /// The end of a piece of white space that begins at `start` (alternatives 5 to 7).
    fn space_end(&self, text: &str, start: usize) -> usize {
        let mut pos = start;
        let mut last_start = start;
        let mut after_newline = None;
        while pos < text.len() {
            let (class, width) = self.class_at(text, pos);
            if class != SPACE && class != NEWLINE {
                break;
            }
            last_start = pos;
            pos += width;
            if class == NEWLINE {
                after_newline = Some(pos);
            }
        }
        if let Some(end) = after_newline {
            end
        } else if pos == text.len() || last_start == start {
            pos
        } else {
            last_start
        }
    }

    /// Class and length in bytes of the character at `pos`.
    #[inline]
    fn class_at(&self, text: &str, pos: usize) -> (u8, usize) {
        let byte = text.as_bytes()[pos];
        if byte < 0x80 {
            return (ASCII[byte as usize], 1);
        }
        let c = text[pos..].chars().next().expect("pos is before the end");
        (self.classes.of(c), c.len_utf8())
    }
}

/// The end of a contraction whose apostrophe is at `start`, if there is one.
fn contraction_end(text: &str, start: usize) -> Option<usize> {
    let rest = &text.as_bytes()[start + 1..];
    let lower = |i: usize| rest.get(i).map(u8::to_ascii_lowercase);
    match (lower(0)?, lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(start + 2),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(start + 3),
        // U+017F, the long s, folds to s.
        _ if rest.starts_with("ſ".as_bytes()) => Some(start + 1 + "ſ".len()),
        _ => None,
    }
}

/// How many of the eight bytes of `word`, lowest first, are ASCII letters before the first that is not.
#[inline]
fn leading_letters(word: u64) -> usize {
    const EVERY: u64 = 0x0101_0101_0101_0101;
    const TOP: u64 = 0x80 * EVERY;
    // With the top bits cleared no sum carries into the next byte: bit 7 tells whether a byte reaches the bound.
    let lower = (word | (0x20 * EVERY)) & !TOP;
    let at_least_a = lower + (0x80 - b'a' as u64) * EVERY;
    let beyond_z = lower + (0x80 - b'z' as u64 - 1) * EVERY;
    let letters = at_least_a & !beyond_z & !word & TOP;
    (!letters & TOP).trailing_zeros() as usize / 8
}
