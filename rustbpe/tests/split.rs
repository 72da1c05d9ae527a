//! The hand-written splitter against the regex engine.

mod common;

use common::{Random, random_text};
use rustbpe::bpe::split::{DEFAULT_PATTERN, Splitter};

fn pieces<'a>(splitter: &Splitter, text: &'a str) -> Vec<&'a str> {
    let mut found = Vec::new();
    splitter.for_each(text, |start, end| found.push(&text[start..end])).unwrap();
    found
}

fn check(fast: &Splitter, regex: &Splitter, text: &str) {
    let found = pieces(fast, text);
    assert_eq!(found, pieces(regex, text), "{text:?}");
    assert_eq!(found.concat(), text, "pieces cover the text");
}

#[test]
fn random_text_splits_as_the_regex_does() {
    let mut random = Random(17);
    for digits in 1..=3 {
        let pattern = DEFAULT_PATTERN.replace("{1,2}", &format!("{{1,{digits}}}"));
        let (fast, regex) = (Splitter::new(&pattern).unwrap(), Splitter::new_regex(&pattern).unwrap());
        for round in 0..40_000 {
            let text = random_text(&mut random, 1 + round % 40);
            check(&fast, &regex, &text);
        }
    }
}

#[test]
fn short_texts_over_a_small_alphabet_split_as_the_regex_does() {
    let alphabet = ['a', 's', 'l', '\'', ' ', '\t', '\n', '\r', '1', '.', 'é', '\u{a0}', '٣', '\u{301}', 'ſ'];
    let (fast, regex) = (Splitter::new(DEFAULT_PATTERN).unwrap(), Splitter::new_regex(DEFAULT_PATTERN).unwrap());
    for length in 0..=4u32 {
        for number in 0..alphabet.len().pow(length) {
            let mut rest = number;
            let text: String = (0..length)
                .map(|_| {
                    let c = alphabet[rest % alphabet.len()];
                    rest /= alphabet.len();
                    c
                })
                .collect();
            check(&fast, &regex, &text);
        }
    }
}

#[test]
fn every_character_in_context_splits_as_the_regex_does() {
    let (fast, regex) = (Splitter::new(DEFAULT_PATTERN).unwrap(), Splitter::new_regex(DEFAULT_PATTERN).unwrap());
    for first in (0..=0x10_ffffu32).step_by(16) {
        let mut text = String::new();
        for c in (first..first + 16).filter_map(char::from_u32) {
            text.extend(
                ["a", "'", " ", "1", "\n"]
                    .iter()
                    .flat_map(|before| [*before, c.encode_utf8(&mut [0; 4])].concat().chars().collect::<Vec<_>>()),
            );
        }
        check(&fast, &regex, &text);
    }
}

#[test]
fn other_patterns_go_through_the_regex_engine() {
    let splitter = Splitter::new(r"\p{L}+").unwrap();
    assert_eq!(pieces(&splitter, "ab, cd-é 1"), ["ab", "cd", "é"]);
    // Empty matches are no pieces.
    assert_eq!(pieces(&Splitter::new("a*").unwrap(), "baac"), ["aa"]);
    assert!(Splitter::new("(").is_err());
    // Two-digit bounds are no member of the hand-written family.
    assert_eq!(
        pieces(&Splitter::new(&DEFAULT_PATTERN.replace("{1,2}", "{1,12}")).unwrap(), "a 1234567890123"),
        ["a", " ", "123456789012", "3"]
    );
}
