//! The statements that a story of the small model's world makes (`models/train/stories.py`,
//! `story_facts`): who has which colour, shape, size, place and character, and who sees what.
//!
//! A sentence speaks about its first name; behind "saw" it says what stands on which side, and of
//! whom it is the colour and shape. Tests compare with what the Python script finds.

use std::collections::HashMap;
use std::sync::OnceLock;

use regex::Regex;

const COLORS: &str = "red|green|blue|yellow|purple|orange|black|cyan|pink|brown";
const SHAPES: &str = "circle|square|triangle|star|cross|diamond|ring|heart";
const NAMES: [&str; 24] = [
    "Mia", "Leo", "Ana", "Max", "Zoe", "Sam", "Eva", "Ben", "Tom", "Ruby", "Kai", "Ida", "Finn",
    "Lena", "Hugo", "Nora", "Otto", "Vera", "Paul", "Iris", "Jack", "Alma", "Carl", "Dora",
];

/// One statement, such as that Leo's colour is cyan.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Statement {
    /// Of the thing that it is about.
    pub name: String,
    /// What it says of the thing: its color, its place.
    pub attribute: String,
    /// What that is.
    pub value: String,
}

struct Patterns {
    name: Regex,
    sees: Regex,
    attributes: Vec<(&'static str, Regex)>,
}

/// `None` if a pattern does not compile, which a test excludes.
fn patterns() -> Option<&'static Patterns> {
    static PATTERNS: OnceLock<Option<Patterns>> = OnceLock::new();
    let make = || {
        let attribute = |name, pattern: &str| Regex::new(pattern).ok().map(|p| (name, p));
        Some(Patterns {
            name: Regex::new(r"\b[A-Z][a-z]+\b").ok()?,
            sees: Regex::new(&format!(
                r"(?:\b([A-Z][a-z]+) )?(?:the ((?:{COLORS}) (?:{SHAPES}))|(nothing)) (on the right|below)"
            ))
            .ok()?,
            attributes: [
                attribute("color", &format!(r"\b({COLORS})\b")),
                attribute("shape", &format!(r"\b({SHAPES})\b")),
                attribute("size", r"\b(big|small)\b"),
                attribute("place", r"\brow (\d+, column \d+)"),
                attribute("glyph", r"\b(?:character ([0-9A-Z])|(no) character)\b"),
                attribute("picture", r"\bof picture (\d+)"),
            ]
            .into_iter()
            .collect::<Option<_>>()?,
        })
    };
    PATTERNS.get_or_init(make).as_ref()
}

/// Every statement that a story makes, one for each mention.
pub fn statements(story: &str) -> Vec<Statement> {
    let mut all = Vec::new();
    let Some(patterns) = patterns() else {
        return all;
    };
    for sentence in story.split(['.', '\n']) {
        let mut words = patterns.name.find_iter(sentence);
        let Some(found) = words.find(|word| NAMES.contains(&word.as_str())) else {
            continue;
        };
        let mut add = |name: &str, attribute: &str, value: &str| {
            all.push(Statement {
                name: name.to_owned(),
                attribute: attribute.to_owned(),
                value: value.to_owned(),
            });
        };
        let (who, rest) = (found.as_str(), &sentence[found.end()..]);
        if rest.starts_with(" saw ") {
            for m in patterns.sees.captures_iter(rest) {
                let group = |i: usize| m.get(i).map(|g| g.as_str());
                let (Some(thing), Some(side)) = (group(2).or(group(3)), group(4)) else {
                    continue;
                };
                add(who, &format!("sees {side}"), thing);
                if let Some(name) = group(1) {
                    add(name, "name", thing);
                }
            }
            continue;
        }
        for (attribute, pattern) in &patterns.attributes {
            for m in pattern.captures_iter(rest) {
                if let Some(value) = m.iter().skip(1).flatten().next() {
                    add(who, attribute, value.as_str());
                }
            }
        }
    }
    all
}

/// How often a story makes each of its statements.
pub fn count(story: &str) -> HashMap<Statement, usize> {
    let mut counts = HashMap::new();
    for statement in statements(story) {
        *counts.entry(statement).or_insert(0) += 1;
    }
    counts
}
