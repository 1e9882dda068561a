//! From lists to the cases that are measured. Everything that can be wrong with a command line
//! is found here, before the first model is loaded.

use super::super::lists::{numbers, pairs, policies, size, values};
use super::super::load::Files;
use super::super::named::parse;
use super::super::options::{GpuLayers, default_threads, gpu_layers};
use super::{Args, MOST_TOKENS};
use hae::attend::Attend;
use hae::bench::{Pictures, Test, Turn, Workload};
use hae::llama::gguf::header;
use hae::llama::{ByPolicy, CacheType, FlashAttention, Placement, Poll};
use hae::policy::{PolicyOptions, PolicySpec};
use hae::{Error, Result};

/// Settings of a context that all policies share.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub n_batch: u32,
    pub n_ubatch: u32,
    pub flash_attention: FlashAttention,
    pub type_k: CacheType,
    pub type_v: CacheType,
}

/// A test and what its pictures are.
#[derive(Clone, Debug)]
pub struct Case {
    pub test: Test,
    pub pictures: Pictures,
}

impl Case {
    /// Whether it needs a vision file.
    pub fn encodes(&self) -> bool {
        self.test.n_images() > 0 && matches!(self.pictures, Pictures::Noise { .. })
    }
}

/// All that is to be measured: every combination.
#[derive(Debug)]
pub struct BenchPlan {
    pub files: Vec<Files>,
    pub gpu_layers: Vec<GpuLayers>,
    pub placement: Placement,
    pub threads: Vec<i32>,
    pub poll: Poll,
    pub shapes: Vec<Shape>,
    pub cases: Vec<Case>,
    pub policies: Vec<&'static str>,
    /// Each policy takes those that it reads.
    pub policy_options: PolicyOptions,
    /// Of the policies behind the first, or of a single one.
    attend: Attend,
    /// What nobody has said.
    pub by_policy: ByPolicy,
    pub num_crops: Option<u32>,
    pub repetitions: usize,
    pub warm_up: bool,
    pub seed: u64,
}

impl BenchPlan {
    /// The policy at this place of the list.
    pub fn policy(&self, i: usize) -> PolicySpec {
        PolicySpec::of(self.policies[i], &self.policy_options)
    }

    pub fn new(args: &Args) -> anyhow::Result<Self> {
        let attend = args.attend.options();
        let policies = policies(&args.kv_policy, !attend.is_whole())?;
        let policy_options = args.policy.options()?;
        args.policy.refuse_unread(&policies, false)?;
        let threads = match args.threads.is_empty() {
            true => vec![default_threads()],
            false => numbers("-t", &args.threads, 1, 512)?
                .into_iter()
                .map(|n| n as i32)
                .collect(),
        };
        let repetitions = args.repetitions.parse().ok();
        let repetitions = repetitions.filter(|n| (1..=10_000).contains(n));
        let num_crops = args.crops.num_crops()?;
        let cases = cases(args, num_crops)?;
        if num_crops.is_some() && !cases.iter().any(Case::encodes) {
            let reason = "no test shows a picture to cut, expected --images";
            return Err(Error::option("--num-crops", reason).into());
        }
        Ok(BenchPlan {
            gpu_layers: values("-ngl", &args.gpu_layers, gpu_layers)?,
            placement: args.devices.placement()?,
            threads,
            poll: args.poll.level(),
            shapes: shapes(args)?,
            policies,
            policy_options,
            attend,
            by_policy: ByPolicy {
                types: args.cache_type_k.is_empty() && args.cache_type_v.is_empty(),
                attend: !args.attend.is_given(),
            },
            repetitions: repetitions.ok_or_else(|| {
                let found = args.repetitions.escape_debug();
                Error::option("-r", format!("\"{found}\", expected 1 to 10000"))
            })?,
            num_crops,
            warm_up: !args.no_warmup,
            seed: args.seed.into(),
            files: files(args, &cases)?,
            cases,
        })
    }

    /// What decoded tokens attend to under policy `i`.
    pub fn attend(&self, i: usize) -> Attend {
        match (i, self.policies.len()) {
            (0, 2..) => Attend::default(),
            _ => self.attend,
        }
    }

    /// Repetitions under one policy, warming up included.
    pub fn rounds(&self) -> usize {
        self.repetitions + usize::from(self.warm_up)
    }

    /// Runs in all.
    pub fn runs(&self) -> usize {
        [
            self.gpu_layers.len(),
            self.threads.len(),
            self.shapes.len(),
            self.cases.len(),
            self.policies.len(),
            self.rounds(),
        ]
        .iter()
        .fold(self.files.len(), |all, n| all.saturating_mul(*n))
    }
}

