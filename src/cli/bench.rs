//! `hae bench`: speed and memory of a model under several cache policies, like llama-bench.

mod cases;
mod print;

use std::io::StdoutLock;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::crops::CropArgs;
use super::load::{self, Files};
use super::options::{AttendArgs, DeviceArgs, HubArgs, PolicyArgs};
use super::output::ContextReport;
use super::polling::PollArgs;
use super::{Done, interrupt, warn};
use cases::{BenchPlan, Case, Shape};
use hae::Error;
use hae::bench::stats::Summary;
use hae::bench::{self, Hardware, ModelInfo, Pulse, Record, Sample, Settings, Work};
use hae::build::{Build, build};
use hae::llama::{ContextOptions, Model, ModelOptions, Poll, Vision, VisionOptions};
use hae::open::{Plan, Reach, RopeChoice, rope_name};
use print::{Format, Printer};

/// Far beyond any context; keeps sums of lists small.
const MOST_TOKENS: u32 = 1 << 24;

#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "Lists: values separated by commas, or flags given several times. Numbers also as \
                  spans: 512-2048, 512-2048+512, 512-2048*2. Every combination is measured. \
                  --attend is for the policies behind the first, or for a single one."
)]
pub struct Args {
    /// Text model [default: a small one in this program]
    ///
    /// A GGUF. Repeat for several.
    #[arg(short, long, value_name = "FILE")]
    model: Vec<PathBuf>,
    /// -mm: vision file, one for all or one each
    #[arg(long, alias = "mm", value_name = "FILE")]
    mmproj: Vec<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Policies, list
    ///
    /// They are measured by turns. The first is what the others are compared with.
    #[arg(long, value_name = "NAME", default_value = "full,hae")]
    kv_policy: Vec<String>,
    /// Tokens of a prompt, list [default: 512]
    ///
    /// 0: no such test. With --workload none is the default.
    #[arg(short = 'p', long, value_name = "N")]
    n_prompt: Vec<String>,
    /// Tokens to write, list [default: 128]
    ///
    /// 0: no such test. With --workload none is the default.
    #[arg(short = 'n', long, value_name = "N")]
    n_gen: Vec<String>,
    /// Conversation of several turns, from a file
    ///
    /// Such as those in benches/workloads. Repeat for several.
    #[arg(long, value_name = "FILE")]
    workload: Vec<PathBuf>,
    /// -pg: a prompt, and an answer after it
    ///
    /// Repeat for several.
    #[arg(long, value_name = "PP,TG")]
    pg: Vec<String>,
    /// Tokens in the cache before, list
    #[arg(short = 'd', long, value_name = "N", default_value = "0")]
    n_depth: Vec<String>,
    /// Let all but 64 tokens of the depth be copies
    ///
    /// Of the K and V of these 64, instead of going through the model. A deep cache is there in
    /// seconds, and a token takes as long.
    #[arg(long)]
    depth_copies: bool,
    /// Pictures in front of each prompt, list
    #[arg(long, value_name = "N", default_value = "0")]
    images: Vec<String>,
    /// Size of a picture, list
    ///
    /// In pixels. Pictures show noise.
    #[arg(long, value_name = "WxH", default_value = "336x336")]
    image_size: Vec<String>,
    #[command(flatten)]
    crops: CropArgs,
    /// Made-up embeddings for each picture, list
    ///
    /// Instead of encoded pictures, for models without a vision file.
    #[arg(long, value_name = "N")]
    image_tokens: Vec<String>,
    /// -ngl: layers on the GPU, list
    ///
    /// Numbers, all or auto. --n-gpu-layers is the same.
    #[arg(
        long,
        aliases = ["n-gpu-layers", "ngl"],
        value_name = "N",
        default_value = "auto"
    )]
    gpu_layers: Vec<String>,
    #[command(flatten)]
    pub devices: DeviceArgs,
    /// -fa: flash attention, list
    ///
    /// on, off or auto.
    #[arg(long, alias = "fa", value_name = "WHEN", default_value = "auto")]
    flash_attn: Vec<String>,
    /// -ctk: types of K, list
    ///
    /// [default: f16; hae: q8_0]
    #[arg(long, alias = "ctk", value_name = "TYPE")]
    cache_type_k: Vec<String>,
    /// -ctv: types of V, list
    ///
    /// [default: f16; hae: q8_0]
    #[arg(long, alias = "ctv", value_name = "TYPE")]
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
    /// Times that each test runs
    ///
    /// The results are medians.
    #[arg(short, long, value_name = "N", default_value = "5")]
    repetitions: String,
    /// Seed of the random tokens and pictures
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    seed: u32,
    /// Do not run each test once before it counts
    #[arg(long)]
    no_warmup: bool,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    attend: AttendArgs,
    /// md, csv, json, jsonl or sql
    #[arg(short, long, value_enum, hide_possible_values = true, default_value_t = Format::Md, value_name = "FORMAT", help_heading = "Output")]
    output: Format,
    /// Show llama.cpp's log on stderr
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

