//! What is asked of the hall, and what it tells while it answers.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::answer::Answer;
use crate::attend::Attend;
use crate::build::Build;
use crate::cache::Counts;
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
    /// How tokens are chosen. A repeat penalty looks back on the answer.
    pub sampler: SamplerOptions,
    /// Texts that end the answer; they are not part of it. None is empty.
    pub stop: Vec<String>,
    /// Likeliest tokens to tell of with each token, with their probabilities; 0: none.
    pub n_probs: usize,
    /// What the answer must keep to.
    pub constraint: Option<Box<dyn Constraint>>,
    /// What leaves the cache; `None`: as the server was started.
    pub policy: Option<PolicySpec>,
    /// What decoding steps attend to; `None`: as the server was started. That is the context's, which
    /// all slots share: anything else is refused.
    pub attend: Option<Attend>,
    /// The slot that has to answer; `None`: the one that holds most of the prompt, else the one that
    /// was idle longest.
    pub slot: Option<usize>,
    /// Whether what a slot holds of the prompt may be used (llama.cpp's `cache_prompt`).
    pub cache_prompt: bool,
    /// Whether [`Told::Seen`] is wanted.
    pub watch: bool,
}

/// An empty prompt, greedily, that uses what a slot holds.
impl Default for Ask {
    fn default() -> Self {
        Ask {
            prompt: Vec::new(),
            n_predict: None,
            sampler: SamplerOptions::default(),
            stop: Vec::new(),
            n_probs: 0,
            constraint: None,
            policy: None,
            attend: None,
            slot: None,
            cache_prompt: true,
            watch: false,
        }
    }
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

/// What has become of a patch of a picture, by the numbers of [`Seen::states`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Patch {
    /// It is in the cache.
    Live = 0,
    /// It is in the recycle bin.
    Binned = 1,
    /// It has left the cache.
    Evicted = 2,
    /// It is in the cache, and a layer chose it in the last step.
    LookedUp = 3,
}

/// The patches of a picture now.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Seen {
    /// The picture's number in the prompt, from 0.
    pub image: usize,
    /// Patches from left to right; where it is not known how they lie, about the root of their number.
    pub cols: usize,
    /// Patches from top to bottom.
    pub rows: usize,
    /// Where the picture lies on them, as shares of their width and height: left, top, width, height. `None`
    /// where it is not known how they lie.
    pub frame: Option<[f64; 4]>,
    /// [`Patch`] of each, row by row: `[rows * cols]`, or fewer in the last row where it is not known how they
    /// lie.
    pub states: Vec<u8>,
}

/// What is told of an answer, in this order: `Waits` any number of times, `Slot`, `Prompt` any number of
/// times, `Said` any number of times, then `Ended` or `Failed`, once. `Seen` comes behind the prompt and
/// between tokens.
#[derive(Debug)]
pub enum Told {
    /// It is in the queue still, or its answer waits for cells. Comes a few times a second, so that a client
    /// that went away is noticed.
    Waits {
        /// Questions before it.
        before: usize,
    },
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
    /// What has become of the pictures, where that was asked for.
    Seen {
        /// Tokens of the answer so far.
        step: usize,
        /// Cells of the conversation.
        cells: Counts,
        /// In the order of the prompt; those that are in the cache.
        pictures: Vec<Seen>,
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
    /// It could not be answered; the slot is empty now. [`Error::Option`], [`Error::PromptTooLong`] and
    /// [`Error::Unsupported`] are the asker's to mend; [`Error::Closed`] is told where the hall closed first.
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

/// What a slot is and does right now.
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
    pub cells: Counts,
    /// The policy that rules it.
    pub policy: String,
    /// Tokens that it holds of its conversation, whatever was evicted of them.
    pub n_held: usize,
    /// Cells that it may take, beside none of which others are let in.
    pub n_reserved: usize,
}

/// Embeddings of pictures that are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct PictureStats {
    /// Pictures.
    pub entries: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What these may be at most.
    pub most_bytes: u64,
    /// Pictures that needed no encoding.
    pub hits: u64,
    /// Pictures that were encoded.
    pub misses: u64,
    /// Seconds that encoding took.
    pub seconds: f64,
}

