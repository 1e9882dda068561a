//! The command line, one file a command. Nothing below this module prints.

mod chat;
pub mod convert;
pub mod demo;
mod load;
pub mod options;
mod output;
pub mod quantize;
pub mod run;

/// Whether the reader of our output went away, which for a filter is no failure.
pub fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// A warning or a mistake that does not end the program.
fn warn(text: &str) {
    eprintln!("hae: {text}");
}
