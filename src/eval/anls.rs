//! Average Normalized Levenshtein Similarity, by which DocVQA and other sets of read text are scored
//! (Biten et al. 2019, "Scene Text Visual Question Answering", arXiv 1905.13648).
//!
//! It forgives a letter that was misread, and gives nothing for another word. The average over the
//! questions is that of [`super::summary`].

use super::plain::folded;

/// Answers that are less similar than this are worth nothing.
pub const THRESHOLD: f64 = 0.5;

/// How near an answer is to the nearest of those that are right, 0 to 1: one less the Levenshtein
/// distance over the length of the longer, in characters; 0 below [`THRESHOLD`]. Case does not count, nor
/// how much white space there is; a full stop at the end does.
///
/// A similarity of exactly one half counts, as in the script of the sets' authors; their paper has
/// it count nothing.
pub fn similarity(answer: &str, right: &[String]) -> f64 {
    let said = characters(answer);
    let all = right.iter().map(|word| {
        let word = characters(word);
        match said.len().max(word.len()) {
            0 => 1.0,
            longer => 1.0 - distance(&said, &word) as f64 / longer as f64,
        }
    });
    let nearest = all.fold(0.0, f64::max);
    match nearest < THRESHOLD {
        true => 0.0,
        false => nearest,
    }
}

fn characters(text: &str) -> Vec<char> {
    folded(text).chars().collect()
}

/// The fewest characters to insert, remove or change that make `b` of `a` (Levenshtein 1966).
fn distance(a: &[char], b: &[char]) -> usize {
    // Of what was read of `a` so far to each beginning of `b`.
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values are those of the recursive definition, written in Python:
    /// `d = lambda a, b: len(a) + len(b) if not a or not b else min(d(a[1:], b) + 1, d(a, b[1:]) + 1,
    /// d(a[1:], b[1:]) + (a[0] != b[0]))`, with a cache.
    #[test]
    fn similarities_are_those_of_the_definition() {
        for (answer, right, expected) in [
            ("kitten", &["sitting"][..], 0.5714285714285714),
            ("March  3, 1998", &["march 3, 1998"][..], 1.0),
            ("Coca Cola", &["coca-cola", "cola"][..], 0.8888888888888888),
            ("12", &["10"][..], 0.5),
            ("10", &["21"][..], 0.0),
            ("The answer is 1996", &["1996"][..], 0.0),
            ("1996.", &["1996"][..], 0.8),
            ("Müller", &["Mueller", "Muller"][..], 0.8333333333333334),
            ("", &["x"][..], 0.0),
            ("intention", &["execution"][..], 0.0),
            (
                "sunday morning",
                &["saturday", "Saturday morning"][..],
                0.8125,
            ),
            ("abc", &["abc"][..], 1.0),
        ] {
            let right: Vec<String> = right.iter().map(|&word| word.to_owned()).collect();
            let found = similarity(answer, &right);
            assert!((found - expected).abs() < 1e-12, "{answer}: {found}");
        }
    }
}
