//! llama.cpp's sampler chain, in the order that llama.cpp's own programs build it.

use std::collections::VecDeque;

use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;

use crate::engine::Token;

/// Sampling flags, with llama.cpp's defaults.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct SamplerOptions {
    pub seed: u32,
    /// 0 or less: greedy.
    pub temp: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
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
pub(super) struct Sampler {
    chain: LlamaSampler,
    /// Oldest first, as many as any window holds.
    chosen: VecDeque<Token>,
    most: usize,
}

impl Sampler {
    pub fn new(options: &SamplerOptions, n_vocab: usize, n_ctx: usize) -> Self {
        Sampler {
            chain: options.chain(n_vocab, n_ctx),
            chosen: VecDeque::new(),
            most: n_ctx,
        }
    }

    /// Chooses from the logits of the context's last row.
    pub fn sample(&mut self, ctx: &LlamaContext<'_>) -> Token {
        let token = self.chain.sample(ctx, -1).0;
        // One below 0 says that nothing could be chosen.
        if token >= 0 {
            self.note(token);
        }
        token
    }

    /// Forgets what was chosen.
    pub fn reset(&mut self) {
        self.chain.reset();
        self.chosen.clear();
    }

    /// Goes on as if these had been chosen, oldest first.
    pub fn resume(&mut self, chosen: &[Token]) {
        self.reset();
        for &token in chosen {
            self.chain.accept(LlamaToken(token));
            self.note(token);
        }
    }

    pub fn chosen(&self) -> impl Iterator<Item = Token> + '_ {
        self.chosen.iter().copied()
    }

    fn note(&mut self, token: Token) {
        if self.chosen.len() == self.most {
            self.chosen.pop_front();
        }
        self.chosen.push_back(token);
    }
}
