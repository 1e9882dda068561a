//! Vision-language GGUFs with a KV cache that stays small.
//!
//! A prompt is text and pictures. [`image`] decodes a picture, [`llama::Vision`] turns it into
//! embeddings, and [`generate`] feeds tokens and embeddings to an [`engine::Engine`], which says
//! which [`cache`] cell each token went to and how much attention the cells had. A
//! [`controller::Controller`] keeps that in a ledger and asks an eviction [`policy`] what to bin,
//! restore and remove; the loop hands the removals back to the engine. [`llama`] is the engine
//! that runs real models, [`conversation`] ties the parts together, [`convert`] makes GGUFs from a
//! Hugging Face directory.

#![deny(unsafe_code)]

pub mod asker;
pub mod attend;
pub mod bench;
pub mod build;
pub mod cache;
pub mod calibrate;
pub mod controller;
pub mod conversation;
pub mod convert;
#[cfg(feature = "embedded-model")]
pub mod embedded;
pub mod engine;
mod error;
pub mod eval;
pub mod generate;
pub mod guard;
pub mod image;
#[allow(unsafe_code)]
pub mod llama;
pub mod noise;
pub mod outfile;
pub mod policy;
pub mod prompt;
pub mod quantile;
pub mod replay;
#[cfg(feature = "report")]
pub mod report;
pub mod saved;
pub mod tempfiles;
pub mod text;
pub mod trace;

pub use error::{Error, Result};
