//! The parameters of the policies as flags: here what each says in the help, in `given` which of them
//! were given, in `values` what they come to, in `calibrated` what a calibration adds.

mod calibrated;
mod given;
mod values;

use clap::ArgAction;

use super::{DECODING, ONE_POLICY, POLICY, PRESETS, PRUNING, QUESTIONS, SCORES};
use crate::cli::named::named;
use hae::policy::{Amount, DapMode, Layers, Norm, Pooling, Queries};

pub use calibrated::Taken;

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
    #[arg(long, value_parser = named::<DapMode>(), value_name = "WHEN", help_heading = PRUNING)]
    dap_mode: Option<DapMode>,
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
    #[arg(long, value_parser = named::<Queries>(), value_name = "WHICH", help_heading = SCORES)]
    score_queries: Option<Queries>,
    /// How attention adds up. query: divided by the number of queries that could see the token. sum:
    /// plain sums, as in the paper [default: query]
    #[arg(long, value_parser = named::<Norm>(), value_name = "HOW", help_heading = SCORES)]
    score_norm: Option<Norm>,
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
    /// Tokens of an answer after which what was pruned for its question comes back
    ///
    /// A short answer ends before. A --kv-budget leaves no room for it, so nothing comes back then
    /// until the next question. [default: 12]
    #[arg(long, value_name = "N", help_heading = QUESTIONS)]
    recall_after: Option<usize>,
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
    #[arg(long, value_parser = named::<Pooling>(), value_name = "HOW", help_heading = ONE_POLICY)]
    snapkv_pooling: Option<Pooling>,
    /// random and random_visual: seed [default: 0]
    #[arg(long, value_name = "N", help_heading = ONE_POLICY)]
    kv_seed: Option<u64>,
    /// Start from these values: default, or paper (arXiv 2602.02197) [default: default]
    #[arg(long, value_name = "NAME", help_heading = PRESETS)]
    kv_preset: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::super::tests::defaults;
    use super::*;
    use hae::policy::{DapRule, PolicyOptions};

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
            recall_after,
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
            ("recall-after", Some(recall_after.to_string())),
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
}
