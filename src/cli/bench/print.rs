//! Results in llama-bench's formats. Rows go out as they are measured, but for the table, whose
//! columns follow from all of them.

use std::io::Write;

use anyhow::Context;
use clap::ValueEnum;
use comfy_table::Table;
use serde_json::Value;

use super::super::table::Columns;
use hae::Error;
use hae::bench::stats::Summary;
use hae::bench::{Field, Kind, METRICS, Record, Sample};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Md,
    Csv,
    Json,
    Jsonl,
    Sql,
}

/// The name of the SQL table.
const TABLE: &str = "hae_bench";

pub struct Printer<W> {
    out: W,
    format: Format,
    /// Rows that are out.
    n: usize,
    /// For the table.
    held: Vec<Record>,
}

impl<W: Write> Printer<W> {
    pub fn new(format: Format, out: W) -> Self {
        Printer {
            out,
            format,
            n: 0,
            held: Vec::new(),
        }
    }

    pub fn row(&mut self, record: Record) -> anyhow::Result<()> {
        let text = match self.format {
            Format::Md => {
                self.held.push(record);
                return Ok(());
            }
            Format::Csv => csv(&record.fields(), self.n == 0)?,
            Format::Json => {
                let before = if self.n == 0 { "[\n" } else { ",\n" };
                let text = serde_json::to_string_pretty(&record.to_json())?;
                format!("{before}{text}")
            }
            Format::Jsonl => format!("{}\n", record.to_json()),
            Format::Sql => sql(&record.fields(), self.n == 0),
        };
        self.n += 1;
        self.write(&text)
    }

    pub fn has_rows(&self) -> bool {
        self.n > 0 || !self.held.is_empty()
    }

    /// What closes the output, also of a run that did not come to its end.
    pub fn end(&mut self) -> anyhow::Result<()> {
        let text = match self.format {
            Format::Json if self.n == 0 => "[]\n".to_owned(),
            Format::Json => "\n]\n".to_owned(),
            Format::Md if !self.held.is_empty() => format!("{}\n", table(&self.held)),
            _ => return Ok(()),
        };
        self.write(&text)
    }

    fn write(&mut self, text: &str) -> anyhow::Result<()> {
        let written = self.out.write_all(text.as_bytes());
        written.and_then(|()| self.out.flush()).context("stdout")
    }
}

/// A value without JSON's quotes; objects keep them.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn csv(fields: &[Field], header: bool) -> anyhow::Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    if header {
        writer.write_record(fields.iter().map(|f| f.name.as_str()))?;
    }
    writer.write_record(fields.iter().map(|f| plain(&f.value)))?;
    Ok(String::from_utf8(
        writer
            .into_inner()
            .map_err(|e| Error::option("-o", e.to_string()))?,
    )?)
}

fn sql(fields: &[Field], header: bool) -> String {
    let list = |of: &dyn Fn(&Field) -> String| fields.iter().map(of).collect::<Vec<_>>().join(", ");
    let columns = list(&|f| {
        let kind = match f.kind {
            Kind::Text => "TEXT",
            Kind::Integer => "INTEGER",
            Kind::Real => "REAL",
        };
        format!("{} {kind}", f.name)
    });
    let values = list(&|f| match (&f.value, f.kind) {
        (Value::Null, _) => "NULL".into(),
        (value, Kind::Text) => format!("'{}'", plain(value).replace('\'', "''")),
        (value, _) => plain(value),
    });
    let names = list(&|f| f.name.clone());
    let table = match header {
        true => format!("CREATE TABLE IF NOT EXISTS {TABLE} ({columns});\n"),
        false => String::new(),
    };
    format!("{table}INSERT INTO {TABLE} ({names}) VALUES ({values});\n")
}

fn table(records: &[Record]) -> Table {
    let mut columns = Columns::default();
    let mut add = |title: &str, right: bool, of: &dyn Fn(&Record) -> String| {
        columns.add(title, right, records, of);
    };
    let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30));
    add("model", false, &|r| r.model.description.clone());
    add("size", true, &|r| gib(r.model.bytes));
    add("params", true, &|r| params(r.model.n_params));
    add("backend", false, &|r| r.hardware.backends.clone());
    // As in llama-bench, settings only where they are compared.
    for name in [
        "n_gpu_layers",
        "n_threads",
        "poll",
        "n_batch",
        "n_ubatch",
        "type_k",
        "type_v",
        "flash_attn",
    ] {
        let value = |r: &Record| {
            let field = r.fields().into_iter().find(|field| field.name == name);
            field.map_or_else(String::new, |field| match &field.value {
                Value::Null => "auto".into(),
                value => plain(value),
            })
        };
        if records.iter().any(|r| value(r) != value(&records[0])) {
            add(name, false, &value);
        }
    }
    add("kv policy", false, &|r| r.policy.to_owned());
    add("attended", true, &|r| {
        let shares = r.attended();
        shares.map_or_else(String::new, |shares| format!("{:.2}", shares.all))
    });
    add("test", false, &|r| r.test.name());
    for metric in &METRICS {
        let title = match metric.name {
            "prompt_tokens_per_s" => "prompt t/s".to_owned(),
            "gen_tokens_per_s" => "gen t/s".to_owned(),
            "ttft_ms" => "TTFT ms".to_owned(),
            "tpot_ms" => "TPOT ms".to_owned(),
            "joules" => "J".to_owned(),
            name => name.replace('_', " "),
        };
        add(&title, true, &|r| shown(r.summary(metric.of)));
    }
    let first = records.iter().find_map(|r| r.first.as_ref());
    if let Some((name, _)) = first {
        add(&format!("TTFT / {name}"), true, &|r| {
            ratio(r.ratio(|s| s.ttft().map(|d| d.as_secs_f64())))
        });
        add(&format!("TPOT / {name}"), true, &|r| {
            ratio(r.ratio(|s| s.tpot().map(|d| d.as_secs_f64())))
        });
        add(&format!("total / {name}"), true, &|r| {
            ratio(r.ratio(|s| s.ttft().map(|_| s.total().as_secs_f64())))
        });
    }
    let mib = |of: fn(&Sample) -> u64| {
        move |r: &Record| {
            let bytes = r.summary(|s| Some(of(s) as f64)).map_or(0.0, |s| s.median);
            format!("{:.2}", bytes / f64::from(1 << 20))
        }
    };
    add("KV used MiB", true, &mib(Sample::bytes_in_use));
    add("KV peak MiB", true, &mib(Sample::bytes_peak));
    add("KV alloc MiB", true, &mib(|s| s.allocated_peak));
    add("peak RSS MiB", true, &|r| {
        r.peak_rss()
            .map_or_else(String::new, |b| (b >> 20).to_string())
    });
    columns.table()
}

fn params(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.2} B", n as f64 / 1e9),
        _ => format!("{:.2} M", n as f64 / 1e6),
    }
}

/// The median, and half the distance of the quartiles.
fn shown(summary: Option<Summary>) -> String {
    summary.map_or_else(String::new, |s| {
        format!("{:.2} ± {:.2}", s.median, (s.q3 - s.q1) / 2.0)
    })
}

/// A question mark where the quartiles lie on both sides of 1.
fn ratio(summary: Option<Summary>) -> String {
    summary.map_or_else(String::new, |s| {
        let doubt = if s.q1 < 1.0 && s.q3 > 1.0 { " ?" } else { "" };
        format!("{:.2}{doubt}", s.median)
    })
}
