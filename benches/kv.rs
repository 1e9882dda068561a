//! What it costs to move the kept cells of a cache together and to give memory back, at Phi-3.5's
//! size: 32 layers, rows of 3072 in F16, 1,000 kept cells scattered over 2,500. And what a decoded
//! token costs before and after, which says when it pays. Medians; needs 3 GB.
//!
//! A model with next to no weights stands in (`wide.rs`): a token costs little but its attention.

#[path = "../tests/suite/wide.rs"]
mod wide;

use std::time::Instant;

use hae::cache::{Cell, Pos};
use hae::engine::scripted::hashed;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::llama::{
    ContextOptions, FlashAttention, LlamaEngine, Model, ModelOptions, SamplerOptions,
};

const N_LAYER: u32 = 32;
const FILLED: Pos = 2500;
const KEPT: usize = 1000;
const ROUNDS: usize = 7;
/// Rows that go out and come back at once.
const ROWS: [usize; 3] = [8, 64, 400];
const THREADS: i32 = 2;

fn engine(model: &Model, flash: bool) -> LlamaEngine {
    let options = ContextOptions {
        n_ctx: 4096,
        kv_size: Some(2560),
        n_batch: 64,
        n_ubatch: 64,
        n_threads: THREADS,
        n_threads_batch: THREADS,
        flash_attention: if flash {
            FlashAttention::On
        } else {
            FlashAttention::Off
        },
        ..ContextOptions::default()
    };
    let mut engine = LlamaEngine::new(model, options, &SamplerOptions::GREEDY).expect("a context");
    engine.resize_by_hand();
    engine
}

fn decode(engine: &mut LlamaEngine, pos: Pos) {
    let batch = Batch {
        seq: 0,
        input: Input::Tokens(&[pos % wide::VOCAB as i32]),
        pos: &[pos],
        queries: &[],
        logits: true,
        lookup: None,
    };
    engine
        .decode(batch, &mut Vec::new(), &mut Observation::default())
        .expect("a decoded token");
}

/// Fills the cache without computing all of it: copies of one row at other positions. Then takes
/// most of them out again, so that the kept ones are scattered.
fn scatter(engine: &mut LlamaEngine) {
    engine.rewind(0, 0, 0).expect("an empty cache");
    engine.resize(2560).expect("2560 cells");
    decode(engine, 0);
    let row = engine.rows(&[0]).expect("the row of cell 0");
    let all: Vec<Pos> = (1..FILLED).collect();
    for positions in all.chunks(100) {
        let mut rows = row.repeat(positions.len());
        for (row, pos) in rows.chunks_mut(row.len()).zip(positions) {
            // A row begins with its position.
            row[..4].copy_from_slice(&pos.to_le_bytes());
        }
        engine
            .put_rows(0, positions, &rows, &mut Vec::new())
            .expect("free cells");
    }
    let mut order: Vec<Pos> = (0..FILLED - 1).collect();
    order.sort_by(|&a, &b| hashed(1, a, 0).total_cmp(&hashed(1, b, 0)));
    let mut gone = order.split_off(KEPT - 1);
    let mut ranges = Vec::new();
    hae::cache::ranges::coalesce(&mut gone, &mut ranges);
    engine.remove(0, &ranges).expect("removable positions");
}

