//! The real cache against [`crate::kv_model`], through random steps, beside a twin that gets the
//! same tokens and removals but none of what the patches add.

use std::collections::BTreeMap;

use hae::cache::ranges::coalesce;
use hae::cache::{Cell, Pos};
use hae::engine::{Batch, Engine, Input, Observation};
use hae::llama::{CacheType, ContextOptions, FlashAttention, LlamaEngine, Model};
use hae::{Error, Result};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRng, TestRunner};

use crate::kv_graphs::{by_graph, graphs};
use crate::kv_model::Cells;
use crate::model::{converted, engine, exact, load, takes};
use crate::npz::max_abs_diff;
use crate::precision;

const N_CTX: u32 = 1024;

#[derive(Clone, Debug)]
pub enum Step {
    Decode(Vec<i32>),
    /// Each bit: whether a position goes, repeated over the sequence.
    Remove(u64),
    Compact,
    /// In steps of 256 cells, and how far off a whole one.
    Resize(usize, usize),
    SaveAndRestore,
    DeviceCopy,
    /// Rows out, their positions removed, and back in: the same bits as above.
    Rows(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let token = 3..960i32;
    let step = prop_oneof![
        8 => prop::collection::vec(token.clone(), 1..=8).prop_map(Step::Decode),
        2 => prop::collection::vec(token, 20..=90).prop_map(Step::Decode),
        3 => any::<u64>().prop_map(Step::Remove),
        2 => (any::<u64>(), any::<u64>()).prop_map(|(a, b)| Step::Remove(a & b)),
        4 => Just(Step::Compact),
        4 => (1..=4usize, 0..256usize).prop_map(|(n, less)| Step::Resize(n, less)),
        1 => Just(Step::SaveAndRestore),
        1 => Just(Step::DeviceCopy),
        2 => (any::<u64>(), any::<u64>()).prop_map(|(a, b)| Step::Rows(a & b)),
    ];
    prop::collection::vec(step, 20..60)
}

pub struct Pair {
    pub engine: LlamaEngine,
    twin: LlamaEngine,
    model: Cells,
    /// The largest difference of logits from the twin's so far.
    worst: f64,
}

impl Pair {
    pub fn new(model: &Model, options: &ContextOptions) -> Self {
        let small = ContextOptions {
            kv_size: Some(256),
            ..options.clone()
        };
        let mut engine_by_hand = engine(model, small);
        engine_by_hand.resize_by_hand();
        Pair {
            engine: engine_by_hand,
            twin: engine(model, options.clone()),
            model: Cells::new(256),
            worst: 0.0,
        }
    }

    pub fn cells(&self) -> Vec<Option<Pos>> {
        let mut cells = Vec::new();
        self.engine.cell_map(&mut cells).unwrap();
        cells
    }

    /// K and V of each position. What stands before them in a row, its place and its token, is not
    /// all in llama.cpp's own states.
    pub fn contents(&mut self) -> BTreeMap<Pos, Vec<u8>> {
        let entries: Vec<(usize, Pos)> = self.model.entries().collect();
        let cells: Vec<Cell> = entries.iter().map(|&(cell, _)| cell as Cell).collect();
        let rows = self.engine.rows(&cells).unwrap();
        let size = self.engine.row_bytes().unwrap();
        assert_eq!(rows.len(), size * cells.len());
        const PLACE: usize = 16;
        let rows = rows.chunks(size).map(|row| row[PLACE..].to_vec());
        entries.iter().map(|&(_, pos)| pos).zip(rows).collect()
    }

    /// Positions that a mask picks, without the newest.
    fn picked(&self, mask: u64) -> Vec<Pos> {
        let newest = self.model.newest();
        let entries = self.model.entries().map(|(_, pos)| pos);
        let mut picked: Vec<Pos> = entries
            .filter(|&pos| mask >> (pos % 64) & 1 == 1 && Some(pos) != newest)
            .collect();
        picked.sort_unstable();
        picked
    }

    fn decode(&mut self, tokens: &[i32]) -> Result<()> {
        let pos = self.model.newest().map_or(0, |pos| pos + 1);
        let places: Vec<Pos> = (pos..).take(tokens.len()).collect();
        let batch = Batch {
            logits: true,
            ..Batch::new(Input::Tokens(tokens), &places)
        };
        let (mut cells, mut seen) = (Vec::new(), Observation::default());
        let positions: Vec<Pos> = (pos..).take(tokens.len()).collect();
        let mut after = self.model.clone();
        let Some(expected) = after.insert(&positions) else {
            let refused = self.engine.decode(batch, &mut cells, &mut seen);
            assert!(
                matches!(refused, Err(Error::ContextFull { .. })),
                "{refused:?}"
            );
            return Ok(());
        };
        self.model = after;
        self.engine.decode(batch, &mut cells, &mut seen)?;
        let expected: Vec<Cell> = expected.into_iter().map(|cell| cell as Cell).collect();
        assert_eq!(cells, expected, "cells of the batch");
        let mut reported = Vec::new();
        self.engine.batch_cells(&mut reported)?;
        assert_eq!(reported, expected, "cells of the micro-batch");
        self.twin.decode(batch, &mut cells, &mut seen)?;
        let error = max_abs_diff(self.engine.logits()?, self.twin.logits()?);
        self.worst = self.worst.max(error.into());
        Ok(())
    }

    fn remove(&mut self, mut positions: Vec<Pos>, twin: bool) -> Result<()> {
        let mut ranges = Vec::new();
        coalesce(&mut positions, &mut ranges);
        self.engine.remove(0, &ranges)?;
        if twin {
            self.twin.remove(0, &ranges)?;
        }
        for range in ranges {
            self.model.remove(range);
        }
        Ok(())
    }

