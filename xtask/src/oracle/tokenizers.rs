//! `cargo xtask oracle tokenizers`: `hae tokenize` and the vocabularies of llama.cpp's tests, each with texts
//! (`.gguf.inp`) and their tokens (`.gguf.out`).

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::FOLDER;
use crate::sdist::LLAMA_CPP;
use crate::serve::program::Program;

const NEEDED: [&str; 1] = ["models/ggml-vocab-"];
/// Between the texts of a file.
const BETWEEN: &str = "\n__ggml_vocab_test__\n";

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    program: Program,
    /// The package with the vocabularies, where it was fetched before
    #[arg(long, value_name = "FILE")]
    sdist: Option<PathBuf>,
    /// Vocabularies, such as phi-3, in the place of all
    names: Vec<String>,
}

/// 0: every text has its tokens. 1: others have not.
///
/// # Errors
/// Without the program or the package.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    let program = args.program.file(root)?;
    let folder = root.join(FOLDER);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let source = folder.join("vocabularies");
    let package = LLAMA_CPP.fetch(&folder, Path::new("python3"), args.sdist.as_deref())?;
    LLAMA_CPP.unpack(&package, &source, &NEEDED)?;
    let models = source.join("models");
    let mut files: Vec<PathBuf> = fs::read_dir(&models)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .collect();
    files.sort();
    println!("| vocabulary | texts as they should be | what is not |\n|---|---|---|");
    let (mut passed, mut all, mut n, mut wrong) = (0, 0, 0, false);
    for file in &files {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        let name = name.strip_prefix("ggml-vocab-").unwrap_or(&name);
        if !args.names.is_empty() && !args.names.iter().any(|wanted| wanted == name) {
            continue;
        }
        n += 1;
        let row = match cases(file)? {
            Some(cases) => {
                let failures = compare(&program, file, &cases);
                let good = cases.len() - failures.len();
                (passed, all) = (passed + good, all + cases.len());
                wrong |= !failures.is_empty();
                let first = failures.first().map_or("", |failure| failure);
                format!("{good} of {} | {first}", cases.len())
            }
            None => match tokens(&program, file, "Hello, y'all! 3333") {
                Ok(_) => "no tokens to compare with: it loads and tokenizes |".to_owned(),
                Err(reason) => {
                    wrong = true;
                    format!("0 | {reason}")
                }
            },
        };
        println!("| {name} | {row} |");
    }
    println!("\n{passed} of {all} texts, {n} vocabularies");
    ensure!(n > 0, "there is no such vocabulary");
    Ok(u8::from(wrong))
}

/// A text and its tokens.
type Case = (String, Vec<i64>);

/// The texts of a vocabulary, if it has some.
fn cases(file: &Path) -> Result<Option<Vec<Case>>> {
    let beside = |end: &str| PathBuf::from(format!("{}{end}", file.display()));
    let (texts, tokens) = (beside(".inp"), beside(".out"));
    if !texts.is_file() {
        return Ok(None);
    }
    let read = |path: &Path| fs::read_to_string(path).with_context(|| path.display().to_string());
    let found = paired(&read(&texts)?, &read(&tokens)?);
    found.with_context(|| texts.display().to_string()).map(Some)
}

fn paired(texts: &str, tokens: &str) -> Result<Vec<Case>> {
    let texts: Vec<&str> = texts.split(BETWEEN).collect();
    // The last text ends with one, too.
    let texts = match texts.split_last() {
        Some((&"", all)) => all,
        _ => &texts[..],
    };
    let numbers = |line: &str| line.split_whitespace().map(str::parse).collect();
    let tokens: Vec<Vec<i64>> = tokens.lines().map(numbers).collect::<Result<_, _>>()?;
    ensure!(
        texts.len() == tokens.len(),
        "{} texts and {} lines of tokens",
        texts.len(),
        tokens.len()
    );
    let texts = texts.iter().map(|text| (*text).to_owned());
    Ok(texts.zip(tokens).collect())
}

/// A line for each text with other tokens. A vocabulary is loaded anew for each, so several are at it.
fn compare(program: &Path, file: &Path, cases: &[Case]) -> Vec<String> {
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    let part = cases.len().div_ceil(2 * workers).max(1);
    std::thread::scope(|scope| {
        let parts = cases.chunks(part);
        let work = |cases| scope.spawn(move || differing(program, file, cases));
        let running: Vec<_> = parts.map(work).collect();
        let done = running.into_iter().map(|thread| thread.join());
        done.flat_map(|lines| lines.unwrap_or_else(|_| vec!["a thread panicked".into()]))
            .collect()
    })
}

fn differing(program: &Path, file: &Path, cases: &[Case]) -> Vec<String> {
    let line = |(text, expected): &Case| match tokens(program, file, text) {
        Ok(found) if found == *expected => None,
        Ok(found) => {
            let text = text.escape_debug();
            Some(format!("`{text}` is {found:?}, expected {expected:?}"))
        }
        Err(reason) => Some(reason.to_string()),
    };
    cases.iter().filter_map(line).collect()
}

fn tokens(program: &Path, file: &Path, text: &str) -> Result<Vec<i64>> {
    let mut child = Command::new(program)
        .args(["tokenize", "--ids", "--no-bos", "--no-parse-special"])
        .args(["--no-escape", "--stdin", "-m"])
        .arg(file)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| program.display().to_string())?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that has ended says why.
        let _ = stdin.write_all(text.as_bytes());
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        said.trim()
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_tokens_are_paired() {
        let texts = "a\n__ggml_vocab_test__\n\n\n__ggml_vocab_test__\n b \n__ggml_vocab_test__\n";
        let found = paired(texts, " 1 2\n 3\n\n").unwrap();
        let expected = [("a", vec![1, 2]), ("\n", vec![3]), (" b ", vec![])];
        assert_eq!(found, expected.map(|(text, ids)| (text.to_owned(), ids)));
        assert!(paired(texts, "1\n").is_err());
        assert!(paired("a", "x\n").is_err());
    }
}
