//! Conversations as a full cache saw them: what went in, and the attention that each query row,
//! or each group of rows that went in at once, paid to every position before it.

use std::collections::HashSet;
use std::path::Path;

use crate::cache::{Modality, Pos};
use crate::controller::{After, Origin};
use crate::error::{Error, Result};
use crate::generate::Segment;
use crate::trace::{Header, Record, Values};

/// A prompt, and how many tokens were decoded after it.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// What its prompt was made of.
    pub segments: Vec<Segment>,
    /// Tokens that were decoded after it.
    pub steps: usize,
}

/// Query rows that were seen together.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// Ascending.
    pub queries: Vec<Pos>,
    /// `[positions so far]`: sum over the rows.
    pub sum: Vec<f32>,
    /// `[positions so far]`: maximum over the rows; none for a single row.
    pub max: Option<Vec<f32>>,
}

/// One conversation. Its positions are `0..len()`, without holes.
#[derive(Clone, Debug, Default)]
pub struct Tape {
    /// In their order.
    pub turns: Vec<Turn>,
    groups: Vec<Group>,
    /// By position: the group that has it as a query, plus one; 0 for none.
    group_at: Vec<u32>,
}

impl Tape {
    /// Positions in all.
    pub fn len(&self) -> usize {
        self.group_at.len()
    }

    /// Whether nothing was ever asked.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Positions of the first prompt.
    pub fn first_prompt(&self) -> usize {
        let first = self.turns.first().map(|turn| &turn.segments);
        first.map_or(0, |segments| segments.iter().map(Segment::len).sum())
    }

    /// Decoded tokens.
    pub fn steps(&self) -> usize {
        self.turns.iter().map(|turn| turn.steps).sum()
    }

    pub(super) fn group(&self, query: Pos) -> Option<&Group> {
        let at = self.group_at.get(usize::try_from(query).ok()?)?;
        self.groups.get((*at as usize).checked_sub(1)?)
    }
}

/// The conversations of a trace of `full`; a prompt that was interrupted is left out.
///
/// # Errors
/// [`Error::File`] when it is a trace of a policy that evicts, or damaged.
pub fn tapes(path: &Path, header: &Header, records: &[Record]) -> Result<Vec<Tape>> {
    if !header.is_full() {
        let policy = &header.policy;
        let reason = format!(
            "was recorded under {policy}: the attention to what that evicted is not in it, expected a trace of full"
        );
        return Err(Error::file(path, reason));
    }
    if header.layers.is_empty() {
        return Err(Error::file(path, "holds no attention"));
    }
    let mut builder = Builder::default();
    let mut done = Vec::new();
    for record in records {
        let taken = builder.take(header, record, &mut done);
        taken.map_err(|reason| Error::file(path, format!("cannot be replayed: {reason}")))?;
    }
    builder.finish(&mut done);
    Ok(done)
}

/// A tape as it grows.
#[derive(Default)]
struct Builder {
    tape: Tape,
    /// By cell: the position in it.
    cells: Vec<Option<Pos>>,
    separators: HashSet<Pos>,
    /// The prompt that is going in, with the position that it began at.
    prompt: Option<(Vec<(Origin, usize)>, usize)>,
}

impl Builder {
    fn take(
        &mut self,
        header: &Header,
        record: &Record,
        done: &mut Vec<Tape>,
    ) -> Result<(), String> {
        match record {
            Record::Text { .. }
            | Record::Shown { .. }
            | Record::Looked { .. }
            | Record::Expected(_) => {}
            Record::Turn => {
                self.drop_prompt();
                self.prompt = Some((Vec::new(), self.tape.len()));
            }
            Record::Inserted { cells, pos, origin } => {
                self.insert(header, cells, pos, *origin)?;
            }
            Record::Separators(cells) => {
                for &cell in cells {
                    let pos = self.cells.get(cell as usize).copied().flatten();
                    self.separators
                        .insert(pos.ok_or(format!("cell {cell} is empty"))?);
                }
            }
            Record::Observed { queries, sum, max } => self.observe(queries, sum, max.as_ref())?,
            Record::Planned { after, .. } => {
                if record.plan().is_some_and(|plan| !plan.is_empty()) {
                    return Err("a full cache gave up tokens".into());
                }
                if matches!(after, After::Prompt { .. }) {
                    self.end_prompt()?;
                }
            }
            Record::Rewound(from) => {
                let start = self.prompt.as_ref().map(|(_, start)| *start as Pos);
                if start != Some(*from) {
                    return Err(format!("position {from} is no beginning of a prompt"));
                }
                self.drop_prompt();
            }
            Record::Cleared => self.finish(done),
            Record::Loaded { saved, .. } if saved.entries.is_empty() => {}
            Record::Loaded { .. } => {
                return Err("it goes on with an earlier session, which it does not hold".into());
            }
            Record::Header(_)
            | Record::Judged { .. }
            | Record::Skipped(_)
            | Record::Removed(_)
            | Record::Recalled { .. }
            | Record::Reopened
            | Record::Moved(_)
            | Record::Again(_)
            | Record::End => return Err("it holds what no full cache does".into()),
        }
        Ok(())
    }

