//! Chat templates: the model's own, others' and llama.cpp's, through the library and the program.

use hae::llama::Around;
use hae::llama::chat::{self, Message};
use hae::prompt::{ChatTemplate, Input, Source, Template, Transcript};
use serde_json::{Map, Value, json};

use crate::bin::{answer, hae, refusal};
use crate::fixture::{Copy, root};
use crate::model::{PICTURE, TEXT, WHERE, WHERE_ANSWER, load, repository};

fn golden(name: &str) -> String {
    let file = root().join(format!("tests/golden/chat/{name}.jinja"));
    std::fs::read_to_string(file).unwrap()
}

fn around(adds_bos: bool) -> Around {
    Around {
        bos: "<s>".into(),
        eos: "</s>".into(),
        adds_bos,
        adds_eos: false,
    }
}

fn template(name: &str) -> ChatTemplate {
    ChatTemplate::new(&golden(name), true, around(false), Map::new()).unwrap()
}

fn rendered(template: &ChatTemplate, messages: &[Value]) -> String {
    let input = Input {
        messages,
        add_generation_prompt: true,
        media: "<M>",
        ..Input::default()
    };
    template.render(&input).unwrap()
}

/// The model's own template says the same to Jinja and to llama.cpp's list.
#[test]
fn the_small_model_is_asked_as_before() {
    let model = load(&repository(TEXT));
    let own = Template::default().of(&model).unwrap().unwrap();
    assert!(own.is_jinja() && own.fallback().is_none());
    let said = [
        ("user", "Where?"),
        ("assistant", " Here.\n"),
        ("user", "And \"now\"?"),
    ];
    for n in [1, 3] {
        let messages = said[..n].iter().map(|(role, content)| Message {
            role: (*role).into(),
            content: (*content).into(),
        });
        let listed = chat::apply(own.text(), &messages.collect::<Vec<_>>(), true).unwrap();
        let messages = said[..n]
            .iter()
            .map(|(role, content)| json!({"role": role, "content": content}));
        assert_eq!(rendered(&own, &messages.collect::<Vec<_>>()), listed);
    }
}

