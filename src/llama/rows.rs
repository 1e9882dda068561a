//! A batch as llama.cpp takes it, checked: what reaches it makes nothing in it throw or assert.

use llama_cpp_sys_2 as sys;

use crate::cache::Pos;
use crate::engine::{Batch, Input, Part, SeqId, Token};
use crate::error::{Error, Result};

/// The largest position that a token can have: llama.cpp's masks add windows and padding to it.
pub const MAX_POS: Pos = sys::LLAMA_HAE_POS_MAX as Pos;

/// Per-row fields of a `llama_batch`, reused.
#[derive(Default)]
pub(super) struct Rows {
    pos: Vec<sys::llama_pos>,
    n_seq_id: Vec<i32>,
    seq_id: Vec<*mut sys::llama_seq_id>,
    /// What each `seq_id` points to: one a part.
    seqs: Vec<sys::llama_seq_id>,
    logits: Vec<i8>,
    /// The first row of a single part that wants logits; `None`: its last alone does.
    pub logits_from: Option<usize>,
    /// Tokens of several parts, or in place of those that go on from a trial run.
    tokens: Vec<Token>,
    /// Rows of the batch whose attention is wanted.
    pub queries: Vec<u32>,
    /// For each part that has some of these, how many there are up to its last.
    pub ends: Vec<i32>,
}

/// What a context takes.
#[derive(Clone, Copy)]
pub(super) struct Takes {
    /// Rows of a batch, at most: llama.cpp asserts on it.
    pub n_batch: usize,
    pub n_vocab: usize,
    /// Width of an embedding.
    pub n_embd: usize,
}

fn refused(reason: String) -> Error {
    Error::llama("llama_decode", reason)
}

/// Whether a token is one of the vocabulary's.
///
/// # Errors
/// [`Error::Llama`] naming it.
pub(super) fn check_token(call: &'static str, token: Token, n_vocab: usize) -> Result<()> {
    match usize::try_from(token).is_ok_and(|t| t < n_vocab) {
        true => Ok(()),
        false => Err(Error::llama(
            call,
            format!("token {token} is not in the vocabulary of {n_vocab}"),
        )),
    }
}

fn in_range(pos: Pos) -> bool {
    (0..=MAX_POS).contains(&pos)
}

/// Positions as many as rows, ascending, each one that can be; query rows that there are, ascending.
fn check_rows(batch: &Batch<'_>, most: usize) -> Result<()> {
    let n = batch.input.len();
    if n > most {
        let reason = format!("{n} rows in one batch, expected at most {most}");
        return Err(refused(reason));
    }
    let ascending = batch.pos.windows(2).all(|pair| pair[0] <= pair[1]);
    let bounds = (batch.pos.first(), batch.pos.last());
    let possible =
        matches!(bounds, (Some(&first), Some(&last)) if in_range(first) && in_range(last));
    if batch.pos.len() != n || !ascending || !possible {
        return Err(refused(format!(
            "positions {bounds:?} for {n} rows, expected as many ascending ones from 0 to {MAX_POS}"
        )));
    }
    let ascending = batch.queries.windows(2).all(|pair| pair[0] < pair[1]);
    if !ascending || batch.queries.last().is_some_and(|&row| row as usize >= n) {
        return Err(refused(format!("query rows {:?} of {n}", batch.queries)));
    }
    Ok(())
}

