//! The lines of a results file: a header, then one record for each answered question and policy.
//! `docs/results.md` tells what each field means to those who read the file.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::{Evicted, Kv, Timings, Tokens};
use crate::attend::Shares;
use crate::generate::Finish;
use crate::policy::Amount;

/// Of the format; a reader refuses a newer one.
pub const VERSION: u32 = 1;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "lowercase")]
pub enum Record {
    Header(Box<Header>),
    Answer(Box<Answer>),
}

/// What all answers of a file have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub version: u32,
    /// `eval` or `compare`.
    pub command: String,
    /// Seconds since 1970 when the file was begun.
    pub time: u64,
    /// As in `hae run -o json`.
    pub build: Value,
    pub model: FileId,
    pub mmproj: Option<FileId>,
    pub questions: QuestionSet,
    /// As in `hae run -o json`.
    pub context: Value,
    /// Seeds whatever is random in a policy. Answers are greedy.
    pub seed: u64,
    /// Tokens of an answer at most, where that was chosen.
    pub n_predict: Option<usize>,
    /// Whether distances to the full cache are measured.
    pub distance: bool,
    /// In the order in which they were asked for; the first is what the others compare to.
    pub contenders: Vec<Contender>,
}

/// A file by name and content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    pub file: String,
    pub sha256: String,
}

/// Which questions were asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuestionSet {
    #[serde(flatten)]
    pub file: FileId,
    pub format: String,
    /// The part of the held-out split, with its share: `tune:0.5`, `test:0.5`, or all.
    pub part: Option<String>,
    /// Every how manieth question of each task.
    pub every: usize,
    pub limit: Option<usize>,
    /// Questions that are left; each turn of a chat is one.
    pub n: usize,
}

/// A policy at a budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Contender {
    /// Unique in the file: the policy, and `@` its budget.
    pub name: String,
    pub policy: String,
    /// As it was asked for; none where the policy was left its default or has none.
    pub budget: Option<Amount>,
    pub params: Value,
}

/// One question under one policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub id: String,
    /// Which question of a chat; 0 for all others.
    pub turn: usize,
    pub task: String,
    pub contender: String,
    pub policy: String,
    pub budget: Option<Amount>,
    /// The pictures of the whole conversation.
    pub images: Vec<String>,
    pub num_crops: Option<u32>,
    pub prompt: String,
    /// Every answer that counts as right; empty where none is known, or facts are checked.
    pub expected: Vec<String>,
    pub answer: String,
    pub right: Option<bool>,
    /// The letter that was read from the answer to a multiple-choice question.
    pub chosen: Option<char>,
    pub facts: Option<FactScore>,
    pub finish: Finish,
    pub tokens: Tokens,
    pub kv: Kv,
    /// What decoding steps attended to, where they looked cells up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attended: Option<Shares>,
    pub timings: Timings,
    pub evicted: Evicted,
    pub distance: Option<Distance>,
    /// A trace of the decisions, if one was written.
    pub trace: Option<String>,
}

/// What a story says, against what it should say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FactScore {
    /// Mentions that the story has to make.
    pub required: usize,
    /// Those that it makes.
    pub made: usize,
    /// Statements that it makes in all.
    pub said: usize,
    /// Those that are true.
    #[serde(rename = "true")]
    pub correct: usize,
    /// `made` for each of the question's facts, in their order.
    pub by_fact: Vec<usize>,
}

/// How far a policy's predictions are from the full cache's, both fed the full cache's own greedy
/// answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distance {
    /// Mean, median and 99th percentile of `kl`.
    pub kl_mean: f64,
    pub kl_median: f64,
    pub kl_p99: f64,
    /// Share of the predictions whose likeliest token is the same.
    pub top1: f64,
    /// The perplexity of the full cache's answer under the policy, over that under the full cache.
    pub ppl_ratio: f64,
    /// Mean of `lost`; none where attention could not be read, or nothing was decoded.
    pub attention_lost: Option<f64>,
    /// The first prediction whose likeliest token differs.
    pub first_differing: Option<usize>,
    /// For each predicted token, the one that ends the answer included: the Kullback-Leibler
    /// divergence of the policy's distribution from the full cache's, in nats.
    pub kl: Vec<f32>,
    /// For each token that was fed: the share of the full cache's attention that went to cells
    /// that the policy does not have.
    pub lost: Vec<f32>,
    /// Logarithm of the probability of the full cache's own tokens, under each of the two, summed.
    pub log_prob_full: f64,
    pub log_prob: f64,
    /// Tokens in these sums.
    pub n_tokens: usize,
}
