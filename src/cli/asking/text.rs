//! `hae eval --text`: how well a text is predicted, or gone on with, under several policies.

mod base;
mod generate;
mod rows;
mod windows;

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use indicatif::ProgressBar;

use super::args::Loaded;
use super::evaluation::EvaluationArgs;
use super::print::Format;
use super::run::progress_bar;
use crate::cli::load::Files;
use crate::cli::named::parse;
use crate::cli::{Done, interrupt, load};
use hae::Error;
use hae::asker::Contender;
use hae::bench::Pulse;
use hae::engine::Token;
use hae::eval::log_probs;
use hae::eval::question::Question;
use hae::eval::reading::{Cut, Window};
use hae::llama::{CacheType, ContextOptions, Model};
use hae::outfile::FilesInUse;
use hae::text;

const HEADING: &str = "Text";
/// What asks questions, of which a text has none. Commands add their own.
const QUESTIONS: [&str; 6] = [
    "out",
    "trace",
    "n_predict",
    "num_crops",
    "chat_template",
    "no_conversation",
];
/// Tokens of a chunk, as in `llama-perplexity`.
const CHUNK: u32 = 512;

/// What is read, and how it is cut.
#[derive(Debug, clap::Args)]
pub struct TextArgs {
    /// Predict a text instead of asking
    ///
    /// Windows of the file, one behind the other: each goes in as a prompt and then token by token,
    /// whatever the model would have said. It shows perplexity and the distance to the full cache.
    #[arg(long, value_name = "FILE", conflicts_with_all = QUESTIONS, help_heading = HEADING)]
    text: Option<PathBuf>,
    /// Tokens of a window's prompt
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..), requires = "text", help_heading = HEADING)]
    text_prompt: u32,
    /// Tokens that are predicted behind it
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..), requires = "text", help_heading = HEADING)]
    text_predict: u32,
    /// Go on behind each prompt instead, greedily
    ///
    /// With so many tokens at most. It shows how long a policy says what the full cache says, how much it
    /// repeats itself, and the distance on the full cache's own text.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), requires = "text", help_heading = HEADING)]
    text_generate: Option<u32>,
    /// Cut as llama-perplexity does, at most N chunks
    ///
    /// Chunks of -c tokens (512 without it); the first half and one token more is the prompt, the rest is
    /// predicted. -1: all.
    #[arg(long, value_name = "N", value_parser = chunks, conflicts_with_all = ["text_prompt", "text_predict", "text_generate"], help_heading = HEADING)]
    chunks: Option<usize>,
    /// Read chunks in batches, as llama-perplexity does
    ///
    /// Where nothing is evicted and everything attended to. It is faster and shows llama-perplexity's own
    /// numbers; what is read token by token differs from it by rounding. With --chunks, --kl-divergence-base
    /// or --kl-divergence.
    #[arg(long, conflicts_with_all = ["text_prompt", "text_predict", "text_generate"], help_heading = HEADING)]
    batched: bool,
    /// Save what is predicted, as llama-perplexity
    ///
    /// What the full cache predicts of each chunk, in llama-perplexity's format. With --kl-divergence the file
    /// is read.
    #[arg(long, alias = "save-all-logits", value_name = "FILE", conflicts_with_all = QUESTIONS, conflicts_with_all = ["text_prompt", "text_predict", "text_generate"], help_heading = HEADING)]
    kl_divergence_base: Option<PathBuf>,
    /// Compare with the predictions of such a file
    ///
    /// Which may be llama-perplexity's own. The text is in it.
    #[arg(long, conflicts_with_all = ["text", "reference_type"], requires = "kl_divergence_base", help_heading = HEADING)]
    kl_divergence: bool,
    /// Type of K and V in the full cache that is compared with
    ///
    /// That of -ctk and -ctv without it: what a quantized cache costs shows beside f16 alone.
    #[arg(long, value_parser = parse::<CacheType>, value_name = "TYPE", requires = "text", help_heading = HEADING)]
    reference_type: Option<CacheType>,
}

/// `--chunks`, as llama.cpp spells it.
fn chunks(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(-1) => Ok(usize::MAX),
        Ok(n @ 1..) => Ok(n as usize),
        Ok(i32::MIN..=0) | Err(_) => Err("expected a number of chunks, or -1".into()),
    }
}

/// What came of it.
pub struct Read {
    /// The mean divergence of each policy, in nats.
    pub kl: Vec<(String, f64)>,
    pub done: Done,
}

/// A model that reads.
struct Reader {
    files: Files,
    loaded: Loaded,
    contenders: Vec<Contender>,
}

impl TextArgs {
    /// Whether a text is to be read at all.
    pub fn wanted(&self) -> bool {
        self.text.is_some()
            || self.chunks.is_some()
            || self.batched
            || self.kl_divergence_base.is_some()
    }

    /// Reads at most so many windows under every policy and prints what came of it.
    pub fn run(&self, limit: Option<usize>, args: &EvaluationArgs) -> Result<Read> {
        args.inference.check()?;
        if args.output == Format::Csv {
            let reason = "csv, expected md, json or jsonl with --text";
            return Err(Error::option("-o", reason).into());
        }
        let limit = limit.unwrap_or(usize::MAX);
        let limit = limit.min(self.chunks.unwrap_or(usize::MAX));
        if self.batched && !self.chunked() {
            let reason =
                "is for chunks, expected --chunks, --kl-divergence-base or --kl-divergence too";
            return Err(Error::option("--batched", reason).into());
        }
        if let (true, Some(base)) = (self.kl_divergence, &self.kl_divergence_base) {
            return base::compare(base, limit, self.batched, args);
        }
        let Some(path) = &self.text else {
            let reason = "is missing, expected the text that is to be read";
            return Err(Error::option("--text", reason).into());
        };
        match self.text_generate {
            Some(n) => self.generate(path, n, limit, args),
            None => self.windows(path, limit, args),
        }
    }

