//! Answers that keep to a grammar, a schema or an expression.

use hae::chat::{Chat, ChatOptions};
use hae::constrain::{Grammar, Grammars};
use hae::image::Picture;
use hae::llama::SamplerOptions;
use hae::policy::PolicySpec;
use serde_json::{Value, json};

use crate::bin::{answer, refusal};
use crate::fixture::Copy;
use crate::model::{
    PICTURE, TEXT, VISION, WHERE, WHERE_ANSWER, converted, load, load_vision, repository,
};

fn asked(grammar: Option<Grammar>, policy: PolicySpec, sampler: SamplerOptions) -> Vec<String> {
    let model = load(&repository(TEXT));
    let vision = load_vision(&repository(VISION), &model);
    let picture = picture();
    let options = ChatOptions {
        grammar,
        policy,
        sampler,
        ..ChatOptions::default()
    };
    let mut chat = Chat::begin(&model, Some(vision), &options, Default::default()).unwrap();
    let first = chat.ask(WHERE, &[picture]).unwrap();
    let second = chat.ask(WHERE, &[]).unwrap();
    vec![first.text, second.text]
}

fn picture() -> Picture {
    let path = repository(PICTURE);
    let bytes = std::fs::read(&path).unwrap();
    hae::image::decode(&path, &bytes, &hae::image::Limits::default()).unwrap()
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "row": {"type": "integer", "minimum": 1, "maximum": 8},
            "column": {"type": "integer", "minimum": 1, "maximum": 8},
        },
        "required": ["row", "column"],
        "additionalProperties": false,
    })
}

/// Whether it is what [`schema`] describes.
fn is_valid(text: &str) -> bool {
    let Ok(Value::Object(found)) = serde_json::from_str(text) else {
        return false;
    };
    let number = |key| found.get(key).and_then(Value::as_u64);
    let fits = |n: Option<u64>| n.is_some_and(|n| (1..=8).contains(&n));
    found.len() == 2 && fits(number("row")) && fits(number("column"))
}

#[test]
fn answers_about_a_picture_keep_to_a_schema() {
    for policy in [PolicySpec::default(), PolicySpec::hae()] {
        for sampler in [
            SamplerOptions::GREEDY,
            SamplerOptions {
                temp: 1.5,
                repeat_penalty: 1.3,
                seed: 7,
                ..SamplerOptions::GREEDY
            },
        ] {
            let grammar = Grammar::json_schema(&schema()).unwrap();
            for text in asked(Some(grammar), policy.clone(), sampler) {
                assert!(is_valid(&text), "{text:?}");
            }
        }
    }
}

#[test]
fn what_the_model_says_anyway_stays_and_what_it_does_not_goes() {
    let free = asked(None, PolicySpec::default(), SamplerOptions::GREEDY);
    assert_eq!(free[0].trim(), WHERE_ANSWER);
    let own = " ?Row [0-9], column [0-9]";
    for grammar in [
        Grammar::regex(own).unwrap(),
        Grammar::gbnf("root ::= \" \"? \"Row \" n \", column \" n\nn ::= [0-9]").unwrap(),
        // One that leads back to itself.
        Grammar::gbnf("root ::= \" \"? word\nword ::= [A-Za-z0-9,] | [A-Za-z0-9, ] word").unwrap(),
    ] {
        let kept = asked(Some(grammar), PolicySpec::default(), SamplerOptions::GREEDY);
        assert_eq!(kept, free);
    }
    let other = Grammar::gbnf("root ::= (\"column \" [1-8] | \"nowhere\") \".\"").unwrap();
    let expected = regex::Regex::new("^(column [1-8]|nowhere)[.]$").unwrap();
    for text in asked(Some(other), PolicySpec::default(), SamplerOptions::GREEDY) {
        assert!(expected.is_match(&text), "{text:?}");
    }
}

/// A vocabulary as large as true ones have, in every kind of state.
#[test]
fn a_large_vocabulary_has_a_token_for_every_grammar() {
    let model = load(converted("f32").0);
    let grammars = Grammars::of(&model).unwrap();
    for grammar in [
        Grammar::json_object().unwrap(),
        Grammar::json_schema(&json!({"type": "string"})).unwrap(),
        Grammar::gbnf("root ::= \"(\" root* \")\" | [^()]").unwrap(),
        Grammar::regex("(?s:.*)").unwrap(),
    ] {
        let mut constraint = grammars.constraint(&grammar).unwrap();
        let mut n = 0;
        loop {
            let mut logits: Vec<f32> = (0..model.n_vocab())
                .map(|i| (i * 7919 % 1009) as f32)
                .collect();
            constraint.mask(&mut logits).unwrap();
            let token = hae::engine::likeliest(&logits).unwrap();
            constraint.accept(token).unwrap();
            n += 1;
            if n == 20 || hae::engine::Vocabulary::is_eog(&model, token) {
                break;
            }
        }
    }
}

#[test]
fn the_command_line_takes_llama_cpps_flags() {
    let picture = repository(PICTURE);
    let picture = picture.to_str().unwrap();
    let files = Copy::new();
    files.write("answer.gbnf", "root ::= \"Row \" [1-8]\r\n");
    files.write("answer.json", schema().to_string());
    let (grammar, json) = (files.path("answer.gbnf"), files.path("answer.json"));
    let ask = |flags: &[&str]| {
        let args = [
            "run", "--temp", "0", "-n", "200", "--image", picture, "-p", WHERE,
        ];
        answer(&[&args, flags].concat()).trim().to_owned()
    };
    let row = regex::Regex::new("^Row [1-8]$").unwrap();
    for flags in [
        &["--grammar", "root ::= \"Row \" [1-8]"][..],
        &["--grammar", "%llguidance {}\nstart: /Row [1-8]/"],
        &["--grammar-file", grammar.to_str().unwrap()],
    ] {
        assert!(row.is_match(&ask(flags)), "{flags:?}");
    }
    let text = schema().to_string();
    for flags in [
        ["-j", &*text],
        ["--json-schema", &*text],
        ["-jf", json.to_str().unwrap()],
        ["--json-schema-file", json.to_str().unwrap()],
    ] {
        let said = ask(&flags);
        assert!(is_valid(&said), "{flags:?}: {said}");
    }
}

/// Before a model is looked for.
#[test]
fn a_bad_grammar_is_refused_first() {
    for (flags, expected) in [
        (
            ["--grammar", "root ::= \"a"],
            "--grammar: line 1: a text without its end",
        ),
        (["--grammar", "%llguidance {}\nstart: ("], "--grammar: "),
        (
            ["--grammar-file", "/nonexistent/x.gbnf"],
            "/nonexistent/x.gbnf: ",
        ),
        (["-j", "{"], "--json-schema: no JSON"),
        (["-j", "[]"], "--json-schema: no schema"),
        (["-j", r#"{"type": "nothing"}"#], "--json-schema: "),
        (["-jf", "/nonexistent/x.json"], "/nonexistent/x.json: "),
    ] {
        let args = ["run", "-m", "/nonexistent/model.gguf", "-p", "Hi"];
        let line = refusal(&[&args[..], &flags].concat());
        assert!(line.contains(expected), "{flags:?}: {line}");
    }
    let both = ["run", "-p", "Hi", "-j", "{}", "--grammar", "root ::= \"a\""];
    assert!(!refusal_lines(&both).is_empty());
}

/// clap's own refusals have several lines.
fn refusal_lines(args: &[&str]) -> String {
    let output = crate::bin::hae().args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}
