//! All integration tests in one program: each test binary would link llama.cpp once more.

mod bin;
mod house;
mod image;
mod masked;
mod npz;
