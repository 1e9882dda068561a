//! The command line as users of llama.cpp type it: options with one dash and several letters, and
//! those that are not here, each answered with what to do instead.

use std::ffi::OsString;

use clap::{Arg, Command};

use super::elsewhere::{ELSEWHERE, of_a_family};
use hae::Error;

/// llama.cpp spells some options with one dash and several letters, which clap would read as
/// several short options. They are rewritten to the long names given here.
const ONE_DASH: [(&str, &str); 32] = [
    ("-ngl", "--gpu-layers"),
    ("-fa", "--flash-attn"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-ub", "--ubatch-size"),
    ("-tb", "--threads-batch"),
    ("-sys", "--system-prompt"),
    ("-jf", "--json-schema-file"),
    ("-mm", "--mmproj"),
    ("-hf", "--hf-repo"),
    ("-hfr", "--hf-repo"),
    ("-hff", "--hf-file"),
    ("-hft", "--hf-token"),
    ("-fit", "--fit"),
    ("-fitt", "--fit-target"),
    ("-fitc", "--fit-ctx"),
    ("-dev", "--device"),
    ("-sm", "--split-mode"),
    ("-mg", "--main-gpu"),
    ("-ts", "--tensor-split"),
    ("-ot", "--override-tensor"),
    ("-cmoe", "--cpu-moe"),
    ("-ncmoe", "--n-cpu-moe"),
    ("-ncffn", "--n-cpu-ffn"),
    ("-nkvo", "--no-kv-offload"),
    ("-np", "--parallel"),
    ("-no-cnv", "--no-conversation"),
    ("-pg", "--pg"),
    ("-to", "--timeout"),
    ("-cb", "--cont-batching"),
    ("-kvu", "--kv-unified"),
    ("--usage", "--help"),
];

/// The command line with llama.cpp's one-dash options spelled as long ones, up to a `--`. Values
/// stay what they are, whatever they look like. `program`: what clap knows.
///
/// # Errors
/// [`Error::Option`] for an option of llama.cpp's that the command does not have, with what to do.
pub fn llama_spelling(
    args: impl Iterator<Item = OsString>,
    program: &Command,
) -> Result<Vec<OsString>, Error> {
    let mut args = args.peekable();
    let mut out: Vec<OsString> = args.next().into_iter().collect();
    let name = args.peek().and_then(|name| name.to_str());
    let own = |name: &str| ["-h", "--help", "-V", "--version", "-", "--"].contains(&name);
    if name.is_some_and(|name| name.starts_with('-') && !own(name)) {
        let reason = "is missing, expected one before the flags, as in hae run -p hello";
        return Err(Error::option("a command", reason));
    }
    let Some(mut command) = name.and_then(|name| program.find_subcommand(name).cloned()) else {
        out.extend(args);
        return Ok(out);
    };
    command.build();
    out.extend(args.next());
    while let Some(arg) = args.next() {
        if arg == "--" {
            out.push(arg);
            break;
        }
        let Some(text) = arg.to_str() else {
            out.push(arg);
            continue;
        };
        let (flag, value) = match text.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (text, None),
        };
        // As llama.cpp reads them: --n_predict is --n-predict.
        let dashed = flag.replace('_', "-");
        let respelled = flag.starts_with("--") && dashed != flag;
        let flag = if respelled { &*dashed } else { flag };
        let long = ONE_DASH.iter().find(|(short, _)| *short == flag);
        let flag = long.map_or(flag, |(_, long)| *long);
        // One that this command does not have, whatever it is called.
        if let Some((name, answer)) = elsewhere(flag, &command) {
            return Err(Error::option(name, answer));
        }
        match (long, value) {
            (Some((_, long)), Some(value)) => out.push(format!("{long}={value}").into()),
            (Some((_, long)), None) => out.push((*long).into()),
            (None, _) => out.push(match (respelled, value) {
                (false, _) => arg.clone(),
                (true, Some(value)) => format!("{flag}={value}").into(),
                (true, None) => flag.into(),
            }),
        }
        if value.is_none() && takes_any(flag, &command) {
            out.extend(args.next());
        }
    }
    out.extend(args);
    Ok(out)
}

