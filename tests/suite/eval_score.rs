//! The story check against the Python script's own results, and answers against its scores.

use hae::eval::facts::{Statement, statements};
use hae::eval::files::Source;
use hae::eval::question::{Expected, Question};
use hae::eval::score::{judge, told};
use hae::eval::stats::Share;
use serde_json::Value;

use crate::fixture::json;
use crate::model::repository;

fn questions(path: &str) -> Vec<Question> {
    let source = Source {
        path: repository(path),
        ..Source::default()
    };
    source.read().unwrap().1
}

fn story<'q>(questions: &'q [Question], id: &str) -> &'q Expected {
    let question = questions.iter().find(|q| q.id == id).unwrap();
    &question.turns[0].expected
}

fn count(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

/// `tests/golden/facts/make.py`: right stories and damaged ones.
#[test]
fn statements_are_those_that_the_script_finds() {
    let golden = json(&repository("tests/golden/facts/facts.json"));
    let questions = questions("tests/eval/small-phi3v/dev/story.jsonl");
    let rows = golden.as_array().unwrap();
    assert_eq!(rows.len(), 21);
    for row in rows {
        let text = row["text"].as_str().unwrap();
        let expected: Vec<Statement> = row["statements"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| {
                let part = |i: usize| s[i].as_str().unwrap().to_owned();
                Statement {
                    name: part(0),
                    attribute: part(1),
                    value: part(2),
                }
            })
            .collect();
        assert_eq!(statements(text), expected, "{text}");
        let Expected::Facts(facts) = story(&questions, row["id"].as_str().unwrap()) else {
            panic!("{row}")
        };
        let (score, golden) = (told(text, facts), &row["score"]);
        assert_eq!(score.required, count(&golden["required"]));
        assert_eq!(score.made, count(&golden["made"]));
        assert_eq!(score.said, count(&golden["said"]));
        assert_eq!(score.correct, count(&golden["true"]));
        assert_eq!(score.by_fact.iter().sum::<usize>(), score.made);
    }
}

/// The texts that PyTorch told, and the shares that the script gave them.
#[test]
fn whole_sets_of_stories_score_as_the_script_scores_them() {
    for part in ["dev", "test"] {
        let folder = format!("tests/eval/small-phi3v/{part}");
        let scores = json(&repository(&format!("{folder}/scores.json")));
        let questions = questions(&format!("{folder}/story.jsonl"));
        for kind in ["story", "saga"] {
            let (mut required, mut made, mut said, mut correct, mut whole) = (0, 0, 0, 0, 0);
            for question in questions.iter().filter(|q| q.turns[0].task == kind) {
                let text = scores["story"]["texts"][&question.id].as_str().unwrap();
                let verdict = judge(&question.turns[0].expected, text, true);
                let score = verdict.facts.unwrap();
                required += score.required;
                made += score.made;
                said += score.said;
                correct += score.correct;
                whole += usize::from(verdict.right.unwrap());
            }
            let golden = &scores["story"][kind];
            let share = |some: usize, of: usize| (1e4 * some as f64 / of as f64).round() / 1e4;
            assert_eq!(required, count(&golden["facts"]));
            assert_eq!(golden["recall"], share(made, required), "{part} {kind}");
            assert_eq!(golden["precision"], share(correct, said), "{part} {kind}");
            // Word for word is at least as much as fact for fact.
            let n = count(&golden["n"]) as f64;
            assert!(
                whole as f64 >= golden["exact"].as_f64().unwrap() * n,
                "{part} {kind}"
            );
        }
    }
}

/// The intervals in the script's scores.
#[test]
fn intervals_are_the_scripts() {
    let scores = json(&repository("tests/eval/small-phi3v/dev/scores.json"));
    let tasks = scores["understanding"]["by_task"].as_object().unwrap();
    assert_eq!(tasks.len(), 25);
    for golden in tasks.values() {
        let n = count(&golden["n"]);
        let hits = (golden["accuracy"].as_f64().unwrap() * n as f64).round() as usize;
        let share = Share::of(hits, n);
        let rounded = |x: f64| (1e4 * x).round() / 1e4;
        assert_eq!(golden["low"], rounded(share.low));
        assert_eq!(golden["high"], rounded(share.high));
    }
}

/// Right answers are right, and no question takes another's answer for its own.
#[test]
fn answers_are_told_apart() {
    let questions = questions("tests/eval/small-phi3v/dev/understanding.jsonl");
    for question in &questions {
        let Expected::Words(words) = &question.turns[0].expected else {
            panic!("{question:?}")
        };
        let right = |text: &str| judge(&question.turns[0].expected, text, true).right;
        assert_eq!(right(&format!(" {}\n", words[0])), Some(true));
        assert_eq!(right(&format!("{} not", words[0])), Some(false));
    }
}
