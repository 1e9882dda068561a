//! All integration tests in one program: each test binary would link llama.cpp once more.

mod allocations;
mod bench;
mod bin;
mod chat;
mod cli;
mod controller;
mod convert;
mod convert_errors;
mod convert_metadata;
mod crops;
mod damaged;
mod ddes;
mod early;
mod eval;
mod eval_distance;
mod eval_files;
mod eval_score;
mod fixture;
mod full_model;
mod gguf;
#[cfg(feature = "kv-patches")]
mod holes;
mod house;
mod image;
#[cfg(feature = "kv-patches")]
mod kv_cells;
#[cfg(all(feature = "kv-patches", target_os = "linux"))]
mod kv_memory;
#[cfg(feature = "kv-patches")]
mod kv_model;
#[cfg(feature = "kv-patches")]
mod kv_positions;
#[cfg(feature = "kv-patches")]
mod kv_state;
#[cfg(feature = "kv-patches")]
mod kv_streams;
mod masked;
mod model;
mod npz;
mod others;
mod parity;
mod policies;
mod quantize;
mod random;
mod recall;
mod references;
mod remake;
mod replay;
mod rope;
mod runtime;
mod session;
mod stock;
#[cfg(feature = "kv-patches")]
mod taps;
mod trace;
mod transcript;
mod understanding;
#[cfg(all(feature = "kv-patches", target_os = "linux"))]
mod wide;
