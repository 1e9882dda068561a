use std::time::Duration;

use serde_json::json;

use super::*;

const GOLDEN: &str = include_str!("../../../tests/golden/chat/golden.json");

#[derive(serde::Deserialize)]
struct Golden {
    now: u64,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    template: String,
    name: String,
    messages: Vec<Json>,
    tools: Option<Json>,
    kwargs: Map<String, Json>,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
}

fn given(messages: &[Json]) -> Given<'_> {
    Given {
        messages,
        tools: None,
        more: &[],
        bos: "<s>",
        eos: "</s>",
        add_generation_prompt: true,
        now: SystemTime::UNIX_EPOCH,
    }
}

fn rendered(text: &str) -> Result<String> {
    Jinja::compile(text)?.render(&given(&[json!({"role": "user", "content": "Hi"})]))
}

/// What Jinja2 makes of the same templates and messages, letter by letter.
#[test]
fn texts_are_those_of_jinja2() {
    let golden: Golden = serde_json::from_str(GOLDEN).unwrap();
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(golden.now);
    assert!(golden.cases.len() > 150);
    let mut wrong = Vec::new();
    for case in &golden.cases {
        let file = format!("tests/golden/chat/{}.jinja", case.template);
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let jinja = Jinja::compile(&std::fs::read_to_string(file).unwrap()).unwrap();
        let made = jinja.render(&Given {
            tools: case.tools.as_ref(),
            more: &[&case.kwargs],
            add_generation_prompt: case.add_generation_prompt,
            now,
            ..given(&case.messages)
        });
        let right = match (&made, &case.text, &case.error) {
            (Ok(made), Some(text), None) => made == text,
            (Err(error), None, Some(said)) => error.to_string().contains(&**said),
            _ => false,
        };
        if !right {
            wrong.push(format!(
                "{} {}: {made:?}\nexpected {:?} {:?}",
                case.template, case.name, case.text, case.error
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn what_a_template_raises_is_told_on_one_line() {
    for (text, expected) in [
        (
            "{{ raise_exception('Roles must\ntake turns') }}",
            "`chat_template`: the template says: Roles must take turns",
        ),
        (
            "{% macro m() %}{{ raise_exception('no') }}{% endmacro %}{% for m2 in messages %}{{ m() }}{% endfor %}",
            "`chat_template`: the template says: no",
        ),
    ] {
        assert_eq!(rendered(text).unwrap_err().to_string(), expected);
    }
    for text in [
        "{% if %}",
        "{{ messages[0].nothing.more }}",
        "{{ unknown() }}",
        "{{ 'a' | unknown }}",
        "{% for",
    ] {
        let error = rendered(text).unwrap_err().to_string();
        assert!(error.starts_with("`chat_template`: "), "{error}");
        assert!(!error.contains('\n') && error.len() < 400, "{error}");
    }
    let long = format!("{{{{ raise_exception('{}') }}}}", "x".repeat(9999));
    assert!(rendered(&long).unwrap_err().to_string().len() < 400);
}

/// In a moment, and without much memory.
#[test]
fn what_would_never_end_or_fill_the_memory_is_refused() {
    let start = std::time::Instant::now();
    for text in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' * 999999999 }}",
        "{{ 'x' * 99999999 * 99999999 }}",
        "{{ range(99999999) | list }}",
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{{ messages | tojson(indent=99999999) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
    ] {
        let error = rendered(text).map(|made| made.len()).expect_err(text);
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    for text in [
        "(".repeat(100_000),
        format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000)),
        format!("{{{{ {} }}}}", "[".repeat(20_000)),
        format!("{{{{ {}b }}}}", "a.".repeat(60_000)),
        format!("{{{{ {}1 }}}}", "1 + ".repeat(30_000)),
        format!(
            "{}{}",
            "{% if true %}".repeat(20_000),
            "{% endif %}".repeat(20_000)
        ),
        "x".repeat(MOST_TEXT + 1),
    ] {
        if let Err(error) = rendered(&text) {
            assert!(error.to_string().len() < 400);
        }
    }
    assert!(start.elapsed() < Duration::from_secs(30));
}

/// A long conversation is no attack.
#[test]
fn a_long_conversation_has_fuel_enough() {
    let text = "word ".repeat(2000);
    let messages: Vec<Json> = (0..1000)
        .map(|i| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": text}))
        .collect();
    let file = "tests/golden/chat/thinking.jinja";
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let jinja = Jinja::compile(&std::fs::read_to_string(file).unwrap()).unwrap();
    let made = jinja.render(&given(&messages)).unwrap();
    assert!(made.len() > 1000 * text.trim_end().len());
}