    pub fn take(&mut self, step: &Step) -> Result<()> {
        let before = match step {
            Step::Decode(tokens) => return self.decode(tokens),
            Step::Remove(mask) => return self.remove(self.picked(*mask), true),
            _ => self.contents(),
        };
        match step {
            Step::Compact => {
                let mut moves = Vec::new();
                self.engine.compact_cells(&mut moves)?;
                assert_eq!(moves, self.model.compact());
                assert_eq!(self.model.end(), self.model.used());
            }
            Step::Resize(n, less) => {
                let allocated = self.engine.kv_bytes().allocated;
                let size = self.model.cells.len();
                let resized = self.engine.resize(n * 256 - less);
                let bytes = self.engine.kv_bytes();
                if self.model.resize(n * 256) {
                    assert_eq!(resized?, n * 256);
                    let exact = bytes.per_cell * (n * 256) as u64;
                    // Each layer's buffer may have padding.
                    assert!((exact..exact + 6 * 4096).contains(&bytes.allocated));
                } else {
                    let refused = resized.unwrap_err().to_string();
                    assert!(refused.ends_with("too few cells"), "{refused}");
                    assert_eq!(bytes.allocated, allocated);
                    assert_eq!(self.model.cells.len(), size);
                }
            }
            Step::SaveAndRestore => {
                let state = self.engine.save()?;
                self.engine.restore(&state)?;
                let saved: Vec<Pos> = self.model.entries().map(|(_, pos)| pos).collect();
                assert!(self.model.reload(&saved));
            }
            Step::DeviceCopy => {
                self.engine.save_on_device()?;
                // Somewhere else, so that it does not come back into the cells that it was copied from.
                let mut moves = Vec::new();
                self.engine.compact_cells(&mut moves)?;
                let saved: Vec<Pos> = self.model.entries().map(|(_, pos)| pos).collect();
                self.model.compact();
                self.engine.restore_from_device()?;
                assert!(self.model.reload(&saved));
            }
            Step::Rows(mask) => {
                let positions = self.picked(*mask);
                let cells: Vec<Cell> = positions
                    .iter()
                    .map(|pos| {
                        let at = self.model.cells.iter().position(|p| p == &Some(*pos));
                        at.unwrap() as Cell
                    })
                    .collect();
                let rows = self.engine.rows(&cells)?;
                self.remove(positions.clone(), false)?;
                let mut cells = Vec::new();
                self.engine.put_rows(0, &positions, &rows, &mut cells)?;
                assert_eq!(Some(cells), self.model.put(&positions));
            }
            Step::Decode(_) | Step::Remove(_) => unreachable!(),
        }
        assert!(
            before == self.contents(),
            "{step:?} changed what a position holds"
        );
        Ok(())
    }
}

/// Runs random steps and gives the largest difference of logits.
fn run(options: &ContextOptions, cases: u32) -> f64 {
    let (text, _) = converted("f32");
    let model = load(text);
    let before = if by_graph() { graphs() } else { 0 };
    let config = Config {
        cases: if by_graph() {
            (cases / 4).max(4)
        } else {
            cases
        },
        max_shrink_iters: 100,
        failure_persistence: None,
        ..Config::default()
    };
    // The same walks every time: how far halves stray depends on them.
    let rng = TestRng::deterministic_rng(config.rng_algorithm);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let worst = std::cell::Cell::new(0.0);
    let done = runner.run(&steps(), |steps| {
        let mut pair = Pair::new(&model, options);
        for step in &steps {
            pair.take(step)
                .map_err(|e| TestCaseError::fail(format!("{step:?}: {e}")))?;
            prop_assert_eq!(&pair.cells(), &pair.model.cells, "after {:?}", step);
        }
        worst.set(f64::max(worst.get(), pair.worst));
        Ok(())
    });
    done.unwrap_or_else(|e| panic!("{options:?}: {e}"));
    assert!(!by_graph() || graphs() > before, "no graph moved a cell");
    worst.get()
}

pub fn cache(flash: bool, k: CacheType, v: CacheType) -> ContextOptions {
    ContextOptions {
        n_batch: 128,
        n_ubatch: 128,
        flash_attention: if flash {
            FlashAttention::On
        } else {
            FlashAttention::Off
        },
        type_k: k,
        type_v: v,
        ..exact(N_CTX)
    }
}

fn check(flash: bool, k: CacheType, v: CacheType, cases: u32, tolerance: f64) {
    let worst = run(&cache(flash, k, v), cases);
    println!("flash {flash}, {k:?}, {v:?}: logits differ by at most {worst:.1e}");
    assert!(
        worst < f64::from(precision::logits(tolerance as f32)),
        "{worst}"
    );
}

#[test]
fn cells_f32() {
    use CacheType::F32;
    check(false, F32, F32, 16, 1e-4);
    // Flash attention rounds K and V to F16.
    check(true, F32, F32, 16, 5e-2);
}

#[test]
fn cells_f16() {
    use CacheType::{Bf16, F16};
    check(false, F16, F16, 16, 5e-2);
    check(true, F16, F16, 16, 5e-2);
    if takes(Bf16) {
        check(false, Bf16, Bf16, 4, 5e-1);
    }
}

#[test]
fn cells_quantized() {
    use CacheType::{F16, F32, Q4_0, Q8_0};
    check(true, Q8_0, Q8_0, 8, 1.0);
    check(true, Q4_0, Q4_0, 8, 1.0);
    check(false, Q8_0, F16, 8, 1.0);
    check(false, Q4_0, F32, 8, 1.0);
}
