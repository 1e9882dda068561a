//! Flags that several commands share: llama.cpp's names where llama.cpp has one.

pub mod calibrated;
mod elsewhere;
pub mod spelling;

use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgAction, ValueEnum};

use super::polling::PollArgs;
use hae::Error;
use hae::attend::Attend;
use hae::llama::{CacheType, ContextOptions, FlashAttention, SamplerOptions};
use hae::open::RopeChoice;
use hae::outfile::FilesInUse;
use hae::policy::{
    self, Amount, DapMode, DapOptions, DapRule, Layers, Norm, OptionKey, PolicyOptions, Pooling,
    Queries, Scope,
};

/// Flags that `hae run --help` shows, and beside them those that are for tuning.
pub const POLICY: &str = "KV cache policy";
const PRUNING: &str = "Which visual tokens leave after a prompt";
const SCORES: &str = "How attention becomes a score";
const DECODING: &str = "What leaves while an answer is written";
pub const QUESTIONS: &str = "What a new question finds";
pub const PRESETS: &str = "Where values come from";
const ONE_POLICY: &str = "What one policy alone reads";

/// Headings of the flags that tune a policy: `-h` leaves them out, `hae help policies` has them all
/// beside [`POLICY`].
pub const TUNING: [&str; 6] = [PRUNING, SCORES, DECODING, QUESTIONS, PRESETS, ONE_POLICY];

/// Which files to load, and onto what.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Text model [default: a small one in this program]
    ///
    /// A GGUF. The small one has Phi-3.5-vision's architecture.
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// -mm: vision file (GGUF) of the model
    #[arg(long, alias = "mm", value_name = "FILE")]
    pub mmproj: Option<PathBuf>,
    /// -ngl: layers on the GPU, or all
    ///
    /// A number, all, or auto for llama.cpp's choice. --n-gpu-layers is the same.
    #[arg(long, aliases = ["n-gpu-layers", "ngl"], default_value = "auto", value_parser = gpu_layers, value_name = "N")]
    pub gpu_layers: GpuLayers,
    /// Read the weights into memory instead of mapping the file
    #[arg(long, hide_short_help = true)]
    pub no_mmap: bool,
    /// Keep the weights in memory, never swapped out
    #[arg(long, hide_short_help = true)]
    pub mlock: bool,
    /// Which longrope factors to use. auto goes by the positions that the run can reach. context
    /// goes by the size of the cache, as llama.cpp does
    #[arg(long, hide_short_help = true, value_enum, default_value_t = RopeArg::Auto, value_name = "RULE")]
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

impl From<RopeArg> for RopeChoice {
    fn from(rule: RopeArg) -> Self {
        match rule {
            RopeArg::Auto => RopeChoice::Auto,
            RopeArg::Short => RopeChoice::Short,
            RopeArg::Long => RopeChoice::Long,
            RopeArg::Context => RopeChoice::Context,
        }
    }
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
    /// Cells of the KV cache
    ///
    /// One for each token. llama.cpp rounds the number up to a multiple of 256. 0 takes the context length that the
    /// model was trained for.
    #[arg(short = 'c', long, default_value_t = 4096, value_name = "N")]
    pub ctx_size: u32,
    /// Rows of one decode call
    #[arg(
        short = 'b',
        long,
        hide_short_help = true,
        default_value_t = 2048,
        value_name = "N"
    )]
    batch_size: u32,
    /// -ub: rows computed at once
    #[arg(
        long,
        alias = "ub",
        hide_short_help = true,
        default_value_t = 512,
        value_name = "N"
    )]
    ubatch_size: u32,
    /// Threads [default: physical cores]
    ///
    /// While the answer is written. --threads-batch is for the prompt.
    #[arg(short, long, value_name = "N")]
    threads: Option<i64>,
    /// -tb: threads while reading the prompt [default: as --threads]
    #[arg(long, alias = "tb", hide_short_help = true, value_name = "N")]
    threads_batch: Option<i64>,
    #[command(flatten)]
    pub poll: PollArgs,
    /// -fa: flash attention, on or off
    #[arg(long, alias = "fa", value_enum, hide_possible_values = true, num_args = 0..=1, default_value = "auto", default_missing_value = "on", value_name = "WHEN")]
    flash_attn: FlashArg,
    /// -ctk: type of K, such as q8_0
    ///
    /// One of f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1.
    #[arg(long, alias = "ctk", default_value = "f16", value_parser = cache_type, value_name = "TYPE")]
    cache_type_k: CacheType,
    /// -ctv: type of V, such as q8_0
    ///
    /// The types are those of K. Quantized ones need flash attention.
    #[arg(long, alias = "ctv", default_value = "f16", value_parser = cache_type, value_name = "TYPE")]
    cache_type_v: CacheType,
    #[command(flatten)]
    attend: AttendArgs,
}

