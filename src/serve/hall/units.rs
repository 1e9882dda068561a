//! What a slot holds, as a list that a new prompt can be held against.

use serde::{Deserialize, Serialize};

use crate::cache::Pos;
use crate::engine::Token;
use crate::generate::Segment;
use crate::policy::PolicySpec;
use crate::turn::Content;

/// What goes in as a whole: a token of text, or a picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Text.
    Token(Token),
    /// A picture, or the piece of one that its vision model makes.
    Picture {
        /// By the hash of its pixels and crops, and which piece of theirs it is.
        content: Content,
        /// Rows, each of them a cell.
        rows: usize,
        /// Positions that it takes.
        positions: usize,
    },
}

impl Unit {
    /// Rows that it takes.
    pub fn rows(&self) -> usize {
        match self {
            Unit::Token(_) => 1,
            Unit::Picture { rows, .. } => *rows,
        }
    }

    fn positions(&self) -> usize {
        match self {
            Unit::Token(_) => 1,
            Unit::Picture { positions, .. } => *positions,
        }
    }

    /// Whether it is a picture.
    pub fn is_picture(&self) -> bool {
        matches!(self, Unit::Picture { .. })
    }
}

/// Rows of all of them.
pub fn rows(units: &[Unit]) -> usize {
    units.iter().map(Unit::rows).sum()
}

/// The position behind them.
pub fn end(units: &[Unit]) -> Pos {
    let positions: usize = units.iter().map(Unit::positions).sum();
    Pos::try_from(positions).unwrap_or(Pos::MAX)
}

/// Pictures among them.
pub fn pictures(units: &[Unit]) -> usize {
    units.iter().filter(|unit| unit.is_picture()).count()
}

/// How many units both begin with.
pub fn common(a: &[Unit], b: &[Unit]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A piece of a prompt that was read. Pictures are not encoded yet.
#[derive(Clone, Debug)]
pub enum Piece<P> {
    /// Text.
    Tokens(Vec<Token>),
    /// A picture as a unit, and what its embeddings are made of.
    Picture(Unit, P),
}

/// The units of these pieces.
pub fn units<P>(pieces: &[Piece<P>]) -> Vec<Unit> {
    let mut all = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Tokens(tokens) => all.extend(tokens.iter().copied().map(Unit::Token)),
            Piece::Picture(unit, _) => all.push(unit.clone()),
        }
    }
    all
}

/// The pieces without their first `n` units.
pub fn behind<P>(pieces: Vec<Piece<P>>, mut n: usize) -> Vec<Piece<P>> {
    let mut rest = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Tokens(mut tokens) => {
                let gone = n.min(tokens.len());
                tokens.drain(..gone);
                n -= gone;
                if !tokens.is_empty() {
                    rest.push(Piece::Tokens(tokens));
                }
            }
            Piece::Picture(..) if n > 0 => n -= 1,
            picture => rest.push(picture),
        }
    }
    rest
}

/// What a slot holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Held {
    /// The policy that ruled it so far.
    pub policy: PolicySpec,
    /// What went in, evicted or not, in the order of positions.
    pub units: Vec<Unit>,
    /// Units before the newest answer.
    pub before_answer: usize,
}

impl Held {
    /// Nothing, under this policy.
    pub fn nothing(policy: PolicySpec) -> Self {
        Held {
            policy,
            units: Vec::new(),
            before_answer: 0,
        }
    }
}

/// Rows of a segment's visual tokens in bytes.
pub fn bytes(segment: &Segment) -> u64 {
    match segment {
        Segment::Tokens(tokens) => size_of_val(&tokens[..]) as u64,
        Segment::Image { embeddings, .. } => size_of_val(&embeddings[..]) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(n: u8) -> Unit {
        Unit::Picture {
            content: ([n; 32], 0),
            rows: 7,
            positions: 7,
        }
    }

    #[test]
    fn a_picture_is_never_cut() {
        let pieces = || {
            vec![
                Piece::Tokens(vec![1, 2]),
                Piece::Picture(picture(1), ()),
                Piece::Tokens(vec![3]),
            ]
        };
        let all = units(&pieces());
        assert_eq!((rows(&all), end(&all), pictures(&all)), (10, 10, 1));
        let lengths = (0..=4).map(|n| rows(&units(&behind(pieces(), n))));
        assert_eq!(lengths.collect::<Vec<_>>(), [10, 9, 8, 1, 0]);
        let other = [Unit::Token(1), Unit::Token(2), picture(2)];
        assert_eq!(common(&all, &other), 2);
        assert_eq!(common(&all, &all), 4);
    }
}
