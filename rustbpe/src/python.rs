//! The Python module `rustbpe`. See `../rustbpe.pyi` for the interface as Python users read it.

use std::borrow::Cow;
use std::ffi::c_void;
use std::num::NonZero;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock, RwLock};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use numpy::{Element, PyArray1};
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyCapsule, PyIterator, PyString};

use crate::bpe::corpus::{Batch, count_pieces};
use crate::bpe::encode::{Pool, TokenId, concatenate, encode_all};
use crate::bpe::split::{DEFAULT_PATTERN, Splitter};
use crate::bpe::train::Trainer;
use crate::bpe::vocab::Vocab;
use crate::bpe::words::{MAX_IDS, Words};
use crate::cpu_kernels::vector::Isa;
use crate::cpu_kernels::xla::{self, CallFrame};
use crate::cpu_kernels::{custom_calls, small_batch_matmul};
use crate::error::Error;

/// Least time between two calls of a progress callback.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// How long the merge loop runs before it looks for signals.
const SIGNALS_EVERY: Duration = Duration::from_millis(50);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::Value(reason) => PyValueError::new_err(reason),
            Error::Overflow(reason) => PyOverflowError::new_err(reason),
        }
    }
}

/// A finished vocabulary with its split pattern. Immutable: training makes a new one.
struct Model {
    splitter: Splitter,
    /// Ascending by rank.
    ranks: Vec<(Box<[u8]>, u32)>,
    /// Made when it is first needed: a tokenizer may be trained only to be saved.
    vocab: OnceLock<Vocab>,
    pool: Pool,
}

impl Model {
    fn new(splitter: Splitter, ranks: Vec<(Box<[u8]>, u32)>) -> Self {
        let pool = Pool::new(splitter.clone());
        Model { splitter, ranks, vocab: OnceLock::new(), pool }
    }

    /// The 256 single bytes and then one token for each merge.
    fn from_merges(splitter: Splitter, merges: &[(u32, u32)]) -> Self {
        let mut ranks: Vec<(Box<[u8]>, u32)> = (0..=255u8).map(|byte| (Box::from([byte]), u32::from(byte))).collect();
        for &(left, right) in merges {
            let token = [&*ranks[left as usize].0, &*ranks[right as usize].0].concat();
            ranks.push((token.into(), ranks.len() as u32));
        }
        Model::new(splitter, ranks)
    }

    fn vocab(&self) -> &Vocab {
        self.vocab.get_or_init(|| {
            let ranks = self.ranks.iter().map(|(token, rank)| (&**token, *rank)).collect();
            Vocab::new(ranks, false).expect("training gives every byte and every rank once")
        })
    }

    /// Largest id + 1.
    fn size(&self) -> usize {
        self.ranks.last().map_or(0, |&(_, rank)| rank as usize + 1)
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        self.pool.with(|worker| worker.encode(self.vocab(), text, &mut ids))?;
        Ok(ids)
    }

    fn decode(&self, ids: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let mut bytes = Vec::new();
        for id in ids.try_iter()? {
            let id: i64 = id?.extract()?;
            let token = u32::try_from(id).ok().and_then(|id| self.vocab().token(id));
            bytes.extend_from_slice(token.ok_or_else(|| {
                PyValueError::new_err(format!("unknown token id {id}: the vocabulary has {} ids", self.size()))
            })?);
        }
        Ok(bytes)
    }
}

/// Byte-pair-encoding tokenizer: trains on a stream of texts, encodes and decodes.
#[pyclass(frozen, module = "rustbpe")]
pub struct Tokenizer {
    model: RwLock<Arc<Model>>,
}

impl Tokenizer {
    fn model(&self) -> Arc<Model> {
        self.model.read().expect("no thread panics holding the lock").clone()
    }
}

#[pymethods]
impl Tokenizer {
    /// An untrained tokenizer: the 256 single bytes and the default split pattern.
    #[new]
    fn new() -> PyResult<Self> {
        let model = Model::from_merges(Splitter::new(DEFAULT_PATTERN)?, &[]);
        Ok(Tokenizer { model: RwLock::new(Arc::new(model)) })
    }

