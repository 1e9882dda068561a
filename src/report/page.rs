//! The page around the sections.

use maud::{DOCTYPE, PreEscaped, html};

use super::{Results, Traced, overview, prompt};
use crate::error::Result;

const STYLE: &str = include_str!("style.css");

pub fn page(results: &[Results], traces: &[Traced]) -> Result<String> {
    let overviews = results.iter().map(overview::section);
    let overviews = overviews.collect::<Result<Vec<_>>>()?;
    let prompts = traces
        .iter()
        .enumerate()
        .map(|(i, traced)| prompt::section(traced, i));
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "hae report" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "KV cache policies: what they keep, and what it costs" }
                p.soft { "Made by hae " (env!("CARGO_PKG_VERSION")) ". This file needs no network." }
                @for section in overviews { (section) }
                @for section in prompts { (section) }
            }
        }
    };
    Ok(page.into_string())
}
