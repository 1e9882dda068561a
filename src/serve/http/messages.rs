//! Conversations as clients send them: checked, with their pictures read, and rendered to a prompt.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::super::ask::Part;
use super::failure::Failure;
use super::ids;
use super::media::Pictures;
use super::service::{Service, Talk};
use crate::image::Picture;

/// llama.cpp's name for a picture's place in a text.
pub(super) const MEDIA: &str = "<__media__>";

/// A conversation that can be rendered.
pub(super) struct Conversation {
    messages: Vec<Value>,
    pictures: Vec<Arc<Picture>>,
    /// What the answer begins with.
    prefill: Option<String>,
}

/// What a request says of it beside the messages.
#[derive(Clone, Debug, Default)]
pub(super) struct Manner {
    pub tools: Option<Value>,
    pub kwargs: Option<Map<String, Value>>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: bool,
}

impl Conversation {
    /// From messages in OpenAI's shape.
    pub async fn read(
        service: &Service,
        messages: &Value,
        manner: &Manner,
    ) -> Result<Self, Failure> {
        let Some(messages) = messages.as_array() else {
            return Err(Failure::invalid("`messages`: expected a list"));
        };
        if messages.is_empty() {
            return Err(Failure::invalid("`messages`: is empty"));
        }
        if manner.add_generation_prompt == Some(true) && manner.continue_final_message {
            let reason =
                "`add_generation_prompt` and `continue_final_message`: expected one of them";
            return Err(Failure::invalid(reason));
        }
        let mut read = Conversation {
            messages: Vec::new(),
            pictures: Vec::new(),
            prefill: None,
        };
        let mut pictures = Pictures::new(service);
        for (i, message) in messages.iter().enumerate() {
            let at = |reason: String| Failure::invalid(format!("`messages[{i}]`: {reason}"));
            let mut message = checked(message).map_err(at)?;
            if let Some(Value::Array(parts)) = message.get_mut("content") {
                for part in parts {
                    if let Some(source) = picture_source(part).map_err(at)? {
                        read.pictures.push(pictures.read(&source).await?);
                        *part = serde_json::json!({ "type": "image_url" });
                    }
                }
            }
            read.messages.push(Value::Object(message));
        }
        read.take_prefill(manner)?;
        Ok(read)
    }

    /// A last message of the assistant is the beginning of the answer, as llama.cpp takes it.
    fn take_prefill(&mut self, manner: &Manner) -> Result<(), Failure> {
        let of_assistant = |message: &Value| message["role"] == "assistant";
        let calls = |message: &Value| message["tool_calls"].is_array();
        let Some(last) = self.messages.last() else {
            return Ok(());
        };
        let ends = of_assistant(last) && !calls(last);
        if manner.continue_final_message && !ends {
            let reason = "`continue_final_message`: the last message is not the assistant's";
            return Err(Failure::invalid(reason));
        }
        // Who asks for no beginning of an answer wants the conversation as it is.
        let wanted = manner.continue_final_message || manner.add_generation_prompt.unwrap_or(true);
        if !ends || !wanted {
            return Ok(());
        }
        let before = self.messages.len().checked_sub(2);
        if before.is_some_and(|i| of_assistant(&self.messages[i])) {
            let reason = "`messages`: the last two are the assistant's, expected one at the end";
            return Err(Failure::invalid(reason));
        }
        let text = text_of(&last["content"]).ok_or_else(|| {
            Failure::invalid("`messages`: the beginning of an answer can hold no picture")
        })?;
        self.prefill = Some(text);
        self.messages.pop();
        Ok(())
    }

    /// The text that the model reads, with `media` for each picture.
    fn text(&self, service: &Service, manner: &Manner, media: &str) -> Result<String, Failure> {
        let Some(render) = &service.render else {
            let reason = "the model has no chat template: ask for a completion of a prompt";
            return Err(Failure::invalid(reason));
        };
        let begins = manner.add_generation_prompt.unwrap_or(true);
        let mut text = render.render(&Talk {
            messages: &self.messages,
            tools: manner.tools.as_ref(),
            kwargs: manner.kwargs.as_ref(),
            add_generation_prompt: begins || manner.continue_final_message,
            media,
        })?;
        text += self.prefill.as_deref().unwrap_or_default();
        Ok(text)
    }

    /// The same for people to read.
    pub fn shown(&self, service: &Service, manner: &Manner) -> Result<String, Failure> {
        self.text(service, manner, MEDIA)
    }

