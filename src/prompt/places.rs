//! Where the pictures of a conversation stand in its text.
//!
//! Between a turn and the tokenizer a place is a mark that no text holds: two noncharacters of
//! Unicode around the picture's number in the conversation. What a user, a system prompt or the
//! model itself writes goes through [`escape`] first, so whatever it looks like, it stays text.

use std::borrow::Cow;

use crate::error::{Error, Result};
use crate::image::Picture;
use crate::llama::Part;

const MARK: char = '\u{fdd0}';
const ESCAPE: char = '\u{fdd1}';
/// Behind an [`ESCAPE`]: which of the two was there.
const WAS_MARK: char = '\u{fdd2}';
const WAS_ESCAPE: char = '\u{fdd3}';

/// Stands for an answer, to see what a template writes around it.
pub(super) const ANSWER: &str = "\u{fdd4}";

/// llama.cpp's own name for a picture's place.
const MEDIA: &str = "<__media__>";
/// Phi-3.5-vision's, before the number and the end.
const IMAGE: &str = "<|image_";
const IMAGE_END: &str = "|>";

/// Text that holds no mark, from any text.
pub(super) fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains([MARK, ESCAPE]) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            MARK => out.extend([ESCAPE, WAS_MARK]),
            ESCAPE => out.extend([ESCAPE, WAS_ESCAPE]),
            c => out.push(c),
        }
    }
    out.into()
}

fn unescape(text: &str) -> Cow<'_, str> {
    if !text.contains(ESCAPE) {
        return text.into();
    }
    let mark = [ESCAPE, WAS_MARK].iter().collect::<String>();
    let escape = [ESCAPE, WAS_ESCAPE].iter().collect::<String>();
    let text = text.replace(&mark, MARK.encode_utf8(&mut [0; 4]));
    text.replace(&escape, ESCAPE.encode_utf8(&mut [0; 4]))
        .into()
}

fn mark(number: usize) -> String {
    format!("{MARK}{number}{MARK}")
}

/// Pictures that were shown in a text with marks: the highest number.
pub(super) fn shown(text: &str) -> usize {
    let numbers = text.split(MARK).skip(1).step_by(2);
    numbers.filter_map(|n| n.parse().ok()).max().unwrap_or(0)
}

/// What a text with marks is made of: text, and `pictures` in their order.
///
/// # Errors
/// [`Error::Option`] when marks and pictures differ in number.
pub(super) fn parts<'a>(text: &str, pictures: &[&'a Picture]) -> Result<Vec<Part<'a>>> {
    let places = text.matches(MARK).count() / 2;
    if places != pictures.len() {
        let reason = format!("{} pictures for {places} places", pictures.len());
        return Err(Error::option("image", reason));
    }
    let mut pictures = pictures.iter();
    let mut parts = Vec::new();
    for (i, part) in text.split(MARK).enumerate() {
        if i % 2 == 0 {
            parts.push(Part::Text(unescape(part).into_owned()));
        } else {
            parts.extend(pictures.next().map(|picture| Part::Picture(picture)));
        }
    }
    Ok(parts)
}

/// The text of a turn with a mark where each of its `n` pictures goes, and the pictures' order.
/// `before` pictures were shown in earlier turns.
///
/// `<|image_k|>` (Phi-3.5-vision) says where: k counts the pictures of the conversation from 1, as
/// the model's processor does, or those of the turn. Where the text names none, as many
/// `<__media__>` (llama.cpp) as there are pictures say it. A text without either takes the pictures
/// in front; `line` puts each of those on a line of its own. All else is text, also what looks like
/// a place: `<|image_pad|>`, and `<__media__>` beside a `<|image_k|>` or without a picture.
///
/// # Errors
/// [`Error::Option`] when places and pictures do not match.
pub fn place_pictures(
    text: &str,
    before: usize,
    n: usize,
    line: bool,
) -> Result<(String, Vec<usize>)> {
    let named = named(text);
    if !named.is_empty() {
        return at_names(text, &named, before, n);
    }
    let media = if n == 0 {
        0
    } else {
        text.matches(MEDIA).count()
    };
    if media > 0 && media != n {
        let reason = format!(
            "the prompt has places for {media} pictures, but {n} were given: \
             where {MEDIA} is text, name the places {IMAGE}1{IMAGE_END} and so on"
        );
        return Err(Error::option("image", reason));
    }
    let mut out = String::new();
    let mut marks = (before + 1..=before + n).map(mark);
    if media > 0 {
        for part in text.split(MEDIA) {
            out.push_str(&escape(part));
            out.extend(marks.next());
        }
    } else {
        for mark in marks {
            out.push_str(&mark);
            out.push_str(if line { "\n" } else { "" });
        }
        out.push_str(&escape(text));
    }
    Ok((out, (0..n).collect()))
}

/// A `<|image_k|>` in a text.
struct Name<'t> {
    start: usize,
    end: usize,
    digits: &'t str,
}

fn named(text: &str) -> Vec<Name<'_>> {
    let names = text.match_indices(IMAGE).filter_map(|(start, _)| {
        let (digits, _) = text[start + IMAGE.len()..].split_once(IMAGE_END)?;
        let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        is_number.then(|| Name {
            start,
            end: start + IMAGE.len() + digits.len() + IMAGE_END.len(),
            digits,
        })
    });
    names.collect()
}

