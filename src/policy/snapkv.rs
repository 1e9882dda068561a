//! `snapkv` (arXiv 2404.14469, "SnapKV: LLM Knows What You are Looking for Before Generation"): a
//! prompt is compressed once, by the attention of its last rows; what is decoded stays.
//!
//! The last W rows of the prompt (`--snapkv-window`) are the observation window. Each token before
//! it scores the sum of their attention, scores are pooled over neighbours (`--snapkv-kernel`,
//! `--snapkv-pooling`) so that what stands beside an important token stays with it, and the best
//! that the budget has room for stay, with the window. A budget of 1.0, the default, compresses
//! nothing.
//!
//! Deviations:
//! - The paper chooses for each layer and head. A cell here spans all of them, so the mean over
//!   heads and scoring layers decides for all.
//! - The budget leaves room for the tokens to come, where they are known.
//! - The window takes half of the room at most, so that there is something to choose.
//! - In a later turn, tokens of earlier ones compete again, by the attention of the new window;
//!   neighbours are those that are still there.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::budget::{BUDGET, Budget};
use super::registered::Registered;
use super::scores::{Candidate, Guard};
use super::{EvictionPolicy, Held, Limits, Observe, OptionKey, Plan, PolicyOptions, Queries};
use crate::cache::Ledger;
use crate::error::{Error, Result};

pub(super) const POLICY: Registered = Registered {
    name: "snapkv",
    reads: &[
        BUDGET,
        &[
            OptionKey::Layers,
            OptionKey::SnapkvWindow,
            OptionKey::SnapkvKernel,
            OptionKey::SnapkvPooling,
        ],
    ],
    create,
};

/// How `snapkv` looks at a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapkvOptions {
    /// Rows at the end of the prompt that judge the others, and stay.
    pub window: usize,
    /// Neighbours over which scores are pooled, the token itself included; odd.
    pub kernel: usize,
    /// How the scores of neighbours become one.
    pub pooling: Pooling,
}

/// How neighbours' scores become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// Their mean.
    Avg,
    /// The highest of them.
    Max,
}

/// Those of the authors' program.
impl Default for SnapkvOptions {
    fn default() -> Self {
        SnapkvOptions {
            window: 32,
            kernel: 5,
            pooling: Pooling::Avg,
        }
    }
}

impl SnapkvOptions {
    fn check(&self) -> Result<()> {
        if self.window == 0 {
            let reason = "0 rows, expected at least 1";
            return Err(Error::option("snapkv_window", reason));
        }
        if self.kernel.is_multiple_of(2) {
            let reason = format!("{}, expected an odd number", self.kernel);
            return Err(Error::option("snapkv_kernel", reason));
        }
        Ok(())
    }
}

struct Snapkv {
    options: SnapkvOptions,
    budget: Budget,
    layers: Vec<u32>,
    params: Value,
    to_come: Option<usize>,
}

fn create(options: &PolicyOptions, limits: Limits) -> Result<Box<dyn EvictionPolicy>> {
    options.layers.check(limits.n_layer)?;
    options.snapkv.check()?;
    let layers = options.layers.resolve(limits.n_layer);
    let mut params = POLICY.params(options);
    params["layers"] = json!(layers);
    Ok(Box::new(Snapkv {
        options: options.snapkv,
        budget: Budget::always(options, Guard::NEWEST, limits)?,
        params,
        layers,
        to_come: None,
    }))
}

impl EvictionPolicy for Snapkv {
    fn name(&self) -> &'static str {
        POLICY.name
    }

    fn params(&self) -> Value {
        self.params.clone()
    }

    fn observe(&self) -> Observe {
        Observe::Layers {
            layers: self.layers.clone(),
            queries: Queries::Window(self.options.window),
        }
    }

    fn observes_decoding(&self) -> bool {
        false
    }

    fn expect(&mut self, tokens: Option<usize>) {
        self.to_come = tokens;
    }

    fn after_prefill(&mut self, cache: &Ledger, plan: &mut Plan) -> Result<()> {
        let Some(most) = self.budget.after_prompt(Held::of(cache), self.to_come) else {
            return Ok(());
        };
        let mut tokens: Vec<Candidate> = cache
            .entries()
            .map(|e| Candidate {
                score: e.latest,
                pos: e.pos,
                cell: e.cell,
            })
            .collect();
        tokens.sort_unstable_by_key(|token| token.pos);
        // The newest token stays, whatever there is room for.
        let most = most.max(2);
        let window = self.options.window.min(most / 2);
        let before = tokens.len().saturating_sub(window);
        let leave = tokens.len().saturating_sub(most);
        if leave == 0 {
            return Ok(());
        }
        tokens.truncate(before);
        let pooled = pool(&tokens, self.options);
        for (token, score) in tokens.iter_mut().zip(pooled) {
            token.score = score;
        }
        tokens.sort_unstable();
        plan.evict
            .extend(tokens[..leave].iter().map(|token| token.cell));
        Ok(())
    }

    fn after_step(&mut self, _: &Ledger, _: &mut Plan) -> Result<()> {
        Ok(())
    }
}

/// Beyond the ends there are zeros for the mean, as in the authors' program, and nothing for the
/// maximum.
fn pool(tokens: &[Candidate], options: SnapkvOptions) -> Vec<f32> {
    let SnapkvOptions {
        kernel, pooling, ..
    } = options;
    let half = kernel / 2;
    let pooled = (0..tokens.len()).map(|i| {
        let near = &tokens[i.saturating_sub(half)..tokens.len().min(i.saturating_add(half + 1))];
        let scores = near.iter().map(|token| token.score);
        match pooling {
            Pooling::Avg => scores.sum::<f32>() / kernel as f32,
            Pooling::Max => scores.fold(0.0, f32::max),
        }
    });
    pooled.collect()
}