/// Milliseconds.
fn time<R>(f: impl FnOnce() -> R) -> (f64, R) {
    let start = Instant::now();
    let result = f();
    (start.elapsed().as_secs_f64() * 1e3, result)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A device is still at it when `decode` returns.
fn decode_and_wait(engine: &mut LlamaEngine, pos: Pos) {
    decode(engine, pos);
    engine.logits().expect("logits");
}

/// Milliseconds of a token behind position `pos`, in as many cells as there are.
fn per_token(engine: &mut LlamaEngine, pos: Pos) -> f64 {
    let mut times: Vec<f64> = (pos..pos + 12)
        .map(|pos| time(|| decode_and_wait(engine, pos)).0)
        .collect();
    // The first ones make the graph.
    let median = median(&mut times[2..]);
    engine.rewind(0, pos, KEPT).expect("the tokens taken back");
    median
}

/// Milliseconds of so many rows to the host, back into their cells, and of the next token.
fn out_and_back(engine: &mut LlamaEngine, n: usize) -> [f64; 3] {
    let mut map = Vec::new();
    engine.cell_map(&mut map).expect("the cells");
    let at = |cell: &Cell| map[*cell as usize].filter(|&pos| pos < FILLED - 1);
    let cells = (KEPT as Cell / 2..KEPT as Cell).filter(|cell| at(cell).is_some());
    let cells: Vec<Cell> = cells.take(n).collect();
    let positions: Vec<Pos> = cells.iter().filter_map(at).collect();
    decode_and_wait(engine, FILLED);
    let (out, rows) = time(|| engine.rows(&cells));
    let rows = rows.expect("rows");
    let mut gone = positions.clone();
    let mut ranges = Vec::new();
    hae::cache::ranges::coalesce(&mut gone, &mut ranges);
    engine.remove(0, &ranges).expect("removable positions");
    decode_and_wait(engine, FILLED + 1);
    let (back, done) = time(|| engine.put_rows(0, &positions, &rows, &mut Vec::new()));
    done.expect("free cells");
    let token = time(|| decode_and_wait(engine, FILLED + 2)).0;
    engine
        .rewind(0, FILLED, KEPT)
        .expect("the tokens taken back");
    [out, back, token]
}

fn main() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("wide.gguf");
    wide::write(&path, N_LAYER);
    // One JSON object a figure, for `cargo xtask bench`.
    let json = std::env::args().any(|word| word == "--jsonl");
    let model = Model::load(&path, &ModelOptions::default()).expect("a model");
    if !json {
        println!(
            "{KEPT} kept of {FILLED} cells, {N_LAYER} layers, F16, {THREADS} threads; medians of {ROUNDS}"
        );
    }
    for flash in [true, false] {
        let mut engine = engine(&model, flash);
        let names = ["compact", "shrink to 1024", "grow to 2560"];
        let mut times = [const { Vec::new() }; 3];
        let mut rows = [const { [const { Vec::new() }; 3] }; ROWS.len()];
        let (mut before, mut after) = (Vec::new(), Vec::new());
        let mut n_moves = 0;
        for _ in 0..ROUNDS {
            scatter(&mut engine);
            before.push(per_token(&mut engine, FILLED));
            let mut moves: Vec<(Cell, Cell)> = Vec::new();
            let (ms, done) = time(|| engine.compact_cells(&mut moves));
            done.expect("a compact cache");
            times[0].push(ms);
            n_moves = moves.len();
            let (ms, done) = time(|| engine.resize(1024));
            done.expect("a smaller cache");
            times[1].push(ms);
            after.push(per_token(&mut engine, FILLED));
            let (ms, done) = time(|| engine.resize(2560));
            done.expect("a larger cache");
            times[2].push(ms);
            for (n, times) in ROWS.into_iter().zip(&mut rows) {
                let [out, back, token] = out_and_back(&mut engine, n);
                times[0].push(out);
                times[1].push(back);
                times[2].push(token);
            }
        }
        if json {
            let print = |what: &str, times: &mut [f64]| {
                let (flash, ms) = (if flash { "on" } else { "off" }, median(times));
                println!(
                    "{}",
                    serde_json::json!({ "what": what, "flash_attn": flash, "ms": ms })
                );
            };
            for (name, times) in names.iter().zip(&mut times) {
                print(name, times);
            }
            for (n, times) in ROWS.into_iter().zip(&mut rows) {
                let parts = ["out", "back", "the next token"];
                for (part, times) in parts.iter().zip(times) {
                    print(&format!("{n} rows: {part}"), times);
                }
            }
            print("a token before", &mut before);
            print("a token after", &mut after);
            continue;
        }
        let kept = wide::LAYER_BYTES * u64::from(N_LAYER) * KEPT as u64 / (1 << 20);
        println!("\nflash attention {flash}: {n_moves} moves, {kept} MiB kept");
        for (name, times) in names.iter().zip(&mut times) {
            println!("{name:>16}: {:8.1} ms", median(times));
        }
        for (n, times) in ROWS.into_iter().zip(&mut rows) {
            let [out, back, token] = times.each_mut().map(|times| median(times));
            let name = format!("{n} rows");
            println!("{name:>16}: {out:8.2} ms out, {back:.2} back, {token:.2} the next token");
        }
        let (before, after) = (median(&mut before), median(&mut after));
        println!(
            "{:>16}: {before:8.1} ms before, {after:.1} after",
            "a token"
        );
        if before > after {
            let tokens = median(&mut times[0]) / (before - after);
            println!("{:>16}: after {tokens:.1} tokens", "compacting pays");
        }
    }
}
