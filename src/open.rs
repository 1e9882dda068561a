//! From a loaded model to an empty context under a policy: the size of its cache, the layers whose
//! attention is read, the rope factors and how far they reach, the trial runs. Every command and the
//! library open a model here, by one rule.

use crate::attend::Attend;
use crate::cache::BinOptions;
use crate::controller::Controller;
use crate::engine::{Batch, Engine, Input, Observation};
use crate::error::{Error, Result};
use crate::generate::Session;
use crate::llama::{
    CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, RopeFactors, SamplerOptions,
    Vision,
};
use crate::policy::{EvictionPolicy, Limits, Observe, PolicyOptions, PolicySpec};

/// Cells that a cache with eviction begins with.
const KV_SIZE_AT_FIRST: u32 = 256;

/// Some cells more than any model was trained for; llama.cpp's and our own bookkeeping of so many
/// takes gigabytes before the cache itself does.
const MOST_CELLS: u32 = 1 << 24;

/// Which longrope factors to use (`--rope-factors`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RopeChoice {
    /// By the positions that the run can reach.
    #[default]
    Auto,
    /// Those for positions up to the length that the model was first trained for.
    Short,
    /// Those for all positions that the model was trained for.
    Long,
    /// By the size of the cache, as llama.cpp does.
    Context,
}

impl RopeChoice {
    /// Its name, as `--rope-factors` takes it.
    pub fn name(self) -> &'static str {
        match self {
            RopeChoice::Auto => "auto",
            RopeChoice::Short => "short",
            RopeChoice::Long => "long",
            RopeChoice::Context => "context",
        }
    }
}

/// How far the positions of a run can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// As far as the cache: a chat, or an answer without an end.
    Cache,
    /// A prompt and its answer.
    Positions(usize),
}

/// A context that can be made, and the policy that will rule it.
pub struct Plan {
    model: Model,
    context: ContextOptions,
    limits: Limits,
    policy: Box<dyn EvictionPolicy>,
    reach: Option<usize>,
}

impl Plan {
    /// `context` as the user chose it; what the policy and the pictures need is added.
    ///
    /// # Errors
    /// [`Error::Option`] for a size or parameters that cannot be, [`Error::Unsupported`] for a
    /// model whose cache does not allow what the policy does.
    pub fn new(
        model: &Model,
        vision: Option<&Vision>,
        context: &ContextOptions,
        policy: &PolicySpec,
    ) -> Result<Self> {
        let mut context = sized(&decided(context, model, policy), model)?;
        let limits = Limits {
            n_layer: model.n_layer(),
            n_cells: padded(context.n_ctx) as usize,
        };
        let policy = policy.create(limits)?;
        context.non_causal_images = vision.is_some_and(Vision::non_causal);
        if policy.evicts() {
            if let Some(reason) = model.eviction_obstacle() {
                return Err(Error::Unsupported {
                    policy: policy.name(),
                    reason: reason.into(),
                });
            }
            if let Observe::Layers { layers, .. } = policy.observe() {
                context.score_layers = layers;
            }
            // `full` allocates all of its cells at once, as llama.cpp does.
            context.kv_size = Some(KV_SIZE_AT_FIRST);
        }
        Ok(Plan {
            model: model.clone(),
            context,
            limits,
            policy,
            reach: None,
        })
    }

    /// How the context will be made.
    pub fn context(&self) -> &ContextOptions {
        &self.context
    }

    /// What the policy was made for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The policy that will rule it.
    pub fn policy(&self) -> &dyn EvictionPolicy {
        &*self.policy
    }

    /// Lets a trace see more: the attention of the layers that `options` name under a policy that
    /// asks for none, which is what any other policy would have seen, and what lookups choose.
    ///
    /// # Errors
    /// [`Error::Option`] for layers that are not there, or a model whose cells cannot be told apart.
    pub fn read_for_trace(&mut self, options: &PolicyOptions) -> Result<()> {
        self.keep_sets();
        if self.policy.evicts() {
            return Ok(());
        }
        if let Some(reason) = self.model.eviction_obstacle() {
            let reason = format!("attention by token cannot be read: {reason}");
            return Err(Error::option("trace", reason));
        }
        options.validate(self.limits)?;
        self.context.score_layers = options.layers.resolve(self.limits.n_layer);
        Ok(())
    }

