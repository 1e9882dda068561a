//! Measuring what a model and a cache policy cost, in the manner of llama-bench: random tokens and
//! pictures of given numbers, each case repeated.
//!
//! One [`Work`] is one repetition in a context of its own. Whoever compares policies runs them by
//! turns ([`turns`]), so that a machine that gets busier or hotter does not favour one of them.

mod memory;
mod pictures;
mod record;
pub mod stats;

use std::time::Duration;

use serde::Serialize;

use crate::cache::{Counts, PerModality};
use crate::controller::Controller;
use crate::engine::{Batch, Engine, Input, KvBytes, Observation, Token};
use crate::error::Result;
use crate::generate::{Finish, Generated, Hooks, Segment, Session};
use crate::llama::{ContextOptions, LlamaEngine, Model, SamplerOptions, Vision};
use crate::noise::Noise;
use crate::policy::{self, Limits, PolicyOptions};
use memory::PeakRss;

pub use pictures::Pictures;
pub use record::{Field, Hardware, Kind, METRICS, Metric, Record, Settings, Subject};

/// What a test feeds and asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Test {
    /// Text tokens that are in the cache before anything is timed, from an earlier turn.
    pub n_depth: usize,
    /// Text tokens of the prompt, behind its pictures; 0: no prompt is timed.
    pub n_prompt: usize,
    /// Tokens decoded one by one after it.
    pub n_gen: usize,
    /// Pictures of the prompt.
    pub n_images: usize,
}

impl Test {
    /// Tokens that go in before the clock starts. Decoding needs one to go on from.
    fn before(&self) -> usize {
        match (self.n_depth, self.n_prompt) {
            (0, 0) => 1,
            (depth, _) => depth,
        }
    }

    /// Cells that it takes when nothing is evicted, with pictures of `image_tokens` each.
    pub fn cells(&self, image_tokens: usize) -> usize {
        [
            self.before(),
            self.n_images.saturating_mul(image_tokens),
            self.n_prompt,
            self.n_gen,
        ]
        .iter()
        .fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// The same kinds of work, shorter: what a machine has to do once, it has done afterwards.
    pub fn warm_up(&self) -> Self {
        Test {
            n_depth: 0,
            n_gen: self.n_gen.min(2),
            ..self.clone()
        }
    }

    /// llama-bench's name of it: `pp512`, `tg128 @ d4096`, and with pictures `2img+pp512+tg128`.
    pub fn name(&self) -> String {
        let part = |n: usize, text: String| (n > 0).then_some(text);
        let parts = [
            part(self.n_images, format!("{}img", self.n_images)),
            part(self.n_prompt, format!("pp{}", self.n_prompt)),
            part(self.n_gen, format!("tg{}", self.n_gen)),
        ];
        let name = parts.into_iter().flatten().collect::<Vec<_>>().join("+");
        match self.n_depth {
            0 => name,
            depth => format!("{name} @ d{depth}"),
        }
    }
}

/// One repetition's figures.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Cutting up and encoding the pictures.
    pub encode: Duration,
    /// The trial run that judges the prompt before it goes in.
    pub probe: Duration,
    /// From there to the first token: the prompt, eviction after it, sampling.
    pub prefill: Duration,
    pub decode: Duration,
    /// Rows of the prompt, whether they went in or were pruned before.
    pub prompt: PerModality,
    /// Tokens decoded.
    pub steps: usize,
    pub cells: Counts,
    pub kv: KvBytes,
    /// The most bytes that were allocated for KV at once, trial runs included.
    pub allocated_peak: u64,
    /// `None` where the system does not tell.
    pub peak_rss: Option<u64>,
}

impl Sample {
    /// From the prompt to its first token.
    pub fn ttft(&self) -> Option<Duration> {
        (self.prompt.total() > 0).then(|| self.encode + self.probe + self.prefill)
    }

    /// The mean time of a decoded token.
    pub fn tpot(&self) -> Option<Duration> {
        let steps = u32::try_from(self.steps).ok().filter(|&n| n > 0)?;
        Some(self.decode / steps)
    }
}

/// Time and the user's wish to stop.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// A clock that never runs backwards.
    pub now: &'a dyn Fn() -> Duration,
    pub cancelled: &'a dyn Fn() -> bool,
}

