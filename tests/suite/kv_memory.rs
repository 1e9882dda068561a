//! Where the memory of a cache goes when it changes its size, and what happens when there is none.
//! Each test runs in a process of its own, whose memory nobody else uses.

use std::collections::BTreeMap;
use std::process::Command;

use hae::cache::{Cell, Pos};
use hae::engine::Engine;
use hae::llama::{
    CacheType, ContextOptions, FlashAttention, LlamaEngine, Model, ModelOptions, Placement,
};

use crate::model::{engine, exact, feed};
use crate::wide;

const CHILD: &str = "HAE_TEST_KV_MEMORY";
const N_LAYER: u32 = 6;
const MIB: u64 = 1 << 20;

/// Whether this is the process of its own; otherwise starts that and checks how it ends.
fn alone(name: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("kv_memory::{name}"), "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("1 passed"), "{text}");
    false
}

/// A figure of this process in bytes.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    let number: String = line.chars().filter(char::is_ascii_digit).collect();
    number.parse::<u64>().unwrap() << 10
}

/// Forbids this process to take more address space than that; `None` lifts it.
fn limit(bytes: Option<u64>) {
    let most = bytes.map_or("unlimited".to_owned(), |n| n.to_string());
    let done = Command::new("prlimit")
        .args(["--pid", &std::process::id().to_string()])
        .arg(format!("--as={most}:"))
        .status()
        .unwrap();
    assert!(done.success());
}

/// In main memory: a GPU's buffers are not this process' own.
fn model() -> Model {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide.gguf");
    wide::write(&path, N_LAYER);
    let options = ModelOptions {
        placement: Placement {
            devices: Some(Vec::new()),
            ..Placement::default()
        },
        ..ModelOptions::default()
    };
    Model::load(&path, &options).unwrap()
}

fn options(flash: bool, kv_size: u32) -> ContextOptions {
    ContextOptions {
        kv_size: Some(kv_size),
        n_batch: 50,
        n_ubatch: 50,
        // More than one, so that rows are copied by threads where the system has them.
        n_threads_batch: 2,
        type_k: CacheType::F16,
        type_v: CacheType::F16,
        flash_attention: if flash {
            FlashAttention::On
        } else {
            FlashAttention::Off
        },
        ..exact(4096)
    }
}

/// Decodes a few tokens.
fn decode(engine: &mut LlamaEngine, from: Pos) {
    feed(engine, &[1, 20, 37, 5], from);
}

/// Fills an empty cache without computing it: rows of small numbers, each its own.
fn fill(engine: &mut LlamaEngine, n: Pos) {
    let mut rows = vec![0; engine.row_bytes().unwrap() * n as usize];
    let mut seed = 1u64;
    for value in rows.chunks_mut(2) {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
        // F16 from 1/16 to 1/8.
        value.copy_from_slice(&(0x2c00 | (seed >> 54) as u16).to_le_bytes());
    }
    let size = engine.row_bytes().unwrap();
    for (row, pos) in rows.chunks_mut(size).zip(0i32..) {
        let place = [pos, 0, 0, 0].map(i32::to_le_bytes);
        row[..16].copy_from_slice(place.as_flattened());
    }
    let positions: Vec<Pos> = (0..n).collect();
    let mut cells = Vec::new();
    engine.put_rows(0, &positions, &rows, &mut cells).unwrap();
    decode(engine, n);
}

fn contents(engine: &mut LlamaEngine) -> BTreeMap<Pos, Vec<u8>> {
    let mut map = Vec::new();
    engine.cell_map(&mut map).unwrap();
    let entries = map.iter().zip(0..).filter_map(|(p, c)| Some(((*p)?, c)));
    let (positions, cells): (Vec<Pos>, Vec<Cell>) = entries.unzip();
    let rows = engine.rows(&cells).unwrap();
    let size = engine.row_bytes().unwrap();
    let rows = rows.chunks(size).map(<[u8]>::to_vec);
    positions.into_iter().zip(rows).collect()
}

fn bytes(cells: u64) -> u64 {
    cells * wide::LAYER_BYTES * u64::from(N_LAYER)
}

#[test]
fn memory_goes_back_to_the_system() {
    if !alone("memory_goes_back_to_the_system") {
        return;
    }
    let model = model();
    let mut engine = engine(&model, options(true, 2048));
    engine.resize_by_hand();
    fill(&mut engine, 300);
    let layer = |cells: u64| bytes(cells) / u64::from(N_LAYER);
    // Page tables, graphs, what the allocator keeps of small blocks.
    let slack = 6 * MIB;
    for round in 0..4 {
        let large = status("VmRSS:");
        // Resets the high-water mark.
        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        engine.resize(512).unwrap();
        let small = status("VmRSS:");
        let peak = status("VmHWM:");
        println!(
            "round {round}: {} MiB to {} MiB, peak {} MiB",
            large / MIB,
            small / MIB,
            peak / MIB
        );
        assert!(small + bytes(1536) < large + slack, "{large} to {small}");
        assert!(peak < large + layer(512) + slack, "{large}, peak {peak}");

        std::fs::write("/proc/self/clear_refs", "5").unwrap();
        engine.resize(2048).unwrap();
        let peak = status("VmHWM:");
        assert!(
            peak < small + bytes(1536) + layer(2048) + slack,
            "{small}, peak {peak}"
        );
    }
}

#[test]
fn a_cache_that_cannot_grow_stays_as_it_is() {
    if !alone("a_cache_that_cannot_grow_stays_as_it_is") {
        return;
    }
    let model = model();
    for flash in [true, false] {
        // In buffers of each layer, or in one that is given up layer by layer.
        for kv_size in [512, 0] {
            let mut options = options(flash, kv_size);
            if kv_size == 0 {
                options.kv_size = None;
                options.n_ctx = 4096;
            }
            let mut engine = engine(&model, options);
            engine.resize_by_hand();
            fill(&mut engine, 400);
            engine.remove(0, &[40..90, 200..233]).unwrap();
            engine.compact_cells(&mut Vec::new()).unwrap();
            if kv_size == 0 {
                // As large as it may get: less, so that there is something to grow to.
                engine.resize(512).unwrap();
            }
            let before = contents(&mut engine);
            let allocated = engine.kv_bytes().allocated;

            // Three of the six layers fit.
            limit(Some(status("VmSize:") + bytes(4096) / 2 + 8 * MIB));
            let refused = engine.resize(4096).unwrap_err().to_string();
            limit(None);
            println!("flash {flash}: {refused}");
            assert!(refused.contains("llama_hae_kv_resize failed"), "{refused}");
            assert_eq!(engine.cells_now().unwrap(), 512);
            assert_eq!(engine.kv_bytes().allocated, allocated);
            assert!(contents(&mut engine) == before);
            decode(&mut engine, 404);

            let before = contents(&mut engine);
            engine.resize(4096).unwrap();
            assert!(contents(&mut engine) == before);
            decode(&mut engine, 408);
        }
    }
}
