//! The trainer and the encoder against slow versions that follow the definition word by word.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use common::{Random, random_text};
use rustbpe::bpe::corpus::{Batch, count_pieces};
use rustbpe::bpe::split::{DEFAULT_PATTERN, Splitter};
use rustbpe::bpe::train::Trainer;
use rustbpe::bpe::vocab::Vocab;
use rustbpe::bpe::words::Words;
use rustbpe::error::Error;

fn train(documents: &[String], num_merges: usize, threads: usize, guess: Option<u64>) -> Vec<(u32, u32)> {
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    let mut rest = documents.iter();
    let pieces = count_pieces(&splitter, threads, |batch: &mut Batch| {
        while !batch.is_full(3) {
            let Some(document) = rest.next() else { return Ok::<_, Error>(false) };
            batch.push(document);
        }
        Ok(true)
    });
    let words = Words::new(pieces.unwrap()).unwrap();
    let mut trainer = match guess {
        None => Trainer::new(words, num_merges),
        Some(threshold) => Trainer::with_threshold(words, threshold),
    };
    assert!(!trainer.run(num_merges, Instant::now() + Duration::from_secs(600)));
    trainer.into_merges()
}

/// Counts all pairs afresh for every merge.
fn slow_train(documents: &[String], num_merges: usize) -> Vec<(u32, u32)> {
    let splitter = Splitter::new_regex(DEFAULT_PATTERN).unwrap();
    let mut counts: BTreeMap<Vec<u32>, u64> = BTreeMap::new();
    for document in documents {
        splitter
            .for_each(document, |start, end| {
                *counts.entry(document.as_bytes()[start..end].iter().map(|&b| u32::from(b)).collect()).or_insert(0) +=
                    1;
            })
            .unwrap();
    }
    let mut words: Vec<(Vec<u32>, u64)> = counts.into_iter().collect();
    let mut merges = Vec::new();
    while merges.len() < num_merges {
        let mut pairs: HashMap<(u32, u32), u64> = HashMap::new();
        for (word, count) in &words {
            for pair in word.windows(2) {
                *pairs.entry((pair[0], pair[1])).or_insert(0) += count;
            }
        }
        let Some((&best, _)) = pairs.iter().max_by_key(|&(&pair, &count)| (count, std::cmp::Reverse(pair))) else {
            break;
        };
        let new = 256 + merges.len() as u32;
        for (word, _) in &mut words {
            let mut out = Vec::new();
            let mut i = 0;
            while i < word.len() {
                if i + 1 < word.len() && (word[i], word[i + 1]) == best {
                    out.push(new);
                    i += 2;
                } else {
                    out.push(word[i]);
                    i += 1;
                }
            }
            *word = out;
        }
        merges.push(best);
    }
    merges
}

#[test]
fn merges_are_those_of_the_definition() {
    let mut random = Random(3);
    for round in 0..60 {
        let documents: Vec<String> = (0..1 + random.below(12))
            .map(|_| match round % 4 {
                0 => (0..random.below(60)).map(|_| ["a", "b", "ab", " "][random.below(4)]).collect(),
                1 => "a".repeat(random.below(200)),
                2 => (0..random.below(80)).map(|_| ["xy", "yx", "x", "z", "é"][random.below(5)]).collect(),
                _ => random_text(&mut random, 40),
            })
            .collect();
        let expected = slow_train(&documents, 150);
        for (threads, guess) in [(1, None), (3, None), (2, Some(1)), (1, Some(3)), (1, Some(1_000_000))] {
            assert_eq!(train(&documents, 150, threads, guess), expected, "{documents:?} {threads} {guess:?}");
        }
    }
}

#[test]
fn counts_go_beyond_32_bits() {
    // Weights as large as a corpus of tens of billions of words would give.
    let mut pieces = rustbpe::bpe::count::PieceCounter::default();
    pieces.add_many(b"ab", 5_000_000_000);
    pieces.add_many(b"cd", 4_999_999_999);
    pieces.add_many(b"cdcd", 1);
    pieces.add_many(b"ef", 3_000_000_000);
    let mut trainer = Trainer::new(Words::new(pieces).unwrap(), 10);
    trainer.run(10, Instant::now() + Duration::from_secs(60));
    let id = u32::from;
    assert_eq!(trainer.merges(), [(id(b'c'), id(b'd')), (id(b'a'), id(b'b')), (id(b'e'), id(b'f')), (256, 256)]);
}

/// Tokens and their ranks.
type Ranks = Vec<(Vec<u8>, u32)>;

