//! Flags that several commands share: llama.cpp's names where llama.cpp has one.

pub mod calibrated;
pub mod spelling;

use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgAction, ValueEnum};

use super::polling::PollArgs;
use hae::Error;
use hae::attend::Attend;
use hae::llama::{
    CacheType, ContextOptions, FlashAttention, RopeFactors, SamplerOptions, ScoreSource,
};
use hae::outfile::FilesInUse;
use hae::policy::{
    Amount, DapMode, DapOptions, DapRule, Layers, Norm, PolicyOptions, Pooling, Queries, Scope,
};

/// What is wrong with parameters of policies where `full` is the only one.
pub fn full_takes_no_parameters() -> Error {
    let reason = "full takes no parameters, expected another policy beside these flags";
    Error::option("--kv-policy", reason)
}

/// Which files to load, and onto what.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Text model (GGUF) [default: the small Phi-3.5-vision model inside this program]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// -mm: vision file (GGUF) that belongs to the model
    #[arg(long, alias = "mm", value_name = "FILE")]
    pub mmproj: Option<PathBuf>,
    /// -ngl: layers to keep on the GPU: a number, `all`, or `auto` for llama.cpp's choice
    #[arg(long, visible_alias = "n-gpu-layers", alias = "ngl", default_value = "auto", value_parser = gpu_layers, value_name = "N")]
    pub gpu_layers: GpuLayers,
    /// Read the weights into memory at once instead of mapping the file
    #[arg(long)]
    pub no_mmap: bool,
    /// Keep the weights in memory, never swapped out
    #[arg(long)]
    pub mlock: bool,
    /// Which longrope factors to use: `auto` follows the positions that the run can reach,
    /// `context` the size of the cache (as llama.cpp does)
    #[arg(long, value_enum, default_value_t = RopeArg::Auto, value_name = "RULE")]
    pub rope_factors: RopeArg,
}

impl ModelArgs {
    /// The files that are read.
    pub fn in_use(&self) -> FilesInUse {
        let mut files = FilesInUse::default();
        for (flag, path) in [("-m", &self.model), ("--mmproj", &self.mmproj)] {
            if let Some(path) = path {
                files.reads_model(flag, path);
            }
        }
        files
    }
}

/// `None`: as many as llama.cpp chooses.
pub type GpuLayers = Option<u32>;

/// llama.cpp's own spellings: -1 is `auto`, -2 is `all`.
pub fn gpu_layers(text: &str) -> Result<GpuLayers, String> {
    match text {
        "auto" | "-1" => Ok(None),
        "all" | "-2" => Ok(Some(i32::MAX as u32)),
        _ => match text.parse() {
            Ok(n) if n <= i32::MAX as u32 => Ok(Some(n)),
            _ => Err("expected a number of layers, all or auto".into()),
        },
    }
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
    #[value(aliases = ["1", "true", "enabled"])]
    On,
    #[value(aliases = ["0", "false", "disabled"])]
    Off,
    #[value(alias = "-1")]
    Auto,
}

/// How to run it.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Context")]
pub struct ContextArgs {
    /// Cells of the KV cache, which llama.cpp rounds up to a multiple of 256; 0: the context
    /// length that the model was trained for
    #[arg(short = 'c', long, default_value_t = 4096, value_name = "N")]
    pub ctx_size: u32,
    /// Rows of one decode call
    #[arg(short = 'b', long, default_value_t = 2048, value_name = "N")]
    batch_size: u32,
    /// -ub: rows computed at once
    #[arg(long, alias = "ub", default_value_t = 512, value_name = "N")]
    ubatch_size: u32,
    /// Threads while generating [default: physical cores]
    #[arg(short, long, value_name = "N")]
    threads: Option<i64>,
    /// -tb: threads while reading the prompt [default: as --threads]
    #[arg(long, alias = "tb", value_name = "N")]
    threads_batch: Option<i64>,
    #[command(flatten)]
    pub poll: PollArgs,
    /// -fa: flash attention
    #[arg(long, alias = "fa", value_enum, num_args = 0..=1, default_value = "auto", default_missing_value = "on", value_name = "WHEN")]
    flash_attn: FlashArg,
    /// -ctk: type of the K cache: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1
    #[arg(long, alias = "ctk", default_value = "f16", value_parser = cache_type, value_name = "TYPE")]
    cache_type_k: CacheType,
    /// -ctv: type of the V cache; quantized types need flash attention
    #[arg(long, alias = "ctv", default_value = "f16", value_parser = cache_type, value_name = "TYPE")]
    cache_type_v: CacheType,
    #[command(flatten)]
    attend: AttendArgs,
}

