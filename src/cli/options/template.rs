//! Which chat template puts roles around what is said.

use hae::prompt::Template;

#[derive(Debug, clap::Args)]
pub struct TemplateArgs {
    /// Name or text of a chat template that llama.cpp knows [default: the model's own]
    #[arg(long, value_name = "TEMPLATE", hide_short_help = true)]
    chat_template: Option<String>,
    /// -no-cnv: use no chat template. Prompts go in as they are
    #[arg(
        long,
        alias = "no-cnv",
        hide_short_help = true,
        conflicts_with = "chat_template"
    )]
    no_conversation: bool,
}

impl TemplateArgs {
    /// What was asked for.
    pub fn template(&self) -> Template {
        match &self.chat_template {
            _ if self.no_conversation => Template::Raw,
            Some(name) => Template::Named(name.clone()),
            None => Template::Model,
        }
    }
}
