//! Workers on other machines (`--rpc`), here processes on this one: a model that is split over them answers as in
//! one process, what holds of the cache holds of one that lies there, and a worker that is none, or goes, is one line.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use hae::attend::{Attend, Kind, Lookup};
use hae::cache::Pos;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::llama::{
    CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, ModelOptions, Placement,
};
use hae::policy::Amount;
use serde_json::Value;
use tempfile::TempDir;

use crate::bin::{answer, hae, refusal};
use crate::model::{
    PICTURE, STORY, TEXT, WHERE, WHERE_ANSWER, converted, engine, exact, load, repository,
};

/// Where a process of this program finds workers that its models go to.
const WORKERS: &str = "HAE_TEST_WORKERS";

/// Called before a model is loaded.
pub fn join_workers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Ok(workers) = std::env::var(WORKERS) {
            let workers: Vec<String> = workers.split(',').map(str::to_owned).collect();
            hae::llama::add_workers(&workers).unwrap();
        }
    });
}

/// A worker that ends with the test.
struct Worker {
    child: Child,
    address: String,
}

impl Worker {
    fn start() -> Worker {
        // Somebody else may take the port between the two.
        for _ in 0..5 {
            let port = free_port();
            let mut child = Command::new(hae().get_program())
                .args(["rpc-worker", "-t", "1", "-p", &port.to_string()])
                .env("GOMP_SPINCOUNT", "0")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
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

    fn two() -> [Worker; 2] {
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

fn list(workers: &[Worker]) -> String {
    let all: Vec<&str> = workers.iter().map(|worker| &*worker.address).collect();
    all.join(",")
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
    let there = ["--rpc", &rpc, "-ngl", "99", "-ts", "1,1"];
    let picture = repository(PICTURE);
    let shown = [
        "--image",
        picture.to_str().unwrap(),
        "-p",
        WHERE,
        "-n",
        "24",
    ];
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

/// Runs tests of this program in a process whose models go to workers.
fn on_workers(workers: &[Worker], tests: &[&str]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "--test-threads=1"])
        .args(tests)
        .env(WORKERS, list(workers))
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
            "kv_memory::a_cache_that_cannot_grow_stays_as_it_is",
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

/// One token behind others.
fn step(engine: &mut LlamaEngine, pos: Pos, queries: &[u32], lookup: Option<&Lookup>) -> Vec<f32> {
    let batch = Batch {
        seq: 0,
        input: Input::Tokens(&[3 + pos % 900]),
        pos: &[pos],
        queries,
        logits: true,
        lookup,
    };
    engine
        .decode(batch, &mut Vec::new(), &mut Observation::default())
        .unwrap();
    engine.logits().unwrap().to_vec()
}

/// Tokens before it.
fn fill(engine: &mut LlamaEngine, n: Pos) {
    let tokens: Vec<i32> = (0..n).map(|i| 3 + i % 900).collect();
    let pos: Vec<Pos> = (0..n).collect();
    let batch = Batch {
        seq: 0,
        input: Input::Tokens(&tokens),
        pos: &pos,
        queries: &[],
        logits: true,
        lookup: None,
    };
    engine
        .decode(batch, &mut Vec::new(), &mut Observation::default())
        .unwrap();
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
    let model = load(converted("f32").0);
    let mut lines = Vec::new();
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
        let all: Vec<i32> = (0..70).collect();
        for rows in [0..61, 61..62, 62..63, 63..70] {
            let batch = Batch {
                seq: 0,
                input: Input::Tokens(&tokens[rows.clone()]),
                pos: &all[rows],
                queries: &[],
                logits: true,
                lookup: None,
            };
            let mut seen = Observation::default();
            engine.decode(batch, &mut Vec::new(), &mut seen).unwrap();
            let logits = engine.logits().unwrap();
            logits.iter().for_each(|x| x.to_bits().hash(&mut hasher));
        }
        lines.push(format!("logits {kind:?} {:x}", hasher.finish()));
    }
    if std::env::var_os(WORKERS).is_some() {
        println!();
        lines.iter().for_each(|line| println!("{line}"));
        return;
    }
    let workers = Worker::two();
    let text = on_workers(&workers, &["rpc::logits_are_the_same_bits"]);
    let theirs: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("logits "))
        .collect();
    assert_eq!(theirs, lines);
}

#[test]
fn a_conversation_goes_on_elsewhere() {
    let workers = Worker::two();
    let rpc = list(&workers);
    let there = ["--rpc", &rpc, "-ngl", "99", "-ts", "1,1"];
    let picture = repository(PICTURE);
    let first = [
        "--image",
        picture.to_str().unwrap(),
        "-p",
        WHERE,
        "-n",
        "24",
    ];
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

/// Listens, and answers each connection's first message with these bytes.
fn pretender(bytes: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 64]);
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read(&mut [0; 64]);
        }
    });
    address
}

