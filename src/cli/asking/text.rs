//! `hae eval --text`: how well a text is predicted under several policies.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use super::evaluation::EvaluationArgs;
use super::print::{Format, percent, shown, write};
use super::run::progress_bar;
use crate::cli::load::{self, Files};
use crate::cli::named::parse;
use crate::cli::output::FileReport;
use crate::cli::table::Columns;
use crate::cli::{Done, interrupt};
use hae::Error;
use hae::bench::Pulse;
use hae::eval::question::Question;
use hae::eval::reading::{Cut, Reading, Row, Window};
use hae::llama::{CacheType, Model};
use hae::text;

const HEADING: &str = "Text";

/// What is read, and how it is cut.
#[derive(Debug, clap::Args)]
pub struct TextArgs {
    /// Predict a text instead of asking
    ///
    /// Windows of the file, one behind the other: each goes in as a prompt and then token by token,
    /// whatever the model would have said. It shows perplexity and the distance to the full cache.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["format", "image_dir", "subset", "every", "part", "distance", "min_accuracy", "out", "trace", "n_predict"], help_heading = HEADING)]
    pub text: Option<PathBuf>,
    /// Tokens of a window's prompt
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..), requires = "text", help_heading = HEADING)]
    text_prompt: u32,
    /// Tokens that are predicted behind it
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..), requires = "text", help_heading = HEADING)]
    text_predict: u32,
    /// Type of K and V in the full cache that is compared with
    ///
    /// That of -ctk and -ctv without it: what a quantized cache costs shows beside f16 alone.
    #[arg(long, value_parser = parse::<CacheType>, value_name = "TYPE", requires = "text", help_heading = HEADING)]
    reference_type: Option<CacheType>,
}

/// What came of it.
pub struct Read {
    pub rows: Vec<Row>,
    pub done: Done,
}

impl TextArgs {
    /// Reads at most so many windows under every policy and prints what came of it.
    pub fn run(&self, path: &Path, limit: Option<usize>, args: &EvaluationArgs) -> Result<Read> {
        args.inference.check()?;
        if args.output == Format::Csv {
            let reason = "csv, expected md, json or jsonl with --text";
            return Err(Error::option("-o", reason).into());
        }
        let contenders = args.contenders()?;
        let files = Files::find(&args.inference.model)?;
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let text = text::decode(path, bytes)?;
        let loaded = args
            .inference
            .load(&files, std::iter::empty::<&Question>(), None)?;
        let windows = self.windows(path, &text, &loaded.model, limit)?;
        let needed = (self.text_prompt + self.text_predict) as usize;
        let n_ctx = loaded.context.n_ctx as usize;
        if needed > n_ctx {
            let reason = format!("{n_ctx} cells, a window has {needed} tokens");
            return Err(Error::option("-c", reason).into());
        }
        let contenders = loaded.contenders(contenders)?;
        let seed = args.policy.options_at(None)?.seed;
        let header = json!({
            "model": files.model_report()?,
            "text": FileReport::read(path, &path.display().to_string())?,
            "prompt": self.text_prompt,
            "predict": self.text_predict,
            "reference_type": self.reference_type.map(|of| of.name()),
            "windows": windows.len(),
        });

        let mut reference = loaded.context;
        if let Some(of) = self.reference_type {
            (reference.type_k, reference.type_v) = (of, of);
        }
        let mut asker = loaded.asker;
        let mut readings: Vec<Reading> = Vec::new();
        let bar = progress_bar(windows.len() * contenders.len(), 0)?;
        let now = load::clock();
        let watch = Pulse {
            now: &now,
            cancelled: &interrupt::cancelled,
        };
        let done = interrupt::working(|| -> Result<Done> {
            for (number, window) in windows.iter().enumerate() {
                bar.set_message(format!("window {}, reference", number + 1));
                let Some(said) = asker.read_in_full(&reference, window, watch)? else {
                    return Ok(Done::Interrupted);
                };
                for contender in &contenders {
                    bar.set_message(format!("window {}, {}", number + 1, contender.record.name));
                    let read = asker.read(contender, (number, window), &said, watch)?;
                    let Some(reading) = read else {
                        return Ok(Done::Interrupted);
                    };
                    readings.push(reading);
                    bar.inc(1);
                }
            }
            Ok(Done::Whole)
        });
        bar.finish_and_clear();
        let done = done?;
        let names = contenders.iter().map(|c| c.record.name.as_str());
        let rows: Vec<Row> = names
            .filter_map(|name| Row::of(name, &readings, seed))
            .collect();
        print(args.output, &header, &rows, &readings)?;
        Ok(Read { rows, done })
    }

    fn windows(
        &self,
        path: &Path,
        text: &str,
        model: &Model,
        limit: Option<usize>,
    ) -> Result<Vec<Window>> {
        let tokens = model.tokenize(text, false, false)?;
        let front = model.tokenize("", true, false)?;
        let cut = Cut {
            prompt: self.text_prompt as usize,
            predict: self.text_predict as usize,
        };
        let mut windows = cut.windows(&tokens, &front);
        windows.truncate(limit.unwrap_or(usize::MAX));
        if windows.is_empty() {
            let (n, needed) = (tokens.len(), cut.prompt + cut.predict);
            let reason = format!("{n} tokens, a window has {needed}");
            return Err(Error::file(path, reason).into());
        }
        Ok(windows)
    }
}

fn print(
    format: Format,
    header: &serde_json::Value,
    rows: &[Row],
    readings: &[Reading],
) -> Result<()> {
    let text = match format {
        // A row has an interval within it, which is no cell: csv is refused before.
        Format::Md | Format::Csv => format!("{}\n", table(rows)),
        Format::Json => {
            let all = json!({ "header": header, "windows": readings, "summary": rows });
            format!("{}\n", serde_json::to_string_pretty(&all)?)
        }
        Format::Jsonl => rows.iter().try_fold(String::new(), |text, row| {
            Ok::<_, serde_json::Error>(format!("{text}{}\n", serde_json::to_string(row)?))
        })?,
    };
    write(&text)
}

fn table(rows: &[Row]) -> comfy_table::Table {
    let mut columns = Columns::default();
    columns.add("policy", false, rows, |r| r.contender.clone());
    columns.add("tokens", true, rows, |r| r.tokens.to_string());
    columns.add("perplexity", true, rows, |r| format!("{:.3}", r.ppl));
    columns.add("of full", true, rows, |r| format!("{:.4}", r.ppl_ratio));
    columns.add("KL (95 % interval)", true, rows, |r| {
        let interval = r.kl_interval;
        let interval = interval.map(|i| format!(" ({:.4} to {:.4})", i.low, i.high));
        format!("{:.4}{}", r.kl_mean, interval.unwrap_or_default())
    });
    columns.add("median", true, rows, |r| format!("{:.4}", r.kl_median));
    columns.add("99th %", true, rows, |r| format!("{:.4}", r.kl_p99));
    columns.add("largest", true, rows, |r| format!("{:.4}", r.kl_max));
    columns.add("same first %", true, rows, |r| percent(r.top1));
    columns.add("attended %", true, rows, |r| shown(r.attended, percent));
    columns.add("cells", true, rows, |r| format!("{:.0}", r.cells));
    columns.table()
}
