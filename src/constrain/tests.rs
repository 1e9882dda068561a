use super::*;
use crate::engine::{Greedy, Sampler};

/// Every ASCII character, some pieces of several, and two tokens that end an answer.
fn vocabulary() -> (Vec<Vec<u8>>, Vec<Token>) {
    let mut words: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
    for piece in [
        "Row ", "column", "true", "{\"", "\":", " 1", "ab", "abc", "é", "\", \"",
    ] {
        words.push(piece.as_bytes().to_vec());
    }
    let ends = [words.len(), words.len() + 1].map(|end| Token::try_from(end).unwrap());
    words.extend([b"\xff<|end|>".to_vec(), b"\xff</s>".to_vec()]);
    words.push(Vec::new());
    (words, ends.to_vec())
}

/// Tokens that may come, before any and behind each of these.
fn allowed(constraint: &mut dyn Constraint, n: usize) -> Result<Vec<Token>> {
    let mut logits = vec![0.0; n];
    constraint.mask(&mut logits)?;
    let all = (0..).zip(logits);
    Ok(all
        .filter(|(_, logit)| *logit == 0.0)
        .map(|(token, _)| token)
        .collect())
}

/// Whether a text, byte by byte, is an answer that keeps to the grammar.
fn takes(grammar: &Grammar, text: &str) -> bool {
    accepts_bytes(grammar, &[text.to_owned()])[0]
}

/// The same of many texts.
pub(super) fn accepts_bytes(grammar: &Grammar, texts: &[String]) -> Vec<bool> {
    let (words, ends) = vocabulary();
    let grammars = Grammars::of_words(&words, &ends).unwrap();
    let accepts = |text: &String| {
        let mut constraint = grammars.constraint(grammar).unwrap();
        let mut logits = vec![0.0; words.len()];
        for byte in text.bytes() {
            logits.fill(0.0);
            constraint.mask(&mut logits).unwrap();
            if logits[usize::from(byte)] != 0.0 {
                return false;
            }
            constraint.accept(Token::from(byte)).unwrap();
        }
        allowed(&mut *constraint, words.len())
            .unwrap()
            .contains(&ends[0])
    };
    texts.iter().map(accepts).collect()
}

#[test]
fn an_answer_keeps_to_an_expression_and_then_ends() {
    let grammar = Grammar::regex("Row [0-9], column [0-9]").unwrap();
    assert!(takes(&grammar, "Row 3, column 4"));
    for text in ["Row 3, column ", "Row 33", "row 3", ""] {
        assert!(!takes(&grammar, text), "{text}");
    }
    let (words, ends) = vocabulary();
    let mut constraint = Grammars::of_words(&words, &ends)
        .unwrap()
        .constraint(&grammar)
        .unwrap();
    let token = |piece: &str| {
        let at = words.iter().rposition(|word| word == piece.as_bytes());
        Token::try_from(at.unwrap()).unwrap()
    };
    // The letter, and the piece that goes on from it.
    assert_eq!(
        allowed(&mut *constraint, words.len()).unwrap(),
        [Token::from(b'R'), token("Row ")]
    );
    for piece in ["Row ", "7", ",", " ", "column", " ", "1"] {
        constraint.accept(token(piece)).unwrap();
    }
    assert_eq!(allowed(&mut *constraint, words.len()).unwrap(), ends);
    constraint.accept(ends[1]).unwrap();
    assert!(constraint.accept(ends[1]).is_err());
    // What may not come is refused.
    let mut constraint = Grammars::of_words(&words, &ends)
        .unwrap()
        .constraint(&grammar)
        .unwrap();
    assert!(constraint.accept(token("abc")).is_err());
    assert!(constraint.accept(-1).is_err());
    assert!(constraint.mask(&mut [0.0; 3]).is_err());
}

#[test]
fn json_is_what_its_schema_says() {
    let schema = json!({
        "type": "object",
        "properties": {
            "row": {"type": "integer", "minimum": 1, "maximum": 8},
            "shape": {"enum": ["circle", "star"]},
        },
        "required": ["row", "shape"],
        "additionalProperties": false,
    });
    let grammar = Grammar::json_schema(&schema).unwrap();
    for text in [
        r#"{"row":3,"shape":"star"}"#,
        r#"{"row": 8, "shape": "circle"}"#,
    ] {
        assert!(takes(&grammar, text), "{text}");
    }
    for text in [
        r#"{"row":9,"shape":"star"}"#,
        r#"{"row":3}"#,
        r#"{"row":3,"shape":"x"}"#,
        r#"{"row":          3"#,
        "[]",
    ] {
        assert!(!takes(&grammar, text), "{text}");
    }
    let any = Grammar::json_object().unwrap();
    assert!(takes(
        &any,
        r#"{"a": [1, null, {"b": "é\n"}]}"#.replace("\\n", "").as_str()
    ));
    assert!(!takes(&any, "[1]"));
}

#[test]
fn what_is_wrong_with_a_grammar_is_told_on_one_line() {
    let told = [
        Grammar::regex("(").unwrap_err(),
        Grammar::lark("start: unknown").unwrap_err(),
        Grammar::gbnf("root ::= \"a").unwrap_err(),
        Grammar::gbnf("%llguidance {}\nstart: (").unwrap_err(),
        Grammar::json_schema(&json!([])).unwrap_err(),
        Grammar::json_schema(&json!({"type": "nothing"})).unwrap_err(),
        Grammar::json_schema(&json!({"$ref": "https://example.invalid/schema"})).unwrap_err(),
    ];
    for error in told {
        assert!(matches!(error, Error::Option { .. }), "{error:?}");
        let error = error.to_string();
        assert!(!error.contains('\n') && error.len() < 400, "{error}");
    }
    assert!(Grammars::of_words(&[b"a".to_vec()], &[]).is_err());
}

/// The likeliest of what may come, however unlikely.
#[test]
fn logits_of_other_tokens_are_minus_infinity_and_these_stay() {
    let (words, ends) = vocabulary();
    let grammar = Grammar::gbnf("root ::= (\"ab\" | \"ac\")+").unwrap();
    let mut constraint = Grammars::of_words(&words, &ends)
        .unwrap()
        .constraint(&grammar)
        .unwrap();
    let mut logits: Vec<f32> = (0..words.len()).map(|i| i as f32).collect();
    constraint.mask(&mut logits).unwrap();
    let stayed = logits.iter().filter(|logit| logit.is_finite()).count();
    let a = usize::from(b'a');
    assert_eq!((stayed, logits[a]), (2, a as f32));
    let best = Greedy.sample(&logits).unwrap();
    assert_eq!(words[usize::try_from(best).unwrap()], b"ab");
}
