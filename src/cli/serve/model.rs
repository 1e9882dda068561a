//! The chat template and the grammars of a model, as the HTTP interface asks for them.

use hae::constrain::{Grammar, Grammars};
use hae::engine::Constraint;
use hae::prompt::{ChatTemplate, Input};
use hae::serve::http::service::{Constrain, Render, Rule, Talk};

/// A model's chat template.
pub struct Template(pub ChatTemplate);

impl Render for Template {
    fn render(&self, talk: &Talk<'_>) -> hae::Result<String> {
        self.0.render(&Input {
            messages: talk.messages,
            tools: talk.tools,
            kwargs: talk.kwargs,
            add_generation_prompt: talk.add_generation_prompt,
            media: talk.media,
            now: None,
        })
    }

    fn text(&self) -> &str {
        self.0.text()
    }
}

/// Constraints over a model's vocabulary.
pub struct Rules(pub Grammars);

impl Constrain for Rules {
    fn constraint(&self, rule: &Rule<'_>) -> hae::Result<Box<dyn Constraint>> {
        let grammar = match rule {
            Rule::Grammar(text) => Grammar::gbnf(text)?,
            Rule::Schema(schema) => Grammar::json_schema(schema)?,
            Rule::Object => Grammar::json_object()?,
        };
        self.0.constraint(&grammar)
    }
}