    /// A tokenizer for given ranks, as tiktoken's `mergeable_ranks`, and a split pattern.
    #[staticmethod]
    fn from_ranks(py: Python<'_>, ranks: &Bound<'_, PyAny>, pattern: &str) -> PyResult<Self> {
        let mut list: Vec<(Box<[u8]>, u32)> = Vec::new();
        for (i, item) in ranks.try_iter()?.enumerate() {
            let (token, rank): (Bound<'_, PyBytes>, i64) = item?
                .extract()
                .map_err(|_| PyTypeError::new_err(format!("ranks[{i}] must be a pair of bytes and int")))?;
            let rank = u32::try_from(rank)
                .map_err(|_| PyValueError::new_err(format!("ranks[{i}]: rank {rank} is negative or too large")))?;
            list.push((token.as_bytes().into(), rank));
        }
        list.sort_by_key(|&(_, rank)| rank);
        let splitter = Splitter::new(pattern)?;
        let vocab = py.detach(|| Vocab::new(list.iter().map(|(token, rank)| (&**token, *rank)).collect(), true))?;
        let model = Model { vocab: OnceLock::from(vocab), ..Model::new(splitter, list) };
        Ok(Tokenizer { model: RwLock::new(Arc::new(model)) })
    }

    /// Trains on the texts of an iterator.
    #[pyo3(signature = (iterator, vocab_size, buffer_size = 8192, pattern = None, progress = None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        if vocab_size < 256 {
            return Err(PyValueError::new_err(format!(
                "vocab_size is {vocab_size}: it must be at least 256, one token for each byte"
            )));
        }
        if buffer_size < 1 {
            return Err(PyValueError::new_err(format!("buffer_size is {buffer_size}: it must be at least 1")));
        }
        if iterator.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("iterator must yield texts; got a single str: pass [text]"));
        }
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        let mut reader = Reader {
            texts: iterator.try_iter()?.unbind(),
            index: 0,
            buffer_size: buffer_size as usize,
            progress: Progress::new(progress),
        };
        let threads = threads(0);
        let pieces =
            py.detach(|| count_pieces(&splitter, threads, |batch| Python::attach(|py| reader.fill(py, batch))))?;
        let Reader { index, mut progress, .. } = reader;
        progress.report(py, "count", index, 0, true)?;

        let num_merges = (vocab_size.min(i64::from(MAX_IDS)) - 256) as usize;
        let mut trainer = py.detach(|| Ok::<_, Error>(Trainer::new(Words::new(pieces)?, num_merges)))?;
        progress.report(py, "merge", 0, num_merges, true)?;
        while py.detach(|| trainer.run(num_merges, Instant::now() + SIGNALS_EVERY)) {
            py.check_signals()?;
            progress.report(py, "merge", trainer.merges().len(), num_merges, false)?;
        }
        progress.report(py, "merge", trainer.merges().len(), num_merges, true)?;
        let model = py.detach(|| Model::from_merges(splitter, &trainer.into_merges()));
        *self.model.write().expect("no thread panics holding the lock") = Arc::new(model);
        Ok(())
    }

    /// The split pattern.
    fn get_pattern(&self) -> String {
        self.model().splitter.pattern().to_owned()
    }

    /// All tokens as (bytes, id), ascending by id.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.model().ranks.iter().map(|(token, rank)| (PyBytes::new(py, token), *rank)).collect()
    }

    /// Largest id + 1.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.model().size()
    }

    /// The ids of a text.
    fn encode(&self, py: Python<'_>, text: &Bound<'_, PyString>) -> PyResult<Vec<u32>> {
        let (model, text) = (self.model(), utf8(text)?);
        Ok(py.detach(|| model.encode(&text))?)
    }

    /// The ids of each text, encoded on all cores.
    fn batch_encode(&self, py: Python<'_>, texts: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<u32>>> {
        let (model, texts) = (self.model(), strings(texts)?);
        let texts = texts.iter().map(utf8).collect::<PyResult<Vec<_>>>()?;
        let chunks = py.detach(|| {
            let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();
            encode_all::<u32>(model.vocab(), &model.pool, &texts, None, threads(0))
        })?;
        let mut lists = Vec::with_capacity(texts.len());
        for chunk in chunks {
            let mut start = 0;
            for end in chunk.ends {
                lists.push(chunk.tokens[start..end].to_vec());
                start = end;
            }
        }
        Ok(lists)
    }

    /// The ids of all texts in one NumPy array, and the offsets at which each text begins.
    #[pyo3(signature = (texts, bos = None, dtype = None, num_threads = 0))]
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        bos: Option<i64>,
        dtype: Option<&Bound<'py, PyAny>>,
        num_threads: usize,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<i64>>)> {
        let model = self.model();
        let name: String = match dtype {
            None => "uint16".to_owned(),
            Some(dtype) => py.import("numpy")?.call_method1("dtype", (dtype,))?.getattr("name")?.extract()?,
        };
        match name.as_str() {
            "uint16" => {
                let (tokens, offsets) = model.to_arrays::<u16>(py, texts, bos, num_threads)?;
                Ok((tokens.into_any(), offsets))
            }
            "uint32" => {
                let (tokens, offsets) = model.to_arrays::<u32>(py, texts, bos, num_threads)?;
                Ok((tokens.into_any(), offsets))
            }
            other => Err(PyValueError::new_err(format!("dtype is {other}: it must be uint16 or uint32"))),
        }
    }

    /// The text of some ids; bytes that are no UTF-8 become U+FFFD.
    fn decode(&self, ids: &Bound<'_, PyAny>) -> PyResult<String> {
        Ok(String::from_utf8_lossy(&self.model().decode(ids)?).into_owned())
    }

    /// The bytes of some ids.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.model().decode(ids)?))
    }
}

