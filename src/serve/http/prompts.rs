//! Prompts as `/completion` and `/v1/completions` take them: text, ids, both in turns, text with pictures,
//! or a list of these.

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::super::ask::Part;
use super::failure::Failure;
use super::fields::token;
use super::media::Pictures;
use super::messages::{MEDIA, interleave};
use super::service::Service;

/// What a prompt may be, for the description.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "it describes what is sent")]
pub(super) enum Prompt {
    Text(String),
    List(Vec<Value>),
    Pictures {
        prompt_string: String,
        multimodal_data: Option<Vec<String>>,
    },
}

/// All prompts of a request, and whether it was a list of them.
pub(super) async fn prompts(
    service: &Service,
    prompt: &Value,
) -> Result<(Vec<Vec<Part>>, bool), Failure> {
    // A number among them makes it one prompt of ids and texts in turns.
    let list = prompt
        .as_array()
        .filter(|list| !list.iter().any(Value::is_number));
    let Some(list) = list else {
        return Ok((vec![one(service, prompt).await?], false));
    };
    let most = service.rules.answers;
    if list.is_empty() || list.len() > most {
        let reason = format!("`prompt`: {} prompts, expected 1 to {most}", list.len());
        return Err(Failure::invalid(reason));
    }
    let mut prompts = Vec::new();
    for prompt in list {
        prompts.push(one(service, prompt).await?);
    }
    Ok((prompts, true))
}

async fn one(service: &Service, prompt: &Value) -> Result<Vec<Part>, Failure> {
    match prompt {
        Value::String(text) => Ok(vec![Part::Text(text.clone())]),
        Value::Array(parts) if !parts.is_empty() => mixed(service, parts),
        Value::Object(object) => {
            let text = object.get("prompt_string").and_then(Value::as_str);
            let text = text.ok_or_else(|| Failure::invalid("`prompt`: wants a `prompt_string`"))?;
            let mut pictures = Vec::new();
            let mut reader = Pictures::new(service);
            match object.get("multimodal_data") {
                None | Some(Value::Null) => return Ok(vec![Part::Text(text.to_owned())]),
                Some(Value::Array(data)) => {
                    for data in data {
                        let data = data.as_str().ok_or_else(no_text)?;
                        pictures.push(reader.read(data).await?);
                    }
                }
                Some(_) => return Err(no_text()),
            }
            interleave(text, MEDIA, &pictures).ok_or_else(|| {
                let (n, places) = (pictures.len(), text.matches(MEDIA).count());
                Failure::invalid(format!(
                    "`prompt`: {n} pictures for {places} places {MEDIA}"
                ))
            })
        }
        _ => Err(Failure::invalid(
            "`prompt`: expected a text, a list of ids, or an object with `prompt_string`",
        )),
    }
}

fn no_text() -> Failure {
    Failure::invalid("`prompt.multimodal_data`: expected a list of pictures in base64")
}

fn mixed(service: &Service, parts: &[Value]) -> Result<Vec<Part>, Failure> {
    let mut out: Vec<Part> = Vec::new();
    for part in parts {
        match part {
            Value::String(text) => out.push(Part::Text(text.clone())),
            Value::Number(id) => {
                let id = id.as_i64().ok_or_else(|| {
                    Failure::invalid(format!("`prompt`: {id} is no id of a token"))
                })?;
                let id = token(service, id)?;
                match out.last_mut() {
                    Some(Part::Tokens(tokens)) => tokens.push(id),
                    _ => out.push(Part::Tokens(vec![id])),
                }
            }
            _ => {
                return Err(Failure::invalid(
                    "`prompt`: expected ids and texts in the list",
                ));
            }
        }
    }
    Ok(out)
}
