//! Answers, summaries and comparisons as tables, JSON and CSV.

use std::io::Write;

use anyhow::Context;
use clap::ValueEnum;
use comfy_table::Table;
use serde_json::json;

use super::super::table::Columns;
use hae::Error;
use hae::eval::record::{Answer, Header};
use hae::eval::stats::Interval;
use hae::eval::summary::{ALL, Comparison, LEVEL, Measure, Row, Summary, Verdict};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Md,
    Json,
    Jsonl,
    Csv,
}

pub fn write(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("stdout")
}

/// Header, answers if there are any, and summary, as one object.
pub fn print_json(header: &Header, answers: &[Answer], summary: &Summary) -> anyhow::Result<()> {
    let mut all = json!({ "header": header });
    if !answers.is_empty() {
        all["answers"] = json!(answers);
    }
    all["summary"] = json!(summary);
    write(&format!("{}\n", serde_json::to_string_pretty(&all)?))
}

pub fn print_summary(format: Format, header: &Header, summary: &Summary) -> anyhow::Result<()> {
    let text = match format {
        Format::Md => summary_text(header, summary),
        Format::Json => return print_json(header, &[], summary),
        Format::Jsonl => {
            let mut text = String::new();
            for row in &summary.rows {
                text += &serde_json::to_string(row)?;
                text.push('\n');
            }
            text
        }
        Format::Csv => {
            let mut writer = csv::Writer::from_writer(Vec::new());
            for row in &summary.rows {
                writer.serialize(row)?;
            }
            let bytes = writer
                .into_inner()
                .map_err(|e| Error::option("-o", e.to_string()))?;
            String::from_utf8(bytes)?
        }
    };
    write(&text)
}

/// The answers to each prompt, one under the other.
pub fn print_answers(header: &Header, answers: &[Answer]) -> anyhow::Result<()> {
    let mut text = String::new();
    let mut prompts: Vec<(&str, usize)> = Vec::new();
    for answer in answers {
        let key = (answer.id.as_str(), answer.turn);
        if !prompts.contains(&key) {
            prompts.push(key);
        }
    }
    for (id, turn) in prompts {
        let mut own: Vec<&Answer> = answers
            .iter()
            .filter(|a| a.id == id && a.turn == turn)
            .collect();
        let rank = |a: &Answer| header.contenders.iter().position(|c| c.name == a.contender);
        own.sort_by_key(|a| rank(a));
        if let Some(answer) = own.first() {
            text += &format!("{id}: {}\n\n", one_line(&answer.prompt, 200));
        }
        let mut columns = Columns::default();
        columns.add("policy", false, &own, |a| a.contender.clone());
        columns.add("answer", false, &own, |a| one_line(&a.answer, 100));
        columns.add("tokens", true, &own, |a| a.tokens.generated.to_string());
        columns.add("first other token", true, &own, |a| {
            let distance = a.distance.as_ref();
            distance.map_or_else(String::new, |d| match d.first_differing {
                Some(i) => i.to_string(),
                None => "-".into(),
            })
        });
        text += &format!("{}\n\n", columns.table());
    }
    write(&text)
}

/// What fits a table: no line ends, no bars, not too long.
fn one_line(text: &str, most: usize) -> String {
    let line: String = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let line = line.replace('|', "\\|");
    match line.char_indices().nth(most) {
        Some((at, _)) => format!("{}...", &line[..at]),
        None => line,
    }
}

pub fn summary_text(header: &Header, summary: &Summary) -> String {
    let rows: Vec<&Row> = summary.overall().collect();
    let asked = header.questions.n;
    let mut text = format!(
        "{} on {}: {asked} question{}\n\n",
        header.model.file,
        header.questions.file.file,
        if asked == 1 { "" } else { "s" }
    );
    text += &format!("{}\n", overall(&rows, asked, first_name(header)));
    let tasks = by_task(summary, &rows);
    if !tasks.is_empty() {
        text += &format!("\n{tasks}\n");
    }
    let mut add = |list: &[Comparison]| {
        if !list.is_empty() {
            text += &format!("\n{}\n", comparisons(list));
        }
    };
    add(&summary.against_first);
    add(&summary.at_budget);
    text
}

fn first_name(header: &Header) -> &str {
    header.contenders.first().map_or("", |c| c.name.as_str())
}

pub fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

/// `96.7 (90.6 to 98.9)`
fn accuracy(row: &Row) -> String {
    match (row.accuracy, row.low, row.high) {
        (Some(share), Some(low), Some(high)) => {
            with_interval(share, Some(Interval { low, high }), percent)
        }
        _ => String::new(),
    }
}

/// `0.0123 (0.0101 to 0.0150)`
pub fn with_interval(
    value: f64,
    interval: Option<Interval>,
    show: impl Fn(f64) -> String,
) -> String {
    let interval = interval.map(|i| format!(" ({} to {})", show(i.low), show(i.high)));
    format!("{}{}", show(value), interval.unwrap_or_default())
}

pub fn shown(value: Option<f64>, show: impl Fn(f64) -> String) -> String {
    value.map_or_else(String::new, show)
}

