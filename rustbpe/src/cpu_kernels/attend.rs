//! Attention of one new token per row to the tokens before it, for decoding on CPU.
//!
//! Compiled from the general formula, XLA multiplies many tiny matrices one after the other, and computes scores for
//! every place a row might have filled, only to mask them. Here each row and group of heads reads what is valid of its
//! own keys and values, once, where they lie. Rows are what threads share; a row's result does not depend on its company.

use crate::cpu_kernels::vector::Isa;
use crate::cpu_kernels::work_queue::{Job, Parts};

/// Bytes of keys and values that make another thread worth its start (some microseconds).
const BYTES_PER_THREAD: usize = 128 << 10;

/// n = rows * groups problems: softmax(q keys / sqrt(D)) values, for each of H heads that share keys and values.
///
/// Row r attends to its first start[r] old tokens, which are those of the old arrays' row places[r] (to none if that is
/// negative), and to filled + 1 new ones, of these only to the last window + 1 if the window is not negative.
pub struct Attention {
    isa: Isa,
    q: *const f32,
    old_keys: *const f32,
    old_values: *const f32,
    new_keys: *const f32,
    new_values: *const f32,
    y: *mut f32,
    heads: usize,
    dim: usize,
    old: usize,
    new: usize,
    places: Vec<i32>,
    start: Vec<i32>,
    groups: usize,
    filled: usize,
    window: Option<usize>,
    threads: usize,
    problems: Parts,
}

// SAFETY: what the pointers lead to is only read, but for y, of which every problem writes a part of its own.
unsafe impl Send for Attention {}
unsafe impl Sync for Attention {}

/// Pointers to q, old keys, old values, new keys, new values and the result.
pub type Arrays = (*const f32, *const f32, *const f32, *const f32, *const f32, *mut f32);

impl Attention {
    /// Plans the work. None if more tokens are said to be valid than there is room for, or a place is none.
    ///
    /// sizes: n, H, D, the old arrays' N, and how many old and new tokens the arrays have room for. rows: their places,
    /// and how many old tokens of each are valid.
    ///
    /// # Safety
    /// The processor has `isa`, the rows' number divides n, and the pointers are good for arrays (n, H, D), twice
    /// (N, old, D), twice (n, new, D) and (n, H, D) until `wait` has returned.
    pub unsafe fn new(
        isa: Isa,
        arrays: Arrays,
        (n, heads, dim, n_old, old, new): (usize, usize, usize, usize, usize, usize),
        (places, start): (Vec<i32>, Vec<i32>),
        filled: i32,
        window: i32,
        threads: usize,
    ) -> Option<Attention> {
        let (q, old_keys, old_values, new_keys, new_values, y) = arrays;
        let filled = usize::try_from(filled).ok().filter(|&filled| filled < new)?;
        let groups = n / start.len().max(1);
        if places.iter().any(|&place| place >= 0 && (place as usize + 1) * groups > n_old) {
            return None;
        }
        let window = usize::try_from(window).ok();
        let start: Vec<_> = start.iter().zip(&places).map(|(&s, &place)| if place < 0 { 0 } else { s }).collect();
        let lengths = start.iter().map(|&s| (s.max(0) as usize).min(old) + filled + 1);
        let tokens: usize = lengths.map(|length| length.min(window.map_or(usize::MAX, |w| w + 1))).sum();
        let bytes = tokens * groups * dim * 2 * size_of::<f32>();
        let threads = threads.min(n).min(1 + bytes / BYTES_PER_THREAD).max(1);
        let problems = Parts::new(n);
        Some(Attention {
            isa,
            q,
            old_keys,
            old_values,
            new_keys,
            new_values,
            y,
            heads,
            dim,
            old,
            new,
            places,
            start,
            groups,
            filled,
            window,
            threads,
            problems,
        })
    }

    /// The valid tokens of a problem: old ones from..to, new ones from..to.
    ///
    /// A row that nobody reads may be said to hold more old tokens than are in view: it attends to those.
    fn valid(&self, problem: usize) -> [(usize, usize); 2] {
        let start = self.start[problem / self.groups].max(0) as usize;
        let first = self.window.map_or(0, |window| (start + self.filled).saturating_sub(window));
        let old = start.min(self.old);
        [(first.min(old), old), (first.saturating_sub(start).min(self.filled), self.filled + 1)]
    }
}

impl Job for Attention {
    fn threads(&self) -> usize {
        self.threads
    }

