//! Contexts of a model's first layers, for trial runs.

use llama_cpp_sys_2 as sys;

use {
    super::{ContextOptions, LlamaEngine, SamplerOptions},
    crate::engine::{Engine, TrialRuns},
    crate::error::{Error, Result},
};

/// Cuts the context off after this many layers.
pub(super) fn set(n_layer_first: Option<u32>, params: &mut sys::llama_context_params) {
    if let Some(n) = n_layer_first {
        params.n_layer_first = n;
        params.n_outputs_max = 1;
    }
}

/// Cells that a context made in advance is good for: more than a picture of 16 crops takes.
const CELLS_IN_ADVANCE: usize = 4096;

impl LlamaEngine {
    /// An empty engine of the layers up to the last whose attention is read, that computes as this
    /// one does.
    pub(super) fn trial_engine(&self, n_ctx: usize) -> Result<Option<Box<LlamaEngine>>> {
        let Some(last) = self.last_score_layer() else {
            return Ok(None);
        };
        let options = ContextOptions {
            n_ctx: u32::try_from(n_ctx).unwrap_or(u32::MAX),
            // One that stays shrinks when it is not needed.
            kv_size: self.options.kv_size.filter(|_| self.keeps_trial()),
            n_seq_max: 1,
            // The smaller cache must not change what llama.cpp's rule says of the real one.
            rope_factors: self.rope_factors(),
            ..self.options.clone()
        };
        let (sampler, threads) = (&SamplerOptions::GREEDY, self.threads.clone());
        let engine = Self::of_layers(&self.model, options, sampler, Some(last + 1), threads)?;
        Ok(Some(Box::new(engine)))
    }

    pub(super) fn last_score_layer(&self) -> Option<u32> {
        self.options.score_layers.last().copied()
    }

    /// Of a trial run's own context: forgets the run.
    fn empty(&mut self) -> Result<()> {
        self.clear();
        self.keep_hidden(false)?;
        self.tidy()?;
        self.moved.clear();
        Ok(())
    }

    /// On a GPU a context brings pinned memory, queues and libraries with it. On a CPU it takes
    /// milliseconds to make, and its buffers are better given back.
    fn keeps_trial(&self) -> bool {
        self.options.kv_size.is_some() && self.model.may_use_gpu()
    }
}

impl TrialRuns for LlamaEngine {
    fn begin(&mut self, n_cells: usize, goes_on: bool) -> Result<&mut (dyn Engine + '_)> {
        let fits = |engine: &LlamaEngine| engine.n_ctx >= n_cells;
        let mut kept = self.trial.take().filter(|engine| fits(engine));
        if kept.is_none() {
            // Kept ones are for conversations, which grow.
            let n_ctx = match self.keeps_trial() {
                true => n_cells.max((2 * n_cells).max(CELLS_IN_ADVANCE).min(self.n_ctx)),
                false => n_cells,
            };
            kept = self.trial_engine(n_ctx)?;
        }
        let engine = kept.ok_or_else(|| Error::contract("a trial run without score layers"))?;
        let engine = self.trial.insert(engine);
        engine.grow(n_cells)?;
        engine.keep_hidden(goes_on)?;
        Ok(engine.as_mut())
    }

    fn end(&mut self) -> Result<()> {
        let keep = self.keeps_trial();
        // One that cannot be emptied is made anew when it is needed: what it was for is done.
        self.trial = self
            .trial
            .take()
            .filter(|_| keep)
            .and_then(|mut engine| engine.empty().is_ok().then_some(engine));
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        if self.keeps_trial() && self.trial.is_none() {
            self.trial = self.trial_engine(self.n_ctx.min(CELLS_IN_ADVANCE))?;
        }
        Ok(())
    }
}
