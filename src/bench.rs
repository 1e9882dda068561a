//! Measuring what a model and a cache policy cost, in the manner of llama-bench: random tokens and
//! pictures of given numbers, each case repeated.
//!
//! One [`Work`] is one repetition in a context of its own. Whoever compares policies runs them by
//! turns ([`turns`]), so that a machine that gets busier or hotter does not favour one of them.

mod depth;
mod energy;
mod memory;
mod pictures;
mod pulse;
mod record;
pub mod stats;
mod workload;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::attend::Attended;
use crate::cache::{Counts, PerModality};
use crate::engine::{Engine, KvBytes, Token};
use crate::error::Result;
use crate::generate::{Finish, Generated, Hooks, Segment, Session, Traffic};
use crate::llama::{ContextOptions, Model, SamplerOptions, Vision};
use crate::noise::Noise;
use crate::open::{Plan, Reach, RopeChoice};
use crate::policy::PolicySpec;
use energy::Energy;
use memory::PeakRss;

pub use pictures::Pictures;
pub use pulse::Pulse;
pub use record::{Field, Hardware, Kind, METRICS, Metric, ModelInfo, Record, Settings};
pub use workload::Workload;

/// What a test feeds and asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Test {
    /// A workload's name; other tests are called after their numbers.
    pub workload: Option<String>,
    /// Text tokens that are in the cache before anything is timed, from an earlier turn.
    pub n_depth: usize,
    /// Only the first of these went through the model; the others have copies of their K and V.
    pub depth_copies: bool,
    /// One after the other in one conversation.
    pub turns: Vec<Turn>,
}

/// A prompt and the tokens after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Turn {
    /// Pictures of the prompt.
    #[serde(rename = "images", default)]
    pub n_images: usize,
    /// Text tokens of the prompt, behind its pictures; 0: no prompt is timed.
    #[serde(rename = "prompt", default)]
    pub n_prompt: usize,
    /// Tokens decoded one by one after it.
    #[serde(rename = "generate", default)]
    pub n_gen: usize,
}

impl Test {
    fn sum(&self, of: fn(&Turn) -> usize) -> usize {
        self.turns.iter().map(of).fold(0, usize::saturating_add)
    }

    /// Text tokens of all prompts.
    pub fn n_prompt(&self) -> usize {
        self.sum(|turn| turn.n_prompt)
    }

    /// Tokens decoded in all.
    pub fn n_gen(&self) -> usize {
        self.sum(|turn| turn.n_gen)
    }

    /// Pictures of all prompts.
    pub fn n_images(&self) -> usize {
        self.sum(|turn| turn.n_images)
    }

    /// Tokens that go in before the clock starts. Decoding needs one to go on from.
    fn before(&self) -> usize {
        let prompted = self.turns.first().is_some_and(|turn| turn.n_prompt > 0);
        match (self.n_depth, prompted) {
            (0, false) => 1,
            (depth, _) => depth,
        }
    }

