//! The sequence's part of the cache as one block, on the host or on the device that holds it.

use llama_cpp_sys_2 as sys;

use super::context::{LlamaEngine, SEQ};
use super::log;
use crate::cache::Cell;
use crate::error::{Error, Result};

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

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl LlamaEngine<'_> {
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
    /// [`Error::Llama`] when llama.cpp refuses, or for a quantized cache without the feature
    /// `kv-patches`: llama.cpp by itself copies only a part of it.
    pub fn save_on_device(&mut self) -> Result<()> {
        let quantized = self.options.type_k.is_quantized() || self.options.type_v.is_quantized();
        if quantized && !cfg!(feature = "kv-patches") {
            return Err(Error::llama(
                "llama_state_seq_get_data_ext",
                "a quantized cache cannot be copied on the device without the feature kv-patches",
            ));
        }
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

    /// The sequence as bytes, to be kept in a file.
    ///
    /// # Errors
    /// As [`LlamaEngine::save`].
    pub fn state(&mut self) -> Result<Vec<u8>> {
        Ok(self.save()?.bytes)
    }

    /// Fills an empty cache with the `n` tokens of a state that an engine with the same model and
    /// cache types gave. Their cells follow one another in the order of the old ones.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when they do not fit, [`Error::Llama`] when llama.cpp refuses the
    /// state; the cache is then empty.
    pub fn restore_bytes(&mut self, bytes: Vec<u8>, n: usize) -> Result<Vec<Cell>> {
        self.clear();
        if n > self.n_ctx {
            return Err(Error::ContextFull { n_ctx: self.n_ctx });
        }
        self.grow(n)?;
        let n = Cell::try_from(n).unwrap_or(Cell::MAX);
        let counted = self.counted.map(|_| n);
        let restored = self.restore(&SequenceState { bytes, counted });
        if restored.is_err() {
            self.clear();
        }
        restored.map(|()| (0..n).collect())
    }

    fn get_state(&mut self, flags: sys::llama_state_seq_flags) -> Result<SequenceState> {
        log::forget();
        let context = self.raw.as_ptr();
        // SAFETY: the context is alive and borrowed mutably; the second call writes no more than
        // the buffer's size, which it is told.
        let (bytes, written) = unsafe {
            let size = sys::llama_state_seq_get_size_ext(context, SEQ, flags);
            let mut bytes = vec![0; size];
            let written =
                sys::llama_state_seq_get_data_ext(context, bytes.as_mut_ptr(), size, SEQ, flags);
            (bytes, written)
        };
        if written == 0 || written != bytes.len() {
            let reason = format!("{written} of {} bytes written", bytes.len());
            return Err(Error::llama(
                "llama_state_seq_get_data_ext",
                log::take_reason(&reason),
            ));
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
        // SAFETY: the context is alive and borrowed mutably; the bytes are a whole state that
        // llama.cpp wrote (in this process, or in a file with a checksum), read with the flags they were written
        // with, and a state on the device is the last one of this context.
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
        self.counted = state.counted;
        self.recount()
    }
}
