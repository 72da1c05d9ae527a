//! What nanochat_jax has in Rust, as one Python extension module: byte-pair encoding and, beside it, the kernels of the
//! decoder on CPU.
//!
//! - `bpe`: a trainer and an encoder
//! - `cpu_kernels`: few rows times a large matrix, attention of one token per row, the k largest of a row, each as a
//!   custom call of XLA
//! - `python`: the Python class and functions; nothing else knows Python

pub mod bpe;
pub mod cpu_kernels;
pub mod error;
mod python;
