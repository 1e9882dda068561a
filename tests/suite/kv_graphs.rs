//! Cells that move by graphs of llama.cpp's, as they do where the cache is on a device: what holds
//! of copies by the processor holds of them, and both leave the same bits.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use hae::engine::Engine;
use hae::llama::{CacheType, ContextOptions, Model};

use crate::kv_cells::{Pair, Step, cache};
use crate::model::{converted, load, takes};
use crate::random_llama::{Shape, llama};

/// What llama-hae-kv.cpp asks for: whether to treat main memory like a device's, and how much a
/// graph may take of it. So little that what these tests copy takes several.
const BY_GRAPH: (&str, &str) = ("LLAMA_HAE_KV_DEVICE", "100000");

/// Whether cells move by graphs of llama.cpp's in this process, as where the cache is on a device.
pub fn by_graph() -> bool {
    std::env::var_os(BY_GRAPH.0).is_some()
}

/// How many graphs have copied cells since this was first asked, as llama.cpp's log tells.
pub fn graphs() -> usize {
    static GRAPHS: AtomicUsize = AtomicUsize::new(0);
    hae::llama::log::show(|line| {
        GRAPHS.fetch_add(line.starts_with("copy_chunk:").into(), Ordering::Relaxed);
    });
    GRAPHS.load(Ordering::Relaxed)
}

/// Runs tests of this program in a process where cells move by graphs; what they print.
pub fn in_by_graph(tests: &[&str]) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "--test-threads=1"])
        .args(tests)
        .env(BY_GRAPH.0, BY_GRAPH.1)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains(&format!("{} passed", tests.len())), "{text}");
    text
}

/// What each walk leaves, here and where cells move by graphs: the same bits. `name` is the test's.
pub fn compare_digests(name: &str, ours: &[String]) {
    if by_graph() {
        println!();
        ours.iter().for_each(|line| println!("digest {line}"));
        return;
    }
    let text = in_by_graph(&[name]);
    let theirs: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("digest "))
        .collect();
    assert_eq!(ours, theirs);
}

/// The tests of cells, but these move by graphs.
#[test]
fn cells_move_by_graph() {
    in_by_graph(&[
        "kv_cells::cells_f32",
        "kv_cells::cells_f16",
        "kv_cells::cells_quantized",
        "kv_streams::two_sequences_apart",
        "kv_streams::two_sequences_that_share_cells",
        "kv_positions::rows_do_not_know_how_v_is_stored",
    ]);
}

/// What a fixed walk leaves: every cell, K and V of each, and what is computed from them.
fn digest(model: &Model, options: &ContextOptions) -> u64 {
    let mut pair = Pair::new(model, options);
    let mut hasher = DefaultHasher::new();
    for (round, n) in [90, 30, 120, 7, 100, 60].into_iter().enumerate() {
        let tokens: Vec<i32> = (0..n).map(|i| 3 + (i * 7919 + n) % 900).collect();
        let mask = 0x9e37_79b9_7f4a_7c15_u64.rotate_left(7 * round as u32);
        for step in [
            Step::Resize(4, 0),
            Step::Decode(tokens),
            Step::Remove(mask & mask.rotate_left(11)),
            Step::Compact,
            Step::Rows(mask & mask.rotate_right(5)),
            Step::Resize(2 + round % 2, 0),
            Step::Decode(vec![5, 8, 13]),
        ] {
            pair.take(&step).unwrap();
        }
        pair.cells().hash(&mut hasher);
        pair.contents().hash(&mut hasher);
        let logits = pair.engine.logits().unwrap();
        logits.iter().for_each(|x| x.to_bits().hash(&mut hasher));
    }
    hasher.finish()
}

#[test]
fn graphs_and_copies_leave_the_same_bits() {
    use CacheType::{Bf16, F16, F32, Q4_0, Q8_0};
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("odd.gguf");
    // One head of K and V: 32 values, which take 34 or 18 bytes, so that no row is whole floats.
    let shape = Shape {
        n_layer: 2,
        n_head: 2,
        n_head_kv: 1,
        width: 32,
    };
    llama(&odd, shape);
    let before = if by_graph() { graphs() } else { 0 };
    let mut ours = Vec::new();
    for (name, path) in [("tiny", converted("f32").0), ("odd", Path::new(&odd))] {
        let model = load(path);
        for (flash, k, v) in [
            (false, F32, F32),
            (true, F32, F32),
            (false, F16, F16),
            (true, F16, F16),
            (false, Bf16, Bf16),
            (true, Q8_0, Q8_0),
            (true, Q4_0, Q4_0),
            (false, Q8_0, F16),
            (false, Q4_0, F32),
        ]
        .into_iter()
        .filter(|&(_, k, _)| takes(k))
        {
            let digest = digest(&model, &cache(flash, k, v));
            ours.push(format!("{name} {flash} {k:?} {v:?} {digest:016x}"));
        }
    }
    if by_graph() {
        assert!(graphs() > before + 50, "{}", graphs());
    }
    compare_digests("kv_graphs::graphs_and_copies_leave_the_same_bits", &ours);
}