impl Rows {
    /// Fills the per-row arrays and returns a batch that points to them and, if there is a single
    /// part, to its input. That these can be the parts of a pass and that there are such sequences
    /// was checked.
    ///
    /// # Errors
    /// [`Error::Llama`] for tokens, positions, query rows or sizes that cannot be.
    pub fn batch(&mut self, parts: &[Part<'_>], takes: Takes) -> Result<sys::llama_batch> {
        self.clear();
        self.seqs.extend(parts.iter().map(|part| part.batch.seq));
        let (mut token, mut embd) = (std::ptr::null_mut(), std::ptr::null_mut());
        for (part, seq) in parts.iter().zip(&mut self.seqs) {
            let batch = &part.batch;
            check_rows(batch, takes.n_batch)?;
            let first = u32::try_from(self.logits.len()).unwrap_or(u32::MAX);
            let rows = batch.queries.iter().map(|&row| first.saturating_add(row));
            self.queries.extend(rows);
            if !batch.queries.is_empty() {
                let end = i32::try_from(self.queries.len()).unwrap_or(i32::MAX);
                self.ends.push(end);
            }
            let n = self.logits.len() + batch.input.len();
            self.n_seq_id.resize(n, 1);
            self.seq_id.resize(n, &raw mut *seq);
            self.logits.resize(n, 0);
            if batch.logits {
                let last = batch.input.len().saturating_sub(1);
                let from = self.logits_from.map_or(last, |from| from.min(last));
                self.logits[first as usize + from..].fill(1);
            }
        }
        for part in parts {
            let batch = &part.batch;
            match batch.input {
                Input::Tokens(tokens) => {
                    for &token in tokens {
                        check_token("llama_decode", token, takes.n_vocab)?;
                    }
                    self.pos.extend(batch.pos);
                    token = tokens.as_ptr().cast_mut();
                    if parts.len() > 1 {
                        self.tokens.extend(tokens);
                    }
                }
                Input::Embeddings { data, n, mrope } => {
                    let n_embd = takes.n_embd;
                    if n.checked_mul(n_embd) != Some(data.len()) {
                        return Err(refused(format!(
                            "{} values for {n} embeddings of width {n_embd}",
                            data.len()
                        )));
                    }
                    self.places(batch.pos, mrope)?;
                    embd = data.as_ptr().cast_mut();
                }
                Input::Trial(cells) => {
                    // What they are is in the trial run's context: any will do.
                    self.tokens.resize(cells.len(), 0);
                    self.pos.extend(batch.pos);
                    token = self.tokens.as_mut_ptr();
                }
            }
        }
        if parts.len() > 1 {
            token = self.tokens.as_mut_ptr();
        }
        let n = self.logits.len();
        let n_tokens = i32::try_from(n).map_err(|_| refused(format!("{n} rows in one batch")))?;
        Ok(sys::llama_batch {
            n_tokens,
            token,
            embd,
            pos: self.pos.as_mut_ptr(),
            n_seq_id: self.n_seq_id.as_mut_ptr(),
            seq_id: self.seq_id.as_mut_ptr(),
            logits: self.logits.as_mut_ptr(),
        })
    }

    fn clear(&mut self) {
        self.pos.clear();
        self.n_seq_id.clear();
        self.seq_id.clear();
        self.seqs.clear();
        self.logits.clear();
        self.tokens.clear();
        self.queries.clear();
        self.ends.clear();
    }

    /// The rows whose logits there are after the batch, each the last of its part.
    pub fn outputs<'a>(&self, parts: &'a [Part<'_>]) -> impl Iterator<Item = (SeqId, i32)> + 'a {
        let mut end = 0;
        parts.iter().filter_map(move |part| {
            end += part.batch.input.len();
            let row = i32::try_from(end).ok()? - 1;
            part.batch.logits.then_some((part.batch.seq, row))
        })
    }

    /// Positions of embeddings: llama.cpp wants four axes one after the other, n values each.
    fn places(&mut self, pos: &[Pos], mrope: Option<&[[Pos; 4]]>) -> Result<()> {
        let Some(mrope) = mrope else {
            self.pos.extend(pos);
            return Ok(());
        };
        if mrope.len() != pos.len() {
            let (n, rows) = (mrope.len(), pos.len());
            return Err(refused(format!("{n} positions for {rows} embeddings")));
        }
        if let Some(axes) = mrope.iter().find(|axes| !axes.iter().all(|&p| in_range(p))) {
            return Err(refused(format!(
                "position {axes:?} of an embedding, expected 0 to {MAX_POS}"
            )));
        }
        for axis in 0..4 {
            self.pos.extend(mrope.iter().map(|p| p[axis]));
        }
        Ok(())
    }
}