/// Every model with its vision file. All of them have to be GGUFs.
fn files(args: &Args, cases: &[Case]) -> Result<Vec<Files>> {
    let (models, mmprojs) = (&args.model, &args.mmproj);
    for file in models.iter().chain(mmprojs) {
        header::check(file)?;
    }
    if models.is_empty() {
        return Ok(vec![Files::of(None, mmprojs.first().cloned())?]);
    }
    if mmprojs.is_empty() && cases.iter().any(Case::encodes) {
        let reason = "pictures need a vision file: give one with --mmproj, or --image-tokens for made-up embeddings";
        return Err(Error::option("--images", reason));
    }
    if mmprojs.len() > 1 && mmprojs.len() != models.len() {
        let (n, m) = (mmprojs.len(), models.len());
        let reason = format!("{n} vision files for {m} models, expected one or one for each");
        return Err(Error::option("--mmproj", reason));
    }
    let pairs = models.iter().enumerate().map(|(i, model)| {
        let mmproj = mmprojs.get(i).or(mmprojs.first()).cloned();
        Files::of(Some(model.clone()), mmproj)
    });
    pairs.collect()
}

fn shapes(args: &Args) -> Result<Vec<Shape>> {
    let flash = values("-fa", &args.flash_attn, parse::<FlashAttention>)?;
    let types = |flag, given: &[String]| match given {
        [] => Ok(vec![CacheType::F16]),
        given => values(flag, given, parse::<CacheType>),
    };
    let type_k = types("-ctk", &args.cache_type_k)?;
    let type_v = types("-ctv", &args.cache_type_v)?;
    let n_batch = numbers("-b", &args.batch_size, 1, MOST_TOKENS)?;
    let n_ubatch = numbers("-ub", &args.ubatch_size, 1, MOST_TOKENS)?;
    let mut shapes = Vec::new();
    for &n_batch in &n_batch {
        for &n_ubatch in &n_ubatch {
            for &type_k in &type_k {
                for &type_v in &type_v {
                    shapes.extend(flash.iter().map(|&flash_attention| Shape {
                        n_batch,
                        n_ubatch,
                        flash_attention,
                        type_k,
                        type_v,
                    }));
                }
            }
        }
    }
    Ok(shapes)
}

/// llama-bench's tests at every depth: prompts and pairs with every number and size of pictures,
/// answers without any.
fn cases(args: &Args, num_crops: Option<u32>) -> Result<Vec<Case>> {
    let list = |flag, given: &[String]| numbers(flag, given, 0, MOST_TOKENS);
    let or = |given: &[String], default: &str| match given {
        [] if args.workload.is_empty() => vec![default.to_owned()],
        given => given.to_vec(),
    };
    let n_prompt = list("-p", &or(&args.n_prompt, "512"))?;
    let n_gen = list("-n", &or(&args.n_gen, "128"))?;
    let n_depth = list("-d", &args.n_depth)?;
    let n_images = numbers("--images", &args.images, 0, 1000)?;
    let pg = pairs("-pg", &args.pg, MOST_TOKENS)?;
    let kinds: Vec<Pictures> = if args.image_tokens.is_empty() {
        let sizes = values("--image-size", &args.image_size, size)?;
        let noise = |(width, height)| Pictures::Noise {
            width,
            height,
            num_crops,
        };
        sizes.into_iter().map(noise).collect()
    } else {
        let tokens = numbers("--image-tokens", &args.image_tokens, 1, MOST_TOKENS)?;
        let embeddings = |n| Pictures::Embeddings { n: n as usize };
        tokens.into_iter().map(embeddings).collect()
    };
    for pictures in &kinds {
        pictures.check()?;
    }

    let prompts = n_prompt.into_iter().filter(|&p| p > 0).map(|p| (p, 0));
    let answers = n_gen.into_iter().filter(|&n| n > 0).map(|n| (0, n));
    let all: Vec<(u32, u32)> = prompts.chain(answers).chain(pg).collect();
    let mut cases = Vec::new();
    for &depth in &n_depth {
        for &(prompt, generated) in &all {
            let images: &[u32] = if prompt > 0 { &n_images } else { &[0] };
            for &n_images in images {
                // Where there are no pictures, it does not matter what they would be.
                let kinds = if n_images > 0 {
                    &kinds[..]
                } else {
                    &kinds[..1]
                };
                cases.extend(kinds.iter().map(|&pictures| Case {
                    test: Test {
                        workload: None,
                        n_depth: depth as usize,
                        depth_copies: args.depth_copies,
                        turns: vec![Turn {
                            n_prompt: prompt as usize,
                            n_gen: generated as usize,
                            n_images: n_images as usize,
                        }],
                    },
                    pictures,
                }));
            }
        }
    }
    for file in &args.workload {
        let workload = Workload::read(file)?;
        let chosen = workload.image_tokens.map(|n| Pictures::Embeddings { n });
        let pictures = chosen.unwrap_or(kinds[0]);
        cases.push(Case {
            test: workload.test(),
            pictures,
        });
    }
    if cases.is_empty() {
        return Err(Error::option("-p, -n", "0, expected at least one test"));
    }
    Ok(cases)
}
