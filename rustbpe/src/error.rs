//! What can go wrong, before it becomes a Python exception.

use std::fmt;

/// An error with a reason meant for the person who called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// An argument has an impossible value (`ValueError`).
    Value(String),
    /// A counter or index would not fit (`OverflowError`).
    Overflow(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Value(reason) | Error::Overflow(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for Error {}
