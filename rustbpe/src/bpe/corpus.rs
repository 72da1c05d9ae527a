//! From a stream of documents to counted pieces: one thread reads, the others split and count.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::bpe::count::PieceCounter;
use crate::bpe::split::Splitter;
use crate::error::Error;

/// A batch is handed on when it holds this much text, however few documents that are.
const BATCH_BYTES: usize = 1 << 20;
/// Reading cannot keep more counting threads busy, and every one has a table of its own.
const MAX_THREADS: usize = 8;

/// Some documents, back to back.
#[derive(Default)]
pub struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
    /// Adds a document. Pieces never cross documents.
    pub fn push(&mut self, document: &str) {
        self.text.push_str(document);
        self.ends.push(self.text.len());
    }

    /// Number of documents.
    pub fn num_documents(&self) -> usize {
        self.ends.len()
    }

    /// Whether it is time to hand it on.
    pub fn is_full(&self, max_documents: usize) -> bool {
        self.num_documents() >= max_documents || self.text.len() >= BATCH_BYTES
    }

    fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }

    fn documents(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

/// Splits and counts all documents that `fill` delivers.
///
/// `fill` puts documents into the empty batch it is given and tells whether there may be more; it is only ever called on
/// the calling thread. At most a few batches of a megabyte are alive at any time, whatever the length of the stream (one
/// longer document is a batch of its own). An error of `fill` or of the splitter ends the counting and is returned.
pub fn count_pieces<E: From<Error>>(
    splitter: &Splitter,
    threads: usize,
    mut fill: impl FnMut(&mut Batch) -> Result<bool, E>,
) -> Result<PieceCounter, E> {
    let threads = threads.clamp(1, MAX_THREADS);
    let (to_workers, from_reader) = sync_channel::<Batch>(threads);
    // Used batches go back to the reader, so that their memory is allocated once.
    let (to_reader, used) = sync_channel::<Batch>(2 * threads + 1);
    let from_reader = Mutex::new(from_reader);
    let failed = AtomicBool::new(false);

    let total = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (from_reader, failed, to_reader) = (&from_reader, &failed, to_reader.clone());
                let splitter = splitter.clone();
                scope.spawn(move || work(&splitter, from_reader, &to_reader, failed))
            })
            .collect();
        let read: Result<(), E> = (|| {
            while !failed.load(Ordering::Relaxed) {
                let mut batch = used.try_recv().unwrap_or_default();
                let more = fill(&mut batch)?;
                if to_workers.send(batch).is_err() || !more {
                    break;
                }
            }
            Ok(())
        })();
        drop(to_workers);
        let mut total: Option<PieceCounter> = None;
        let mut failure = None;
        for worker in workers {
            match worker.join() {
                Ok(Ok(counter)) => match &mut total {
                    None => total = Some(counter),
                    Some(total) => total.absorb(counter),
                },
                Ok(Err(error)) => failure = Some(error),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        read?;
        failure.map_or(Ok(total), |error| Err(E::from(error)))
    })?;
    Ok(total.unwrap_or_default())
}

/// Counts batches until the reader hangs up. After an error it only empties the queue, lest the reader wait for ever.
fn work(
    splitter: &Splitter,
    batches: &Mutex<Receiver<Batch>>,
    used: &SyncSender<Batch>,
    failed: &AtomicBool,
) -> Result<PieceCounter, Error> {
    let mut counter = PieceCounter::default();
    let mut failure = None;
    loop {
        let received = batches.lock().expect("no thread panics holding the lock").recv();
        let Ok(mut batch) = received else {
            counter.flush();
            return failure.map_or(Ok(counter), Err);
        };
        for document in batch.documents() {
            if failure.is_none()
                && let Err(error) =
                    splitter.for_each(document, |start, end| counter.add(document.as_bytes(), start, end))
            {
                failed.store(true, Ordering::Relaxed);
                failure = Some(error);
            }
        }
        batch.clear();
        if batch.text.capacity() <= 4 * BATCH_BYTES {
            // The reader may be gone or have enough of them; then the batch is simply dropped.
            let _ = used.try_send(batch);
        }
    }
}
