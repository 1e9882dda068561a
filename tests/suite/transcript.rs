//! The tokens of a conversation that goes on from the cache: the same as if the whole of it had
//! been tokenized at once.

use hae::llama::chat::{self, Message};
use hae::llama::{Model, Piece, Vision};
use hae::prompt::{Transcript, place_pictures, tokenize};

use crate::model::{converted, goldens, load, load_vision};

/// A turn: the question, how many pictures go with it, and the answer.
type Turn = (&'static str, usize, &'static str);

/// Token ids, with one `-1` for each visual token.
fn ids(pieces: Vec<Piece>) -> Vec<i32> {
    let ids = pieces.into_iter().flat_map(|piece| match piece {
        Piece::Text(tokens) => tokens,
        Piece::Image(image) => vec![-1; image.n],
    });
    ids.collect()
}

/// What goes into the cache over the turns, question by question and answer by answer.
fn fed(
    model: &Model,
    vision: &Vision<'_>,
    template: &str,
    system: Option<&str>,
    turns: &[Turn],
) -> Vec<i32> {
    let pictures = goldens().remove(0).pictures;
    let mut transcript = Transcript::new(Some(template.into()), system.map(Into::into));
    let mut all = Vec::new();
    for &(question, n, answer) in turns {
        let first = transcript.is_new();
        let (content, order) = place_pictures(question, n, true).unwrap();
        let text = transcript.ask(model, content).unwrap();
        let shown = vec![&pictures[0]; order.len()];
        all.extend(ids(
            tokenize(model, Some(vision), &text, &shown, first).unwrap()
        ));
        // The model's own tokens, and no token that ends the answer.
        all.extend(model.tokenize(answer, false, false).unwrap());
        transcript.answered(answer);
    }
    all
}

/// The whole conversation at once, as the model's processor would do it.
fn at_once(
    model: &Model,
    vision: &Vision<'_>,
    template: &str,
    system: Option<&str>,
    turns: &[Turn],
) -> Vec<i32> {
    let pictures = goldens().remove(0).pictures;
    let mut messages: Vec<Message> = Vec::new();
    let mut add = |role: &str, content: &str| {
        messages.push(Message {
            role: role.to_owned(),
            content: content.to_owned(),
        });
    };
    if let Some(system) = system {
        add("system", system);
    }
    let mut n_pictures = 0;
    for (i, &(question, n, answer)) in turns.iter().enumerate() {
        let (content, order) = place_pictures(question, n, true).unwrap();
        add("user", &content);
        n_pictures += order.len();
        if i + 1 < turns.len() {
            add("assistant", answer);
        }
    }
    let text = chat::apply(model, template, &messages, true).unwrap();
    let shown = vec![&pictures[0]; n_pictures];
    let mut all = ids(tokenize(model, Some(vision), &text, &shown, true).unwrap());
    all.extend(
        model
            .tokenize(turns.last().unwrap().2, false, false)
            .unwrap(),
    );
    all
}

#[test]
fn turns_continue_as_if_tokenized_at_once() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let vision = load_vision(vision, &model);
    let template = model.chat_template().unwrap();
    let conversations: [&[Turn]; 5] = [
        &[
            ("Where is the red circle?", 1, "row 3, column 4"),
            ("And the star?", 0, "row 1"),
        ],
        &[
            ("Hello", 0, "Hi."),
            ("What is this?", 1, "a star"),
            ("And this?", 1, "a circle"),
        ],
        &[
            ("One\n\ntwo ", 0, "three"),
            (" four", 0, ""),
            ("five", 0, "six"),
        ],
        &[
            ("Compare <|image_1|> and <|image_1|>.", 1, "same"),
            ("Why?", 0, "no"),
        ],
        &[
            ("a", 2, "b"),
            ("c <|image_2|> d <|image_1|> e", 2, "f"),
            ("g", 0, "h"),
        ],
    ];
    for turns in conversations {
        for system in [None, Some("Be short.")] {
            assert_eq!(
                fed(&model, &vision, &template, system, turns),
                at_once(&model, &vision, &template, system, turns),
                "{turns:?}"
            );
        }
    }
}

/// Several of llama.cpp's templates trim the answers that they repeat.
#[test]
fn templates_that_trim_go_on_too() {
    let model = load(converted("f32").0);
    for template in ["gemma", "llama3", "mistral-v7", "chatml", "phi3", "vicuna"] {
        let mut transcript = Transcript::new(Some(template.into()), None);
        transcript.ask(&model, "one".into()).unwrap();
        transcript.answered(" two \n");
        let text = transcript.ask(&model, "three".into());
        let text = text.unwrap_or_else(|e| panic!("{template}: {e}"));
        assert!(
            text.contains("three") && !text.contains("one") && !text.contains("two"),
            "{template}: {text:?}"
        );
    }
}
