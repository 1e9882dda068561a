//! Workers on other machines (`--rpc`), here processes on this one: a model that is split over them answers as in
//! one process, what holds of the cache holds of one that lies there, and a worker that is none, or goes, is one line.

mod refused;
mod sizes;
mod wire;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use hae::attend::Lookup;
use hae::cache::Pos;
use hae::engine::Engine;
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine};
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{self, answer, hae};
use crate::model::{
    PICTURE, STORY, TEXT, WHERE, WHERE_ANSWER, converted, engine, exact, feed, feed_and_read, load,
    repository,
};
use crate::random_llama::grok;

/// Where a process of this program finds workers that its models go to.
const WORKERS: &str = "HAE_TEST_WORKERS";

/// Called before a model is loaded.
pub fn join_workers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Some(workers) = std::env::var(WORKERS).ok().filter(|w| !w.is_empty()) {
            let workers: Vec<String> = workers.split(',').map(str::to_owned).collect();
            hae::llama::add_workers(&workers).unwrap();
        }
    });
}

/// A worker that ends with the test.
pub struct Worker {
    child: Child,
    address: String,
}

impl Worker {
    fn start() -> Worker {
        Worker::with(|_| {})
    }

    /// With more words or another environment.
    fn with(more: impl Fn(&mut Command)) -> Worker {
        // Somebody else may take the port between the two.
        for _ in 0..5 {
            let port = free_port();
            let mut command = Command::new(hae().get_program());
            command
                .args(["rpc-worker", "-t", "1", "-p", &port.to_string()])
                .env("GOMP_SPINCOUNT", "0")
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            more(&mut command);
            let mut child = command.spawn().unwrap();
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none() {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    let address = format!("127.0.0.1:{port}");
                    return Worker { child, address };
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("no worker starts");
    }

    pub fn two() -> [Worker; 2] {
        [Worker::start(), Worker::start()]
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

pub fn list(workers: &[Worker]) -> String {
    let all: Vec<&str> = workers.iter().map(|worker| &*worker.address).collect();
    all.join(",")
}

/// The flags that put one half of the layers on each of two workers.
pub fn halves(rpc: &str) -> [&str; 6] {
    ["--rpc", rpc, "-ngl", "99", "-ts", "1,1"]
}

/// The flags of a question about a picture.
fn about(picture: &Path) -> [&str; 6] {
    let picture = picture.to_str().unwrap();
    ["--image", picture, "-p", WHERE, "-n", "24"]
}

/// Runs the small model; the report.
fn run(args: &[&str]) -> Value {
    let fixed = ["run", "-o", "json", "--temp", "0", "-t", "1"];
    serde_json::from_str(&answer(&[&fixed[..], args].concat())).unwrap()
}

/// What does not hang on where it was computed.
fn outcome(report: &Value) -> Value {
    let keys = ["text", "finish", "tokens", "evicted"];
    let mut all: BTreeMap<&str, Value> = keys.map(|key| (key, report[key].clone())).into();
    all.insert("cells", report["kv"]["cells"].clone());
    all.insert("bytes", report["kv"]["bytes_allocated"].clone());
    serde_json::to_value(all).unwrap()
}

#[test]
fn two_workers_answer_as_one_process() {
    let workers = Worker::two();
    let rpc = list(&workers);
    let there = halves(&rpc);
    let picture = repository(PICTURE);
    let shown = about(&picture);
    let story = ["-p", STORY, "-n", "60"];
    // By itself the policy looks up where the processor has the cache, and not where a device has it.
    let all = ["--attend", "1", "--attend-text", "1"];
    let pairs: [(&[&str], &[&str]); 5] = [
        (&["--kv-policy", "full"], &story),
        (&[&["--kv-policy", "hae"][..], &all].concat(), &shown),
        (&["--kv-policy", "hae", "--kv-budget", "0.5"], &story),
        (
            &[
                &[
                    "--kv-policy",
                    "hae",
                    "--dap-mode",
                    "midway",
                    "--score-layers",
                    "0",
                ][..],
                &all,
            ]
            .concat(),
            &shown,
        ),
        (
            &[
                "--kv-policy",
                "hae",
                "--attend",
                "0.3",
                "--attend-text",
                "0.3",
            ],
            &story,
        ),
    ];
    for (policy, prompt) in pairs {
        let here = run(&[policy, prompt].concat());
        let remote = run(&[policy, prompt, &there].concat());
        assert_eq!(outcome(&remote), outcome(&here), "{policy:?} {prompt:?}");
    }
    let said = run(&[pairs[1].0, &shown, &there].concat());
    assert!(said["text"].as_str().unwrap().contains(WHERE_ANSWER));
    assert!(said["evicted"]["after_prefill"].as_u64().unwrap() > 50);
}

/// Runs tests of this program in a process whose models go to workers; without any, they stay there. Nor has it the
/// GPU that this one may play (`DRY_METAL`): workers are processes of `hae`, which play none.
fn on_workers(workers: &[Worker], tests: &[&str]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "--test-threads=1"])
        .args(tests)
        .env(WORKERS, list(workers))
        .env_remove("DRY_METAL")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains(&format!("{} passed", tests.len())), "{text}");
    text
}

/// What is tested of the cache and its scores, with every layer and its cache on one of two workers. So can others be:
/// `HAE_TEST_WORKERS=HOST:PORT,... cargo test --release --test suite kv_cells`.
#[test]
fn what_holds_of_the_cache_holds_on_workers() {
    let workers = Worker::two();
    on_workers(
        &workers,
        &[
            "kv_positions::rows_do_not_know_how_v_is_stored",
            "kv_streams::two_sequences_apart",
            "lookup::lookups_equal_numpy",
            "midway::going_on_with_everything_changes_nothing",
            "midway_calls::what_is_kept_follows_its_cells",
            "rpc::a_context_that_goes_leaves_the_others",
            "taps::attention_of_layer_0_is_pytorchs",
            "taps::taps_leave_every_bit_of_the_logits",
        ],
    );
}

#[test]
fn a_cache_that_cannot_grow_stays_as_it_is_on_workers() {
    // What a worker has of a GPU is not its process' own memory, which the test limits.
    if bin::on_gpu() {
        return;
    }
    let workers = Worker::two();
    let test = "kv_memory::a_cache_that_cannot_grow_stays_as_it_is";
    on_workers(&workers, &[test]);
}

/// One token behind others; the logits.
fn step(engine: &mut LlamaEngine, pos: Pos, queries: &[u32], lookup: Option<&Lookup>) -> Vec<f32> {
    feed_and_read(engine, &[3 + pos % 900], pos, queries, lookup);
    engine.logits().unwrap().to_vec()
}

/// Tokens before it, in batches that a context takes.
fn fill(engine: &mut LlamaEngine, n: Pos) {
    let tokens: Vec<i32> = (0..n).map(|i| 3 + i % 900).collect();
    for (batch, from) in tokens.chunks(2000).zip((0..).step_by(2000)) {
        feed(engine, batch, from);
    }
}

/// A worker forgets its graphs with any buffer that it frees, and must not be asked for one again.
#[test]
fn a_context_that_goes_leaves_the_others() {
    let model = load(converted("f32").0);
    let mut other = engine(&model, exact(256));
    let mut stays = engine(&model, exact(256));
    fill(&mut other, 5);
    fill(&mut stays, 5);
    let expected = step(&mut other, 5, &[], None);
    assert_eq!(step(&mut stays, 5, &[], None), expected);
    let expected = step(&mut other, 6, &[], None);
    // The last graph is that of the one that stays.
    assert_eq!(step(&mut stays, 6, &[], None), expected);
    let expected = step(&mut other, 7, &[], None);
    assert_eq!(step(&mut stays, 7, &[], None), expected);
    drop(other);
    let logits = step(&mut stays, 8, &[], None);
    assert!(logits.iter().all(|x| x.is_finite()));
}

/// Logits of a prompt and some tokens behind it, as bits, for each type of cache.
#[test]
fn logits_are_the_same_bits() {
    if std::env::var_os(WORKERS).is_none() {
        let logits = |workers: &[Worker]| -> Vec<String> {
            let text = on_workers(workers, &["rpc::logits_are_the_same_bits"]);
            let lines = text.lines().filter(|line| line.starts_with("logits "));
            lines.map(str::to_owned).collect()
        };
        let here = logits(&[]);
        assert_eq!(here.len(), 3, "{here:?}");
        assert_eq!(logits(&Worker::two()), here);
        return;
    }
    let model = load(converted("f32").0);
    println!();
    for (kind, flash) in [
        (CacheType::F32, FlashAttention::Off),
        (CacheType::F16, FlashAttention::On),
        (CacheType::Q8_0, FlashAttention::On),
    ] {
        let options = ContextOptions {
            type_k: kind,
            type_v: kind,
            flash_attention: flash,
            ..exact(512)
        };
        let mut engine = engine(&model, options);
        let mut hasher = DefaultHasher::new();
        let tokens: Vec<i32> = (0..70).map(|i| 3 + i * 7919 % 900).collect();
        for rows in [0..61, 61..62, 62..63, 63..70] {
            feed(&mut engine, &tokens[rows.clone()], rows.start as Pos);
            let logits = engine.logits().unwrap();
            logits.iter().for_each(|x| x.to_bits().hash(&mut hasher));
        }
        println!("logits {kind:?} {:x}", hasher.finish());
    }
}

#[test]
fn a_conversation_goes_on_elsewhere() {
    let workers = Worker::two();
    let rpc = list(&workers);
    let there = halves(&rpc);
    let picture = repository(PICTURE);
    let first = about(&picture);
    let policy = ["--kv-policy", "hae", "--attend", "1", "--attend-text", "1"];
    let second = ["-p", "How many stars are there?", "-n", "24"];
    let mut outcomes = Vec::new();
    for (one, other) in [
        (&[][..], &[][..]),
        (&there, &[]),
        (&[], &there),
        (&there, &there),
    ] {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("s");
        let session = ["--session", file.to_str().unwrap()];
        run(&[&policy[..], &session, &first, one].concat());
        let report = run(&[&policy[..], &session, &second, other].concat());
        outcomes.push(outcome(&report));
    }
    for outcome in &outcomes[1..] {
        assert_eq!(outcome, &outcomes[0]);
    }
}

#[test]
fn a_worker_that_goes_ends_the_run_with_one_line() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("s");
    let session = ["--session", file.to_str().unwrap()];
    run(&[&session[..], &["-p", "Hi", "-n", "4"]].concat());
    let before = std::fs::read(&file).unwrap();
    let mut workers = Worker::two();
    let rpc = list(&workers);
    let mut child = Command::new(hae().get_program())
        .args([
            "run", "--temp", "0", "-t", "1", "-ngl", "99", "-n", "-1", "-p", STORY, "--rpc", &rpc,
            "-ts", "1,1",
        ])
        .args(session)
        .env("TMPDIR", dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut [0; 4])
        .unwrap();
    workers[1].child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    let gone = format!("hae: the worker at {} is gone", workers[1].address);
    assert!(stderr.starts_with(&gone), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    // What was kept before is whole, and nothing else is left.
    assert_eq!(std::fs::read(&file).unwrap(), before);
    let left = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    assert_eq!(left.collect::<Vec<_>>(), std::slice::from_ref(&file));
    // The other worker takes the next client.
    let rpc = ["--rpc", &workers[0].address, "-ngl", "99"];
    let report = run(&[&session[..], &["-p", "Hi", "-n", "4"], &rpc].concat());
    assert!(report["kv"]["cells"]["live"]["text"].as_u64().unwrap() > 4);
}

/// Bytes of weights and of the cache on each device, as `hae plan` says; the processor is "".
fn planned(model: &Path, args: &[&str]) -> BTreeMap<String, [u64; 2]> {
    let fixed = ["plan", "-o", "json", "-c", "1024"];
    let model = ["-m", model.to_str().unwrap()];
    let plan: Value = serde_json::from_str(&answer(&[&fixed[..], &model, args].concat())).unwrap();
    let parts = plan["places"]
        .as_array()
        .unwrap_or_else(|| panic!("{plan:#}"));
    let part = |part: &Value| {
        let name = part["device"].as_str().unwrap_or_default().to_owned();
        let bytes = |key: &str| part[key].as_u64().unwrap_or_else(|| panic!("{part:#}"));
        (name, [bytes("weights"), bytes("kv")])
    };
    parts.iter().map(part).collect()
}

/// The cache lies with its layers, and these where the flags say.
#[test]
fn layers_and_their_cache_go_where_they_are_sent() {
    let workers = Worker::two();
    let rpc = list(&workers);
    let rpc = ["--rpc", &rpc, "-ngl", "99"];
    let of = |args: &[&str]| planned(&repository(TEXT), &[&rpc[..], args].concat());
    let kv = |all: &BTreeMap<String, [u64; 2]>, name: &str| all.get(name).map_or(0, |part| part[1]);
    let weights =
        |all: &BTreeMap<String, [u64; 2]>, name: &str| all.get(name).map_or(0, |part| part[0]);
    let both = of(&["-ts", "1,1"]);
    assert!(
        kv(&both, "RPC0") > 0 && kv(&both, "RPC1") > 0 && kv(&both, "") == 0,
        "{both:?}"
    );
    let whole = kv(&both, "RPC0") + kv(&both, "RPC1");
    for (args, name) in [
        (&["-ts", "1,0"][..], "RPC0"),
        (&["-ts", "0/1"], "RPC1"),
        (&["-sm", "none"], "RPC0"),
        (&["-sm", "none", "-mg", "1"], "RPC1"),
        (&["-dev", "RPC1"], "RPC1"),
        (&["-dev", "RPC1,RPC0", "-ts", "1,0"], "RPC1"),
        (&["-dev", "none"], ""),
        (&["-sm", "none", "-mg", "-1"], ""),
        (&["-nkvo"], ""),
    ] {
        let all = of(args);
        assert_eq!(kv(&all, name), whole, "{args:?}: {all:?}");
    }
    // Tensors that stay.
    let dense = of(&["-ts", "1,1", "-ncffn", "99"]);
    let named = of(&["-ts", "1,1", "-ot", r"\.ffn_(up|down|gate)\.=CPU"]);
    assert_eq!(dense, named);
    assert!(
        weights(&dense, "") > weights(&both, ""),
        "{dense:?} {both:?}"
    );
    // It has no experts.
    assert_eq!(of(&["-ts", "1,1", "-cmoe", "-ncmoe", "2"]), both);
    // And it answers so.
    let here = run(&["-p", STORY, "-n", "12"]);
    for args in [
        &["-nkvo"][..],
        &["-ot", "ffn_down=CPU"],
        &["-sm", "none", "-mg", "1"],
        &["-dev", "none"],
    ] {
        let there = run(&[&["-p", STORY, "-n", "12"][..], &rpc, args].concat());
        assert_eq!(there["text"], here["text"], "{args:?}");
    }
}

/// A mixture of experts, which may stay here while everything else goes.
#[test]
fn experts_stay_where_they_are_told_to() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("mixture.gguf");
    grok(&path, 3);
    let model = ["-m", path.to_str().unwrap()];
    let workers = Worker::two();
    let rpc = list(&workers);
    let there = halves(&rpc);
    let here = |args: &[&str]| {
        let all = planned(&path, &[&there[..], args].concat());
        all.get("").map_or(0, |part| part[0])
    };
    let none = here(&[]);
    let all = here(&["-cmoe"]) - none;
    assert!(all > 0);
    for n in 1..3 {
        let some = here(&["-ncmoe", &n.to_string()]);
        assert_eq!(some - none, n * all / 3);
    }
    // -ncffn means what is no expert, of which this model has none.
    assert_eq!(here(&["-ncffn", "3"]), none);
    let question = [&model[..], &["-p", "Hi", "-n", "16"]].concat();
    let expected = outcome(&run(&question));
    for experts in [&[][..], &["-cmoe"], &["-ncmoe", "1"]] {
        let report = run(&[&question[..], &there, experts].concat());
        assert_eq!(outcome(&report), expected, "{experts:?}");
    }
}

#[test]
fn other_commands_split_their_models_too() {
    let workers = Worker::two();
    let rpc = list(&workers);
    let there = halves(&rpc);
    let bench = [
        "bench", "-p", "16", "-n", "4", "-r", "1", "-t", "1", "-o", "jsonl",
    ];
    let rows = answer(&[&bench[..], &there].concat());
    assert!(rows.lines().count() >= 4 && rows.contains("RPC1"), "{rows}");
    let questions = repository("tests/eval/small-phi3v/dev/understanding.jsonl");
    let eval = [
        "eval",
        questions.to_str().unwrap(),
        "--limit",
        "2",
        "-t",
        "1",
        "-o",
        "json",
    ];
    let of = [
        "--kv-policy",
        "full,hae",
        "--attend",
        "1",
        "--attend-text",
        "1",
    ];
    let right = |there: &[&str]| -> Vec<Value> {
        let report = answer(&[&eval[..], &of, there].concat());
        let report: Value = serde_json::from_str(&report).unwrap();
        let rows = report["summary"]["rows"].as_array().unwrap();
        rows.iter().map(|row| row["right"].clone()).collect()
    };
    assert_eq!(right(&there), right(&[]));
}
