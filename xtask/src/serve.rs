//! `cargo xtask serve`: `hae serve`, judged by programs that others wrote, by many clients at once, and by how many
//! chats fit into the same bytes.

mod capacity;
mod client;
mod clients;
mod load;
pub mod program;
mod questions;
mod running;
mod schema;
mod server;
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
    /// Many clients at once, some of them rude: each answer has to be that of the question asked alone
    Load(load::Args),
    /// How many chats about pictures the same bytes of KV cache hold, by policy
    Capacity(capacity::Args),
}

/// Runs it. 0: all went as it should; 1: not so, and it was printed what.
///
/// # Errors
/// When a server cannot be started, or what asks it cannot be had: Python, pip, the network, the questions.
pub fn run(root: &Path, what: &What) -> Result<u8> {
    match what {
        What::Upstream(args) => upstream::run(root, args),
        What::Clients(args) => clients::run(root, args),
        What::Schema(args) => schema::run(root, args),
        What::Load(args) => load::run(root, args),
        What::Capacity(args) => capacity::run(root, args).map(|()| 0),
    }
}
