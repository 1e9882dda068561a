//! Everything that went into the cache, whether it is still there or not: what a later question
//! can be held against, and what can be decoded again at its old place.

use std::borrow::Cow;

use super::prompt::Segment;
use crate::cache::Pos;
use crate::engine::Token;
use crate::error::{Error, Result};

/// A segment and the position of its first row.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Placed<'a> {
    /// The position of its first row.
    pub base: Pos,
    /// What went in there.
    pub segment: Cow<'a, Segment>,
}

impl Placed<'_> {
    /// The position after the last row's.
    pub fn end(&self) -> Pos {
        let positions = Pos::try_from(self.segment.positions()).unwrap_or(Pos::MAX);
        self.base.saturating_add(positions)
    }

    pub(super) fn is_picture(&self) -> bool {
        matches!(*self.segment, Segment::Image { .. })
    }
}

/// Segments in the order of their positions, without gaps between them.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct History {
    pieces: Vec<Placed<'static>>,
}

impl History {
    /// In the order of their positions.
    pub fn pieces(&self) -> &[Placed<'static>] {
        &self.pieces
    }

    /// Whether it can be what went in before position `next`; it may come from a file.
    pub(super) fn check(&self, next: Pos) -> Result<()> {
        let mut from = 0;
        for Placed { base, segment } in &self.pieces {
            segment.check()?;
            let positions = Pos::try_from(segment.positions()).ok();
            let end = positions.and_then(|n| base.checked_add(n));
            match end.filter(|&end| *base >= from && end <= next) {
                Some(end) => from = end,
                None => {
                    let n = segment.positions();
                    let what = format!("{n} positions from {base} on, between {from} and {next}");
                    return Err(Error::contract(what));
                }
            }
            if let Segment::Image { embeddings, .. } = segment.as_ref()
                && let Some(value) = embeddings.iter().find(|x| !x.is_finite())
            {
                return Err(Error::contract(format!("an embedding with {value} in it")));
            }
        }
        Ok(())
    }

    /// How many positions the pieces take: as many as went in, if all was remembered.
    pub(super) fn positions(&self) -> i64 {
        let each = self.pieces.iter().map(|p| p.segment.positions());
        each.map(|n| i64::try_from(n).unwrap_or(i64::MAX)).sum()
    }

    pub(super) fn push(&mut self, placed: &Placed<'_>) {
        if !placed.segment.is_empty() {
            self.pieces.push(Placed {
                base: placed.base,
                segment: Cow::Owned(placed.segment.as_ref().clone()),
            });
        }
    }

    /// Adds a decoded token.
    pub(super) fn push_token(&mut self, pos: Pos, token: Token) {
        if let Some(last) = self.pieces.last_mut().filter(|last| last.end() == pos)
            && let Segment::Tokens(tokens) = last.segment.to_mut()
        {
            tokens.push(token);
            return;
        }
        self.pieces.push(Placed {
            base: pos,
            segment: Cow::Owned(Segment::Tokens(vec![token])),
        });
    }

    /// The tokens of text from this position to the end, where it is text.
    pub(super) fn last_tokens(&self, from: Pos) -> Option<&[Token]> {
        let last = self.pieces.last()?;
        let Segment::Tokens(tokens) = last.segment.as_ref() else {
            return None;
        };
        tokens.get(usize::try_from(from - last.base).ok()?..)
    }

    /// Forgets everything from this position on. A picture that reaches over it goes as a whole.
    pub(super) fn truncate(&mut self, from: Pos) {
        while let Some(last) = self.pieces.last_mut().filter(|last| last.end() > from) {
            let keep = usize::try_from(from - last.base).unwrap_or(0);
            match last.segment.to_mut() {
                Segment::Tokens(tokens) if keep > 0 => tokens.truncate(keep),
                _ => drop(self.pieces.pop()),
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.pieces.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(values: Vec<f32>, n: usize) -> Segment {
        Segment::Image {
            embeddings: values,
            n,
            image: 0,
            axes: None,
            separators: Vec::new(),
        }
    }

    fn checked(pieces: Vec<(Pos, Segment)>) -> Result<()> {
        let placed = |(base, segment)| Placed {
            base,
            segment: Cow::Owned(segment),
        };
        let pieces = pieces.into_iter().map(placed).collect();
        History { pieces }.check(10)
    }

    #[test]
    fn what_can_have_gone_in_is_taken() {
        checked(Vec::new()).unwrap();
        let text = Segment::Tokens(vec![1, 2]);
        checked(vec![
            (0, text.clone()),
            (2, picture(vec![0.5; 12], 3)),
            (7, text),
        ])
        .unwrap();
    }

    #[test]
    fn what_cannot_is_refused() {
        let text = |n| Segment::Tokens(vec![1; n]);
        for pieces in [
            vec![(0, text(11))],
            vec![(-1, text(2))],
            vec![(Pos::MAX, text(1))],
            vec![(0, text(3)), (2, text(1))],
            vec![(5, text(1)), (0, text(1))],
            vec![(0, picture(vec![0.5; 7], 3))],
            vec![(0, picture(vec![0.5; 7], 0))],
            vec![(0, picture(Vec::new(), 3))],
            vec![(0, picture(vec![0.5, f32::NAN], 2))],
            vec![(0, picture(vec![f32::INFINITY, 0.5], 1))],
        ] {
            let line = checked(pieces.clone()).unwrap_err().to_string();
            assert!(!line.contains('\n'), "{pieces:?}: {line}");
        }
    }
}
