//! What policies go on with behind the prompts of a text's windows.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::rows::{four, print, rows, types};
use super::{Read, Reader, TextArgs, failed, told, working};
use crate::cli::Done;
use crate::cli::asking::evaluation::EvaluationArgs;
use crate::cli::asking::print::{percent, with_interval};
use crate::cli::output::FileReport;
use crate::cli::table::Columns;
use hae::eval::continuation::{Continuation, Row};
use hae::eval::stats::{Interval, Share};

impl TextArgs {
    /// Goes on behind at most so many prompts and prints what came of it.
    pub fn generate(
        &self,
        path: &Path,
        n: u32,
        most: usize,
        args: &EvaluationArgs,
    ) -> Result<Read> {
        let text = self.read(path, args)?;
        let mut reader = Reader::load(args, None)?;
        let windows = self.cut(path, &text, &reader.loaded.model, most)?;
        let n_predict = n as usize;
        reader.holds(self.text_prompt as usize + n_predict)?;
        let reference = self.reference(&reader.loaded);
        let header = json!({
            "model": reader.files.model_report()?,
            "text": FileReport::read(path, &path.display().to_string())?,
            "prompt": self.text_prompt,
            "generate": n,
            "reference": types(&reference),
            "windows": windows.len(),
        });
        let contenders = &reader.contenders;
        let asker = &mut reader.loaded.asker;
        let mut all: Vec<Continuation> = Vec::new();
        let done = working(windows.len() * contenders.len(), |bar, watch| {
            for (number, window) in windows.iter().enumerate() {
                bar.set_message(format!("window {}, reference", number + 1));
                let said = asker.go_on_in_full(&reference, window, n_predict, watch);
                let Some(said) = said.map_err(|e| failed(bar, e))? else {
                    return Ok(Done::Interrupted);
                };
                for contender in contenders {
                    bar.set_message(format!("window {}, {}", number + 1, contender.record.name));
                    let at = (number, window);
                    let one = asker.go_on(contender, at, &said, n_predict, watch);
                    let Some(one) = one.map_err(|e| failed(bar, e))? else {
                        return Ok(Done::Interrupted);
                    };
                    all.push(one);
                    bar.inc(1);
                }
            }
            Ok(Done::Whole)
        });
        let (rows, shown) = rows(&reader, |name| Row::of(name, &all))?;
        let done = told(done, !rows.is_empty(), || {
            print(args.output, &header, &shown, &all, &table(&rows))
        })?;
        let kl = rows.into_iter().map(|row| (row.contender, row.kl_mean));
        Ok(Read {
            kl: kl.collect(),
            done,
        })
    }
}

fn table(rows: &[Row]) -> comfy_table::Table {
    let whole = |x: f64| format!("{x:.0}");
    let mut columns = Columns::default();
    columns.add("policy", false, rows, |r| r.contender.clone());
    columns.add("texts", true, rows, |r| r.windows.to_string());
    columns.add("as full", true, rows, |r| r.equal.hits.to_string());
    columns.add("% (95 % interval)", true, rows, |r| {
        let Share { low, high, .. } = r.equal;
        with_interval(r.equal.share, Some(Interval { low, high }), percent)
    });
    columns.add("tokens as full (95 % interval)", true, rows, |r| {
        with_interval(r.same_mean, r.same_interval, whole)
    });
    columns.add("median", true, rows, |r| whole(r.same_median));
    columns.add("tokens", true, rows, |r| whole(r.tokens));
    columns.add("ended", true, rows, |r| r.ended.hits.to_string());
    columns.add("repeated % (95 % interval)", true, rows, |r| {
        with_interval(r.repeated, r.repeated_interval, percent)
    });
    columns.add("KL (95 % interval)", true, rows, |r| {
        with_interval(r.kl_mean, r.kl_interval, four)
    });
    columns.add("largest", true, rows, |r| four(r.kl_max));
    columns.add("same first %", true, rows, |r| percent(r.top1));
    columns.table()
}