/// What to do instead of a flag that `command` does not have.
fn elsewhere(flag: &str, command: &Command) -> Option<(&'static str, &'static str)> {
    let has = |arg: &Arg| match (flag.strip_prefix("--"), flag.strip_prefix('-')) {
        (Some(long), _) => names(arg).any(|name| name == long),
        (None, Some(short)) => arg.get_short().is_some_and(|c| short == c.to_string()),
        _ => false,
    };
    let listed = ELSEWHERE.iter().find_map(|(flags, answer)| {
        let name = flags.iter().find(|&&name| name == flag)?;
        Some((*name, *answer))
    });
    let answer = listed.or_else(|| of_a_family(flag))?;
    (!command.get_arguments().any(has)).then_some(answer)
}

fn names(arg: &Arg) -> impl Iterator<Item = &str> {
    let aliases = arg.get_all_aliases().unwrap_or_default();
    arg.get_long().into_iter().chain(aliases)
}

/// Whether what follows a flag is its value even if it begins with a dash.
fn takes_any(flag: &str, command: &Command) -> bool {
    let mut arguments = command.get_arguments();
    let arg = match flag.strip_prefix("--") {
        Some(long) => arguments.find(|arg| names(arg).any(|name| name == long)),
        // Of several short ones in one word the last may have its value in the next.
        None => {
            let mut letters = flag.strip_prefix('-').unwrap_or_default().chars();
            let mut known = None;
            for c in letters.by_ref() {
                let of = |arg: &&Arg| arg.get_short() == Some(c);
                known = command.get_arguments().find(of);
                match known {
                    Some(arg) if !arg.get_action().takes_values() => {}
                    _ => break,
                }
            }
            known.filter(|_| letters.next().is_none())
        }
    };
    arg.is_some_and(|arg| arg.get_action().takes_values() && arg.is_allow_hyphen_values_set())
}

#[cfg(test)]
mod tests {
    use clap::ArgAction;

    use super::*;

    fn program() -> Command {
        let flag = |name: &'static str| Arg::new(name).long(name);
        let run = Command::new("run").args([
            flag("prompt").short('p').allow_hyphen_values(true),
            flag("system-prompt").alias("sys").allow_hyphen_values(true),
            flag("model").short('m'),
            flag("verbose").short('v').action(ArgAction::SetTrue),
            flag("mlock").action(ArgAction::SetTrue),
        ]);
        Command::new("hae").subcommand(run)
    }

    fn spelled(args: &[&str]) -> Result<Vec<String>, Error> {
        let args = args.iter().map(|&arg| arg.into());
        let spelled = llama_spelling(args, &program())?;
        Ok(spelled
            .into_iter()
            .map(|arg| arg.into_string().unwrap())
            .collect())
    }

    #[test]
    fn one_dash_options_become_long_ones() {
        let args = ["hae", "run", "-ngl", "9", "-ctk=f32", "-fa", "--", "-fa"];
        let expected = [
            "hae",
            "run",
            "--gpu-layers",
            "9",
            "--cache-type-k=f32",
            "--flash-attn",
            "--",
            "-fa",
        ];
        assert_eq!(spelled(&args).unwrap(), expected);
    }

    #[test]
    fn values_stay_what_they_are() {
        for flag in ["-p", "--prompt", "-vp", "--system-prompt", "--sys"] {
            for value in [
                "-ngl=99 means what?",
                "-sys",
                "-fa",
                "-hf",
                "--chatml",
                "--",
            ] {
                let args = ["hae", "run", flag, value, "-ngl", "1"];
                let expected = ["hae", "run", flag, value, "--gpu-layers", "1"];
                assert_eq!(spelled(&args).unwrap(), expected);
            }
        }
        let args = ["hae", "run", "-sys", "-fa", "-p=-fa", "-fa"];
        let expected = [
            "hae",
            "run",
            "--system-prompt",
            "-fa",
            "-p=-fa",
            "--flash-attn",
        ];
        assert_eq!(spelled(&args).unwrap(), expected);
        // A value that is attached, and a flag that takes no text.
        let args = ["hae", "run", "-pv", "-fa", "-m", "-fa"];
        let expected = ["hae", "run", "-pv", "--flash-attn", "-m", "--flash-attn"];
        assert_eq!(spelled(&args).unwrap(), expected);
    }

