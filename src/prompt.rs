//! Text and pictures of a turn, to what the model takes: chat template, places of the pictures,
//! and only the part that the cache does not hold yet.

mod jinja;
mod places;
mod shape;
mod template;

pub use places::place_pictures;
pub use template::{ChatTemplate, Input, Source, Template};

use crate::error::{Error, Result};
use crate::image::Picture;
use crate::llama::chat::Message;
use crate::llama::{Model, Part, Piece, Vision};

/// The text of a conversation as the model has seen it.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Transcript {
    /// `None`: prompts go in as they are.
    template: Option<ChatTemplate>,
    messages: Vec<Message>,
    /// Formatted text up to where the last answer starts, and the answer: what the cache holds.
    fed: String,
    answer: String,
}

impl Transcript {
    /// A conversation that begins. Without a `template` prompts go in as they are. `system` goes
    /// before the first turn.
    pub fn new(template: Option<ChatTemplate>, system: Option<String>) -> Self {
        let messages = system
            .into_iter()
            .map(|content| Message {
                role: "system".into(),
                content: places::escape(&content).into_owned(),
            })
            .collect();
        Transcript {
            template,
            messages,
            fed: String::new(),
            answer: String::new(),
        }
    }

    /// The chat template; `None`: prompts go in as they are.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The system prompt, if there is one.
    pub fn system(&self) -> Option<&str> {
        let first = self.messages.first().filter(|m| m.role == "system");
        first.map(|m| m.content.as_str())
    }

    /// Forgets all turns but a system prompt.
    pub fn clear(&mut self) {
        self.messages.retain(|m| m.role == "system");
        self.fed.clear();
        self.answer.clear();
    }

    /// Whether the cache holds nothing of this conversation yet.
    pub fn is_new(&self) -> bool {
        self.fed.is_empty()
    }

    /// Pictures that were shown so far.
    pub fn pictures(&self) -> usize {
        places::shown(&self.fed)
    }

    /// Adds a user turn, as [`place_pictures`] makes it, and gives the text that has to go in for
    /// it.
    ///
    /// # Errors
    /// [`Error::Option`] for what the template says against it, or one that rewrites earlier turns,
    /// which a cache cannot follow.
    pub fn ask(&mut self, content: String) -> Result<String> {
        let Some(template) = &self.template else {
            self.fed.push_str(&content);
            return Ok(content);
        };
        self.messages.push(Message {
            role: "user".into(),
            content,
        });
        let full = match template.apply(&self.messages, true) {
            Ok(full) => full,
            Err(e) => {
                self.messages.pop();
                return Err(e);
            }
        };
        let new = full
            .strip_prefix(self.fed.as_str())
            .and_then(|rest| after_answer(rest, &self.answer))
            .map(str::to_owned)
            .or_else(|| self.behind_history(template, &full));
        let Some(new) = new else {
            self.messages.pop();
            return Err(Error::option(
                "chat_template",
                "it rewrites earlier turns, so a second turn cannot go on from the first: start again with /clear",
            ));
        };
        self.fed = full;
        self.answer.clear();
        Ok(new)
    }

    /// The new turn of a template that opens an answer with other text than it repeats it with:
    /// what it writes behind the history that ends with the answer, as llama.cpp's own chats take
    /// it (`common_chat_format_single`). What closes the answer goes before it, which the model
    /// was trained to see; llama.cpp leaves that out.
    fn behind_history(&self, template: &ChatTemplate, full: &str) -> Option<String> {
        let (asked, past) = self.messages.split_last()?;
        let format = |messages: &[Message]| template.apply(messages, false).ok();
        let mut marked = past.to_vec();
        let answer = marked.last_mut().filter(|last| last.role == "assistant")?;
        answer.content = places::ANSWER.into();
        if let Some(new) = full.strip_prefix(format(past)?.as_str()) {
            let history = format(&marked)?;
            let (_, closing) = history.rsplit_once(places::ANSWER)?;
            return Some(format!("{closing}{new}"));
        }
        // One that writes the newest answer otherwise than an older one, as those do that leave out the
        // thoughts of older ones: what it writes behind the answer, where it writes the same before it.
        let before = format(&marked[..marked.len() - 1])?;
        marked.push(asked.clone());
        let full = template.apply(&marked, true).ok()?;
        let (_, new) = full
            .strip_prefix(before.as_str())?
            .rsplit_once(places::ANSWER)?;
        Some(new.to_owned())
    }

    /// Adds the answer that the model gave.
    pub fn answered(&mut self, text: &str) {
        let text = &*places::escape(text);
        if self.template.is_none() {
            self.fed.push_str(text);
        } else {
            self.answer = text.to_owned();
            self.messages.push(Message {
                role: "assistant".into(),
                content: text.to_owned(),
            });
        }
    }
}

/// What follows the answer in a formatted conversation. The cache holds the answer as it was said;
/// some templates put a space before it or trim it when they repeat it.
fn after_answer<'a>(rest: &'a str, answer: &str) -> Option<&'a str> {
    rest.strip_prefix(answer)
        .or_else(|| rest.trim_start().strip_prefix(answer.trim_start()))
        .or_else(|| rest.trim_start().strip_prefix(answer.trim()))
}

/// Tokenizes the new text of a turn. `first` is the conversation's first. `pictures` are in the
/// order of their places.
///
/// # Errors
/// [`Error::Option`] for pictures without a vision file, otherwise as [`Vision::tokenize`] and
/// [`Model::tokenize`].
pub fn tokenize(
    model: &Model,
    vision: Option<&Vision>,
    text: &str,
    pictures: &[&Picture],
    first: bool,
) -> Result<Vec<Piece>> {
    tokenize_parts(model, vision, places::parts(text, pictures)?, first)
}

/// The same of texts and pictures that are in order already, without two texts behind one another.
///
/// # Errors
/// As [`tokenize`].
pub fn tokenize_parts(
    model: &Model,
    vision: Option<&Vision>,
    mut parts: Vec<Part<'_>>,
    first: bool,
) -> Result<Vec<Piece>> {
    match (vision, &mut parts[..]) {
        (_, [Part::Text(text)]) => Ok(vec![Piece::Text(model.tokenize(text, first, true)?)]),
        (None, _) => Err(Error::option(
            "image",
            "pictures need a vision file, give one with `mmproj`",
        )),
        // Phi-3.5-vision's processor starts the text behind a picture with BOS, also in later
        // turns, but not the text that goes on from an earlier turn.
        (Some(vision), [Part::Text(head), ..]) if !first && vision.bos_per_text() => {
            let head = model.tokenize(&std::mem::take(head), false, true)?;
            let mut pieces = vec![Piece::Text(head)];
            let rest = vision.tokenize(&parts, true)?;
            // It begins with the picture: the empty text before that has its own BOS, too.
            let empty = usize::from(matches!(rest.first(), Some(Piece::Text(_))));
            pieces.extend(rest.into_iter().skip(empty));
            Ok(pieces)
        }
        (Some(vision), _) => vision.tokenize(&parts, first),
    }
}
