//! What became of every token of a conversation, out of its trace.

use std::collections::HashMap;
use std::path::Path;

use crate::cache::{Cell, Modality, Pos};
use crate::controller::After;
use crate::error::{Error, Result};
use crate::image::hd;
use crate::replay::Player;
use crate::trace::{Jpeg, Record};

/// Where a token is at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// In the cache.
    Kept,
    /// In the recycle bin.
    Binned,
    /// Left after its prompt, or never went in.
    Pruned,
    /// Left while decoding.
    Evicted,
}

/// A token, whether it is still in the cache or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its place among all that went in.
    pub pos: Pos,
    /// Where it comes from.
    pub modality: Modality,
    /// The picture that it is a part of, by its number.
    pub image: Option<u32>,
    /// Its text, if it has any.
    pub bytes: Vec<u8>,
    /// What became of it.
    pub fate: Fate,
    /// The decoded token after which it left, from 1 on; 0: the prompt.
    pub left_at: usize,
    /// Whether it was decoded, not part of a prompt.
    pub answer: bool,
}

/// A picture that was shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// Its number in the conversation.
    pub image: u32,
    /// What it looks like, made smaller.
    pub jpeg: Jpeg,
    /// Where its tokens lie on it, where the model is known to cut it so.
    pub layout: Option<hd::Layout>,
}

/// The cache after a decoded token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Text tokens in it.
    pub text: usize,
    /// Visual tokens in it.
    pub vision: usize,
    /// Those of both that are in the recycle bin.
    pub binned: usize,
    /// So far.
    pub evicted: usize,
    /// So far.
    pub restored: usize,
}

/// A conversation.
#[derive(Clone, Debug, Default)]
pub struct Story {
    /// By position.
    pub tokens: Vec<Token>,
    /// In the order in which they were shown.
    pub images: Vec<Image>,
    /// The first moment is that after the first prompt.
    pub moments: Vec<Moment>,
    /// How often the recycle bin was emptied.
    pub flushes: usize,
    /// The most cells at once, the prompt included.
    pub peak: usize,
    /// The most cells at once after a prompt was pruned.
    pub peak_decoding: usize,
}

impl Story {
    /// What became of each token of a picture, in the order of its rows.
    pub fn picture(&self, image: u32) -> Vec<&Token> {
        let own = |token: &&Token| token.image == Some(image);
        self.tokens.iter().filter(own).collect()
    }

    /// Tokens of a modality that one of these things became of.
    pub fn count(&self, modality: Modality, fates: &[Fate]) -> usize {
        let own = |token: &&Token| token.modality == modality && fates.contains(&token.fate);
        self.tokens.iter().filter(own).count()
    }
}

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
    texts: HashMap<Pos, Vec<u8>>,
    /// Of visual tokens that never went in.
    skipped: Vec<Pos>,
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
            Record::Inserted { cells, pos, origin } => {
                for (&cell, &pos) in cells.iter().zip(pos) {
                    open.add(Some(cell), pos, origin.modality, origin.image);
                }
            }
            Record::Recalled { cells, pos, origin } => {
                for (&cell, &pos) in cells.iter().zip(pos) {
                    match open.by_pos.get(&pos) {
                        Some(&i) => {
                            open.story.tokens[i].fate = Fate::Kept;
                            open.cells.insert(cell, i);
                        }
                        None => open.add(Some(cell), pos, origin.modality, origin.image),
                    }
                    open.skipped.retain(|&skipped| skipped != pos);
                }
            }
            Record::Loaded { saved, cells } => {
                for (entry, &cell) in saved.entries.iter().zip(cells) {
                    open.add(Some(cell), entry.pos, entry.modality, entry.image);
                }
            }
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
        let story = &mut self.open.story;
        story.peak = counts.peak;
        story.peak_decoding = report.peak_decoding;
        story.moments.push(Moment {
            text: counts.live.text,
            vision: counts.live.vision,
            binned: counts.binned.total(),
            evicted: counts.evicted.total(),
            restored: counts.restored.total(),
        });
    }

    fn close(&mut self) {
        let mut open = std::mem::take(&mut self.open);
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
            answer: self.decoding,
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
    }

    /// Visual tokens that never went in belong to the picture that they lie in.
    fn add_skipped(&mut self) {
        let mut skipped = std::mem::take(&mut self.skipped);
        if skipped.is_empty() {
            return;
        }
        skipped.sort_unstable();
        self.story.tokens.sort_by_key(|token| token.pos);
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
                answer: false,
            })
            .collect();
        self.story.tokens.extend(lost);
        self.story.tokens.sort_by_key(|token| token.pos);
    }
}
