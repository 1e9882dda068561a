//! Flags that several commands share: llama.cpp's names where llama.cpp has one.

use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgAction, ValueEnum};

use hae::Error;
use hae::llama::{CacheType, ContextOptions, FlashAttention, SamplerOptions};
use hae::policy::{Amount, DapOptions, DapRule, Layers, Norm, PolicyOptions, Queries, Scope};

/// llama.cpp spells some options with one dash and several letters, which clap would read as
/// several short options. They are rewritten to the long names given here.
const ONE_DASH: [(&str, &str); 9] = [
    ("-ngl", "--gpu-layers"),
    ("-fa", "--flash-attn"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-ub", "--ubatch-size"),
    ("-tb", "--threads-batch"),
    ("-sys", "--system-prompt"),
    ("-mm", "--mmproj"),
    ("-no-cnv", "--no-conversation"),
];

/// The command line with llama.cpp's one-dash options spelled as long ones, up to a `--`.
pub fn llama_spelling(args: impl Iterator<Item = std::ffi::OsString>) -> Vec<std::ffi::OsString> {
    let mut literal = false;
    args.map(|arg| {
        literal |= arg == "--";
        let Some(text) = arg.to_str().filter(|_| !literal) else {
            return arg;
        };
        let (flag, value) = text
            .split_once('=')
            .map_or((text, None), |(f, v)| (f, Some(v)));
        match (ONE_DASH.iter().find(|(short, _)| *short == flag), value) {
            (Some((_, long)), Some(value)) => format!("{long}={value}").into(),
            (Some((_, long)), None) => (*long).into(),
            (None, _) => arg,
        }
    })
    .collect()
}

/// Which files to load, and onto what.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Text model (GGUF) [default: the small Phi-3.5-vision model inside this program]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// -mm: vision file (GGUF) that belongs to the model
    #[arg(long, visible_alias = "mm", value_name = "FILE")]
    pub mmproj: Option<PathBuf>,
    /// -ngl: layers to keep on the GPU [default: llama.cpp's choice]
    #[arg(long, visible_alias = "ngl", value_name = "N")]
    pub gpu_layers: Option<u32>,
    /// Which longrope factors to use: `auto` follows the positions that the run can reach,
    /// `context` the size of the cache (as llama.cpp does)
    #[arg(long, value_enum, default_value_t = RopeArg::Auto, value_name = "RULE")]
    pub rope_factors: RopeArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RopeArg {
    Auto,
    Short,
    Long,
    Context,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FlashArg {
    On,
    Off,
    Auto,
}

/// How to run it.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Context")]
pub struct ContextArgs {
    /// Cells of the KV cache; 0: the context length that the model was trained for
    #[arg(short = 'c', long, default_value_t = 4096, value_name = "N")]
    pub ctx_size: u32,
    /// Rows of one decode call
    #[arg(short = 'b', long, default_value_t = 2048, value_name = "N")]
    batch_size: u32,
    /// -ub: rows computed at once
    #[arg(long, visible_alias = "ub", default_value_t = 512, value_name = "N")]
    ubatch_size: u32,
    /// Threads while generating [default: physical cores]
    #[arg(short, long, value_name = "N")]
    pub threads: Option<u16>,
    /// -tb: threads while reading the prompt [default: as --threads]
    #[arg(long, visible_alias = "tb", value_name = "N")]
    threads_batch: Option<u16>,
    /// -fa: flash attention. Policies that read attention scores switch it off
    #[arg(long, visible_alias = "fa", value_enum, num_args = 0..=1, default_value = "auto", default_missing_value = "on", value_name = "WHEN")]
    flash_attn: FlashArg,
    /// -ctk: type of the K cache: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1
    #[arg(long, visible_alias = "ctk", default_value = "f16", value_parser = cache_type, value_name = "TYPE")]
    cache_type_k: CacheType,
    /// -ctv: type of the V cache; quantized types need flash attention
    #[arg(long, visible_alias = "ctv", default_value = "f16", value_parser = cache_type, value_name = "TYPE")]
    cache_type_v: CacheType,
}

fn cache_type(text: &str) -> Result<CacheType, String> {
    Ok(match text {
        "f32" => CacheType::F32,
        "f16" => CacheType::F16,
        "bf16" => CacheType::Bf16,
        "q8_0" => CacheType::Q8_0,
        "q4_0" => CacheType::Q4_0,
        "q4_1" => CacheType::Q4_1,
        "iq4_nl" => CacheType::Iq4Nl,
        "q5_0" => CacheType::Q5_0,
        "q5_1" => CacheType::Q5_1,
        _ => return Err("expected f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0 or q5_1".into()),
    })
}

impl ContextArgs {
    /// llama.cpp's type for threads is an `int`; more than a `u16` is a typing error.
    pub fn n_threads(&self) -> Result<i32> {
        match self.threads {
            Some(0) => Err(Error::option("-t", "0 threads, expected at least 1").into()),
            Some(n) => Ok(i32::from(n)),
            None => Ok(i32::try_from(num_cpus::get_physical().max(1)).unwrap_or(1)),
        }
    }

    /// Everything about the context that the command line says; scores and pictures come from
    /// the policy and the vision model.
    pub fn options(&self, n_ctx_train: u32) -> Result<ContextOptions> {
        if self.batch_size == 0 || self.ubatch_size == 0 {
            return Err(Error::option("-b, -ub", "0 rows, expected at least 1").into());
        }
        if self.threads_batch == Some(0) {
            return Err(Error::option("-tb", "0 threads, expected at least 1").into());
        }
        // Beyond this the positions of a full cache would not fit llama.cpp's type.
        const MOST: u32 = 1 << 30;
        let n_ctx = if self.ctx_size == 0 {
            n_ctx_train
        } else {
            self.ctx_size
        };
        if n_ctx > MOST {
            return Err(
                Error::option("-c", format!("{n_ctx} cells, expected at most {MOST}")).into(),
            );
        }
        let n_threads = self.n_threads()?;
        Ok(ContextOptions {
            n_ctx,
            n_batch: self.batch_size.min(n_ctx),
            n_ubatch: self.ubatch_size.min(n_ctx),
            n_threads,
            n_threads_batch: self.threads_batch.map_or(n_threads, i32::from),
            flash_attention: match self.flash_attn {
                FlashArg::On => FlashAttention::On,
                FlashArg::Off => FlashAttention::Off,
                FlashArg::Auto => FlashAttention::Auto,
            },
            type_k: self.cache_type_k,
            type_v: self.cache_type_v,
            score_layers: Vec::new(),
            non_causal_images: false,
        })
    }
}

/// How to choose the next token.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplerArgs {
    /// Seed of the sampler [default: from the clock]
    #[arg(short, long, value_name = "N")]
    seed: Option<u32>,
    /// Temperature; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.8, value_name = "T")]
    temp: f32,
    /// Choose among the K likeliest tokens; 0: all
    #[arg(long, default_value_t = 40, value_name = "K")]
    top_k: i32,
    /// Choose among the likeliest tokens that hold this probability
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f32,
    /// Drop tokens below this share of the likeliest one's probability
    #[arg(long, default_value_t = 0.05, value_name = "P")]
    min_p: f32,
    /// Divide the odds of recent tokens by this; 1: off
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    repeat_penalty: f32,
    /// Tokens that the penalty looks back on
    #[arg(long, default_value_t = 64, value_name = "N")]
    repeat_last_n: i32,
}

impl SamplerArgs {
    /// `clock` stands in for a seed that was not given.
    pub fn options(&self, clock: u32) -> Result<SamplerOptions> {
        let finite = |name, x: f32, least: f32| match x.is_finite() && x >= least {
            true => Ok(x),
            false => Err(Error::option(
                name,
                format!("{x}, expected a number of at least {least}"),
            )),
        };
        if !(self.repeat_penalty.is_finite() && self.repeat_penalty > 0.0) {
            return Err(Error::option(
                "--repeat-penalty",
                format!("{}, expected a number above 0", self.repeat_penalty),
            )
            .into());
        }
        Ok(SamplerOptions {
            seed: self.seed.unwrap_or(clock),
            temp: finite("--temp", self.temp, 0.0)?,
            top_k: self.top_k,
            top_p: finite("--top-p", self.top_p, 0.0)?,
            min_p: finite("--min-p", self.min_p, 0.0)?,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
        })
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum NormArg {
    /// Divided by the number of queries that could see the token
    Query,
    /// Plain cumulative sums, as in the paper
    Sum,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum QueriesArg {
    /// Every text token of the prompt, as in the paper
    All,
    /// The prompt's last token
    Last,
}

/// The parameters of `--kv-policy hae`.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "HAE")]
pub struct PolicyArgs {
    /// Where the other values start from: `default`, or `paper` (arXiv 2602.02197)
    #[arg(long, value_name = "NAME")]
    kv_preset: Option<String>,
    /// Keep this many visual tokens (64), or this share of them (0.4), by attention
    #[arg(long, value_name = "N|SHARE")]
    dap_keep: Option<Amount>,
    /// Drop visual tokens below TAU times the mean attention
    #[arg(long, value_name = "TAU", conflicts_with = "dap_keep")]
    dap_tau: Option<f64>,
    /// Drop visual tokens below R times the sum of attention, as in the paper
    #[arg(long, value_name = "R", conflicts_with_all = ["dap_keep", "dap_tau"])]
    dap_r: Option<f64>,
    /// With --dap-tau or --dap-r: keep a token that any single query gave this much
    #[arg(long, value_name = "A", conflicts_with = "dap_keep")]
    dap_alpha: Option<f64>,
    /// Prune no visual tokens after the prompt
    #[arg(long, conflicts_with_all = ["dap_keep", "dap_tau", "dap_r", "dap_alpha"])]
    no_dap: bool,
    /// Layers whose attention scores the tokens: `all`, or a list such as 0 or 4,8-11
    #[arg(long, value_name = "LIST")]
    score_layers: Option<Layers>,
    /// Which tokens of the prompt judge the picture
    #[arg(long, value_enum, value_name = "WHICH")]
    score_queries: Option<QueriesArg>,
    /// How attention adds up over time
    #[arg(long, value_enum, value_name = "HOW")]
    score_norm: Option<NormArg>,
    /// Multiply scores by this at every step; 1: never forget
    #[arg(long, value_name = "X")]
    score_decay: Option<f64>,
    /// Live cells while decoding (512), or a share of the prompt's cells (0.5)
    #[arg(long, value_name = "N|SHARE")]
    kv_budget: Option<Amount>,
    /// Cells of the recycle bin, on top of the budget
    #[arg(long, value_name = "N")]
    bin_size: Option<usize>,
    /// First positions that never leave
    #[arg(long, value_name = "N")]
    sinks: Option<usize>,
    /// Last positions that never leave
    #[arg(long, value_name = "N")]
    recent: Option<usize>,
    /// By which share a binned token must pass the lowest live one to come back
    #[arg(long, value_name = "X")]
    hysteresis: Option<f64>,
    /// Never take a token back out of the bin
    #[arg(long, action = ArgAction::SetTrue)]
    no_restore: bool,
}

impl PolicyArgs {
    pub fn options(&self) -> Result<PolicyOptions> {
        let mut options = PolicyOptions::preset(self.kv_preset.as_deref().unwrap_or("default"))?;
        let scope = options.dap.map_or(Scope::Turn, |dap| dap.scope);
        let rule = match (self.dap_keep, self.dap_tau, self.dap_r) {
            (Some(keep), _, _) => Some(DapRule::Keep(keep)),
            (_, Some(tau), _) => Some(DapRule::Tau(tau)),
            (_, _, Some(r)) => Some(DapRule::R(r)),
            _ => None,
        };
        if let Some(rule) = rule {
            options.dap = Some(DapOptions {
                rule,
                alpha: None,
                scope,
            });
        }
        if let (Some(alpha), Some(dap)) = (self.dap_alpha, &mut options.dap) {
            dap.alpha = Some(alpha);
        }
        if self.no_dap {
            options.dap = None;
        }
        let set = &mut options;
        self.score_layers
            .clone()
            .into_iter()
            .for_each(|x| set.layers = x);
        self.score_decay.into_iter().for_each(|x| set.decay = x);
        self.bin_size.into_iter().for_each(|x| set.bin_size = x);
        self.sinks.into_iter().for_each(|x| set.sinks = x);
        self.recent.into_iter().for_each(|x| set.recent = x);
        self.hysteresis.into_iter().for_each(|x| set.hysteresis = x);
        set.kv_budget = self.kv_budget.or(set.kv_budget);
        set.restore &= !self.no_restore;
        match self.score_queries {
            Some(QueriesArg::All) => set.queries = Queries::All,
            Some(QueriesArg::Last) => set.queries = Queries::Last,
            None => {}
        }
        match self.score_norm {
            Some(NormArg::Query) => set.norm = Norm::PerQuery,
            Some(NormArg::Sum) => set.norm = Norm::Sum,
            None => {}
        }
        Ok(options)
    }
}
