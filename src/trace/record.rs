//! The records of a trace: [`Event`]s that own what they tell.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::{Counts, Header, Precision, Values};
use crate::cache::{Cell, Observation, Pos, SavedLedger};
use crate::controller::{After, Event, Origin};
use crate::image::{Picture, hd};
use crate::policy::{Plan, Shift};

/// A picture for reports: not larger than they show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Jpeg {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// The JPEG file; empty where the picture could not be encoded.
    pub bytes: ByteBuf,
}

/// One event. The order of the variants is the file's; new ones go to the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// The first.
    Header(Box<Header>),
    /// As [`Event::Expected`].
    Expected(Option<usize>),
    /// As [`Event::Turn`].
    Turn,
    /// As [`Event::Text`].
    Text {
        /// Of the token.
        pos: Pos,
        /// Of its text; they may end inside of a character.
        bytes: ByteBuf,
    },
    /// As [`Event::Shown`].
    Shown {
        /// Its number in the conversation.
        image: u32,
        /// What it looks like.
        jpeg: Jpeg,
        /// How its tokens lie on it, where that is known.
        layout: Option<hd::Layout>,
    },
    /// As [`Event::Inserted`].
    Inserted {
        /// Their cells.
        cells: Vec<Cell>,
        /// Position of each, ascending.
        pos: Vec<Pos>,
        /// Where they come from.
        origin: Origin,
    },
    /// Cells that hold separators.
    Separators(Vec<Cell>),
    /// As [`Event::Observed`].
    Observed {
        /// Positions of the query rows, ascending.
        queries: Vec<Pos>,
        /// By cell.
        sum: Values,
        /// By cell; not there for a single row, whose maximum is its sum.
        max: Option<Values>,
    },
    /// As [`Event::Judged`].
    Judged {
        /// The trial run's books.
        trial: SavedLedger,
        /// Of each entry: what the trial run saw of it last, which sessions do not keep.
        latest: Vec<f32>,
        /// What never goes in.
        pruned: Vec<Pos>,
    },
    /// As [`Event::Skipped`].
    Skipped(Vec<Pos>),
    /// As [`Event::Removed`].
    Removed(Vec<Cell>),
    /// As [`Event::Recalled`].
    Recalled {
        /// Their cells.
        cells: Vec<Cell>,
        /// Position of each.
        pos: Vec<Pos>,
        /// Where they come from.
        origin: Origin,
    },
    /// As [`Event::Reopened`].
    Reopened,
    /// As [`Event::Planned`].
    Planned {
        /// What came before.
        after: After,
        /// Cells that go into the recycle bin.
        bin: Vec<Cell>,
        /// Cells that come back from it.
        restore: Vec<Cell>,
        /// Cells that are removed.
        evict: Vec<Cell>,
        /// After the removals, tokens from the first number on move down by the second.
        shift: Option<(Pos, Pos)>,
    },
    /// As [`Event::Moved`].
    Moved(Vec<(Cell, Cell)>),
    /// As [`Event::Rewound`].
    Rewound(Pos),
    /// As [`Event::Cleared`].
    Cleared,
    /// As [`Event::Loaded`].
    Loaded {
        /// The books as they were kept.
        saved: SavedLedger,
        /// The cell of each of its entries.
        cells: Vec<Cell>,
    },
    /// The last, when the run came to its end.
    End,
    /// As [`Event::Looked`].
    Looked {
        /// Layers that chose.
        layers: u32,
        /// By cell.
        counts: Counts,
    },
    /// As [`Event::Again`].
    Again(Pos),
}

