//! The chat template and the grammars of a model, as the HTTP interface asks for them.

use jiff::Zoned;
use serde_json::{Map, Value};

use hae::constrain::{Grammar, Grammars};
use hae::engine::Constraint;
use hae::prompt::{ChatTemplate, Input};
use hae::serve::http::service::{Constrain, Render, Rule, Talk};

/// A model's chat template, which is told the date as llama.cpp's server does.
pub struct Template {
    pub made: ChatTemplate,
    /// What it is given whatever a request says.
    pub kwargs: Map<String, Value>,
}

impl Template {
    /// What the request gives it, and what nobody has said otherwise.
    fn kwargs(&self, asked: Option<&Map<String, Value>>) -> Map<String, Value> {
        let now = Zoned::now();
        let mut kwargs = Map::new();
        for (name, format) in [("date_string", "%d %b %Y"), ("datetime", "%b %d %Y")] {
            if !self.kwargs.contains_key(name) {
                let date = now.strftime(format).to_string();
                kwargs.insert(name.to_owned(), date.into());
            }
        }
        kwargs.extend(
            asked
                .into_iter()
                .flatten()
                .map(|(k, v)| (k.clone(), v.clone())),
        );
        kwargs
    }
}

impl Render for Template {
    fn render(&self, talk: &Talk<'_>) -> hae::Result<String> {
        self.made.render(&Input {
            messages: talk.messages,
            tools: talk.tools,
            kwargs: Some(&self.kwargs(talk.kwargs)),
            add_generation_prompt: talk.add_generation_prompt,
            media: talk.media,
            now: None,
        })
    }

    fn text(&self) -> &str {
        self.made.text()
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
