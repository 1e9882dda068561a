//! A chat template's own language, as transformers runs it (`_compile_jinja_template` and
//! `apply_chat_template` in its chat_template_utils.py): the same text comes out.
//!
//! Templates come with models from strangers. They see the conversation and nothing else, and what
//! they may compute and write is bounded. One way around that is known: a list that is added to itself
//! more than thirty times is made by the crate before anything is counted.

mod python;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::sync::LazyLock;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use regex::Regex;
use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};
use crate::guard::guarded;

/// What a template computes without any text to render: steps, and pieces of 64 bytes that it makes.
const FUEL: u64 = 2_000_000;
/// And for each byte that it is given.
const FUEL_PER_BYTE: u64 = 8;
/// Macros within macros, loops that call themselves.
const MOST_DEEP: usize = 100;
/// Bytes of a template. Published ones have up to 30,000.
const MOST_TEXT: usize = 128 << 10;
/// Bytes of the stack that one is read with, for each of its own: what stands within each other in it may
/// be as deep as it is long.
const STACK_PER_BYTE: usize = 2 << 10;
/// And without any.
const STACK: usize = 256 << 10;
/// Characters of what a template says is wrong.
const MOST_SAID: usize = 300;

const NAME: &str = "chat_template";

/// A compiled template.
#[derive(Clone)]
pub(super) struct Jinja {
    environment: Environment<'static>,
}

/// What a template is given.
pub(super) struct Given<'a> {
    pub messages: &'a [Json],
    pub tools: Option<&'a Json>,
    /// Each under its own name; an earlier one goes over a later one.
    pub more: &'a [&'a Map<String, Json>],
    pub bos: &'a str,
    pub eos: &'a str,
    pub add_generation_prompt: bool,
    pub now: SystemTime,
}

/// What a template says by `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl Jinja {
    /// # Errors
    /// [`Error::Option`] for a text that is no template.
    pub fn compile(text: &str) -> Result<Self> {
        if text.len() > MOST_TEXT {
            let reason = format!("{} bytes, expected at most {MOST_TEXT}", text.len());
            return Err(Error::option(NAME, reason));
        }
        let text = as_jinja2_reads(text);
        let text_bytes = text.len();
        let compile = || {
            guarded(|| {
                let mut environment = environment()?;
                environment.add_template_owned(NAME, text)?;
                Ok(environment)
            })
        };
        let compiled = std::thread::scope(|scope| {
            let stack = STACK + text_bytes * STACK_PER_BYTE;
            let own = std::thread::Builder::new().stack_size(stack);
            let thread = own.spawn_scoped(scope, compile).ok()?;
            thread.join().ok().flatten()
        });
        match compiled {
            Some(Ok(environment)) => Ok(Jinja { environment }),
            Some(Err(error)) => Err(told(&error)),
            None => Err(Error::option(NAME, "it cannot be read")),
        }
    }

    /// # Errors
    /// [`Error::Option`] with what the template raised, or what is wrong with it.
    pub fn render(&self, given: &Given<'_>) -> Result<String> {
        let mut all = Map::new();
        let own = [
            ("messages", Json::Array(given.messages.to_vec())),
            ("tools", given.tools.cloned().unwrap_or_default()),
            ("documents", Json::Null),
            ("bos_token", given.bos.into()),
            ("eos_token", given.eos.into()),
        ];
        all.extend(own.map(|(name, value)| (name.to_owned(), value)));
        for more in given.more.iter().rev() {
            all.extend(
                more.iter()
                    .map(|(name, value)| (name.clone(), value.clone())),
            );
        }
        let open = given.add_generation_prompt;
        all.insert("add_generation_prompt".to_owned(), open.into());
        let bytes = serde_json::to_string(&all).map_or(0, |text| text.len());
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(
            FUEL.saturating_add(bytes.saturating_mul(FUEL_PER_BYTE)),
        ));
        let now = given.now;
        environment.add_function("strftime_now", move |format: &str| {
            python::strftime(now, format)
        });
        let rendered = guarded(|| {
            let template = environment.get_template(NAME)?;
            template.render(Serde(&all))
        });
        match rendered {
            Some(Ok(text)) => Ok(text),
            Some(Err(error)) => Err(told(&error)),
            None => Err(Error::option(NAME, "it cannot be rendered")),
        }
    }
}

/// A template's text, with the line ends that Jinja2 reads it with. `{% generation %}`, which
/// transformers has for training, marks what is between and writes nothing.
fn as_jinja2_reads(text: &str) -> String {
    static GENERATION: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").ok());
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let Some(generation) = &*GENERATION else {
        return text;
    };
    let text = generation.replace_all(&text, |found: &regex::Captures<'_>| {
        let word = match found.get(2) {
            Some(_) => "endif",
            None => "if true",
        };
        format!("{{%{} {word} {}%}}", &found[1], &found[3])
    });
    match text {
        Cow::Borrowed(text) => text.to_owned(),
        Cow::Owned(text) => text,
    }
}

/// As transformers makes its own: two settings, a `tojson` that is Python's, and two functions.
fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_recursion_limit(MOST_DEEP);
    let mut syntax = SyntaxConfig::builder();
    environment.set_syntax(syntax.trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(python::write);
    environment.add_filter("tojson", python::to_json);
    environment.add_test("sequence", python::is_sequence);
    environment.add_test("iterable", python::is_iterable);
    environment.add_function(
        "raise_exception",
        |said: String| -> Result<Value, minijinja::Error> {
            let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
            Err(error.with_source(Raised(said)))
        },
    );
    Ok(environment)
}

fn told(error: &minijinja::Error) -> Error {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(Raised(said)) = error.downcast_ref() {
            return Error::option(NAME, format!("the template says: {}", one_line(said)));
        }
        source = error.source();
    }
    let reason = match error.kind() {
        ErrorKind::OutOfFuel => "it computes or writes too much".to_owned(),
        _ => one_line(&error.to_string()),
    };
    Error::option(NAME, reason)
}

fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(MOST_SAID).collect()
}
