//! Text to tokens: one text at a time, or many on several threads.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bpe::cache::{PieceCache, Tokens};
use crate::bpe::key::{FastBuild, MAX_KEY_BYTES, hash_key, key};
use crate::bpe::split::Splitter;
use crate::bpe::vocab::Vocab;
use crate::error::Error;

/// Pieces looked up together.
const BATCH: usize = 32;
/// About this much text is one unit of work of a thread.
const CHUNK_BYTES: usize = 1 << 17;
/// Pieces longer than this are not remembered.
const MAX_LONG_BYTES: usize = 128;
/// The memory of long pieces starts afresh when it holds this many.
const MAX_LONG_PIECES: usize = 1 << 14;

/// An integer type that holds token ids.
pub trait TokenId: Copy + Default + Send + Sync + 'static {
    /// Largest id it can hold.
    const MAX: u32;
    /// `id` as this type; the caller has checked that it fits.
    fn from_id(id: u32) -> Self;
}

impl TokenId for u16 {
    const MAX: u32 = u16::MAX as u32;
    #[inline]
    fn from_id(id: u32) -> Self {
        id as u16
    }
}

impl TokenId for u32 {
    const MAX: u32 = u32::MAX;
    #[inline]
    fn from_id(id: u32) -> Self {
        id
    }
}

/// What a thread needs to encode: a copy of the splitter and what it remembers. The memory is bounded: up to sixteen megabytes
/// for short pieces and some more for long ones.
pub struct Worker {
    splitter: Splitter,
    short: PieceCache,
    long: HashMap<Box<[u8]>, Box<[u32]>, FastBuild>,
    scratch: Vec<u32>,
}

impl Worker {
    pub fn new(splitter: Splitter) -> Self {
        Worker { splitter, short: PieceCache::default(), long: HashMap::default(), scratch: Vec::new() }
    }

    /// Appends the tokens of `text` to `out`.
    pub fn encode<T: TokenId>(&mut self, vocab: &Vocab, text: &str, out: &mut Vec<T>) -> Result<(), Error> {
        let bytes = text.as_bytes();
        let Worker { splitter, short, long, scratch } = self;
        let mut batch = [(0u128, 0u64, 0usize, 0usize); BATCH];
        let mut batched = 0;
        splitter.for_each(text, |start, end| {
            // Key 0 marks a long piece.
            let key = if end - start <= MAX_KEY_BYTES { key(bytes, start, end) } else { 0 };
            let hash = hash_key(key);
            short.prefetch(hash);
            batch[batched] = (key, hash, start, end);
            batched += 1;
            if batched == BATCH {
                look_up(vocab, bytes, &batch, short, long, scratch, out);
                batched = 0;
            }
        })?;
        look_up(vocab, bytes, &batch[..batched], short, long, scratch, out);
        Ok(())
    }
}

#[inline]
fn look_up<T: TokenId>(
    vocab: &Vocab,
    bytes: &[u8],
    batch: &[(u128, u64, usize, usize)],
    short: &mut PieceCache,
    long: &mut HashMap<Box<[u8]>, Box<[u32]>, FastBuild>,
    scratch: &mut Vec<u32>,
    out: &mut Vec<T>,
) {
    for &(key, hash, start, end) in batch {
        let piece = &bytes[start..end];
        if key == 0 {
            long_piece(vocab, piece, long, scratch);
            out.extend(scratch.iter().map(|&id| T::from_id(id)));
            continue;
        }
        if let Some(tokens) = short.get(key, hash) {
            // Most pieces are one token.
            out.push(T::from_id(tokens.first()));
            if tokens.count() > 1 {
                out.extend(tokens.others().map(T::from_id));
            }
            continue;
        }
        scratch.clear();
        vocab.encode_piece(piece, scratch);
        if let Some(tokens) = Tokens::pack(scratch) {
            short.insert(key, hash, tokens);
        }
        out.extend(scratch.iter().map(|&id| T::from_id(id)));
    }
}

#[cold]
fn long_piece(
    vocab: &Vocab,
    piece: &[u8],
    long: &mut HashMap<Box<[u8]>, Box<[u32]>, FastBuild>,
    scratch: &mut Vec<u32>,
) {
    scratch.clear();
    if let Some(ids) = long.get(piece) {
        scratch.extend_from_slice(ids);
        return;
    }
    vocab.encode_piece(piece, scratch);
    if piece.len() <= MAX_LONG_BYTES {
        if long.len() >= MAX_LONG_PIECES {
            long.clear();
        }
        long.insert(piece.into(), scratch.as_slice().into());
    }
}

