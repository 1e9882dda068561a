//! `cargo xtask oracle`: what hae reads of files that others made, beside what other programs read of them.

mod pictures;

use std::path::Path;

use anyhow::Result;

#[derive(clap::Subcommand)]
pub enum Oracle {
    /// Pictures of Pillow's and pypng's tests, decoded by hae and by Pillow
    Pictures(pictures::Args),
}

/// Runs it. 0: all went as it should; 1: not so, and it was printed what.
///
/// # Errors
/// When what is compared with cannot be had: Python, pip, the network.
pub fn run(root: &Path, what: &Oracle) -> Result<u8> {
    match what {
        Oracle::Pictures(args) => pictures::run(root, args),
    }
}
