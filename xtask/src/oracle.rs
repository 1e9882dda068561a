//! `cargo xtask oracle`: what `hae` reads and writes, beside files and programs of others that say what is right.
//! They are fetched once and lie in `target/oracle`, which Git ignores.

mod gguf;
mod pictures;
mod tokenizers;

use std::path::Path;

use anyhow::Result;

/// Below the repository's root; Git ignores it.
const FOLDER: &str = "target/oracle";

#[derive(clap::Subcommand)]
pub enum What {
    /// The tokens of llama.cpp's texts, by every vocabulary that its tests have
    Tokenizers(tokenizers::Args),
    /// What `hae convert` writes, read by llama.cpp's Python package
    Gguf(gguf::Args),
    /// Pictures of Pillow's and pypng's tests, decoded by hae and by Pillow
    Pictures(pictures::Args),
}

/// Runs it. 0: all is as it should be; 1: not so, and it was printed what.
///
/// # Errors
/// When `hae` cannot be built, or what it is compared with cannot be had: Python, pip, the network.
pub fn run(root: &Path, what: &What) -> Result<u8> {
    match what {
        What::Tokenizers(args) => tokenizers::run(root, args),
        What::Gguf(args) => gguf::run(root, args),
        What::Pictures(args) => pictures::run(root, args),
    }
}
