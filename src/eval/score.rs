//! Whether an answer is right.

use super::facts::{self, Statement};
use super::plain::normalised;
use super::question::{Expected, Fact, letter};
use super::record::FactScore;
use super::{anls, held};

/// What an answer is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// `None` where nobody knows.
    pub right: Option<bool>,
    /// The letter that was read from it.
    pub chosen: Option<char>,
    /// Of a story.
    pub facts: Option<FactScore>,
    /// How near it is, where that is scored; 0 to 1.
    pub anls: Option<f64>,
}

/// Judges an answer. `ended`: the model ended it, not a limit. One that a limit cut off is not
/// right word for word, nor is such a story; a letter that it began with counts.
pub fn judge(expected: &Expected, answer: &str, ended: bool) -> Verdict {
    let mut verdict = Verdict {
        right: None,
        chosen: None,
        facts: None,
        anls: None,
    };
    match expected {
        Expected::Nothing => {}
        Expected::Words(words) => {
            let said = normalised(answer);
            let same = words.iter().any(|word| normalised(word) == said);
            verdict.right = Some(same && ended);
        }
        Expected::Held { right, wrong } => {
            verdict.right = Some(held::is_right(answer, right, wrong, ended));
        }
        Expected::Near(words) => {
            let near = anls::similarity(answer, words);
            verdict.right = Some(near >= 1.0 && ended);
            verdict.anls = Some(near);
        }
        Expected::Choice { options, answer: n } => {
            let chosen = choice(answer, options);
            verdict.right = Some(chosen == Some(*n));
            verdict.chosen = chosen.map(letter);
        }
        Expected::Facts(expected) => {
            let score = told(answer, expected);
            let whole = score.made == score.required && score.correct == score.said;
            verdict.right = Some(whole && ended);
            verdict.facts = Some(score);
        }
    }
    verdict
}

/// The option that an answer chooses. In this order:
///
/// 1. a letter alone, or first and marked as one: `B`, `(B)`, `B.`, `B) because`, `B: text`;
/// 2. the last letter behind "answer is", "answer:", "option" or "choice";
/// 3. the only letter in brackets;
/// 4. the only option whose text the answer is, or else holds as whole words.
///
/// Nothing otherwise, which is wrong: no letter is drawn by lot.
pub fn choice(answer: &str, options: &[String]) -> Option<usize> {
    let answer = answer.trim();
    first_letter(answer, options.len())
        .or_else(|| letter_behind_words(answer, options.len()))
        .or_else(|| letter_in_brackets(answer, options.len()))
        .or_else(|| option_text(answer, options))
}

/// The option that a letter names, in capitals.
fn option_of(c: char, n: usize) -> Option<usize> {
    (0..n).find(|&i| letter(i) == c)
}

fn first_letter(answer: &str, n: usize) -> Option<usize> {
    let answer = answer.trim_start_matches('*');
    let (opened, rest) = match answer.strip_prefix(['(', '[']) {
        Some(rest) => (true, rest),
        None => (false, answer),
    };
    let mut chars = rest.chars();
    let first = chars.next()?;
    let alone = chars
        .as_str()
        .trim_matches(['.', ')', ']', '*', ':', ' '])
        .is_empty();
    if alone {
        return option_of(first.to_ascii_uppercase(), n);
    }
    // "A dog" is no letter, "A." and "(A)" are, unless "(A) or (B)".
    let marked = match chars.next() {
        Some(')' | ']') => {
            let others = (0..n).filter(|&i| answer.contains(&format!("({})", letter(i))));
            !opened || others.count() < 2
        }
        Some('.' | ':' | ',' | '\n' | '*') => !opened,
        _ => false,
    };
    option_of(first, n).filter(|_| marked)
}

fn letter_behind_words(answer: &str, n: usize) -> Option<usize> {
    let lower = answer.to_ascii_lowercase();
    let marks = ["answer is", "answer:", "option", "choice"];
    let found = marks.iter().flat_map(|mark| {
        lower.match_indices(mark).filter_map(|(at, mark)| {
            let rest =
                answer[at + mark.len()..].trim_start_matches([' ', ':', '(', '[', '*', '\n']);
            let mut chars = rest.chars();
            let letter = option_of(chars.next()?, n)?;
            // A word, or the article: "the answer is A dog".
            let word = chars.as_str().starts_with(|c: char| c.is_alphanumeric());
            let article = letter == 0 && chars.as_str().starts_with(' ');
            (!word && !article).then_some((at, letter))
        })
    });
    found.max_by_key(|(at, _)| *at).map(|(_, letter)| letter)
}

