#![deny(unsafe_code)]

pub mod error;
pub mod image;

pub use error::{Error, Result};
