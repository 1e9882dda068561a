//! How a context is made: its sizes, threads and types, and what a decoded token attends to.

use anyhow::Result;

use super::{POLICY, QUESTIONS};
use crate::cli::named::{named, parse};
use crate::cli::polling::PollArgs;
use hae::Error;
use hae::attend::Attend;
use hae::cache::{BinOptions, BinStore};
use hae::llama::{ByPolicy, CacheType, ContextOptions, FlashAttention};
use hae::policy::{self, Amount, OptionKey, PolicySpec};

/// How to run it.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Context")]
pub struct ContextArgs {
    /// Cells of the KV cache [default: 4096]
    ///
    /// One for each token. llama.cpp rounds the number up to a multiple of 256. 0 takes the context length that the
    /// model was trained for.
    #[arg(short = 'c', long, value_name = "N")]
    ctx_size: Option<u32>,
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
    #[arg(long, alias = "fa", value_parser = named::<FlashAttention>(), hide_possible_values = true, num_args = 0..=1, default_value = "auto", default_missing_value = "on", value_name = "WHEN")]
    flash_attn: FlashAttention,
    /// -ctk: type of K, such as q8_0
    ///
    /// One of f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1. [default: f16; hae: q8_0]
    #[arg(long, alias = "ctk", value_parser = parse::<CacheType>, value_name = "TYPE")]
    cache_type_k: Option<CacheType>,
    /// -ctv: type of V, such as q8_0
    ///
    /// The types are those of K. Quantized ones need flash attention. [default: f16; hae: q8_0]
    #[arg(long, alias = "ctv", value_parser = parse::<CacheType>, value_name = "TYPE")]
    cache_type_v: Option<CacheType>,
    #[command(flatten)]
    attend: AttendArgs,
    #[command(flatten)]
    bin: BinArgs,
}

impl ContextArgs {
    /// Threads while generating.
    pub fn n_threads(&self) -> Result<i32> {
        match self.threads {
            Some(n) => threads("-t", n),
            None => Ok(default_threads()),
        }
    }

    /// Refuses flags of the bin's store where nothing would ever be asked back from it.
    pub fn refuse_unread(&self, policy: &PolicySpec) -> hae::Result<()> {
        let recalls = policy.options.recall && policy::reads(&policy.name, OptionKey::Recall);
        let BinArgs { bin_store, bin_mib } = &self.bin;
        let given = [
            ("bin_store", bin_store.is_some()),
            ("bin_mib", bin_mib.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given && !recalls) {
            Some((flag, _)) => {
                let reason =
                    "wants a policy that calls evicted tokens back: hae, without `no_recall`";
                Err(Error::option(flag, reason))
            }
            None => Ok(()),
        }
    }

    /// `-c`, where it was given.
    pub fn ctx_size(&self) -> Option<u32> {
        self.ctx_size
    }

    /// Everything about the context that the command line says; scores and pictures come from
    /// the policy and the vision model.
    pub fn options(&self) -> Result<ContextOptions> {
        if self.batch_size == 0 || self.ubatch_size == 0 {
            return Err(Error::option("-b, -ub", "0 rows, expected at least 1").into());
        }
        let n_threads = self.n_threads()?;
        let default = ContextOptions::default();
        Ok(ContextOptions {
            n_ctx: self.ctx_size.unwrap_or(default.n_ctx),
            n_batch: self.batch_size,
            n_ubatch: self.ubatch_size,
            n_threads,
            n_threads_batch: match self.threads_batch {
                Some(n) => threads("-tb", n)?,
                None => n_threads,
            },
            poll: self.poll.level(),
            flash_attention: self.flash_attn,
            type_k: self.cache_type_k.unwrap_or(CacheType::F16),
            type_v: self.cache_type_v.unwrap_or(CacheType::F16),
            attend: self.attend.options(),
            by_policy: ByPolicy {
                types: self.cache_type_k.or(self.cache_type_v).is_none(),
                attend: !self.attend.is_given(),
            },
            bin: self.bin.options(),
            ..default
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

/// What a decoded token attends to.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = POLICY)]
pub struct AttendArgs {
    /// Visual tokens a layer looks at: 0.15
    ///
    /// A number, or a share. While the answer is written, every layer chooses anew for every
    /// token. Nothing is removed, so no memory is saved. [default: all; hae: 0.15]
    #[arg(long, value_name = "N|SHARE", display_order = 901)]
    attend: Option<Amount>,
    /// Text tokens a layer looks at: 0.25
    ///
    /// A number, or a share. The first tokens, the last ones and the question come on top.
    /// [default: all; hae: 0.25]
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
    /// Whether any of it was said.
    pub fn is_given(&self) -> bool {
        let AttendArgs {
            attend,
            attend_text,
            attend_recent,
            attend_from,
        } = self;
        attend.or(*attend_text).is_some() || attend_recent.is_some() || attend_from.is_some()
    }

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

/// Where rows of evicted tokens wait.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = QUESTIONS)]
pub struct BinArgs {
    /// Where what was evicted waits until it is asked for
    ///
    /// file: in a temporary file without a name, which is gone when the program is; in TMPDIR, else in
    /// /var/tmp. ram: in main memory. off: nowhere; visual tokens then come back by decoding them again,
    /// text not at all. For policies that call evicted tokens back.
    /// [default: file]
    #[arg(long, value_parser = named::<BinStore>(), hide_possible_values = true, value_name = "WHERE")]
    bin_store: Option<BinStore>,
    /// With --bin-store: MiB at most. The oldest goes first, and of one age what was least looked at
    /// [default: 4096]
    #[arg(long, value_name = "N")]
    bin_mib: Option<u32>,
}

impl BinArgs {
    fn options(&self) -> BinOptions {
        let default = BinOptions::default();
        BinOptions {
            store: self.bin_store.unwrap_or(default.store),
            max_bytes: self
                .bin_mib
                .map_or(default.max_bytes, |n| u64::from(n) << 20),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::super::tests::defaults;
    use super::*;

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
        let all = |id: &str| {
            let arg = command.get_arguments().find(|arg| arg.get_id() == id);
            arg.unwrap().get_long_help().unwrap().to_string()
        };
        let Attend { vision, text, .. } = Attend::FEW;
        for (id, few) in [("attend", vision), ("attend_text", text)] {
            let Some(Amount::Share(few)) = few else {
                panic!("{few:?}")
            };
            let default = format!("[default: all; hae: {few}]");
            assert!(all(id).ends_with(&default), "{}", all(id));
        }
        let expected = [
            ("attend-recent", Some(recent.to_string())),
            ("attend-from", Some(first_layer.to_string())),
        ];
        assert_eq!(defaults(&command)[2..], expected);
    }
}