/// Runs a test on an empty session. `pictures` gives the prompt's pictures, encoded. `None`:
/// cancelled.
///
/// Every time ends when logits are there: until then an accelerator may still be computing.
/// Decoded tokens are random, too, so that every repetition decodes as many.
///
/// # Errors
/// The session's own, and those of `pictures`.
pub fn measure<E: Engine>(
    session: &mut Session<E>,
    test: &Test,
    tokens: &mut dyn FnMut() -> Token,
    pictures: &mut dyn FnMut() -> Result<Vec<Segment>>,
    watch: Watch<'_>,
) -> Result<Option<Sample>> {
    let Watch { now, cancelled } = watch;
    let mut text = |n: usize| Segment::Tokens((0..n).map(|_| tokens()).collect());
    if test.before() > 0 {
        if test.n_prompt == 0 {
            session.expect(test.n_gen);
        }
        if !session.prefill(&[text(test.before())], cancelled)? {
            return Ok(None);
        }
        session.engine.logits()?;
    }

    let mut sample = Sample {
        encode: Duration::ZERO,
        probe: Duration::ZERO,
        prefill: Duration::ZERO,
        decode: Duration::ZERO,
        prompt: PerModality::default(),
        steps: 0,
        cells: Counts::default(),
        kv: KvBytes::default(),
        allocated_peak: 0,
        peak_rss: None,
    };
    if test.n_prompt > 0 {
        let question = text(test.n_prompt);
        let start = now();
        let mut prompt = pictures()?;
        if test.n_images > 0 {
            sample.encode = now().saturating_sub(start);
        }
        prompt.push(question);
        let hooks = Hooks {
            on_text: &mut |_| {},
            cancelled,
            now,
        };
        session.expect(test.n_gen);
        let generated = session.generate(&prompt, Some(1), hooks)?;
        if generated.finish == Finish::Cancelled {
            return Ok(None);
        }
        let Generated {
            prompt, timings, ..
        } = generated;
        sample.probe = timings.probe;
        let to_first = timings.first_token.unwrap_or(timings.prefill);
        sample.prefill = to_first.saturating_sub(timings.probe);
        sample.prompt = prompt;
    }

    let start = now();
    for _ in 0..test.n_gen {
        if cancelled() {
            return Ok(None);
        }
        session.step(tokens())?;
        session.engine.logits()?;
        sample.steps += 1;
    }
    sample.decode = now().saturating_sub(start);
    sample.cells = session.controller.ledger().counts();
    sample.kv = session.engine.kv_bytes();
    sample.allocated_peak = session.peak_bytes().max(sample.kv.allocated);
    Ok(Some(sample))
}

/// A test on a model, in a context made for it.
pub struct Work<'a> {
    pub model: &'a Model,
    /// Whose tokens attend to the score layers of `policy`, and with room for the test.
    pub context: &'a ContextOptions,
    pub policy: (&'a str, &'a PolicyOptions),
    pub test: &'a Test,
    pub pictures: Pictures,
    /// Decides tokens and pictures.
    pub seed: u64,
}

impl Work<'_> {
    /// One repetition. `None`: cancelled.
    ///
    /// # Errors
    /// Those of the engine, the policy and the pictures.
    pub fn run(
        &self,
        mut vision: Option<&mut Vision<'_>>,
        watch: Watch<'_>,
    ) -> Result<Option<Sample>> {
        let rss = PeakRss::start();
        let model = self.model;
        let mut engine = LlamaEngine::new(model, self.context.clone(), &SamplerOptions::GREEDY)?;
        let limits = Limits {
            n_layer: model.n_layer(),
            n_cells: engine.n_cells(),
        };
        let policy = policy::create(self.policy.0, self.policy.1, limits)?;
        let mut noise = Noise::new(self.seed);
        let n_vocab = model.n_vocab().max(1);
        let mut tokens = || Token::try_from(noise.below(n_vocab)).unwrap_or(0);
        wake(&mut engine, tokens())?;
        let controller = Controller::new(policy, engine.n_cells());
        let mut session = Session::new(engine, controller);
        let mut pictures = self.pictures.make(self.test.n_images, model, self.seed);
        let mut encode = || pictures.encode(vision.as_deref_mut());
        let sample = measure(&mut session, self.test, &mut tokens, &mut encode, watch)?;
        Ok(sample.map(|sample| Sample {
            // Embeddings were made before the clock started.
            encode: match self.pictures {
                Pictures::Noise { .. } => sample.encode,
                Pictures::Embeddings { .. } => Duration::ZERO,
            },
            peak_rss: rss.bytes(),
            ..sample
        }))
    }
}

/// Decodes one token and forgets it: the first decode of a context makes its graphs.
pub(crate) fn wake(engine: &mut LlamaEngine<'_>, token: Token) -> Result<()> {
    let batch = Batch {
        input: Input::Tokens(&[token]),
        pos: &[0],
        queries: &[],
        logits: true,
    };
    engine.decode(batch, &mut Vec::new(), &mut Observation::default())?;
    engine.logits()?;
    engine.clear();
    Ok(())
}

/// The order in which `n` policies run in this repetition: each begins as often as the others.
pub fn turns(n: usize, repetition: usize) -> impl Iterator<Item = usize> {
    (0..n).map(move |i| (i + repetition) % n)
}

#[cfg(test)]
mod tests;
