//! Traces without a model: any policy on what a full cache saw, or the policy of the trace on
//! what it saw itself.
//!
//! [`replay`] runs the ordinary loops ([`crate::generate`]) on an engine that answers from a
//! trace of `full`. [`verify`] holds a policy against its own decisions. [`Player`] follows a
//! trace as it was, for reports.

mod compare;
mod engine;
mod play;
mod run;
mod tape;
mod verify;

pub use compare::{Against, Contender, Conversation, Row, Summary, compare, summarize};
pub use engine::TapeEngine;
pub use play::Player;
pub use run::{Lost, Moment, Replayed, replay};
pub use tape::{Tape, Turn, tapes};
pub use verify::{Verified, verify};

#[cfg(test)]
mod tests;
