//! The one error type of the library. Messages are one line, lower-case, and carry the value
//! that was wrong and what was expected.

use std::path::PathBuf;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{path}: {cause}", path = path.display())]
    Io {
        path: PathBuf,
        /// Part of the message, so not a source: a chain would print it twice.
        cause: std::io::Error,
    },
    /// A file that is not what it should be. `reason` says what was found and what was expected.
    #[error("{path}: {reason}", path = path.display())]
    File { path: PathBuf, reason: String },
    /// An option that cannot be. `name` is its key, the field that it sets; a reason names other
    /// options by theirs, between backticks. The command line spells both as flags.
    #[error("{}: {reason}", quoted(name))]
    Option { name: &'static str, reason: String },
    #[error("prompt needs {needed} cells but the context holds {n_ctx}: give a larger `n_ctx`")]
    PromptTooLong { needed: usize, n_ctx: usize },
    #[error(
        "the context is full at {n_ctx} cells: give a larger `n_ctx`, a smaller `n_predict`, or `kv_policy` hae with a `kv_budget`"
    )]
    ContextFull { n_ctx: usize },
    #[error("attention score of position {pos} is {value}, expected a finite number")]
    NanScore { pos: i32, value: f32 },
    /// The cache does not hold what its bookkeeping says: a bug, in a policy or an engine.
    #[error("cache bookkeeping: cell {cell} {reason}")]
    Cell { cell: u32, reason: String },
    /// An engine or a policy broke the contract of its trait: a bug.
    #[error("broken contract: {what}")]
    Contract { what: String },
    #[error("llama.cpp: {call} failed: {reason}")]
    Llama { call: &'static str, reason: String },
    #[error("kv policy {policy} cannot serve this model: {reason}")]
    Unsupported {
        policy: &'static str,
        reason: String,
    },
}

impl Error {
    pub fn io(path: impl Into<PathBuf>, cause: std::io::Error) -> Self {
        Error::Io {
            path: path.into(),
            cause,
        }
    }

    pub fn file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Error::File {
            path: path.into(),
            reason: reason.into(),
        }
    }

    pub fn option(name: &'static str, reason: impl Into<String>) -> Self {
        Error::Option {
            name,
            reason: reason.into(),
        }
    }

    pub fn cell(cell: u32, reason: impl Into<String>) -> Self {
        Error::Cell {
            cell,
            reason: reason.into(),
        }
    }

    pub fn contract(what: impl Into<String>) -> Self {
        Error::Contract { what: what.into() }
    }

    pub fn llama(call: &'static str, reason: impl Into<String>) -> Self {
        Error::Llama {
            call,
            reason: reason.into(),
        }
    }
}

/// A key between backticks; what is none, as it is.
pub(crate) fn quoted(name: &str) -> std::borrow::Cow<'_, str> {
    let is_key = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    match name.chars().all(is_key) {
        true => format!("`{name}`").into(),
        false => name.into(),
    }
}
