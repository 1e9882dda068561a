//! A decoding step of the controller takes no memory.

use hae::cache::{Cell, Pos};
use hae::controller::{Controller, Origin};
use hae::engine::Observation;
use hae::engine::scripted::hashed;
use hae::policy::{Amount, Limits, PolicyOptions, create};

/// A cache that gives out the lowest free cell, and attention that costs no memory either.
struct Cells {
    held: Vec<Option<Pos>>,
    seen: Observation,
}

impl Cells {
    fn take(&mut self, pos: Pos) -> Cell {
        let cell = self.held.iter().position(Option::is_none).unwrap();
        self.held[cell] = Some(pos);
        cell as Cell
    }

    fn look(&mut self, query: Pos) {
        self.seen.clear();
        for held in &self.held {
            let a = held.map_or(0.0, |key| hashed(5, query, key) as f32);
            self.seen.sum.push(a);
            self.seen.max.push(a);
        }
        self.seen.queries.push(query);
    }
}

#[test]
fn decoding_steps_allocate_nothing() {
    let n_cells = 1024;
    for (bin_size, restore) in [(32, true), (32, false), (1, false), (200, true)] {
        let options = PolicyOptions {
            kv_budget: Some(Amount::Cells(700 + bin_size)),
            bin_size,
            restore,
            hysteresis: 0.0,
            decay: 0.9,
            ..PolicyOptions::default()
        };
        let policy = create(
            "hae",
            &options,
            Limits {
                n_layer: 1,
                n_cells,
            },
        )
        .unwrap();
        let mut controller = Controller::new(policy, n_cells);
        let mut cells = Cells {
            held: vec![None; n_cells],
            seen: Observation::default(),
        };
        for pos in 0..900 {
            let origin = if pos < 500 {
                Origin::picture(0)
            } else {
                Origin::TEXT
            };
            let cell = cells.take(pos);
            controller.inserted(&[cell], &[pos], origin).unwrap();
        }
        cells.look(899);
        controller.observed(&cells.seen).unwrap();
        let mut step = |controller: &mut Controller, pos: Pos, prefill: bool| {
            if !prefill {
                let cell = cells.take(pos);
                controller.inserted(&[cell], &[pos], Origin::TEXT).unwrap();
                cells.look(pos);
                controller.observed(&cells.seen).unwrap();
            }
            let ranges = match prefill {
                true => controller.after_prefill(false).unwrap(),
                false => controller.after_step().unwrap(),
            };
            for held in &mut cells.held {
                if held.is_some_and(|pos| ranges.iter().any(|range| range.contains(&pos))) {
                    *held = None;
                }
            }
        };
        step(&mut controller, 899, true);
        let before = controller.report();
        let allocations = allocation_counter::measure(|| {
            (900..1900).for_each(|pos| step(&mut controller, pos, false));
        });
        assert_eq!(
            allocations.count_total, 0,
            "bin of {bin_size}, restore {restore}"
        );
        let after = controller.report();
        assert!(after.flushes > before.flushes + 2);
        assert_eq!(
            after.restores > before.restores,
            restore,
            "restoring was measured too"
        );
    }
}
