//! How an answer may end, how it ended, and what it took.

use std::time::Duration;

use crate::attend::Attended;
use crate::cache::PerModality;
use crate::engine::Token;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model said so.
    Eog,
    /// `n_predict` tokens are out.
    Length,
    /// No cell is left for another token.
    Context,
    /// No position is left that the model's rope factors reach.
    Positions,
    /// The caller's hook said so.
    Cancelled,
}

/// How long an answer may become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Length {
    /// Tokens that were asked for; policies leave room for them. `None`: until the model ends.
    pub n_predict: Option<usize>,
    /// Tokens that the model's rope factors reach behind the prompt, where they end somewhere.
    /// Nobody expects an answer of that length, so no room is left for it.
    pub reach: Option<usize>,
}

impl Length {
    /// What ends an answer of so many tokens, if anything does.
    pub(super) fn ends(self, tokens: usize) -> Option<Finish> {
        if self.n_predict == Some(tokens) {
            return Some(Finish::Length);
        }
        (self.reach == Some(tokens)).then_some(Finish::Positions)
    }

    /// Tokens to come, if that is known.
    pub(super) fn expected(self) -> Option<usize> {
        let n = self.n_predict?;
        Some(self.reach.map_or(n, |reach| n.min(reach)))
    }
}

impl From<Option<usize>> for Length {
    fn from(n_predict: Option<usize>) -> Self {
        Length {
            n_predict,
            reach: None,
        }
    }
}

/// One turn's answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// All of it, in whole characters.
    pub text: String,
    /// The answer's tokens, without the one that ended it.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub finish: Finish,
    /// Cancelled before all of the prompt was in: what had gone in was taken out again.
    pub taken_back: bool,
    /// The last token of `tokens`, when it is not in the cache (it was not needed, or there was
    /// no cell). The next turn's prompt has to begin with it.
    pub pending: Option<Token>,
    /// Rows of the prompt.
    pub prompt: PerModality,
    /// What decoding steps attended to, where they looked cells up.
    pub attended: Attended,
    /// How long each part took.
    pub timings: Timings,
}

/// How long the parts of a turn took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// The trial run that judges a prompt before it goes in.
    pub probe: Duration,
    /// The prompt through the model, and the eviction after it.
    pub prefill: Duration,
    /// From the start of the prefill to the first token (TTFT without what came before it).
    pub first_token: Option<Duration>,
    /// From the first token to the end.
    pub decode: Duration,
    /// Tokens that went through the model in that time.
    pub steps: usize,
}

impl Timings {
    /// TPOT: the mean time of a token after the first.
    pub fn per_token(&self) -> Option<Duration> {
        let steps = u32::try_from(self.steps).ok().filter(|&steps| steps > 0)?;
        Some(self.decode / steps)
    }
}