type Arrays<'py, T> = (Bound<'py, PyArray1<T>>, Bound<'py, PyArray1<i64>>);

impl Model {
    fn to_arrays<'py, T: TokenId + Element>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        bos: Option<i64>,
        num_threads: usize,
    ) -> PyResult<Arrays<'py, T>> {
        let bits = 8 * size_of::<T>();
        if self.size() > T::MAX as usize + 1 {
            return Err(PyValueError::new_err(format!(
                "the vocabulary has {} ids, which do not fit uint{bits}: pass dtype='uint32'",
                self.size()
            )));
        }
        let bos = match bos {
            None => None,
            Some(id) if (0..=i64::from(T::MAX)).contains(&id) => Some(T::from_id(id as u32)),
            Some(id) => return Err(PyValueError::new_err(format!("bos is {id}, which does not fit uint{bits}"))),
        };
        let texts = strings(texts)?;
        let texts = texts.iter().map(utf8).collect::<PyResult<Vec<_>>>()?;
        let (tokens, offsets) = py.detach(|| {
            let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();
            let threads = threads(num_threads);
            let chunks = encode_all(self.vocab(), &self.pool, &texts, bos, threads)?;
            Ok::<_, Error>(concatenate(&chunks, threads))
        })?;
        Ok((PyArray1::from_vec(py, tokens), PyArray1::from_vec(py, offsets)))
    }
}

/// The reading side of training.
struct Reader {
    texts: Py<PyIterator>,
    index: usize,
    buffer_size: usize,
    progress: Progress,
}

impl Reader {
    /// Fills a batch. False when the iterator has ended.
    fn fill(&mut self, py: Python<'_>, batch: &mut Batch) -> PyResult<bool> {
        py.check_signals()?;
        let mut texts = self.texts.bind(py).clone();
        while !batch.is_full(self.buffer_size) {
            let Some(item) = texts.next() else { return Ok(false) };
            let item = item?;
            let text = item.cast::<PyString>().map_err(|_| not_a_str("item", self.index, &item))?;
            batch.push(&utf8(text)?);
            self.index += 1;
        }
        self.progress.report(py, "count", self.index, 0, false)?;
        Ok(true)
    }
}

