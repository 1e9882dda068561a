//! llama.cpp's sampler chain, in the order that llama.cpp's own programs build it.

use std::collections::VecDeque;

use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;

use super::log;
use super::rows::check_token;
use crate::engine::{Sampler, Token};
use crate::error::{Error, Result};

/// Sampling flags, with llama.cpp's defaults.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct SamplerOptions {
    /// Decides what is drawn, where `temp` is above 0.
    pub seed: u32,
    /// 0 or less: greedy.
    pub temp: f32,
    /// Draws among this many of the likeliest tokens; 0 or less: all.
    pub top_k: i32,
    /// Draws among the likeliest tokens that together have this probability; 1: all.
    pub top_p: f32,
    /// Drops tokens below this share of the likeliest one's probability; 0: none.
    pub min_p: f32,
    /// What the logits of recent tokens are divided by (multiplied, where below 0); 1: nothing.
    pub repeat_penalty: f32,
    /// Tokens that the repeat penalty looks back on; -1: as many as the context holds.
    pub repeat_last_n: i32,
}

/// Greedy: the same answer every time.
impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions::GREEDY
    }
}

impl SamplerOptions {
    /// Always the likeliest token.
    pub const GREEDY: SamplerOptions = SamplerOptions {
        seed: 0,
        temp: 0.0,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.05,
        repeat_penalty: 1.0,
        repeat_last_n: 64,
    };

    /// `n_ctx` bounds the tokens that are looked back on: llama.cpp allocates for all of them.
    fn chain(&self, n_vocab: usize, n_ctx: usize) -> LlamaSampler {
        let n_vocab = i32::try_from(n_vocab).unwrap_or(i32::MAX);
        let n_ctx = i32::try_from(n_ctx).unwrap_or(i32::MAX);
        let mut chain = Vec::new();
        if self.repeat_penalty != 1.0 {
            chain.push(LlamaSampler::penalties(
                n_vocab,
                if self.repeat_last_n < 0 {
                    n_ctx
                } else {
                    self.repeat_last_n.min(n_ctx)
                },
                self.repeat_penalty,
                0.0,
                0.0,
            ));
        }
        if self.temp <= 0.0 {
            chain.push(LlamaSampler::greedy());
        } else {
            chain.push(LlamaSampler::top_k(self.top_k));
            chain.push(LlamaSampler::top_p(self.top_p, 1));
            chain.push(LlamaSampler::min_p(self.min_p, 1));
            chain.push(LlamaSampler::temp(self.temp));
            chain.push(LlamaSampler::dist(self.seed));
        }
        LlamaSampler::chain(chain, true)
    }
}

/// The chain, and what it has chosen: the repeat penalty's window.
pub(super) struct Chain {
    chain: LlamaSampler,
    n_vocab: usize,
    /// Every token with its logit. Reused.
    candidates: LlamaTokenDataArray,
    /// Oldest first, as many as any window holds.
    chosen: VecDeque<Token>,
    most: usize,
}

// SAFETY: the chain is bound to no thread, points to nothing but its own memory, and is reached
// through this value alone, which is not `Sync`.
unsafe impl Send for Chain {}

impl Chain {
    pub fn new(options: &SamplerOptions, n_vocab: usize, n_ctx: usize) -> Self {
        Chain {
            chain: options.chain(n_vocab, n_ctx),
            n_vocab,
            candidates: LlamaTokenDataArray::new(Vec::new(), false),
            chosen: VecDeque::new(),
            most: n_ctx,
        }
    }

    fn note(&mut self, token: Token) {
        if self.chosen.len() == self.most {
            self.chosen.pop_front();
        }
        self.chosen.push_back(token);
    }
}

impl Sampler for Chain {
    /// What `llama_sampler_sample` does with the logits of a context's row.
    fn sample(&mut self, logits: &[f32]) -> Result<Token> {
        const CALL: &str = "llama_sampler_apply";
        if logits.len() != self.n_vocab {
            let (n, n_vocab) = (logits.len(), self.n_vocab);
            return Err(Error::llama(
                CALL,
                format!("{n} logits for {n_vocab} tokens"),
            ));
        }
        let candidates = &mut self.candidates;
        let all = logits.iter().zip(0..);
        candidates.data.clear();
        candidates
            .data
            .extend(all.map(|(&logit, token)| LlamaTokenData::new(LlamaToken(token), logit, 0.0)));
        (candidates.selected, candidates.sorted) = (None, false);
        log::forget();
        self.chain.apply(candidates);
        // What went wrong in a part of the chain is caught there, and the rest goes on.
        let reason = log::take_reason("");
        if !reason.is_empty() {
            return Err(Error::llama(CALL, reason));
        }
        let token = candidates.selected_token();
        let token = token.ok_or_else(|| Error::llama(CALL, "no token could be chosen"))?;
        check_token(CALL, token.0, self.n_vocab)?;
        self.chain.accept(token);
        self.note(token.0);
        Ok(token.0)
    }

    fn chosen(&self) -> Vec<Token> {
        self.chosen.iter().copied().collect()
    }

    fn reset(&mut self) {
        self.chain.reset();
        self.chosen.clear();
    }

    fn resume(&mut self, chosen: &[Token]) -> Result<()> {
        for &token in chosen {
            check_token("llama_sampler_accept", token, self.n_vocab)?;
        }
        self.reset();
        for &token in chosen {
            self.chain.accept(LlamaToken(token));
            self.note(token);
        }
        Ok(())
    }
}
