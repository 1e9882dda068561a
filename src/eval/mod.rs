//! Questions with known answers, and what a cache policy makes of them.
//!
//! [`question`] is a question from any of the [`files`], or from [`long_text`], which makes some; [`score`], [`held`],
//! [`anls`] and [`facts`] judge an answer,
//! [`distance`] compares a policy's predictions with those of the full cache, also of a text that is
//! only read ([`reading`]) or gone on with ([`continuation`]); [`divergence`] compares them with a file
//! of llama.cpp's ([`log_probs`]). What was asked and
//! answered is a line of [`record`], kept by [`results`] as it comes, and [`summary`] makes shares,
//! intervals and tests of it with [`stats`]. Nothing here knows a model: [`crate::asker`] has one.

pub mod anls;
pub mod continuation;
pub mod distance;
pub mod divergence;
pub mod facts;
pub mod files;
pub mod held;
pub mod log_probs;
pub mod long_text;
pub mod plain;
mod pooled;
pub mod question;
pub mod reading;
pub mod record;
pub mod results;
pub mod score;
pub mod split;
pub mod stats;
pub mod summary;