fn at_names(
    text: &str,
    names: &[Name<'_>],
    before: usize,
    n: usize,
) -> Result<(String, Vec<usize>)> {
    let bad = |reason: String| Error::option("image", reason);
    let number = |name: &Name<'_>| name.digits.parse::<usize>().ok();
    let all_in = |first: usize| {
        let known = first + 1..=first + n;
        names
            .iter()
            .all(|name| number(name).is_some_and(|k| known.contains(&k)))
    };
    // A turn names each of its pictures, so with pictures before it only one of the two can be.
    let first = if before > 0 && !all_in(before) {
        0
    } else {
        before
    };
    let known = first + 1..=first + n;
    let (mut out, mut order, mut at) = (String::new(), Vec::new(), 0);
    for name in names {
        let Some(k) = number(name).filter(|k| known.contains(k)) else {
            let digits = name.digits;
            let shown = match before {
                0 => String::new(),
                _ => format!(" with this turn and {before} before it"),
            };
            return Err(bad(format!(
                "the prompt names {IMAGE}{digits}{IMAGE_END}, but {n} pictures were given{shown}"
            )));
        };
        out.push_str(&escape(&text[at..name.start]));
        out.push_str(&mark(before + k - first));
        order.push(k - first - 1);
        at = name.end;
    }
    out.push_str(&escape(&text[at..]));
    match (0..n).find(|i| !order.contains(i)) {
        None => Ok((out, order)),
        Some(missing) => Err(bad(format!(
            "the prompt has no {IMAGE}{}{IMAGE_END}, but {n} pictures were given",
            first + missing + 1
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(text: &str, before: usize, n: usize) -> (String, Vec<usize>) {
        place_pictures(text, before, n, true).unwrap()
    }

    #[test]
    fn pictures_go_in_front_where_the_text_names_no_place() {
        let (first, second) = (mark(1), mark(2));
        assert_eq!(
            placed("Why?", 0, 2),
            (format!("{first}\n{second}\nWhy?"), vec![0, 1])
        );
        assert_eq!(
            place_pictures("Why?", 0, 1, false).unwrap(),
            (format!("{first}Why?"), vec![0])
        );
        assert_eq!(placed("Why?", 0, 0), ("Why?".to_owned(), vec![]));
        assert_eq!(placed("Why?", 1, 1), (format!("{second}\nWhy?"), vec![0]));
    }

    #[test]
    fn named_places_order_the_pictures() {
        let (first, second) = (mark(1), mark(2));
        assert_eq!(
            placed("a <|image_2|> b <|image_1|> c", 0, 2),
            (format!("a {second} b {first} c"), vec![1, 0])
        );
        assert_eq!(
            placed("a <__media__> b", 0, 1),
            (format!("a {first} b"), vec![0])
        );
        assert_eq!(
            placed("<|image_1|><|image_01|>", 0, 1),
            (format!("{first}{first}"), vec![0, 0])
        );
    }

    #[test]
    fn numbers_count_over_the_conversation_or_in_the_turn() {
        let (third, fourth) = (mark(3), mark(4));
        let expected = (format!("{fourth} or {third}?"), vec![1, 0]);
        assert_eq!(placed("<|image_4|> or <|image_3|>?", 2, 2), expected);
        assert_eq!(placed("<|image_2|> or <|image_1|>?", 2, 2), expected);
        // Of one and two pictures, the second is both the turn's second and the conversation's.
        let (second, third) = (mark(2), mark(3));
        let by_conversation = placed("<|image_2|><|image_3|>", 1, 2);
        assert_eq!(by_conversation, (format!("{second}{third}"), vec![0, 1]));
        let by_turn = placed("<|image_2|><|image_1|>", 1, 2);
        assert_eq!(by_turn, (format!("{third}{second}"), vec![1, 0]));
        for (text, before, n) in [
            ("<|image_1|>", 1, 0),
            ("<|image_2|>", 2, 1),
            ("<|image_1|> <|image_3|>", 1, 2),
            ("<|image_2|>", 1, 2),
        ] {
            let error = place_pictures(text, before, n, true).unwrap_err();
            assert!(error.to_string().contains("pictures were given"), "{error}");
        }
    }

    #[test]
    fn places_and_pictures_must_match() {
        for (text, n) in [
            ("<|image_3|>", 2),
            ("<|image_1|>", 2),
            ("<|image_0|>", 1),
            ("<|image_99999999999999999999|>", 1),
            ("<|image_7|>", 0),
            ("<__media__><__media__>", 1),
        ] {
            let error = place_pictures(text, 0, n, true).unwrap_err().to_string();
            assert!(error.starts_with("`image`: "), "{error}");
            assert!(error.contains(&format!("{n}")), "{error}");
        }
    }

    #[test]
    fn what_only_looks_like_a_place_is_text() {
        for text in [
            "What is <|image_pad|>?",
            "<|image_",
            "<|image_|>",
            "<|image_x|> <|image_1 |>",
            "<__media__> and <__image__>",
            "\u{fdd0}1\u{fdd0} \u{fdd1}\u{fdd2}",
        ] {
            let (content, order) = placed(text, 0, 0);
            assert!(order.is_empty() && shown(&content) == 0, "{text}");
            let [Part::Text(back)] = &parts(&content, &[]).unwrap()[..] else {
                panic!("{text}")
            };
            assert_eq!(back, text);
        }
        // With a picture, too: `<__media__>` where another place is named.
        let (content, order) = placed("<|image_1|> Is <__media__> \u{fdd0}?", 0, 1);
        assert_eq!((shown(&content), order), (1, vec![0]));
        let picture = Picture {
            width: 1,
            height: 1,
            rgb: vec![0; 3],
            num_crops: None,
        };
        let parts = parts(&content, &[&picture]).unwrap();
        let [Part::Text(head), Part::Picture(_), Part::Text(tail)] = &parts[..] else {
            panic!("{parts:?}")
        };
        assert_eq!((&**head, &**tail), ("", " Is <__media__> \u{fdd0}?"));
    }
}
