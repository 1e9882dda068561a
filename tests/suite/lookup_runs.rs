//! Lookups beside all else that a conversation does: eviction, recall, sessions.

use hae::attend::Attend;
use hae::llama::{ContextOptions, LlamaEngine, SamplerOptions};
use hae::policy::Amount;
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{answer, refusal};
use crate::model::{PICTURE, STORY, TEXT, exact, load, repository};
use crate::others::{mamba, qwen2vl};
use crate::random_llama::{bloom, grok};
use crate::session::{assert_goes_on, assert_goes_on_from};

fn number(report: &Value, pointer: &str) -> f64 {
    report.pointer(pointer).and_then(Value::as_f64).unwrap()
}

/// Tokens of the answer that were fed. What ends an answer comes behind the last of them; an answer
/// that was cut ends with one that was not fed.
fn fed(report: &Value) -> f64 {
    let cut = f64::from(report["finish"] != "eog");
    number(report, "/tokens/generated") - cut
}

/// What a report of an answer has to say where this many visual cells of each step were looked at,
/// and all of text.
fn assert_attended(report: &Value, seen: f64) {
    let steps = number(report, "/attended/steps");
    assert_eq!(steps, fed(report), "{report}");
    let vision = number(report, "/kv/cells/live/vision");
    let share = number(report, "/attended/vision");
    assert!((share - seen / vision).abs() < 1e-9, "{report}");
    // Each step sees one cell more, up to those that are held at the end.
    let held = vision + number(report, "/kv/cells/live/text");
    let in_view = steps * held - steps * (steps - 1.0) / 2.0;
    let all = 1.0 - steps * (vision - seen) / in_view;
    let share = number(report, "/attended/all");
    assert!((share - all).abs() < 1e-9, "{share} {all}: {report}");
}

#[test]
fn lookups_go_on_in_another_process() {
    for more in [&[][..], &["-ctk", "q8_0", "-ctv", "q8_0"], &["-fa", "off"]] {
        let second = assert_goes_on(&[&["--attend", "20"], more].concat());
        // The picture begins at position 2, and the first 4 are looked at by all.
        assert_attended(&second, 22.0);
    }
    let second = assert_goes_on(&["--attend", "0.3", "--attend-text", "0.2"]);
    assert!(number(&second, "/attended/all") < 0.6, "{second}");
}

/// The second question judges the whole picture anew, and each answer looks a few of its cells up.
#[test]
fn lookups_serve_what_eviction_and_recall_leave() {
    for dap_mode in ["exact", "early", "midway"] {
        let second = assert_goes_on(&[
            "--kv-policy",
            "hae",
            "--dap-keep",
            "40",
            "--dap-mode",
            dap_mode,
            "--attend",
            "0.25",
        ]);
        assert!(number(&second, "/kv/cells/recalled/vision") > 0.0);
        // A quarter of 38, beside 2.
        assert_attended(&second, 12.0);
    }
}

/// Cells leave while an answer is written, into the bin and out of the cache, and lookups go on.
#[test]
fn lookups_go_on_while_answers_evict() {
    let flags = [
        "--kv-policy",
        "hae",
        "--kv-budget",
        "200",
        "--attend",
        "0.3",
        "--attend-text",
        "0.5",
    ];
    let second = assert_goes_on_from(STORY, &flags);
    assert_eq!(number(&second, "/attended/steps"), fed(&second));

    let picture = repository(PICTURE);
    let run = [
        "run",
        "--image",
        picture.to_str().unwrap(),
        "-p",
        STORY,
        "-n",
        "150",
        "--temp",
        "0",
        "-t",
        "1",
        "-o",
        "json",
    ];
    let story = serde_json::from_str(&answer(&[&run[..], &flags].concat())).unwrap();
    assert_eq!(number(&story, "/attended/steps"), fed(&story));
    assert!(number(&story, "/evicted/in_decoding") > 100.0, "{story}");
    assert!(number(&story, "/evicted/restores") > 0.0, "{story}");
    // What is always looked at is part of these: two cells of the picture, half of the text.
    assert!((0.3..0.4).contains(&number(&story, "/attended/vision")));
    assert!((0.5..0.7).contains(&number(&story, "/attended/all")));
}

#[test]
fn lookups_of_m_rope_models_go_on_in_another_process() {
    // So sharp that it does not end its answers at once.
    let pair = qwen2vl(10.0);
    let [text, vision] = ["text.gguf", "vision.gguf"].map(|name| pair.file(name));
    let files = [
        "-m",
        text.to_str().unwrap(),
        "-mm",
        vision.to_str().unwrap(),
    ];
    let second = assert_goes_on(&[&files[..], &["--attend", "20"]].concat());
    assert_attended(&second, 20.0);
}

#[test]
fn a_context_of_several_sequences_is_refused() {
    let model = load(&repository(TEXT));
    let options = ContextOptions {
        n_seq_max: 2,
        attend: Attend {
            vision: Some(Amount::Cells(10)),
            ..Attend::default()
        },
        ..exact(256)
    };
    let made = LlamaEngine::new(&model, options, &SamplerOptions::GREEDY);
    let error = made.err().unwrap().to_string();
    assert!(
        error.contains("sequences beside `attend`, which serves one"),
        "{error}"
    );
}

/// No cache at all, ALiBi, a cap.
#[test]
fn models_whose_attention_is_another_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    mamba().write(&path("mamba"));
    bloom(&path("bloom"), 2, 2);
    grok(&path("grok"), 2);
    for name in ["mamba", "bloom", "grok"] {
        let path = path(name);
        let args = [
            "run",
            "-p",
            "What?",
            "--attend-text",
            "0.5",
            "-c",
            "256",
            "-m",
        ];
        let line = refusal(&[&args[..], &[path.to_str().unwrap()]].concat());
        let reason = "--attend: this model's attention cannot look cells up";
        assert!(line.contains(reason), "{name}: {line}");
    }
}
