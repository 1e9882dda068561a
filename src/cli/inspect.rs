//! `hae inspect`: what a file is and what it says of itself.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Done;
use super::table::Columns;
use hae::clean::{clean, clean_json};
use hae::inspect::{Entry, Inspected, OfType, Tensor, inspect};

/// Elements of an array that are shown.
const SHOWN: usize = 4;
/// The same of JSON.
const IN_JSON: usize = 32;
/// Characters of a text that are shown.
const WIDE: usize = 60;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Nothing is loaded. A model that cannot be run is shown all the same, and why it cannot."
)]
pub struct Args {
    /// GGUF, safetensors or checkpoint, questions, or a file that hae wrote
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<Done> {
    let most = if args.json { IN_JSON } else { SHOWN };
    let mut found = inspect(&args.file, most)?;
    let mut out = std::io::stdout().lock();
    if !args.json {
        // Before llama.cpp is asked, which may assert on what a file says.
        print(&mut out, &found).context("stdout")?;
        out.flush().context("stdout")?;
    }
    found.measure();
    match args.json {
        true => writeln!(
            out,
            "{}",
            clean_json(&serde_json::to_string_pretty(&found)?)
        ),
        false => print_measured(&mut out, &found),
    }
    .context("stdout")?;
    Ok(Done::Whole)
}

fn print(out: &mut impl Write, found: &Inspected) -> std::io::Result<()> {
    let file = clean(&found.file.display().to_string());
    writeln!(out, "{file}: {}, {} bytes", found.kind.name(), found.bytes)?;
    for (name, value) in &found.facts {
        writeln!(out, "{name}: {}", short(value, None))?;
    }
    if !found.metadata.is_empty() {
        let all = &found.metadata;
        let mut columns = Columns::default();
        columns.add("metadata", false, all, |entry| clean(&entry.key));
        columns.add("type", false, all, of_entry);
        columns.add("value", false, all, |entry| short(&entry.value, entry.len));
        writeln!(out, "\n{}", columns.table())?;
    }
    if !found.types.is_empty() {
        let all = &found.types;
        let mut columns = Columns::default();
        columns.add("type", false, all, |of| of.kind.clone());
        columns.add("tensors", true, all, |of| of.tensors.to_string());
        columns.add("values", true, all, |of| of.values.to_string());
        columns.add("bytes", true, all, |of| of.bytes.to_string());
        columns.add("bits a value", true, all, bits);
        writeln!(out, "\n{}", columns.table())?;
        let all = &found.tensors;
        let mut columns = Columns::default();
        columns.add("tensor", false, all, |tensor| clean(&tensor.name));
        columns.add("type", false, all, |tensor| tensor.kind.clone());
        columns.add("shape", true, all, shape);
        columns.add("bytes", true, all, |tensor| tensor.bytes.to_string());
        writeln!(out, "\n{}", columns.table())?;
    }
    Ok(())
}

/// What was measured.
fn print_measured(out: &mut impl Write, found: &Inspected) -> std::io::Result<()> {
    if !found.kv.is_empty() {
        writeln!(out, "\nBytes of a token in the KV cache, all layers:\n")?;
        let mut columns = Columns::default();
        columns.add("K and V", false, &found.kv, |kv| kv.kind.name().to_owned());
        columns.add("bytes", true, &found.kv, |kv| {
            kv.bytes_per_token.to_string()
        });
        columns.add("beside them", true, &found.kv, |kv| match kv.bytes_beside {
            0 => String::new(),
            n => n.to_string(),
        });
        writeln!(out, "{}", columns.table())?;
    }
    if let Some(obstacle) = &found.obstacle {
        let obstacle = super::spell::spelled(obstacle);
        writeln!(out, "\nIt cannot be run here: {}", clean(&obstacle))?;
    }
    Ok(())
}

fn of_entry(entry: &Entry) -> String {
    match entry.len {
        Some(n) => format!("{}[{n}]", entry.kind),
        None => entry.kind.clone(),
    }
}

fn bits(of: &OfType) -> String {
    format!("{:.2}", 8.0 * of.bytes as f64 / of.values.max(1) as f64)
}

fn shape(tensor: &Tensor) -> String {
    let sides: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
    sides.join(" x ")
}

/// A value in a line, cut where it is long; `len`: elements that an array has in the file.
fn short(value: &Value, len: Option<usize>) -> String {
    let text = match value {
        Value::String(text) => clean(text),
        Value::Array(all) => {
            let mut shown: Vec<String> = all.iter().map(|one| short(one, None)).collect();
            if len.is_some_and(|n| n > all.len()) {
                shown.push("…".into());
            }
            return format!("[{}]", shown.join(", "));
        }
        Value::Null => "no number".into(),
        other => clean(&other.to_string()),
    };
    match text.char_indices().nth(WIDE) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
