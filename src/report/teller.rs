//! Conversations out of a trace, record by record.

use std::collections::HashMap;
use std::path::Path;

use super::story::{Fate, Image, Moment, Story, Token};
use super::told::{Look, Told};
use crate::attend::Attended;
use crate::cache::{Cell, Modality, Pos};
use crate::controller::After;
use crate::error::{Error, Result};
use crate::replay::Player;
use crate::trace::{Counts, Record};

/// The conversations of a trace.
///
/// # Errors
/// [`Error::File`] when its records do not fit each other.
pub fn stories(path: &Path, records: &[Record]) -> Result<Vec<Story>> {
    let mut teller = Teller {
        player: Player::new(records),
        open: Open::default(),
        done: Vec::new(),
    };
    for record in records {
        teller
            .take(record)
            .map_err(|e| Error::file(path, format!("cannot be shown: {e}")))?;
    }
    teller.close();
    Ok(teller.done)
}

struct Teller {
    player: Player,
    open: Open,
    done: Vec<Story>,
}

/// The conversation that is being told.
#[derive(Default)]
struct Open {
    story: Story,
    /// By cell: index of its token.
    cells: HashMap<Cell, usize>,
    by_pos: HashMap<Pos, usize>,
    /// Tokens that go through the model again.
    again: HashMap<Pos, usize>,
    texts: HashMap<Pos, Vec<u8>>,
    /// Of visual tokens that never went in.
    skipped: Vec<Pos>,
    /// What steps looked up.
    looks: Vec<Look>,
    /// Of the newest step.
    attended: Attended,
    /// Steps decoded so far.
    step: usize,
    decoding: bool,
}

impl Teller {
    fn take(&mut self, record: &Record) -> Result<()> {
        if *record == Record::Cleared {
            self.close();
        }
        // What fits the books fits here, too.
        self.player.take(record)?;
        let open = &mut self.open;
        match record {
            Record::Turn => open.decoding = false,
            Record::Text { pos, bytes } => match open.by_pos.get(pos) {
                Some(&i) => open.story.tokens[i].bytes = bytes.to_vec(),
                None => drop(open.texts.insert(*pos, bytes.to_vec())),
            },
            Record::Shown {
                image,
                jpeg,
                layout,
            } => {
                // A question that was taken back shows its picture again.
                open.story.images.retain(|known| known.image != *image);
                open.story.images.push(Image {
                    image: *image,
                    jpeg: jpeg.clone(),
                    layout: *layout,
                });
            }
            Record::Again(from) => open.read_again(*from),
            Record::Inserted { cells, pos, origin } => {
                for (&cell, &pos) in cells.iter().zip(pos) {
                    if let Some(i) = open.again.remove(&pos) {
                        open.cells.insert(cell, i);
                        continue;
                    }
                    open.add(Some(cell), pos, origin.modality, origin.image);
                }
            }
            Record::Recalled { cells, pos, origin } => {
                let back_at = match open.decoding {
                    true => open.step + 1,
                    false => 0,
                };
                for (&cell, &pos) in cells.iter().zip(pos) {
                    let i = match open.by_pos.get(&pos) {
                        Some(&i) => i,
                        None => {
                            open.add(None, pos, origin.modality, origin.image);
                            open.story.tokens.len() - 1
                        }
                    };
                    open.cells.insert(cell, i);
                    let token = &mut open.story.tokens[i];
                    (token.fate, token.back_at) = (Fate::Back, back_at);
                    // Also where it is the first time that it goes in.
                    token.answer &= origin.modality == Modality::Text;
                    open.skipped.retain(|&skipped| skipped != pos);
                }
            }
            Record::Loaded { saved, cells } => {
                for (entry, &cell) in saved.entries.iter().zip(cells) {
                    open.add(Some(cell), entry.pos, entry.modality, entry.image);
                }
            }
            Record::Looked { layers, counts } => open.look(*layers, counts),
            Record::Skipped(pos) => open.skipped.extend(pos),
            Record::Removed(cells) => open.leave(cells, Fate::Pruned),
            Record::Moved(moves) => {
                for (from, to) in moves {
                    if let Some(i) = open.cells.remove(from) {
                        open.cells.insert(*to, i);
                    }
                }
            }
            Record::Rewound(from) => open.rewind(*from),
            Record::Planned {
                after,
                bin,
                restore,
                evict,
                shift,
            } => {
                let fate = match after {
                    After::Prompt { .. } => Fate::Pruned,
                    After::Step => {
                        open.step += 1;
                        open.story.flushes += usize::from(!evict.is_empty());
                        Fate::Evicted
                    }
                };
                open.leave(evict, fate);
                open.mark(restore, Fate::Kept);
                open.mark(bin, Fate::Binned);
                if shift.is_some() {
                    // Texts find their tokens by where these went in.
                    open.by_pos.clear();
                }
                open.decoding = true;
                self.note();
            }
            _ => {}
        }
        Ok(())
    }

