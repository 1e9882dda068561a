//! All integration tests in one program: each test binary would link llama.cpp once more.

mod allocations;
mod bin;
mod controller;
mod house;
mod image;
mod model;
mod npz;
mod parity;
mod references;
