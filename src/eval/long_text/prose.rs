//! The text that answers are hidden in: prose, cut between sentences.

use crate::error::Result;

/// A text, cut between sentences.
pub(super) struct Prose {
    pub sentences: Vec<String>,
    /// Tokens of each, the space before it among them.
    pub tokens: Vec<usize>,
}

impl Prose {
    pub fn of(text: &str, count: &dyn Fn(&str) -> Result<usize>) -> Result<Self> {
        let sentences = sentences(text);
        let tokens = sentences
            .iter()
            .map(|sentence| count(&format!(" {sentence}")));
        Ok(Prose {
            tokens: tokens.collect::<Result<_>>()?,
            sentences,
        })
    }

    /// Sentences from this one on, by number, as many as have so many tokens at most; behind the last comes
    /// the first. Where a long one no longer fits, shorter ones soon behind it fill the rest.
    pub fn beginning_at(&self, first: usize, tokens: usize) -> Vec<usize> {
        const SOON: usize = 24;
        let n = self.sentences.len();
        let mut chosen = Vec::new();
        let (mut left, mut passed) = (tokens, 0);
        for i in (0..n).map(|i| (first + i) % n) {
            if self.tokens[i] <= left {
                left -= self.tokens[i];
                chosen.push(i);
            } else {
                passed += 1;
            }
            if passed == SOON {
                break;
            }
        }
        chosen
    }

    /// The sentences of these numbers.
    pub fn texts(&self, chosen: &[usize]) -> Vec<&str> {
        chosen.iter().map(|&i| self.sentences[i].as_str()).collect()
    }

    /// Numbers of the sentences behind the last chosen one, of those that begin at `first`.
    pub fn behind(&self, first: usize, chosen: &[usize]) -> impl Iterator<Item = usize> + use<> {
        let n = self.sentences.len();
        let passed = chosen.last().map_or(0, |&last| (last + n - first) % n + 1);
        (passed..n).map(move |i| (first + i) % n)
    }
}

/// The sentences of a text, white space as single spaces. One ends with a full stop, a question or an
/// exclamation mark and what closes quotes and brackets; titles and initials end none.
fn sentences(text: &str) -> Vec<String> {
    const TITLES: [&str; 8] = ["Mr.", "Mrs.", "Ms.", "Dr.", "St.", "Rev.", "Capt.", "Esq."];
    let mut all = Vec::new();
    let mut words: Vec<&str> = Vec::new();
    for word in text.split_whitespace() {
        words.push(word);
        let bare = word.trim_end_matches(['"', '\'', ')', ']', '_', '\u{201d}', '\u{2019}']);
        let initial = bare.len() == 2 && bare.starts_with(char::is_uppercase);
        let title = TITLES.iter().any(|title| bare.ends_with(title));
        if bare.ends_with(['.', '!', '?']) && !initial && !title {
            all.push(words.join(" "));
            words.clear();
        }
    }
    if !words.is_empty() {
        all.push(words.join(" "));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_where_they_do() {
        let text =
            "Mr. Elliot  (born\nin 1760) came. \"Who?\" said J. P. Musgrove, Esq. of Lyme. No end";
        assert_eq!(
            sentences(text),
            [
                "Mr. Elliot (born in 1760) came.",
                "\"Who?\"",
                "said J. P. Musgrove, Esq. of Lyme.",
                "No end"
            ]
        );
        assert!(sentences(" \n").is_empty());
    }
}
