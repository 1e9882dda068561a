//! A batch as llama.cpp takes it, checked: what reaches it makes nothing in it throw or assert.

use llama_cpp_sys_2 as sys;

use super::layers::Hidden;
use crate::cache::Pos;
use crate::engine::{Batch, Input, Token};
use crate::error::{Error, Result};

/// The largest position that a token can have: llama.cpp's masks add windows and padding to it.
pub const MAX_POS: Pos = sys::LLAMA_HAE_POS_MAX as Pos;

/// Per-row fields of a `llama_batch`, reused.
#[derive(Default)]
pub(super) struct Rows {
    pos: Vec<sys::llama_pos>,
    n_seq_id: Vec<i32>,
    seq_id: Vec<*mut sys::llama_seq_id>,
    /// What each `seq_id` points to.
    seq: Box<sys::llama_seq_id>,
    logits: Vec<i8>,
    /// What goes on from a trial run.
    hidden: Vec<f32>,
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
fn check_rows(batch: &Batch<'_>, most: usize) -> Result<i32> {
    let n = batch.input.len();
    let n_tokens = i32::try_from(n).ok().filter(|_| n <= most);
    let n_tokens = n_tokens
        .ok_or_else(|| refused(format!("{n} rows in one batch, expected at most {most}")))?;
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
    Ok(n_tokens)
}

impl Rows {
    /// Fills the per-row arrays and returns a batch that points to them and to the input; that there
    /// is such a sequence was checked. `hidden`:
    /// what a trial run has kept.
    ///
    /// # Errors
    /// [`Error::Llama`] for tokens, positions, query rows or sizes that cannot be.
    pub fn batch(
        &mut self,
        batch: &Batch<'_>,
        takes: Takes,
        hidden: Option<&Hidden>,
    ) -> Result<sys::llama_batch> {
        let n_tokens = check_rows(batch, takes.n_batch)?;
        let n = batch.input.len();
        self.pos.clear();
        let (token, embd) = match batch.input {
            Input::Tokens(tokens) => {
                for &token in tokens {
                    check_token("llama_decode", token, takes.n_vocab)?;
                }
                self.pos.extend(batch.pos);
                (tokens.as_ptr().cast_mut(), std::ptr::null_mut())
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
                (std::ptr::null_mut(), data.as_ptr().cast_mut())
            }
            Input::Trial(cells) => {
                hidden
                    .ok_or_else(Hidden::absent)?
                    .take(cells, &mut self.hidden)?;
                self.pos.extend(batch.pos);
                (std::ptr::null_mut(), self.hidden.as_ptr().cast_mut())
            }
        };
        *self.seq = batch.seq;
        self.n_seq_id.clear();
        self.n_seq_id.resize(n, 1);
        self.seq_id.clear();
        self.seq_id.resize(n, &raw mut *self.seq);
        self.logits.clear();
        self.logits.resize(n, 0);
        if let (true, Some(last)) = (batch.logits, self.logits.last_mut()) {
            *last = 1;
        }
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
