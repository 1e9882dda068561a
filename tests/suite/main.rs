//! All integration tests in one program: each test binary would link llama.cpp once more.

mod allocations;
mod bin;
mod controller;
mod convert;
mod convert_errors;
mod convert_metadata;
mod ddes;
mod fixture;
mod gguf;
mod house;
mod image;
mod masked;
mod model;
mod npz;
mod parity;
mod quantize;
mod random;
mod references;
mod rope;
mod stock;
mod understanding;
