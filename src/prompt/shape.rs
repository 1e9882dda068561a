//! What shapes of messages a template knows, found out by trying, as llama.cpp does; and messages
//! brought into them.

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::jinja::{Given, Jinja};
use crate::error::{Error, Result};

/// Something that no template says by itself.
const NEEDLE: &str = "hae7needle";

/// What a template knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// A content that is a text.
    text: bool,
    /// A content that is a list of parts.
    parts: bool,
    /// A message of the system's.
    system: bool,
    /// `arguments` of a call that are a text, and no object.
    text_arguments: bool,
    /// No content beside a call.
    empty: bool,
    /// Tools.
    pub tools: bool,
}

impl Shape {
    /// Texts alone.
    pub const PLAIN: Shape = Shape {
        text: true,
        parts: false,
        system: true,
        text_arguments: true,
        empty: true,
        tools: false,
    };

    /// What this template knows.
    ///
    /// # Errors
    /// [`Error::Option`] where the template fails with a single question already.
    pub fn of(jinja: &Jinja) -> Result<Self> {
        let user = |content: &str| json!({"role": "user", "content": content});
        let said = |messages: &[Value]| render(jinja, messages, None);
        let holds = |made: &Result<String>| made.as_ref().is_ok_and(|made| made.contains(NEEDLE));

        let as_text = said(&[user(NEEDLE)]);
        let as_parts =
            said(&[json!({"role": "user", "content": [{"type": "text", "text": NEEDLE}]})]);
        // One that writes the list itself knows no lists.
        let written = |made: &String| made.contains("'type'") || made.contains("\"type\"");
        let parts = holds(&as_parts) && !as_parts.as_ref().is_ok_and(written);
        let text = holds(&as_text);
        if !text && !parts {
            as_text?;
        }
        let content = |said: &str| match parts && !text {
            true => json!([{"type": "text", "text": said}]),
            false => json!(said),
        };
        let system = said(&[
            json!({"role": "system", "content": content(NEEDLE)}),
            json!({"role": "user", "content": content("?")}),
        ]);
        let called = |beside: &Value, arguments: Value| {
            said(&[
                json!({"role": "user", "content": content("?")}),
                json!({"role": "assistant", "content": beside, "tool_calls": [{
                    "id": "call00001",
                    "type": "function",
                    "function": {"name": "f", "arguments": arguments},
                }]}),
            ])
        };
        // Some write calls only where there is no content, not even an empty one.
        let text_arguments = [json!(""), Value::Null].iter().any(|beside| {
            let as_object = called(beside, json!({ NEEDLE: 1 }));
            !holds(&as_object) && holds(&called(beside, json!(NEEDLE)))
        });
        let empty = [json!({}), json!("{}")]
            .into_iter()
            .any(|arguments| called(&Value::Null, arguments).is_ok());
        let tools = json!([{"type": "function", "function": {
            "name": NEEDLE,
            "description": "?",
            "parameters": {"type": "object", "properties": {}, "required": []},
        }}]);
        let with_tools = render(
            jinja,
            &[json!({"role": "user", "content": content("?")})],
            Some(&tools),
        );
        Ok(Shape {
            text,
            parts,
            system: holds(&system),
            text_arguments,
            empty,
            tools: holds(&with_tools),
        })
    }

    /// Whether it writes what is said at all.
    pub fn says_anything(&self) -> bool {
        self.text || self.parts
    }

    /// Messages as the template knows them. `media` takes the place of parts that are no text.
    ///
    /// # Errors
    /// [`Error::Option`] for one that is no message.
    pub fn fitted(&self, messages: &[Value], media: &str) -> Result<Vec<Value>> {
        let mut fitted = messages
            .iter()
            .enumerate()
            .map(|(i, message)| {
                let bad = |reason: &str| Error::option("messages", format!("{i}: {reason}"));
                self.message(message, media).map_err(bad)
            })
            .collect::<Result<Vec<Value>>>()?;
        let is_system = |message: &Value| message["role"] == "system";
        if !self.system && fitted.len() > 1 && is_system(&fitted[0]) {
            let system = fitted.remove(0);
            if let Some(first) = fitted.first_mut().and_then(Value::as_object_mut) {
                put_before(first, &system["content"]);
            }
        }
        Ok(fitted)
    }