    /// The prompt.
    pub fn prompt(&self, service: &Service, manner: &Manner) -> Result<Vec<Part>, Failure> {
        // Without signs that a template might escape, and nobody can guess it to put it into a text.
        let media = ids::id("media_");
        let text = self.text(service, manner, &media)?;
        interleave(&text, &media, &self.pictures).ok_or_else(|| {
            Failure::invalid("the chat template does not show every picture once, in order")
        })
    }
}

/// Text and pictures in turns; `None` where places and pictures differ in number.
pub(super) fn interleave(text: &str, media: &str, pictures: &[Arc<Picture>]) -> Option<Vec<Part>> {
    if text.matches(media).count() != pictures.len() {
        return None;
    }
    let mut parts = Vec::new();
    let mut pictures = pictures.iter();
    for text in text.split(media) {
        if !text.is_empty() {
            parts.push(Part::Text(text.to_owned()));
        }
        parts.extend(
            pictures
                .next()
                .map(|picture| Part::Picture(Arc::clone(picture))),
        );
    }
    Some(parts)
}

/// A prompt for people to read.
pub(super) fn shown(service: &Service, prompt: &[Part]) -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let adds_bos = || Ok::<_, Failure>(!service.hall.tokenize("", true, true)?.is_empty());
    for (i, part) in prompt.iter().enumerate() {
        match part {
            Part::Text(text) => {
                let bos = &service.hall.facts().bos;
                if i == 0 && !text.starts_with(bos) && adds_bos()? {
                    bytes.extend(bos.bytes());
                }
                bytes.extend(text.bytes());
            }
            Part::Picture(_) => bytes.extend(MEDIA.bytes()),
            Part::Tokens(tokens) => {
                for &token in tokens {
                    bytes.extend(service.hall.piece(token)?);
                }
            }
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A message with a role and a content that can be.
fn checked(message: &Value) -> Result<Map<String, Value>, String> {
    let mut message = message.as_object().ok_or("expected an object")?.clone();
    if !message.get("role").is_some_and(Value::is_string) {
        return Err("expected a role".into());
    }
    let calls = message
        .get("tool_calls")
        .is_some_and(|calls| !calls.is_null());
    if calls && !message["tool_calls"].is_array() {
        return Err("`tool_calls`: expected a list".into());
    }
    match message.get_mut("content") {
        None | Some(Value::Null) if calls => {}
        None | Some(Value::Null) => return Err("expected a content".into()),
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => parts.iter_mut().try_for_each(check_part)?,
        Some(_) => return Err("`content`: expected a text or a list of parts".into()),
    }
    Ok(message)
}

/// Parts of `/v1/responses` become those of `/v1/chat/completions`.
fn check_part(part: &mut Value) -> Result<(), String> {
    if let Some(text) = part.as_str() {
        *part = serde_json::json!({ "type": "text", "text": text });
        return Ok(());
    }
    let kind = part["type"].as_str().unwrap_or_default();
    match kind {
        "text" | "input_text" | "output_text" | "refusal" => {
            let text = part.get("text").or_else(|| part.get("refusal"));
            let text = text.and_then(Value::as_str);
            let text = text.ok_or_else(|| format!("a part of the type {kind} without a text"))?;
            *part = serde_json::json!({ "type": "text", "text": text });
            Ok(())
        }
        "image_url" | "input_image" | "image" => Ok(()),
        "" => Err("a part of the content without a type".into()),
        other => Err(format!(
            "a part of the type {other:?}, expected text or image_url"
        )),
    }
}

/// Where the picture of a part is; `None`: it is text.
fn picture_source(part: &Value) -> Result<Option<String>, String> {
    if part["type"] == "text" {
        return Ok(None);
    }
    let source = match &part["image_url"] {
        Value::String(url) => Some(url.as_str()),
        Value::Object(object) => object.get("url").and_then(Value::as_str),
        _ => part["image"].as_str(),
    };
    match source {
        Some(source) => Ok(Some(source.to_owned())),
        None => Err("a picture without an `image_url`".into()),
    }
}

/// The text of a content; `None` where it is no text alone. Neighbours are paragraphs, as with llama.cpp.
fn text_of(content: &Value) -> Option<String> {
    match content {
        Value::Array(parts) => {
            let texts: Option<Vec<&str>> = parts.iter().map(|part| part["text"].as_str()).collect();
            Some(texts?.join("\n\n"))
        }
        content => content.as_str().map(str::to_owned),
    }
}
