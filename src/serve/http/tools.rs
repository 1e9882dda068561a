//! Tools: which there are, and the calls in what a model says.
//!
//! Many templates have the model write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Calls of
//! that form are told apart from the text around them; those of any other form stay text. Where a call is
//! required, the answer is held to the JSON inside of it.

use serde_json::{Value, json};

use super::failure::Failure;
use super::fields::Keep;
use super::ids;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// What a request says of tools.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    /// In OpenAI's shape.
    pub list: Value,
    /// The functions one of which has to be called: name and parameters.
    required: Vec<(String, Value)>,
}

/// `None`: there are none, or none may be called.
pub(super) fn tools(
    list: Option<&Value>,
    choice: Option<&Value>,
) -> Result<Option<Tools>, Failure> {
    let list = match list {
        None => return Ok(None),
        Some(Value::Array(list)) if list.is_empty() => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(Failure::invalid("`tools`: expected a list")),
    };
    let functions = list
        .iter()
        .enumerate()
        .map(|(i, tool)| {
            let at = |reason: &str| Failure::invalid(format!("`tools[{i}]`: {reason}"));
            if tool["type"] != "function" {
                return Err(at("expected the type function"));
            }
            let name = tool["function"]["name"].as_str();
            let name = name.ok_or_else(|| at("a function without a name"))?;
            let parameters = match &tool["function"]["parameters"] {
                Value::Null => json!({ "type": "object" }),
                object @ Value::Object(_) => object.clone(),
                _ => return Err(at("`parameters`: expected a JSON schema")),
            };
            Ok((name.to_owned(), parameters))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let tools = |required| {
        let list = Value::Array(list.clone());
        Ok(Some(Tools { list, required }))
    };
    match choice {
        None | Some(Value::Null) => tools(Vec::new()),
        Some(Value::String(choice)) if choice == "auto" => tools(Vec::new()),
        Some(Value::String(choice)) if choice == "none" => Ok(None),
        Some(Value::String(choice)) if choice == "required" => tools(functions),
        Some(choice) => {
            // OpenAI's two APIs nest it differently.
            let name = choice["function"]["name"]
                .as_str()
                .or(choice["name"].as_str());
            let one: Vec<_> = (functions.into_iter())
                .filter(|(function, _)| Some(function.as_str()) == name)
                .collect();
            match one.is_empty() {
                true => Err(Failure::invalid(
                    "`tool_choice`: expected auto, none, required, or a function of `tools`",
                )),
                false => tools(one),
            }
        }
    }
}

impl Tools {
    /// What the answer keeps to where a call is required.
    pub fn keep(&self) -> Option<Keep> {
        if self.required.is_empty() {
            return None;
        }
        let calls = self.required.iter().map(|(name, parameters)| {
            json!({
                "type": "object",
                "properties": { "name": { "const": name }, "arguments": parameters },
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        });
        let mut calls: Vec<Value> = calls.collect();
        Some(Keep::Schema(match calls.len() {
            1 => calls.remove(0),
            _ => json!({ "anyOf": calls }),
        }))
    }

    /// For one answer.
    pub fn reader(&self) -> Reader {
        match self.required.is_empty() {
            true => Reader::default(),
            false => Reader {
                state: State::Bare,
                ..Reader::default()
            },
        }
    }
}

/// A call of a function.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub id: String,
    pub name: String,
    /// JSON.
    pub arguments: String,
}

impl Call {
    /// In OpenAI's shape.
    pub fn json(&self) -> Value {
        json!({
            "id": self.id,
            "type": "function",
            "function": { "name": self.name, "arguments": self.arguments },
        })
    }

    /// `None`: no call.
    fn read(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text.trim()).ok()?;
        let arguments = match value.get("arguments")? {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        Some(Call {
            id: ids::id("call_"),
            name: value["name"].as_str()?.to_owned(),
            arguments,
        })
    }
}

/// Text, or a call.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Said {
    Text(String),
    Call(Call),
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum State {
    #[default]
    Text,
    /// Behind a call: space is left out.
    Behind,
    /// In a call.
    Call,
    /// The whole answer is one.
    Bare,
}

/// Tells calls from text while the answer comes in.
#[derive(Debug, Default)]
pub(super) struct Reader {
    state: State,
    held: String,
}

impl Reader {
    /// What is certain behind this piece.
    pub fn feed(&mut self, text: &str) -> Vec<Said> {
        self.held += text;
        let mut said = Vec::new();
        loop {
            match self.state {
                State::Bare => return said,
                State::Behind => {
                    let rest = self.held.trim_start();
                    if rest.is_empty() {
                        return said;
                    }
                    self.held = rest.to_owned();
                    self.state = State::Text;
                }
                State::Text => match self.held.find(OPEN) {
                    Some(at) => {
                        push_text(&mut said, self.held.get(..at).unwrap_or_default());
                        self.held.drain(..at + OPEN.len());
                        self.state = State::Call;
                    }
                    None => {
                        let keep = begun(&self.held, OPEN);
                        let rest = self.held.split_off(self.held.len() - keep);
                        push_text(&mut said, &std::mem::replace(&mut self.held, rest));
                        return said;
                    }
                },
                State::Call => {
                    let Some(at) = self.held.find(CLOSE) else {
                        return said;
                    };
                    let call: String = self.held.drain(..at + CLOSE.len()).collect();
                    let inner = call.strip_suffix(CLOSE).unwrap_or(&call);
                    match Call::read(inner) {
                        Some(call) => {
                            said.push(Said::Call(call));
                            self.state = State::Behind;
                        }
                        None => {
                            push_text(&mut said, &format!("{OPEN}{call}"));
                            self.state = State::Text;
                        }
                    }
                }
            }
        }
    }

    /// What is left. A call that the answer ended in is one where it is whole.
    pub fn end(&mut self) -> Vec<Said> {
        let held = std::mem::take(&mut self.held);
        let mut said = Vec::new();
        match (self.state, Call::read(&held)) {
            (State::Call | State::Bare, Some(call)) => said.push(Said::Call(call)),
            (State::Call, None) => push_text(&mut said, &format!("{OPEN}{held}")),
            (State::Behind, _) => {}
            _ => push_text(&mut said, &held),
        }
        said
    }

    /// A whole answer: its text, and its calls.
    pub fn whole(mut self, text: &str) -> (String, Vec<Call>) {
        let mut said = self.feed(text);
        said.extend(self.end());
        let (mut text, mut calls) = (String::new(), Vec::new());
        for said in said {
            match said {
                Said::Text(more) => text += &more,
                Said::Call(call) => calls.push(call),
            }
        }
        (text, calls)
    }
}

fn push_text(said: &mut Vec<Said>, text: &str) {
    if !text.is_empty() {
        said.push(Said::Text(text.to_owned()));
    }
}

/// Bytes at the end of the text that may be the beginning of `tag`.
fn begun(text: &str, tag: &str) -> usize {
    let most = tag.len().min(text.len());
    let fits = |&n: &usize| text.as_bytes().ends_with(&tag.as_bytes()[..n]);
    (1..=most).rev().find(fits).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: &str = r#"<tool_call>
{"name": "add", "arguments": {"a": 1}}
</tool_call>"#;

    fn names(said: &[Said]) -> Vec<String> {
        let name = |said: &Said| match said {
            Said::Text(text) => format!("text {text}"),
            Said::Call(call) => format!("call {} {}", call.name, call.arguments),
        };
        said.iter().map(name).collect()
    }

    #[test]
    fn calls_are_found_however_the_answer_is_cut_up() {
        let answer = format!("Well, <b>\n{CALL}\n{CALL} <tool_ <é");
        let whole = Reader::default().whole(&answer);
        assert_eq!(whole.0, "Well, <b>\n<tool_ <é");
        assert_eq!(whole.1.len(), 2);
        assert_eq!(
            (whole.1[0].name.as_str(), whole.1[0].arguments.as_str()),
            ("add", r#"{"a":1}"#)
        );
        for size in [1, 2, 3, 7, 11] {
            let chars: Vec<char> = answer.chars().collect();
            let mut reader = Reader::default();
            let pieces = chars
                .chunks(size)
                .map(|piece| piece.iter().collect::<String>());
            let mut said: Vec<Said> = pieces.flat_map(|piece| reader.feed(&piece)).collect();
            said.extend(reader.end());
            let text: String = (said.iter())
                .filter_map(|said| match said {
                    Said::Text(text) => Some(text.as_str()),
                    Said::Call(_) => None,
                })
                .collect();
            assert_eq!(text, whole.0, "{size}");
        }
    }

    #[test]
    fn text_goes_out_as_soon_as_it_cannot_be_a_call() {
        let mut reader = Reader::default();
        assert_eq!(names(&reader.feed("a <tool")), ["text a "]);
        assert_eq!(names(&reader.feed("box")), ["text <toolbox"]);
        assert!(reader.feed(CALL.split_at(20).0).is_empty());
        assert_eq!(
            names(&reader.feed(CALL.split_at(20).1)),
            [r#"call add {"a":1}"#]
        );
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            "<tool_call>no json</tool_call>",
            r#"<tool_call>{"name": 3, "arguments": {}}</tool_call>"#,
            r#"<tool_call>{"name": "a"}</tool_call>"#,
            "<tool_call>{",
            "<tool_call>",
        ] {
            assert_eq!(Reader::default().whole(text), (text.to_owned(), Vec::new()));
        }
        let cut = r#"<tool_call>{"name": "a", "arguments": "{}"}"#;
        assert_eq!(Reader::default().whole(cut).1[0].arguments, "{}");
    }

    #[test]
    fn a_required_call_is_the_whole_answer() {
        let list = json!([
            { "type": "function", "function": { "name": "a", "parameters": { "type": "object" } } },
            { "type": "function", "function": { "name": "b" } },
        ]);
        let named = json!({ "type": "function", "function": { "name": "b" } });
        let one = tools(Some(&list), Some(&named)).unwrap().unwrap();
        let Some(Keep::Schema(schema)) = one.keep() else {
            panic!("{one:?}")
        };
        assert_eq!(schema["properties"]["name"]["const"], "b");
        let mut reader = one.reader();
        assert!(reader.feed(r#"{"name": "b", "#).is_empty());
        reader.feed(r#""arguments": {}}"#);
        assert_eq!(names(&reader.end()), ["call b {}"]);
        let any = tools(Some(&list), Some(&json!("required")))
            .unwrap()
            .unwrap();
        let Some(Keep::Schema(schema)) = any.keep() else {
            panic!("{any:?}")
        };
        assert_eq!(schema["anyOf"].as_array().unwrap().len(), 2);
        assert!(tools(Some(&list), Some(&json!("none"))).unwrap().is_none());
        assert!(
            tools(Some(&list), Some(&json!("auto")))
                .unwrap()
                .unwrap()
                .keep()
                .is_none()
        );
        assert!(tools(Some(&list), Some(&json!({ "name": "c" }))).is_err());
    }
}
