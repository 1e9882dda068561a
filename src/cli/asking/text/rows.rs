//! Rows of several runs that can be put side by side: each says under which flags it came about.

use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Reader;
use crate::cli::asking::print::{Format, write};
use hae::asker::Contender;
use hae::llama::ContextOptions;

impl Reader {
    /// A contender's row, in JSON, with what it ran under.
    pub fn row(&self, contender: &Contender, row: &impl Serialize) -> Result<Value> {
        let cache = self.loaded.asker.cache(contender)?;
        let record = &contender.record;
        let mut all = json!({
            "policy": record.policy,
            "budget": record.budget,
            "params": record.params,
            "type_k": cache.type_k,
            "type_v": cache.type_v,
            "attend": cache.attend,
        });
        add(&mut all, serde_json::to_value(row)?);
        Ok(all)
    }
}

/// The row of each contender that has one, and the same in JSON.
pub fn rows<R: Serialize>(
    reader: &Reader,
    of: impl Fn(&str) -> Option<R>,
) -> Result<(Vec<R>, Vec<Value>)> {
    let (mut rows, mut shown) = (Vec::new(), Vec::new());
    for contender in &reader.contenders {
        if let Some(row) = of(&contender.record.name) {
            shown.push(reader.row(contender, &row)?);
            rows.push(row);
        }
    }
    Ok((rows, shown))
}

/// Of K and V in the full cache that is compared with.
pub fn types(reference: &ContextOptions) -> Value {
    json!({
        "type_k": reference.type_k.name(),
        "type_v": reference.type_v.name(),
    })
}

fn add(to: &mut Value, from: Value) {
    let none = Map::new;
    let from = match from {
        Value::Object(from) => from,
        _ => none(),
    };
    if let Value::Object(to) = to {
        to.extend(from);
    }
}

/// Prints rows `[contenders]`: as a table, all as one object, or each with the header's fields by
/// itself.
pub fn print(
    format: Format,
    header: &Value,
    rows: &[Value],
    windows: &impl Serialize,
    table: &comfy_table::Table,
) -> Result<()> {
    let text = match format {
        // A row has an interval within it, which is no cell: csv is refused before.
        Format::Md | Format::Csv => format!("{table}\n"),
        Format::Json => {
            let all = json!({ "header": header, "windows": windows, "summary": rows });
            format!("{}\n", serde_json::to_string_pretty(&all)?)
        }
        Format::Jsonl => {
            let mut text = String::new();
            for row in rows {
                let mut all = header.clone();
                add(&mut all, row.clone());
                text += &format!("{}\n", serde_json::to_string(&all)?);
            }
            text
        }
    };
    write(&text)
}

pub fn four(value: f64) -> String {
    format!("{value:.4}")
}
