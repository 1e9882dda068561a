//! Prompts that go on where a trial run came to (the patches `layers-in-two-contexts` and
//! `midway-on-the-device`): the trial's context keeps what enters the last of its layers, and the
//! real one's graphs take it from there, with K and V of the layers before.

use llama_cpp_sys_2 as sys;

use super::engine::LlamaEngine;
use super::log;
use super::memory::OwnBlocks;
use crate::engine::Input;
use crate::error::{Error, Result};

fn absent() -> Error {
    Error::contract("rows that no trial run has kept")
}

fn reason(call: &'static str, code: i32) -> Error {
    match code {
        sys::LLAMA_HAE_LAYERS_ERR_NOTHING => absent(),
        sys::LLAMA_HAE_LAYERS_ERR_MODEL => Error::option(
            "dap_mode",
            "midway: the layers of this model cannot be taken apart, expected exact or early",
        ),
        code => Error::llama(call, log::take_reason(&format!("status {code}"))),
    }
}

impl LlamaEngine {
    /// In a context of the first layers: keeps what its tokens are when they come to the last of
    /// them, or stops to.
    ///
    /// # Errors
    /// [`Error::Option`] for models that cannot, [`Error::Llama`] when there is no memory for it.
    pub(super) fn keep_hidden(&mut self, keep: bool) -> Result<()> {
        let il = match keep {
            true => self.last_score_layer().unwrap_or(0),
            false => 0,
        };
        let _blocks = OwnBlocks::new();
        log::forget();
        // SAFETY: the context is alive and borrowed mutably.
        match unsafe { sys::llama_hae_layers_set(self.raw.as_ptr(), il) } {
            0 => Ok(()),
            code => Err(reason("llama_hae_layers_set", code)),
        }
    }

    /// Right before a batch: lets it begin where the trial run came to, if it goes on from there.
    ///
    /// # Errors
    /// [`Error::Contract`] for cells of which the trial run has kept nothing.
    pub(super) fn go_on(&mut self, input: &Input<'_>) -> Result<()> {
        const CALL: &str = "llama_hae_layers_from";
        let Input::Trial(cells) = *input else {
            return Ok(());
        };
        let trial = self.trial.as_deref().ok_or_else(absent)?;
        let n = u32::try_from(cells.len()).unwrap_or(0);
        log::forget();
        // SAFETY: both contexts are alive, this one is borrowed mutably and owns the other; there
        // are at least n cells.
        let done = unsafe {
            sys::llama_hae_layers_from(self.raw.as_ptr(), trial.raw.as_ptr(), cells.as_ptr(), n)
        };
        match u32::try_from(done) {
            Ok(_) => Ok(()),
            Err(_) => Err(reason(CALL, done)),
        }
    }
}
