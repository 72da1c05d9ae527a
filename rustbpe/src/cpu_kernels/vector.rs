//! The processor's vector registers, as far as the kernels for decoding need them.

/// The processor's vector instructions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Isa {
    Avx512,
    Avx2,
}

impl Isa {
    /// The best this processor has, if any.
    pub fn detect() -> Option<Isa> {
        [Isa::Avx512, Isa::Avx2].into_iter().find(|isa| isa.available())
    }

    /// Whether this processor has it.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            avx2 && (self == Isa::Avx2 || is_x86_feature_detected!("avx512f"))
        }
        #[cfg(not(target_arch = "x86_64"))]
        false
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Vector;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// A vector register of floats. Everything is inlined into functions that switch the instructions on.
    pub(crate) trait Vector: Copy {
        const LANES: usize;
        /// Rows of x whose sums (two vectors each) fit the registers together.
        const ROWS: usize;
        unsafe fn splat(value: f32) -> Self;
        unsafe fn load(from: *const f32) -> Self;
        unsafe fn store(self, to: *mut f32);
        unsafe fn add_product(self, a: Self, b: Self) -> Self;
        /// The sum of its lanes, in an order of its own.
        unsafe fn sum(self) -> f32;
    }

    macro_rules! vector {
        ($type:ty, $lanes:literal, $rows:literal, $splat:ident, $load:ident, $store:ident, $fma:ident, $sum:expr) => {
            impl Vector for $type {
                const LANES: usize = $lanes;
                const ROWS: usize = $rows;
                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    unsafe { $splat(value) }
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn add_product(self, a: Self, b: Self) -> Self {
                    unsafe { $fma(a, b, self) }
                }
                #[inline(always)]
                unsafe fn sum(self) -> f32 {
                    unsafe { $sum(self) }
                }
            }
        };
    }
    vector!(__m512, 16, 8, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps, |v| {
        _mm512_reduce_add_ps(v)
    });
    vector!(__m256, 8, 6, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps, sum256);

    #[inline(always)]
    unsafe fn sum256(v: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}
