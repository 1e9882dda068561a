//! `cargo xtask serve`: `hae serve`, judged by programs that others wrote.

mod clients;
mod program;
mod python;
mod running;
mod schema;
mod upstream;

use std::path::Path;

use anyhow::Result;

#[derive(clap::Subcommand)]
pub enum What {
    /// Ask the tests of llama.cpp's server, and write down what came of each
    Upstream(upstream::Args),
    /// Ask by OpenAI's Python package
    Clients(clients::Args),
    /// Send what /openapi.json allows, and what it does not, for some minutes
    Schema(schema::Args),
}

/// Runs it. 0: all went as it should; 1: not so, and it was printed what.
///
/// # Errors
/// Without Python, pip, the network, or a program that can be built.
pub fn run(root: &Path, what: &What) -> Result<u8> {
    match what {
        What::Upstream(args) => upstream::run(root, args),
        What::Clients(args) => clients::run(root, args),
        What::Schema(args) => schema::run(root, args),
    }
}
