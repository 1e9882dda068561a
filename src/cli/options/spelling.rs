//! The command line as users of llama.cpp type it: options with one dash and several letters, and
//! those that are not here, each answered with what to do instead.

use std::ffi::OsString;

use clap::{Arg, Command};

use hae::Error;

/// llama.cpp spells some options with one dash and several letters, which clap would read as
/// several short options. They are rewritten to the long names given here.
const ONE_DASH: [(&str, &str); 10] = [
    ("-ngl", "--gpu-layers"),
    ("-fa", "--flash-attn"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-ub", "--ubatch-size"),
    ("-tb", "--threads-batch"),
    ("-sys", "--system-prompt"),
    ("-mm", "--mmproj"),
    ("-no-cnv", "--no-conversation"),
    ("-pg", "--pg"),
];

/// llama.cpp's options that no command has, or not every one, and what to do instead.
const ELSEWHERE: [(&[&str], &str); 19] = [
    (
        &[
            "-hf",
            "-hfr",
            "--hf-repo",
            "-hff",
            "--hf-file",
            "-mu",
            "--model-url",
            "-mmu",
            "--mmproj-url",
            "-dr",
            "--docker-repo",
        ],
        "nothing is downloaded: fetch the model and its mmproj, and give them with -m and --mmproj",
    ),
    (
        &["--jinja", "--no-jinja"],
        "no Jinja is run, the model's template is told by llama.cpp's list of them: leave it out, or name one with --chat-template",
    ),
    (
        &["--chat-template-file"],
        "give the template's name, or its text, with --chat-template",
    ),
    (
        &[
            "-cnv",
            "--conversation",
            "-i",
            "--interactive",
            "-if",
            "--interactive-first",
        ],
        "without -p it is a chat: leave it out",
    ),
    (
        &["-st", "--single-turn"],
        "with -p it ends after one answer: leave it out",
    ),
    (
        &["--mmap", "-lm", "--load-mode", "-dio", "--direct-io"],
        "the model is mapped where it can be: leave it out, or give --no-mmap or --mlock",
    ),
    (
        &["-sysf", "--system-prompt-file"],
        "give the text itself, as in -sys \"$(cat FILE)\"",
    ),
    (&["-bf", "--binary-file"], "give a file of text with -f"),
    (
        &[
            "--prompt-cache",
            "--prompt-cache-all",
            "--prompt-cache-ro",
            "--slot-save-path",
        ],
        "keep a conversation with --session FILE",
    ),
    (
        &["--context-shift", "--no-context-shift", "--keep"],
        "take --kv-policy context_shift, with --sinks for what is kept; the default shifts nothing",
    ),
    (
        &[
            "-dev",
            "--device",
            "-sm",
            "--split-mode",
            "-ts",
            "--tensor-split",
            "-mg",
            "--main-gpu",
            "-ot",
            "--override-tensor",
            "-cmoe",
            "--cpu-moe",
            "-ncmoe",
            "--n-cpu-moe",
            "-nkvo",
            "--no-kv-offload",
        ],
        "is not there: -ngl says how many layers go to the GPU, with their part of the cache",
    ),
    (
        &["--no-mmproj", "--no-mmproj-offload", "--mmproj-offload"],
        "is not there: leave --mmproj out for text alone, -ngl 0 keeps all off the GPU",
    ),
    (
        &["--image-min-tokens", "--image-max-tokens"],
        "is not there: --num-crops says how finely Phi-3.5-vision's pictures are cut",
    ),
    (
        &["--audio", "--video"],
        "only pictures are shown, with --image",
    ),
    (
        &[
            "--lora",
            "--lora-scaled",
            "--control-vector",
            "--control-vector-scaled",
        ],
        "adapters are not applied: merge it into the model",
    ),
    (
        &[
            "--presence-penalty",
            "--frequency-penalty",
            "--typical",
            "--typical-p",
            "--top-n-sigma",
            "--top-nsigma",
            "--xtc-probability",
            "--xtc-threshold",
            "--dynatemp-range",
            "--dynatemp-exp",
            "--dry-multiplier",
            "--dry-base",
            "--dry-allowed-length",
            "--mirostat",
            "--mirostat-lr",
            "--mirostat-ent",
            "--samplers",
            "--sampler-seq",
            "--sampling-seq",
            "-l",
            "--logit-bias",
            "--ignore-eos",
            "--grammar",
            "--grammar-file",
            "-j",
            "--json-schema",
        ],
        "is not there: --temp, --top-k, --top-p, --min-p, --repeat-penalty and --repeat-last-n choose the tokens",
    ),
    (
        &[
            "-C",
            "--cpu-mask",
            "-Cr",
            "--cpu-range",
            "--cpu-strict",
            "--prio",
            "--numa",
            "-Cb",
            "--cpu-mask-batch",
        ],
        "is not there: choose cores and priority from outside, with taskset, numactl or nice",
    ),
    (
        &[
            "-lv",
            "--verbosity",
            "--log-verbosity",
            "--log-file",
            "--verbose-prompt",
        ],
        "-v shows llama.cpp's log on stderr",
    ),
    (
        &[
            "--color",
            "-co",
            "--simple-io",
            "--no-display-prompt",
            "--display-prompt",
            "--warmup",
            "--no-warmup",
            "--log-disable",
            "--log-colors",
            "--perf",
            "--no-perf",
            "--show-timings",
            "--no-show-timings",
            "-np",
            "--parallel",
            "--multiline-input",
            "-mli",
        ],
        "changes nothing here: leave it out",
    ),
];

/// The command line with llama.cpp's one-dash options spelled as long ones, up to a `--`. Values
/// stay what they are, whatever they look like. `program`: what clap knows.
///
/// # Errors
/// [`Error::Option`] for an option of llama.cpp's that the command does not have, with what to do.
pub fn llama_spelling(
    args: impl Iterator<Item = OsString>,
    mut program: Command,
) -> Result<Vec<OsString>, Error> {
    program.build();
    let mut args = args.peekable();
    let mut out: Vec<OsString> = args.next().into_iter().collect();
    let name = args.peek().and_then(|name| name.to_str());
    let Some(command) = name.and_then(|name| program.find_subcommand(name)) else {
        out.extend(args);
        return Ok(out);
    };
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
        let long = ONE_DASH.iter().find(|(short, _)| *short == flag);
        let flag = long.map_or(flag, |(_, long)| *long);
        match (long, value) {
            (Some((_, long)), Some(value)) => out.push(format!("{long}={value}").into()),
            (Some((_, long)), None) => out.push((*long).into()),
            (None, _) => {
                if let Some((name, answer)) = elsewhere(flag, command) {
                    return Err(Error::option(name, answer));
                }
                out.push(arg.clone());
            }
        }
        if value.is_none() && takes_any(flag, command) {
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
    ELSEWHERE.iter().find_map(|(flags, answer)| {
        let name = flags.iter().find(|&&name| name == flag)?;
        (!command.get_arguments().any(has)).then_some((*name, *answer))
    })
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
        let spelled = llama_spelling(args, program())?;
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
            for value in ["-ngl=99 means what?", "-sys", "-fa", "-hf", "--jinja", "--"] {
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
            (&["-hf", "x/y"][..], "-hf: nothing is downloaded"),
            (&["--hf-repo=x/y"], "--hf-repo: nothing is downloaded"),
            (&["--jinja", "-p", "hi"], "--jinja: no Jinja is run"),
            (&["-m", "a", "-cnv"], "-cnv: without -p it is a chat"),
        ] {
            let error = spelled(&[&["hae", "run"], args].concat()).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
        }
        // What the command has is its own.
        let args = ["hae", "run", "--mlock", "-v"];
        assert_eq!(spelled(&args).unwrap(), args);
        // Other programs' words, and none.
        for args in [&["hae"][..], &["hae", "-V"], &["hae", "what", "-hf"]] {
            assert_eq!(spelled(args).unwrap(), args);
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
