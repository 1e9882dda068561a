//! Vision-language GGUFs with a KV cache that stays small.
//!
//! ```
//! use hae::embedded::{self, Embedded};
//! use hae::image::{Limits, decode};
//! use hae::llama::{ModelOptions, VisionOptions};
//! use hae::{Chat, Model, PolicySpec, Vision};
//!
//! # fn main() -> hae::Result<()> {
//! // The small model inside this crate; any GGUF and its vision file do.
//! let files = Embedded::unpack()?;
//! let model = Model::load(files.model(), &ModelOptions::default())?;
//! let vision = Vision::load(files.mmproj(), &model, &VisionOptions::default())?;
//! let mut picture = decode("demo.png".as_ref(), embedded::PICTURE, &Limits::default())?;
//! picture.num_crops = Some(embedded::PICTURE_CROPS);
//!
//! let mut chat = Chat::open(model, Some(vision), PolicySpec::hae())?;
//! let answer = chat.ask("Where is the red triangle?", &[picture])?;
//! assert_eq!(answer.text.trim(), "Row 6, column 7");
//! // Visual tokens that the question does not look at have left the cache.
//! assert!(answer.kv.cells.evicted.vision > 0);
//! # Ok(())
//! # }
//! ```
//!
//! A prompt is text and pictures. [`image`] decodes a picture, [`llama::Vision`] turns it into
//! embeddings, and [`generate`] feeds tokens and embeddings to an [`engine::Engine`], which says
//! which [`cache`] cell each token went to and how much attention the cells had. A
//! [`controller::Controller`] keeps that in a ledger and asks an eviction [`policy`] what to bin,
//! restore and remove; the loop hands the removals back to the engine. [`llama`] is the engine
//! that runs real models, [`open`] makes its contexts, [`turn`] answers one question, [`chat`] many of them, [`convert`] makes GGUFs from a
//! Hugging Face directory.

#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod answer;
pub mod asker;
pub mod attend;
pub mod bench;
pub mod build;
pub mod cache;
pub mod calibrate;
pub mod chat;
pub mod clean;
pub mod constrain;
pub mod controller;
pub mod convert;
#[cfg(feature = "embedded-model")]
pub mod embedded;
pub mod engine;
mod error;
pub mod eval;
pub mod generate;
pub mod guard;
#[cfg(feature = "hub")]
pub mod hub;
pub mod image;
pub mod inspect;
#[allow(unsafe_code)]
pub mod llama;
pub mod memory;
pub mod noise;
pub mod open;
pub mod outfile;
pub mod policy;
pub mod prompt;
pub mod quantile;
pub mod replay;
#[cfg(feature = "report")]
pub mod report;
pub mod saved;
pub mod serve;
pub mod tempfiles;
pub mod text;
pub mod trace;
pub mod turn;

pub use chat::{Chat, ChatOptions};
pub use error::{Error, Result};
pub use image::Picture;
pub use llama::{Model, Vision};
pub use policy::PolicySpec;
