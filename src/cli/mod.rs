//! The command line, one file a command. Nothing below this module prints.

mod answer;
mod asking;
pub mod bench;
pub mod calibrate;
mod calibration;
mod chat;
pub mod compare;
pub mod convert;
mod crops;
pub mod demo;
pub mod eval;
pub mod help;
mod inputs;
pub mod inspect;
pub mod interrupt;
mod lists;
mod load;
mod named;
pub mod options;
mod output;
pub mod plan;
pub mod polling;
pub mod quantize;
pub mod replay;
pub mod report;
pub mod rpc_worker;
pub mod run;
#[cfg(feature = "serve")]
pub mod serve;
mod session;
pub mod spell;
mod table;
pub mod tokenize;

use std::io::Write;

/// How a command ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Whole,
    /// All is out, but a threshold was missed.
    Missed,
    /// A signal ended it early; what there was is out.
    Interrupted,
}

/// Whether the reader of our output went away, which for a filter is no failure.
pub fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Whether our output could not be written, wherever it went.
pub fn is_of_output(e: &anyhow::Error) -> bool {
    e.downcast_ref::<hae::Error>().is_none() && e.chain().any(|cause| cause.is::<std::io::Error>())
}

/// One line on stderr, whatever a file's name or a file itself put into it. Nobody is left to
/// tell when stderr is closed.
pub fn note(text: &str) {
    let line: String = spell::spelled(text)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A warning or a mistake that does not end the program.
pub fn warn(text: &str) {
    note(&format!("hae: {text}"));
}

/// Shows llama.cpp's log on stderr from now on.
pub fn show_log() {
    hae::llama::log::show(|line| {
        let _ = write!(std::io::stderr(), "{line}");
    });
}