/// A progress callback that is not called too often.
struct Progress {
    callback: Option<Py<PyAny>>,
    last: Instant,
}

impl Progress {
    fn new(callback: Option<Py<PyAny>>) -> Self {
        Progress { callback, last: Instant::now() }
    }

    fn report(&mut self, py: Python<'_>, stage: &str, done: usize, total: usize, always: bool) -> PyResult<()> {
        if let Some(callback) = &self.callback
            && (always || self.last.elapsed() >= PROGRESS_EVERY)
        {
            callback.call1(py, (stage, done, total))?;
            self.last = Instant::now();
        }
        Ok(())
    }
}

/// The text as UTF-8. Lone surrogates, which have none, become U+FFFD and paired ones their character (as in tiktoken).
fn utf8<'a>(text: &'a Bound<'_, PyString>) -> PyResult<Cow<'a, str>> {
    match text.to_str() {
        Ok(text) => Ok(Cow::Borrowed(text)),
        Err(_) => {
            let bytes = text.call_method1("encode", ("utf-16", "surrogatepass"))?;
            Ok(Cow::Owned(bytes.call_method1("decode", ("utf-16", "replace"))?.extract()?))
        }
    }
}

/// The items of an iterable of str.
fn strings<'py>(texts: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyString>>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("texts must be a list of str; got a single str: pass [text]"));
    }
    let items = texts.try_iter()?.enumerate();
    items.map(|(i, item)| item?.cast_into().map_err(|e| not_a_str("texts", i, &e.into_inner()))).collect()
}

fn not_a_str(what: &str, index: usize, item: &Bound<'_, PyAny>) -> PyErr {
    match item.get_type().name() {
        Ok(name) => PyTypeError::new_err(format!("{what}[{index}] must be str, not {name}")),
        Err(error) => error,
    }
}

/// The number of threads to use: as asked, or one for each core.
fn threads(asked: usize) -> usize {
    if asked > 0 { asked } else { available_parallelism().map_or(1, NonZero::get) }
}

/// A custom call for `jax.ffi.register_ffi_target`, or None on a processor without AVX2.
fn custom_call(
    py: Python<'_>,
    handler: unsafe extern "C" fn(*mut CallFrame) -> xla::Error,
) -> PyResult<Option<Bound<'_, PyCapsule>>> {
    if Isa::detect().is_none() {
        return Ok(None);
    }
    let handler = NonNull::new(handler as *mut c_void).expect("a function has an address");
    // SAFETY: a function is there as long as the module, which Python never unloads.
    Ok(Some(unsafe { PyCapsule::new_with_pointer(py, handler, c"xla._CUSTOM_CALL_TARGET") }?))
}

#[pyfunction]
fn skinny_matmul(py: Python<'_>) -> PyResult<Option<Bound<'_, PyCapsule>>> {
    custom_call(py, custom_calls::skinny_matmul)
}

/// Up to how many rows `skinny_matmul` takes; 0 where the processor has no AVX2.
#[pyfunction]
fn skinny_rows() -> usize {
    Isa::detect().map_or(0, |_| small_batch_matmul::MAX_ROWS)
}

#[pyfunction]
fn decode_attention(py: Python<'_>) -> PyResult<Option<Bound<'_, PyCapsule>>> {
    custom_call(py, custom_calls::decode_attention)
}

#[pyfunction]
fn keep_largest(py: Python<'_>) -> PyResult<Option<Bound<'_, PyCapsule>>> {
    custom_call(py, custom_calls::keep_largest)
}

#[pymodule]
mod rustbpe {
    #[pymodule_export]
    use super::Tokenizer;
    #[pymodule_export]
    use super::decode_attention;
    #[pymodule_export]
    use super::keep_largest;
    #[pymodule_export]
    use super::skinny_matmul;
    #[pymodule_export]
    use super::skinny_rows;

    /// The split pattern used when none is given.
    #[pymodule_export]
    const DEFAULT_PATTERN: &str = super::DEFAULT_PATTERN;
}