/// What a decoded token attends to.
#[derive(Debug, clap::Args)]
pub struct AttendArgs {
    /// Visual tokens that each layer looks at while the answer is written: a number, or a share.
    /// Every layer and token chooses anew, and nothing is removed [default: all]
    #[arg(long, value_name = "N|SHARE")]
    attend: Option<Amount>,
    /// The same of text, beside the first tokens, the last ones and the question [default: all]
    #[arg(long, value_name = "N|SHARE")]
    attend_text: Option<Amount>,
    /// Last tokens that every layer looks at [default: 16]
    #[arg(long, value_name = "N")]
    attend_recent: Option<usize>,
    /// Layers before this one look at everything [default: 0]
    #[arg(long, value_name = "LAYER")]
    attend_from: Option<u32>,
}

impl AttendArgs {
    /// What was asked for.
    pub fn options(&self) -> Attend {
        let default = Attend::default();
        Attend {
            vision: self.attend,
            text: self.attend_text,
            recent: self.attend_recent.unwrap_or(default.recent),
            first_layer: self.attend_from.unwrap_or(default.first_layer),
            ..default
        }
    }
}

pub fn cache_type(text: &str) -> Result<CacheType, String> {
    Ok(match &*text.to_ascii_lowercase() {
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
    /// Threads while generating.
    pub fn n_threads(&self) -> Result<i32> {
        match self.threads {
            Some(n) => threads("-t", n),
            None => Ok(default_threads()),
        }
    }

    /// Everything about the context that the command line says; scores and pictures come from
    /// the policy and the vision model.
    pub fn options(&self, n_ctx_train: u32) -> Result<ContextOptions> {
        if self.batch_size == 0 || self.ubatch_size == 0 {
            return Err(Error::option("-b, -ub", "0 rows, expected at least 1").into());
        }
        // Some cells more than any model was trained for; llama.cpp's and our own bookkeeping of
        // so many takes gigabytes before the cache itself does.
        const MOST: u32 = 1 << 24;
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
            n_threads_batch: match self.threads_batch {
                Some(n) => threads("-tb", n)?,
                None => n_threads,
            },
            poll: self.poll.level(),
            flash_attention: match self.flash_attn {
                FlashArg::On => FlashAttention::On,
                FlashArg::Off => FlashAttention::Off,
                FlashArg::Auto => FlashAttention::Auto,
            },
            type_k: self.cache_type_k,
            type_v: self.cache_type_v,
            score_layers: Vec::new(),
            kv_size: None,
            n_seq_max: 1,
            score_source: ScoreSource::default(),
            non_causal_images: false,
            rope_factors: RopeFactors::default(),
            attend: self.attend.options(),
            keep_sets: false,
            plain_lookups: false,
        })
    }
}

/// llama.cpp's way with -1.
pub fn default_threads() -> i32 {
    i32::try_from(num_cpus::get_physical().clamp(1, 512)).unwrap_or(1)
}

/// ggml ends the process on more threads than it has room for (`GGML_MAX_N_THREADS`).
fn threads(flag: &'static str, n: i64) -> Result<i32> {
    match i32::try_from(n) {
        Ok(n @ 1..=512) => Ok(n),
        _ => Err(Error::option(flag, format!("{n} threads, expected 1 to 512")).into()),
    }
}