    fn work(&self) {
        let mut scores = Vec::new();
        self.problems.work(|problem| {
            // SAFETY: `new`'s contract.
            #[cfg(target_arch = "x86_64")]
            unsafe {
                match self.isa {
                    Isa::Avx512 => x86::solve_avx512(self, problem, &mut scores),
                    Isa::Avx2 => x86::solve_avx2(self, problem, &mut scores),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                scores.push(0f32);
                unreachable!("no {:?} here: {problem} {:?}", self.isa, self.valid(problem));
            }
        });
    }

    fn wait(&self) {
        self.problems.wait();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use crate::cpu_kernels::vector::Vector;
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub unsafe fn solve_avx512(a: &Attention, problem: usize, scores: &mut Vec<f32>) {
        unsafe { solve::<__m512>(a, problem, scores) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn solve_avx2(a: &Attention, problem: usize, scores: &mut Vec<f32>) {
        unsafe { solve::<__m256>(a, problem, scores) }
    }

    /// Keys whose products with one query are summed side by side.
    const KEYS: usize = 4;
    /// Vectors of the result that stay in registers while the values pass.
    const SUMS: usize = 8;

    #[inline(always)]
    unsafe fn solve<V: Vector>(a: &Attention, problem: usize, scores: &mut Vec<f32>) {
        let [old, new] = a.valid(problem);
        let (n_old, n_new) = (old.1 - old.0, new.1 - new.0);
        scores.clear();
        scores.resize(n_old + n_new, 0.0);
        let scale = 1.0 / (a.dim as f32).sqrt();
        unsafe {
            let place = a.places[problem / a.groups].max(0) as usize * a.groups + problem % a.groups;
            let of_old = |array: *const f32| (array.add((place * a.old + old.0) * a.dim), n_old);
            let of_new = |array: *const f32| (array.add((problem * a.new + new.0) * a.dim), n_new);
            let keys = [of_old(a.old_keys), of_new(a.new_keys)];
            let values = [of_old(a.old_values), of_new(a.new_values)];
            for head in 0..a.heads {
                let at = (problem * a.heads + head) * a.dim;
                let (before, after) = scores.split_at_mut(n_old);
                dots::<V>(a.q.add(at), keys[0].0, values[0].0, a.dim, before);
                dots::<V>(a.q.add(at), keys[1].0, values[1].0, a.dim, after);
                let most = scores.iter().fold(f32::NEG_INFINITY, |most, &score| most.max(score));
                let mut total = 0.0;
                for score in scores.iter_mut() {
                    *score = ((*score - most) * scale).exp();
                    total += *score;
                }
                mean::<V>(a.y.add(at), a.dim, scores, values, 1.0 / total);
            }
        }
    }

    /// scores[j] = q . keys[j], while the values, which are needed next, are on their way from memory
    #[inline(always)]
    unsafe fn dots<V: Vector>(q: *const f32, keys: *const f32, values: *const f32, dim: usize, scores: &mut [f32]) {
        let whole = dim / V::LANES * V::LANES;
        for (block, scores) in scores.chunks_mut(KEYS).enumerate() {
            unsafe {
                let keys = keys.add(block * KEYS * dim);
                for line in (0..scores.len() * dim).step_by(16) {
                    _mm_prefetch::<_MM_HINT_T1>(values.add(block * KEYS * dim + line).cast());
                }
                let mut sums = [V::splat(0.0); KEYS];
                for d in (0..whole).step_by(V::LANES) {
                    let q = V::load(q.add(d));
                    for (j, sum) in sums[..scores.len()].iter_mut().enumerate() {
                        *sum = sum.add_product(q, V::load(keys.add(j * dim + d)));
                    }
                }
                for (j, (score, sum)) in scores.iter_mut().zip(sums).enumerate() {
                    *score = sum.sum();
                    for d in whole..dim {
                        *score = (*q.add(d)).mul_add(*keys.add(j * dim + d), *score);
                    }
                }
            }
        }
    }

    /// y = factor * sum over j of weights[j] * values[j], the values in two pieces
    #[inline(always)]
    unsafe fn mean<V: Vector>(y: *mut f32, dim: usize, weights: &[f32], values: [(*const f32, usize); 2], factor: f32) {
        let (step, whole) = (SUMS * V::LANES, dim / V::LANES * V::LANES);
        unsafe {
            for from in (0..whole).step_by(step) {
                let used = ((whole - from) / V::LANES).min(SUMS);
                let mut sums = [V::splat(0.0); SUMS];
                let mut weights = weights.iter();
                for (piece, count) in values {
                    for (j, &weight) in weights.by_ref().take(count).enumerate() {
                        let (weight, value) = (V::splat(weight), piece.add(j * dim + from));
                        if used == SUMS {
                            for (i, sum) in sums.iter_mut().enumerate() {
                                *sum = sum.add_product(weight, V::load(value.add(i * V::LANES)));
                            }
                        } else {
                            for (i, sum) in sums[..used].iter_mut().enumerate() {
                                *sum = sum.add_product(weight, V::load(value.add(i * V::LANES)));
                            }
                        }
                    }
                }
                for (i, sum) in sums[..used].iter().enumerate() {
                    V::splat(0.0).add_product(*sum, V::splat(factor)).store(y.add(from + i * V::LANES));
                }
            }
            for d in whole..dim {
                let mut sum = 0.0;
                let mut weights = weights.iter();
                for (piece, count) in values {
                    for (j, &weight) in weights.by_ref().take(count).enumerate() {
                        sum = weight.mul_add(*piece.add(j * dim + d), sum);
                    }
                }
                *y.add(d) = sum * factor;
            }
        }
    }
}
