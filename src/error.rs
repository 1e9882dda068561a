//! The one error type of the library. Messages are one line, lower-case, and carry the value
//! that was wrong and what was expected.

use std::path::{Path, PathBuf};

use crate::clean::clean;

/// A result of this library, by default with its [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Options and files are the user's to mend; [`Error::Cell`] and
/// [`Error::Contract`] are bugs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder that the system does not let us read or write.
    #[error("{path}: {cause}", path = shown(path))]
    Io {
        /// Where it is.
        path: PathBuf,
        /// Part of the message, so not a source: a chain would print it twice.
        cause: std::io::Error,
    },
    /// A file that is not what it should be. `reason` says what was found and what was expected.
    #[error("{path}: {reason}", path = shown(path))]
    File {
        /// Which file.
        path: PathBuf,
        /// What was found, and what was expected.
        reason: String,
    },
    /// An option that cannot be. `name` is its key, the field that it sets; a reason names other
    /// options by theirs, between backticks. The command line spells both as flags.
    #[error("{}: {reason}", quoted(name))]
    Option {
        /// The option's key, such as `n_ctx`.
        name: &'static str,
        /// What is wrong with its value, and what was expected.
        reason: String,
    },
    /// A prompt that does not fit, found out before any of it went in.
    #[error("prompt needs {needed} cells but the context holds {n_ctx}: give a larger `n_ctx`")]
    PromptTooLong {
        /// Cells that the cache would have to hold with it.
        needed: usize,
        /// Cells that it can hold.
        n_ctx: usize,
    },
    /// No cell is left for another token.
    #[error(
        "the context is full at {n_ctx} cells: give a larger `n_ctx`, a smaller `n_predict`, or `kv_policy` hae with a `kv_budget`"
    )]
    ContextFull {
        /// Cells that the cache can hold.
        n_ctx: usize,
    },
    /// A score that is no finite number: tokens could not be put in order by it.
    #[error("attention score of position {pos} is {value}, expected a finite number")]
    NanScore {
        /// The token's position.
        pos: i32,
        /// What was found.
        value: f32,
    },
    /// An answer that cannot go on as it must, by a grammar or a schema.
    #[error("the answer cannot go on: {reason}")]
    Constraint {
        /// What stands against it.
        reason: String,
    },
    /// The cache does not hold what its bookkeeping says: a bug, in a policy or an engine.
    #[error("cache bookkeeping: cell {cell} {reason}")]
    Cell {
        /// The cell's index.
        cell: u32,
        /// What was found there.
        reason: String,
    },
    /// An engine or a policy broke the contract of its trait: a bug.
    #[error("broken contract: {what}")]
    Contract {
        /// What was done that must not be.
        what: String,
    },
    /// A call into llama.cpp or ggml that failed.
    #[error("llama.cpp: {call} failed: {reason}")]
    Llama {
        /// The C function's name.
        call: &'static str,
        /// What it returned or logged.
        reason: String,
    },
    /// A model that does not come from the hub.
    #[error("{repo}: {reason}")]
    Hub {
        /// `user/repo`.
        repo: String,
        /// Why not.
        reason: String,
    },
    /// A question to a server that closes, or has closed, before it was answered.
    #[error("the server has closed")]
    Closed,
    /// A policy that needs what the memory of this model does not allow.
    #[error("kv policy {policy} cannot serve this model: {reason}")]
    Unsupported {
        /// The policy's name.
        policy: &'static str,
        /// What stands against it.
        reason: String,
    },
}

impl Error {
    /// An [`Error::Io`] at this path.
    pub fn io(path: impl Into<PathBuf>, cause: std::io::Error) -> Self {
        Error::Io {
            path: path.into(),
            cause,
        }
    }

    /// An [`Error::File`] at this path.
    pub fn file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Error::File {
            path: path.into(),
            reason: line(reason),
        }
    }

    /// An [`Error::Option`]; `name` is the option's key.
    pub fn option(name: &'static str, reason: impl Into<String>) -> Self {
        Error::Option {
            name,
            reason: line(reason),
        }
    }

    /// An [`Error::Constraint`].
    pub(crate) fn constraint(reason: impl Into<String>) -> Self {
        Error::Constraint {
            reason: line(reason),
        }
    }

    /// An [`Error::Cell`].
    pub(crate) fn cell(cell: u32, reason: impl Into<String>) -> Self {
        Error::Cell {
            cell,
            reason: line(reason),
        }
    }

    /// An [`Error::Contract`].
    pub(crate) fn contract(what: impl Into<String>) -> Self {
        Error::Contract { what: line(what) }
    }

    /// An [`Error::Llama`]; `call` is the C function's name.
    pub(crate) fn llama(call: &'static str, reason: impl Into<String>) -> Self {
        Error::Llama {
            call,
            reason: line(reason),
        }
    }
}

/// What a file says stands in reasons, and a name may be anything.
fn line(text: impl Into<String>) -> String {
    clean(&text.into())
}

fn shown(path: &Path) -> String {
    clean(&path.display().to_string())
}

/// A key between backticks; what is none, as it is.
pub(crate) fn quoted(name: &str) -> std::borrow::Cow<'_, str> {
    let is_key = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    match name.chars().all(is_key) {
        true => format!("`{name}`").into(),
        false => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key of a model, a field of a calibration and the name of a file are what a stranger wrote.
    #[test]
    fn a_message_is_one_line_whatever_stands_in_it() {
        let evil = "a\r\nb\x1b[2J\u{202e}";
        let errors = [
            Error::file(evil, evil),
            Error::io(evil, std::io::ErrorKind::NotFound.into()),
            Error::option("n_ctx", evil),
            Error::constraint(evil),
            Error::cell(1, evil),
            Error::contract(evil),
            Error::llama("call", evil),
        ];
        for error in errors {
            let line = error.to_string();
            assert_eq!(clean(&line), line);
            assert!(line.contains("a\\r\\nb\\u{1b}[2J\\u{202e}"), "{line}");
        }
    }
}
