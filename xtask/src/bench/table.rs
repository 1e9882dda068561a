//! Tables: medians and ratios of the results, one row for each combination of the fields that the plan
//! names.

use std::fmt::Write;

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use super::plan::{Column, Table, plain};
use super::results::Line;
use crate::median::median;

/// One measurement of one program.
struct Sample<'a> {
    row: Map<String, Value>,
    /// Round, and which repetition within it.
    round: (usize, usize),
    line: &'a Line,
}

/// What can be shown of a part: all samples, and how fast the threads read memory meanwhile.
pub struct Samples<'a> {
    all: Vec<Sample<'a>>,
    /// Rounds and bytes a second.
    read: Vec<(usize, f64)>,
}

impl<'a> Samples<'a> {
    /// Of lines in the order of the plan's runs.
    pub fn new(lines: &[&'a Line]) -> Self {
        let mut samples = Samples {
            all: Vec::new(),
            read: Vec::new(),
        };
        for &line in lines {
            for row in &line.rows {
                samples.add(line, row);
            }
        }
        samples
    }

    fn add(&mut self, line: &'a Line, row: &Value) {
        if let Some(rate) = row.get("read_bytes_per_s").and_then(Value::as_f64) {
            self.read.push((line.round, rate));
            return;
        }
        let mut fields = row.as_object().cloned().unwrap_or_default();
        for (key, value) in &line.fields {
            fields.insert(key.clone(), value.clone().into());
        }
        // A policy that looks cells up is another one than it is without.
        if let Some(policy) = row.get("kv_policy").and_then(Value::as_str) {
            let looks = row.get("attend").is_some_and(looks);
            let policy = format!("{policy}{}", if looks { " --attend" } else { "" });
            fields.insert("policy".into(), policy.into());
        }
        let lists = row.get("samples").and_then(Value::as_object);
        let lists = lists.into_iter().flat_map(|lists| lists.values());
        let n = lists.filter_map(|list| Some(list.as_array()?.len())).max();
        for i in 0..n.unwrap_or(1) {
            self.all.push(Sample {
                row: fields.clone(),
                round: (line.round, i),
                line,
            });
        }
    }

    /// The figure of this name; `None`: it has none.
    fn figure(&self, sample: &Sample, name: &str) -> Option<f64> {
        let number = |name: &str| sample.row.get(name).and_then(Value::as_f64);
        match name {
            // All weights, and K and V of the cells in view, which grow by one a token.
            "token_bytes" => {
                let (cells, tokens) = (number("kv_cells_end")?, number("n_gen")?);
                let in_view = 1.0 - tokens / 2.0 / cells;
                Some(number("model_size")? + number("kv_bytes_in_use")? * in_view)
            }
            "token_bytes_per_s" => {
                let ms = self.figure(sample, "tpot_ms")?;
                Some(self.figure(sample, "token_bytes")? / ms * 1e3)
            }
            "bandwidth_share" => {
                Some(self.figure(sample, "token_bytes_per_s")? / self.read_in(sample.round.0)?)
            }
            _ => match sample.row.get("samples").and_then(|lists| lists.get(name)) {
                Some(list) => list.get(sample.round.1)?.as_f64(),
                None => number(name),
            },
        }
    }

    /// Bytes a second that were read in this round, else over all of them.
    fn read_in(&self, round: usize) -> Option<f64> {
        let of = |all: bool| {
            let rates = self.read.iter().filter(|(at, _)| all || *at == round);
            median(rates.map(|(_, rate)| *rate).collect())
        };
        of(false).or_else(|| of(true))
    }

    /// Markdown, without what stands below it. `None`: not one row.
    ///
    /// # Errors
    /// When the plan does not say which of several results a column shows.
    pub fn markdown(&self, table: &Table) -> Result<Option<String>> {
        let mut rows: Vec<Vec<(&str, Value)>> = Vec::new();
        for sample in &self.all {
            let key = table.rows.iter().map(|name| {
                let value = sample.row.get(name).filter(|value| !value.is_null());
                Some((&**name, value?.clone()))
            });
            if let Some(key) = key.collect::<Option<Vec<_>>>()
                && !rows.contains(&key)
            {
                rows.push(key);
            }
        }
        let mut out = String::new();
        let heads = table.rows.iter().map(|name| head(name));
        let heads = heads.chain(table.columns.iter().map(|column| &*column.head));
        let heads: Vec<&str> = heads.collect();
        writeln!(out, "| {} |", heads.join(" | "))?;
        writeln!(out, "|{}", "---|".repeat(heads.len()))?;
        let empty = out.len();
        for row in rows {
            let cells = table.columns.iter().map(|column| {
                self.cell(column, &row).map_err(|e| {
                    anyhow::anyhow!("table {}, column `{}`: {e}", table.name, column.head)
                })
            });
            let cells = cells.collect::<Result<Vec<_>>>()?;
            // Of results that belong to other rows, or are not there yet.
            if !cells.is_empty() && cells.iter().all(|cell| cell == "-") {
                continue;
            }
            let keys = row.iter().map(|(_, value)| text(value));
            let all: Vec<String> = keys.chain(cells).collect();
            writeln!(out, "| {} |", all.join(" | "))?;
        }
        Ok((out.len() > empty).then_some(out))
    }

    fn cell(&self, column: &Column, row: &[(&str, Value)]) -> Result<String> {
        let of = |sample: &Sample| {
            row.iter()
                .all(|(name, value)| sample.row.get(*name) == Some(value))
                && matches(sample, &column.of)
        };
        let Some(chosen) = self.choose(column, of)? else {
            return Ok("-".to_owned());
        };
        let values: Vec<f64> = match &column.to {
            None => chosen.values.iter().map(|(_, value)| *value).collect(),
            Some(to) => {
                let base = |sample: &Sample| {
                    let same = |(name, value): &(&str, Value)| {
                        let free = to.contains_key(*name) || column.best.as_deref() == Some(*name);
                        free || sample.row.get(*name) == Some(value)
                    };
                    row.iter().all(same) && matches(sample, to)
                };
                let Some(base) = self.choose(column, base)? else {
                    return Ok("-".to_owned());
                };
                // Of one round both saw the machine in the same state.
                let pairs = chosen.values.iter().filter_map(|(round, value)| {
                    let (_, base) = base.values.iter().find(|(at, _)| at == round)?;
                    Some(value / base)
                });
                pairs.collect()
            }
        };
        let Some(middle) = median(values.clone()) else {
            return Ok("-".to_owned());
        };
        let scale = column.unit.map_or(1.0, |unit| unit.divisor());
        let digits = match (column.digits, column.to.is_some()) {
            (Some(digits), _) => digits,
            (None, true) => 2,
            (None, false) => sensible_digits(middle / scale),
        };
        let mut cell = number(middle / scale, digits);
        if column.spread && values.len() > 1 {
            let (least, most) = values
                .iter()
                .fold((f64::INFINITY, 0f64), |(least, most), &v| {
                    (least.min(v), most.max(v))
                });
            let (least, most) = (number(least / scale, digits), number(most / scale, digits));
            write!(cell, " ({least} to {most})")?;
        }
        if let (true, Some(name)) = (column.named, &chosen.named) {
            write!(cell, " ({name})")?;
        }
        Ok(cell)
    }

    /// The figures of the results that `is` takes; of those that differ in the column's `best` field
    /// the ones with the smallest median.
    fn choose(&self, column: &Column, is: impl Fn(&Sample) -> bool) -> Result<Option<Chosen>> {
        let mut groups: Vec<(Value, Figures)> = Vec::new();
        for sample in self.all.iter().filter(|sample| is(sample)) {
            let Some(value) = self.figure(sample, &column.value) else {
                continue;
            };
            let best = column.best.as_ref().and_then(|name| sample.row.get(name));
            let best = best.cloned().unwrap_or_default();
            let at = groups
                .iter()
                .position(|(name, _)| *name == best)
                .unwrap_or_else(|| {
                    groups.push((best, Vec::new()));
                    groups.len() - 1
                });
            let group = &mut groups[at].1;
            if group.iter().any(|(round, _)| *round == sample.round) {
                let run = &sample.line.run;
                bail!(
                    "several results in one round of `{run}`: `of`, `to` or `rows` has to tell them apart"
                );
            }
            group.push((sample.round, value));
        }
        let middle = |values: &Figures| {
            median(values.iter().map(|(_, value)| *value).collect()).unwrap_or(f64::INFINITY)
        };
        groups.sort_by(|a, b| middle(&a.1).total_cmp(&middle(&b.1)));
        Ok(groups.into_iter().next().map(|(best, values)| Chosen {
            values,
            named: (!best.is_null()).then(|| match column.best.as_deref() {
                Some("flash_attn") => format!("`-fa {}`", plain_json(&best)),
                _ => text(&best),
            }),
        }))
    }
}

/// Rounds, as in [`Sample::round`], and what was measured in each.
type Figures = Vec<((usize, usize), f64)>;

struct Chosen {
    values: Figures,
    /// Which of several it is.
    named: Option<String>,
}

fn matches(sample: &Sample, fields: &toml::Table) -> bool {
    fields.iter().all(|(name, value)| {
        let has = sample.row.get(name).filter(|value| !value.is_null());
        has.is_some_and(|has| plain_json(has) == plain(value))
    })
}

fn plain_json(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Whether such an `attend` leaves anything out: a share of 1 is attention to everything.
fn looks(attend: &Value) -> bool {
    let amounts = ["vision", "text"].map(|kind| attend.get(kind));
    let mut amounts = amounts
        .into_iter()
        .flatten()
        .filter(|amount| !amount.is_null());
    amounts.any(|amount| amount.get("share").and_then(Value::as_f64) != Some(1.0))
}

/// The head of a column of a row's fields.
fn head(name: &str) -> &str {
    match name {
        "n_depth" => "depth",
        "run" | "line" => " ",
        other => other,
    }
}

/// A field as it stands in a table: flags in quotes, thousands apart.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => match text.parse::<u64>() {
            Ok(n) => number(n as f64, 0),
            Err(_) if text.starts_with('-') => format!("`{text}`"),
            Err(_) => text.replace('|', "\\|"),
        },
        Value::Number(n) if n.is_u64() => number(n.as_f64().unwrap_or_default(), 0),
        other => other.to_string(),
    }
}

fn sensible_digits(value: f64) -> usize {
    match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    }
}

/// `1,024.5`: thousands apart.
fn number(value: f64, digits: usize) -> String {
    let plain = format!("{value:.digits$}");
    let (whole, rest) = plain.split_at(plain.find('.').unwrap_or(plain.len()));
    let digits = whole.trim_start_matches('-');
    let mut out = whole[..whole.len() - digits.len()].to_owned();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out + rest
}

#[cfg(test)]
mod tests;