    #[test]
    fn options_of_llama_cpp_that_are_not_here_are_answered() {
        for (args, expected) in [
            (&["-mu", "x/y"][..], "-mu: is not there: give"),
            (&["--docker-repo=x/y"], "--docker-repo: is not there"),
            (
                &["--chatml", "-p", "hi"],
                "--chatml: give the template's name",
            ),
            (&["-m", "a", "-cnv"], "-cnv: without -p it is a chat"),
        ] {
            let error = spelled(&[&["hae", "run"], args].concat()).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
        }
        // What the command has is its own.
        let args = ["hae", "run", "--mlock", "-v"];
        assert_eq!(spelled(&args).unwrap(), args);
        // Underscores are dashes in llama.cpp's long options, not in values and short ones.
        let args = [
            "hae",
            "run",
            "--system_prompt",
            "a_b",
            "--model=a_b",
            "--m_lock",
            "-a_b",
        ];
        let expected = [
            "hae",
            "run",
            "--system-prompt",
            "a_b",
            "--model=a_b",
            "--m-lock",
            "-a_b",
        ];
        assert_eq!(spelled(&args).unwrap(), expected);
        let error = spelled(&["hae", "run", "--model_url=x/y"]).unwrap_err();
        assert!(
            error.to_string().starts_with("--model-url: is not there"),
            "{error}"
        );
        // Flags without a command, as llama-cli takes them.
        let error = spelled(&["hae", "-m", "a.gguf", "-p", "hi"]).unwrap_err();
        assert!(
            error.to_string().starts_with("a command: is missing"),
            "{error}"
        );
        // Other programs' words, and none.
        for args in [&["hae"][..], &["hae", "-V"], &["hae", "what", "-hf"]] {
            assert_eq!(spelled(args).unwrap(), args);
        }
    }

    /// The options of llama.cpp's programs for one prompt or a chat, from its own table.
    fn options_of_llama_cpp() -> Vec<String> {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let table = root.join("vendor/llama-cpp-sys-2/llama.cpp/common/arg.cpp");
        let table = std::fs::read_to_string(table).unwrap();
        let name = regex::Regex::new(r#""(--?[A-Za-z][A-Za-z0-9-]*)""#).unwrap();
        let examples = regex::Regex::new(r"set_examples\(\{([^}]*)\}").unwrap();
        let mut all = Vec::new();
        for option in table.split("add_opt(common_arg(").skip(1) {
            let programs = examples.captures(option);
            let programs = programs.map_or("EXAMPLE_COMMON".into(), |c| c[1].to_owned());
            let ours = ["_COMMON", "_CLI", "_MTMD", "_COMPLETION"];
            if !ours.iter().any(|program| programs.contains(program)) {
                continue;
            }
            // Names first, in braces; in braces of their own those that say no.
            let mut rest = option.trim_start();
            while let Some((names, behind)) = rest.strip_prefix('{').and_then(|r| r.split_once('}'))
            {
                all.extend(name.captures_iter(names).map(|c| c[1].to_owned()));
                rest = behind.trim_start_matches([',', ' ', '\n']);
            }
        }
        all
    }

    /// Each works, or one line says what to do.
    #[test]
    fn every_option_of_llama_cpp_is_answered() {
        use clap::CommandFactory;

        let program = crate::help::in_two_sizes(crate::Cli::command());
        let all = options_of_llama_cpp();
        assert!(all.len() > 200, "{}", all.len());
        for option in all {
            let args = ["hae", "run", &option].map(Into::into);
            let Ok(args) = llama_spelling(args.into_iter(), &program) else {
                continue;
            };
            let args: Vec<_> = args
                .into_iter()
                .map(|arg| arg.into_string().unwrap())
                .collect();
            let run = program.find_subcommand("run").unwrap();
            let known = run.get_arguments().any(|arg| {
                let long = args[2].strip_prefix("--");
                let short = args[2].strip_prefix('-').filter(|_| long.is_none());
                long.is_some_and(|long| names(arg).any(|name| name == long))
                    || short.is_some_and(|short| {
                        arg.get_short().is_some_and(|c| short == c.to_string())
                    })
            });
            assert!(known, "{option} is neither a flag nor answered");
        }
    }

    #[test]
    fn no_option_is_answered_twice() {
        let mut all: Vec<&str> = ELSEWHERE
            .iter()
            .flat_map(|(flags, _)| *flags)
            .copied()
            .collect();
        all.extend(ONE_DASH.map(|(short, _)| short));
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), n);
    }
}
