//! Taking tokens out of a sequence, and moving them to other positions.

use std::ops::Range;

use llama_cpp_sys_2 as sys;

use super::engine::LlamaEngine;
use crate::cache::{Cell, Pos};
use crate::engine::SeqId;
use crate::error::{Error, Result};

impl LlamaEngine {
    /// As [`crate::engine::Engine::remove`].
    pub(super) fn remove_ranges(&mut self, seq: SeqId, ranges: &[Range<Pos>]) -> Result<()> {
        self.check_seq("llama_memory_seq_rm", seq)?;
        for range in ranges {
            if range.start < 0 || range.end <= range.start {
                return Err(Error::llama(
                    "llama_memory_seq_rm",
                    format!("range {range:?} is empty or negative"),
                ));
            }
            // SAFETY: the context is alive; the sequence and the range were checked (negative ones
            // would mean "everything").
            let done = unsafe {
                let memory = sys::llama_get_memory(self.ctx.as_mut_ptr());
                sys::llama_memory_seq_rm(memory, seq, range.start, range.end)
            };
            if !done {
                return Err(Error::llama(
                    "llama_memory_seq_rm",
                    format!("positions {range:?} cannot be removed"),
                ));
            }
        }
        Ok(())
    }

    /// As [`crate::engine::Engine::rewind`].
    pub(super) fn take_back(&mut self, seq: SeqId, from: Pos, left: usize) -> Result<()> {
        self.check_seq("llama_memory_seq_rm", seq)?;
        let from = from.max(0);
        // SAFETY: the context is alive, the sequence was checked; an end of -1 means "to the end".
        let done = unsafe {
            let memory = sys::llama_get_memory(self.ctx.as_mut_ptr());
            sys::llama_memory_seq_rm(memory, seq, from, -1)
        };
        if !done {
            return Err(Error::llama(
                "llama_memory_seq_rm",
                format!("positions from {from} on cannot be taken back"),
            ));
        }
        // A window's cells are taken again while a prompt goes in.
        let n_swa = self.model.n_swa();
        let oldest_needed = from.saturating_sub(n_swa).max(0);
        // SAFETY: as above.
        let oldest = unsafe {
            sys::llama_memory_seq_pos_min(sys::llama_get_memory(self.ctx.as_mut_ptr()), seq)
        };
        if n_swa > 0 && from > 0 && oldest > oldest_needed {
            return Err(Error::llama(
                "llama_memory_seq_rm",
                format!("the window before position {from} is gone"),
            ));
        }
        if from == 0 {
            // Who has the sequence next knows nothing of these.
            self.moved.retain(|&(of, _)| of != seq);
        }
        self.count(Cell::try_from(left).unwrap_or(Cell::MAX));
        self.recount()
    }

    /// Whether cached keys can follow their tokens to other positions. Not beside other sequences:
    /// llama.cpp turns the keys of all cells then, those that stay by nothing, and where cos and sin
    /// have a factor (longrope) it multiplies all of them with it once more.
    pub(super) fn can_shift(&self) -> bool {
        // SAFETY: the context is alive, the call only reads it.
        self.options.n_seq_max == 1
            && unsafe { sys::llama_memory_can_shift(sys::llama_get_memory(self.raw.as_ptr())) }
    }

    /// As [`crate::engine::Engine::shift`].
    pub(super) fn move_down(&mut self, seq: SeqId, from: Pos, by: Pos) -> Result<()> {
        self.check_seq("llama_memory_seq_add", seq)?;
        let fail = |reason: &str| Err(Error::llama("llama_memory_seq_add", reason));
        if !self.can_shift() {
            return fail("cached keys of this context cannot be moved to other positions");
        }
        if by <= 0 || from < by {
            return fail(&format!("positions from {from} down by {by}"));
        }
        // SAFETY: the context is alive, the sequence was checked; llama.cpp asserts on a memory that
        // cannot shift, which was asked; no position becomes negative; an end of -1 means "to the end".
        unsafe {
            let memory = sys::llama_get_memory(self.ctx.as_mut_ptr());
            sys::llama_memory_seq_add(memory, seq, from, -1, -by);
        }
        Ok(())
    }
}