/// What a decoded token attends to.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = POLICY)]
pub struct AttendArgs {
    /// Visual tokens a layer looks at [default: all]
    ///
    /// A number, or a share. While the answer is written, every layer chooses anew for every
    /// token. Nothing is removed, so no memory is saved.
    #[arg(long, value_name = "N|SHARE", display_order = 901)]
    attend: Option<Amount>,
    /// Text tokens a layer looks at [default: all]
    ///
    /// A number, or a share. The first tokens, the last ones and the question come on top.
    #[arg(long, value_name = "N|SHARE", display_order = 902)]
    attend_text: Option<Amount>,
    /// With a lookup (--attend, --attend-text): last tokens that every layer looks at [default: 16]
    #[arg(long, value_name = "N", display_order = 903, hide_short_help = true)]
    attend_recent: Option<usize>,
    /// With a lookup: the layers before this one look at everything [default: 0]
    #[arg(
        long,
        value_name = "LAYER",
        display_order = 904,
        hide_short_help = true
    )]
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
    pub fn options(&self) -> Result<ContextOptions> {
        if self.batch_size == 0 || self.ubatch_size == 0 {
            return Err(Error::option("-b, -ub", "0 rows, expected at least 1").into());
        }
        let n_threads = self.n_threads()?;
        Ok(ContextOptions {
            n_ctx: self.ctx_size,
            n_batch: self.batch_size,
            n_ubatch: self.ubatch_size,
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
            attend: self.attend.options(),
            ..ContextOptions::default()
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
    /// Seed of the sampler; -1: the clock
    #[arg(short, long, default_value_t = -1, value_name = "N")]
    seed: i64,
    /// Temperature; 0: the likeliest token
    #[arg(long, alias = "temperature", default_value_t = 0.8, value_name = "T")]
    temp: f32,
    /// Choose among the K likeliest tokens; 0: all
    #[arg(long, hide_short_help = true, default_value_t = 40, value_name = "K")]
    top_k: i32,
    /// Choose among the tokens that hold P
    ///
    /// The likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f32,
    /// Drop tokens below this share of the likeliest one's probability
    #[arg(long, hide_short_help = true, default_value_t = 0.05, value_name = "P")]
    min_p: f32,
    /// Divide the odds of recent tokens by this; 1: off
    #[arg(long, hide_short_help = true, default_value_t = 1.0, value_name = "X")]
    repeat_penalty: f32,
    /// Tokens that the penalty looks back on; -1: as many as the context holds
    #[arg(long, hide_short_help = true, default_value_t = 64, value_name = "N")]
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
    Query,
    Sum,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum QueriesArg {
    All,
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

/// The parameters of the policies; [`PolicyArgs::refuse_unread`] refuses those that none of them reads. The
/// defaults that the help names are those of [`PolicyOptions::default`], which a test compares.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = POLICY)]
pub struct PolicyArgs {
    /// Visual tokens to keep: 64, or 0.4 of them
    ///
    /// Those with the most attention stay. With --dap-spread this is the least. [default: what a
    /// --kv-budget below 1.0 leaves room for, else what --dap-spread says, and 0.4 with --dap-mode
    /// early]
    #[arg(long, value_name = "N|SHARE")]
    dap_keep: Option<Amount>,
    /// Drop visual tokens below TAU × the mean attention
    #[arg(long, value_name = "TAU", conflicts_with = "dap_keep", help_heading = PRUNING)]
    dap_tau: Option<f64>,
    /// Drop visual tokens below R × the sum of attention, as in the paper
    #[arg(long, value_name = "R", conflicts_with_all = ["dap_keep", "dap_tau"], help_heading = PRUNING)]
    dap_r: Option<f64>,
    /// Keep X times the number of visual tokens that share most of the attention. That is few where
    /// a question looks at one thing, and all where it looks at everything. At least --dap-keep
    /// stay, or 0.25 of them. Off with another rule, with a --kv-budget below 1.0, or with
    /// --dap-mode early [default: 2]
    #[arg(long, value_name = "X", conflicts_with_all = ["dap_tau", "dap_r", "dap_alpha"], help_heading = PRUNING)]
    dap_spread: Option<f64>,
    /// With --dap-tau or --dap-r: spare a token that any one query looked at this much
    #[arg(long, value_name = "ALPHA", conflicts_with = "dap_keep", help_heading = PRUNING)]
    dap_alpha: Option<f64>,
    /// When to drop visual tokens. exact: after the prefill. early: before the prefill. midway: after
    /// the first layers. With early and midway, choose few and low --score-layers [default: exact]
    #[arg(long, value_enum, value_name = "WHEN", help_heading = PRUNING)]
    dap_mode: Option<DapModeArg>,
    /// With --dap-mode early: judge row ends of a picture like other tokens. Otherwise they stay
    /// first, as at most half of what is kept
    #[arg(long, action = ArgAction::SetTrue, help_heading = PRUNING)]
    prune_separators: bool,
    /// Drop no visual tokens after a prompt
    #[arg(long, conflicts_with_all = ["dap_keep", "dap_tau", "dap_r", "dap_spread", "dap_alpha"], help_heading = PRUNING)]
    no_dap: bool,
    /// Layers whose attention counts: all, or a list such as 0 or 4,8-11 [default: all]
    #[arg(long, value_name = "LIST", help_heading = SCORES)]
    score_layers: Option<Layers>,
    /// Tokens of the prompt that judge the picture. last: the last one. all: all text, as in the
    /// paper [default: last]
    #[arg(long, value_enum, value_name = "WHICH", help_heading = SCORES)]
    score_queries: Option<QueriesArg>,
    /// How attention adds up. query: divided by the number of queries that could see the token. sum:
    /// plain sums, as in the paper [default: query]
    #[arg(long, value_enum, value_name = "HOW", help_heading = SCORES)]
    score_norm: Option<NormArg>,
    /// Multiply scores by X at every step; 1 forgets nothing [default: 1]
    #[arg(long, value_name = "X", help_heading = SCORES)]
    score_decay: Option<f64>,
    /// Most cells after the prompt: 512, or 0.5 of it
    ///
    /// The most cells that are taken once the prompt was pruned. The recycle bin and the token being
    /// decoded count. A share is one of what the full cache would hold at the end of the prompt.
    /// [default: no limit under hae, 1.0 under the policies that need one]
    #[arg(long, value_name = "N|SHARE", value_delimiter = ',')]
    kv_budget: Vec<Amount>,
    /// Bin size in cells. Inside a budget below 1.0, on top of 1.0. Alone it implies 1.0 [default: 8]
    #[arg(long, value_name = "N", help_heading = DECODING)]
    bin_size: Option<usize>,
    /// Evict nothing while decoding
    #[arg(long, conflicts_with_all = ["kv_budget", "bin_size", "hysteresis", "no_restore"], help_heading = DECODING)]
    no_ddes: bool,
    /// First positions that never leave; for context_shift llama.cpp's --keep [default: 4]
    #[arg(long, alias = "keep", value_name = "N", help_heading = DECODING)]
    sinks: Option<usize>,
    /// Last positions that never leave [default: 16]
    #[arg(long, value_name = "N", help_heading = DECODING)]
    recent: Option<usize>,
    /// A binned token comes back when its score is X above the lowest live one: 0.1 means 10 %.
    /// Alone it implies a budget of 1.0 [default: 0.1]
    #[arg(long, value_name = "X", help_heading = DECODING)]
    hysteresis: Option<f64>,
    /// Never take a token back out of the bin. Alone it implies a budget of 1.0
    #[arg(long, action = ArgAction::SetTrue, help_heading = DECODING)]
    no_restore: bool,
    /// Do not let a new question call evicted tokens back
    #[arg(long, action = ArgAction::SetTrue, help_heading = QUESTIONS)]
    no_recall: bool,
    /// h2o: recent window, in cells or as a share of the budget [default: 0.5]
    #[arg(long, value_name = "N|SHARE", help_heading = ONE_POLICY)]
    h2o_recent: Option<Amount>,
    /// snapkv: last rows of the prompt, which judge the others [default: 32]
    #[arg(long, value_name = "N", help_heading = ONE_POLICY)]
    snapkv_window: Option<usize>,
    /// snapkv: neighbours whose scores are pooled, an odd number [default: 5]
    #[arg(long, value_name = "N", help_heading = ONE_POLICY)]
    snapkv_kernel: Option<usize>,
    /// snapkv: how they are pooled [default: avg]
    #[arg(long, value_enum, value_name = "HOW", help_heading = ONE_POLICY)]
    snapkv_pooling: Option<PoolingArg>,
    /// random and random_visual: seed [default: 0]
    #[arg(long, value_name = "N", help_heading = ONE_POLICY)]
    kv_seed: Option<u64>,
    /// Start from these values: default, or paper (arXiv 2602.02197) [default: default]
    #[arg(long, value_name = "NAME", help_heading = PRESETS)]
    kv_preset: Option<String>,
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

    /// Refuses flags that none of these policies reads. `traced`: a trace is written, which of a
    /// policy that evicts nothing holds the attention of `--score-layers`.
    pub fn refuse_unread<P: AsRef<str>>(&self, policies: &[P], traced: bool) -> hae::Result<()> {
        let policies: Vec<&str> = policies.iter().map(AsRef::as_ref).collect();
        let traces_layers = traced && policies.iter().any(|name| policy::evicts_nothing(name));
        let given = self
            .given()?
            .into_iter()
            .filter(|(_, sets)| !(traces_layers && sets[..] == [OptionKey::Layers]));
        policy::refuse_unread(&policies, given)
    }

    /// The flags that were given, whatever their values, each with the options that it sets. A
    /// preset is one flag, however much it sets.
    fn given(&self) -> hae::Result<Vec<(&'static str, Vec<OptionKey>)>> {
        let PolicyArgs {
            kv_preset,
            dap_keep,
            dap_tau,
            dap_r,
            dap_spread,
            dap_alpha,
            dap_mode,
            prune_separators,
            no_dap,
            score_layers,
            score_queries,
            score_norm,
            score_decay,
            kv_budget,
            bin_size,
            no_ddes,
            sinks,
            recent,
            hysteresis,
            no_restore,
            no_recall,
            h2o_recent,
            snapkv_window,
            snapkv_kernel,
            snapkv_pooling,
            kv_seed,
        } = self;
        let given = [
            // Beside --dap-spread it is a part of that rule.
            (
                dap_keep.is_some() && dap_spread.is_none(),
                OptionKey::DapKeep,
            ),
            (dap_tau.is_some(), OptionKey::DapTau),
            (dap_r.is_some(), OptionKey::DapR),
            (dap_spread.is_some(), OptionKey::DapSpread),
            (dap_alpha.is_some(), OptionKey::DapAlpha),
            (dap_mode.is_some(), OptionKey::DapMode),
            (*prune_separators, OptionKey::KeepSeparators),
            (*no_dap, OptionKey::NoDap),
            (score_layers.is_some(), OptionKey::Layers),
            (score_queries.is_some(), OptionKey::Queries),
            (score_norm.is_some(), OptionKey::Norm),
            (score_decay.is_some(), OptionKey::Decay),
            (!kv_budget.is_empty(), OptionKey::KvBudget),
            (bin_size.is_some(), OptionKey::BinSize),
            (sinks.is_some(), OptionKey::Sinks),
            (recent.is_some(), OptionKey::Recent),
            (hysteresis.is_some(), OptionKey::Hysteresis),
            (*no_restore, OptionKey::Restore),
            (*no_recall, OptionKey::Recall),
            (h2o_recent.is_some(), OptionKey::H2oRecent),
            (snapkv_window.is_some(), OptionKey::SnapkvWindow),
            (snapkv_kernel.is_some(), OptionKey::SnapkvKernel),
            (snapkv_pooling.is_some(), OptionKey::SnapkvPooling),
            (kv_seed.is_some(), OptionKey::Seed),
        ];
        let single = given.into_iter().filter(|(given, _)| *given);
        let mut given: Vec<_> = single.map(|(_, key)| (key.flag(), vec![key])).collect();
        if *no_ddes {
            // It takes back the budget of a preset.
            given.push(("--no-ddes", vec![OptionKey::KvBudget]));
        }
        if let Some(name) = kv_preset {
            given.push(("--kv-preset", PolicyOptions::preset(name)?.set().collect()));
        }
        Ok(given)
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
    use clap::{Args, Command, Parser};

    use super::*;
    use crate::cli::spell::spelled;

    /// What the help of each flag says of its default, and `None` where it says nothing.
    fn defaults(command: &Command) -> Vec<(&str, Option<String>)> {
        let default = |arg: &clap::Arg| {
            let text = arg.get_long_help().or(arg.get_help())?.to_string();
            // Where lines break does not matter.
            let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
            let (_, default) = text.split_once("[default: ")?;
            default.strip_suffix(']').map(str::to_owned)
        };
        let arguments = command.get_arguments();
        arguments
            .filter_map(|arg| Some((arg.get_long()?, default(arg))))
            .collect()
    }

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        policy: PolicyArgs,
    }

    fn parsed(flags: &[&str]) -> PolicyArgs {
        Line::parse_from(["x"].iter().chain(flags)).policy
    }

    fn refused(flags: &[&str], policies: &[&str], traced: bool) -> Option<String> {
        let refused = parsed(flags).refuse_unread(policies, traced);
        refused.err().map(|e| spelled(&e.to_string()))
    }

    /// Each is told by itself, also where its value is the default.
    #[test]
    fn every_flag_is_refused_where_it_is_not_read() {
        let command = PolicyArgs::augment_args(Command::new("x"));
        for arg in command.get_arguments() {
            let flag = format!("--{}", arg.get_long().unwrap());
            let value = match &*flag {
                "--kv-preset" => "paper",
                "--dap-mode" => "exact",
                "--score-layers" => "all",
                "--score-queries" => "last",
                "--score-norm" => "query",
                "--snapkv-pooling" => "avg",
                "--h2o-recent" | "--dap-keep" => "0.5",
                _ => "1",
            };
            let given: &[&str] = match arg.get_action().takes_values() {
                true => &[&flag, value],
                false => &[&flag],
            };
            let line = refused(given, &["full"], false).unwrap();
            assert_eq!(line, format!("{flag}: the policy full does not read it"));
            let everyone: Vec<&str> = policy::names().collect();
            assert_eq!(refused(given, &everyone, false), None);
        }
    }

    #[test]
    fn a_preset_is_one_flag_and_a_trace_of_full_has_layers() {
        let paper = ["--kv-preset", "paper"];
        assert_eq!(refused(&paper, &["random"], false), None, "its budget");
        assert_eq!(refused(&["--kv-preset", "default"], &["full"], false), None);
        let line = refused(
            &[&paper[..], &["--bin-size", "8"]].concat(),
            &["h2o"],
            false,
        );
        assert_eq!(line.unwrap(), "--bin-size: the policy h2o does not read it");
        // As the least of --dap-spread, --dap-keep is no rule of its own.
        let rules = ["--dap-keep", "9", "--dap-spread", "2"];
        let line = refused(&rules, &["fastv"], false).unwrap();
        assert_eq!(line, "--dap-spread: the policy fastv does not read it");

        let layers = ["--score-layers", "0"];
        assert_eq!(refused(&layers, &["full"], true), None);
        assert_eq!(refused(&layers, &["full", "random"], true), None);
        assert!(refused(&layers, &["random"], true).is_some());
        assert!(refused(&["--sinks", "1"], &["full"], true).is_some());
    }

    #[test]
    fn the_help_names_the_defaults() {
        let command = PolicyArgs::augment_args(Command::new("x"));
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
        let DapRule::Spread { times, least } = DapRule::SPREAD else {
            panic!("{:?}", DapRule::SPREAD)
        };
        assert_eq!(least, Amount::Share(0.25));
        let keep = "what a --kv-budget below 1.0 leaves room for, else what --dap-spread says, and 0.4 \
                    with --dap-mode early";
        let budget = "no limit under hae, 1.0 under the policies that need one";
        // None: a switch, or a rule that is off.
        let expected = [
            ("dap-keep", Some(keep.to_owned())),
            ("dap-tau", None),
            ("dap-r", None),
            ("dap-spread", Some(times.to_string())),
            ("dap-alpha", None),
            ("dap-mode", Some("exact".to_owned())),
            ("prune-separators", None),
            ("no-dap", None),
            ("score-layers", Some(layers.to_string())),
            ("score-queries", Some("last".to_owned())),
            ("score-norm", Some("query".to_owned())),
            ("score-decay", Some(decay.to_string())),
            ("kv-budget", Some(budget.to_owned())),
            ("bin-size", Some(bin_size.to_string())),
            ("no-ddes", None),
            ("sinks", Some(sinks.to_string())),
            ("recent", Some(recent.to_string())),
            ("hysteresis", Some(hysteresis.to_string())),
            ("no-restore", None),
            ("no-recall", None),
            ("h2o-recent", Some(h2o_recent.to_string())),
            ("snapkv-window", Some(snapkv.window.to_string())),
            ("snapkv-kernel", Some(snapkv.kernel.to_string())),
            ("snapkv-pooling", Some("avg".to_owned())),
            ("kv-seed", Some(seed.to_string())),
            ("kv-preset", Some("default".to_owned())),
        ];
        assert_eq!(defaults(&command), expected);
        let spread = command
            .get_arguments()
            .find(|arg| arg.get_id() == "dap_spread");
        let spread = spread.unwrap().get_help().unwrap().to_string();
        assert!(spread.contains("0.25"), "{spread}");
    }

    #[test]
    fn the_help_of_lookups_names_their_defaults() {
        let command = AttendArgs::augment_args(Command::new("x"));
        let Attend {
            vision,
            text,
            recent,
            first_layer,
            ..
        } = Attend::default();
        assert_eq!((vision, text), (None, None));
        // These two say it in the short help.
        let all = |id: &str| {
            let arg = command.get_arguments().find(|arg| arg.get_id() == id);
            arg.unwrap().get_help().unwrap().to_string()
        };
        for id in ["attend", "attend_text"] {
            assert!(all(id).ends_with("[default: all]"), "{}", all(id));
        }
        let expected = [
            ("attend-recent", Some(recent.to_string())),
            ("attend-from", Some(first_layer.to_string())),
        ];
        assert_eq!(defaults(&command)[2..], expected);
    }

    /// `docs/flags.md` names every flag that tunes the cache, with the numbers of their defaults.
    #[test]
    fn the_document_names_every_flag() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/flags.md");
        let text = std::fs::read_to_string(path).unwrap();
        let command = AttendArgs::augment_args(PolicyArgs::augment_args(Command::new("x")));
        for (flag, default) in defaults(&command) {
            let of_flag = |line: &&str| {
                let cell = line.strip_prefix("| `").and_then(|l| l.split(" |").next());
                cell.is_some_and(|cell| {
                    let mut names = cell.split(['`', ' ', ',']);
                    names.any(|name| name.strip_prefix("--") == Some(flag))
                })
            };
            let rows: Vec<&str> = text.lines().filter(of_flag).collect();
            assert_eq!(rows.len(), 1, "--{flag}: {rows:?}");
            let number = default.filter(|d| d.parse::<f64>().is_ok());
            if let Some(number) = number {
                let last = rows[0].trim_end_matches(" |").rsplit(" | ").next();
                let named = last.unwrap().split([',', ';', ' ']).any(|n| n == number);
                assert!(named, "--{flag}: {number} is not in: {}", rows[0]);
            }
        }
    }
}
