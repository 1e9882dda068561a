use clap::{Args, Command};

use super::{AttendArgs, PolicyArgs};

/// What the help of each flag says of its default, and `None` where it says nothing.
pub fn defaults(command: &Command) -> Vec<(&str, Option<String>)> {
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
