//! Byte-pair encoding.
//!
//! - `unicode`, `fast_split`, `split`: cutting text into pieces
//! - `key`, `count`, `corpus`: counting the pieces of a stream of documents
//! - `words`, `train`: the merge loop
//! - `vocab`, `cache`, `encode`: text to tokens
//! - `huge`, `prefetch`: huge pages and prefetching

pub mod cache;
pub mod corpus;
pub mod count;
pub mod encode;
pub mod fast_split;
mod huge;
pub mod key;
mod prefetch;
pub mod split;
pub mod train;
pub mod unicode;
pub mod vocab;
pub mod words;
