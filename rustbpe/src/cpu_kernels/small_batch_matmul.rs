//! The product of a few rows with a large matrix, as fast as memory delivers the matrix.
//!
//! A general matrix product first copies the matrix into panels, which pays when many rows use them. For up to
//! sixty-four rows the matrix is best read once and where it lies: a block of columns at a time, a few of its rows
//! together, the next ones on their way from memory, the block's sums in the first-level cache. Blocks are what threads
//! share.
//!
//! Every sum runs over k in order, whatever the number of rows and threads, so the result for a row depends neither on
//! its company nor on the machine's load.

pub use crate::cpu_kernels::vector::Isa;
use crate::cpu_kernels::work_queue::{Job, Parts};

pub const MAX_ROWS: usize = 64;

/// Rows of the matrix that are read together, one stream of memory each.
const DEPTH: usize = 32;
/// Bounds of a block's width: enough for a stream, small enough for the sums to stay in the cache.
const MIN_COLUMNS: usize = 128;
const MAX_COLUMNS: usize = 512;
const MAX_SUMS: usize = 8192;
/// Widths are multiples of this (but for the last block's): pairs of vectors, whole lines of the cache.
const STEP: usize = 32;
/// From this width on, a matrix's rows are so far apart that they compete for the same few places in the cache: then
/// memory is asked for `AHEAD` columns in advance, else for the block's next `DEPTH` rows.
const WIDE: usize = 8192;
const AHEAD: usize = 128;

// However many rows: there is a width.
const _: () = assert!(MIN_COLUMNS.is_multiple_of(STEP) && MIN_COLUMNS * MAX_ROWS <= MAX_SUMS);

/// One product y (m, n) = x (m, k) w (k, n), all row-major, that any number of threads may `work` on.
pub struct Product {
    isa: Isa,
    x: *const f32,
    w: *const f32,
    y: *mut f32,
    m: usize,
    k: usize,
    n: usize,
    columns: usize,
    threads: usize,
    blocks: Parts,
}

// SAFETY: x and w are only read; every block of y is written by the one thread that took it.
unsafe impl Send for Product {}
unsafe impl Sync for Product {}

impl Product {
    /// Plans the product for some number of threads.
    ///
    /// # Safety
    /// The processor has `isa`, m is at most `MAX_ROWS`, and the three pointers are good for m * k, k * n and m * n
    /// floats until `wait` has returned (after that nothing is read or written, even if `work` is called late).
    pub unsafe fn new(
        isa: Isa,
        (x, w, y): (*const f32, *const f32, *mut f32),
        (m, k, n): (usize, usize, usize),
        threads: usize,
    ) -> Product {
        assert!(m <= MAX_ROWS, "at most {MAX_ROWS} rows, got {m}");
        let most = (MAX_SUMS / m.max(1) / STEP * STEP).min(MAX_COLUMNS);
        let columns = n.div_ceil(4 * threads).next_multiple_of(STEP).clamp(MIN_COLUMNS, most);
        let blocks = n.div_ceil(columns);
        Product { isa, x, w, y, m, k, n, columns, threads: threads.min(blocks), blocks: Parts::new(blocks) }
    }

    fn block(&self, start: usize, width: usize) {
        // SAFETY: `new`'s contract.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            match self.isa {
                Isa::Avx512 => x86::block_avx512(self, start, width),
                Isa::Avx2 => x86::block_avx2(self, start, width),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no {:?} here: {start} {width}", self.isa);
    }
}

impl Job for Product {
    fn threads(&self) -> usize {
        self.threads
    }

    fn work(&self) {
        self.blocks.work(|block| {
            let start = block * self.columns;
            self.block(start, self.columns.min(self.n - start));
        });
    }

