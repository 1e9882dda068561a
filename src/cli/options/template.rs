//! Which chat template puts roles around what is said.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::super::inputs;
use hae::Error;
use hae::prompt::{Source, Template};

#[derive(Debug, clap::Args)]
pub struct TemplateArgs {
    /// Chat template: a name that llama.cpp knows, or its text [default: the model's own]
    #[arg(long, value_name = "TEMPLATE", hide_short_help = true)]
    chat_template: Option<String>,
    /// The same, its text from FILE
    #[arg(
        long,
        value_name = "FILE",
        hide_short_help = true,
        conflicts_with = "chat_template"
    )]
    chat_template_file: Option<PathBuf>,
    /// What the template is given besides, as in {"enable_thinking": false}
    #[arg(long, value_name = "JSON", hide_short_help = true)]
    chat_template_kwargs: Option<String>,
    /// --jinja: run the template's text [the default]
    #[arg(long, hide_short_help = true, overrides_with = "no_jinja")]
    jinja: bool,
    /// Do not run it: llama.cpp's list of templates tells which one it is
    #[arg(long, hide_short_help = true, overrides_with = "jinja")]
    no_jinja: bool,
    /// -no-cnv: use no chat template. Prompts go in as they are
    #[arg(
        long,
        alias = "no-cnv",
        hide_short_help = true,
        conflicts_with_all = ["chat_template", "chat_template_file"]
    )]
    no_conversation: bool,
}

impl TemplateArgs {
    /// What was asked for.
    ///
    /// # Errors
    /// Those of the file, and [`Error::Option`] for what is no JSON object.
    pub fn template(&self) -> hae::Result<Template> {
        let source = match (&self.chat_template, &self.chat_template_file) {
            _ if self.no_conversation => Source::Raw,
            (Some(name), _) => Source::Named(name.clone()),
            (None, Some(path)) => Source::Named(inputs::text(path)?),
            (None, None) => Source::Model,
        };
        Ok(Template {
            source,
            jinja: !self.no_jinja,
            kwargs: self.kwargs()?,
        })
    }

    fn kwargs(&self) -> hae::Result<Map<String, Value>> {
        const FLAG: &str = "--chat-template-kwargs";
        let Some(text) = &self.chat_template_kwargs else {
            return Ok(Map::new());
        };
        match serde_json::from_str(text) {
            Ok(Value::Object(all)) => Ok(all),
            Ok(_) => Err(Error::option(
                FLAG,
                "no JSON object, expected one as in {\"enable_thinking\": false}",
            )),
            Err(e) => Err(Error::option(FLAG, format!("no JSON object: {e}"))),
        }
    }
}