/// What the hall did since it was opened, and what it holds.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Stats {
    /// Tokens of prompts that went through the model.
    pub prompt_tokens: u64,
    /// Tokens of prompts that slots held already.
    pub cached_tokens: u64,
    /// Tokens of answers.
    pub predicted_tokens: u64,
    /// Seconds that questions spent in their prompts, added up over slots.
    pub prompt_seconds: f64,
    /// The same of their answers.
    pub predicted_seconds: f64,
    /// Steps of the loop.
    pub steps: u64,
    /// The same, each counted once for every slot that took part.
    pub slot_steps: u64,
    /// Cells of all slots now, by modality and state. `peak` is the sum of theirs.
    pub cells: Counts,
    /// Cells that the cache can hold.
    pub n_cells: usize,
    /// Bytes of the cells in use.
    pub bytes_in_use: u64,
    /// Bytes of the buffers behind the cache.
    pub bytes_allocated: u64,
    /// Bytes of evicted rows in main memory.
    pub bytes_host: u64,
    /// Tokens that were evicted.
    pub evicted: u64,
    /// Times that a token came back from the recycle bin.
    pub restored: u64,
    /// Times that an evicted token came back for a question or an answer.
    pub recalled: u64,
    /// Questions that wait.
    pub waiting: usize,
    /// Questions in slots.
    pub processing: usize,
    /// Questions that were refused.
    pub refused: u64,
    /// Questions that a slot took.
    pub questions: u64,
    /// Embeddings of pictures.
    pub pictures: PictureStats,
}

/// What does not change about the hall.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Facts {
    /// The model's file.
    pub model_path: PathBuf,
    /// What it is called here.
    pub alias: String,
    /// Its architecture.
    pub arch: String,
    /// What llama.cpp calls it: architecture, size and type.
    pub description: String,
    /// The chat template in its file.
    pub chat_template: Option<String>,
    /// How the vocabulary writes the token that a text begins with; may be empty.
    pub bos: String,
    /// The same of the token that ends a text.
    pub eos: String,
    /// Cells of the cache, which all slots share.
    pub n_ctx: usize,
    /// Slots.
    pub slots: usize,
    /// Whether it can be shown pictures.
    pub vision: bool,
    /// Whether every text between pictures begins with BOS.
    pub bos_per_text: bool,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Positions that the model was trained for.
    pub n_ctx_train: usize,
    /// Width of its embeddings.
    pub n_embd: usize,
    /// Bytes of its tensors.
    pub size: u64,
    /// Its weights, counted.
    pub n_params: u64,
    /// The policy of questions that name none.
    pub policy: String,
    /// Every parameter of it.
    pub policy_params: serde_json::Value,
    /// Layers whose attention is read: policies of questions have to ask for these, or for none.
    pub score_layers: Vec<u32>,
    /// What decoding steps attend to; `None`: everything.
    pub attend: Option<Attend>,
    /// What K is stored as.
    pub type_k: String,
    /// What V is stored as.
    pub type_v: String,
    /// What questions that say nothing of it are sampled with.
    pub sampler: SamplerOptions,
    /// The program; `None` in a test without a model.
    pub build: Option<Build>,
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
    /// What each slot does, as of the last step.
    fn slots(&self) -> Vec<SlotState>;
    /// What it did, as of the last step.
    fn stats(&self) -> Stats;
    /// What does not change.
    fn facts(&self) -> &Facts;
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
    /// Tokens of a prompt, those of its pictures included. Nothing is computed, and no slot is waited for.
    ///
    /// # Errors
    /// [`Error::Option`] for what cannot be read; [`Error::Closed`].
    fn count(&self, prompt: Vec<Part>) -> Result<usize>;
    /// Writes what a slot holds to a file, reads it back, or empties it; gives its tokens and the file's
    /// bytes. Waits until the slot is idle.
    ///
    /// # Errors
    /// Those of sessions; [`Error::Option`] for a slot that there is not; [`Error::Closed`].
    fn save(&self, slot: usize, file: &std::path::Path) -> Result<(usize, u64)>;
    /// See [`Hall::save`].
    fn restore(&self, slot: usize, file: &std::path::Path) -> Result<(usize, u64)>;
    /// See [`Hall::save`].
    fn erase(&self, slot: usize) -> Result<usize>;
    /// No new questions; those that are there are answered until `cancel` is set. Comes back when the model's
    /// thread has ended.
    fn close(&self, cancel: Arc<AtomicBool>);
}