fn overall(rows: &[&Row], asked: usize, first: &str) -> Table {
    let mib = |bytes: f64| format!("{:.2}", bytes / f64::from(1 << 20));
    let mut columns = Columns::default();
    columns.add("policy", false, rows, |r| r.contender.clone());
    columns.add("answered", true, rows, |r| match r.n == asked {
        true => String::new(),
        false => r.n.to_string(),
    });
    columns.add("right", true, rows, |r| match r.scored {
        0 => String::new(),
        _ => r.right.to_string(),
    });
    columns.add("% (95 % interval)", true, rows, |r| accuracy(r));
    columns.add("ANLS", true, rows, |r| shown(r.anls, |x| format!("{x:.3}")));
    columns.add("facts %", true, rows, |r| shown(r.recall, percent));
    columns.add("true %", true, rows, |r| shown(r.precision, percent));
    columns.add(&format!("of {first}'s facts %"), true, rows, |r| {
        shown(r.facts_kept, percent)
    });
    columns.add(&format!("as {first} %"), true, rows, |r| {
        shown(r.agreement, percent)
    });
    columns.add("cells end", true, rows, |r| format!("{:.0}", r.cells_end));
    columns.add("decoding", true, rows, |r| {
        format!("{:.0}", r.cells_peak_decoding)
    });
    columns.add("peak", true, rows, |r| format!("{:.0}", r.cells_peak));
    columns.add("KV used MiB", true, rows, |r| mib(r.bytes_in_use));
    columns.add("KV alloc MiB", true, rows, |r| mib(r.bytes_allocated_peak));
    columns.add(&format!("KV / {first}"), true, rows, |r| {
        shown(r.kv_of_first, |x| format!("{x:.2}"))
    });
    columns.add("TTFT ms", true, rows, |r| {
        shown(r.ttft_ms, |x| format!("{x:.1}"))
    });
    columns.add("TPOT ms", true, rows, |r| {
        shown(r.tpot_ms, |x| format!("{x:.2}"))
    });
    columns.add("KL mean", true, rows, |r| {
        shown(r.kl_mean, |x| format!("{x:.4}"))
    });
    columns.add("median", true, rows, |r| {
        shown(r.kl_median, |x| format!("{x:.4}"))
    });
    columns.add("p99", true, rows, |r| {
        shown(r.kl_p99, |x| format!("{x:.3}"))
    });
    columns.add("top-1 %", true, rows, |r| shown(r.top1, percent));
    columns.add("PPL ratio", true, rows, |r| {
        shown(r.ppl_ratio, |x| format!("{x:.3}"))
    });
    columns.add("attention lost %", true, rows, |r| {
        shown(r.attention_lost, percent)
    });
    columns.table()
}

/// With more columns than this, a table by task leaves the intervals out.
const WITH_INTERVALS: usize = 4;

/// A row for each task, a column for each contender; empty where there is one task only.
fn by_task(summary: &Summary, overall: &[&Row]) -> String {
    let mut tasks: Vec<&str> = summary.rows.iter().map(|r| r.task.as_str()).collect();
    tasks.retain(|&task| task != ALL);
    tasks.dedup();
    let cell = |task: &str, contender: &str| {
        let mut rows = summary.rows.iter();
        rows.find(|r| r.task == task && r.contender == contender)
    };
    let scored = |row: &Row| row.accuracy.or(row.recall).is_some();
    tasks.retain(|&task| summary.rows.iter().any(|r| r.task == task && scored(r)));
    if tasks.len() < 2 {
        return String::new();
    }
    let mut columns = Columns::default();
    columns.add("task, % right", false, &tasks, |task| (*task).to_owned());
    columns.add("n", true, &tasks, |task| {
        let first = overall.first().and_then(|r| cell(task, &r.contender));
        first.map_or_else(String::new, |r| r.n.to_string())
    });
    for contender in overall {
        columns.add(&contender.contender, true, &tasks, |task| {
            let row = cell(task, &contender.contender);
            row.map_or_else(String::new, |r| match r.recall {
                Some(recall) if r.accuracy.is_none() => percent(recall),
                _ if overall.len() > WITH_INTERVALS => shown(r.accuracy, percent),
                _ => accuracy(r),
            })
        });
    }
    columns.table().to_string()
}

fn comparisons(list: &[Comparison]) -> Table {
    let points = |x: f64| format!("{:+.1}", 100.0 * x);
    let mut columns = Columns::default();
    columns.add("policy", false, list, |c| c.second.clone());
    columns.add("against", false, list, |c| c.first.clone());
    columns.add("of", false, list, |c| match c.measure {
        Measure::Accuracy => format!("{} answers", c.n),
        Measure::Facts => format!("facts of {} stories", c.n),
    });
    columns.add("points", true, list, |c| points(c.difference));
    columns.add("95 % interval", true, list, |c| match (c.low, c.high) {
        (Some(low), Some(high)) => format!("{} to {}", points(low), points(high)),
        _ => String::new(),
    });
    columns.add("only there / here right", true, list, |c| {
        match (c.only_first, c.only_second) {
            (Some(first), Some(second)) => format!("{first} / {second}"),
            _ => String::new(),
        }
    });
    columns.add("p", true, list, |c| small(c.p));
    columns.add("p (Holm)", true, list, |c| small(c.p_holm));
    columns.add(&format!("difference at {LEVEL}"), false, list, |c| {
        match c.verdict {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::None => "none shown",
        }
        .to_owned()
    });
    columns.table()
}

fn small(p: f64) -> String {
    match p {
        p if p < 0.0001 => "< 0.0001".into(),
        p => format!("{p:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_fit_into_a_cell() {
        assert_eq!(one_line(" a\nb | c ", 20), "a b \\| c");
        assert_eq!(one_line("äbcdef", 3), "äbc...");
    }
}
