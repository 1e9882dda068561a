//! Help in two sizes. `-h` and `--help` show the flags that people need, one line each. `hae help
//! COMMAND` shows all of them, and `hae help policies` what leaves the cache, with every flag that
//! tunes it. All are made from the same definitions.

use anyhow::{Context, Result};
use clap::builder::StyledStr;
use clap::{Arg, ArgAction, Args, Command};

use super::options::{POLICY, TUNING};
use super::{Done, run};

const OUTPUT: &str = "Output";

/// What each policy does, in the order of [`hae::policy::names`].
const POLICIES: [(&str, &str); 13] = [
    ("full", "Keep everything, as llama.cpp does"),
    (
        "hae",
        "Drop visual tokens. With --kv-budget, evict while decoding",
    ),
    ("dap", "Only the first half of hae: drop visual tokens"),
    ("ddes", "Only the second: evict through a recycle bin"),
    ("random", "Evict any token, by lot"),
    ("random_visual", "Evict visual tokens first, by lot"),
    (
        "streaming_llm",
        "Evict the oldest token behind the first ones",
    ),
    (
        "context_shift",
        "Drop the older half when the context is full, as llama.cpp can",
    ),
    ("h2o", "Evict the token with the least attention so far"),
    ("tova", "Evict the token that the newest one looks at least"),
    ("snapkv", "Keep what the last rows of the prompt look at"),
    (
        "fastv",
        "Keep the visual tokens that the prompt's last token looks at",
    ),
    (
        "mustdrop",
        "Keep the visual tokens that the prompt's text looks at",
    ),
];

/// The commands with help in two sizes.
pub fn in_two_sizes(program: Command) -> Command {
    program
        .mut_subcommands(two_sizes)
        .mut_subcommand("policies", |command| {
            // Only when it is asked for: it takes as long to write as all flags to read.
            command.defer(|command| command.override_help(policies()))
        })
}

fn two_sizes(command: Command) -> Command {
    // Beside -v and -o, where flags stand under headings.
    let headed = |arg: &Arg| arg.get_help_heading().is_some();
    let heading = command.get_arguments().any(headed).then_some(OUTPUT);
    let help = Arg::new("help")
        .short('h')
        .long("help")
        .action(ArgAction::HelpShort)
        .help("Show this")
        .help_heading(heading);
    let command = command.disable_help_flag(true).arg(help).mut_args(|arg| {
        let tunes = arg.get_help_heading().is_some_and(|h| TUNING.contains(&h));
        match tunes {
            true => arg.hide_short_help(true),
            false => arg,
        }
    });
    if !command.get_arguments().any(Arg::is_hide_short_help_set) {
        return command;
    }
    let own = match command.get_after_help() {
        Some(text) => format!("{text}\n\n"),
        None => String::new(),
    };
    let tuned = "Policies and their flags: hae help policies";
    let name = command.get_name().to_owned();
    command
        .after_help(format!("{own}Every flag: hae help {name}. {tuned}"))
        .after_long_help(format!("{own}{tuned}"))
}

/// Every policy in a line, and every flag of `hae run` that tunes one.
fn policies() -> StyledStr {
    let names = POLICIES.map(|(name, does)| format!("  {name:<13}  {does}\n"));
    let before = format!(
        "What leaves the KV cache: hae run --kv-policy NAME\n\n{}\n\
         A policy reads those flags below that it has. docs/policies.md says more.",
        names.concat()
    );
    let run = run::Args::augment_args(Command::new("run"));
    run.mut_args(|arg| {
        let heading = arg.get_help_heading().unwrap_or_default();
        let shown = heading == POLICY || TUNING.contains(&heading);
        match arg.get_long_help().map(one_paragraph) {
            Some(long) => arg.help(long),
            None => arg,
        }
        .hide(!shown)
        .hide_short_help(false)
    })
    .disable_help_flag(true)
    .before_help(before)
    .help_template("{before-help}{all-args}")
    .render_help()
}

/// A text of several paragraphs as one, with the default at its end and no full stop there, as clap
/// writes short ones.
fn one_paragraph(text: &StyledStr) -> String {
    let (mut sentences, mut default) = (Vec::new(), String::new());
    for paragraph in text.to_string().split("\n\n") {
        let words: Vec<&str> = paragraph.split_whitespace().collect();
        let paragraph = words.join(" ");
        let (text, end) = match paragraph.find("[default: ") {
            Some(at) => paragraph.split_at(at),
            None => (&*paragraph, ""),
        };
        sentences.push(text.trim_end_matches(['.', ' ']).to_owned());
        default += end;
    }
    sentences.retain(|sentence| !sentence.is_empty());
    let sentences = sentences.join(". ");
    format!("{sentences} {default}").trim_end().to_owned()
}

/// `hae policies`; `program`: that of [`in_two_sizes`].
pub fn print_policies(program: &mut Command) -> Result<Done> {
    if let Some(command) = program.find_subcommand_mut("policies") {
        command.print_help().context("stdout")?;
    }
    Ok(Done::Whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_become_one() {
        for (text, one) in [
            ("A\n\nB.\nC.", "A. B. C"),
            ("A [default: 1]\n\nB c.", "A. B c [default: 1]"),
            ("A\n\nB. [default: x\ny]", "A. B [default: x y]"),
            ("A\n\n[default: 2]", "A [default: 2]"),
        ] {
            assert_eq!(one_paragraph(&StyledStr::from(text)), one);
        }
    }

    #[test]
    fn every_policy_has_its_line() {
        let lines = POLICIES.map(|(name, _)| name);
        assert_eq!(lines.to_vec(), hae::policy::names().collect::<Vec<_>>());
        for (name, does) in POLICIES {
            assert!(does.len() <= 63, "{name} does not fit 80 columns");
        }
    }
}