    fn wait(&self) {
        self.blocks.wait();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use crate::cpu_kernels::vector::Vector;
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub unsafe fn block_avx512(p: &Product, start: usize, width: usize) {
        unsafe { block::<__m512>(p, start, width) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn block_avx2(p: &Product, start: usize, width: usize) {
        unsafe { block::<__m256>(p, start, width) }
    }

    /// The sums of a block, row by row, aligned for the cache.
    #[repr(align(64))]
    struct Sums(MaybeUninit<[f32; MAX_SUMS]>);

    #[inline(always)]
    unsafe fn block<V: Vector>(p: &Product, start: usize, width: usize) {
        let mut sums = Sums(MaybeUninit::uninit());
        let sums = sums.0.as_mut_ptr().cast::<f32>();
        unsafe {
            for row in 0..p.m {
                sums.add(row * p.columns).write_bytes(0, width);
            }
            // equal groups of rows, none larger than the registers hold: 8 rows are 4 + 4 with room for 6
            let together = p.m.div_ceil(p.m.div_ceil(V::ROWS).max(1)).max(1);
            for k in (0..p.k).step_by(DEPTH) {
                let depth = DEPTH.min(p.k - k);
                for row in (0..p.m).step_by(together) {
                    let (x, w) = (p.x.add(row * p.k + k), p.w.add(k * p.n + start));
                    let sums = sums.add(row * p.columns);
                    match (p.m - row).min(together) {
                        1 => panel::<V, 1>(p, x, w, sums, width, depth),
                        2 => panel::<V, 2>(p, x, w, sums, width, depth),
                        3 => panel::<V, 3>(p, x, w, sums, width, depth),
                        4 => panel::<V, 4>(p, x, w, sums, width, depth),
                        5 => panel::<V, 5>(p, x, w, sums, width, depth),
                        6 => panel::<V, 6>(p, x, w, sums, width, depth),
                        7 => panel::<V, 7>(p, x, w, sums, width, depth),
                        _ => panel::<V, 8>(p, x, w, sums, width, depth),
                    }
                }
            }
            for row in 0..p.m {
                p.y.add(row * p.n + start).copy_from_nonoverlapping(sums.add(row * p.columns), width);
            }
        }
    }

    /// Adds x (M rows, `depth` columns) times w (`depth` rows, `width` columns) to the sums.
    #[inline(always)]
    unsafe fn panel<V: Vector, const M: usize>(
        p: &Product,
        x: *const f32,
        w: *const f32,
        sums: *mut f32,
        width: usize,
        depth: usize,
    ) {
        unsafe {
            match depth {
                DEPTH => panel_of::<V, M>(p, x, w, sums, width, DEPTH), // a loop of known length
                _ => panel_of::<V, M>(p, x, w, sums, width, depth),
            }
        }
    }

    #[inline(always)]
    unsafe fn panel_of<V: Vector, const M: usize>(
        p: &Product,
        x: *const f32,
        w: *const f32,
        sums: *mut f32,
        width: usize,
        depth: usize,
    ) {
        let ahead = if p.n < WIDE { width } else { AHEAD.min(width) };
        unsafe {
            let mut xs = [[0f32; M]; DEPTH]; // transposed: read in this order
            for m in 0..M {
                for (k, xs) in xs[..depth].iter_mut().enumerate() {
                    xs[m] = *x.add(m * p.k + k);
                }
            }
            let mut column = 0;
            while column + 2 * V::LANES <= width {
                let coming = column + ahead;
                let coming = if coming < width { coming } else { DEPTH * p.n + coming - width };
                let mut acc = [[V::splat(0.0); 2]; M];
                for (m, [a, b]) in acc.iter_mut().enumerate() {
                    let at = sums.add(m * p.columns + column);
                    (*a, *b) = (V::load(at), V::load(at.add(V::LANES)));
                }
                for (k, xs) in xs[..depth].iter().enumerate() {
                    let w = w.add(k * p.n);
                    for line in (0..2 * V::LANES).step_by(16) {
                        // wrapping: an address beyond the matrix does no harm to a prefetch
                        _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(coming + line).cast());
                    }
                    let (w0, w1) = (V::load(w.add(column)), V::load(w.add(column + V::LANES)));
                    for ([a, b], &x) in acc.iter_mut().zip(xs) {
                        let x = V::splat(x);
                        (*a, *b) = (a.add_product(x, w0), b.add_product(x, w1));
                    }
                }
                for (m, [a, b]) in acc.iter().enumerate() {
                    let at = sums.add(m * p.columns + column);
                    a.store(at);
                    b.store(at.add(V::LANES));
                }
                column += 2 * V::LANES;
            }
            for column in column..width {
                for m in 0..M {
                    let sum = sums.add(m * p.columns + column);
                    for (k, xs) in xs[..depth].iter().enumerate() {
                        *sum = xs[m].mul_add(*w.add(k * p.n + column), *sum);
                    }
                }
            }
        }
    }
}
