use std::collections::{BTreeSet, HashSet};

use super::super::tests::accepts_bytes;
use super::*;

/// Ends of what an expression makes of a text from `at` on: the grammar's own meaning, tried out.
fn ends(
    grammar: &Grammar,
    expr: &Expr,
    text: &[char],
    at: usize,
    open: &mut HashSet<(usize, usize)>,
) -> BTreeSet<usize> {
    match expr {
        Expr::Class(class) => {
            let holds = |c: &char| {
                let within = class
                    .ranges
                    .iter()
                    .any(|(from, to)| (from..=to).contains(&c));
                within != class.negated
            };
            text.get(at)
                .filter(|c| holds(c))
                .map(|_| at + 1)
                .into_iter()
                .collect()
        }
        Expr::Rule(rule) => {
            if !open.insert((*rule, at)) {
                return BTreeSet::new();
            }
            let found = ends(grammar, &grammar.rules[*rule], text, at, open);
            open.remove(&(*rule, at));
            found
        }
        Expr::Sequence(all) => {
            let mut found = BTreeSet::from([at]);
            for part in all {
                found = found
                    .into_iter()
                    .flat_map(|at| ends(grammar, part, text, at, open))
                    .collect();
            }
            found
        }
        Expr::Either(all) => all
            .iter()
            .flat_map(|part| ends(grammar, part, text, at, open))
            .collect(),
        Expr::Repeat(part, min, max) => {
            let mut found = BTreeSet::new();
            let mut here = BTreeSet::from([at]);
            for n in 0..=max.unwrap_or(u32::MAX).min(20) {
                if n >= *min {
                    found.extend(here.iter().copied());
                }
                here = here
                    .into_iter()
                    .flat_map(|at| ends(grammar, part, text, at, open))
                    .collect();
            }
            found
        }
    }
}

fn by_hand(text: &str, answer: &str) -> bool {
    let grammar = Grammar::read(text).unwrap();
    let answer: Vec<char> = answer.chars().collect();
    let root = Expr::Rule(grammar.root);
    ends(&grammar, &root, &answer, 0, &mut HashSet::new()).contains(&answer.len())
}

/// Grammars whose pieces begin alike, so that a lexer which takes the longest piece goes wrong.
#[test]
fn the_language_is_the_grammars_own() {
    for (grammar, letters) in [
        ("root ::= [a-c]* \"ab\"", "abc"),
        ("root ::= \"a\" root \"b\" | \"ab\" | [a-b] \"c\"", "abc"),
        (
            "root ::= item (\",\" item)*\nitem ::= \"a\" | \"ab\" | \"(\" root \")\"",
            "ab(),",
        ),
        ("root ::= [^a] root? | \"aa\" # the end\n", "abé"),
        (
            "root ::= x{2,3} y?\nx ::= \"a\" | \"b\"\ny ::= \"a\" y \"b\" | \"\"",
            "ab",
        ),
        ("root ::= (\"a\" | \"ab\") (\"c\" | \"bc\" | root)", "abc"),
        ("root ::= . [b\\]] \"\\x61\"+ | \"\\u00e9\"", "ab]é"),
        (
            "root ::= a |\n  b\na ::= (\n \"a\"\n \"b\" )\nb ::= \"b\" b | |\n \"c\"",
            "abc",
        ),
        ("root ::= \"a\"{0,2} \"b\"{1} \"c\"{,1}", "abc"),
    ] {
        let letters: Vec<char> = letters.chars().collect();
        let mut texts = vec![String::new()];
        let mut wrong = Vec::new();
        let mut right = 0;
        for _ in 0..4 {
            let longer = texts
                .iter()
                .flat_map(|text| letters.iter().map(move |c| format!("{text}{c}")));
            texts = longer.collect();
            let expected: Vec<bool> = texts.iter().map(|text| by_hand(grammar, text)).collect();
            let made = accepts_bytes(&super::super::Grammar::gbnf(grammar).unwrap(), &texts);
            for ((text, expected), made) in texts.iter().zip(expected).zip(made) {
                right += usize::from(expected);
                if expected != made {
                    wrong.push((text.clone(), expected));
                }
            }
        }
        assert!(wrong.is_empty() && right > 0, "{grammar}: {wrong:?}");
    }
}

#[test]
fn grammars_without_a_way_back_are_one_expression() {
    let one = converted("root ::= \"a\" b{2}\nb ::= [0-9]+ | \"x\"").unwrap();
    let expected = r"[\u{61}](?:(?:(?:[\u{30}-\u{39}]){1,}|[\u{78}])){2,2}";
    assert_eq!(one, Converted::Regex(expected.into()));
    let rules = converted("root ::= \"(\" root \")\" | \"x\"").unwrap();
    let expected = "start: r0\nr0: /[\\u{28}]/ r0 /[\\u{29}]/ | /[\\u{78}]/\n";
    assert_eq!(rules, Converted::Lark(expected.into()));
    // Doubled so often that no expression could hold it.
    let mut deep: String = (1..40)
        .map(|i| format!("r{i} ::= r{} r{}\n", i + 1, i + 1))
        .collect();
    deep.push_str("r40 ::= \"a\"\nroot ::= r1");
    assert!(matches!(converted(&deep).unwrap(), Converted::Lark(_)));
}

#[test]
fn what_is_wrong_is_told_with_its_line() {
    for (text, expected) in [
        ("", "no rule root"),
        ("roof ::= \"a\"", "no rule root"),
        ("root ::= a", "no rule a"),
        ("root ::= \"a\n", "line 2: a text without its end"),
        ("root ::= \"a\"\nroot = b", "line 2: '=', expected ::="),
        ("root ::= [a", "line 1: a [ without its end"),
        ("root ::= [b-a]", "line 1: 'b'-'a'"),
        ("root ::= []", "line 1: []"),
        ("root ::= (\"a\"", "line 1: the end, expected )"),
        (
            "root ::= \"a\")",
            "line 1: ')', expected the end of the rule",
        ),
        ("root ::= * \"a\"", "line 1: '*' with nothing before it"),
        ("root ::= \"a\"{3,2}", "line 1: {3,2}"),
        ("root ::= \"a\"{9999}", "line 1: 9999 times"),
        ("root ::= \"a\"{}", "line 1: no number in {}"),
        ("root ::= \"\\q\"", "line 1: \\q"),
        ("root ::= \"\\\n\"", "line 2: \\\\n, expected"),
        ("root ::= \"\\x4\"", "line 1: \\x"),
        ("root ::= \"\\ud800\"", "line 1: \\u"),
        ("root ::= <|end|>", "line 1: a token"),
        ("root ::= ?", "line 1: '?'"),
        ("::= \"a\"", "line 1: ':', expected a name"),
    ] {
        let error = converted(text).unwrap_err().to_string();
        let expected = format!("`grammar`: {expected}");
        assert!(error.starts_with(&expected), "{text:?}: {error}");
        assert!(!error.contains('\n'), "{error:?}");
    }
    let deep = format!(
        "root ::= {}\"a\"{}",
        "(".repeat(100_000),
        ")".repeat(100_000)
    );
    assert!(
        converted(&deep)
            .unwrap_err()
            .to_string()
            .contains("groups within")
    );
    let often = format!("root ::= \"a\"{}", "*".repeat(100_000));
    assert!(
        converted(&often)
            .unwrap_err()
            .to_string()
            .contains("repetitions")
    );
}
