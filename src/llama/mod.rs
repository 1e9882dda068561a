//! The only home of llama.cpp types and of `unsafe`.

pub mod gguf;
pub mod quantize;
