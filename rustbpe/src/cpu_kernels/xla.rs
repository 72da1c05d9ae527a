//! What a custom call of XLA on CPU is made of (the calls themselves: `custom_calls`).
//!
//! XLA calls a handler with a frame of pointers: its typed FFI, whose C structures are declared here as far as
//! they are used (`xla/ffi/api/c_api.h`, version 0.3, in the folder that `jax.ffi.include_dir()` names). XLA takes a
//! handler only if it still supports the version the handler reports, and we report one only if XLA's structures reach
//! as far as ours. `tests/test_matmul.py` compares the declarations with the header of the XLA in use. The work is shared with XLA's own threads, so there are never more than it would use itself.

use crate::cpu_kernels::work_queue::Job;
use std::ffi::{CStr, c_char, c_void};
use std::mem::offset_of;
use std::ptr::null_mut;
use std::sync::Arc;

const METADATA: i32 = 1; // XLA_FFI_Extension_Metadata
const EXECUTE: i32 = 3; // XLA_FFI_ExecutionStage_EXECUTE
const S32: i32 = 4; // XLA_FFI_DataType_S32
const F32: i32 = 11; // XLA_FFI_DataType_F32
const INVALID_ARGUMENT: i32 = 3;
const VERSION: (i32, i32) = (0, 3);

/// What every structure of the interface begins with.
#[repr(C)]
struct Head {
    size: usize,
    extension: *mut Extension,
}

impl Head {
    fn of<T>() -> Head {
        Head { size: size_of::<T>(), extension: null_mut() }
    }

    /// Whether the structure that begins with this is at least as long as we take it to be.
    fn reaches<T>(&self) -> bool {
        self.size >= size_of::<T>()
    }
}

#[repr(C)]
struct Extension {
    size: usize,
    kind: i32,
    next: *mut Extension,
}

#[repr(C)]
struct MetadataExtension {
    base: Extension,
    metadata: *mut Metadata,
}

#[repr(C)]
struct Metadata {
    size: usize,
    version: Version,
    traits: u32,
}

/// The header's size of it ends with its last field in use.
const METADATA_SIZE: usize = offset_of!(Metadata, traits) + size_of::<u32>();

#[repr(C)]
struct Version {
    head: Head,
    major: i32,
    minor: i32,
}

#[repr(C)]
pub struct CallFrame {
    head: Head,
    api: *const Api,
    context: *mut c_void,
    stage: i32,
    arguments: Buffers,
    results: Buffers,
}

#[repr(C)]
struct Buffers {
    head: Head,
    size: i64,
    types: *const i32,
    items: *const *const Buffer,
}

#[repr(C)]
struct Buffer {
    head: Head,
    dtype: i32,
    data: *mut c_void,
    rank: i64,
    dims: *const i64,
}

pub type Error = *mut c_void; // null = none

#[repr(C)]
struct Api {
    head: Head,
    version: Version,
    internal: *const c_void,
    error_create: unsafe extern "C" fn(*mut ErrorCreate) -> Error,
    error_message: *const c_void,
    error_destroy: unsafe extern "C" fn(*mut ErrorDestroy),
    not_used_here: [*const c_void; 8],
    schedule: unsafe extern "C" fn(*mut Schedule) -> Error,
    num_threads: unsafe extern "C" fn(*mut NumThreads) -> Error,
}

#[repr(C)]
struct ErrorCreate {
    head: Head,
    message: *const c_char,
    code: i32,
}

#[repr(C)]
struct ErrorDestroy {
    head: Head,
    error: Error,
}

#[repr(C)]
struct Schedule {
    head: Head,
    context: *mut c_void,
    task: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
}

#[repr(C)]
struct NumThreads {
    head: Head,
    context: *mut c_void,
    threads: *mut i64,
}

// Where the header has them, on a 64-bit machine.
#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(offset_of!(Extension, kind) == 8 && offset_of!(MetadataExtension, metadata) == 24);
    assert!(offset_of!(Metadata, version) == 8 && METADATA_SIZE == 36);
    assert!(offset_of!(Version, major) == 16 && offset_of!(Version, minor) == 20 && size_of::<Version>() == 24);
    assert!(offset_of!(CallFrame, api) == 16 && offset_of!(CallFrame, context) == 24);
    assert!(offset_of!(CallFrame, stage) == 32 && offset_of!(CallFrame, arguments) == 40);
    assert!(offset_of!(CallFrame, results) == 80 && size_of::<CallFrame>() == 120);
    assert!(offset_of!(Buffers, size) == 16 && offset_of!(Buffers, items) == 32 && size_of::<Buffers>() == 40);
    assert!(offset_of!(Buffer, dtype) == 16 && offset_of!(Buffer, data) == 24 && offset_of!(Buffer, rank) == 32);
    assert!(offset_of!(Buffer, dims) == 40 && size_of::<Buffer>() == 48);
    assert!(offset_of!(Api, error_create) == 48 && offset_of!(Api, error_destroy) == 64);
    assert!(offset_of!(Api, schedule) == 136 && offset_of!(Api, num_threads) == 144 && size_of::<Api>() == 152);
    assert!(offset_of!(ErrorCreate, message) == 16 && offset_of!(ErrorCreate, code) == 24);
    assert!(offset_of!(ErrorDestroy, error) == 16);
    assert!(offset_of!(Schedule, context) == 16 && offset_of!(Schedule, task) == 24);
    assert!(offset_of!(Schedule, data) == 32 && size_of::<Schedule>() == 40);
    assert!(offset_of!(NumThreads, context) == 16 && offset_of!(NumThreads, threads) == 24);
};

