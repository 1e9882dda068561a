//! Texts that are read, or gone on with, under a policy.

use super::{Asker, Contender};
use crate::attend::{Attend, Shares};
use crate::bench::Pulse;
use crate::engine::Token;
use crate::error::Result;
use crate::eval::continuation::{self, Continuation};
use crate::eval::distance::{self, Places, Said};
use crate::eval::reading::{Reading, Window};
use crate::generate::{Segment, Session};
use crate::llama::{ContextOptions, LlamaEngine};
use crate::policy::PolicySpec;

impl Asker {
    /// What the full cache predicts of a window of a text, attending to everything. `None`:
    /// cancelled.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn read_in_full(
        &mut self,
        context: &ContextOptions,
        window: &Window,
        watch: Pulse<'_>,
    ) -> Result<Option<Said>> {
        let session = self.in_full(context, window.prompt.len() + window.text.len())?;
        distance::read(session, &prompt(window), &window.text, watch.cancelled)
    }

    /// What the full cache goes on with behind a window's prompt, greedily, attending to everything.
    /// `None`: cancelled.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn go_on_in_full(
        &mut self,
        context: &ContextOptions,
        window: &Window,
        n_predict: usize,
        watch: Pulse<'_>,
    ) -> Result<Option<Said>> {
        let session = self.in_full(context, window.prompt.len() + n_predict)?;
        distance::listen(session, &prompt(window), n_predict, watch.cancelled)
    }

    /// The same window under a policy; `said` is what the full cache predicted. `None`: cancelled.
    ///
    /// # Errors
    /// Those of the engine and the policy.
    pub fn read(
        &mut self,
        contender: &Contender,
        (number, window): (usize, &Window),
        said: &Said,
        watch: Pulse<'_>,
    ) -> Result<Option<Reading>> {
        let positions = window.prompt.len() + window.text.len();
        let session = self.opened_for(&contender.context, &contender.policy, positions)?;
        session.expect(said.fed().len());
        let mut places = Places::default();
        let prompt = prompt(window);
        let followed = distance::follow(session, &prompt, said, &mut places, watch.cancelled)?;
        let Some(followed) = followed else {
            return Ok(None);
        };
        Ok(followed.distance().map(|distance| Reading {
            window: number,
            contender: contender.record.name.clone(),
            distance,
            log_probs: followed.log_probs().iter().map(|&x| x as f32).collect(),
            attended: session.attended().shares(),
            cells: session.controller.ledger().counts().cells(),
        }))
    }

    /// The same window under a policy; `each` gets what it predicts of each token, logits
    /// `[n_vocab]`. What decoding steps attended to and the cells that were in use at the end.
    /// `None`: cancelled.
    ///
    /// # Errors
    /// Those of the engine, the policy and `each`.
    pub fn predict(
        &mut self,
        contender: &Contender,
        window: &Window,
        each: &mut dyn FnMut(&[f32], Token) -> Result<()>,
        watch: Pulse<'_>,
    ) -> Result<Option<(Option<Shares>, usize)>> {
        let positions = window.prompt.len() + window.text.len();
        let session = self.opened_for(&contender.context, &contender.policy, positions)?;
        session.expect(window.text.len().saturating_sub(1));
        let prompt = prompt(window);
        let whole = distance::predictions(session, &prompt, &window.text, watch.cancelled, each)?;
        let cells = session.controller.ledger().counts().cells();
        Ok(whole.then(|| (session.attended().shares(), cells)))
    }

    /// What a policy goes on with behind a window's prompt; `said` is what the full cache does. `None`:
    /// cancelled.
    ///
    /// # Errors
    /// Those of the engine and the policy.
    pub fn go_on(
        &mut self,
        contender: &Contender,
        (number, window): (usize, &Window),
        said: &Said,
        n_predict: usize,
        watch: Pulse<'_>,
    ) -> Result<Option<Continuation>> {
        let positions = window.prompt.len() + n_predict;
        let session = self.opened_for(&contender.context, &contender.policy, positions)?;
        session.expect(said.fed().len());
        let mut places = Places::default();
        let prompt = prompt(window);
        let followed = distance::follow(session, &prompt, said, &mut places, watch.cancelled)?;
        let Some(distance) = followed.and_then(|followed| followed.distance()) else {
            return Ok(None);
        };
        // A policy that predicts every token of the full cache's, the end among them, says the same.
        let (tokens, ended) = if distance.first_differing.is_none() {
            (said.tokens.clone(), said.ended)
        } else {
            let session = self.opened_for(&contender.context, &contender.policy, positions)?;
            session.expect(said.fed().len());
            match distance::answer(session, &prompt, n_predict, watch.cancelled)? {
                Some(told) => told,
                None => return Ok(None),
            }
        };
        let session = self.opened_for(&contender.context, &contender.policy, positions)?;
        let mut bytes = Vec::new();
        for &token in &tokens[..tokens.len() - usize::from(ended)] {
            session.vocabulary()?.piece(token, &mut bytes)?;
        }
        let (same, equal) = continuation::alike(&tokens, &said.tokens);
        Ok(Some(Continuation {
            window: number,
            contender: contender.record.name.clone(),
            text: String::from_utf8_lossy(&bytes).into_owned(),
            tokens: tokens.len(),
            ended,
            same,
            equal,
            repeated: continuation::repeated(&tokens, continuation::GRAM),
            distance,
        }))
    }

    /// An empty session of the full cache that attends to everything.
    fn in_full(
        &mut self,
        context: &ContextOptions,
        positions: usize,
    ) -> Result<&mut Session<LlamaEngine>> {
        let context = ContextOptions {
            attend: Attend::default(),
            ..context.clone()
        };
        self.opened_for(&context, &PolicySpec::full(), positions)
    }
}

fn prompt(window: &Window) -> [Segment; 1] {
    [Segment::Tokens(window.prompt.clone())]
}
