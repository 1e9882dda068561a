//! The lines of a results file: a header, then one record for each answered question and policy.
//! `docs/results.md` tells what each field means to those who read the file.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::answer::{Bin, Evicted, Kv, Timings, Tokens};
use crate::attend::{Attend, Shares};
use crate::generate::Finish;
use crate::policy::Amount;

/// Of the format; a reader refuses a newer one.
pub const VERSION: u32 = 1;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "lowercase")]
pub enum Record {
    /// The first line.
    Header(Box<Header>),
    /// Every other line.
    Answer(Box<Answer>),
}

/// What all answers of a file have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`] when it was written.
    pub version: u32,
    /// `eval` or `compare`.
    pub command: String,
    /// Seconds since 1970 when the file was begun.
    pub time: u64,
    /// As in `hae run -o json`.
    pub build: Value,
    /// The text model.
    pub model: FileId,
    /// The vision file, if there was one.
    pub mmproj: Option<FileId>,
    /// Which questions were asked.
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
    /// Its name.
    pub file: String,
    /// Of its content, in hexadecimal digits.
    pub sha256: String,
}

/// Which questions were asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuestionSet {
    /// The question file.
    #[serde(flatten)]
    pub file: FileId,
    /// The name of its format.
    pub format: String,
    /// The part of the held-out split, with its share: `tune:0.5`, `test:0.5`, or all.
    pub part: Option<String>,
    /// Every how manieth question of each task.
    pub every: usize,
    /// Questions at most, where that was chosen.
    pub limit: Option<usize>,
    /// Questions that are left; each turn of a chat is one.
    pub n: usize,
}

/// A policy at a budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Contender {
    /// Unique in the file: the policy, and `@` its budget.
    pub name: String,
    /// The policy's name.
    pub policy: String,
    /// As it was asked for; none where the policy was left its default or has none.
    pub budget: Option<Amount>,
    /// Its parameters, as reports show them.
    pub params: Value,
    /// How its cache is made, where the policy decides that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheReport>,
}

/// How a cache is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheReport {
    /// What K is stored as, as `-ctk` spells it.
    pub type_k: String,
    /// What V is stored as.
    pub type_v: String,
    /// What decoding steps attend to; absent: everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attend: Option<Attend>,
}

impl Contender {
    /// `hae@0.4`, or the policy alone where it has no budget.
    pub fn name_of(policy: &str, budget: Option<Amount>) -> String {
        match budget {
            Some(budget) => format!("{policy}@{budget}"),
            None => policy.to_owned(),
        }
    }
}

/// One question under one policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The question's.
    pub id: String,
    /// Which question of a chat; 0 for all others.
    pub turn: usize,
    /// The kind of question.
    pub task: String,
    /// The contender's name.
    pub contender: String,
    /// The contender's policy.
    pub policy: String,
    /// The contender's budget.
    pub budget: Option<Amount>,
    /// The pictures of the whole conversation.
    pub images: Vec<String>,
    /// Crops of a picture at most, where that was chosen.
    pub num_crops: Option<u32>,
    /// What was asked in this turn.
    pub prompt: String,
    /// Every answer that counts as right; empty where none is known, or facts are checked.
    pub expected: Vec<String>,
    /// What was answered.
    pub answer: String,
    /// None where no right answer is known, or facts are checked.
    pub right: Option<bool>,
    /// The letter that was read from the answer to a multiple-choice question.
    pub chosen: Option<char>,
    /// Of a story.
    pub facts: Option<FactScore>,
    /// How near the answer is to the nearest that is right, 0 to 1, where that is scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anls: Option<f64>,
    /// Why the answer ended.
    pub finish: Finish,
    /// How many went in and came out.
    pub tokens: Tokens,
    /// What it took of the cache.
    pub kv: Kv,
    /// What decoding steps attended to, where they looked cells up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attended: Option<Shares>,
    /// How long it took.
    pub timings: Timings,
    /// What left the cache, and came back.
    pub evicted: Evicted,
    /// Where rows of it wait, where some did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bin: Option<Bin>,
    /// To the full cache's predictions, where they were compared.
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
    /// The median.
    pub kl_median: f64,
    /// The 99th percentile.
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
    /// Under the policy.
    pub log_prob: f64,
    /// Tokens in these sums.
    pub n_tokens: usize,
}
