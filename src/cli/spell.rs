//! The library names an option by its key, between backticks. Here it becomes the flag that users
//! type.

use clap::CommandFactory;

/// Keys whose flag is another word: llama.cpp's short ones, which its users know.
const SHORT: [(&str, &str); 11] = [
    ("n_ctx", "-c"),
    ("n_batch", "-b"),
    ("n_ubatch", "-ub"),
    ("n_threads", "-t"),
    ("n_predict", "-n"),
    ("type_k", "-ctk"),
    ("type_v", "-ctv"),
    ("flash_attention", "-fa"),
    ("model", "-m"),
    ("prompt_text", "-p"),
    ("system_prompt", "-sys"),
];

/// The flag of a key, if there is one.
pub fn flag(key: &str) -> Option<String> {
    if let Some((_, flag)) = SHORT.iter().find(|(known, _)| *known == key) {
        return Some((*flag).to_owned());
    }
    let long = key.replace('_', "-");
    let program = crate::Cli::command();
    let known = program.get_subcommands().any(|command| {
        let mut arguments = command.get_arguments();
        arguments.any(|argument| argument.get_long() == Some(&*long))
    });
    known.then(|| format!("--{long}"))
}

/// A message with flags in the place of keys.
pub fn spelled(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut parts = text.split('`');
    out.extend(parts.next());
    let mut inside = true;
    while let Some(part) = parts.next() {
        match inside.then(|| flag(part)).flatten() {
            Some(flag) => {
                out.push_str(&flag);
                out.extend(parts.next());
            }
            None => {
                out.push('`');
                out.push_str(part);
                inside = !inside;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_flags_and_other_words_stay() {
        for (text, expected) in [
            ("`dap_keep`: 0 cells", "--dap-keep: 0 cells"),
            ("give `n_ctx` or `n_ubatch`, `x`", "give -c or -ub, `x`"),
            ("`` `kv_budget`", "`` --kv-budget"),
            ("a `file` of `none", "a --file of `none"),
            ("no key", "no key"),
        ] {
            assert_eq!(spelled(text), expected, "{text}");
        }
    }

    /// A short flag is one that a command takes.
    #[test]
    fn every_short_flag_is_known() {
        let mut program = crate::Cli::command();
        program.build();
        let help = |command: &clap::Command| {
            let arguments = command.get_arguments().cloned();
            let texts =
                arguments.map(|a| format!("{a} {:?} {:?}", a.get_short(), a.get_all_aliases()));
            texts.collect::<Vec<_>>().join("\n")
        };
        let all: String = program.get_subcommands().map(help).collect();
        for (key, flag) in SHORT {
            let name = flag.trim_start_matches('-');
            let known = match name.len() {
                1 => all.contains(&format!("Some('{name}')")),
                _ => all.contains(&format!("\"{name}\"")),
            };
            assert!(known, "{key}: {flag}");
        }
    }
}