fn letter_in_brackets(answer: &str, n: usize) -> Option<usize> {
    let mut found = (0..n).filter(|&i| answer.contains(&format!("({})", letter(i))));
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

fn option_text(answer: &str, options: &[String]) -> Option<usize> {
    let said = normalised(answer);
    let texts: Vec<String> = options.iter().map(|option| normalised(option)).collect();
    if let Some(i) = texts.iter().position(|text| *text == said) {
        return Some(i);
    }
    let held: Vec<usize> = (0..texts.len())
        .filter(|&i| holds(&said, &texts[i]))
        .collect();
    // "dark red" holds "red", too: only the longer one counts.
    let within = |&i: &usize| held.iter().any(|&j| j != i && holds(&texts[j], &texts[i]));
    let mut outer = held.iter().filter(|i| !within(i));
    let first = outer.next()?;
    outer.next().is_none().then_some(*first)
}

/// Whether `text` holds `part` as whole words.
fn holds(text: &str, part: &str) -> bool {
    let word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    !part.is_empty()
        && text.match_indices(part).any(|(at, _)| {
            !word(text[..at].chars().next_back()) && !word(text[at + part.len()..].chars().next())
        })
}

/// A story against what it should say: `models/train/scoring.py`, `score_story`.
pub fn told(story: &str, expected: &[Fact]) -> FactScore {
    let said = facts::count(story);
    let statement = |fact: &Fact| Statement {
        name: fact.name.clone(),
        attribute: fact.attribute.clone(),
        value: fact.value.clone(),
    };
    let times = |fact: &Fact| said.get(&statement(fact)).copied().unwrap_or(0);
    let by_fact: Vec<usize> = expected
        .iter()
        .map(|fact| times(fact).min(fact.mentions))
        .collect();
    FactScore {
        required: expected.iter().map(|fact| fact.mentions).sum(),
        made: by_fact.iter().sum(),
        said: said.values().sum(),
        correct: expected.iter().map(times).sum(),
        by_fact,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Vec<String> {
        ["A dog", "red", "dark red", "Two cats"]
            .map(str::to_owned)
            .into()
    }

    #[test]
    fn letters_are_found_where_they_stand() {
        for (answer, expected) in [
            ("B", Some(1)),
            (" b ", Some(1)),
            ("(C)", Some(2)),
            ("D.", Some(3)),
            ("B) because it is", Some(1)),
            ("C: dark red", Some(2)),
            ("B. red", Some(1)),
            ("**B**", Some(1)),
            ("The answer is D.", Some(3)),
            (
                "First I thought the answer is B, but the answer is C.",
                Some(2),
            ),
            ("Answer: B", Some(1)),
            ("I choose option C", Some(2)),
            ("It must be (D), I think", Some(3)),
            ("(A) or (B)", None),
            // E is no option.
            ("E", None),
            ("", None),
        ] {
            assert_eq!(choice(answer, &options()), expected, "{answer}");
        }
    }

    #[test]
    fn texts_stand_for_their_letters() {
        for (answer, expected) in [
            ("A dog", Some(0)),
            ("a dog.", Some(0)),
            ("The answer is A dog", Some(0)),
            ("It is red", Some(1)),
            ("It is dark red", Some(2)),
            ("two cats", Some(3)),
            ("redder", None),
            ("red and two cats", None),
            ("I do not know", None),
        ] {
            assert_eq!(choice(answer, &options()), expected, "{answer}");
        }
    }

    #[test]
    fn a_word_match_looks_past_case_space_and_the_last_stop() {
        let right = |answer, ended| {
            let expected = Expected::Words(vec!["Row 3, column 4".into(), "there".into()]);
            judge(&expected, answer, ended).right
        };
        assert_eq!(right("Row 3, column 4", true), Some(true));
        assert_eq!(right(" row 3,  column 4.\n", true), Some(true));
        assert_eq!(right("\"There\"", true), Some(true));
        assert_eq!(right("Row 3, column 5", true), Some(false));
        assert_eq!(right("Row 3, column 4", false), Some(false));
        assert_eq!(right("", true), Some(false));
        assert_eq!(judge(&Expected::Nothing, "x", true).right, None);
    }

    #[test]
    fn keys_and_near_answers_have_rules_of_their_own() {
        let held = Expected::Held {
            right: vec!["123".into()],
            wrong: vec!["456".into()],
        };
        let verdict = judge(&held, "It is 123, not 456.", false);
        assert_eq!((verdict.right, verdict.anls), (Some(true), None));
        assert_eq!(judge(&held, "456 or 123", true).right, Some(false));
        let near = Expected::Near(vec!["Coca-Cola".into()]);
        let score = |answer, ended| {
            let verdict = judge(&near, answer, ended);
            (verdict.right.unwrap(), verdict.anls.unwrap())
        };
        assert_eq!(score("coca-cola", true), (true, 1.0));
        assert_eq!(score("coca-cola", false), (false, 1.0));
        assert_eq!(score("Coca Cola", true), (false, 8.0 / 9.0));
        assert_eq!(score("Pepsi", true), (false, 0.0));
    }
}
