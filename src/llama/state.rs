//! The cache's content as bytes, in llama.cpp's own format.

use llama_cpp_sys_2 as sys;

use super::LlamaEngine;
use super::context::SEQ;
use super::log;
use crate::cache::Cell;
use crate::engine::Engine;
use crate::error::{Error, Result};

impl LlamaEngine<'_> {
    /// Everything that the cache holds, wherever it lies.
    ///
    /// # Errors
    /// [`Error::Llama`] when llama.cpp cannot write it.
    pub fn state(&mut self) -> Result<Vec<u8>> {
        // SAFETY: the context is alive.
        let size = unsafe { sys::llama_state_seq_get_size(self.raw(), SEQ) };
        let mut state = vec![0; size];
        // SAFETY: the buffer holds the size that llama.cpp asked for.
        let written =
            unsafe { sys::llama_state_seq_get_data(self.raw(), state.as_mut_ptr(), size, SEQ) };
        if size == 0 || written != size {
            return Err(Error::llama(
                "llama_state_seq_get_data",
                format!("{written} of {size} bytes"),
            ));
        }
        Ok(state)
    }

    /// Fills an empty cache with the `n` tokens of a state that an engine with the same model and
    /// cache types gave. Their cells follow one another in the order of the old ones.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when they do not fit, [`Error::Llama`] when llama.cpp refuses the
    /// state; the cache is then empty.
    pub fn set_state(&mut self, state: &[u8], n: usize) -> Result<Vec<Cell>> {
        self.clear();
        if n > self.n_cells() {
            let n_ctx = self.n_cells();
            return Err(Error::ContextFull { n_ctx });
        }
        self.make_room(n)?;
        log::forget();
        // SAFETY: the slice is valid for its length; llama.cpp reads no further.
        let read =
            unsafe { sys::llama_state_seq_set_data(self.raw(), state.as_ptr(), state.len(), SEQ) };
        if read != state.len() {
            self.clear();
            return Err(Error::llama(
                "llama_state_seq_set_data",
                log::take_reason("the state does not fit the model or the cache's types"),
            ));
        }
        let n = Cell::try_from(n).unwrap_or(Cell::MAX);
        self.count(n);
        Ok((0..n).collect())
    }
}
