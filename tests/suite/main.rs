//! One binary for all integration tests.

mod convert;
mod convert_errors;
mod convert_metadata;
mod fixture;
mod gguf;
mod quantize;