impl Args {
    /// Sees to it that the model is here, and names its files as if they had been given.
    pub fn fetch(&mut self) -> Result<()> {
        if let Some(found) = load::fetched(&self.hub, self.mmproj.is_empty())? {
            self.model = vec![found.model];
            self.mmproj.extend(found.mmproj);
        }
        Ok(())
    }
}

pub fn run(args: &Args) -> Result<Done> {
    if args.verbose {
        super::show_log();
    }
    let plan = BenchPlan::new(args)?;
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
    plan: &'a BenchPlan,
    build: Build,
    hardware: Hardware,
    printer: Printer<StdoutLock<'static>>,
    bar: ProgressBar,
}

/// A case that a loaded model can run, with a context for each policy.
struct CheckedCase<'a> {
    case: &'a Case,
    shape: Shape,
    /// Rows that a picture takes.
    image_tokens: usize,
    contexts: Vec<ContextOptions>,
    /// Those of each policy.
    params: Vec<serde_json::Value>,
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
                        placement: plan.placement.clone(),
                        ..ModelOptions::default()
                    },
                )?;
                let info = ModelInfo::new(&model, files.names());
                for &n_threads in &plan.threads {
                    if self.model(files, &model, &info, n_threads)? == Done::Interrupted {
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
        info: &ModelInfo,
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
        let mut cases = Vec::new();
        for &shape in &plan.shapes {
            for case in &plan.cases {
                let image_tokens = match case.test.n_images() {
                    0 => 0,
                    _ => case.pictures.tokens(vision.as_ref())?,
                };
                let cells = case.test.cells(image_tokens);
                let context = context(shape, cells, n_threads, plan.poll)?;
                let contexts = (0..plan.policies.len()).map(|i| {
                    let attend = plan.attend(i);
                    let context = ContextOptions {
                        attend,
                        by_policy: plan.by_policy,
                        ..context.clone()
                    };
                    let mut plan = Plan::new(model, vision.as_ref(), &context, &plan.policy(i))?;
                    plan.choose_rope(RopeChoice::Auto, || Ok(Reach::Cache))?;
                    Ok((plan.context().clone(), plan.policy().params()))
                });
                let opened = contexts.collect::<hae::Result<Vec<_>>>()?;
                let (contexts, params) = opened.into_iter().unzip();
                cases.push(CheckedCase {
                    case,
                    shape,
                    image_tokens,
                    contexts,
                    params,
                });
            }
        }
        for checked in &cases {
            if !self.case(checked, model, vision.as_mut(), info)? {
                return Ok(Done::Interrupted);
            }
        }
        Ok(Done::Whole)
    }

    /// One test under all policies, by turns; false: cancelled.
    fn case(
        &mut self,
        checked: &CheckedCase,
        model: &Model,
        mut vision: Option<&mut Vision>,
        info: &ModelInfo,
    ) -> Result<bool> {
        let CheckedCase { case, contexts, .. } = checked;
        let plan = self.plan;
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); plan.policies.len()];
        let now = load::clock();
        let watch = Pulse {
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
        self.records(checked, model, info, samples)?;
        Ok(true)
    }

    fn records(
        &mut self,
        checked: &CheckedCase,
        model: &Model,
        info: &ModelInfo,
        samples: Vec<Vec<Sample>>,
    ) -> Result<()> {
        let plan = self.plan;
        let time = SystemTime::now();
        let first = samples[0].clone();
        for (i, (samples, context)) in samples.into_iter().zip(&checked.contexts).enumerate() {
            let policy = plan.policies[i];
            let record = Record {
                build: self.build.clone(),
                hardware: self.hardware.clone(),
                model: info.clone(),
                settings: settings(checked.shape, context, model),
                test: checked.case.test.clone(),
                pictures: checked.case.pictures,
                image_tokens: checked.image_tokens,
                policy,
                params: checked.params[i].clone(),
                attend: context.attend.if_any(),
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
        ..ContextOptions::default()
    })
}

fn settings(asked: Shape, context: &ContextOptions, model: &Model) -> Settings {
    let rope_factors = rope_name(model, context);
    let report = ContextReport::new(context, context.attend.if_any(), rope_factors);
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
