//! What has become of the pictures that somebody watches.

use std::collections::HashMap;

use super::mind::Mind;
use super::units::{self, Unit};
use super::work::Worker;
use crate::cache::{Cell, Pos, State};
use crate::image::hd::{Layout, Place, Rect, View};
use crate::serve::ask::{Patch, Seen, Told};

/// Tokens of an answer between two looks.
const EVERY: usize = 4;

impl<M: Mind> Worker<M> {
    /// Tells who watches, after the prompt and then every few tokens.
    pub fn tell_seen(&mut self, i: usize) {
        self.tell_seen_after(i, EVERY);
    }

    /// The same at the end of an answer.
    pub fn tell_seen_last(&mut self, i: usize) {
        self.tell_seen_after(i, 1);
    }

    fn tell_seen_after(&mut self, i: usize, tokens: usize) {
        let room = &self.rooms[i];
        let Some(work) = &room.work else {
            return;
        };
        let due = work.seen.is_none_or(|last| work.said >= last + tokens);
        let Some(watch) = work.watch.as_ref().filter(|_| due) else {
            return;
        };
        let Ok(session) = room.slot.session() else {
            return;
        };
        let looked = self.mind.looked_up();
        let ledger = session.controller.ledger();
        let cells = ledger.counts();
        let states: HashMap<Pos, Patch> = (ledger.entries())
            .map(|entry| (entry.pos, patch(entry.state, entry.cell, &looked)))
            .collect();
        let all = [room.held.units.as_slice(), work.new.as_slice()].concat();
        let pictures = pictures(&all, &watch.layouts, &states);
        let step = work.said;
        if let Some(work) = &mut self.rooms[i].work {
            work.seen = Some(step);
            let seen = Told::Seen {
                step,
                cells,
                pictures,
            };
            work.asker.tell(seen);
        }
    }
}

fn patch(state: State, cell: Cell, looked: &[Cell]) -> Patch {
    match state {
        State::Binned => Patch::Binned,
        State::Live if looked.binary_search(&cell).is_ok() => Patch::LookedUp,
        State::Live => Patch::Live,
    }
}

/// The pictures among the units. `layouts` are those of the prompt's; a piece that a vision model makes of a
/// picture counts as one, and their layouts are not known.
fn pictures(all: &[Unit], layouts: &[Option<Layout>], states: &HashMap<Pos, Patch>) -> Vec<Seen> {
    let mut seen = Vec::new();
    for (at, unit) in all.iter().enumerate() {
        let Unit::Picture {
            rows, positions, ..
        } = *unit
        else {
            continue;
        };
        let base = units::end(&all[..at]);
        // Rows that share positions are not evicted one by one.
        let state = |row: usize| {
            let row = Pos::try_from(row.min(positions.saturating_sub(1))).unwrap_or(Pos::MAX);
            let held = states.get(&base.saturating_add(row)).copied();
            held.unwrap_or(Patch::Evicted) as u8
        };
        let image = seen.len();
        let layout = layouts.get(image).copied().flatten();
        seen.push(match layout.and_then(|layout| grid(&layout, rows)) {
            Some((cols, frame, patches)) => Seen {
                image,
                cols,
                rows: patches.len() / cols,
                frame: Some(frame),
                states: patches.into_iter().map(state).collect(),
            },
            None => {
                let cols = (rows as f64).sqrt().ceil().max(1.0) as usize;
                Seen {
                    image,
                    cols,
                    rows: rows.div_ceil(cols),
                    frame: None,
                    states: (0..rows).map(state).collect(),
                }
            }
        });
    }
    seen
}

/// Columns of patches, where the picture lies on them, and the rows of the embeddings that show them in full
/// size, row by row.
fn grid(layout: &Layout, rows: usize) -> Option<(usize, [f64; 4], Vec<usize>)> {
    let page = layout.page()?;
    let places = layout.places();
    let cols = (page.cols * layout.cut.tokens) as usize;
    let (wide, high) = (f64::from(page.width), f64::from(page.height));
    let Rect {
        x,
        y,
        width,
        height,
    } = page.picture;
    let frame = [x / wide, y / high, width / wide, height / high];
    let patches = places.iter().enumerate();
    let patches = patches.filter(|(_, place)| matches!(place, Place::Patch(View::Crops, _)));
    let patches: Vec<usize> = patches.map(|(row, _)| row).collect();
    (places.len() == rows && cols > 0 && patches.len().is_multiple_of(cols))
        .then_some((cols, frame, patches))
}
