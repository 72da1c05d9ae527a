//! Byte-pair encoding for nanochat_jax: a trainer and an encoder, as a Python extension module.
//!
//! - `unicode`, `fast_split`, `split`: cutting text into pieces
//! - `key`, `count`, `corpus`: counting the pieces of a stream of documents
//! - `words`, `train`: the merge loop
//! - `vocab`, `cache`, `encode`: text to tokens
//! - `huge`, `prefetch`: kindness to the memory system
//! - `python`: the Python class; nothing else knows Python

pub mod cache;
pub mod corpus;
pub mod count;
pub mod encode;
pub mod error;
pub mod fast_split;
mod huge;
pub mod key;
mod prefetch;
mod python;
pub mod split;
pub mod train;
pub mod unicode;
pub mod vocab;
pub mod words;
