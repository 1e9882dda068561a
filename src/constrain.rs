//! What an answer must keep to, by the crate llguidance: grammars, JSON schemas, regular expressions.
//!
//! A [`Grammar`] is read and checked without a model. [`Grammars`] know a model's vocabulary, and make a
//! [`Constraint`] of it for each answer: it tells which tokens may come, among all that the model
//! knows, and only tokens that end the answer once nothing else may.

mod gbnf;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use llguidance::api::{GrammarInit, ParserLimits, TopLevelGrammar, ValidationResult};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::engine::{Constraint, Token, Vocabulary};
use crate::error::{Error, Result};
use crate::guard::guarded;
use crate::llama::Model;
use gbnf::Converted;

/// What llama.cpp takes for a grammar in Lark: its first line.
const IS_LARK: &str = "%llguidance";

/// White space within JSON, as llama.cpp's own schemas have it: where it had no end, a small model would
/// write nothing else.
const SPACE: &str = r" |\n{1,2}[ \t]{0,20}";

/// Characters of what is wrong with a grammar.
const MOST_SAID: usize = 300;

/// What an answer must keep to, read and checked. Clones share it.
#[derive(Clone, Debug)]
pub struct Grammar(Arc<Read>);

#[derive(Debug)]
struct Read {
    /// The option that it came from.
    name: &'static str,
    grammar: TopLevelGrammar,
}

impl Grammar {
    fn checked(name: &'static str, grammar: TopLevelGrammar) -> Result<Self> {
        let init = GrammarInit::Serialized(grammar.clone());
        // Names of tokens are the model's: a grammar with some can only be checked with one.
        let valid = guarded(|| init.validate(None, limits()));
        match valid {
            Some(ValidationResult::Error(reason)) if !names_tokens(&grammar) => {
                Err(Error::option(name, one_line(&reason)))
            }
            None => Err(Error::option(name, "it cannot be read")),
            Some(_) => Ok(Grammar(Arc::new(Read { name, grammar }))),
        }
    }

    /// llama.cpp's own kind of grammar (GBNF), which begins with its rule `root`. One that begins with
    /// `%llguidance` is Lark, as in llama.cpp.
    ///
    /// # Errors
    /// [`Error::Option`] with the line of what is wrong.
    pub fn gbnf(text: &str) -> Result<Self> {
        if text.trim_start().starts_with(IS_LARK) {
            return Grammar::lark(text);
        }
        let grammar = match gbnf::converted(text)? {
            Converted::Regex(regex) => TopLevelGrammar::from_regex(&regex),
            Converted::Lark(lark) => TopLevelGrammar::from_lark(lark),
        };
        Grammar::checked("grammar", grammar)
    }

    /// llguidance's kind of Lark, which begins with its rule `start`.
    ///
    /// # Errors
    /// [`Error::Option`] with what is wrong.
    pub fn lark(text: &str) -> Result<Self> {
        Grammar::checked("grammar", TopLevelGrammar::from_lark(text.to_owned()))
    }

    /// JSON that a schema describes.
    ///
    /// # Errors
    /// [`Error::Option`] for what is no schema, or has what llguidance does not know.
    pub fn json_schema(schema: &Value) -> Result<Self> {
        const NAME: &str = "json_schema";
        let mut schema = schema.clone();
        match &mut schema {
            Value::Object(schema) => {
                let own = json!({"whitespace_pattern": SPACE});
                schema.entry("x-guidance").or_insert(own);
            }
            Value::Bool(true) => {}
            _ => return Err(Error::option(NAME, "no schema, expected a JSON object")),
        }
        Grammar::checked(NAME, TopLevelGrammar::from_json_schema(schema))
    }

    /// Any JSON object.
    ///
    /// # Errors
    /// None that is known.
    pub fn json_object() -> Result<Self> {
        Grammar::json_schema(&json!({"type": "object"}))
    }

    /// A regular expression that the whole answer matches.
    ///
    /// # Errors
    /// [`Error::Option`] with what is wrong.
    pub fn regex(text: &str) -> Result<Self> {
        Grammar::checked("regex", TopLevelGrammar::from_regex(text))
    }
}

/// A `<token>` of Lark's.
fn names_tokens(grammar: &TopLevelGrammar) -> bool {
    let text = |text: &String| text.contains('<');
    grammar
        .grammars
        .iter()
        .any(|g| g.lark_grammar.as_ref().is_some_and(text))
}

