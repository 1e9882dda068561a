//! Policies beside the predictions that a file keeps.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use super::rows::{four, print};
use super::{Read, Reader, failed, told, working};
use crate::cli::Done;
use crate::cli::asking::evaluation::EvaluationArgs;
use crate::cli::asking::print::{percent, shown, with_interval};
use crate::cli::output::FileReport;
use crate::cli::table::Columns;
use hae::Error;
use hae::eval::divergence::{Divergence, Part, Statistics};
use hae::eval::log_probs::{self, Shape};
use hae::eval::stats::{Estimate, mean};

/// All chunks under one policy.
#[derive(Debug, Serialize)]
struct Row {
    contender: String,
    #[serde(flatten)]
    statistics: Statistics,
    /// Cells that a looking layer attended to, of all in view: the mean over chunks.
    attended: Option<f64>,
    /// Cells in use at the end of a chunk: the mean.
    cells: f64,
}

/// One chunk under one policy.
#[derive(Debug, Serialize)]
struct Window {
    /// From 0.
    window: usize,
    contender: String,
    #[serde(flatten)]
    part: Part,
}

/// What was collected of one.
#[derive(Default)]
struct Collected {
    divergence: Divergence,
    attended: Vec<f64>,
    cells: Vec<f64>,
}

/// Reads the chunks of a file under every policy and prints how far they are from what it keeps.
pub fn compare(path: &Path, most: usize, batched: bool, args: &EvaluationArgs) -> Result<Read> {
    let mut base = log_probs::Reader::open(path)?;
    let Shape {
        n_ctx,
        n_vocab,
        n_chunks,
    } = base.shape();
    // Never more than the file has tokens.
    let needed = u32::try_from(n_ctx).unwrap_or(u32::MAX);
    let wanted = args.inference.context.ctx_size().filter(|&n_ctx| n_ctx > 0);
    let mut reader = Reader::load(args, Some(wanted.unwrap_or(needed)))?;
    reader.holds(needed as usize)?;
    // Before memory is taken by what may be no such file at all.
    let trained = reader.loaded.model.n_ctx_train();
    if wanted.is_none() && needed > trained {
        let reason =
            format!("is missing: chunks have {needed} tokens, the model was trained on {trained}");
        return Err(Error::option("-c", reason).into());
    }
    let own = reader.loaded.model.n_vocab();
    if n_vocab != own {
        let reason = format!("{n_vocab} tokens of vocabulary, the model has {own}");
        return Err(Error::file(path, reason).into());
    }
    let bos = reader.bos()?;
    let n_chunks = n_chunks.min(most);
    let header = json!({
        "model": reader.files.model_report()?,
        "base": FileReport::read(path, &path.display().to_string())?,
        "n_ctx": needed,
        "batched": batched,
        "windows": n_chunks,
    });

    let contenders = &reader.contenders;
    let asker = &mut reader.loaded.asker;
    asker.read_at_once(batched);
    let mut all: Vec<Collected> = contenders.iter().map(|_| Collected::default()).collect();
    let done = working(n_chunks * contenders.len(), |bar, watch| {
        for number in 0..n_chunks {
            bar.set_message(format!("chunk {}", number + 1));
            let chunk = base.chunk(number).map_err(|e| failed(bar, e))?;
            let window = log_probs::window(&chunk, bos);
            for (contender, collected) in contenders.iter().zip(&mut all) {
                bar.set_message(format!("chunk {}, {}", number + 1, contender.record.name));
                base.seek(number).map_err(|e| failed(bar, e))?;
                // What a cancelled chunk has said is no chunk's.
                let mut divergence = collected.divergence.clone();
                let mut each = |logits: &[f32], token| divergence.add(&base.read()?, logits, token);
                let predicted = asker.predict(contender, (number, &window), &mut each, watch);
                let Some((attended, cells)) = predicted.map_err(|e| failed(bar, e))? else {
                    return Ok(Done::Interrupted);
                };
                divergence.end_window();
                collected.divergence = divergence;
                collected.attended.extend(attended.map(|shares| shares.all));
                collected.cells.push(cells as f64);
                bar.inc(1);
            }
        }
        Ok(Done::Whole)
    });

    let (mut rows, mut shown, mut windows) = (Vec::new(), Vec::new(), Vec::new());
    for (contender, collected) in contenders.iter().zip(&all) {
        let Some(statistics) = collected.divergence.statistics() else {
            continue;
        };
        let parts = collected.divergence.windows();
        windows.extend(parts.into_iter().enumerate().map(|(window, part)| Window {
            window,
            contender: contender.record.name.clone(),
            part,
        }));
        let attended = &collected.attended;
        let row = Row {
            contender: contender.record.name.clone(),
            statistics,
            attended: (!attended.is_empty()).then(|| mean(attended)),
            cells: mean(&collected.cells),
        };
        shown.push(reader.row(contender, &row)?);
        rows.push(row);
    }
    let done = told(done, !rows.is_empty(), || {
        print(args.output, &header, &shown, &windows, &table(&rows))
    })?;
    let kl = rows
        .into_iter()
        .map(|row| (row.contender, row.statistics.kl.value));
    Ok(Read {
        kl: kl.collect(),
        done,
    })
}

fn table(rows: &[Row]) -> comfy_table::Table {
    let estimate = |e: Estimate, show: &dyn Fn(f64) -> String| match e.error {
        Some(error) => format!("{} ± {}", show(e.value), show(error)),
        None => show(e.value),
    };
    let six = |x: f64| format!("{x:.6}");
    let three = |x: f64| format!("{:.3}", 100.0 * x);
    let mut columns = Columns::default();
    columns.add("policy", false, rows, |r| r.contender.clone());
    columns.add("tokens", true, rows, |r| r.statistics.tokens.to_string());
    columns.add("PPL(Q)", true, rows, |r| estimate(r.statistics.ppl, &four));
    columns.add("PPL(base)", true, rows, |r| {
        estimate(r.statistics.ppl_base, &four)
    });
    columns.add("PPL(Q)/PPL(base)", true, rows, |r| {
        estimate(r.statistics.ppl_ratio, &six)
    });
    columns.add("mean KLD", true, rows, |r| estimate(r.statistics.kl, &six));
    columns.add("95 % interval by chunks", true, rows, |r| {
        let s = &r.statistics;
        s.kl_interval.map_or_else(String::new, |_| {
            with_interval(s.kl.value, s.kl_interval, six)
        })
    });
    columns.add("maximum", true, rows, |r| {
        six(r.statistics.kl_quantiles.max)
    });
    columns.add("99.9 %", true, rows, |r| {
        six(r.statistics.kl_quantiles.p99_9)
    });
    columns.add("99 %", true, rows, |r| six(r.statistics.kl_quantiles.p99));
    columns.add("95 %", true, rows, |r| six(r.statistics.kl_quantiles.p95));
    columns.add("median", true, rows, |r| {
        six(r.statistics.kl_quantiles.median)
    });
    columns.add("RMS Δp %", true, rows, |r| {
        estimate(r.statistics.dp_rms, &three)
    });
    columns.add("same top p %", true, rows, |r| {
        estimate(r.statistics.top1, &three)
    });
    columns.add("attended %", true, rows, |r| shown(r.attended, percent));
    columns.add("cells", true, rows, |r| format!("{:.0}", r.cells));
    columns.table()
}