/// A worker's first answer.
fn greeting(version: [u8; 3]) -> Vec<u8> {
    let mut bytes = 28u64.to_le_bytes().to_vec();
    bytes.extend(version);
    bytes.extend([0; 25]);
    bytes
}

/// No file is looked at before the workers.
fn refused(args: &[&str]) -> String {
    refusal(&[&["run", "-m", "/nowhere.gguf", "-p", "Hi"][..], args].concat())
}

#[test]
fn workers_that_are_none() {
    let line = |address: &str| refused(&["--rpc", address]);
    for address in [
        "localhost",
        "localhost:0",
        "localhost:x",
        ":50052",
        "",
        "127.0.0.1:70000",
    ] {
        let said = line(address);
        assert!(
            said.contains("--rpc: ") && said.contains("expected HOST:PORT"),
            "{said}"
        );
    }
    let nobody = format!("127.0.0.1:{}", free_port());
    assert!(line(&nobody).contains(&format!("--rpc: \"{nobody}\": no worker answers there")));
    let said = line("no.such.host.invalid:50052");
    assert!(said.contains("has no such host"), "{said}");
    let other = pretender(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec());
    assert!(line(&other).contains("is no worker, or one of another version of ggml"));
    for version in [[6, 0, 0], [8, 0, 0], [7, 1, 0], [7, 0, 1]] {
        let said = line(&pretender(greeting(version)));
        let [a, b, c] = version;
        assert!(
            said.contains(&format!(
                "speaks version {a}.{b}.{c} of ggml's RPC, expected 7.0.0"
            )),
            "{said}"
        );
    }
    let said = line(&pretender(greeting([7, 0, 0])));
    assert!(said.contains("does not say its devices"), "{said}");
    let mut none = greeting([7, 0, 0]);
    none.extend(4u64.to_le_bytes());
    none.extend([0; 4]);
    assert!(line(&pretender(none)).contains("has no devices"));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let said = line(&silent.local_addr().unwrap().to_string());
    assert!(
        said.contains("says nothing for 5 s: it serves another client, or is no worker"),
        "{said}"
    );
    let worker = Worker::start();
    let twice = format!("{0},{0}", worker.address);
    assert!(line(&twice).contains("is given twice"));
    // The second is looked at before ggml is told of the first.
    assert!(line(&format!("{},{nobody}", worker.address)).contains("no worker answers there"));
    // One that serves somebody else.
    let _other = TcpStream::connect(&worker.address).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(line(&worker.address).contains("it serves another client"));
}

