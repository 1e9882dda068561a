//! Text and pictures of a turn, to what the model takes: chat template, places of the pictures,
//! and only the part that the cache does not hold yet.

use crate::error::{Error, Result};
use crate::image::Picture;
use crate::llama::chat::{self, Message};
use crate::llama::{Model, Piece, Vision};

/// The text of a conversation as the model has seen it.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Transcript {
    /// Name or text of the chat template; `None`: prompts go in as they are.
    template: Option<String>,
    messages: Vec<Message>,
    /// Formatted text up to where the last answer starts, and the answer: what the cache holds.
    fed: String,
    answer: String,
}

impl Transcript {
    pub fn new(template: Option<String>, system: Option<String>) -> Self {
        let messages = system
            .into_iter()
            .map(|content| Message {
                role: "system".into(),
                content,
            })
            .collect();
        Transcript {
            template,
            messages,
            fed: String::new(),
            answer: String::new(),
        }
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

    /// Adds a user turn and gives the text that has to go in for it.
    ///
    /// # Errors
    /// [`Error::Option`] for a template that llama.cpp does not know, or one that rewrites
    /// earlier turns, which a cache cannot follow.
    pub fn ask(&mut self, model: &Model, content: String) -> Result<String> {
        let Some(template) = &self.template else {
            self.fed.push_str(&content);
            return Ok(content);
        };
        self.messages.push(Message {
            role: "user".into(),
            content,
        });
        let full = match chat::apply(model, template, &self.messages, true) {
            Ok(full) => full,
            Err(e) => {
                self.messages.pop();
                return Err(e);
            }
        };
        let Some(new) = full
            .strip_prefix(self.fed.as_str())
            .and_then(|rest| after_answer(rest, &self.answer))
            .map(str::to_owned)
        else {
            self.messages.pop();
            return Err(Error::option(
                "--chat-template",
                "it rewrites earlier turns, so a second turn cannot go on from the first: start again with /clear",
            ));
        };
        self.fed = full;
        self.answer.clear();
        Ok(new)
    }

    /// Adds the answer that the model gave.
    pub fn answered(&mut self, text: &str) {
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

/// The text of a turn with [`Vision::MARKER`] where each picture goes, and the pictures' order.
///
/// `<|image_k|>` (Phi-3.5-vision) or the marker itself say where; a text without either takes the
/// pictures in front. `line` puts each of those on a line of its own.
///
/// # Errors
/// [`Error::Option`] when places and pictures do not match.
pub fn place_pictures(text: &str, n: usize, line: bool) -> Result<(String, Vec<usize>)> {
    let bad = |reason: String| Error::option("--image", reason);
    if text.contains("<|image_") {
        let (mut out, mut order) = (String::new(), Vec::new());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("<|image_") {
            let Some((number, after)) = after.split_once("|>") else {
                break;
            };
            let k: usize = match number.parse() {
                Ok(k) if (1..=n).contains(&k) => k,
                _ => {
                    return Err(bad(format!(
                        "the prompt names <|image_{number}|>, but {n} pictures were given"
                    )));
                }
            };
            out.push_str(before);
            out.push_str(Vision::MARKER);
            order.push(k - 1);
            rest = after;
        }
        out.push_str(rest);
        if let Some(missing) = (0..n).find(|i| !order.contains(i)) {
            return Err(bad(format!(
                "the prompt has no <|image_{}|>, but {n} pictures were given",
                missing + 1
            )));
        }
        return Ok((out, order));
    }
    let places = text.matches(Vision::MARKER).count();
    if places > 0 && places != n {
        return Err(bad(format!(
            "the prompt has places for {places} pictures, but {n} were given"
        )));
    }
    let front = if places == 0 { n } else { 0 };
    let marker = if line {
        format!("{}\n", Vision::MARKER)
    } else {
        Vision::MARKER.to_owned()
    };
    Ok((marker.repeat(front) + text, (0..n).collect()))
}

/// Tokenizes the new text of a turn. `first` is the conversation's first.
///
/// # Errors
/// [`Error::Option`] for pictures without a vision file, otherwise as [`Vision::tokenize`] and
/// [`Model::tokenize`].
pub fn tokenize(
    model: &Model,
    vision: Option<&Vision<'_>>,
    text: &str,
    pictures: &[&Picture],
    first: bool,
) -> Result<Vec<Piece>> {
    match vision {
        None if !pictures.is_empty() => Err(Error::option(
            "--image",
            "pictures need a vision file, give one with --mmproj",
        )),
        // Phi-3.5-vision's processor starts the text behind a picture with BOS, also in later
        // turns, but not the text that goes on from an earlier turn.
        Some(vision) if !first && vision.bos_per_text() && !pictures.is_empty() => {
            let (head, _) = text.split_once(Vision::MARKER).unwrap_or((text, ""));
            let mut pieces = vec![Piece::Text(model.tokenize(head, false, true)?)];
            let rest = vision.tokenize(&text[head.len()..], pictures, true)?;
            // It begins with the picture: the empty text before that has its own BOS, too.
            let empty = usize::from(matches!(rest.first(), Some(Piece::Text(_))));
            pieces.extend(rest.into_iter().skip(empty));
            Ok(pieces)
        }
        Some(vision) if !pictures.is_empty() => vision.tokenize(text, pictures, first),
        _ => Ok(vec![Piece::Text(model.tokenize(text, first, true)?)]),
    }
}

#[cfg(test)]
mod tests {
    use super::place_pictures;

    const M: &str = crate::llama::Vision::MARKER;

    #[test]
    fn pictures_go_in_front_where_the_text_names_no_place() {
        assert_eq!(
            place_pictures("Why?", 2, true).unwrap(),
            (format!("{M}\n{M}\nWhy?"), vec![0, 1])
        );
        assert_eq!(
            place_pictures("Why?", 1, false).unwrap(),
            (format!("{M}Why?"), vec![0])
        );
        assert_eq!(
            place_pictures("Why?", 0, true).unwrap(),
            ("Why?".to_owned(), vec![])
        );
    }

    #[test]
    fn named_places_order_the_pictures() {
        let (text, order) = place_pictures("a <|image_2|> b <|image_1|> c", 2, true).unwrap();
        assert_eq!((text, order), (format!("a {M} b {M} c"), vec![1, 0]));
        let (text, order) = place_pictures(&format!("a {M} b"), 1, true).unwrap();
        assert_eq!((text, order), (format!("a {M} b"), vec![0]));
    }

    #[test]
    fn places_and_pictures_must_match() {
        for (text, n) in [
            ("<|image_3|>", 2),
            ("<|image_1|>", 2),
            ("<|image_x|>", 1),
            (M, 2),
        ] {
            let error = place_pictures(text, n, true).unwrap_err().to_string();
            assert!(error.starts_with("--image: "), "{error}");
            assert!(error.contains(&format!("{n}")), "{error}");
        }
    }
}
