#![deny(unsafe_code)]

pub mod convert;
pub mod error;
#[allow(unsafe_code)]
pub mod llama;
pub mod outfile;