#[test]
fn places_that_are_none() {
    let worker = Worker::start();
    let rpc = ["--rpc", &worker.address];
    for (args, expected) in [
        (
            &["-dev", "RPC1"][..],
            "--device: no device \"RPC1\", expected some of RPC0",
        ),
        (&["-dev", "CPU"], "--device: no device \"CPU\""),
        (&["-dev", "RPC0,"], "--device: \"RPC0,\", expected names"),
        (&["-ts", "1,1"], "--tensor-split: 2 shares for 1 devices"),
        (&["-ts", "-1"], "--tensor-split: a share of -1"),
        (
            &["-ts", "much"],
            "--tensor-split: \"much\", expected numbers",
        ),
        (
            &["-sm", "none", "-mg", "1"],
            "--main-gpu: no device 1, expected 0 to 0",
        ),
        (
            &["-sm", "tensor"],
            "--split-mode: tensor cuts each layer's cache by heads",
        ),
        (
            &["-sm", "row"],
            "--split-mode: row: RPC0 cannot hold rows of a weight",
        ),
        (
            &["-ot", "ffn"],
            "--override-tensor: \"ffn\", expected PATTERN=BUFFER",
        ),
        (
            &["-ot", "ffn=GPU"],
            "--override-tensor: no buffer type \"GPU\", expected one of CPU, RPC0[",
        ),
    ] {
        let said = refused(&[&rpc[..], args].concat());
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    let devices = answer(&[&["run", "--list-devices"][..], &rpc].concat());
    let line = format!("  RPC0: {} (", worker.address);
    assert!(
        devices.starts_with("Available devices:\n") && devices.contains(&line),
        "{devices}"
    );
    // A pattern that is none is llama.cpp's to refuse.
    let said = refusal(&["run", "-p", "Hi", "-ot", "(=CPU"]);
    assert!(said.contains("cannot be loaded"), "{said}");
}

/// Bytes of weights and of the cache on each device, as `hae plan` says; the processor is "".
fn planned(args: &[&str]) -> BTreeMap<String, [u64; 2]> {
    let fixed = ["plan", "-o", "json", "-c", "1024"];
    let model = repository(TEXT);
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
    let of = |args: &[&str]| planned(&[&rpc[..], args].concat());
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

#[test]
fn other_commands_split_their_models_too() {
    let workers = Worker::two();
    let rpc = list(&workers);
    let there = ["--rpc", &rpc, "-ngl", "99", "-ts", "1,1"];
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

#[test]
fn workers_that_cannot_be() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (args, expected) in [
        (&["-p", &port][..], format!("--port: 127.0.0.1:{port}: ")),
        (&["-H", "192.0.2.1"], "--port: 192.0.2.1:50052: ".into()),
        (
            &["-d", "GPU7"],
            "--device: no device \"GPU7\", expected some of ".into(),
        ),
        (
            &["-d", "none"],
            "--device: none, expected the name of one".into(),
        ),
    ] {
        let output = hae().arg("rpc-worker").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(&expected), "{args:?}: {said}");
    }
    for args in [["-H", "localhost"], ["-p", "0"], ["-t", "0"]] {
        let output = hae().arg("rpc-worker").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn who_listens_to_everybody_is_warned() {
    let port = free_port().to_string();
    let mut child = Command::new(hae().get_program())
        .args(["rpc-worker", "-H", "0.0.0.0", "-p", &port, "-t", "1"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        line.contains("can be reached from other machines")
            && line.contains("networks that you trust"),
        "{line}"
    );
}

/// Weights that a worker has kept come from there.
#[test]
fn a_worker_keeps_large_tensors() {
    let dir = TempDir::new().unwrap();
    let port = free_port().to_string();
    let mut child = Command::new(hae().get_program())
        .args(["rpc-worker", "-c", "-p", &port, "-t", "1"])
        .env("LLAMA_CACHE", dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(dir.path().join("rpc").is_dir());
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A wire between a client and a worker that counts bytes, to the worker and from it, and may take long.
struct Wire {
    address: String,
    bytes: Arc<[AtomicU64; 2]>,
    /// Milliseconds of each way.
    delay: Arc<AtomicU64>,
}

impl Wire {
    fn to(worker: &str) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (bytes, delay) = (Arc::default(), Arc::default());
        let wire = Wire {
            address,
            bytes,
            delay,
        };
        let (worker, bytes, delay) = (worker.to_owned(), wire.bytes.clone(), wire.delay.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&worker) else {
                    return;
                };
                for (i, (from, to)) in [(&client, &server), (&server, &client)]
                    .into_iter()
                    .enumerate()
                {
                    to.set_nodelay(true).unwrap();
                    let ends = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    Wire::carry(ends, i, bytes.clone(), delay.clone());
                }
            }
        });
        wire
    }

    /// What comes in goes out after the delay, whatever comes in meanwhile.
    fn carry(
        (mut from, mut to): (TcpStream, TcpStream),
        way: usize,
        bytes: Arc<[AtomicU64; 2]>,
        delay: Arc<AtomicU64>,
    ) {
        let (sender, receiver) = std::sync::mpsc::channel::<(Instant, Vec<u8>)>();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n) = from.read(&mut buffer)
                && n > 0
            {
                let delay = Duration::from_millis(delay.load(Ordering::Relaxed));
                if sender
                    .send((Instant::now() + delay, buffer[..n].to_vec()))
                    .is_err()
                {
                    return;
                }
            }
        });
        std::thread::spawn(move || {
            for (due, part) in receiver {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                bytes[way].fetch_add(part.len() as u64, Ordering::Relaxed);
                if to.write_all(&part).is_err() {
                    return;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }

    fn take(&self) -> [u64; 2] {
        [0, 1].map(|i| self.bytes[i].swap(0, Ordering::Relaxed))
    }
}

/// Bytes that go to two workers and come back, of a token and of what the cache does, and a table of them:
/// `cargo test --release --test suite rpc::what_a_token_sends -- --nocapture`.
#[test]
fn what_a_token_sends() {
    let Ok(workers) = std::env::var(WORKERS) else {
        let workers = Worker::two();
        let text = on_workers(&workers, &["rpc::what_a_token_sends"]);
        let table: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
        println!("\n{}", table.join("\n"));
        assert!(table.len() > 8, "{text}");
        return;
    };
    let wires: Vec<Wire> = workers.split(',').map(Wire::to).collect();
    let addresses: Vec<String> = wires.iter().map(|wire| wire.address.clone()).collect();
    hae::llama::add_workers(&addresses).unwrap();
    let options = ModelOptions {
        placement: Placement {
            tensor_split: vec![1.0, 1.0],
            ..Placement::default()
        },
        ..ModelOptions::default()
    };
    let model = Model::load(&repository(TEXT), &options).unwrap();
    let sent = |name: &str, n: u64, work: &mut dyn FnMut()| {
        // What was on its way is there.
        let settle = || std::thread::sleep(Duration::from_millis(50));
        settle();
        for wire in &wires {
            wire.take();
        }
        work();
        settle();
        let all: Vec<[u64; 2]> = wires
            .iter()
            .map(|wire| wire.take().map(|bytes| bytes / n))
            .collect();
        println!(
            "| {name} | {} | {} |",
            all[0][0] + all[1][0],
            all[0][1] + all[1][1]
        );
        all
    };
    let sum = |all: &[[u64; 2]]| all.iter().flatten().sum::<u64>();
    println!(
        "\n| n_embd {}, n_vocab {}, {} layers | to workers | from workers |",
        model.n_embd(),
        model.n_vocab(),
        model.n_layer()
    );
    let context = |n_ctx, layers: Vec<u32>| ContextOptions {
        flash_attention: FlashAttention::On,
        type_k: CacheType::F16,
        type_v: CacheType::F16,
        score_layers: layers,
        ..exact(n_ctx)
    };
    let mut tokens = Vec::new();
    for n in [200, 900, 3900] {
        let mut engine = engine(&model, context(4096, Vec::new()));
        fill(&mut engine, n.min(2000));
        if n > 2000 {
            let tokens: Vec<i32> = (0..n - 2000).map(|i| 3 + i % 900).collect();
            let pos: Vec<Pos> = (2000..n).collect();
            let batch = Batch {
                seq: 0,
                input: Input::Tokens(&tokens),
                pos: &pos,
                queries: &[],
                logits: true,
                lookup: None,
            };
            engine
                .decode(batch, &mut Vec::new(), &mut Observation::default())
                .unwrap();
        }
        let mut first = || drop(step(&mut engine, n, &[], None));
        match n {
            900 => drop(sent(
                "a token behind 900 others, with a graph that is new",
                1,
                &mut first,
            )),
            _ => first(),
        }
        let name = format!("a token behind {n} others");
        let mut at = n;
        tokens.push(sum(&sent(&name, 8, &mut || {
            for _ in 0..8 {
                at += 1;
                step(&mut engine, at, &[], None);
            }
        })));
    }
    // The mask of each worker: an F16 a cell.
    assert_eq!(tokens[2] - tokens[0], 2 * 2 * (4096 - 256));

    let layers: Vec<u32> = (0..model.n_layer()).collect();
    let mut tapped = engine(&model, context(4096, layers));
    fill(&mut tapped, 900);
    step(&mut tapped, 900, &[0], None);
    let mut at = 900;
    let scored = sent(
        "the same behind 900, with the attention of all layers",
        8,
        &mut || {
            for _ in 0..8 {
                at += 1;
                step(&mut tapped, at, &[0], None);
            }
        },
    );
    // Sums and maxima of each cell come back.
    assert!(sum(&scored) < tokens[1] + 4 * 4 * 1024 + 4096, "{scored:?}");

    let looking = ContextOptions {
        attend: Attend {
            vision: Some(Amount::Cells(1)),
            text: Some(Amount::Cells(1)),
            ..Attend::default()
        },
        ..context(4096, Vec::new())
    };
    let mut looking = engine(&model, looking);
    fill(&mut looking, 900);
    let lookup = Lookup {
        kinds: vec![Kind::Text; 900],
        n_vision: 0,
        n_text: 200,
    };
    step(&mut looking, 900, &[], Some(&lookup));
    let mut at = 900;
    sent(
        "the same behind 900, with lookups of as many cells",
        8,
        &mut || {
            for _ in 0..8 {
                at += 1;
                step(&mut looking, at, &[], Some(&lookup));
            }
        },
    );
    sent(
        "the same behind 900, with lookups of one cell more each time",
        8,
        &mut || {
            for n in 0..8 {
                at += 1;
                let more = Lookup {
                    n_text: 201 + n,
                    ..lookup.clone()
                };
                step(&mut looking, at, &[], Some(&more));
            }
        },
    );

    let grows = ContextOptions {
        kv_size: Some(1024),
        ..context(4096, Vec::new())
    };
    let mut engine = engine(&model, grows);
    fill(&mut engine, 900);
    step(&mut engine, 900, &[], None);
    let mut rows = Vec::new();
    sent("8 rows to the host", 1, &mut || {
        rows.clear();
        assert!(
            engine
                .save_rows(&[1, 3, 5, 7, 9, 11, 13, 15], &mut rows)
                .unwrap()
        );
    });
    let gone: Vec<_> = (0..8).map(|i| 2 * i + 1..2 * i + 2).collect();
    let removed = sent("8 tokens removed", 1, &mut || {
        engine.remove(0, &gone).unwrap()
    });
    assert_eq!(sum(&removed), 0);
    let pos: Vec<Pos> = gone.iter().map(|range| range.start).collect();
    sent("the 8 rows back", 1, &mut || {
        engine
            .restore_rows(0, &pos, &rows, &mut Vec::new())
            .unwrap();
    });
    let half: Vec<_> = (0..400).map(|i| 2 * i + 1..2 * i + 2).collect();
    engine.remove(0, &half).unwrap();
    sent(
        "400 of 900 removed, the others moved together",
        1,
        &mut || {
            engine.compact(0, &mut Vec::new()).unwrap();
        },
    );
    let bytes = engine.kv_bytes();
    assert!(bytes.allocated < 1024 * bytes.per_cell, "{bytes:?}");
    step(&mut engine, 901, &[], None);
    let mut at = 901;
    let fewer = sent("a token behind the 500 that are left", 8, &mut || {
        for _ in 0..8 {
            at += 1;
            step(&mut engine, at, &[], None);
        }
    });
    assert!(sum(&fewer) < tokens[1], "{fewer:?}");

    // How often a token waits for a way there and back.
    const DELAY: u64 = 100;
    let slow = |delay: u64| {
        wires
            .iter()
            .for_each(|wire| wire.delay.store(delay, Ordering::Relaxed))
    };
    slow(DELAY);
    let begun = Instant::now();
    step(&mut engine, at + 1, &[], None);
    let trips = begun.elapsed().as_secs_f64() * 1e3 / (2 * DELAY) as f64;
    slow(0);
    println!("| round trips that a token waits for, one behind the other | {trips:.1} | |");
    assert!((1.9..5.0).contains(&trips), "{trips}");
}
