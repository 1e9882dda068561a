//! `hae bench`: speed and memory of a model under several cache policies, like llama-bench.

mod cases;
pub mod lists;
mod print;

use std::io::StdoutLock;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::crops::CropArgs;
use super::load::{self, Files};
use super::options::{AttendArgs, PolicyArgs};
use super::output::ContextReport;
use super::polling::PollArgs;
use super::{Done, interrupt, warn};
pub use cases::policies;
use cases::{Case, Plan, Shape};
use hae::Error;
use hae::attend::Attend;
use hae::bench::stats::Summary;
use hae::bench::{self, Hardware, Record, Sample, Settings, Subject, Watch, Work};
use hae::build::{Build, build};
use hae::llama::{
    ContextOptions, Model, ModelOptions, Poll, RopeFactors, ScoreSource, Vision, VisionOptions,
};
use hae::policy::{self, Limits};
use print::{Format, Printer};

/// Far beyond any context; keeps sums of lists small.
const MOST_TOKENS: u32 = 1 << 24;

#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "Lists: values separated by commas or flags given several times; numbers also as \
                  spans 512-2048, 512-2048+512, 512-2048*2. Every combination is measured."
)]
pub struct Args {
    /// Text model (GGUF); repeat for several [default: the small Phi-3.5-vision model inside this
    /// program]
    #[arg(short, long, value_name = "FILE")]
    model: Vec<PathBuf>,
    /// -mm: vision file, one for all models or one for each
    #[arg(long, alias = "mm", value_name = "FILE")]
    mmproj: Vec<PathBuf>,
    /// Cache policies, list (names: `hae run --help`); they are measured by turns and compared
    /// with the first
    #[arg(long, value_name = "NAME", default_value = "full,hae")]
    kv_policy: Vec<String>,
    /// Tokens of a prompt, list; 0: no such test [default: 512, none with --workload]
    #[arg(short = 'p', long, value_name = "N")]
    n_prompt: Vec<String>,
    /// Tokens to generate, list; 0: no such test [default: 128, none with --workload]
    #[arg(short = 'n', long, value_name = "N")]
    n_gen: Vec<String>,
    /// A conversation of several turns, from a file such as those in benches/workloads; repeat for
    /// several
    #[arg(long, value_name = "FILE")]
    workload: Vec<PathBuf>,
    /// -pg: a prompt and an answer after it; repeat for several
    #[arg(long, value_name = "PP,TG")]
    pg: Vec<String>,
    /// Tokens that are in the cache before a test, list
    #[arg(short = 'd', long, value_name = "N", default_value = "0")]
    n_depth: Vec<String>,
    /// Pictures in front of each prompt, list
    #[arg(long, value_name = "N", default_value = "0")]
    images: Vec<String>,
    /// Their size in pixels, list; they show noise
    #[arg(long, value_name = "WxH", default_value = "336x336")]
    image_size: Vec<String>,
    #[command(flatten)]
    crops: CropArgs,
    /// Made-up embeddings instead of encoded pictures, this many for each, list
    #[arg(long, value_name = "N")]
    image_tokens: Vec<String>,
    /// -ngl: layers on the GPU: numbers, `all` or `auto`, list
    #[arg(
        long,
        visible_alias = "n-gpu-layers",
        alias = "ngl",
        value_name = "N",
        default_value = "auto"
    )]
    gpu_layers: Vec<String>,
    /// -fa: flash attention: on, off or auto, list
    #[arg(long, alias = "fa", value_name = "WHEN", default_value = "auto")]
    flash_attn: Vec<String>,
    /// -ctk: types of the K cache, list
    #[arg(long, alias = "ctk", value_name = "TYPE", default_value = "f16")]
    cache_type_k: Vec<String>,
    /// -ctv: types of the V cache, list
    #[arg(long, alias = "ctv", value_name = "TYPE", default_value = "f16")]
    cache_type_v: Vec<String>,
    /// Threads, list [default: physical cores]
    #[arg(short, long, value_name = "N")]
    threads: Vec<String>,
    #[command(flatten)]
    pub poll: PollArgs,
    /// Rows of one decode call, list
    #[arg(short, long, value_name = "N", default_value = "2048")]
    batch_size: Vec<String>,
    /// -ub: rows computed at once, list
    #[arg(long, alias = "ub", value_name = "N", default_value = "512")]
    ubatch_size: Vec<String>,
    /// Times that each test runs; the results are medians
    #[arg(short, long, value_name = "N", default_value = "5")]
    repetitions: String,
    /// Decides the random tokens and pictures
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    seed: u32,
    /// Do not run each test once before it counts
    #[arg(long)]
    no_warmup: bool,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(
        flatten,
        next_help_heading = "Lookups of the policies behind the first, or of a single one"
    )]
    attend: AttendArgs,
    /// What stdout carries
    #[arg(short, long, value_enum, default_value_t = Format::Md, value_name = "FORMAT", help_heading = "Output")]
    output: Format,
    /// Show llama.cpp's log on stderr
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