impl Record {
    pub(crate) fn of(event: Event<'_>, precision: Precision) -> Self {
        match event {
            Event::Expected(tokens) => Record::Expected(tokens),
            Event::Turn => Record::Turn,
            Event::Text { pos, bytes } => Record::Text {
                pos,
                bytes: ByteBuf::from(bytes),
            },
            Event::Shown {
                image,
                picture,
                layout,
            } => Record::Shown {
                image,
                jpeg: jpeg(picture),
                layout,
            },
            Event::Inserted { cells, pos, origin } => Record::Inserted {
                cells: cells.to_vec(),
                pos: pos.to_vec(),
                origin,
            },
            Event::Separators { cells, separators } => {
                let marked = cells.iter().zip(separators).filter(|&(_, &is)| is);
                Record::Separators(marked.map(|(&cell, _)| cell).collect())
            }
            Event::Observed(seen) => observed(seen, precision),
            Event::Looked { layers, counts } => Record::Looked {
                layers,
                counts: Counts::new(counts),
            },
            Event::Judged { trial, pruned } => Record::Judged {
                trial: trial.save(),
                latest: trial.entries().map(|entry| entry.latest).collect(),
                pruned: pruned.to_vec(),
            },
            Event::Skipped(pos) => Record::Skipped(pos.to_vec()),
            Event::Removed(cells) => Record::Removed(cells.to_vec()),
            Event::Recalled { cells, pos, origin } => Record::Recalled {
                cells: cells.to_vec(),
                pos: pos.to_vec(),
                origin,
            },
            Event::Reopened => Record::Reopened,
            Event::Planned { after, plan } => Record::Planned {
                after,
                bin: plan.bin.clone(),
                restore: plan.restore.clone(),
                evict: plan.evict.clone(),
                shift: plan.shift.map(|Shift { from, by }| (from, by)),
            },
            Event::Moved(moves) => Record::Moved(moves.to_vec()),
            Event::Rewound(from) => Record::Rewound(from),
            Event::Again(from) => Record::Again(from),
            Event::Cleared => Record::Cleared,
            Event::Loaded { saved, cells } => Record::Loaded {
                saved: saved.clone(),
                cells: cells.to_vec(),
            },
        }
    }

    /// The plan of a [`Record::Planned`].
    pub fn plan(&self) -> Option<Plan> {
        match self {
            Record::Planned {
                bin,
                restore,
                evict,
                shift,
                ..
            } => Some(Plan {
                bin: bin.clone(),
                restore: restore.clone(),
                evict: evict.clone(),
                shift: shift.map(|(from, by)| Shift { from, by }),
            }),
            _ => None,
        }
    }

    /// The observation of a [`Record::Observed`].
    pub fn observation(queries: &[Pos], sum: &Values, max: Option<&Values>) -> Observation {
        let sum: Vec<f32> = sum.iter().collect();
        let mut max: Vec<f32> = match max {
            Some(max) => max.iter().collect(),
            None => sum.clone(),
        };
        max.resize(sum.len(), 0.0);
        Observation {
            sum,
            max,
            queries: queries.to_vec(),
            ..Observation::default()
        }
    }
}

fn observed(seen: &Observation, precision: Precision) -> Record {
    Record::Observed {
        queries: seen.queries.clone(),
        sum: Values::new(&seen.sum, precision),
        max: (seen.max != seen.sum).then(|| Values::new(&seen.max, precision)),
    }
}

/// The longest side that is kept, in pixels.
const MOST_PIXELS: u32 = 768;

fn jpeg(picture: &Picture) -> Jpeg {
    let (width, height) = (picture.width, picture.height);
    let empty = Jpeg {
        width,
        height,
        bytes: ByteBuf::new(),
    };
    let Some(full) = image::RgbImage::from_raw(width, height, picture.rgb.clone()) else {
        return empty;
    };
    let longest = width.max(height);
    let small = match longest > MOST_PIXELS {
        false => full,
        true => {
            let side = |n: u32| {
                let scaled = u64::from(n) * u64::from(MOST_PIXELS) / u64::from(longest);
                (scaled as u32).max(1)
            };
            image::imageops::thumbnail(&full, side(width), side(height))
        }
    };
    let mut bytes = Vec::new();
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 85);
    // A picture that cannot be encoded is shown as an empty one.
    match small.write_with_encoder(encoder) {
        Ok(()) => Jpeg {
            width,
            height,
            bytes: ByteBuf::from(bytes),
        },
        Err(_) => empty,
    }
}