#[test]
fn messages_are_brought_into_the_shape_that_a_template_knows() {
    let picture = json!({"type": "image_url", "image_url": {"url": "data:"}});
    let text = |text: &str| json!({"type": "text", "text": text});
    let shown = [json!({"role": "user", "content": [text("a"), text("b"), picture, text("c")]})];
    let only_text = rendered(&template("chatml"), &shown);
    assert!(
        only_text.contains("user\na\nb<M>c<|im_end|>"),
        "{only_text}"
    );
    let parts = rendered(&template("qwen2_vl"), &shown);
    assert!(parts.contains("user\nab<M>c<|im_end|>"), "{parts}");
    // Lists alone: a text becomes one.
    let said = [json!({"role": "user", "content": "abc"})];
    let lists = rendered(&template("smolvlm"), &said);
    assert_eq!(lists, "<|im_start|>User: abc<end_of_utterance>\nAssistant:");
    // No role of the system's.
    let said = [
        json!({"role": "system", "content": "Be short."}),
        json!({"role": "user", "content": "Hi"}),
    ];
    let merged = rendered(&template("gemma"), &said);
    assert!(
        merged.contains("user\nBe short.\nHi<end_of_turn>"),
        "{merged}"
    );
    // Arguments as OpenAI sends them, and as templates want them.
    let call = |arguments: Value| {
        [
            json!({"role": "user", "content": "?"}),
            json!({"role": "assistant", "content": null, "tool_calls": [
                {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}},
            ]}),
        ]
    };
    for arguments in [json!({"a": [1, "é"]}), json!("{\"a\": [1, \"é\"]}")] {
        let object = rendered(&template("qwen2_tools"), &call(arguments.clone()));
        assert!(
            object.contains(r#""arguments": {"a": [1, "é"]}}"#),
            "{object}"
        );
        let text = rendered(&template("deepseek"), &call(arguments));
        assert!(text.contains("```json\n{\"a\":"), "{text}");
    }
    for (message, expected) in [
        (json!("Hi"), "`messages`: 0: is no object"),
        (json!({"content": "Hi"}), "`messages`: 0: has no role"),
        (
            json!({"role": "user", "content": 3}),
            "`messages`: 0: has a content",
        ),
        (
            json!({"role": "user", "content": [3]}),
            "`messages`: 0: has a part",
        ),
    ] {
        let input = Input {
            messages: &[message],
            ..Input::default()
        };
        let error = template("chatml").render(&input).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn tools_reach_templates_that_know_them() {
    let tools = json!([{"type": "function", "function": {"name": "now", "parameters": {}}}]);
    let input = Input {
        messages: &[json!({"role": "user", "content": "?"})],
        tools: Some(&tools),
        ..Input::default()
    };
    let takes = template("qwen2_tools");
    assert!(takes.takes_tools() && takes.render(&input).unwrap().contains(r#""name": "now""#));
    assert!(!template("chatml").takes_tools());
    let listed = ChatTemplate::built_in("chatml").unwrap();
    let error = listed.render(&input).unwrap_err().to_string();
    assert!(
        !listed.takes_tools() && error.starts_with("`tools`: "),
        "{error}"
    );
}

#[test]
fn a_bos_that_tokenizing_adds_is_not_written_too() {
    let said = [json!({"role": "user", "content": "<s>"})];
    let of = |adds| ChatTemplate::new(&golden("gemma"), true, around(adds), Map::new()).unwrap();
    let (with, without) = (rendered(&of(false), &said), rendered(&of(true), &said));
    assert_eq!(with, format!("<s>{without}"));
    assert!(without.starts_with("<start_of_turn>user\n<s>"), "{without}");
}

/// Which of the two says what a text is.
#[test]
fn a_text_that_cannot_be_run_falls_back_on_llama_cpps_list() {
    let of = |text: &str, jinja| ChatTemplate::new(text, jinja, around(false), Map::new());
    let broken = "{% for message in messages %}<|im_start|>{{ message | unknown }}{% endfor %}";
    let template = of(broken, true).unwrap();
    assert!(!template.is_jinja());
    assert!(template.fallback().unwrap().contains("unknown"));
    let said = [json!({"role": "user", "content": "Hi"})];
    let expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(rendered(&template, &said), expected);
    for name in ["chatml", "phi3", "llama3"] {
        let template = of(name, true).unwrap();
        assert!(!template.is_jinja() && template.fallback().is_none());
    }
    assert!(of(&golden("chatml"), false).is_ok_and(|template| !template.is_jinja()));
    for text in [
        "no template",
        "",
        "{% broken",
        "{{ raise_exception('no') }}",
    ] {
        assert!(of(text, true).is_err(), "{text}");
    }
}

/// Templates that leave out the thoughts of earlier answers: the cache keeps them, and the conversation goes
/// on behind.
#[test]
fn a_turn_behind_thoughts_goes_on() {
    let mut transcript = Transcript::new(Some(template("thinking")), None);
    transcript.ask("one".into()).unwrap();
    for question in ["three", "five"] {
        transcript.answered("<think>\nhm\n</think>\n\ntwo");
        let expected =
            format!("<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(transcript.ask(question.into()).unwrap(), expected);
    }
    // One that rewrites what was asked is refused.
    let text = "{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}";
    let rewrites = ChatTemplate::new(text, true, around(false), Map::new()).unwrap();
    let mut transcript = Transcript::new(Some(rewrites), None);
    transcript.ask("one".into()).unwrap();
    transcript.answered("two");
    let error = transcript.ask("three".into()).unwrap_err().to_string();
    assert!(error.contains("rewrites earlier turns"), "{error}");
}

/// OpenAI's clients send no content beside calls, and some templates add every content to a text.
#[test]
fn calls_without_a_content_go_into_templates_that_want_one() {
    let calls =
        json!([{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]);
    let messages = [
        json!({"role": "user", "content": "one"}),
        json!({"role": "assistant", "content": null, "tool_calls": calls}),
        json!({"role": "tool", "tool_call_id": "c", "content": "two"}),
    ];
    let adds = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}";
    let asks = "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}!{% else %}{{ m.content }};{% endif %}{% endfor %}";
    for (text, expected) in [
        (adds, "user:one;assistant:;tool:two;"),
        (asks, "one;f!two;"),
    ] {
        let template = ChatTemplate::new(text, true, around(false), Map::new()).unwrap();
        assert_eq!(rendered(&template, &messages), expected);
    }
}

#[test]
fn a_template_is_kept_with_its_session() {
    let kwargs = json!({"enable_thinking": false})
        .as_object()
        .unwrap()
        .clone();
    let template = ChatTemplate::new(&golden("thinking"), true, around(true), kwargs).unwrap();
    let mut transcript = Transcript::new(Some(template), Some("Be short.".into()));
    transcript.ask("one".into()).unwrap();
    transcript.answered("two");
    let bytes = postcard::to_stdvec(&transcript).unwrap();
    let mut read: Transcript = postcard::from_bytes(&bytes).unwrap();
    let expected = transcript.ask("three".into()).unwrap();
    assert!(expected.ends_with("<think>\n\n</think>\n\n"), "{expected}");
    assert_eq!(read.ask("three".into()).unwrap(), expected);
    let model = load(&repository(TEXT));
    let raw = Template::from(Source::Raw).of(&model).unwrap();
    assert!(raw.is_none());
}

#[test]
fn the_command_line_takes_llama_cpps_flags() {
    let picture = repository(PICTURE);
    let picture = picture.to_str().unwrap();
    let files = Copy::new();
    let asks = [
        "run", "--temp", "0", "-n", "24", "--image", picture, "-p", WHERE,
    ];
    let own = "{% if x %}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n{% else %}{{ messages[0].content }}{% endif %}";
    files.write("own.jinja", own);
    let file = files.path("own.jinja");
    let file = file.to_str().unwrap();
    for flags in [
        &["--jinja"][..],
        &["--no-jinja"],
        &["--chat-template", "phi3"],
        &[
            "--chat-template-file",
            file,
            "--chat-template-kwargs",
            r#"{"x": true}"#,
        ],
    ] {
        let said = answer(&[&asks, flags].concat());
        assert_eq!(said.trim(), WHERE_ANSWER, "{flags:?}");
    }
    for (flags, expected) in [
        (&["--chat-template", "{% broken"][..], "--chat-template: "),
        (
            &["--chat-template-file", "/nonexistent/x"],
            "/nonexistent/x: ",
        ),
        (
            &["--chat-template-kwargs", "{"],
            "--chat-template-kwargs: no JSON object",
        ),
        (
            &["--chat-template-kwargs", "3"],
            "--chat-template-kwargs: no JSON object",
        ),
        (
            &[
                "--chat-template",
                "{{ messages[0].content }}{% if messages[0].content != '?' and messages[0].content != 'hae7needle' %}{{ raise_exception('Not this.') }}{% endif %}",
            ],
            "--chat-template: the template says: Not this.",
        ),
    ] {
        let line = refusal(&[&asks, flags].concat());
        assert!(line.contains(expected), "{line}");
    }
    let broken = "{{ broken }<|im_start|>";
    let output = hae()
        .args(asks)
        .args(["--chat-template", broken])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("the chat template cannot be run"),
        "{stderr}"
    );
}
