//! A sequence's part of the cache as one block, on the host or on the device that holds it.

use std::collections::HashMap;

use llama_cpp_sys_2 as sys;

use super::engine::LlamaEngine;
use super::{log, memory};
use crate::cache::{Cell, Pos};
use crate::engine::SeqId;
use crate::error::{Error, Result};

const SET: &str = "llama_state_seq_set_data_ext";

/// Of a state that was not made with these books.
const OTHERS: &str = "the state holds other positions than the books say";

/// `LLAMA_STATE_SEQ_FLAGS_ON_DEVICE`, a macro that the bindings lack.
const ON_DEVICE: sys::llama_state_seq_flags = 2;

/// What a sequence had in the cache: positions, K and V, but nothing of the sampler. It fits into
/// contexts on the same model with the same cache types and the same way of storing V.
#[derive(Clone, Debug)]
pub struct SequenceState {
    bytes: Vec<u8>,
    counted: Option<Cell>,
}

impl SequenceState {
    /// Bytes on the host.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has no bytes, as a file cut short may leave it.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// One out of a file. llama.cpp checks the sizes in it, not what its numbers mean, so whoever
    /// calls this has to know where the bytes come from.
    pub(crate) fn from_file(bytes: Vec<u8>) -> Self {
        SequenceState {
            bytes,
            counted: None,
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl LlamaEngine {
    /// Copies sequence 0 to the host.
    ///
    /// # Errors
    /// As [`LlamaEngine::save_of`].
    pub fn save(&mut self) -> Result<SequenceState> {
        self.save_of(0)
    }

    /// Copies the sequence to the host. The copy does not say which it was: any can become it.
    ///
    /// # Errors
    /// [`Error::Llama`] for a sequence that there is not, or when llama.cpp refuses.
    pub fn save_of(&mut self, seq: SeqId) -> Result<SequenceState> {
        self.get_state(seq, 0)
    }

    /// Replaces sequence 0 by what was saved. The cells are chosen anew.
    ///
    /// # Errors
    /// [`Error::Llama`] when llama.cpp refuses, for want of cells most often: the sequence is empty
    /// then.
    pub fn restore(&mut self, state: &SequenceState) -> Result<()> {
        self.set_state(0, state, 0)
    }

    /// Copies sequence 0 within the memory that holds it. There is one such copy, and a second
    /// one takes its place.
    ///
    /// # Errors
    /// [`Error::Llama`] when llama.cpp refuses: most often for want of memory.
    pub fn save_on_device(&mut self) -> Result<()> {
        self.on_device = None;
        self.on_device = Some(self.get_state(0, ON_DEVICE)?);
        Ok(())
    }

    /// Replaces sequence 0 by the copy of [`LlamaEngine::save_on_device`], which stays.
    ///
    /// # Errors
    /// [`Error::Llama`] without such a copy, or when llama.cpp refuses as in
    /// [`LlamaEngine::restore`].
    pub fn restore_from_device(&mut self) -> Result<()> {
        let Some(state) = self.on_device.take() else {
            return Err(Error::llama(SET, "nothing was saved on the device"));
        };
        let done = self.set_state(0, &state, ON_DEVICE);
        self.on_device = Some(state);
        done
    }

    /// Fills an empty cache with the tokens of a state that an engine with the same model and cache
    /// types gave; `pos` are their positions. Their cells follow one another in the order of the
    /// old ones.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when they do not fit, [`Error::Llama`] when llama.cpp refuses the
    /// state or it holds other positions; the cache is then empty.
    pub fn restore_tokens(&mut self, state: &SequenceState, pos: &[Pos]) -> Result<Vec<Cell>> {
        if self.options.n_seq_max > 1 {
            return self.restore_tokens_of(0, state, pos);
        }
        self.clear();
        if pos.len() > self.n_ctx {
            return Err(Error::ContextFull { n_ctx: self.n_ctx });
        }
        let n = Cell::try_from(pos.len()).unwrap_or(Cell::MAX);
        let restored = self
            .grow(pos.len())
            .and_then(|()| self.restore(state))
            .and_then(|()| self.check_restored(pos));
        match restored {
            Ok(()) => self.count(n),
            Err(_) => self.clear(),
        }
        restored.map(|()| (0..Cell::try_from(n).unwrap_or(Cell::MAX)).collect())
    }

    /// Replaces the sequence by the tokens of a state, beside what the others hold; `pos` are their
    /// positions. Gives their cells, in this order.
    ///
    /// # Errors
    /// As [`LlamaEngine::restore_tokens`]; the sequence is then empty, the others are as they were.
    pub fn restore_tokens_of(
        &mut self,
        seq: SeqId,
        state: &SequenceState,
        pos: &[Pos],
    ) -> Result<Vec<Cell>> {
        self.check_seq(SET, seq)?;
        self.take_back(seq, 0, 0)?;
        if pos.len() > self.room_for(seq) {
            return Err(Error::ContextFull { n_ctx: self.n_ctx });
        }
        let restored = self
            .grow(pos.len())
            .and_then(|()| self.set_state(seq, state, 0))
            .and_then(|()| self.cells_at(seq, pos));
        if restored.is_err() {
            // What went wrong says more than what may go wrong here.
            drop(self.take_back(seq, 0, 0));
        }
        restored
    }

    /// The cells of a sequence that holds these positions and nothing else.
    fn cells_at(&self, seq: SeqId, pos: &[Pos]) -> Result<Vec<Cell>> {
        let held = self.cells_of_seq(seq)?;
        let by_pos: HashMap<Pos, Cell> = held.iter().map(|&(cell, pos)| (pos, cell)).collect();
        let cells = pos.iter().map(|pos| by_pos.get(pos).copied());
        match cells.collect::<Option<Vec<Cell>>>() {
            Some(cells) if by_pos.len() == pos.len() && held.len() == pos.len() => Ok(cells),
            _ => Err(Error::llama(SET, OTHERS)),
        }
    }

    /// Whether the cells hold these positions and nothing else, where they can be read.
    fn check_restored(&self, pos: &[Pos]) -> Result<()> {
        // Rows of a picture with two axes have other positions in the books.
        if !self.is_plain() || self.model.eviction_obstacle().is_some() {
            return Ok(());
        }
        let mut map = Vec::new();
        self.cell_map(&mut map)?;
        let held = map.iter().flatten().count();
        let same = pos.iter().zip(&map).all(|(&pos, &cell)| cell == Some(pos));
        match same && held == pos.len() {
            true => Ok(()),
            false => Err(Error::llama(SET, OTHERS)),
        }
    }

    fn get_state(
        &mut self,
        seq: SeqId,
        flags: sys::llama_state_seq_flags,
    ) -> Result<SequenceState> {
        const CALL: &str = "llama_state_seq_get_data_ext";
        self.check_seq(CALL, seq)?;
        log::forget();
        let context = self.raw.as_ptr();
        // SAFETY: the context is alive and borrowed mutably, the sequence was checked.
        let size = unsafe { sys::llama_state_seq_get_size_ext(context, seq, flags) };
        let mut bytes = Vec::new();
        let what = "a copy of the conversation's cache";
        memory::reserve(
            &mut bytes,
            size,
            CALL,
            what,
            "a smaller `n_ctx`, or a `type_k` and `type_v`",
        )?;
        bytes.resize(size, 0);
        // SAFETY: as above; the call writes no more than the buffer's size, which it is told.
        let written = unsafe {
            sys::llama_state_seq_get_data_ext(context, bytes.as_mut_ptr(), size, seq, flags)
        };
        if written == 0 || written != bytes.len() {
            let reason = format!("{written} of {} bytes written", bytes.len());
            return Err(Error::llama(CALL, log::take_reason(&reason)));
        }
        Ok(SequenceState {
            bytes,
            counted: self.counted,
        })
    }

    fn set_state(
        &mut self,
        seq: SeqId,
        state: &SequenceState,
        flags: sys::llama_state_seq_flags,
    ) -> Result<()> {
        self.check_seq(SET, seq)?;
        log::forget();
        // SAFETY: the context is alive and borrowed mutably; the sequence was checked; the bytes are readable for their
        // length, of which llama.cpp reads no more than it is told. It wrote them itself, in this
        // process or in a file with a checksum, and they are read with the flags they were written
        // with; a state on the device is the last one of this context.
        let read = unsafe {
            sys::llama_state_seq_set_data_ext(
                self.raw.as_ptr(),
                state.bytes.as_ptr(),
                state.bytes.len(),
                seq,
                flags,
            )
        };
        if read != state.bytes.len() {
            return Err(Error::llama(
                SET,
                log::take_reason("the state does not fit"),
            ));
        }
        self.counted = state.counted.or(self.counted);
        self.recount()
    }
}
