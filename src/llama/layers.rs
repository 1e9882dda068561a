//! Prompts that go on where a trial run came to (the patch `layers-in-two-contexts`): the run's
//! hidden states in place of embeddings, and its K and V in the first layers of the cells that
//! they take.

use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::engine::LlamaEngine;
use super::log;
use crate::cache::Cell;
use crate::engine::Input;
use crate::error::{Error, Result};

/// What the tokens of a context of the first layers were when they came to the last of these.
pub(super) struct Hidden {
    /// `[rows so far, n_embd]`, in the order in which they came.
    values: Vec<f32>,
    /// `[cells]` Which row is a cell's.
    row_of: Vec<Option<usize>>,
    width: usize,
}

impl Hidden {
    pub fn absent() -> Error {
        Error::contract("rows that no trial run has kept")
    }

    /// The rows of these cells, one after the other.
    pub fn take(&self, cells: &[Cell], out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        for &cell in cells {
            let row = self.row_of.get(cell as usize).copied().flatten();
            let start = row.ok_or_else(Hidden::absent)? * self.width;
            let row = self.values.get(start..start + self.width);
            out.extend_from_slice(row.ok_or_else(Hidden::absent)?);
        }
        Ok(())
    }

    /// Room for rows that these cells' tokens are read into.
    fn push(&mut self, cells: &[Cell]) -> &mut [f32] {
        let first = self.values.len() / self.width;
        let end = cells.iter().max().map_or(0, |&cell| cell as usize + 1);
        self.row_of.resize(self.row_of.len().max(end), None);
        for (&cell, row) in cells.iter().zip(first..) {
            self.row_of[cell as usize] = Some(row);
        }
        let rows = (first + cells.len()) * self.width;
        self.values.resize(rows, 0.0);
        &mut self.values[first * self.width..]
    }
}

/// While it lives, batches begin at a layer behind the first.
pub(super) struct FirstLayer(NonNull<sys::llama_context>);

impl Drop for FirstLayer {
    fn drop(&mut self) {
        // SAFETY: it is a local of a method of the context's owner. Layer 0 is never refused.
        unsafe { sys::llama_hae_layers_set(self.0.as_ptr(), 0) };
    }
}

fn reason(call: &'static str, code: i32) -> Error {
    match code {
        sys::LLAMA_HAE_LAYERS_ERR_MODEL | sys::LLAMA_HAE_LAYERS_ERR_NOTHING => Error::option(
            "dap_mode",
            "midway: the layers of this model cannot be taken apart, expected exact or early",
        ),
        code => Error::llama(call, log::take_reason(&format!("status {code}"))),
    }
}

impl LlamaEngine {
    /// Names the layer that is the first to be computed, or in a context of the first layers the
    /// one whose input is kept. 0: as usual.
    pub(super) fn set_first_layer(&mut self, il: u32) -> Result<()> {
        // SAFETY: the context is alive and borrowed mutably.
        match unsafe { sys::llama_hae_layers_set(self.raw.as_ptr(), il) } {
            0 => Ok(()),
            code => Err(reason("llama_hae_layers_set", code)),
        }
    }

    /// In a context of the first layers: keeps what so many tokens are when they come to the last
    /// of them, or stops to.
    pub(super) fn keep_hidden(&mut self, n_tokens: Option<usize>) -> Result<()> {
        if n_tokens.is_none() && self.hidden.is_none() {
            return Ok(());
        }
        self.hidden = None;
        let Some(n_tokens) = n_tokens else {
            return self.set_first_layer(0);
        };
        let width = self.model.n_embd();
        let mut values = Vec::new();
        let size = n_tokens.saturating_mul(width);
        values.try_reserve_exact(size).map_err(|_| {
            let reason = format!("no memory for the hidden states of {n_tokens} tokens");
            Error::llama("llama_hae_layers_read", reason)
        })?;
        self.set_first_layer(self.last_score_layer().unwrap_or(0))?;
        self.hidden = Some(Hidden {
            values,
            row_of: Vec::with_capacity(n_tokens),
            width,
        });
        Ok(())
    }

    /// Before a batch: lets it begin where the trial run came to, if it goes on from there, until
    /// what is returned is dropped.
    pub(super) fn go_on(&mut self, input: &Input<'_>) -> Result<Option<FirstLayer>> {
        let Input::Trial(_) = *input else {
            return Ok(None);
        };
        let last = self.last_score_layer().ok_or_else(Hidden::absent)?;
        self.set_first_layer(last)?;
        Ok(Some(FirstLayer(self.raw)))
    }

    /// After a batch: the trial run's K and V in its first layers, or in a trial run itself what
    /// the next layer would have begun with.
    pub(super) fn pass_on(&mut self, input: &Input<'_>, cells: &[Cell]) -> Result<()> {
        if let Input::Trial(from) = *input {
            return self.copy_first_layers(from, cells);
        }
        let raw = self.raw;
        let Some(hidden) = &mut self.hidden else {
            return Ok(());
        };
        let rows = hidden.push(cells);
        // SAFETY: the context is alive and borrowed mutably, and `rows` is as large as is said.
        let n = unsafe { sys::llama_hae_layers_read(raw.as_ptr(), rows.as_mut_ptr(), rows.len()) };
        match usize::try_from(n) == Ok(cells.len()) {
            true => Ok(()),
            false => Err(reason("llama_hae_layers_read", n)),
        }
    }

    fn copy_first_layers(&mut self, from: &[Cell], to: &[Cell]) -> Result<()> {
        const CALL: &str = "llama_hae_kv_copy_layers";
        let n = u32::try_from(from.len().min(to.len())).unwrap_or(0);
        let last = self.last_score_layer().unwrap_or(0);
        let trial = self.trial.as_deref().ok_or_else(Hidden::absent)?;
        log::forget();
        // SAFETY: both contexts are alive, this one is borrowed mutably and owns the other; both
        // slices have at least n cells.
        let done = unsafe {
            sys::llama_hae_kv_copy_layers(
                self.raw.as_ptr(),
                trial.raw.as_ptr(),
                last,
                from.as_ptr(),
                to.as_ptr(),
                n,
            )
        };
        match u32::try_from(done) == Ok(n) && from.len() == to.len() {
            true => Ok(()),
            false => Err(Error::llama(
                CALL,
                log::take_reason(&format!("status {done}")),
            )),
        }
    }
}
