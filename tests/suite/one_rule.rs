//! `hae run`, `hae eval` and `hae compare` on the same prompt: the same tokens, and the same report of
//! what they cost, whatever the policy, the size of the cache and the reach of the rope factors.

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bin::answer;
use crate::model::{PICTURE, repository};

/// Flags that all three take.
#[derive(Clone, Debug)]
struct Flags {
    n_ctx: u32,
    n_predict: u32,
    policy: &'static str,
    others: &'static str,
    rope: &'static str,
    crops: u32,
    question: &'static str,
}

fn flags() -> impl Strategy<Value = Flags> {
    let policy = select(
        &[
            ("full", ""),
            ("full", "--attend 0.2 --attend-text 0.5"),
            ("full", "-fa off -ctk f32 -ctv f32"),
            ("hae", ""),
            ("hae", "--kv-budget 0.5"),
            ("hae", "--dap-mode early --score-layers 3"),
            ("hae", "--dap-mode midway --score-layers 3 --kv-budget 0.5"),
            ("h2o", "--kv-budget 100"),
            ("snapkv", "--kv-budget 0.4"),
            ("streaming_llm", "--kv-budget 0.5"),
            ("context_shift", "--kv-budget 0.6"),
            ("random", "--kv-budget 0.6 --kv-seed 7"),
        ][..],
    );
    let question = select(&["Where is the red triangle?", "Describe the picture."][..]);
    (
        select(&[1024, 4096, 8192][..]),
        3..24u32,
        policy,
        select(&["auto", "auto", "short", "long", "context"][..]),
        select(&[4, 16][..]),
        question,
    )
        .prop_map(
            |(n_ctx, n_predict, (policy, others), rope, crops, question)| Flags {
                n_ctx,
                n_predict,
                policy,
                others,
                rope,
                crops,
                question,
            },
        )
}

impl Flags {
    fn words(&self) -> Vec<String> {
        let Flags {
            n_ctx,
            n_predict,
            policy,
            others,
            rope,
            crops,
            ..
        } = self;
        let text = format!(
            "-t 1 -c {n_ctx} -n {n_predict} --kv-policy {policy} {others} --rope-factors {rope} --num-crops {crops}"
        );
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn asked(&self, command: &[&str]) -> Value {
        let words = self.words();
        let words = words.iter().map(String::as_str);
        let args: Vec<&str> = command.iter().copied().chain(words).collect();
        serde_json::from_str(&answer(&args)).unwrap()
    }

    /// The only answer in a file of results.
    fn saved(&self, command: &[&str]) -> Value {
        let dir = TempDir::new().unwrap();
        let out = dir.path().join("r.jsonl");
        let out = out.to_str().unwrap();
        self.asked(&[command, &["-o", "json", "--out", out]].concat());
        let saved = std::fs::read_to_string(out).unwrap();
        let last = saved.lines().last().unwrap();
        serde_json::from_str(last).unwrap()
    }
}

/// What is said alike by all of them, under the names of results files.
fn told(answer: &Value, text: &str) -> Value {
    json!({
        "text": answer[text], "finish": answer["finish"], "tokens": answer["tokens"],
        "kv": answer["kv"], "evicted": answer["evicted"], "attended": answer["attended"],
    })
}

#[test]
fn run_eval_and_compare_answer_alike() {
    let picture = repository(PICTURE);
    let picture = picture.to_str().unwrap();
    let config = Config {
        cases: 10,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let same = runner.run(&flags(), |flags| {
        // One that draws by lot draws otherwise for each question. `compare` knows how long the full
        // cache's answer is, and one that prunes prompts alone leaves room for that.
        let by_lot = flags.policy == "random";
        let by_length = flags.policy == "snapkv";
        let prompt = ["--image", picture, "-p", flags.question];
        let run = ["run", "-o", "json", "--temp", "0"];
        let run = told(&flags.asked(&[&run[..], &prompt].concat()), "text");
        prop_assert!(run["text"].as_str().is_some_and(|text| !text.is_empty()));
        let compared = flags.saved(&[&["compare"][..], &prompt].concat());
        let compared = told(&compared, "answer");

        let dir = TempDir::new().unwrap();
        let file = dir.path().join("q.jsonl");
        let question = json!({"image": picture, "question": flags.question, "answer": "x"});
        std::fs::write(&file, question.to_string()).unwrap();
        let evaluated = flags.saved(&["eval", file.to_str().unwrap()]);
        let evaluated = told(&evaluated, "answer");
        if by_lot {
            prop_assert_eq!(&run["kv"]["cells"], &evaluated["kv"]["cells"]);
        } else {
            prop_assert_eq!(&run, &evaluated);
            prop_assert!(by_length || run == compared, "{run} {compared}");
        }
        Ok(())
    });
    same.unwrap();
}