    /// Whether the text is cut as llama-perplexity cuts it.
    fn chunked(&self) -> bool {
        self.chunks.is_some() || self.kl_divergence_base.is_some()
    }

    /// The file's text, in chunks with all that llama.cpp takes for text; no file that the command writes is
    /// it.
    fn read(&self, path: &Path, args: &EvaluationArgs) -> Result<String> {
        let mut files: FilesInUse = args.inference.model.in_use();
        files.reads("--text", path);
        if let Some(base) = &self.kl_divergence_base {
            files.writes("--kl-divergence-base", base)?;
        }
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Ok(match self.chunked() {
            true => text::unchanged(path, bytes)?,
            false => text::decode(path, bytes)?,
        })
    }

    /// The full cache that is compared with.
    fn reference(&self, loaded: &Loaded) -> ContextOptions {
        let mut reference = loaded.context.clone();
        if let Some(of) = self.reference_type {
            (reference.type_k, reference.type_v) = (of, of);
        }
        reference
    }

    fn cut(&self, path: &Path, text: &str, model: &Model, most: usize) -> Result<Vec<Window>> {
        let tokens = model.tokenize(text, false, false)?;
        let front = model.tokenize("", true, false)?;
        let cut = Cut {
            prompt: self.text_prompt as usize,
            predict: self.text_predict as usize,
        };
        let mut windows = cut.windows(&tokens, &front);
        windows.truncate(most);
        if windows.is_empty() {
            return Err(too_short(path, tokens.len(), cut.prompt + cut.predict));
        }
        Ok(windows)
    }
}

impl Reader {
    /// Loads the model; `n_ctx` are the cells that a chunk wants, where chunks are read.
    fn load(args: &EvaluationArgs, n_ctx: Option<u32>) -> Result<Self> {
        let contenders = args.contenders()?;
        let files = Files::find(&args.inference.model)?;
        let none = std::iter::empty::<&Question>();
        let mut loaded = args.inference.load(&files, none, None)?;
        if let Some(n_ctx) = n_ctx {
            let context = &mut loaded.context;
            context.n_ctx = n_ctx;
            context.n_batch = context.n_batch.min(n_ctx);
            context.n_ubatch = context.n_ubatch.min(n_ctx);
        }
        let contenders = loaded.contenders(contenders)?;
        Ok(Reader {
            files,
            loaded,
            contenders,
        })
    }

    /// Refuses windows of more tokens than cells.
    fn holds(&self, needed: usize) -> Result<()> {
        let n_ctx = self.loaded.context.n_ctx as usize;
        if needed > n_ctx {
            let reason = format!("{n_ctx} cells, a window has {needed} tokens");
            return Err(Error::option("-c", reason).into());
        }
        Ok(())
    }

    /// The token that stands in the place of a chunk's first, where the model wants one.
    fn bos(&self) -> Result<Option<Token>> {
        Ok(self
            .loaded
            .model
            .tokenize("", true, false)?
            .first()
            .copied())
    }

    /// `-c`, the tokens of a chunk.
    fn chunk(args: &EvaluationArgs) -> Result<u32> {
        match args.inference.context.ctx_size() {
            None => Ok(CHUNK),
            Some(n @ 4..) => Ok(n),
            Some(n) => {
                let reason = format!("{n} tokens of a chunk, expected at least 4");
                Err(Error::option("-c", reason).into())
            }
        }
    }

    /// A text in whole chunks.
    fn chunks(&self, path: &Path, text: &str, n_ctx: u32, most: usize) -> Result<Vec<Vec<Token>>> {
        // As llama.cpp's -f reads it.
        let text = text.strip_suffix('\n').unwrap_or(text);
        let tokens = self.loaded.model.tokenize(text, true, false)?;
        let chunks = log_probs::chunks(&tokens, n_ctx as usize, most);
        match chunks.is_empty() {
            true => Err(too_short(path, tokens.len(), n_ctx as usize)),
            false => Ok(chunks),
        }
    }
}

fn too_short(path: &Path, n: usize, needed: usize) -> anyhow::Error {
    Error::file(path, format!("{n} tokens, a window has {needed}")).into()
}

/// An error with the step that it ended.
fn failed(bar: &ProgressBar, e: Error) -> anyhow::Error {
    anyhow!("{}: {e}", bar.message())
}

/// Prints what was measured, if there is anything, also where an error ended the work.
fn told(done: Result<Done>, any: bool, print: impl FnOnce() -> Result<()>) -> Result<Done> {
    let printed = match done.is_ok() || any {
        true => print(),
        false => Ok(()),
    };
    let done = done?;
    printed.map(|()| done)
}

/// Works under a bar of so many steps, until a signal cancels it.
fn working(
    steps: usize,
    work: impl FnOnce(&ProgressBar, Pulse<'_>) -> Result<Done>,
) -> Result<Done> {
    let bar = progress_bar(steps, 0)?;
    let now = load::clock();
    let watch = Pulse {
        now: &now,
        cancelled: &interrupt::cancelled,
    };
    let done = interrupt::working(|| work(&bar, watch));
    bar.finish_and_clear();
    done
}