fn limits() -> ParserLimits {
    ParserLimits {
        // A grammar that goes over character by character looks at every token of a vocabulary so.
        step_max_items: 4_000_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

fn one_line(text: &str) -> String {
    let line = text.lines().find(|line| !line.trim().is_empty());
    line.unwrap_or_default()
        .trim()
        .chars()
        .take(MOST_SAID)
        .collect()
}

/// Constraints for the answers of one model. Clones share it.
#[derive(Clone)]
pub struct Grammars {
    factory: Arc<ParserFactory>,
    ends: Arc<[Token]>,
    n_vocab: usize,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars")
            .field("n_vocab", &self.n_vocab)
            .finish_non_exhaustive()
    }
}

impl Grammars {
    /// For this model. Reads its whole vocabulary: once for all answers.
    ///
    /// # Errors
    /// [`Error::Option`] for a model of whose tokens none ends an answer.
    pub fn of(model: &Model) -> Result<Self> {
        let n = model.n_vocab();
        let mut words = Vec::with_capacity(n);
        let mut ends = Vec::new();
        for token in 0..Token::try_from(n).unwrap_or(Token::MAX) {
            let mut word = Vec::new();
            let is_end = model.is_eog(token);
            if is_end {
                ends.push(token);
            }
            if is_end || model.is_control(token) {
                // No text is one of these: the crate's mark of a special token.
                word.push(TokTrie::SPECIAL_TOKEN_MARKER);
                word.extend(model.name_of(token).into_bytes());
            } else {
                model.piece(token, &mut word)?;
            }
            words.push(word);
        }
        // The one that ends a text first, where several end an answer.
        if let Some(eos) = model.eos()
            && let Some(at) = ends.iter().position(|&end| end == eos)
        {
            ends.swap(0, at);
        }
        Grammars::of_words(&words, &ends)
    }

    /// For a vocabulary of these texts, by token, some of which end an answer.
    ///
    /// # Errors
    /// [`Error::Option`] where none does.
    pub fn of_words(words: &[Vec<u8>], ends: &[Token]) -> Result<Self> {
        let bad = |reason: String| Error::option("grammar", reason);
        let ids: Vec<u32> = ends
            .iter()
            .filter_map(|&end| u32::try_from(end).ok())
            .collect();
        let Some(&eos) = ids.first() else {
            return Err(bad("no token of the model ends an answer".into()));
        };
        let n = u32::try_from(words.len()).unwrap_or(u32::MAX);
        let made = guarded(|| {
            let trie = TokTrie::from(&TokRxInfo::new(n, eos), words).with_eos_tokens(&ids);
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            ParserFactory::new_simple(&env)
        });
        let mut factory = made
            .ok_or_else(|| bad("the model's vocabulary cannot be read".into()))?
            .map_err(|e| bad(one_line(&e.to_string())))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Grammars {
            factory: Arc::new(factory),
            ends: ends.into(),
            n_vocab: words.len(),
        })
    }

    /// For one answer.
    ///
    /// # Errors
    /// [`Error::Option`] for a grammar that this vocabulary cannot keep to.
    pub fn constraint(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>> {
        let Read { name, grammar } = &*grammar.0;
        let bad = |reason: &str| Error::option(name, one_line(reason));
        let parser = guarded(|| self.factory.create_parser(grammar.clone()));
        let parser = parser.ok_or_else(|| bad("it cannot be read"))?;
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(reason) => Err(bad(&reason)),
            None => Ok(Box::new(Keeping {
                matcher,
                ends: Arc::clone(&self.ends),
                n_vocab: self.n_vocab,
                ended: false,
            })),
        }
    }
}

/// An answer that keeps to a grammar.
struct Keeping {
    matcher: Matcher,
    ends: Arc<[Token]>,
    n_vocab: usize,
    /// Whether a token came that ends the answer.
    ended: bool,
}

impl Constraint for Keeping {
    fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let n_vocab = self.n_vocab;
        if logits.len() != n_vocab {
            let n = logits.len();
            return Err(Error::contract(format!("{n} logits for {n_vocab} tokens")));
        }
        let may = self.matcher.compute_mask_or_eos();
        let may = may.map_err(|e| Error::constraint(one_line(&e.to_string())))?;
        let mut any = false;
        for (token, logit) in (0_u32..).zip(logits) {
            match may.is_allowed(token) {
                true => any = true,
                false => *logit = f32::NEG_INFINITY,
            }
        }
        match any {
            true => Ok(()),
            false => Err(Error::constraint("no token of the vocabulary may come")),
        }
    }

    fn accept(&mut self, token: Token) -> Result<()> {
        let wrong = |what: String| Err(Error::contract(what));
        let Ok(id) = u32::try_from(token) else {
            return wrong(format!("token {token} of an answer"));
        };
        if self.ended {
            return wrong(format!("token {token} behind the end of an answer"));
        }
        self.ended = self.ends.contains(&token);
        if self.ended && self.matcher.is_stopped() {
            return Ok(());
        }
        match self.matcher.consume_token(id) {
            Ok(()) => Ok(()),
            Err(e) => wrong(format!(
                "token {token} may not come: {}",
                one_line(&e.to_string())
            )),
        }
    }
}