/// How to choose the next token.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplerArgs {
    /// Seed of the sampler; -1: from the clock
    #[arg(short, long, default_value_t = -1, value_name = "N")]
    seed: i64,
    /// Temperature; 0 takes the likeliest token
    #[arg(long, alias = "temperature", default_value_t = 0.8, value_name = "T")]
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
    /// Tokens that the penalty looks back on; -1: as many as the context holds
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
        // The largest u32 is llama.cpp's own -1: its sampler would draw a seed that nobody learns.
        let seed = match u32::try_from(self.seed) {
            Ok(u32::MAX) => clock,
            Ok(seed) => seed,
            Err(_) if self.seed == -1 => clock,
            Err(_) => {
                let reason = format!("{}, expected -1 to {}", self.seed, u32::MAX);
                return Err(Error::option("-s", reason).into());
            }
        };
        if self.repeat_last_n < -1 {
            let reason = format!("{}, expected -1 or more", self.repeat_last_n);
            return Err(Error::option("--repeat-last-n", reason).into());
        }
        if !(self.repeat_penalty.is_finite() && self.repeat_penalty > 0.0) {
            return Err(Error::option(
                "--repeat-penalty",
                format!("{}, expected a number above 0", self.repeat_penalty),
            )
            .into());
        }
        Ok(SamplerOptions {
            seed,
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

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DapModeArg {
    Exact,
    Early,
    Midway,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PoolingArg {
    Avg,
    Max,
}

/// The parameters of the policies; each reads those that it has. The defaults that the help names are those of
/// [`PolicyOptions::default`], which a test compares.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "KV cache policy")]
pub struct PolicyArgs {
    /// Where the values below start from: `default`, or `paper` (arXiv 2602.02197)
    #[arg(long, value_name = "NAME")]
    kv_preset: Option<String>,
    /// Keep this many visual tokens (64), or this share of them (0.4), by attention
    /// [default: what a --kv-budget below 1.0 leaves room for, otherwise what --dap-spread says, or
    /// 0.4 with --dap-mode early]
    #[arg(long, value_name = "N|SHARE")]
    dap_keep: Option<Amount>,
    /// Drop visual tokens below TAU times the mean attention
    #[arg(long, value_name = "TAU", conflicts_with = "dap_keep")]
    dap_tau: Option<f64>,
    /// Drop visual tokens below R times the sum of attention, as in the paper
    #[arg(long, value_name = "R", conflicts_with_all = ["dap_keep", "dap_tau"])]
    dap_r: Option<f64>,
    /// Keep X times as many visual tokens as attention is spread over: few where a question looks
    /// at one thing, all where it looks at everything. --dap-keep says how many at least, 0.25
    /// if it does not [default: 2, unless another rule or a --kv-budget below 1.0 is given, or
    /// --dap-mode early]
    #[arg(long, value_name = "X", conflicts_with_all = ["dap_tau", "dap_r", "dap_alpha"])]
    dap_spread: Option<f64>,
    /// With --dap-tau or --dap-r: keep a token that any single query gave this much
    #[arg(long, value_name = "A", conflicts_with = "dap_keep")]
    dap_alpha: Option<f64>,
    /// When visual tokens are dropped: after the whole prompt went in (exact), or, as a trial run
    /// of the layers up to the last scoring layer says, before any went in (early) or before the
    /// layers that the trial run left out (midway). The last two want few and early --score-layers
    /// [default: exact]
    #[arg(long, value_enum, value_name = "WHEN")]
    dap_mode: Option<DapModeArg>,
    /// With --dap-mode early: judge the tokens that separate parts of a picture (the row ends of
    /// Phi-3.5-vision) like any other; otherwise they stay first, as up to half of what is kept
    #[arg(long, action = ArgAction::SetTrue)]
    prune_separators: bool,
    /// Prune no visual tokens
    #[arg(long, conflicts_with_all = ["dap_keep", "dap_tau", "dap_r", "dap_spread", "dap_alpha"])]
    no_dap: bool,
    /// Layers whose attention scores the tokens: `all`, or a list such as 0 or 4,8-11
    /// [default: all]
    #[arg(long, value_name = "LIST")]
    score_layers: Option<Layers>,
    /// Which tokens of the prompt judge the picture [default: last]
    #[arg(long, value_enum, value_name = "WHICH")]
    score_queries: Option<QueriesArg>,
    /// How attention adds up over time [default: query]
    #[arg(long, value_enum, value_name = "HOW")]
    score_norm: Option<NormArg>,
    /// Multiply scores by this at every step; 1: never forget [default: 1]
    #[arg(long, value_name = "X")]
    score_decay: Option<f64>,
    /// Cells taken at most once the prompt was pruned, the recycle bin and the token being decoded
    /// included: a number (512), or a share of what the full cache would hold at the end of the
    /// prompt (0.5) [default: no limit under hae, 1.0 under the policies that need one]
    #[arg(long, value_name = "N|SHARE", value_delimiter = ',')]
    kv_budget: Vec<Amount>,
    /// Cells of the recycle bin, part of a budget below 1.0; without a budget, beside one of 1.0
    /// [default: 8]
    #[arg(long, value_name = "N")]
    bin_size: Option<usize>,
    /// Evict nothing while decoding
    #[arg(long, conflicts_with_all = ["kv_budget", "bin_size", "hysteresis", "no_restore"])]
    no_ddes: bool,
    /// First positions that never leave; for context_shift llama.cpp's --keep [default: 4]
    #[arg(long, alias = "keep", value_name = "N")]
    sinks: Option<usize>,
    /// Last positions that never leave [default: 16]
    #[arg(long, value_name = "N")]
    recent: Option<usize>,
    /// By which share a binned token must pass the lowest live one to come back; without a
    /// --kv-budget, one of 1.0 comes with it [default: 0.1]
    #[arg(long, value_name = "X")]
    hysteresis: Option<f64>,
    /// Never take a token back out of the bin; without a --kv-budget, one of 1.0 comes with it
    #[arg(long, action = ArgAction::SetTrue)]
    no_restore: bool,
    /// Do not let a new question call evicted tokens back
    #[arg(long, action = ArgAction::SetTrue)]
    no_recall: bool,
    /// Recent window of h2o: cells, or a share of the budget [default: 0.5]
    #[arg(long, value_name = "N|SHARE")]
    h2o_recent: Option<Amount>,
    /// Last rows of the prompt that judge the others under snapkv [default: 32]
    #[arg(long, value_name = "N")]
    snapkv_window: Option<usize>,
    /// Neighbours that snapkv pools scores over, an odd number [default: 5]
    #[arg(long, value_name = "N")]
    snapkv_kernel: Option<usize>,
    /// How snapkv pools them [default: avg]
    #[arg(long, value_enum, value_name = "HOW")]
    snapkv_pooling: Option<PoolingArg>,
    /// Seed of random and random_visual [default: 0]
    #[arg(long, value_name = "N")]
    kv_seed: Option<u64>,
}

impl PolicyArgs {
    /// Of a command that takes one budget.
    pub fn options(&self) -> Result<PolicyOptions> {
        match self.kv_budget[..] {
            [] => self.options_at(None),
            [budget] => self.options_at(Some(budget)),
            _ => {
                let reason = format!("{} values, expected one", self.kv_budget.len());
                Err(Error::option("--kv-budget", reason).into())
            }
        }
    }

    /// The budgets that were given.
    pub fn budgets(&self) -> &[Amount] {
        &self.kv_budget
    }

    /// As [`PolicyArgs::options`], with this budget in the place of those given.
    pub fn options_at(&self, budget: Option<Amount>) -> Result<PolicyOptions> {
        let mut options = PolicyOptions::preset(self.kv_preset.as_deref().unwrap_or("default"))?;
        let scope = options.dap.map_or(Scope::Turn, |dap| dap.scope);
        // At most one of them is given, but for --dap-keep as the least of --dap-spread.
        let spread = |times| match self.dap_keep {
            Some(least) => DapRule::Spread { times, least },
            None => DapRule::spread(times),
        };
        let rule = (self.dap_spread.map(spread))
            .or(self.dap_keep.map(DapRule::Keep))
            .or(self.dap_tau.map(DapRule::Tau))
            .or(self.dap_r.map(DapRule::R));
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
        if let Some(mode) = self.dap_mode {
            options.dap_mode = match mode {
                DapModeArg::Exact => DapMode::Exact,
                DapModeArg::Early => DapMode::Early,
                DapModeArg::Midway => DapMode::Midway,
            };
        }
        options.recall &= !self.no_recall;
        options.keep_separators &= !self.prune_separators;
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
        // A recycle bin is asked for together with a budget, or takes the whole prompt's cells.
        let binned = self.bin_size.is_some() || self.hysteresis.is_some() || self.no_restore;
        let whole = binned.then_some(PolicyOptions::WHOLE_PROMPT);
        set.kv_budget = match self.no_ddes {
            true => None,
            false => budget.or(set.kv_budget).or(whole),
        };
        set.restore &= !self.no_restore;
        self.h2o_recent.into_iter().for_each(|x| set.h2o_recent = x);
        let snapkv = &mut set.snapkv;
        let (window, kernel) = (self.snapkv_window, self.snapkv_kernel);
        window.into_iter().for_each(|x| snapkv.window = x);
        kernel.into_iter().for_each(|x| snapkv.kernel = x);
        match self.snapkv_pooling {
            Some(PoolingArg::Avg) => snapkv.pooling = Pooling::Avg,
            Some(PoolingArg::Max) => snapkv.pooling = Pooling::Max,
            None => {}
        }
        self.kv_seed.into_iter().for_each(|x| set.seed = x);
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

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::*;

    #[test]
    fn the_help_names_the_defaults() {
        let mut command = PolicyArgs::augment_args(Command::new("x").term_width(100));
        let help = command.render_long_help().to_string();
        // Where lines break does not matter.
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        let PolicyOptions {
            layers,
            queries,
            norm,
            decay,
            dap,
            kv_budget,
            bin_size,
            sinks,
            recent,
            hysteresis,
            restore,
            dap_mode,
            recall,
            keep_separators,
            h2o_recent,
            snapkv,
            seed,
        } = PolicyOptions::default();
        assert_eq!(
            (dap_mode, recall, keep_separators),
            (DapMode::Exact, true, true)
        );
        assert_eq!(layers, Layers::All);
        assert_eq!((queries, norm), (Queries::Last, Norm::PerQuery));
        assert!(kv_budget.is_none() && restore);
        assert_eq!(dap.unwrap().rule, DapRule::Auto);
        assert_eq!(snapkv.pooling, Pooling::Avg);
        let Amount::Share(h2o_recent) = h2o_recent else {
            panic!("{h2o_recent:?}")
        };
        let values = [decay, hysteresis, h2o_recent].map(|x| x.to_string());
        let counts = [
            bin_size,
            sinks,
            recent,
            snapkv.window,
            snapkv.kernel,
            seed as usize,
        ]
        .map(|x| x.to_string());
        let named = [
            "all",
            "last",
            "query",
            "no limit under hae, 1.0 under the policies that need one",
            "exact",
            "avg",
        ]
        .map(str::to_owned);
        for value in values.iter().chain(&counts).chain(&named) {
            let default = format!("[default: {value}]");
            assert!(help.contains(&default), "{default} is not in:\n{help}");
        }
    }
}
