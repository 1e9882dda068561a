//! Everything that went into the cache, whether it is still there or not: what a later question
//! can be held against, and what can be decoded again at its old place.

use std::borrow::Cow;

use super::prompt::Segment;
use crate::cache::Pos;
use crate::engine::Token;

/// A segment and the position of its first row.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Placed<'a> {
    pub base: Pos,
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
    pub fn pieces(&self) -> &[Placed<'static>] {
        &self.pieces
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

    pub(super) fn clear(&mut self) {
        self.pieces.clear();
    }
}
