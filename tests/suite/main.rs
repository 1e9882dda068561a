//! All integration tests in one program: each test binary would link llama.cpp once more.

mod allocations;
mod bin;
mod chat;
mod cli;
mod controller;
mod convert;
mod convert_errors;
mod convert_metadata;
mod damaged;
mod ddes;
mod fixture;
mod gguf;
mod house;
mod image;
#[cfg(feature = "kv-patches")]
mod kv_cells;
#[cfg(feature = "kv-patches")]
mod kv_model;
#[cfg(feature = "kv-patches")]
mod kv_state;
#[cfg(feature = "kv-patches")]
mod kv_streams;
mod masked;
mod model;
mod npz;
mod others;
mod parity;
mod quantize;
mod random;
mod references;
mod remake;
mod rope;
mod runtime;
mod stock;
mod transcript;
mod understanding;
