//! Which flags of the policies were given, and whether any policy reads them.

use super::PolicyArgs;
use hae::policy::{self, OptionKey, PolicyOptions};

impl PolicyArgs {
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
            recall_after,
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
            (recall_after.is_some(), OptionKey::RecallAfter),
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
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command, Parser};

    use super::*;
    use crate::cli::spell::spelled;

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
}
