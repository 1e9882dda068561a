//! Sequence 0's part of the cache as one block, on the host or on the device that holds it.

use llama_cpp_sys_2 as sys;

use super::engine::LlamaEngine;
use super::{log, memory};
use crate::cache::{Cell, Pos};
use crate::error::{Error, Result};

/// The sequence that states are of.
const SEQ: sys::llama_seq_id = 0;

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
    /// Copies the sequence to the host.
    ///
    /// # Errors
    /// [`Error::Llama`] when llama.cpp refuses.
    pub fn save(&mut self) -> Result<SequenceState> {
        self.get_state(0)
    }

    /// Replaces the sequence by what was saved. The cells are chosen anew.
    ///
    /// # Errors
    /// [`Error::Llama`] when llama.cpp refuses, for want of cells most often: the sequence is empty
    /// then.
    pub fn restore(&mut self, state: &SequenceState) -> Result<()> {
        self.set_state(state, 0)
    }

    /// Copies the sequence within the memory that holds it. There is one such copy, and a second
    /// one takes its place.
    ///
    /// # Errors
    /// [`Error::Llama`] when llama.cpp refuses: most often for want of memory.
    pub fn save_on_device(&mut self) -> Result<()> {
        self.on_device = None;
        self.on_device = Some(self.get_state(ON_DEVICE)?);
        Ok(())
    }

    /// Replaces the sequence by the copy of [`LlamaEngine::save_on_device`], which stays.
    ///
    /// # Errors
    /// [`Error::Llama`] without such a copy, or when llama.cpp refuses as in
    /// [`LlamaEngine::restore`].
    pub fn restore_from_device(&mut self) -> Result<()> {
        let Some(state) = self.on_device.take() else {
            return Err(Error::llama(
                "llama_state_seq_set_data_ext",
                "nothing was saved on the device",
            ));
        };
        let done = self.set_state(&state, ON_DEVICE);
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
            // The cells of what is restored are known in an empty cache alone.
            let reason = "into a context of several sequences";
            return Err(Error::llama("llama_state_seq_set_data_ext", reason));
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
            false => Err(Error::llama(
                "llama_state_seq_set_data_ext",
                "the state holds other positions than the books say",
            )),
        }
    }

    fn get_state(&mut self, flags: sys::llama_state_seq_flags) -> Result<SequenceState> {
        const CALL: &str = "llama_state_seq_get_data_ext";
        log::forget();
        let context = self.raw.as_ptr();
        // SAFETY: the context is alive and borrowed mutably.
        let size = unsafe { sys::llama_state_seq_get_size_ext(context, SEQ, flags) };
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
            sys::llama_state_seq_get_data_ext(context, bytes.as_mut_ptr(), size, SEQ, flags)
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
        state: &SequenceState,
        flags: sys::llama_state_seq_flags,
    ) -> Result<()> {
        log::forget();
        // SAFETY: the context is alive and borrowed mutably; the bytes are readable for their
        // length, of which llama.cpp reads no more than it is told. It wrote them itself, in this
        // process or in a file with a checksum, and they are read with the flags they were written
        // with; a state on the device is the last one of this context.
        let read = unsafe {
            sys::llama_state_seq_set_data_ext(
                self.raw.as_ptr(),
                state.bytes.as_ptr(),
                state.bytes.len(),
                SEQ,
                flags,
            )
        };
        if read != state.bytes.len() {
            return Err(Error::llama(
                "llama_state_seq_set_data_ext",
                log::take_reason("the state does not fit"),
            ));
        }
        self.counted = state.counted.or(self.counted);
        self.recount()
    }
}
