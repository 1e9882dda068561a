//! `hae tokenize`: the tokens of a text, as llama-tokenize prints them.

use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

use super::Done;
use super::inputs::unescaped;
use super::load::Files;
use hae::clean::{clean, clean_json};
use hae::engine::Token;
use hae::llama::{Model, ModelOptions};
use hae::{Error, text};

#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "Without -p and -f the text is standard input. Only the vocabulary is loaded: files that hold nothing else serve, too."
)]
pub struct Args {
    /// GGUF with the vocabulary [default: the model in this program]
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// The text
    #[arg(short, long, value_name = "TEXT", conflicts_with_all = ["file", "stdin"])]
    prompt: Option<String>,
    /// File with the text, every byte of it
    #[arg(short, long, value_name = "FILE", conflicts_with = "stdin")]
    file: Option<PathBuf>,
    /// Take the text from standard input, as without -p and -f
    #[arg(long)]
    stdin: bool,
    /// Print the tokens' numbers alone, as a list that Python reads
    #[arg(long)]
    ids: bool,
    /// Put no token before the text where the model would have one
    #[arg(long)]
    no_bos: bool,
    /// Take names of special tokens in the text for text
    #[arg(long)]
    no_parse_special: bool,
    /// Take backslashes in the text as they are
    #[arg(long)]
    no_escape: bool,
    /// Say how many tokens there are
    #[arg(long)]
    show_count: bool,
    /// Print one JSON object
    #[arg(long, conflicts_with = "ids")]
    json: bool,
}

/// A token and its text.
#[derive(Serialize)]
struct Piece {
    id: Token,
    /// Bytes that are no UTF-8 are replaced.
    piece: String,
    /// Those of the piece, where they are no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<Vec<u8>>,
}

impl Args {
    fn text(&self) -> Result<String> {
        let (name, bytes) = match (&self.prompt, &self.file) {
            (Some(prompt), _) => ("-p".into(), prompt.clone().into_bytes()),
            (None, Some(path)) if path.as_os_str() != "-" => {
                let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
                (path.clone(), bytes)
            }
            _ => {
                let mut bytes = Vec::new();
                let read = std::io::stdin().lock().read_to_end(&mut bytes);
                read.context("stdin")?;
                (PathBuf::from("stdin"), bytes)
            }
        };
        let bytes = match self.no_escape {
            true => bytes,
            false => unescaped(&bytes),
        };
        Ok(text::unchanged(&name, bytes)?)
    }
}

pub fn run(args: &Args) -> Result<Done> {
    let files = Files::of(args.model.clone(), None)?;
    let options = ModelOptions {
        vocabulary: true,
        ..ModelOptions::default()
    };
    let model = Model::load(&files.model, &options)?;
    let text = args.text()?;
    let tokens = model.tokenize(&text, !args.no_bos, !args.no_parse_special)?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if args.ids {
        let ids: Vec<String> = tokens.iter().map(Token::to_string).collect();
        writeln!(out, "[{}]", ids.join(", ")).context("stdout")?;
    } else {
        let mut pieces = Vec::with_capacity(tokens.len());
        for &id in &tokens {
            let mut bytes = Vec::new();
            model.text(id, true, &mut bytes)?;
            let piece = String::from_utf8_lossy(&bytes).into_owned();
            let broken = piece.as_bytes() != bytes;
            pieces.push(Piece {
                id,
                piece,
                bytes: broken.then_some(bytes),
            });
        }
        let done = match args.json {
            true => {
                let all = serde_json::json!({"count": tokens.len(), "tokens": pieces});
                writeln!(out, "{}", clean_json(&serde_json::to_string_pretty(&all)?))
            }
            false => pieces
                .iter()
                .try_for_each(|one| writeln!(out, "{:6} -> '{}'", one.id, shown(one))),
        };
        done.context("stdout")?;
    }
    if args.show_count && !args.json {
        writeln!(out, "Total number of tokens: {}", tokens.len()).context("stdout")?;
    }
    out.flush().context("stdout")?;
    Ok(Done::Whole)
}

/// The text of a piece; of one that is part of a character, its bytes.
fn shown(one: &Piece) -> String {
    match &one.bytes {
        Some(bytes) => bytes.escape_ascii().to_string(),
        None => clean(&one.piece),
    }
}
