//! What answers must keep to: llama.cpp's grammars and JSON schemas.

use std::path::PathBuf;

use serde_json::Value;

use super::super::inputs;
use hae::Error;
use hae::constrain::Grammar;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sampling")]
#[group(multiple = false)]
pub struct ConstraintArgs {
    /// Keep answers to a grammar in llama.cpp's GBNF, or in Lark after a line %llguidance
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    grammar: Option<String>,
    /// The same, its text from FILE
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    grammar_file: Option<PathBuf>,
    /// Keep answers to JSON that this schema describes; {} is any
    #[arg(short, long, value_name = "JSON", hide_short_help = true)]
    json_schema: Option<String>,
    /// -jf: the same, the schema from FILE
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    json_schema_file: Option<PathBuf>,
}

impl ConstraintArgs {
    /// What was asked for.
    ///
    /// # Errors
    /// Those of the file; [`Error::Option`] for what is no grammar, or no schema.
    pub fn grammar(&self) -> hae::Result<Option<Grammar>> {
        let schema = |flag, text: &str| {
            let schema: Value = serde_json::from_str(text)
                .map_err(|e| Error::option(flag, format!("no JSON: {e}")))?;
            Grammar::json_schema(&schema)
        };
        Ok(Some(match self {
            ConstraintArgs {
                grammar: Some(text),
                ..
            } => Grammar::gbnf(text)?,
            ConstraintArgs {
                grammar_file: Some(path),
                ..
            } => Grammar::gbnf(&inputs::text(path)?)?,
            ConstraintArgs {
                json_schema: Some(text),
                ..
            } => schema("--json-schema", text)?,
            ConstraintArgs {
                json_schema_file: Some(path),
                ..
            } => schema("--json-schema-file", &inputs::text(path)?)?,
            _ => return Ok(None),
        }))
    }
}
