//! A text's windows under every policy, beside the full cache.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::rows::{four, print, with_interval};
use super::{Read, Reader, TextArgs, working};
use crate::cli::Done;
use crate::cli::asking::evaluation::EvaluationArgs;
use crate::cli::asking::print::{percent, shown};
use crate::cli::output::FileReport;
use crate::cli::table::Columns;
use hae::engine::Token;
use hae::eval::log_probs::{self, Writer};
use hae::eval::reading::{Reading, Row, Window};

impl TextArgs {
    /// Reads at most so many windows, or chunks, and prints what came of it.
    pub fn windows(&self, path: &Path, most: usize, args: &EvaluationArgs) -> Result<Read> {
        let text = self.read(path, args)?;
        let chunked = self.chunks.is_some() || self.kl_divergence_base.is_some() || self.batched;
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
        let header = json!({
            "model": reader.files.model_report()?,
            "text": FileReport::read(path, &path.display().to_string())?,
            "prompt": prompt,
            "predict": predict,
            "batched": self.batched,
            "reference_type": self.reference_type.map(|of| of.name()),
            "windows": windows.len(),
        });
        let n_vocab = reader.loaded.model.n_vocab();
        let base = self.kl_divergence_base.as_ref();
        let mut base = base
            .map(|path| Writer::create(path, n_vocab, &chunks))
            .transpose()?;

        let reference = self.reference(&reader.loaded);
        let contenders = &reader.contenders;
        let asker = &mut reader.loaded.asker;
        asker.read_at_once(self.batched);
        let mut readings: Vec<Reading> = Vec::new();
        let done = working(windows.len() * contenders.len(), |bar, watch| {
            for (number, window) in windows.iter().enumerate() {
                bar.set_message(format!("window {}, reference", number + 1));
                let Some(said) = asker.read_in_full(&reference, window, watch)? else {
                    return Ok(Done::Interrupted);
                };
                if let Some(base) = &mut base {
                    said.logits()
                        .iter()
                        .try_for_each(|logits| base.add(logits))?;
                }
                for contender in contenders {
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
        })?;
        if let (Some(base), Done::Whole) = (base, &done) {
            base.commit()?;
        }
        let mut rows = Vec::new();
        let mut all = Vec::new();
        for contender in contenders {
            if let Some(row) = Row::of(&contender.record.name, &readings, reader.seed) {
                all.push(reader.row(contender, &row)?);
                rows.push(row);
            }
        }
        print(
            args.output,
            &header,
            &all,
            &readings,
            &table(&rows, chunked),
        )?;
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
        true => format!("{:.4} ± {:.5}", r.ppl, r.ppl_error),
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