/// What a handler does with a frame: answers XLA's question about the version, or does the job that `make` reads off it.
///
/// # Safety
/// For handlers that XLA alone calls, with a frame of its own making; `make` checks what it takes from it.
pub unsafe fn handle<J: Job>(frame: *mut CallFrame, make: fn(&CallFrame) -> Result<J, &'static CStr>) -> Error {
    unsafe {
        let frame = &*frame;
        if let Some(extension) = frame.head.extension.as_ref()
            && extension.kind == METADATA
        {
            introduce(frame, extension);
            return null_mut();
        }
        if frame.stage != EXECUTE {
            return null_mut();
        }
        match make(frame) {
            Ok(job) => {
                run(frame, job);
                null_mut()
            }
            Err(message) => {
                let head = Head::of::<ErrorCreate>();
                let mut error = ErrorCreate { head, message: message.as_ptr(), code: INVALID_ARGUMENT };
                ((*frame.api).error_create)(&mut error)
            }
        }
    }
}

/// An element type of arrays.
pub trait Element {
    const DTYPE: i32;
}

impl Element for f32 {
    const DTYPE: i32 = F32;
}

impl Element for i32 {
    const DTYPE: i32 = S32;
}

impl CallFrame {
    /// How many arrays are passed and returned; None from an XLA with shorter structures.
    pub fn arity(&self) -> Option<(i64, i64)> {
        let known = [&self.arguments, &self.results].into_iter().all(|buffers| buffers.head.reaches::<Buffers>());
        known.then_some((self.arguments.size, self.results.size))
    }

    /// Data and dimensions of an argument, if it has this type and rank. `index` is below the arity.
    pub fn argument<T: Element, const RANK: usize>(&self, index: usize) -> Option<(*const T, [usize; RANK])> {
        assert!((index as i64) < self.arguments.size);
        let (data, dims): (*mut T, _) = unsafe { array(*self.arguments.items.add(index)) }?;
        Some((data.cast_const(), dims))
    }

    /// The same of a result.
    pub fn result<T: Element, const RANK: usize>(&self, index: usize) -> Option<(*mut T, [usize; RANK])> {
        assert!((index as i64) < self.results.size);
        unsafe { array(*self.results.items.add(index)) }
    }

    /// How many threads XLA has.
    pub fn threads(&self) -> usize {
        let mut threads = 0;
        let head = Head::of::<NumThreads>();
        let mut ask = NumThreads { head, context: self.context, threads: &mut threads };
        let known = none(self, unsafe { ((*self.api).num_threads)(&mut ask) });
        if known { threads.max(1) as usize } else { 1 }
    }
}

unsafe fn array<T: Element, const RANK: usize>(buffer: *const Buffer) -> Option<(*mut T, [usize; RANK])> {
    unsafe {
        let buffer = &*buffer;
        let fits = buffer.head.reaches::<Buffer>() && buffer.dtype == T::DTYPE && buffer.rank == RANK as i64;
        fits.then(|| (buffer.data.cast(), std::array::from_fn(|axis| *buffer.dims.add(axis) as usize)))
    }
}

/// Answers XLA's question, put when a handler is registered, which version of the interface this was written for: not at
/// all if a structure is shorter than expected, and XLA refuses the handler.
unsafe fn introduce(frame: &CallFrame, extension: &Extension) {
    unsafe {
        let known = frame.head.reaches::<CallFrame>()
            && frame.api.as_ref().is_some_and(|api| api.head.reaches::<Api>())
            && extension.size >= size_of::<MetadataExtension>();
        if known {
            let metadata = (*std::ptr::from_ref(extension).cast::<MetadataExtension>()).metadata;
            if (*metadata).size >= METADATA_SIZE {
                (*metadata).version = Version { head: Head::of::<Version>(), major: VERSION.0, minor: VERSION.1 };
                (*metadata).traits = 0;
            }
        }
    }
}

/// Does the work together with XLA's other threads, as far as they come in time.
unsafe fn run<J: Job>(frame: &CallFrame, job: J) {
    let job = Arc::new(job);
    for _ in 1..job.threads() {
        let (task, data) = (help::<J> as _, Arc::into_raw(job.clone()).cast_mut().cast());
        let mut schedule = Schedule { head: Head::of::<Schedule>(), context: frame.context, task, data };
        if !none(frame, unsafe { ((*frame.api).schedule)(&mut schedule) }) {
            drop(unsafe { Arc::from_raw(data.cast::<J>()) });
            break;
        }
    }
    job.work();
    job.wait();
}

unsafe extern "C" fn help<J: Job>(job: *mut c_void) {
    unsafe { Arc::from_raw(job.cast::<J>()) }.work();
}

/// Whether there is no error; frees it if there is one.
fn none(frame: &CallFrame, error: Error) -> bool {
    if !error.is_null() {
        let mut destroy = ErrorDestroy { head: Head::of::<ErrorDestroy>(), error };
        unsafe { ((*frame.api).error_destroy)(&mut destroy) };
    }
    error.is_null()
}