pub fn run(args: &Args) -> Result<Done> {
    if args.verbose {
        super::show_log();
    }
    let plan = Plan::new(args)?;
    let mut bench = Bench {
        build: build(),
        hardware: Hardware::here()?,
        printer: Printer::new(args.output, std::io::stdout().lock()),
        bar: bar(plan.runs())?,
        plan: &plan,
    };
    let done = interrupt::working(|| bench.all());
    bench.bar.finish_and_clear();
    // What was measured is worth as much when the rest was not.
    if done.is_ok() || bench.printer.has_rows() {
        bench.printer.end()?;
    }
    if done.is_ok() && plan.repetitions < 3 {
        warn("fewer than 3 repetitions do not show how noisy the machine is");
    }
    done
}

fn bar(runs: usize) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {elapsed} {msg}")?;
    let bar = ProgressBar::new(runs as u64).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar)
}

struct Bench<'a> {
    plan: &'a Plan,
    build: Build,
    hardware: Hardware,
    printer: Printer<StdoutLock<'static>>,
    bar: ProgressBar,
}

/// A case on a loaded model, with a context for each policy.
struct Ready<'a> {
    case: &'a Case,
    shape: Shape,
    /// Rows that a picture takes.
    image_tokens: usize,
    contexts: Vec<ContextOptions>,
}

impl Bench<'_> {
    /// Says something without spoiling the progress bar.
    fn warn(&self, text: &str) {
        self.bar.suspend(|| warn(text));
    }

    fn all(&mut self) -> Result<Done> {
        let plan = self.plan;
        for files in &plan.files {
            for &n_gpu_layers in &plan.gpu_layers {
                self.bar.set_message("loading the model");
                let model = Model::load(
                    &files.model,
                    &ModelOptions {
                        n_gpu_layers,
                        ..ModelOptions::default()
                    },
                )?;
                let subject = Subject::new(&model, files.names());
                for &n_threads in &plan.threads {
                    if self.model(files, &model, &subject, n_threads)? == Done::Interrupted {
                        return Ok(Done::Interrupted);
                    }
                }
            }
        }
        Ok(Done::Whole)
    }

    fn model(
        &mut self,
        files: &Files,
        model: &Model,
        subject: &Subject,
        n_threads: i32,
    ) -> Result<Done> {
        let plan = self.plan;
        let options = VisionOptions {
            use_gpu: model.options().n_gpu_layers != Some(0),
            n_threads,
        };
        let path = files.mmproj.as_deref();
        let path = path.filter(|_| plan.cases.iter().any(Case::encodes));
        let vision = path.map(|path| Vision::load(path, model, &options));
        let mut vision = vision.transpose()?;
        if let (Some(n), Some(vision)) = (plan.num_crops, &vision) {
            vision.check_num_crops(n)?;
        }
        // All of them before the first is measured, which may take long.
        let mut ready = Vec::new();
        for &shape in &plan.shapes {
            for case in &plan.cases {
                let image_tokens = match case.test.n_images() {
                    0 => 0,
                    _ => case.pictures.tokens(vision.as_ref())?,
                };
                let cells = case.test.cells(image_tokens);
                let mut context = context(shape, cells, n_threads, plan.poll)?;
                context.non_causal_images = vision.as_ref().is_some_and(Vision::non_causal);
                let contexts = (0..plan.policies.len()).map(|i| {
                    let attend = plan.attend(i);
                    let context = ContextOptions {
                        attend,
                        ..context.clone()
                    };
                    load::for_policy(context, model, &plan.policy(i))
                });
                ready.push(Ready {
                    case,
                    shape,
                    image_tokens,
                    contexts: contexts.collect::<hae::Result<_>>()?,
                });
            }
        }
        for ready in &ready {
            if !self.case(ready, model, vision.as_mut(), subject)? {
                return Ok(Done::Interrupted);
            }
        }
        Ok(Done::Whole)
    }

    /// One test under all policies, by turns; false: cancelled.
    fn case(
        &mut self,
        ready: &Ready,
        model: &Model,
        mut vision: Option<&mut Vision>,
        subject: &Subject,
    ) -> Result<bool> {
        let Ready { case, contexts, .. } = ready;
        let plan = self.plan;
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); plan.policies.len()];
        let now = load::clock();
        let watch = Watch {
            now: &now,
            cancelled: &interrupt::cancelled,
        };
        let warm_up = case.test.warm_up();
        for round in 0..plan.rounds() {
            let counts = round > 0 || !plan.warm_up;
            for i in bench::turns(plan.policies.len(), round) {
                let policy = plan.policy(i);
                let name = case.test.name();
                self.bar.set_message(format!("{name} {}", policy.name));
                let work = Work {
                    model,
                    context: &contexts[i],
                    policy: &policy,
                    test: if counts { &case.test } else { &warm_up },
                    pictures: case.pictures,
                    // The same for all policies of a round.
                    seed: plan.seed.wrapping_add((round as u64) << 32),
                };
                let Some(sample) = work.run(vision.as_deref_mut(), watch)? else {
                    return Ok(false);
                };
                self.bar.inc(1);
                if counts {
                    samples[i].push(sample);
                }
            }
        }
        self.records(ready, model, subject, samples)?;
        Ok(true)
    }

    fn records(
        &mut self,
        ready: &Ready,
        model: &Model,
        subject: &Subject,
        samples: Vec<Vec<Sample>>,
    ) -> Result<()> {
        let plan = self.plan;
        let time = SystemTime::now();
        let first = samples[0].clone();
        for (i, (samples, context)) in samples.into_iter().zip(&ready.contexts).enumerate() {
            let policy = plan.policies[i];
            let limits = Limits {
                n_layer: model.n_layer(),
                n_cells: context.n_ctx as usize,
            };
            let record = Record {
                build: self.build.clone(),
                hardware: self.hardware.clone(),
                subject: subject.clone(),
                settings: settings(ready.shape, context, model),
                test: ready.case.test.clone(),
                pictures: ready.case.pictures,
                image_tokens: ready.image_tokens,
                policy,
                params: policy::create(policy, &plan.policy_options, limits)?.params(),
                time,
                samples,
                first: (i > 0).then(|| (plan.policies[0], first.clone())),
            };
            if let Some(text) = noise(&record) {
                self.warn(&text);
            }
            self.printer.row(record)?;
        }
        Ok(())
    }
}

