//! What the commands share that ask a model questions under cache policies: `hae eval` and
//! `hae compare` all of it ([`Evaluation`]), `hae calibrate` its parts.
//!
//! [`InferenceArgs`] loads a model, [`QuestionArgs`] reads what it is asked, [`Runner`] asks each
//! question under each policy and saves the answers, and the tables are in `print`.

mod args;
mod evaluation;
mod print;
mod questions;
mod run;
mod text;

pub use args::{InferenceArgs, Loaded};
pub use evaluation::{Evaluation, EvaluationArgs};
pub use print::{Format, percent, print_answers, print_json, print_summary, summary_text, write};
pub use questions::{QuestionArgs, Questions};
pub use run::{Runner, progress_bar};
pub use text::TextArgs;
