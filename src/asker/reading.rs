//! Texts that are read, or gone on with, under a policy.

use super::{Asker, Contender, policy_for};
use crate::attend::{Attend, Shares};
use crate::bench::Pulse;
use crate::engine::{Token, Vocabulary};
use crate::error::{Error, Result};
use crate::eval::continuation::{self, Continuation};
use crate::eval::distance::{self, Followed, Places, Said};
use crate::eval::reading::{Reading, Window};
use crate::generate::{Segment, Session};
use crate::llama::{ContextOptions, LlamaEngine};
use crate::policy::{PolicySpec, evicts_nothing};

impl Asker {
    /// From now on texts are read in batches, as llama.cpp's `llama-perplexity` reads them, wherever
    /// nothing is evicted and everything attended to. It is faster; sums come out in another order
    /// than token by token.
    pub fn read_at_once(&mut self, yes: bool) {
        self.at_once = yes;
    }

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
        let at_once = self.at_once;
        let session = self.in_full(context, window.prompt.len() + window.text.len())?;
        if at_once {
            let mut logits = Vec::new();
            let mut keep = |own: &[f32], _: Token| {
                logits.push(own.to_vec());
                Ok(())
            };
            let whole = all_at_once(session, window, &mut keep, watch)?;
            return whole.then(|| Said::of(&window.text, logits)).transpose();
        }
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
        let at_once = self.is_plain(contender)?;
        let policy = policy_of(contender, number);
        let session = self.opened_for(&contender.context, &policy, positions)?;
        let followed = if at_once {
            let mut followed = Followed::default();
            let mut full = said.logits().iter();
            let mut add = |own: &[f32], token: Token| match full.next() {
                Some(full) => followed.add(full, own, token),
                None => Err(Error::contract("more predictions than the full cache's")),
            };
            let whole = all_at_once(session, window, &mut add, watch)?;
            whole.then_some(followed)
        } else {
            session.expect(said.fed().len());
            let mut places = Places::default();
            distance::follow(session, &prompt(window), said, &mut places, watch.cancelled)?
        };
        let Some(followed) = followed else {
            return Ok(None);
        };
        let cells = match at_once {
            true => positions,
            false => session.controller.ledger().counts().cells(),
        };
        Ok(followed.distance().map(|distance| Reading {
            window: number,
            contender: contender.record.name.clone(),
            distance,
            log_probs: followed.log_probs().iter().map(|&x| x as f32).collect(),
            attended: session.attended().shares(),
            cells,
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
        (number, window): (usize, &Window),
        each: &mut dyn FnMut(&[f32], Token) -> Result<()>,
        watch: Pulse<'_>,
    ) -> Result<Option<(Option<Shares>, usize)>> {
        let positions = window.prompt.len() + window.text.len();
        let at_once = self.is_plain(contender)?;
        let policy = policy_of(contender, number);
        let session = self.opened_for(&contender.context, &policy, positions)?;
        if at_once {
            let whole = all_at_once(session, window, each, watch)?;
            return Ok(whole.then_some((None, positions)));
        }
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
        let policy = policy_of(contender, number);
        let session = self.opened_for(&contender.context, &policy, positions)?;
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
            let session = self.opened_for(&contender.context, &policy, positions)?;
            session.expect(said.fed().len());
            match distance::answer(session, &prompt, n_predict, watch.cancelled)? {
                Some(told) => told,
                None => return Ok(None),
            }
        };
        let vocabulary: &dyn Vocabulary = &self.model;
        let mut bytes = Vec::new();
        for &token in &tokens[..tokens.len() - usize::from(ended)] {
            vocabulary.piece(token, &mut bytes)?;
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

    /// Whether a contender's texts are read in batches.
    fn is_plain(&self, contender: &Contender) -> Result<bool> {
        let attends = self.cache(contender)?.attend;
        Ok(self.at_once && evicts_nothing(&contender.policy.name) && attends.is_none())
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

/// Feeds a whole window to an empty session's engine and hands over what is predicted of its text.
/// `false`: cancelled.
fn all_at_once(
    session: &mut Session<LlamaEngine>,
    window: &Window,
    each: &mut dyn FnMut(&[f32], Token) -> Result<()>,
    watch: Pulse<'_>,
) -> Result<bool> {
    let tokens = [&window.prompt[..], &window.text[..]].concat();
    let first = window.prompt.len().saturating_sub(1);
    let mut text = window.text.iter();
    let mut cancelled = false;
    let mut next = |logits: &[f32]| {
        cancelled |= (watch.cancelled)();
        // Behind the last token nothing stands.
        match text.next() {
            Some(&token) if !cancelled => each(logits, token),
            _ => Ok(()),
        }
    };
    session.engine.predict(&tokens, first, &mut next)?;
    Ok(!cancelled)
}

/// The policy for a window of this number.
fn policy_of(contender: &Contender, number: usize) -> PolicySpec {
    policy_for(contender, &format!("window {number}"))
}

fn prompt(window: &Window) -> [Segment; 1] {
    [Segment::Tokens(window.prompt.clone())]
}
