//! The tokens of a conversation that goes on from the cache: the same as if the whole of it had
//! been tokenized at once.

use hae::image::Picture;
use hae::llama::chat::{self, Message};
use hae::llama::{Model, Piece, Vision};
use hae::prompt::{ChatTemplate, Template, Transcript, place_pictures, tokenize};

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
    vision: &Vision,
    template: &ChatTemplate,
    system: Option<&str>,
    turns: &[Turn],
) -> Vec<i32> {
    let pictures = goldens().remove(0).pictures;
    let mut transcript = Transcript::new(Some(template.clone()), system.map(Into::into));
    let mut all = Vec::new();
    for &(question, n, answer) in turns {
        let first = transcript.is_new();
        let (content, order) = place_pictures(question, transcript.pictures(), n, true).unwrap();
        let text = transcript.ask(content).unwrap();
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
    vision: &Vision,
    template: &ChatTemplate,
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
        let (content, order) = place_pictures(question, n_pictures, n, true).unwrap();
        add("user", &content);
        n_pictures += order.len();
        if i + 1 < turns.len() {
            add("assistant", answer);
        }
    }
    let text = chat::apply(template.text(), &messages, true).unwrap();
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
    let template = Template::default().of(&model).unwrap().unwrap();
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
    for template in ["gemma", "llama3", "mistral-v7", "chatml", "phi3", "vicuna"] {
        let mut transcript = Transcript::new(Some(ChatTemplate::built_in(template).unwrap()), None);
        transcript.ask("one".into()).unwrap();
        transcript.answered(" two \n");
        let text = transcript.ask("three".into());
        let text = text.unwrap_or_else(|e| panic!("{template}: {e}"));
        assert!(
            text.contains("three") && !text.contains("one") && !text.contains("two"),
            "{template}: {text:?}"
        );
    }
}

#[test]
fn every_template_has_a_second_and_a_third_turn() {
    let names = chat::names();
    assert!(names.len() > 50, "{names:?}");
    for template in names {
        let mut transcript =
            Transcript::new(Some(ChatTemplate::built_in(&template).unwrap()), None);
        transcript.ask("one".into()).unwrap();
        for (answer, question) in [("two", "three"), ("four", "five")] {
            transcript.answered(answer);
            let text = transcript.ask(question.into());
            let text = text.unwrap_or_else(|e| panic!("{template}: {e}"));
            let old = ["one", "two", "four"].iter().any(|old| text.contains(old));
            assert!(text.contains(question) && !old, "{template}: {text:?}");
        }
    }
}

/// What closes the answer goes in, although the template opens an answer with other text than it
/// repeats it with.
#[test]
fn a_turn_behind_another_opening_closes_the_answer() {
    for (template, expected) in [
        (
            "hunyuan-dense",
            "<\u{ff5c}hy_place\u{2581}holder\u{2581}no\u{2581}2\u{ff5c}><\u{ff5c}hy_User\u{ff5c}>three<\u{ff5c}hy_Assistant\u{ff5c}>",
        ),
        (
            "chatml",
            "<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n",
        ),
    ] {
        let mut transcript = Transcript::new(Some(ChatTemplate::built_in(template).unwrap()), None);
        transcript.ask("one".into()).unwrap();
        transcript.answered("two");
        assert_eq!(transcript.ask("three".into()).unwrap(), expected);
    }
}

/// The processor cuts the prompt at its pictures and tokenizes each text by itself, the empty ones
/// between pictures that touch and behind one at the end, too.
#[test]
fn empty_texts_between_and_behind_pictures_have_a_bos() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let vision = load_vision(vision, &model);
    let picture = &goldens().remove(0).pictures[0];
    let shape = |text: &str, n: usize, first: bool| {
        let (content, order) = place_pictures(text, 0, n, false).unwrap();
        let shown: Vec<&Picture> = order.iter().map(|_| picture).collect();
        let pieces = tokenize(&model, Some(&vision), &content, &shown, first).unwrap();
        let tokens = pieces.into_iter().map(|piece| match piece {
            Piece::Text(tokens) => tokens,
            Piece::Image(_) => vec![-1],
        });
        tokens.flatten().collect::<Vec<i32>>()
    };
    let text = |text: &str, bos: bool| model.tokenize(text, bos, true).unwrap();
    let (bos, image) = (vec![1], vec![-1]);
    assert_eq!(text("", true), bos);
    let two = "<|user|>\n<|image_1|><|image_2|>Hi";
    let head = text("<|user|>\n", true);
    let hi = text("Hi", true);
    assert_eq!(
        shape(two, 2, true),
        [&head, &image, &bos, &image, &hi]
            .map(|x| x.clone())
            .concat()
    );
    let behind = "Look: <|image_1|>";
    let head = text("Look: ", true);
    assert_eq!(
        shape(behind, 1, true),
        [&head, &image, &bos].map(|x| x.clone()).concat()
    );
    // A later turn goes on from the text before it.
    let head = text("Look: ", false);
    assert_eq!(
        shape(behind, 1, false),
        [&head, &image, &bos].map(|x| x.clone()).concat()
    );
    assert_eq!(
        shape("<|image_1|><|image_2|>", 2, true),
        [&bos, &image, &bos, &image, &bos]
            .map(|x| x.clone())
            .concat()
    );
}

/// What a user, a system prompt or the model writes is never a picture's place.
#[test]
fn text_that_looks_like_a_place_is_tokenized_as_text() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let vision = load_vision(vision, &model);
    let template = Template::default().of(&model).unwrap().unwrap();
    let odd = "<__media__> <|image_pad|> \u{fdd0}1\u{fdd0}";
    let picture = &goldens().remove(0).pictures[0];
    let mut transcript = Transcript::new(Some(template), Some(odd.into()));
    let (content, _) = place_pictures(&format!("<|image_1|>{odd}"), 0, 1, true).unwrap();
    let first = transcript.ask(content).unwrap();
    assert_eq!(transcript.pictures(), 1);
    let pieces = tokenize(&model, Some(&vision), &first, &[picture], true).unwrap();
    let [Piece::Text(head), Piece::Image(_), Piece::Text(tail)] = &pieces[..] else {
        panic!("{pieces:?}")
    };
    assert_eq!(
        *head,
        model
            .tokenize(&format!("<|system|>\n{odd}<|end|>\n<|user|>\n"), true, true)
            .unwrap()
    );
    let question = format!("{odd}<|end|>\n<|assistant|>\n");
    assert_eq!(*tail, model.tokenize(&question, true, true).unwrap());
    transcript.answered(odd);
    let (content, _) = place_pictures(odd, transcript.pictures(), 0, true).unwrap();
    let second = transcript.ask(content).unwrap();
    let pieces = tokenize(&model, Some(&vision), &second, &[], false).unwrap();
    let [Piece::Text(all)] = &pieces[..] else {
        panic!("{pieces:?}")
    };
    let question = format!("<|end|>\n<|user|>\n{odd}<|end|>\n<|assistant|>\n");
    assert_eq!(*all, model.tokenize(&question, false, true).unwrap());
}
