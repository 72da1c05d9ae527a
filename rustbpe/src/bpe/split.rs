//! Cutting text into pieces: the split pattern's alternatives, by hand for the family of the default pattern and through
//! `fancy-regex` for any other pattern.

use fancy_regex::Regex;

use crate::bpe::fast_split::FastSplitter;
use crate::error::Error;

/// The split pattern used when none is given: GPT-4's with numbers cut into groups of at most two digits
/// (reference behaviour, core spec 6.2).
pub const DEFAULT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

enum Kind {
    Fast(FastSplitter),
    // Boxed: a compiled regex is much larger than the other variant.
    Regex(Box<Regex>),
}

/// A compiled split pattern. Cheap to share between threads; clone one per thread so that the regex engine's scratch
/// space is not contended.
pub struct Splitter {
    pattern: String,
    kind: Kind,
}

impl Clone for Splitter {
    fn clone(&self) -> Self {
        let kind = match &self.kind {
            Kind::Fast(fast) => Kind::Fast(*fast),
            Kind::Regex(regex) => Kind::Regex(regex.clone()),
        };
        Splitter { pattern: self.pattern.clone(), kind }
    }
}

impl Splitter {
    /// Compiles `pattern` (fancy-regex dialect).
    pub fn new(pattern: &str) -> Result<Self, Error> {
        if let Some(fast) = FastSplitter::for_pattern(pattern) {
            return Ok(Splitter { pattern: pattern.to_owned(), kind: Kind::Fast(fast) });
        }
        Self::new_regex(pattern)
    }

    /// Like `new`, but always through the regex engine (the yardstick of the hand-written splitter).
    pub fn new_regex(pattern: &str) -> Result<Self, Error> {
        match Regex::new(pattern) {
            Ok(regex) => Ok(Splitter { pattern: pattern.to_owned(), kind: Kind::Regex(Box::new(regex)) }),
            Err(e) => Err(Error::Value(format!("invalid split pattern {pattern:?}: {e}"))),
        }
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `f(start, end)` with the byte range of every piece of `text`, in order. Text that the pattern does not match
    /// is skipped, and so are empty matches (tiktoken's behaviour).
    #[inline]
    pub fn for_each(&self, text: &str, mut f: impl FnMut(usize, usize)) -> Result<(), Error> {
        match &self.kind {
            Kind::Fast(fast) => {
                fast.for_each(text, f);
                Ok(())
            }
            Kind::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|e| {
                        Error::Value(format!(
                            "split pattern {:?} failed on a text of {} bytes: {e}",
                            self.pattern,
                            text.len()
                        ))
                    })?;
                    if !found.range().is_empty() {
                        f(found.start(), found.end());
                    }
                }
                Ok(())
            }
        }
    }
}