/// A context that holds so many cells. It is as large as llama.cpp would make it, so that checks
/// and reports see the real size.
fn context(shape: Shape, cells: usize, n_threads: i32, poll: Poll) -> Result<ContextOptions> {
    let n_ctx = u32::try_from(cells).ok().filter(|&n| n <= MOST_TOKENS);
    let n_ctx = n_ctx.ok_or_else(|| {
        let reason = format!("{cells} tokens in all, expected at most {MOST_TOKENS}");
        Error::option("-d, -p, -n", reason)
    })?;
    let n_ctx = n_ctx.next_multiple_of(256);
    Ok(ContextOptions {
        n_ctx,
        n_batch: shape.n_batch.min(n_ctx),
        n_ubatch: shape.n_ubatch.min(n_ctx),
        n_threads,
        n_threads_batch: n_threads,
        poll,
        flash_attention: shape.flash_attention,
        type_k: shape.type_k,
        type_v: shape.type_v,
        kv_size: None,
        n_seq_max: 1,
        score_layers: Vec::new(),
        score_source: ScoreSource::default(),
        non_causal_images: false,
        // As many positions as cells: llama.cpp's own rule is the right one.
        rope_factors: RopeFactors::Context,
        attend: Attend::default(),
        keep_sets: false,
        plain_lookups: false,
    })
}

fn settings(asked: Shape, context: &ContextOptions, model: &Model) -> Settings {
    let rope_factors = load::rope_name(context.rope_factors, model, context.n_ctx);
    let report = ContextReport::new(context, rope_factors);
    Settings {
        n_ctx: report.n_ctx,
        kv_size: context.kv_size,
        // A small context bounds them, which is no setting.
        n_batch: asked.n_batch,
        n_ubatch: asked.n_ubatch,
        n_threads: report.n_threads,
        poll: context.poll,
        n_gpu_layers: model.options().n_gpu_layers,
        flash_attention: report.flash_attention,
        type_k: report.type_k,
        type_v: report.type_v,
        rope_factors: report.rope_factors,
    }
}

/// The time with the largest spread, when that is too large.
fn noise(record: &Record) -> Option<String> {
    let spread = |s: &Summary| s.spread();
    let worst = record
        .noisy()
        .max_by(|a, b| spread(&a.1).total_cmp(&spread(&b.1)));
    worst.map(|(metric, summary)| {
        format!(
            "{} under {}: {metric} is {:.2} to {:.2} between the quartiles: the machine is too noisy to tell small differences",
            record.test.name(),
            record.policy,
            summary.q1,
            summary.q3,
        )
    })
}
