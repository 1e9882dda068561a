//! `hae replay`: policies on traces, without a model.

mod print;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Result, anyhow};

use super::lists::{numbers, values};
use super::named::named;
use super::options::PolicyArgs;
use super::{Done, note, warn};
use hae::Error;
use hae::eval::record;
use hae::policy::{Amount, OptionKey, PolicyOptions, PolicySpec};
use hae::replay::{Against, Contender, Conversation, compare, summarize, tapes, verify};
use hae::trace::{self, Cut, Reader};
use print::Format;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Traces that `hae run --trace` wrote
    #[arg(required = true, value_name = "TRACE")]
    traces: Vec<PathBuf>,
    /// Policies to replay, list: hae@0.4,h2o@512
    ///
    /// On traces of full, by name, with a budget behind @ if so wished. Without any, the policy that
    /// made a trace is held against its own decisions.
    #[arg(long, value_name = "LIST")]
    kv_policy: Vec<String>,
    /// Recycle bins to try, list: 1,8 or 1-128*2
    ///
    /// ddes and hae run with each of them, and without one (greedy). Numbers of cells, and spans of
    /// them.
    #[arg(long, value_name = "LIST", conflicts_with = "bin_size")]
    bin_sizes: Vec<String>,
    /// Greedy cells: peak, mean or live
    ///
    /// What the greedy policy is given to be compared with a bin of d cells. peak: as many cells at most. mean: d/2 fewer, which is as many on
    /// average. live: d fewer, as many as are live.
    #[arg(long, value_parser = named::<Against>(), hide_possible_values = true, default_value = "peak", value_name = "WHAT", requires = "bin_sizes")]
    against: Against,
    /// Take what there is of a trace that is cut off
    #[arg(long)]
    partial: bool,
    #[command(flatten)]
    policy: PolicyArgs,
    /// md, json or csv
    ///
    /// md is a table of means. json and csv have every trace by itself, too.
    #[arg(short, long, value_enum, hide_possible_values = true, default_value_t = Format::Md, value_name = "FORMAT", help_heading = "Output")]
    output: Format,
}

pub fn run(args: &Args) -> Result<Done> {
    let options = args.policy.options()?;
    let cut = match args.partial {
        true => Cut::Accept,
        false => Cut::Refuse,
    };
    if args.kv_policy.is_empty() {
        if options != PolicyOptions::default() || !args.bin_sizes.is_empty() {
            let reason = "is not given, expected a policy beside these flags";
            return Err(Error::option("--kv-policy", reason).into());
        }
        return check(args, cut);
    }
    let contenders = contenders(args, &options)?;
    let mut conversations = Vec::new();
    for path in &args.traces {
        let (header, tapes) = read(path, cut, |header, records| {
            let tapes = tapes(path, header, records)?;
            match tapes.is_empty() {
                true => Err(Error::file(path, "holds no whole prompt to replay")),
                false => Ok(tapes),
            }
        })?;
        let (header, many) = (Rc::new(header), tapes.len() > 1);
        for (i, tape) in tapes.into_iter().enumerate() {
            let name = path.display().to_string();
            conversations.push(Conversation {
                name: if many {
                    format!("{name}#{}", i + 1)
                } else {
                    name
                },
                header: Rc::clone(&header),
                tape: Rc::new(tape),
            });
        }
    }
    let start = Instant::now();
    let rows = compare(&contenders, &conversations)?;
    let seconds = start.elapsed().as_secs_f64();
    let steps: usize = rows.iter().map(|row| row.replayed.steps).sum();
    print::comparison(args.output, &rows, &summarize(&contenders, &rows))?;
    note(&format!(
        "replayed {steps} steps in {seconds:.2} s, {:.0} a second",
        steps as f64 / seconds.max(1e-9)
    ));
    Ok(Done::Whole)
}

/// What `f` makes of a trace. One whose run did not come to its end is named on stderr: in the line
/// that says what is wrong with it, if something is.
fn read<T>(
    path: &Path,
    cut: Cut,
    f: impl FnOnce(&trace::Header, &[trace::Record]) -> hae::Result<T>,
) -> Result<(trace::Header, T)> {
    const CUT_SHORT: &str = "the run did not come to its end";
    let mut reader = Reader::open(path, cut)?;
    let records = reader.rest()?;
    let header = reader.header().clone();
    match (f(&header, &records), reader.is_complete()) {
        (Ok(made), complete) => {
            if !complete {
                warn(&format!("{}: {CUT_SHORT}", path.display()));
            }
            Ok((header, made))
        }
        (Err(e), true) => Err(e.into()),
        (Err(e), false) => Err(anyhow!("{e}; {CUT_SHORT}")),
    }
}

/// Each trace's policy against its own decisions.
fn check(args: &Args, cut: Cut) -> Result<Done> {
    let mut checked = Vec::new();
    for path in &args.traces {
        let (header, verified) = read(path, cut, |header, records| {
            let verified = verify(path, header, records)?;
            let Some(difference) = &verified.difference else {
                return Ok(verified);
            };
            let policy = &header.policy;
            let reason = format!("{policy} decides otherwise now: {difference}");
            Err(Error::file(path, reason))
        })?;
        checked.push((path.display().to_string(), header, verified));
    }
    print::checked(args.output, &checked)?;
    Ok(Done::Whole)
}

/// `hae@0.4`
fn policy(text: &str) -> Result<(String, Option<Amount>), String> {
    let (name, budget) = match text.split_once('@') {
        Some((name, budget)) => (name, Some(budget.parse()?)),
        None => (text, None),
    };
    if !hae::policy::names().any(|known| known == name) {
        let known = hae::policy::names().collect::<Vec<_>>().join(", ");
        return Err(format!("expected one of {known}"));
    }
    Ok((name.to_owned(), budget))
}

fn contenders(args: &Args, options: &PolicyOptions) -> Result<Vec<Contender>> {
    let bins = match args.bin_sizes.is_empty() {
        true => Vec::new(),
        false => numbers("--bin-sizes", &args.bin_sizes, 1, 1 << 20)?,
    };
    let mut contenders: Vec<Contender> = Vec::new();
    let mut has_bin = false;
    let policies = values("--kv-policy", &args.kv_policy, policy)?;
    let names: Vec<&str> = policies.iter().map(|(name, _)| name.as_str()).collect();
    args.policy.refuse_unread(&names, false)?;
    for (policy, budget) in policies {
        let mut options = options.clone();
        options.kv_budget = budget.or(options.kv_budget);
        let name = record::Contender::name_of(&policy, budget);
        let binned = hae::policy::reads(&policy, OptionKey::BinSize);
        let policy = PolicySpec::new(&policy, options);
        has_bin |= binned;
        if !binned || bins.is_empty() {
            contenders.push(Contender {
                name,
                bin_size: binned.then_some(policy.options.bin_size),
                policy,
                against: None,
            });
            continue;
        }
        contenders.push(Contender {
            name: format!("{name} greedy"),
            policy: Contender::greedy(&policy),
            bin_size: Some(1),
            against: None,
        });
        for &bin in &bins {
            let bin_size = bin as usize;
            let mut policy = policy.clone();
            policy.options.bin_size = bin_size;
            contenders.push(Contender {
                name: format!("{name} bin {bin}"),
                policy,
                bin_size: Some(bin_size),
                against: Some(args.against),
            });
        }
    }
    if !bins.is_empty() && !has_bin {
        let reason = "no policy with a recycle bin is given, expected hae or ddes";
        return Err(Error::option("--bin-sizes", reason).into());
    }
    Ok(contenders)
}
