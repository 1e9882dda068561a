//! What is predicted of many tokens at once.

use super::engine::LlamaEngine;
use crate::cache::Pos;
use crate::engine::{Batch, Engine, Input, Observation, Token};
use crate::error::{Error, Result};

impl LlamaEngine {
    /// Feeds tokens to an empty context in micro-batches, and hands over the logits `[n_vocab]` of
    /// every row from `first` on, in their order. It decodes as a prompt goes in, so that policies and
    /// lookups, which act between tokens, have no say.
    ///
    /// # Errors
    /// As [`Engine::decode`], and those of `each`.
    pub fn predict(
        &mut self,
        tokens: &[Token],
        first: usize,
        each: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let n = self.n_ubatch();
        let (mut cells, mut seen) = (Vec::new(), Observation::default());
        let mut pos: Vec<Pos> = Vec::new();
        for (start, part) in (0..).step_by(n).zip(tokens.chunks(n)) {
            let positions = start..start + part.len();
            pos.clear();
            for at in positions {
                let at =
                    Pos::try_from(at).map_err(|_| Error::contract("more tokens than positions"))?;
                pos.push(at);
            }
            let from = first.saturating_sub(start);
            let batch = Batch {
                logits: from < part.len(),
                ..Batch::new(Input::Tokens(part), &pos)
            };
            self.rows.logits_from = Some(from);
            let done = self.decode(batch, &mut cells, &mut seen);
            self.rows.logits_from = None;
            done?;
            for row in from..part.len() {
                let row = i32::try_from(row).unwrap_or(i32::MAX);
                each(self.logits_at(row)?)?;
            }
        }
        Ok(())
    }
}
