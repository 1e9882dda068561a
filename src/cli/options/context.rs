//! How a context is made: its sizes, threads and types, and what a decoded token attends to.

use anyhow::Result;

use super::POLICY;
use crate::cli::named::{named, parse};
use crate::cli::polling::PollArgs;
use hae::Error;
use hae::attend::Attend;
use hae::llama::{CacheType, ContextOptions, FlashAttention};
use hae::policy::Amount;

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
    #[arg(long, alias = "fa", value_parser = named::<FlashAttention>(), hide_possible_values = true, num_args = 0..=1, default_value = "auto", default_missing_value = "on", value_name = "WHEN")]
    flash_attn: FlashAttention,
    /// -ctk: type of K, such as q8_0
    ///
    /// One of f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1.
    #[arg(long, alias = "ctk", default_value = "f16", value_parser = parse::<CacheType>, value_name = "TYPE")]
    cache_type_k: CacheType,
    /// -ctv: type of V, such as q8_0
    ///
    /// The types are those of K. Quantized ones need flash attention.
    #[arg(long, alias = "ctv", default_value = "f16", value_parser = parse::<CacheType>, value_name = "TYPE")]
    cache_type_v: CacheType,
    #[command(flatten)]
    attend: AttendArgs,
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
            flash_attention: self.flash_attn,
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
}
