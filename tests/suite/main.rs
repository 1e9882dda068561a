//! All integration tests in one program: each test binary would link llama.cpp once more.

mod allocations;
mod bench;
mod bin;
mod calibrate;
mod calibration;
mod chat;
mod cli;
mod controller;
mod convert;
mod convert_errors;
mod convert_metadata;
mod crafted;
mod crops;
mod damaged;
mod ddes;
#[cfg(feature = "kv-patches")]
mod early;
mod eval;
mod eval_distance;
mod eval_files;
mod eval_score;
#[cfg(feature = "kv-patches")]
mod failed;
mod files;
mod fixture;
mod full_model;
mod gguf;
#[cfg(feature = "kv-patches")]
mod holes;
mod house;
mod image;
mod inputs;
#[cfg(feature = "kv-patches")]
mod kv_cells;
#[cfg(feature = "kv-patches")]
mod kv_graphs;
#[cfg(all(feature = "kv-patches", target_os = "linux"))]
mod kv_memory;
#[cfg(feature = "kv-patches")]
mod kv_mirror;
#[cfg(feature = "kv-patches")]
mod kv_model;
#[cfg(feature = "kv-patches")]
mod kv_positions;
#[cfg(feature = "kv-patches")]
mod kv_session;
#[cfg(feature = "kv-patches")]
mod kv_state;
#[cfg(feature = "kv-patches")]
mod kv_streams;
#[cfg(feature = "kv-patches")]
mod kv_twin;
#[cfg(feature = "kv-patches")]
mod lookup;
mod masked;
#[cfg(feature = "kv-patches")]
mod midway;
mod model;
#[cfg(target_os = "linux")]
mod no_memory;
mod npz;
mod others;
mod parity;
mod policies;
mod polling;
mod precision;
mod quantize;
mod random;
#[cfg(feature = "kv-patches")]
mod random_llama;
mod recall;
mod references;
#[cfg(feature = "kv-patches")]
mod refused;
mod remake;
mod replay;
#[cfg(feature = "kv-patches")]
mod room;
mod rope;
mod runtime;
mod separators;
mod session;
mod signals;
mod stock;
#[cfg(feature = "kv-patches")]
mod taps;
#[cfg(feature = "kv-patches")]
mod taps_limits;
#[cfg(feature = "kv-patches")]
mod taps_oracle;
mod trace;
mod transcript;
#[cfg(feature = "kv-patches")]
mod two_questions;
mod understanding;
#[cfg(all(feature = "kv-patches", target_os = "linux"))]
mod wide;
