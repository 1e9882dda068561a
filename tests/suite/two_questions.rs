//! Chats of two questions about different parts of one picture. The first question prunes the
//! picture; the second must not suffer from it.
//!
//! From the small model's development and test sets, each picture of at most 6 crops once, about
//! 90 chats: the first two questions of it that speak of different objects. The first answer is the
//! model's own.

use std::collections::BTreeSet;
use std::time::Duration;

use hae::asker::{Asker, Contender};
use hae::bench::Pulse;
use hae::eval::question::{Expected, Image, Question, Turn};
use hae::generate::Finish;
use hae::llama::{CacheType, ContextOptions, FlashAttention, Model};
use hae::open::RopeChoice;
use hae::policy::{PolicyOptions, PolicySpec};
use hae::prompt::Template;
use serde_json::Value;

use crate::model::{TEXT, VISION, exact, load, load_vision, repository};

const SETS: [&str; 2] = ["dev", "test"];
const MOST_CROPS: u32 = 6;
const N_CTX: u32 = 2048;
/// Tokens of an answer.
const MOST: usize = 64;

/// The objects that a question is about.
fn about(row: &Value) -> BTreeSet<String> {
    let list = row["about"].as_array().unwrap();
    list.iter().map(Value::to_string).collect()
}

fn text(row: &Value, key: &str) -> String {
    row[key].as_str().unwrap().to_owned()
}

fn turn(row: &Value) -> Turn {
    Turn {
        task: text(row, "task"),
        text: text(row, "question"),
        raw: None,
        expected: Expected::Words(vec![text(row, "answer")]),
    }
}

fn chats() -> Vec<Question> {
    let mut chats = Vec::new();
    for set in SETS {
        let folder = format!("tests/eval/small-phi3v/{set}");
        let file = std::fs::read_to_string(repository(&format!("{folder}/understanding.jsonl")));
        let rows: Vec<Value> = file
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let one = |row: &&Value| row["images"].as_array().unwrap().len() == 1;
        // Questions of a picture follow one another.
        let rows: Vec<&Value> = rows.iter().filter(one).collect();
        for rows in rows.chunk_by(|a, b| a["images"] == b["images"]) {
            let num_crops = rows[0]["num_crops"].as_u64().map(|n| n as u32).unwrap();
            if num_crops > MOST_CROPS {
                continue;
            }
            let apart = |a: &Value, b: &Value| {
                let (a, b) = (about(a), about(b));
                !a.is_empty() && !b.is_empty() && a.is_disjoint(&b)
            };
            let pairs = rows.iter().enumerate().flat_map(|(i, &a)| {
                let later = rows[i + 1..].iter();
                later.filter(move |b| apart(a, b)).map(move |&b| (a, b))
            });
            let Some((first, second)) = pairs.into_iter().next() else {
                continue;
            };
            let path = format!("{folder}/{}", second["images"][0].as_str().unwrap());
            chats.push(Question {
                id: text(second, "id"),
                place: path.clone(),
                images: vec![Image::File(repository(&path))],
                num_crops: Some(num_crops),
                turns: vec![turn(first), turn(second)],
            });
        }
    }
    chats
}

/// What came of second questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Answered word for word.
    right: usize,
    /// Visual tokens that were gone before they were asked.
    gone: usize,
}

impl std::ops::Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Tally {
            right: self.right + other.right,
            gone: self.gone + other.gone,
        }
    }
}

fn contender(asker: &Asker, policy: &str, recall: bool) -> Contender {
    let options = PolicyOptions {
        recall,
        ..PolicyOptions::default()
    };
    let context = ContextOptions {
        type_k: CacheType::F16,
        type_v: CacheType::F16,
        flash_attention: FlashAttention::Auto,
        ..exact(N_CTX)
    };
    let policy = PolicySpec::new(policy, options);
    asker
        .contender(policy.name.clone(), policy, None, &context)
        .unwrap()
}

/// Holds each chat with `full`, `hae` and `hae` without recall; its picture is encoded once.
fn hold(model: &Model, chats: &[Question]) -> [Tally; 3] {
    let vision = load_vision(&repository(VISION), model);
    let template = Template::default().of(model).unwrap();
    let mut asker = Asker::new(model, Some(vision), template, RopeChoice::Auto);
    let contenders = [("full", true), ("hae", true), ("hae", false)]
        .map(|(policy, recall)| contender(&asker, policy, recall));
    let watch = Pulse {
        now: &|| Duration::ZERO,
        cancelled: &|| false,
    };
    let mut tallies = [Tally::default(); 3];
    for chat in chats {
        asker.next_question();
        let picture = chat.images[0].load(chat.num_crops).unwrap();
        let pictures = std::slice::from_ref(&picture);
        let Expected::Words(words) = &chat.turns[1].expected else {
            panic!("{chat:?}");
        };
        for (contender, tally) in contenders.iter().zip(&mut tallies) {
            let n_predict = [MOST, MOST];
            let answers = asker.ask(contender, chat, pictures, &n_predict, None, watch);
            let answers = answers.unwrap().unwrap();
            let [first, second] = &answers[..] else {
                panic!("{answers:?}");
            };
            let same = second.text.trim() == words[0] && second.finish == Finish::Eog;
            *tally = *tally
                + Tally {
                    right: usize::from(same),
                    gone: first.kv.cells.evicted.vision,
                };
        }
    }
    tallies
}

/// Accuracy within one point of never having pruned. Without recall it is not, or the comparison
/// would prove nothing.
#[test]
fn a_second_question_does_not_suffer_from_the_first() {
    let chats = chats();
    let n = chats.len();
    assert!(n > 80, "{n}");
    let model = load(&repository(TEXT));
    // By two threads: it is the last test that ends.
    let (one, other) = chats.split_at(n / 2);
    let tallies = std::thread::scope(|scope| {
        let one = scope.spawn(|| hold(&model, one));
        let other = hold(&model, other);
        let one = one.join().unwrap();
        [0, 1, 2].map(|i| one[i] + other[i])
    });
    let [full, recalled, forgotten] = tallies;
    println!(
        "{n} chats: never pruned {}, recalled {}, without recall {}; {} visual tokens a picture were gone",
        full.right,
        recalled.right,
        forgotten.right,
        recalled.gone / n
    );
    assert_eq!((full.gone, recalled.gone), (0, forgotten.gone));
    assert!(recalled.gone > 50 * n);
    let point = n as f64 / 100.0;
    assert!(recalled.right as f64 >= full.right as f64 - point);
    assert!((forgotten.right as f64) < full.right as f64 - 5.0 * point);
}
