//! Which layers' attention is read: `--score-layers`.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Layers whose attention is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layers {
    /// Every layer of the model.
    All,
    /// These, from 0, in any order.
    List(Vec<u32>),
}

impl Layers {
    /// The layers by number, sorted and unique.
    pub fn resolve(&self, n_layer: u32) -> Vec<u32> {
        match self {
            Layers::All => (0..n_layer).collect(),
            Layers::List(list) => {
                let mut list = list.clone();
                list.sort_unstable();
                list.dedup();
                list
            }
        }
    }

    /// # Errors
    /// [`Error::Option`] for no layer at all, or one that the model does not have.
    pub(in crate::policy) fn check(&self, n_layer: u32) -> Result<()> {
        const FLAG: &str = "score_layers";
        let Layers::List(list) = self else {
            return Ok(());
        };
        if list.is_empty() {
            return Err(Error::option(FLAG, "no layer, expected at least one"));
        }
        if let Some(layer) = list.iter().find(|&&layer| layer >= n_layer) {
            let last = n_layer.saturating_sub(1);
            let reason = format!("layer {layer}, but the model's layers are 0 to {last}");
            return Err(Error::option(FLAG, reason));
        }
        Ok(())
    }
}

/// As it is read: `all`, or a list with spans.
impl std::fmt::Display for Layers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Layers::List(list) = self else {
            return f.write_str("all");
        };
        let mut list = list.clone();
        list.sort_unstable();
        list.dedup();
        let spans = list.chunk_by(|a, b| a + 1 == *b).map(|span| match span {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        });
        f.write_str(&spans.collect::<Vec<_>>().join(","))
    }
}

/// `all`, or numbers and inclusive spans: `0`, `4,7`, `0-3,30`.
impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // No model has more; the bound keeps a span from becoming a huge list.
        const MOST: u32 = 4096;
        let number = |part: &str| match part.trim().parse() {
            Ok(n) if n < MOST => Ok(n),
            _ => Err(format!(
                "{part:?} is no layer, expected all or a list such as 0,4-7"
            )),
        };
        if text.trim() == "all" {
            return Ok(Layers::All);
        }
        let mut list = Vec::new();
        for part in text.split(',') {
            match part.split_once('-') {
                Some((from, to)) => {
                    let (from, to) = (number(from)?, number(to)?);
                    if from > to {
                        return Err(format!("{part:?} runs backwards, expected {to}-{from}"));
                    }
                    list.extend(from..=to);
                }
                None => list.push(number(part)?),
            }
        }
        Ok(Layers::List(list))
    }
}
