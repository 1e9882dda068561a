//! The hall of slots over a real model: one thread owns the model, its vision file and one context, and
//! answers questions that come through a bounded queue.
//!
//! **A step.** Each round of the loop takes waiting questions into free slots, encodes one picture at most,
//! and takes one step of all slots together ([`crate::generate::together`]): a batch of a prompt, or a token
//! of an answer, in as few passes over the weights as can be. Long prompts and pictures thus never stop the
//! others for longer than a batch or a picture.
//!
//! **Cells.** The slots share one cache. A question is let in when the cells that it will take are free: those
//! of its prompt, those that its policy may call back, and those of the tokens that it asks for. An answer
//! without a limit, or with one that the whole cache could not hold, is promised the slot's equal share, and
//! takes more as long as there are free ones. What is promised to one is never taken by another, and what a
//! policy evicts is free at once. When cells run short, idle slots are emptied first, those that were idle
//! longest before others. A slot that a question further back would go on from is spared as long as other slots
//! work, and is the last to be emptied. If that is not enough, the question waits, and those behind it do: none overtakes.
//! An answer without a limit that finds no cell waits, too, and goes before new questions. Only where all
//! answers wait for each other, the largest ends ([`crate::generate::Finish::Context`]).
//!
//! **What is held.** A slot remembers what went in, picture by picture and token by token. A question
//! goes to the slot that it names, otherwise to the one that holds most of its prompt, if that is a tenth of it or more,
//! otherwise to the one that was idle longest. Under `full`, what both begin with stays and the rest is taken back. Under a
//! policy that evicts, a slot goes on only where the prompt extends what it holds, up to the end of its
//! newest answer; otherwise it begins anew, as it does under another policy than before.
//!
//! **One context.** What the context computes with is the same for all: the cache's types, what steps
//! attend to, and the layers whose attention is read. A question whose policy wants other layers, or that wants
//! to attend to something else, is refused. Lookups (`attend`) need a hall of one slot.

mod admit;
mod chooser;
mod desk;
mod file;
mod mind;
mod pictures;
mod real;
mod room;
mod steps;
mod stops;
mod units;
mod watch;
mod work;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::ask::{Ask, Facts, Hall, Part, Refused, SlotState, Stats, Told};
use crate::build::build;
use crate::engine::{Engine, Token, Vocabulary};
use crate::error::{Error, Result};
use crate::llama::{ByPolicy, ContextOptions, Model, SamplerOptions, Vision};
use crate::open::{Opened, Plan, Reach, RopeChoice};
use crate::policy::{Limits, PolicySpec};
use desk::Desk;
pub use file::opened as saved_slot;
use real::Real;
use work::Worker;

/// Slots where nobody says how many.
pub const SLOTS: u32 = 4;

/// How a hall is opened.
#[derive(Clone, Debug)]
pub struct HallOptions {
    /// How the context is made, whose cells all slots share. `n_seq_max` is the hall's.
    pub context: ContextOptions,
    /// Which longrope factors a model with two sets takes.
    pub rope: RopeChoice,
    /// What leaves the cache, where a question does not say.
    pub policy: PolicySpec,
    /// How tokens are chosen, where a question does not say. The hall only hands it on ([`Facts::sampler`]).
    pub sampler: SamplerOptions,
    /// Slots. `None`: four, or one for a model whose cache holds a single sequence.
    pub n_parallel: Option<u32>,
    /// Questions that may wait beside those that a slot is free for.
    pub queue: usize,
    /// Bytes of embeddings of pictures that are kept; 0: none.
    pub picture_cache_bytes: u64,
    /// Lets questions choose policies that read attention also where the hall's own does not, at the cost
    /// of some memory.
    pub policy_by_request: bool,
    /// Keeps what steps looked up, for those who watch: it costs some memory and time, where steps look up.
    pub watch: bool,
    /// What the model is called; `None`: as its file.
    pub alias: Option<String>,
}

impl Default for HallOptions {
    fn default() -> Self {
        HallOptions {
            context: ContextOptions {
                by_policy: ByPolicy::ALL,
                ..ContextOptions::default()
            },
            rope: RopeChoice::default(),
            policy: PolicySpec::default(),
            sampler: SamplerOptions::default(),
            n_parallel: None,
            queue: 64,
            picture_cache_bytes: 256 << 20,
            policy_by_request: true,
            watch: false,
            alias: None,
        }
    }
}

