//! Questions about pictures, as requests.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

/// Crops in the small model's vision file.
const CROPS: u32 = 4;

/// A line of a question file, as far as it is needed here.
#[derive(Clone, Debug, Deserialize)]
pub struct Question {
    pub id: String,
    #[serde(default)]
    pub task: String,
    pub images: Vec<String>,
    /// Crops of a picture that the question was made for.
    #[serde(default)]
    num_crops: Option<u32>,
    pub question: String,
    #[serde(default)]
    pub answer: String,
}

impl Question {
    /// Whether this answer is right: `hae eval`'s exact match.
    pub fn is_right(&self, answer: &str) -> bool {
        plain(answer) == plain(&self.answer)
    }
}

fn plain(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ").to_lowercase();
    text.trim_matches('"').trim_end_matches('.').to_owned()
}

/// A folder's file of questions.
///
/// # Errors
/// When it cannot be read.
pub fn read(folder: &Path, file: &str) -> Result<Vec<Question>> {
    let path = folder.join(file);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let all: Result<Vec<Question>> = lines
        .map(|line| serde_json::from_str(line).with_context(|| path.display().to_string()))
        .collect();
    // The server cuts pictures as the vision file says, which is into four crops at most. The finer ones are
    // not answered well with these.
    let coarse = |question: &Question| question.num_crops.is_none_or(|n| n == CROPS);
    Ok(all?.into_iter().filter(coarse).collect())
}

/// Chats of two questions, no questions twice. No pictures come again before all others were shown.
pub fn pairs(questions: &[Question]) -> Vec<[Question; 2]> {
    let mut sets: BTreeMap<&[String], Vec<&Question>> = BTreeMap::new();
    for question in questions.iter().filter(|q| q.task != "caption") {
        sets.entry(&question.images).or_default().push(question);
    }
    let most = sets.values().map(Vec::len).max().unwrap_or(0);
    let rounds = (0..most / 2).map(|n| 2 * n);
    let all = rounds.flat_map(|n| sets.values().filter_map(move |set| set.get(n..n + 2)));
    all.map(|pair| [pair[0].clone(), pair[1].clone()]).collect()
}

/// The first message of a chat: its pictures, then the question.
///
/// # Errors
/// When a picture cannot be read.
pub fn first(folder: &Path, question: &Question) -> Result<Value> {
    let mut parts = Vec::new();
    for image in &question.images {
        let path = folder.join(image);
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        let url = format!("data:image/png;base64,{}", BASE64_STANDARD.encode(bytes));
        parts.push(json!({ "type": "image_url", "image_url": { "url": url } }));
    }
    parts.push(json!({ "type": "text", "text": question.question }));
    Ok(json!({ "role": "user", "content": parts }))
}

/// A greedy request.
pub fn request(messages: &[Value], max_tokens: usize, stream: bool) -> Value {
    json!({ "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": stream })
}

/// What was answered, as the chat's next message.
pub fn said(answer: &str) -> Value {
    json!({ "role": "assistant", "content": answer })
}

/// A further question without pictures.
pub fn further(question: &str) -> Value {
    json!({ "role": "user", "content": question })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(images: &[&str], question: &str, task: &str) -> Question {
        Question {
            id: String::new(),
            task: task.to_owned(),
            images: images.iter().map(|&image| image.to_owned()).collect(),
            num_crops: None,
            question: question.to_owned(),
            answer: "Red square".to_owned(),
        }
    }

    #[test]
    fn answers_are_compared_without_case_and_space() {
        let question = question(&["a"], "Which?", "shape");
        assert!(question.is_right(" red  square."));
        assert!(!question.is_right("red square 2"));
        assert!(!question.is_right(""));
    }

    #[test]
    fn chats_ask_twice_about_the_same_pictures() {
        let all = [
            question(&["a"], "1", "x"),
            question(&["b"], "2", "x"),
            question(&["a"], "3", "caption"),
            question(&["a"], "4", "x"),
            question(&["b", "c"], "5", "x"),
            question(&["b", "c"], "6", "x"),
            question(&["b", "c"], "7", "x"),
            question(&["a"], "8", "x"),
            question(&["a"], "9", "x"),
        ];
        let pairs = pairs(&all);
        let texts: Vec<[&str; 2]> = pairs
            .iter()
            .map(|pair| pair.each_ref().map(|q| &*q.question))
            .collect();
        assert_eq!(texts, [["1", "4"], ["5", "6"], ["8", "9"]]);
        assert!(pairs.iter().all(|[a, b]| a.images == b.images));
    }
}