    /// Cells that it takes when nothing is evicted, with pictures of `image_tokens` each.
    pub fn cells(&self, image_tokens: usize) -> usize {
        [
            self.before(),
            self.n_images().saturating_mul(image_tokens),
            self.n_prompt(),
            self.n_gen(),
        ]
        .iter()
        .fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// The same kinds of work, shorter: what a machine has to do once, it has done afterwards.
    pub fn warm_up(&self) -> Self {
        let turns = self.turns.iter().take(2).map(|&turn| Turn {
            n_gen: turn.n_gen.min(2),
            ..turn
        });
        Test {
            workload: None,
            n_depth: 0,
            depth_copies: false,
            turns: turns.collect(),
        }
    }

    /// A workload's own name, or llama-bench's: `pp512`, `tg128 @ d4096`, and with pictures
    /// `2img+pp512+tg128`.
    pub fn name(&self) -> String {
        if let Some(name) = &self.workload {
            return name.clone();
        }
        let part = |n: usize, text: String| (n > 0).then_some(text);
        let (images, prompt, generated) = (self.n_images(), self.n_prompt(), self.n_gen());
        let parts = [
            part(images, format!("{images}img")),
            part(prompt, format!("pp{prompt}")),
            part(generated, format!("tg{generated}")),
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
    /// Cutting up and encoding the pictures; this and the next three over all turns.
    pub encode: Duration,
    /// The trial run that judges the prompt before it goes in.
    pub probe: Duration,
    /// From there to the first token: the prompt, eviction after it, sampling.
    pub prefill: Duration,
    /// Time of all decoded tokens together.
    pub decode: Duration,
    /// Rows of the prompt, whether they went in or were pruned before.
    pub prompt: PerModality,
    /// Tokens decoded.
    pub steps: usize,
    /// What these attended to, where they looked cells up.
    pub attended: Attended,
    /// The ledger's counts at the end.
    pub cells: Counts,
    /// Rows of evicted tokens that left the cache and came back.
    pub bin: Traffic,
    /// The engine's memory at the end.
    pub kv: KvBytes,
    /// The most bytes that were allocated for KV at once, trial runs included.
    pub allocated_peak: u64,
    /// `None` where the system does not tell.
    pub peak_rss: Option<u64>,
    /// Energy of the processor packages over the run, everybody's work on them included; `None`
    /// where the system does not tell.
    pub joules: Option<f64>,
}

impl Sample {
    /// From the prompt to its first token.
    pub fn ttft(&self) -> Option<Duration> {
        (self.prompt.total() > 0).then(|| self.encode + self.probe + self.prefill)
    }

    /// All of it but the encoding of pictures, which no policy changes.
    pub fn total(&self) -> Duration {
        self.probe + self.prefill + self.decode
    }

    /// The mean time of a decoded token.
    pub fn tpot(&self) -> Option<Duration> {
        let steps = u32::try_from(self.steps).ok().filter(|&n| n > 0)?;
        Some(self.decode / steps)
    }
}

/// Runs a test on an empty session. `pictures` gives the next prompt's pictures, so many of them,
/// encoded. `None`: cancelled.
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
    pictures: &mut dyn FnMut(usize) -> Result<Vec<Segment>>,
    watch: Pulse<'_>,
) -> Result<Option<Sample>> {
    let Pulse { now, cancelled } = watch;
    if test.before() > 0 {
        // Without a prompt the first answer goes on from these tokens.
        if let Some(turn) = test.turns.first().filter(|turn| turn.n_prompt == 0) {
            session.expect(turn.n_gen);
        }
        if !depth::fill(session, test, tokens, cancelled)? {
            return Ok(None);
        }
    }

    let mut sample = Sample {
        encode: Duration::ZERO,
        probe: Duration::ZERO,
        prefill: Duration::ZERO,
        decode: Duration::ZERO,
        prompt: PerModality::default(),
        steps: 0,
        attended: Attended::default(),
        cells: Counts::default(),
        bin: Traffic::default(),
        kv: KvBytes::default(),
        allocated_peak: 0,
        peak_rss: None,
        joules: None,
    };
    for turn in &test.turns {
        if turn.n_prompt > 0 {
            let question = Segment::Tokens((0..turn.n_prompt).map(|_| tokens()).collect());
            let start = now();
            let mut prompt = pictures(turn.n_images)?;
            if turn.n_images > 0 {
                sample.encode += now().saturating_sub(start);
            }
            prompt.push(question);
            let hooks = Hooks {
                on_text: &mut |_| {},
                cancelled,
                now,
            };
            session.expect(turn.n_gen);
            let generated = session.generate(&prompt, Some(1), hooks)?;
            if generated.finish == Finish::Cancelled {
                return Ok(None);
            }
            let Generated {
                prompt, timings, ..
            } = generated;
            sample.probe += timings.probe;
            let to_first = timings.first_token.unwrap_or(timings.prefill);
            sample.prefill += to_first.saturating_sub(timings.probe);
            sample.prompt.text += prompt.text;
            sample.prompt.vision += prompt.vision;
        }

        let start = now();
        for _ in 0..turn.n_gen {
            if cancelled() {
                return Ok(None);
            }
            session.step(tokens())?;
            session.engine.logits()?;
            sample.steps += 1;
        }
        sample.decode += now().saturating_sub(start);
        sample.attended += session.attended();
    }
    sample.cells = session.controller.ledger().counts();
    sample.bin = session.store().traffic();
    sample.kv = session.engine.kv_bytes();
    sample.allocated_peak = session.peak_bytes().max(sample.kv.allocated);
    Ok(Some(sample))
}

/// A test on a model, in a context made for it.
pub struct Work<'a> {
    /// The model, loaded.
    pub model: &'a Model,
    /// With room for the test.
    pub context: &'a ContextOptions,
    /// The policy, made anew for each repetition.
    pub policy: &'a PolicySpec,
    /// What is fed and timed.
    pub test: &'a Test,
    /// What stands for the pictures of the test.
    pub pictures: Pictures,
    /// Decides tokens and pictures.
    pub seed: u64,
}

impl Work<'_> {
    /// One repetition. `None`: cancelled.
    ///
    /// # Errors
    /// Those of the engine, the policy and the pictures.
    pub fn run(&self, mut vision: Option<&mut Vision>, watch: Pulse<'_>) -> Result<Option<Sample>> {
        let rss = PeakRss::start();
        let model = self.model;
        let mut plan = Plan::new(model, vision.as_deref(), self.context, self.policy)?;
        plan.choose_rope(RopeChoice::Auto, || Ok(Reach::Cache))?;
        let mut opened = plan.open(&SamplerOptions::GREEDY)?;
        opened.warm_up()?;
        let mut session = opened.session;
        let mut noise = Noise::new(self.seed);
        let n_vocab = model.n_vocab().max(1);
        let mut tokens = || Token::try_from(noise.below(n_vocab)).unwrap_or(0);
        let mut pictures = self.pictures.make(self.test.n_images(), model, self.seed);
        let mut encode = |n| pictures.encode(n, vision.as_deref_mut());
        let energy = Energy::start();
        let sample = measure(&mut session, self.test, &mut tokens, &mut encode, watch)?;
        Ok(sample.map(|sample| Sample {
            // Embeddings were made before the clock started.
            encode: match self.pictures {
                Pictures::Noise { .. } => sample.encode,
                Pictures::Embeddings { .. } => Duration::ZERO,
            },
            peak_rss: rss.bytes(),
            joules: energy.joules(),
            ..sample
        }))
    }
}

/// The order in which `n` policies run in this repetition: each begins as often as the others.
pub fn turns(n: usize, repetition: usize) -> impl Iterator<Item = usize> {
    (0..n).map(move |i| (i + repetition) % n)
}

#[cfg(test)]
mod tests;
