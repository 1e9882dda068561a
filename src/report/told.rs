//! Answers sentence by sentence, and what was looked at while each was told.

use std::ops::Range;

/// Sentences of a conversation that are kept.
const MOST: usize = 24;

/// A sentence of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentence {
    /// Without the space around it.
    pub text: String,
    /// Decoding steps that looked something up for it.
    pub steps: usize,
    /// Layers that chose in these steps, added up.
    pub layers: u64,
}

/// What the layers chose in one step.
pub(super) struct Look {
    /// Index of the token that went in with it.
    pub token: usize,
    /// Layers that chose.
    pub layers: u32,
    /// Indices of visual tokens, each with the layers that attended to it.
    pub counts: Vec<(usize, u32)>,
}

/// The sentences of a conversation so far.
#[derive(Default)]
pub(super) struct Told {
    pub sentences: Vec<Sentence>,
    /// How many more there were.
    pub left_out: usize,
}

impl Told {
    /// Adds an answer whose first token is number `first`; `words` are the texts of its tokens, and
    /// `looks` are ascending. Tells each visual token that was looked at: its index, that of the
    /// sentence, and by how many layers.
    ///
    /// A step serves the token that comes next, so it belongs to the sentence that goes on there.
    pub fn answer<'a>(
        &mut self,
        first: usize,
        words: impl Iterator<Item = &'a [u8]>,
        looks: &[Look],
        mut looked: impl FnMut(usize, usize, u32),
    ) {
        let mut text = Vec::new();
        let ends: Vec<usize> = words
            .map(|word| {
                text.extend(word);
                text.len()
            })
            .collect();
        let ranges = sentences(&text);
        let base = self.sentences.len();
        let shown = ranges.len().min(MOST - base.min(MOST));
        self.left_out += ranges.len() - shown;
        self.sentences.extend(ranges[..shown].iter().map(|range| {
            let text = String::from_utf8_lossy(&text[range.clone()]);
            Sentence {
                text: text.trim().to_owned(),
                steps: 0,
                layers: 0,
            }
        }));
        let from = looks.partition_point(|look| look.token < first);
        for look in &looks[from..] {
            let Some(&end) = ends.get(look.token - first) else {
                break;
            };
            let next = ranges.partition_point(|range| range.end <= end);
            let number = base + next.min(ranges.len().saturating_sub(1));
            let Some(sentence) = self.sentences.get_mut(number) else {
                break;
            };
            sentence.steps += 1;
            sentence.layers += u64::from(look.layers);
            for &(token, layers) in &look.counts {
                looked(token, number, layers);
            }
        }
    }
}

/// The sentences of a text, end to end: each ends behind its `.`, `!` or `?` where a space or the
/// text's end follows, or with its line. None is blank; an empty text has none.
fn sentences(text: &[u8]) -> Vec<Range<usize>> {
    const WIDE: [&str; 3] = ["。", "！", "？"];
    const CLOSING: [&str; 7] = ["\"", "'", ")", "]", "”", "’", "»"];
    let longest = |at: usize, of: &[&str]| {
        let found = of.iter().find(|s| text[at..].starts_with(s.as_bytes()));
        found.map(|s| s.len())
    };
    let is_space = |at: usize| text.get(at).is_none_or(u8::is_ascii_whitespace);
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let (mut start, mut at, mut blank) = (0, 0, true);
    while at < text.len() {
        let (marked, wide) = match longest(at, &WIDE) {
            Some(n) => (at + n, true),
            None => (at + 1, false),
        };
        let mark = wide || b".!?".contains(&text[at]);
        let line = text[at] == b'\n' && !blank;
        blank &= text[at].is_ascii_whitespace();
        at = marked;
        if mark {
            while let Some(n) = longest(at, &CLOSING) {
                at += n;
            }
        }
        if line || mark && (wide || is_space(at)) {
            ranges.push(start..at);
            (start, blank) = (at, true);
        }
    }
    match ranges.last_mut() {
        Some(last) if blank => last.end = text.len(),
        None if blank => {}
        _ => ranges.push(start..text.len()),
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Vec<&str> {
        let ranges = sentences(text.as_bytes());
        ranges.into_iter().map(|range| &text[range]).collect()
    }

    #[test]
    fn texts_are_cut_into_sentences() {
        assert_eq!(split(""), [""; 0]);
        assert_eq!(split(" \n "), [""; 0]);
        assert_eq!(split(" Row 6, column 7"), [" Row 6, column 7"]);
        assert_eq!(split("One. Two!  Three?"), ["One.", " Two!", "  Three?"]);
        assert_eq!(split("A\nB.\n\nC\n"), ["A\n", "B.", "\n\nC\n"]);
        assert_eq!(
            split("3.5 m. Yes?! \"No.\" Ok.\n"),
            ["3.5 m.", " Yes?!", " \"No.\"", " Ok.\n"]
        );
        assert_eq!(split("Wait... what"), ["Wait...", " what"]);
        assert_eq!(split("（猫。）狗！café"), ["（猫。", "）狗！", "café"]);
    }

    #[test]
    fn a_step_belongs_to_the_sentence_that_goes_on() {
        let words: [&[u8]; 5] = [b" A", b" b", b".", b" C\xc3", b"\xa9."];
        let look = |token: usize| Look {
            token,
            layers: 4,
            counts: vec![(token, 3)],
        };
        let looks: Vec<Look> = (0..20).filter(|i| i % 2 == 0).map(look).collect();
        let mut told = Told::default();
        let mut looked = Vec::new();
        told.answer(10, words.into_iter(), &looks, |token, sentence, layers| {
            looked.push((token, sentence, layers));
        });
        let sentence = |text: &str, steps: usize| Sentence {
            text: text.into(),
            steps,
            layers: 4 * steps as u64,
        };
        // With the first mark in, the next word is asked for; behind the last, none is.
        assert_eq!(told.sentences, [sentence("A b.", 1), sentence("Cé.", 2)]);
        assert_eq!(looked, [(10, 0, 3), (12, 1, 3), (14, 1, 3)]);
        assert_eq!(told.left_out, 0);
    }

    #[test]
    fn a_long_answer_is_shown_in_part() {
        let words = [&b"Yes."[..], b" "].repeat(30);
        let mut told = Told::default();
        for _ in 0..2 {
            told.answer(0, words.iter().copied(), &[], |_, _, _| {});
        }
        assert_eq!((told.sentences.len(), told.left_out), (MOST, 60 - MOST));
    }
}