    fn message(&self, message: &Value, media: &str) -> Result<Value, &'static str> {
        let object = message.as_object().ok_or("is no object")?;
        if !object.get("role").is_some_and(Value::is_string) {
            return Err("has no role, expected a text");
        }
        let mut object = object.clone();
        match object.get_mut("content") {
            Some(content @ Value::Array(_)) => {
                let given = content.take();
                let parts = parts(given.as_array().into_iter().flatten(), media)?;
                *content = match self.parts {
                    true => parts.iter().map(Part::json).collect(),
                    false => joined(&parts).into(),
                };
            }
            Some(content @ Value::String(_)) if !self.text => {
                *content = json!([{"type": "text", "text": content.take()}]);
            }
            None | Some(Value::Null | Value::String(_)) => {}
            Some(_) => return Err("has a content that is no text and no list of parts"),
        }
        // What such a template would add to a text is an empty one.
        if !self.empty && object.get("content").is_none_or(Value::is_null) {
            object.insert("content".to_owned(), "".into());
        }
        if let Some(Value::Array(calls)) = object.get_mut("tool_calls") {
            for call in calls {
                self.call(call);
            }
        }
        Ok(Value::Object(object))
    }

    /// OpenAI's interface has a call's arguments as a text, most templates want what is in it.
    fn call(&self, call: &mut Value) {
        let arguments = call
            .get_mut("function")
            .and_then(|f| f.get_mut("arguments"));
        let Some(arguments) = arguments else { return };
        match arguments {
            Value::String(text) if !self.text_arguments => {
                if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
                    *arguments = object;
                }
            }
            Value::Object(_) if self.text_arguments => *arguments = arguments.to_string().into(),
            _ => {}
        }
    }
}

fn render(jinja: &Jinja, messages: &[Value], tools: Option<&Value>) -> Result<String> {
    jinja.render(&Given {
        messages,
        tools,
        more: &[],
        bos: "",
        eos: "",
        add_generation_prompt: true,
        now: SystemTime::UNIX_EPOCH,
    })
}

/// A part of a message.
enum Part<'a> {
    Text(&'a str),
    Media(&'a str),
}

impl Part<'_> {
    fn text(&self) -> &str {
        match self {
            Part::Text(text) => text,
            Part::Media(text) => text,
        }
    }

    /// What stands for a picture is text to a template: what it would write around one, llama.cpp's
    /// mtmd puts there when it takes the picture in.
    fn json(&self) -> Value {
        json!({"type": "text", "text": self.text()})
    }
}

fn parts<'a>(
    parts: impl Iterator<Item = &'a Value>,
    media: &'a str,
) -> Result<Vec<Part<'a>>, &'static str> {
    let part = |part: &'a Value| match part["type"].as_str() {
        Some("text") => match part["text"].as_str() {
            Some(text) => Ok(Part::Text(text)),
            None => Err("has a part of the type text without a text"),
        },
        Some(_) => Ok(Part::Media(media)),
        None => Err("has a part without a type"),
    };
    parts.map(part).collect()
}

/// As llama.cpp joins them: texts on lines of their own, pictures within a line.
fn joined(parts: &[Part<'_>]) -> String {
    let mut out = String::new();
    let mut behind_media = false;
    for part in parts {
        let is_media = matches!(part, Part::Media(_));
        if !out.is_empty() && !is_media && !behind_media {
            out.push('\n');
        }
        out.push_str(part.text());
        behind_media = is_media;
    }
    out
}

/// Puts a text in front of a message's own.
fn put_before(message: &mut Map<String, Value>, text: &Value) {
    match message.get_mut("content") {
        Some(Value::String(own)) => {
            let text = text.as_str().unwrap_or_default();
            *own = format!("{text}\n{own}");
        }
        Some(Value::Array(own)) => match text {
            Value::Array(parts) => drop(own.splice(0..0, parts.iter().cloned())),
            text => own.insert(0, json!({"type": "text", "text": text})),
        },
        _ => drop(message.insert("content".to_owned(), text.clone())),
    }
}
