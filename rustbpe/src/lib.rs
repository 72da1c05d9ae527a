//! What nanochat_jax has in Rust, as a Python extension module: byte-pair encoding, a trainer and an encoder, and three
//! kernels for the decoder on CPU.
//!
//! - `unicode`, `fast_split`, `split`: cutting text into pieces
//! - `key`, `count`, `corpus`: counting the pieces of a stream of documents
//! - `words`, `train`: the merge loop
//! - `vocab`, `cache`, `encode`: text to tokens
//! - `huge`, `prefetch`: kindness to the memory system
//! - `vector`, `parts`, `skinny`, `attend`, `largest`: a few rows times a large matrix, attention of one token per row,
//!   the k largest of a row
//! - `xla`, `custom_calls`: the same as custom calls of XLA
//! - `python`: the Python class and function; nothing else knows Python

pub mod attend;
pub mod cache;
pub mod corpus;
pub mod count;
mod custom_calls;
pub mod encode;
pub mod error;
pub mod fast_split;
mod huge;
pub mod key;
pub mod largest;
pub mod parts;
mod prefetch;
mod python;
pub mod skinny;
pub mod split;
pub mod train;
pub mod unicode;
pub mod vector;
pub mod vocab;
pub mod words;
mod xla;
