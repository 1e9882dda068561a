//! What is asked of the hall, and what it tells while it answers.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::answer::Answer;
use crate::attend::Attend;
use crate::engine::{Constraint, Token};
use crate::error::{Error, Result};
use crate::generate::Finish;
use crate::image::Picture;
use crate::llama::SamplerOptions;
use crate::policy::PolicySpec;

/// A part of a prompt, in the order in which the model sees them.
#[derive(Clone, Debug)]
pub enum Part {
    /// Text as the chat template made it: special tokens are read as such.
    Text(String),
    /// A picture in the place of a marker.
    Picture(Arc<Picture>),
    /// Ids of the vocabulary, as they are.
    Tokens(Vec<Token>),
}

/// A question: a whole prompt, whatever a slot may hold of it already.
pub struct Ask {
    /// The whole prompt. A slot that holds the beginning of it goes on from there.
    pub prompt: Vec<Part>,
    /// Tokens to generate at most; `None`: until the model ends or the context is full.
    pub n_predict: Option<usize>,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Texts that end the answer; they are not part of it. None is empty.
    pub stop: Vec<String>,
    /// Likeliest tokens to tell of with each token, with their probabilities; 0: none.
    pub n_probs: usize,
    /// What the answer must keep to.
    pub constraint: Option<Box<dyn Constraint>>,
    /// What leaves the cache; `None`: as the server was started.
    pub policy: Option<PolicySpec>,
    /// What decoding steps attend to; `None`: as the server was started.
    pub attend: Option<Attend>,
    /// The slot that has to answer; `None`: the one that holds most of the prompt, else the one that
    /// was idle longest.
    pub slot: Option<usize>,
    /// Whether what a slot holds of the prompt may be used (llama.cpp's `cache_prompt`).
    pub cache_prompt: bool,
}

/// A token and how likely it was.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Its id.
    pub token: Token,
    /// Its bytes, which may be a part of a character.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability, before sampling (temperature 1, no cut).
    pub logprob: f32,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// As the loop says.
    Finish(Finish),
    /// A text of [`Ask::stop`] came, this one.
    Stop(String),
}

/// What is told of an answer, in this order: `Slot`, `Prompt` any number of times, `Said` any number of
/// times, then `Ended` or `Failed`, once.
#[derive(Debug)]
pub enum Told {
    /// A slot took the question, and holds so many of the prompt's tokens already.
    Slot {
        /// Its number.
        slot: usize,
        /// Tokens that it held.
        cached: usize,
        /// Tokens of the prompt in all.
        prompt: usize,
    },
    /// So many rows of the prompt of all that have to go in are in.
    Prompt {
        /// Rows that are in.
        done: usize,
        /// Rows in all.
        rows: usize,
    },
    /// A token was chosen. `text`: characters that are whole now and cannot begin a stop text any more,
    /// maybe none. `likeliest` has `n_probs` choices, likeliest first, `chosen` the one that was taken; where
    /// `n_probs` is 0 neither is computed.
    Said {
        /// The token's id.
        token: Token,
        /// May be empty.
        text: String,
        /// How likely it was.
        chosen: Option<Choice>,
        /// The likeliest.
        likeliest: Vec<Choice>,
    },
    /// It is over. `rest`: text that was held back. The answer's `text` is the whole of it.
    Ended {
        /// Why.
        end: End,
        /// May be empty.
        rest: String,
        /// All of it, and what it cost.
        answer: Box<Answer>,
    },
    /// It could not be answered; the slot is empty now. [`Error::Option`] and [`Error::PromptTooLong`] are
    /// the asker's to mend.
    Failed(Error),
}

/// Why a question was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The queue is full. Ask again later.
    Busy,
    /// The hall is closing.
    Closing,
}

/// What the hall is and does right now.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct SlotState {
    /// Its number, from 0.
    pub id: usize,
    /// Whether it has a question.
    pub is_processing: bool,
    /// Tokens of its prompt.
    pub n_prompt: usize,
    /// Tokens of its answer so far.
    pub n_decoded: usize,
    /// Cells of its conversation, by modality and state.
    pub cells: crate::cache::Counts,
    /// The policy that rules it.
    pub policy: String,
}

/// What asks. The HTTP interface knows no more of the model than this, so that its tests need none.
pub trait Hall: Send + Sync {
    /// Takes a question; it is answered from another thread. `tell` is called in order, must not block
    /// for long, and says whether anybody still listens: where not, the slot is free within a step.
    ///
    /// # Errors
    /// [`Refused`], and the question is lost.
    fn ask(
        &self,
        ask: Ask,
        tell: Box<dyn FnMut(Told) -> bool + Send>,
    ) -> std::result::Result<(), Refused>;
    /// What each slot does.
    fn slots(&self) -> Vec<SlotState>;
    /// Ids of a text; `special`: special tokens are read as such; `bos`: the model's first token is added.
    ///
    /// # Errors
    /// As [`crate::Model::tokenize`].
    fn tokenize(&self, text: &str, bos: bool, special: bool) -> Result<Vec<Token>>;
    /// Bytes of a token.
    ///
    /// # Errors
    /// [`Error::Contract`] for an id that is none.
    fn piece(&self, token: Token) -> Result<Vec<u8>>;
    /// Writes what a slot holds to a file, reads it back, or empties it; gives its tokens and bytes. Waits until
    /// the slot is idle.
    ///
    /// # Errors
    /// Those of sessions.
    fn save(&self, slot: usize, file: &std::path::Path) -> Result<(usize, u64)>;
    /// See [`Hall::save`].
    fn restore(&self, slot: usize, file: &std::path::Path) -> Result<(usize, u64)>;
    /// See [`Hall::save`].
    fn erase(&self, slot: usize) -> Result<usize>;
    /// No new questions; those that are there are answered until `cancel` is set.
    fn close(&self, cancel: Arc<AtomicBool>);
}
