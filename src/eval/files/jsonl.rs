//! Our own format: one JSON object a line.
//!
//! | field | |
//! |---|---|
//! | `id` | optional, text or a number; otherwise the number of the line |
//! | `image`, `images` | a path or a list of paths, relative to the file or to `--image-dir` |
//! | `num_crops` | crops that the pictures are cut into at most |
//! | `question` | what the user says; `<\|image_k\|>` says where pictures go, otherwise they are in front |
//! | `prompt` | the whole prompt with the model's own marks, used with `--no-conversation` or where there is no `question` |
//! | `answer`, `answers` | what counts as right; beside `options`, a letter, a number from 0, or an option's text |
//! | `match` | how the answer is compared: `exact` (without it), `contains` or `anls` ([`Match`]) |
//! | `wrong` | beside `contains`: answers that must not come before the right one |
//! | `options` | makes it multiple choice; they are put behind the question |
//! | `facts` | makes it a story: a list of `name`, `attribute`, `value`, `mentions` |
//! | `turns` | makes it a chat: a list of objects with these fields but pictures |
//! | `task` | what tables group by; for stories `kind` |
//!
//! Other fields are left alone.

use serde::Deserialize;

use super::Source;
use crate::error::{Error, Result};
use crate::eval::question::{Expected, Fact, Image, Question, Turn, letter, with_options};

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected text or a number")]
enum Word {
    Text(String),
    Number(serde_json::Number),
}

impl Word {
    fn text(&self) -> String {
        match self {
            Word::Text(text) => text.clone(),
            Word::Number(number) => number.to_string(),
        }
    }
}

/// How an answer is compared with those that are right.
#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Match {
    /// It is one of them ([`crate::eval::score`]).
    Exact,
    /// It holds one of them ([`crate::eval::held`]).
    Contains,
    /// How near it is to one of them ([`crate::eval::anls`]).
    Anls,
}

#[derive(Deserialize)]
#[serde(expecting = "a question: an object")]
struct Row {
    id: Option<Word>,
    image: Option<String>,
    images: Option<Vec<String>>,
    num_crops: Option<u32>,
    kind: Option<String>,
    turns: Option<Vec<Asked>>,
    #[serde(flatten)]
    asked: Asked,
}

#[derive(Deserialize)]
#[serde(expecting = "a question: an object")]
struct Asked {
    task: Option<String>,
    question: Option<String>,
    prompt: Option<String>,
    answer: Option<Word>,
    answers: Option<Vec<Word>>,
    r#match: Option<Match>,
    wrong: Option<Vec<Word>>,
    options: Option<Vec<String>>,
    facts: Option<Vec<Fact>>,
}

pub(super) fn read(source: &Source) -> Result<Vec<Question>> {
    let text = source.text()?;
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| question(source, i + 1, line))
        .collect()
}

fn question(source: &Source, number: usize, line: &str) -> Result<Question> {
    let place = format!("line {number}");
    let wrong = |reason: String| source.wrong(&place, reason);
    let row: Row = serde_json::from_str(line).map_err(|e| wrong(super::reason(&e)))?;
    let names = match (row.image, row.images) {
        (Some(image), None) => vec![image],
        (None, images) => images.unwrap_or_default(),
        (Some(_), Some(_)) => return Err(wrong("both image and images, expected one".into())),
    };
    if row.num_crops == Some(0) {
        return Err(wrong("num_crops is 0, expected at least 1".into()));
    }
    let folder = source.images("");
    let images = names
        .iter()
        .map(|name| Image::file(&source.path, &place, folder.join(name)))
        .collect::<Result<_>>()?;
    let turns = match row.turns {
        None => vec![turn(row.asked, row.kind.as_deref(), &wrong)?],
        Some(turns) if turns.is_empty() => {
            return Err(wrong("no turns, expected at least one".into()));
        }
        Some(turns) => turns
            .into_iter()
            .map(|asked| {
                if asked.question.is_none() {
                    return Err(wrong("a turn has no question, expected text".into()));
                }
                turn(asked, None, &wrong)
            })
            .collect::<Result<_>>()?,
    };
    Ok(Question {
        id: row.id.map_or_else(|| number.to_string(), |id| id.text()),
        place,
        images,
        num_crops: row.num_crops,
        turns,
    })
}

fn turn(asked: Asked, kind: Option<&str>, wrong: &dyn Fn(String) -> Error) -> Result<Turn> {
    let Asked {
        task,
        question,
        prompt,
        answer,
        answers,
        r#match,
        wrong: others,
        options,
        facts,
    } = asked;
    let Some(text) = question.as_ref().or(prompt.as_ref()) else {
        return Err(wrong(
            "has no question, expected \"question\" or \"prompt\"".into(),
        ));
    };
    let texts = |words: Option<Vec<Word>>| -> Vec<String> {
        words.iter().flatten().map(Word::text).collect()
    };
    let given = match (answer, answers) {
        (Some(answer), None) => Some(vec![answer.text()]),
        (None, answers) => answers.map(|all| texts(Some(all))),
        (Some(_), Some(_)) => return Err(wrong("both answer and answers, expected one".into())),
    };
    let text = match &options {
        Some(options) => with_options(text, options),
        None => text.clone(),
    };
    if r#match.is_some() && (facts.is_some() || options.is_some()) {
        return Err(wrong("match beside facts or options, expected one".into()));
    }
    if others.is_some() && r#match != Some(Match::Contains) {
        return Err(wrong("wrong without match \"contains\"".into()));
    }
    let fallback = if facts.is_some() { "story" } else { "question" };
    let expected = match (facts, options, given) {
        (Some(facts), None, _) => Expected::Facts(facts),
        (Some(_), Some(_), _) => return Err(wrong("both facts and options, expected one".into())),
        (None, Some(options), Some(given)) => {
            let answer = option(&options, &given).map_err(wrong)?;
            Expected::Choice { options, answer }
        }
        (None, None, Some(words)) => match r#match.unwrap_or(Match::Exact) {
            Match::Exact => Expected::Words(words),
            Match::Contains => Expected::Held {
                right: words,
                wrong: texts(others),
            },
            Match::Anls => Expected::Near(words),
        },
        (None, _, None) => Expected::Nothing,
    };
    Ok(Turn {
        task: task
            .or(kind.map(str::to_owned))
            .unwrap_or_else(|| fallback.to_owned()),
        text,
        raw: prompt,
        expected,
    })
}

/// The option that the answer names.
fn option(options: &[String], given: &[String]) -> Result<usize, String> {
    let [answer] = given else {
        let n = given.len();
        return Err(format!("{n} answers beside options, expected one"));
    };
    let answer = answer.trim();
    let by_letter = |i: &usize| answer == letter(*i).to_string();
    let by_text = |i: &usize| answer == options[*i].trim();
    let all = 0..options.len();
    let found = all
        .clone()
        .find(by_text)
        .or_else(|| all.clone().find(by_letter));
    let number = || answer.parse().ok().filter(|n| all.contains(n));
    found.or_else(number).ok_or_else(|| {
        let n = options.len();
        format!("the answer {answer:?} is none of its {n} options, expected a letter, a number from 0, or an option's text")
    })
}