fn ranks_of(merges: &[(u32, u32)]) -> Ranks {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|b| vec![b]).collect();
    for &(a, b) in merges {
        tokens.push([&tokens[a as usize][..], &tokens[b as usize][..]].concat());
    }
    tokens.into_iter().zip(0..).collect()
}

fn vocab_of(ranks: &[(Vec<u8>, u32)]) -> Vocab {
    Vocab::new(ranks.iter().map(|(token, rank)| (&token[..], *rank)).collect(), true).unwrap()
}

/// tiktoken's rule: join the neighbours whose bytes together have the lowest rank, the leftmost first.
fn slow_encode(ranks: &HashMap<Vec<u8>, u32>, piece: &[u8]) -> Vec<u32> {
    let mut parts: Vec<Vec<u8>> = piece.iter().map(|&b| vec![b]).collect();
    loop {
        let best = (1..parts.len()).filter_map(|i| Some((*ranks.get(&parts[i - 1..=i].concat())?, i))).min();
        let Some((_, i)) = best else { return parts.iter().map(|part| ranks[part]).collect() };
        let right = parts.remove(i);
        parts[i - 1].extend(right);
    }
}

#[test]
fn pieces_encode_by_the_definition() {
    let mut random = Random(5);
    let documents: Vec<String> =
        (0..200).map(|_| (0..30).map(|_| ["ab", "ba", "a", "c", "abc", "d"][random.below(6)]).collect()).collect();
    let ranks = ranks_of(&train(&documents, 400, 2, None));
    let (vocab, by_bytes) = (vocab_of(&ranks), ranks.iter().cloned().collect::<HashMap<_, _>>());
    for round in 0..3000 {
        let length = 1 + random.below(if round % 10 == 0 { 300 } else { 60 });
        let piece: Vec<u8> = (0..length).map(|_| b"abcde"[random.below(5)]).collect();
        let mut ids = Vec::new();
        vocab.encode_piece(&piece, &mut ids);
        assert_eq!(ids, slow_encode(&by_bytes, &piece), "{piece:?}");
    }
}

#[test]
fn a_piece_of_a_megabyte_is_no_problem() {
    let start = Instant::now();
    let long = "a".repeat(1 << 20);
    let ranks = ranks_of(&train(std::slice::from_ref(&long), 400, 2, None));
    assert_eq!(ranks.len(), 256 + 20, "a run of 2^20 merges twenty times");
    let vocab = vocab_of(&ranks);
    let mut ids = Vec::new();
    vocab.encode_piece(&long.as_bytes()[1..], &mut ids);
    let bytes: usize = ids.iter().map(|&id| vocab.token(id).unwrap().len()).sum();
    assert_eq!((ids.len(), bytes), (20, (1 << 20) - 1));
    assert!(start.elapsed() < Duration::from_secs(60), "took {:?}", start.elapsed());
}

#[test]
fn bad_ranks_are_errors() {
    let good = ranks_of(&[(97, 98)]);
    let expect = |change: &dyn Fn(&mut Ranks), reason: &str| {
        let mut ranks = good.clone();
        change(&mut ranks);
        let result = Vocab::new(ranks.iter().map(|(token, rank)| (&token[..], *rank)).collect(), true);
        let message = result.err().expect(reason).to_string();
        assert!(message.contains(reason), "{message}");
    };
    expect(&|ranks| drop(ranks.remove(65)), "single byte 65 is missing");
    expect(&|ranks| ranks.push((b"ab".to_vec(), 300)), "same bytes");
    expect(&|ranks| ranks.push((b"xy".to_vec(), 256)), "rank 256 is given to two");
    expect(&|ranks| ranks.push((b"xy".to_vec(), 1 << 24)), "too large");
    expect(&|ranks| ranks.push((Vec::new(), 300)), "is empty");
}

#[test]
fn errors_of_the_reader_and_of_the_splitter_end_the_count() {
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    let mut calls = 0;
    let result = count_pieces(&splitter, 2, |batch: &mut Batch| {
        calls += 1;
        batch.push("text");
        if calls < 50 { Ok(true) } else { Err(Error::Value("reader".into())) }
    });
    assert_eq!(result.err(), Some(Error::Value("reader".into())));

    // A pattern that backtracks beyond the engine's limit; far more batches than the queue holds.
    let splitter = Splitter::new(r"(?:(a|aa|b)+)+(?<=x)c").unwrap();
    let mut calls = 0;
    let result = count_pieces(&splitter, 2, |batch: &mut Batch| {
        calls += 1;
        batch.push(&"a".repeat(40));
        Ok::<_, Error>(calls < 1000)
    });
    assert!(matches!(result, Err(Error::Value(reason)) if reason.contains("failed on a text of 40 bytes")));
}
