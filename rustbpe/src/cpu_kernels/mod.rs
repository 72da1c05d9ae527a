//! Kernels for decoding on CPU, where XLA is slow for few rows.
//!
//! - `small_batch_matmul`, `attend`, `top_k`: the three kernels
//! - `vector`, `work_queue`: vector registers, and blocks of work that threads share
//! - `xla`, `custom_calls`: XLA's foreign function interface, and the kernels behind it

pub mod attend;
pub(crate) mod custom_calls;
pub mod small_batch_matmul;
pub mod top_k;
pub mod vector;
pub mod work_queue;
pub(crate) mod xla;
