//! Answers that hold the right one: for models that say more than they were asked.
//!
//! A small model goes on behind a key it was asked for, or puts it into a sentence. Exact match would
//! call that wrong, and whether any cache lost the key would not show.

use super::plain::{folded, normalised};

/// Whether an answer holds one of `right`, and nothing of `wrong` before it.
///
/// 1. Case does not count, nor how much white space there is. Quotation marks around a key and full
///    stops at its end, in the question file, are no part of it.
/// 2. A key is held where no letter or digit touches it: `84606` is not in `846061`. Points and commas
///    between digits belong to the number: `606` is neither in `84,606` nor in `606.5`.
/// 3. What stands first decides: a right key is right when none of `wrong` stands further in front. At the
///    same place the longer counts. What follows does not matter.
/// 4. In an answer that a limit cut off (`ended` is false) a key at the very end does not count: what was
///    cut off may belong to it.
pub fn is_right(answer: &str, right: &[String], wrong: &[String], ended: bool) -> bool {
    let answer = folded(answer);
    let first = |keys: &[String]| {
        let found = keys
            .iter()
            .filter_map(|key| place(&answer, &bare(key), ended));
        found.min()
    };
    match (first(right), first(wrong)) {
        (Some(right), Some(wrong)) => right < wrong,
        (right, _) => right.is_some(),
    }
}

/// Whether two keys are the same to [`is_right`].
pub(super) fn same(a: &str, b: &str) -> bool {
    bare(a) == bare(b)
}

/// Whether a key has nothing that an answer could hold.
pub(super) fn is_bare(key: &str) -> bool {
    bare(key).is_empty()
}

fn bare(key: &str) -> String {
    normalised(key)
}

/// Where the key stands first; of two at one place the longer is less.
fn place(answer: &str, key: &str, ended: bool) -> Option<(usize, std::cmp::Reverse<usize>)> {
    let whole = |at: usize| {
        let (before, behind) = (&answer[..at], &answer[at + key.len()..]);
        let cut = behind.is_empty() && !ended;
        !cut && !goes_on(before.chars().rev(), key.chars().next())
            && !goes_on(behind.chars(), key.chars().next_back())
    };
    // Places may overlap: one that is no whole word or number hides none behind it.
    let starts = answer.char_indices().map(|(at, _)| at);
    let mut places = starts.filter(|&at| answer[at..].starts_with(key));
    let at = places.find(|&at| whole(at))?;
    Some((at, std::cmp::Reverse(key.len())))
}

/// Whether the word or number whose last character is `edge` goes on with these.
fn goes_on(mut rest: impl Iterator<Item = char>, edge: Option<char>) -> bool {
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    match rest.next() {
        Some(c) if c.is_alphanumeric() => edge.is_some_and(char::is_alphanumeric),
        Some('.' | ',') => digit(edge) && digit(rest.next()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(answer: &str, right: &[&str], wrong: &[&str], ended: bool) -> bool {
        let own = |keys: &[&str]| keys.iter().map(|&key| key.to_owned()).collect::<Vec<_>>();
        is_right(answer, &own(right), &own(wrong), ended)
    }

    #[test]
    fn a_key_is_held_whole() {
        for (answer, key, expected) in [
            ("The pass key is 84606.", "84606", true),
            (" 84606.\n\nThe pass key", "84606", true),
            ("84606", "84606", true),
            ("\"84606\"", "84606", true),
            ("key=84606;", "84606", true),
            ("846061", "84606", false),
            ("184606", "84606", false),
            ("84606th", "84606", false),
            ("84,606", "606", false),
            ("606.5", "606", false),
            ("1.606", "606", false),
            ("606, 5", "606", true),
            ("in 606. 5 more", "606", true),
            ("84607", "84606", false),
            ("", "84606", false),
            (
                "RIVER,  chair,\ncandle and more",
                "river, chair, candle",
                true,
            ),
            ("river, chair", "river, chair, candle", false),
            ("chair, river, candle", "river, chair, candle", false),
            ("rivers", "river", false),
            ("the river", "\"River.\"", true),
            // The second place is whole.
            ("846061 84606", "84606", true),
            ("x11 11 11", "11 11", true),
            ("x11 11 11x", "11 11", false),
            ("Äpfel und Öl", "öl", true),
            ("C++", "c++", true),
        ] {
            assert_eq!(held(answer, &[key], &[], true), expected, "{answer}: {key}");
        }
    }

    #[test]
    fn the_first_key_decides() {
        for (answer, expected) in [
            ("Oslo is 12345, Rome is 67890", true),
            ("Rome is 67890, Oslo is 12345", false),
            ("67890", false),
            ("54321 or 12345", true),
            ("neither", false),
        ] {
            let found = held(answer, &["12345"], &["67890", "11111"], true);
            assert_eq!(found, expected, "{answer}");
        }
        assert!(held("b and a", &["a", "b"], &["c"], true));
        assert!(held("dark red", &["dark red"], &["dark"], true));
        assert!(!held("dark red", &["dark"], &["dark red"], true));
    }

    #[test]
    fn a_key_that_a_limit_may_have_cut_does_not_count() {
        assert!(!held("The key is 84606", &["84606"], &[], false));
        assert!(held("The key is 84606.", &["84606"], &[], false));
        assert!(held("The key is 84606", &["84606"], &[], true));
    }

    #[test]
    fn keys_are_the_same_as_they_are_compared() {
        assert!(same("River.", "\"river\"") && !same("river", "rivers"));
    }
}
