//! What `hae replay` found, in three formats.

use std::io::Write;

use anyhow::{Context, Result};
use clap::ValueEnum;
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use serde_json::json;

use hae::replay::{Row, Summary, Verified};
use hae::trace::Header;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Md,
    Json,
    Csv,
}

pub fn comparison(format: Format, rows: &[Row], summaries: &[Summary]) -> Result<()> {
    let text = match format {
        Format::Md => format!("{}\n", table(summaries)),
        Format::Json => {
            let all = json!({ "summary": summaries, "traces": rows });
            format!("{}\n", serde_json::to_string_pretty(&all)?)
        }
        Format::Csv => csv(rows)?,
    };
    write(&text)
}

pub fn checked(format: Format, checked: &[(String, Header, Verified)]) -> Result<()> {
    let text = match format {
        Format::Json => {
            let all: Vec<_> = checked
                .iter()
                .map(|(trace, header, verified)| {
                    json!({ "trace": trace, "policy": header.policy, "verified": verified })
                })
                .collect();
            format!("{}\n", serde_json::to_string_pretty(&all)?)
        }
        Format::Csv => {
            let mut writer = ::csv::Writer::from_writer(Vec::new());
            writer.write_record(["trace", "policy", "plans", "steps"])?;
            for (trace, header, Verified { plans, steps, .. }) in checked {
                let numbers = [plans.to_string(), steps.to_string()];
                writer.write_record([trace, &header.policy, &numbers[0], &numbers[1]])?;
            }
            String::from_utf8(writer.into_inner()?)?
        }
        Format::Md => {
            let line = |(trace, header, verified): &(String, Header, Verified)| {
                let Verified { plans, steps, .. } = verified;
                let policy = &header.policy;
                format!(
                    "{trace}: {policy} makes the same {plans} plans, {steps} of them after decoded tokens\n"
                )
            };
            checked.iter().map(line).collect()
        }
    };
    write(&text)
}

fn write(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).context("stdout")
}

fn table(summaries: &[Summary]) -> Table {
    let compared = summaries.iter().any(|s| s.less_than_greedy.is_some());
    let mut titles = vec![
        "policy",
        "traces",
        "steps",
        "lost mean %",
        "worst step %",
        "lost in all",
        "peak cells",
        "of the prompt",
        "mean cells",
        "flushes",
        "restores",
    ];
    if compared {
        titles.extend(["lost / greedy", "less than greedy"]);
    }
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header(&titles);
    for s in summaries {
        let mut row = vec![
            s.contender.clone(),
            s.traces.to_string(),
            s.steps.to_string(),
            format!("{:.3}", s.lost_mean * 100.0),
            format!("{:.1}", s.lost_worst * 100.0),
            format!("{:.3}", s.lost_total),
            s.peak_decoding.to_string(),
            format!("{:.2}", s.peak_share),
            format!("{:.0}", s.cells_mean),
            s.flushes.to_string(),
            s.restores.to_string(),
        ];
        if compared {
            let empty = String::new;
            row.push(s.of_greedy.map_or_else(empty, |x| format!("{x:.3}")));
            let less = s.less_than_greedy.map(|n| format!("{n}/{}", s.traces));
            row.push(less.unwrap_or_default());
        }
        table.add_row(row);
    }
    for i in 1..titles.len() {
        if let Some(column) = table.column_mut(i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn csv(rows: &[Row]) -> Result<String> {
    let mut writer = ::csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "trace",
        "setting",
        "policy",
        "bin_size",
        "prompt",
        "steps",
        "lost_mean",
        "lost_worst",
        "lost_worst_step",
        "lost_total",
        "peak_decoding",
        "cells_mean",
        "peak",
        "flushes",
        "restores",
        "evicted_after_prefill",
        "evicted_in_decoding",
        "less_than_greedy",
    ])?;
    for row in rows {
        let r = &row.replayed;
        writer.write_record([
            row.trace.clone(),
            row.contender.clone(),
            r.policy.to_owned(),
            row.bin_size.map_or_else(String::new, |n| n.to_string()),
            r.prompt.to_string(),
            r.steps.to_string(),
            r.lost.mean.to_string(),
            r.lost.worst.to_string(),
            r.lost.worst_step.to_string(),
            r.lost.total.to_string(),
            r.peak_decoding.to_string(),
            r.cells_mean.to_string(),
            r.cells.peak.to_string(),
            r.flushes.to_string(),
            r.restores.to_string(),
            r.evicted_after_prefill.to_string(),
            r.evicted_in_decoding.to_string(),
            row.less_than_greedy
                .map_or_else(String::new, |x| x.to_string()),
        ])?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}