    fn note(&mut self) {
        let report = self.player.controller().report();
        let counts = report.cells;
        let attended = std::mem::take(&mut self.open.attended);
        let story = &mut self.open.story;
        story.peak = counts.peak;
        story.peak_decoding = report.peak_decoding;
        story.moments.push(Moment {
            text: counts.live.text,
            vision: counts.live.vision,
            binned: counts.binned.total(),
            evicted: counts.evicted.total(),
            restored: counts.restored.total(),
            attended,
        });
    }

    fn close(&mut self) {
        let mut open = std::mem::take(&mut self.open);
        open.tell_sentences();
        open.add_skipped();
        if !open.story.moments.is_empty() {
            self.done.push(open.story);
        }
    }
}

impl Open {
    fn add(&mut self, cell: Option<Cell>, pos: Pos, modality: Modality, image: Option<u32>) {
        let i = self.story.tokens.len();
        self.story.tokens.push(Token {
            pos,
            modality,
            image,
            bytes: self.texts.remove(&pos).unwrap_or_default(),
            fate: Fate::Kept,
            left_at: 0,
            back_at: 0,
            answer: self.decoding,
            looked: Vec::new(),
        });
        self.by_pos.insert(pos, i);
        if let Some(cell) = cell {
            self.cells.insert(cell, i);
        }
    }

    fn mark(&mut self, cells: &[Cell], fate: Fate) {
        for cell in cells {
            if let Some(&i) = self.cells.get(cell) {
                self.story.tokens[i].fate = fate;
            }
        }
    }

    fn leave(&mut self, cells: &[Cell], fate: Fate) {
        for cell in cells {
            if let Some(i) = self.cells.remove(cell) {
                self.story.tokens[i].fate = fate;
                self.story.tokens[i].left_at = self.step;
            }
        }
    }

    fn rewind(&mut self, from: Pos) {
        let first = self.story.tokens.partition_point(|token| token.pos < from);
        self.story.tokens.truncate(first);
        self.cells.retain(|_, i| *i < first);
        self.by_pos.retain(|_, i| *i < first);
        self.texts.clear();
        self.skipped.retain(|&pos| pos < from);
        self.looks.retain(|look| look.token < first);
    }

    /// Tokens that will be inserted anew, into other cells.
    fn read_again(&mut self, from: Pos) {
        let again = self.by_pos.iter().filter(|(pos, _)| **pos >= from);
        self.again = again.map(|(&pos, &i)| (pos, i)).collect();
        let again: std::collections::HashSet<usize> = self.again.values().copied().collect();
        self.cells.retain(|_, i| !again.contains(i));
    }

    fn look(&mut self, layers: u32, counts: &Counts) {
        let counts: Vec<Option<u32>> = counts.iter().collect();
        let mut chosen = Vec::new();
        let seen = &mut self.attended;
        seen.steps = 1;
        for (&cell, &i) in &self.cells {
            let count = counts.get(cell as usize).copied().flatten();
            let by = u64::from(count.unwrap_or(layers));
            seen.in_view += u64::from(layers);
            seen.attended += by;
            if self.story.tokens[i].modality == Modality::Vision {
                seen.in_view_vision += u64::from(layers);
                seen.attended_vision += by;
                chosen.extend(count.filter(|&n| n > 0).map(|n| (i, n)));
            }
        }
        self.looks.push(Look {
            token: self.story.tokens.len().saturating_sub(1),
            layers,
            counts: chosen,
        });
    }

    /// Divides what was looked at among the sentences of the answers.
    fn tell_sentences(&mut self) {
        if self.looks.is_empty() {
            return;
        }
        let mut told = Told::default();
        let mut looked = Vec::new();
        let mut first = 0;
        for run in self.story.tokens.chunk_by(|a, b| a.answer == b.answer) {
            if run[0].answer {
                let words = run.iter().map(|token| token.bytes.as_slice());
                told.answer(first, words, &self.looks, |token, sentence, layers| {
                    looked.push((token, sentence, layers));
                });
            }
            first += run.len();
        }
        for (token, sentence, layers) in looked {
            let by = &mut self.story.tokens[token].looked;
            by.resize(by.len().max(sentence + 1), 0);
            by[sentence] = by[sentence].saturating_add(layers);
        }
        self.story.sentences = told.sentences;
        self.story.sentences_left_out = told.left_out;
    }

    /// Visual tokens that never went in belong to the picture that they lie in.
    fn add_skipped(&mut self) {
        let mut skipped = std::mem::take(&mut self.skipped);
        self.story.tokens.sort_by_key(|token| token.pos);
        if skipped.is_empty() {
            return;
        }
        skipped.sort_unstable();
        let tokens = &self.story.tokens;
        let image_of = |pos: Pos| {
            let next = tokens.partition_point(|token| token.pos < pos);
            let before = next.checked_sub(1).and_then(|i| tokens[i].image);
            before.or_else(|| tokens.get(next).and_then(|token| token.image))
        };
        let lost: Vec<Token> = skipped
            .iter()
            .map(|&pos| Token {
                pos,
                modality: Modality::Vision,
                image: image_of(pos),
                bytes: Vec::new(),
                fate: Fate::Pruned,
                left_at: 0,
                back_at: 0,
                answer: false,
                looked: Vec::new(),
            })
            .collect();
        self.story.tokens.extend(lost);
        self.story.tokens.sort_by_key(|token| token.pos);
    }
}
