//! All integration tests in one program: each test binary would link llama.cpp once more.

mod allocations;
mod bin;
mod controller;
mod ddes;
mod house;
mod image;
mod masked;
mod model;
mod npz;
mod parity;
mod random;
mod references;