    /// Lets policies that are chosen later see the attention that these options name, where the policy
    /// asks for none.
    ///
    /// # Errors
    /// [`Error::Option`] for layers that are not there.
    pub fn read_for_others(&mut self, options: &PolicyOptions) -> Result<()> {
        if self.context.score_layers.is_empty() && self.model.eviction_obstacle().is_none() {
            options.validate(self.limits)?;
            self.context.score_layers = options.layers.resolve(self.limits.n_layer);
        }
        Ok(())
    }

    /// Keeps what lookups choose, where there are some, for those who want to see it.
    pub fn keep_sets(&mut self) {
        self.context.keep_sets = !self.context.attend.is_whole();
    }

    /// Chooses the longrope factors; other models have one set and need no choice. `reach` is asked
    /// only where it decides: it may have to cut up pictures to count their tokens.
    ///
    /// # Errors
    /// Those of `reach`.
    pub fn choose_rope(
        &mut self,
        choice: RopeChoice,
        reach: impl FnOnce() -> Result<Reach>,
    ) -> Result<()> {
        let (factors, reach) = self.rope(choice, reach)?;
        self.context.rope_factors = factors;
        self.reach = reach;
        Ok(())
    }

    /// The factors, and the positions that they reach, where they end.
    fn rope(
        &self,
        choice: RopeChoice,
        reach: impl FnOnce() -> Result<Reach>,
    ) -> Result<(RopeFactors, Option<usize>)> {
        let Some(from) = self.model.long_rope_from() else {
            return Ok((RopeFactors::Context, None));
        };
        let (from, n_ctx) = (from as usize, self.limits.n_cells);
        // Without eviction no position lies beyond the cache, nor where positions move down.
        let shifts = self.policy.shifts();
        let within = !self.policy.evicts() || shifts;
        let short = (
            RopeFactors::Short,
            (!shifts || n_ctx > from).then_some(from),
        );
        let long = (RopeFactors::Long, None);
        let positions = match choice {
            RopeChoice::Context => return Ok((RopeFactors::Context, None)),
            RopeChoice::Long => return Ok(long),
            RopeChoice::Short => return Ok(short),
            RopeChoice::Auto if within && n_ctx <= from => return Ok(short),
            RopeChoice::Auto => match reach()? {
                Reach::Positions(n) if within => n.min(n_ctx),
                Reach::Positions(n) => n,
                Reach::Cache => n_ctx,
            },
        };
        Ok(if positions > from { long } else { short })
    }

    /// The same under a policy that has no name for users.
    pub fn under(self, policy: Box<dyn EvictionPolicy>) -> Self {
        Plan { policy, ..self }
    }

    /// Whether a context is what this plan would make.
    pub fn fits(&self, opened: &Opened) -> bool {
        *opened.session.engine.options() == self.context
    }

    /// The same but for its rope factors.
    pub fn fits_but_for_rope(&self, opened: &Opened) -> bool {
        let options = opened.session.engine.options();
        let context = ContextOptions {
            rope_factors: options.rope_factors,
            ..self.context.clone()
        };
        *options == context
    }

    /// Begins anew in a context that [fits](Plan::fits).
    ///
    /// # Errors
    /// Those of the engine.
    pub fn reopen(self, opened: &mut Opened) -> Result<()> {
        opened.empty()?;
        let session = &mut opened.session;
        session.controller = Controller::new(self.policy, session.engine.n_cells());
        session.keep_rows_as(kept(&session.controller, &self.context));
        session.forget();
        opened.reach = self.reach;
        Ok(())
    }

    /// Makes the context, empty, with what trial runs will need.
    ///
    /// # Errors
    /// As [`LlamaEngine::new`].
    pub fn open(self, sampler: &SamplerOptions) -> Result<Opened> {
        let engine = LlamaEngine::new(&self.model, self.context, sampler)?;
        let controller = Controller::new(self.policy, engine.n_cells());
        let bin = kept(&controller, engine.options());
        let mut session = Session::new(engine, controller).with_store(bin);
        session.prepare()?;
        Ok(Opened {
            session,
            reach: self.reach,
        })
    }
}