    fn insert(
        &mut self,
        header: &Header,
        cells: &[u32],
        pos: &[Pos],
        origin: Origin,
    ) -> Result<(), String> {
        if cells.len() != pos.len() || cells.is_empty() {
            return Err(format!("{} cells for {} tokens", cells.len(), pos.len()));
        }
        if origin.shared {
            return Err("pictures share positions, which no policy can take apart".into());
        }
        for (&cell, &pos) in cells.iter().zip(pos) {
            let expected = self.tape.len();
            if usize::try_from(pos) != Ok(expected) {
                return Err(format!("position {pos}, expected {expected}"));
            }
            let i = cell as usize;
            if i >= header.n_cells {
                return Err(format!("cell {cell} of {}", header.n_cells));
            }
            if i >= self.cells.len() {
                // Cells come in order, so there are never many more of them than tokens.
                if i > 2 * self.cells.len() + 4096 {
                    return Err(format!("cell {cell} is far from any other"));
                }
                self.cells.resize(i + 1, None);
            }
            if self.cells[i].replace(pos).is_some() {
                return Err(format!("cell {cell} is taken twice"));
            }
            self.tape.group_at.push(0);
        }
        match (&mut self.prompt, self.tape.turns.last_mut()) {
            (Some((segments, _)), _) => match segments.last_mut() {
                Some((last, n)) if *last == origin => *n += pos.len(),
                _ => segments.push((origin, pos.len())),
            },
            (None, Some(turn)) if pos.len() == 1 => turn.steps += 1,
            (None, _) => return Err("tokens outside of a turn".into()),
        }
        Ok(())
    }

    fn observe(
        &mut self,
        queries: &[Pos],
        sum: &Values,
        max: Option<&Values>,
    ) -> Result<(), String> {
        if queries.is_empty() {
            return Ok(());
        }
        let number = u32::try_from(self.tape.groups.len() + 1).map_err(|e| e.to_string())?;
        for &query in queries {
            let i = usize::try_from(query).unwrap_or(usize::MAX);
            match self.tape.group_at.get_mut(i) {
                Some(at @ 0) => *at = number,
                _ => return Err(format!("attention of position {query}")),
            }
        }
        if queries.windows(2).any(|pair| pair[0] >= pair[1]) {
            return Err(format!("queries {queries:?}"));
        }
        let sum = self.by_position(sum)?;
        let max = match max {
            Some(max) => Some(self.by_position(max)?),
            None if queries.len() == 1 => None,
            None => Some(sum.clone()),
        };
        self.tape.groups.push(Group {
            queries: queries.to_vec(),
            sum,
            max,
        });
        Ok(())
    }

    fn by_position(&self, values: &Values) -> Result<Vec<f32>, String> {
        let mut out = vec![0.0; self.tape.len()];
        for (cell, value) in values.iter().enumerate() {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("attention of {value} to cell {cell}"));
            }
            match self.cells.get(cell).copied().flatten() {
                Some(pos) => out[pos as usize] = value,
                None if value == 0.0 => {}
                None => return Err(format!("attention to cell {cell}, which is empty")),
            }
        }
        Ok(out)
    }

    fn end_prompt(&mut self) -> Result<(), String> {
        let Some((pieces, start)) = self.prompt.take() else {
            return Err("the end of a prompt that did not begin".into());
        };
        let mut base = start;
        let mut segments = Vec::with_capacity(pieces.len());
        for (origin, n) in pieces {
            segments.push(match origin.modality {
                Modality::Text => Segment::Tokens(vec![0; n]),
                Modality::Vision => self.picture(base, n, origin.image.unwrap_or(0)),
            });
            base += n;
        }
        self.tape.turns.push(Turn { segments, steps: 0 });
        Ok(())
    }

    /// A picture of one value a row: the loops do not ask what it shows.
    fn picture(&self, base: usize, n: usize, image: u32) -> Segment {
        let separates = |row: &usize| self.separators.contains(&((base + row) as Pos));
        Segment::Image {
            embeddings: vec![0.0; n],
            n,
            image,
            axes: None,
            separators: (0..n).filter(separates).map(|row| row as u32).collect(),
        }
    }

    /// Forgets a prompt that did not come to its end.
    fn drop_prompt(&mut self) {
        let Some((_, start)) = self.prompt.take() else {
            return;
        };
        let tape = &mut self.tape;
        let first = |group: &Group| group.queries[0] as usize;
        let keep = tape.groups.partition_point(|group| first(group) < start);
        tape.groups.truncate(keep);
        tape.group_at.truncate(start);
        self.separators.retain(|&pos| (pos as usize) < start);
        for cell in &mut self.cells {
            *cell = cell.filter(|&pos| (pos as usize) < start);
        }
    }

    fn finish(&mut self, done: &mut Vec<Tape>) {
        self.drop_prompt();
        let whole = std::mem::take(self);
        if !whole.tape.is_empty() {
            done.push(whole.tape);
        }
    }
}
