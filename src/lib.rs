pub mod cache;
pub mod controller;
pub mod engine;
pub mod error;
pub mod generate;
pub mod policy;

pub use error::{Error, Result};