/// What was left to the policy. `hae` does best with a quantized cache of which each layer looks up
/// what it needs (docs/defaults.md has the figures). The others are as llama.cpp, and so is `hae` under a
/// budget, where policies are compared at the same memory.
fn decided(context: &ContextOptions, model: &Model, policy: &PolicySpec) -> ContextOptions {
    let mut context = context.clone();
    if policy.name != "hae" || policy.options.kv_budget.is_some() {
        return context;
    }
    let small = CacheType::Q8_0;
    let fits = model.takes_cache(small) && context.flash_attention != FlashAttention::Off;
    if context.by_policy.types && fits {
        (context.type_k, context.type_v) = (small, small);
    }
    // What a step looks up is said by cell, and other sequences' cells are among them.
    let alone = context.n_seq_max == 1 && context.flash_attention != FlashAttention::Off;
    if context.by_policy.attend && alone {
        context.attend = Attend::FEW;
    }
    context
}

/// Where rows of evicted tokens wait: nowhere under a policy that never asks for them.
fn kept(controller: &Controller, context: &ContextOptions) -> BinOptions {
    match controller.recalls() {
        true => context.bin,
        false => BinOptions::OFF,
    }
}

/// The context with the model's own length where none is given, and no batch longer than it.
///
/// # Errors
/// [`Error::Option`] for more cells than anything could use.
pub fn sized(context: &ContextOptions, model: &Model) -> Result<ContextOptions> {
    let n_ctx = match context.n_ctx {
        0 => model.n_ctx_train(),
        n => n,
    };
    if n_ctx > MOST_CELLS {
        let reason = format!("{n_ctx} cells, expected at most {MOST_CELLS}");
        return Err(Error::option("n_ctx", reason));
    }
    Ok(ContextOptions {
        n_ctx,
        n_batch: context.n_batch.min(n_ctx),
        n_ubatch: context.n_ubatch.min(n_ctx),
        ..context.clone()
    })
}

/// The cells that llama.cpp makes of `-c`.
pub fn padded(n_ctx: u32) -> u32 {
    n_ctx.next_multiple_of(256)
}

/// The set of rope factors that a context uses, for reports; `none` for models without two sets.
pub fn rope_name(model: &Model, context: &ContextOptions) -> &'static str {
    match context.rope_factors.resolved(model, context.n_ctx) {
        RopeFactors::Context => "none",
        RopeFactors::Long => "long",
        RopeFactors::Short => "short",
    }
}

/// A context under a policy.
pub struct Opened {
    /// The engine, the controller and the loops over them.
    pub session: Session<LlamaEngine>,
    /// Positions that the chosen rope factors reach, where they end before the cache does.
    pub reach: Option<usize>,
}

impl Opened {
    /// The model that it runs.
    pub fn model(&self) -> &Model {
        self.session.engine.model()
    }

    /// Decodes one token and forgets it: the first decode of a context makes its graphs, which is
    /// no part of what is measured after it.
    ///
    /// # Errors
    /// The engine's own.
    pub fn warm_up(&mut self) -> Result<()> {
        let engine = &mut self.session.engine;
        let batch = Batch {
            logits: true,
            ..Batch::new(Input::Tokens(&[0]), &[0])
        };
        engine.decode(batch, &mut Vec::new(), &mut Observation::default())?;
        engine.logits()?;
        engine.clear();
        Ok(())
    }

    /// Forgets everything that went in.
    pub fn clear(&mut self) {
        self.session.engine.clear();
        self.session.controller.clear();
        self.session.forget();
    }

    /// Empties the context and gives back what it had grown by.
    ///
    /// # Errors
    /// The engine's own.
    pub fn empty(&mut self) -> Result<()> {
        self.session.engine.clear();
        self.session.engine.compact(0, &mut Vec::new())
    }
}
