//! A text's windows under every policy, beside the full cache.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::rows::{four, print, rows, types};
use super::{Read, Reader, TextArgs, failed, told, working};
use crate::cli::Done;
use crate::cli::asking::evaluation::EvaluationArgs;
use crate::cli::asking::print::{percent, shown, with_interval};
use crate::cli::output::FileReport;
use crate::cli::table::Columns;
use hae::engine::Token;
use hae::eval::log_probs::{self, Writer};
use hae::eval::reading::{Reading, Row, Window};

impl TextArgs {
    /// Reads at most so many windows, or chunks, and prints what came of it.
    pub fn windows(&self, path: &Path, most: usize, args: &EvaluationArgs) -> Result<Read> {
        let text = self.read(path, args)?;
        let chunked = self.chunked();
        let n_ctx = chunked.then(|| Reader::chunk(args)).transpose()?;
        let mut reader = Reader::load(args, n_ctx)?;
        let (mut chunks, mut windows): (Vec<Vec<Token>>, Vec<Window>) = Default::default();
        match n_ctx {
            Some(n_ctx) => {
                let bos = reader.bos()?;
                chunks = reader.chunks(path, &text, n_ctx, most)?;
                windows.extend(chunks.iter().map(|chunk| log_probs::window(chunk, bos)));
            }
            None => windows = self.cut(path, &text, &reader.loaded.model, most)?,
        }
        // All are alike.
        let (prompt, predict) = (windows[0].prompt.len(), windows[0].text.len());
        reader.holds(prompt + predict)?;
        let reference = self.reference(&reader.loaded);
        let header = json!({
            "model": reader.files.model_report()?,
            "text": FileReport::read(path, &path.display().to_string())?,
            "prompt": prompt,
            "predict": predict,
            "batched": self.batched,
            "reference": types(&reference),
            "windows": windows.len(),
        });
        let n_vocab = reader.loaded.model.n_vocab();
        let base = self.kl_divergence_base.as_ref();
        let mut base = base
            .map(|path| Writer::create(path, n_vocab, &chunks))
            .transpose()?;

        let contenders = &reader.contenders;
        let asker = &mut reader.loaded.asker;
        asker.read_at_once(self.batched);
        let mut readings: Vec<Reading> = Vec::new();
        let done = working(windows.len() * contenders.len(), |bar, watch| {
            for (number, window) in windows.iter().enumerate() {
                bar.set_message(format!("window {}, reference", number + 1));
                let said = asker.read_in_full(&reference, window, watch);
                let Some(said) = said.map_err(|e| failed(bar, e))? else {
                    return Ok(Done::Interrupted);
                };
                if let Some(base) = &mut base {
                    let mut logits = said.logits().iter();
                    let added = logits.try_for_each(|logits| base.add(logits));
                    added.map_err(|e| failed(bar, e))?;
                }
                for contender in contenders {
                    bar.set_message(format!("window {}, {}", number + 1, contender.record.name));
                    let read = asker.read(contender, (number, window), &said, watch);
                    let Some(reading) = read.map_err(|e| failed(bar, e))? else {
                        return Ok(Done::Interrupted);
                    };
                    readings.push(reading);
                    bar.inc(1);
                }
            }
            Ok(Done::Whole)
        });
        let (rows, all) = rows(&reader, |name| Row::of(name, &readings))?;
        let done = told(done, !rows.is_empty(), || {
            let table = table(&rows, chunked);
            print(args.output, &header, &all, &readings, &table)
        })?;
        if let (Some(base), Done::Whole) = (base, &done) {
            base.commit()?;
        }
        let kl = rows.into_iter().map(|row| (row.contender, row.kl_mean));
        Ok(Read {
            kl: kl.collect(),
            done,
        })
    }
}

fn table(rows: &[Row], chunked: bool) -> comfy_table::Table {
    let mut columns = Columns::default();
    columns.add("policy", false, rows, |r| r.contender.clone());
    columns.add("tokens", true, rows, |r| r.tokens.to_string());
    columns.add("perplexity", true, rows, |r| match chunked {
        // As llama-perplexity shows it.
        true => match r.ppl_error {
            Some(error) => format!("{:.4} ± {error:.5}", r.ppl),
            None => four(r.ppl),
        },
        false => format!("{:.3}", r.ppl),
    });
    columns.add("of full (95 % interval)", true, rows, |r| {
        with_interval(r.ppl_ratio, r.ppl_ratio_interval, four)
    });
    columns.add("KL (95 % interval)", true, rows, |r| {
        with_interval(r.kl_mean, r.kl_interval, four)
    });
    columns.add("median", true, rows, |r| four(r.kl_median));
    columns.add("99th %", true, rows, |r| four(r.kl_p99));
    columns.add("largest", true, rows, |r| four(r.kl_max));
    columns.add("same first % (95 % interval)", true, rows, |r| {
        with_interval(r.top1, r.top1_interval, percent)
    });
    columns.add("attended %", true, rows, |r| shown(r.attended, percent));
    columns.add("cells", true, rows, |r| format!("{:.0}", r.cells));
    columns.table()
}
