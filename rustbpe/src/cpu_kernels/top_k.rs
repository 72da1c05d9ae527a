//! The k largest numbers of each row, for top-k sampling on CPU.
//!
//! XLA finds the k-th largest by sorting or by bisection, dozens of passes over a row. Here a bound comes first: of the
//! maxima of enough blocks the k-th largest is a number that at least k reach, so only the few from there on have to be
//! looked at closely. Three passes in all.

use crate::cpu_kernels::work_queue::{Job, Parts};

/// Numbers that make another thread worth its start (some microseconds).
const NUMBERS_PER_THREAD: usize = 16 << 10;
/// Blocks for each of the k: the more there are, the closer the bound is to the k-th largest, and the longer it takes.
const BLOCKS: usize = 4;
/// Shorter blocks do not pay: then the whole row is looked at.
const SHORTEST_BLOCK: usize = 8;

/// Rows of which the k largest are kept, the first ones where equals compete; all else becomes -infinity.
pub struct Largest {
    x: *const f32,
    y: *mut f32,
    n: usize,
    k: Vec<i32>,
    threads: usize,
    rows: Parts,
}

// SAFETY: x is only read; every row of y is written by the one thread that took it.
unsafe impl Send for Largest {}
unsafe impl Sync for Largest {}

impl Largest {
    /// y (rows, n) from x (rows, n), with a k for each row; one that is not positive keeps nothing.
    ///
    /// # Safety
    /// Both pointers are good for k.len() * n floats until `wait` has returned, and do not overlap.
    pub unsafe fn new(x: *const f32, y: *mut f32, n: usize, k: Vec<i32>, threads: usize) -> Largest {
        let threads = threads.min(k.len()).min(1 + k.len() * n / NUMBERS_PER_THREAD).max(1);
        let rows = Parts::new(k.len());
        Largest { x, y, n, k, threads, rows }
    }
}

impl Job for Largest {
    fn threads(&self) -> usize {
        self.threads
    }

    fn work(&self) {
        let mut scratch = Vec::new();
        self.rows.work(|row| {
            // SAFETY: `new`'s contract; no two threads have the same row.
            let (x, y) = unsafe {
                let (x, y) = (self.x.add(row * self.n), self.y.add(row * self.n));
                (std::slice::from_raw_parts(x, self.n), std::slice::from_raw_parts_mut(y, self.n))
            };
            keep_largest(x, y, self.k[row].max(0) as usize, &mut scratch);
        });
    }

    fn wait(&self) {
        self.rows.wait();
    }
}

fn keep_largest(x: &[f32], y: &mut [f32], k: usize, scratch: &mut Vec<f32>) {
    if k >= x.len() {
        return y.copy_from_slice(x);
    }
    if k == 0 {
        return y.fill(f32::NEG_INFINITY);
    }
    let bound = lower_bound(x, k, scratch);
    scratch.clear();
    scratch.extend(x.iter().filter(|&&value| value >= bound));
    if scratch.len() < k {
        return y.copy_from_slice(x); // only with NaN, of which there is no order
    }
    let (above, &mut least, _) = scratch.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let mut room = k - above.iter().filter(|&&value| value > least).count();
    let equals = scratch.iter().filter(|&&value| value == least).count();
    if equals <= room {
        for (kept, &value) in y.iter_mut().zip(x) {
            *kept = if value >= least { value } else { f32::NEG_INFINITY };
        }
    } else {
        for (kept, &value) in y.iter_mut().zip(x) {
            let stays = value > least || (value == least && room > 0);
            room -= usize::from(stays && value == least);
            *kept = if stays { value } else { f32::NEG_INFINITY };
        }
    }
}

/// A number that at least k of x reach.
fn lower_bound(x: &[f32], k: usize, scratch: &mut Vec<f32>) -> f32 {
    let length = x.len() / (BLOCKS * k);
    if length < SHORTEST_BLOCK {
        return f32::NEG_INFINITY;
    }
    scratch.clear();
    scratch.extend(x.chunks(length).map(maximum));
    *scratch.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// Written so that the compiler sees lanes of a vector in it.
fn maximum(block: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (whole, rest) = block.as_chunks::<8>();
    for chunk in whole {
        for (most, &value) in lanes.iter_mut().zip(chunk) {
            *most = if value > *most { value } else { *most };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &value| if value > most { value } else { most })
}