/// Workers at rest: a call takes as many as it has threads and puts them back, so that they remember between calls.
pub struct Pool {
    splitter: Splitter,
    idle: Mutex<Vec<Worker>>,
}

impl Pool {
    pub fn new(splitter: Splitter) -> Self {
        Pool { splitter, idle: Mutex::new(Vec::new()) }
    }

    /// Runs `f` with a worker.
    pub fn with<R>(&self, f: impl FnOnce(&mut Worker) -> R) -> R {
        let idle = self.idle.lock().expect("no thread panics holding the lock").pop();
        let mut worker = idle.unwrap_or_else(|| Worker::new(self.splitter.clone()));
        let result = f(&mut worker);
        self.idle.lock().expect("no thread panics holding the lock").push(worker);
        result
    }
}

/// Tokens of consecutive texts.
pub struct Chunk<T> {
    pub tokens: Vec<T>,
    /// For each text where its tokens end in `tokens`.
    pub ends: Vec<usize>,
}

/// Encodes all `texts` on `threads` threads, each text preceded by `bos` if there is one. The chunks are in order.
pub fn encode_all<T: TokenId>(
    vocab: &Vocab,
    pool: &Pool,
    texts: &[&str],
    bos: Option<T>,
    threads: usize,
) -> Result<Vec<Chunk<T>>, Error> {
    let ranges = chunk_ranges(texts);
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Chunk<T>)>, Error> {
        pool.with(|worker| {
            let mut done = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(range) = ranges.get(i) else { return Ok(done) };
                let texts = &texts[range.clone()];
                let bytes: usize = texts.iter().map(|text| text.len()).sum();
                // English has four bytes or more to a token; anything denser just grows the vector.
                let mut tokens = Vec::with_capacity(bytes / 4 + texts.len());
                let mut ends = Vec::with_capacity(texts.len());
                for text in texts {
                    tokens.extend(bos);
                    worker.encode(vocab, text, &mut tokens)?;
                    ends.push(tokens.len());
                }
                done.push((i, Chunk { tokens, ends }));
            }
        })
    };
    let threads = threads.clamp(1, ranges.len().max(1));
    let mut chunks = Vec::with_capacity(ranges.len());
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut results = vec![work()];
        for other in others {
            results.push(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        for result in results {
            chunks.append(&mut result?);
        }
        Ok::<_, Error>(())
    })?;
    chunks.sort_unstable_by_key(|&(i, _)| i);
    Ok(chunks.into_iter().map(|(_, chunk)| chunk).collect())
}

/// Consecutive texts grouped into chunks of about `CHUNK_BYTES`.
fn chunk_ranges(texts: &[&str]) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        bytes += text.len();
        if bytes >= CHUNK_BYTES {
            ranges.push(start..i + 1);
            (start, bytes) = (i + 1, 0);
        }
    }
    if start < texts.len() {
        ranges.push(start..texts.len());
    }
    ranges
}

/// The chunks' tokens in one vector and, for n texts, the n + 1 offsets at which they begin. Copies on `threads` threads.
pub fn concatenate<T: TokenId>(chunks: &[Chunk<T>], threads: usize) -> (Vec<T>, Vec<i64>) {
    let total = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
    let mut offsets = Vec::with_capacity(1 + chunks.iter().map(|chunk| chunk.ends.len()).sum::<usize>());
    offsets.push(0);
    let mut tokens = vec![T::default(); total];
    let mut targets = Vec::with_capacity(chunks.len());
    let (mut rest, mut base) = (tokens.as_mut_slice(), 0);
    for chunk in chunks {
        let (target, after) = rest.split_at_mut(chunk.tokens.len());
        targets.push((target, &chunk.tokens));
        rest = after;
        offsets.extend(chunk.ends.iter().map(|&end| (base + end) as i64));
        base += chunk.tokens.len();
    }
    let share = targets.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        for part in targets.chunks_mut(share) {
            scope.spawn(move || {
                for (target, source) in part {
                    target.copy_from_slice(source);
                }
            });
        }
    });
    (tokens, offsets)
}
