//! `cargo xtask soak`: conversations for minutes, compared step by step (`tests/suite/soak.rs`).

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::{setup, steps, vendor};

const TEST: &str = "soak::chats_for_minutes";

#[derive(clap::Args)]
pub struct Args {
    /// How long
    #[arg(long, default_value_t = 10.0, value_name = "N")]
    minutes: f64,
}

/// Prints a table of what was done, and of the memory that it took. 0: nothing differed; 1: something did.
///
/// # Errors
/// When the set-up fails or cargo cannot be run.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    ensure!(args.minutes > 0.0, "--minutes: expected more than 0");
    setup::run()?;
    vendor::run(root)?;
    let environment = [
        ("HAE_SOAK_MINUTES", args.minutes.to_string()),
        // glibc counts what is allocated in one arena only.
        ("MALLOC_ARENA_MAX", "1".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), OsString::from(value)));
    let test = ["test", "--release", "--locked", "--test", "suite", "--"];
    let words = [&test[..], &["--exact", TEST, "--nocapture"]].concat();
    let status = steps::cargo_with(root, &words, &environment)?;
    Ok(u8::from(!status.success()))
}