/// Opens the hall: makes the context and starts its thread.
///
/// # Errors
/// Those of [`Plan::new`] and [`Plan::open`]; [`Error::Option`] for a number of slots that cannot be.
pub fn open(options: HallOptions, model: Model, vision: Option<Vision>) -> Result<Arc<dyn Hall>> {
    let slots = match options.n_parallel {
        Some(n) => n,
        None if model.eviction_obstacle().is_some() || !options.context.attend.is_whole() => 1,
        None => SLOTS,
    };
    let context = ContextOptions {
        n_seq_max: slots,
        ..options.context.clone()
    };
    let make = |others: bool| -> Result<(Opened, Limits, serde_json::Value)> {
        let mut plan = Plan::new(&model, vision.as_ref(), &context, &options.policy)?;
        plan.choose_rope(options.rope, || Ok(Reach::Cache))?;
        if others {
            plan.read_for_others(&options.policy.options)?;
        }
        if options.watch {
            plan.keep_sets();
        }
        let (limits, params) = (plan.limits(), plan.policy().params());
        Ok((plan.open(&options.sampler)?, limits, params))
    };
    // A cache whose attention cannot be read serves the hall's own policy.
    let (opened, limits, policy_params) = match options.policy_by_request {
        true => make(true).or_else(|_| make(false))?,
        false => make(false)?,
    };
    let reach = opened.reach;
    let (_, engine) = opened.session.swap(());
    let context = engine.options();
    let alias = options.alias.unwrap_or_else(|| name(model.path()));
    let facts = Facts {
        model_path: model.path().to_owned(),
        alias,
        arch: model.arch().to_owned(),
        description: model.description(),
        chat_template: model.chat_template(),
        bos: model
            .bos()
            .map(|bos| model.written(bos))
            .unwrap_or_default(),
        eos: model
            .eos()
            .map(|eos| model.written(eos))
            .unwrap_or_default(),
        n_ctx: engine.n_cells(),
        slots: slots as usize,
        vision: vision.is_some(),
        bos_per_text: vision.as_ref().is_some_and(Vision::bos_per_text),
        n_vocab: model.n_vocab(),
        n_ctx_train: model.n_ctx_train() as usize,
        n_embd: model.n_embd(),
        size: model.bytes(),
        n_params: model.n_params(),
        policy: options.policy.name.clone(),
        policy_params,
        score_layers: context.score_layers.clone(),
        attend: engine.attend().copied(),
        type_k: context.type_k.name().to_owned(),
        type_v: context.type_v.name().to_owned(),
        sampler: options.sampler,
        build: Some(build()),
    };
    let mind = Real {
        engine,
        vision,
        limits,
        reach,
    };
    let (policy, bytes) = (options.policy, options.picture_cache_bytes);
    let n = slots as usize;
    let desk = Desk::open(n, options.queue, move |shared| {
        // The plan has made this policy once.
        if let Ok(mut worker) = Worker::new(mind, n, policy, bytes, shared) {
            worker.run();
        }
    })?;
    Ok(Arc::new(Front { desk, model, facts }))
}

/// A file's name without what says that it is a model.
fn name(path: &Path) -> String {
    let name = path.file_stem().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// What those who ask hold.
struct Front {
    desk: Desk,
    model: Model,
    facts: Facts,
}

impl Hall for Front {
    fn ask(
        &self,
        ask: Ask,
        tell: Box<dyn FnMut(Told) -> bool + Send>,
    ) -> std::result::Result<(), Refused> {
        self.desk.ask(ask, tell)
    }

    fn slots(&self) -> Vec<SlotState> {
        self.desk.slots()
    }

    fn stats(&self) -> Stats {
        self.desk.stats()
    }

    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn tokenize(&self, text: &str, bos: bool, special: bool) -> Result<Vec<Token>> {
        self.model.tokenize(text, bos, special)
    }

    fn piece(&self, token: Token) -> Result<Vec<u8>> {
        if !self.model.has_token(token) {
            let n = self.model.n_vocab();
            return Err(Error::contract(format!("token {token} of {n}")));
        }
        let mut bytes = Vec::new();
        self.model.piece(token, &mut bytes)?;
        Ok(bytes)
    }

    fn count(&self, prompt: Vec<Part>) -> Result<usize> {
        self.desk.count(prompt)
    }

    fn save(&self, slot: usize, file: &Path) -> Result<(usize, u64)> {
        self.desk.save(slot, file)
    }

    fn restore(&self, slot: usize, file: &Path) -> Result<(usize, u64)> {
        self.desk.restore(slot, file)
    }

    fn erase(&self, slot: usize) -> Result<usize> {
        self.desk.erase(slot)
    }

    fn close(&self, cancel: Arc<AtomicBool>) {
        self.desk.close(cancel);
    }
}

#[cfg(test)]
mod tests;
