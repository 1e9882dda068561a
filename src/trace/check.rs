//! What a record may hold, whatever was before it: readers allocate and count by it.

use super::{Counts, Header, Record, Values};
use crate::cache::{Cell, LAST_POS, Pos};

impl Record {
    /// # Errors
    /// What cannot be.
    pub(super) fn check(&self, header: &Header) -> Result<(), String> {
        match self {
            Record::Text { pos, .. } | Record::Rewound(pos) | Record::Again(pos) => {
                positions(&[*pos])
            }
            Record::Inserted { cells, pos, .. } | Record::Recalled { cells, pos, .. } => {
                same_number(cells.len(), pos.len())?;
                in_cache(header, cells)?;
                positions(pos)
            }
            Record::Separators(cells) | Record::Removed(cells) => in_cache(header, cells),
            Record::Observed { queries, sum, max } => {
                ascending(queries)?;
                attention(header, sum)?;
                max.as_ref().map_or(Ok(()), |max| attention(header, max))
            }
            Record::Looked { layers, counts } => looked(header, *layers, counts),
            Record::Judged {
                trial,
                latest,
                pruned,
            } => {
                same_number(trial.entries.len(), latest.len())?;
                ascending(pruned)
            }
            Record::Skipped(pos) => positions(pos),
            Record::Planned {
                bin,
                restore,
                evict,
                shift,
                ..
            } => {
                [bin, restore, evict]
                    .into_iter()
                    .try_for_each(|cells| in_cache(header, cells))?;
                match shift {
                    Some((from, by)) if *by < 1 || from < by || *from > LAST_POS => {
                        Err(format!("a shift of {from} by {by}"))
                    }
                    _ => Ok(()),
                }
            }
            Record::Moved(moves) => moves
                .iter()
                .try_for_each(|&(from, to)| in_cache(header, &[from, to])),
            Record::Loaded { saved, cells } => {
                same_number(saved.entries.len(), cells.len())?;
                in_cache(header, cells)
            }
            Record::Header(_)
            | Record::Expected(_)
            | Record::Turn
            | Record::Shown { .. }
            | Record::Reopened
            | Record::Cleared
            | Record::End => Ok(()),
        }
    }
}

fn same_number(cells: usize, tokens: usize) -> Result<(), String> {
    match cells == tokens {
        true => Ok(()),
        false => Err(format!("{cells} cells for {tokens} tokens")),
    }
}

fn in_cache(header: &Header, cells: &[Cell]) -> Result<(), String> {
    let n = header.n_cells;
    match cells.iter().find(|&&cell| cell as usize >= n) {
        Some(cell) => Err(format!("cell {cell} of {n}")),
        None => Ok(()),
    }
}

fn positions(pos: &[Pos]) -> Result<(), String> {
    match pos.iter().find(|pos| !(0..=LAST_POS).contains(*pos)) {
        Some(pos) => Err(format!("position {pos}, expected 0 to {LAST_POS}")),
        None => Ok(()),
    }
}

fn ascending(pos: &[Pos]) -> Result<(), String> {
    positions(pos)?;
    match pos.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => Err(format!("position {} before {}", pair[0], pair[1])),
        None => Ok(()),
    }
}

fn attention(header: &Header, values: &Values) -> Result<(), String> {
    let n = header.n_cells;
    if values.len() > n {
        return Err(format!("attention to {} cells of {n}", values.len()));
    }
    match values.iter().find(|x| !(x.is_finite() && *x >= 0.0)) {
        Some(value) => Err(format!("attention of {value}")),
        None => Ok(()),
    }
}

fn looked(header: &Header, layers: u32, counts: &Counts) -> Result<(), String> {
    if !(1..=header.n_layer).contains(&layers) {
        return Err(format!("{layers} layers chose, of {}", header.n_layer));
    }
    if counts.len() > header.n_cells {
        let n = header.n_cells;
        return Err(format!("choices among {} cells of {n}", counts.len()));
    }
    match counts.iter().flatten().find(|&count| count > layers) {
        Some(count) => Err(format!("a cell that {count} of {layers} layers chose")),
        None => Ok(()),
    }
}
