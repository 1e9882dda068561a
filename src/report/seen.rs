//! What was looked at: a strip of small pictures, one for each sentence, and the share of the
//! cache over time.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use maud::{Markup, PreEscaped, html};

use super::chart::{self, Axes, Ink, Line};
use super::story::{Image, Story, Token};
use super::told::Sentence;
use crate::attend::Shares;
use crate::error::Result;
use crate::image::hd::{Layout, Page, Place};

const ALL: Ink = Ink(1);
const VISION: Ink = Ink(3);

/// Pictures that a sentence shows: those that were looked at most.
const MOST_PICTURES: usize = 4;

/// Characters that it shows of its text.
const MOST_TEXT: usize = 160;

/// How dark a patch is that nothing looked at, of 255.
const DARK: f64 = 225.0;

/// A picture of the conversation, with the visual tokens that lie on it.
struct Shown<'a> {
    number: u32,
    /// Where its tokens lie; otherwise they are drawn in their order.
    page: Option<(Page, Layout)>,
    /// Whether the page has it in full, under [`id`].
    drawn: bool,
    tokens: Vec<&'a Token>,
}

impl Shown<'_> {
    /// Columns and rows of tokens that are drawn in their order: about as many.
    fn grid(&self) -> (usize, usize) {
        let n = self.tokens.len().max(1);
        let cols = (n as f64).sqrt().ceil() as usize;
        (cols, n.div_ceil(cols))
    }
}

/// The name of a picture on the page; `story` is that of the conversation.
pub fn id(story: &str, image: u32) -> String {
    format!("{story}-{image}")
}

/// The strip; nothing where no layer chose among the cells of a picture.
pub fn strip(story: &Story, name: &str) -> Markup {
    let shown = pictures(story);
    if shown.is_empty() {
        return html! {};
    }
    html! {
        h3 { "What was looked at, sentence by sentence" }
        p.soft {
            "The brighter a patch, the more layers chose it while the sentence was told: the mean over its tokens, "
            "against the brightest. "
            @if shown.iter().any(|shown| shown.page.is_some()) {
                "A patch is in two views of its picture; the one that was chosen more counts. "
            }
            @if shown.iter().any(|shown| shown.page.is_none()) {
                "Where tokens lie on a picture is not known for this model: they are drawn row by row, in their order."
            }
        }
        div.strip {
            @for (i, sentence) in story.sentences.iter().enumerate() {
                (figure(&shown, i, sentence, name))
            }
        }
        @if story.sentences_left_out > 0 {
            p.soft { (story.sentences_left_out) " more sentences are not shown." }
        }
    }
}

/// The pictures that were ever looked at in part.
fn pictures(story: &Story) -> Vec<Shown<'_>> {
    let mut shown: Vec<Shown<'_>> = Vec::new();
    for token in &story.tokens {
        let Some(number) = token.image else { continue };
        match shown.iter_mut().find(|shown| shown.number == number) {
            Some(shown) => shown.tokens.push(token),
            None => shown.push(Shown {
                number,
                page: None,
                drawn: false,
                tokens: vec![token],
            }),
        }
    }
    shown.retain(|shown| {
        let looked = shown.tokens.iter().flat_map(|token| &token.looked);
        looked.copied().any(|layers| layers > 0)
    });
    for shown in &mut shown {
        let image = story.images.iter().find(|i| i.image == shown.number);
        let layout = image.and_then(|Image { layout, .. }| *layout);
        let layout = layout.filter(|layout| layout.places().len() == shown.tokens.len());
        shown.page = layout.and_then(|layout| Some((layout.page()?, layout)));
        shown.drawn = image.is_some_and(|image| !image.jpeg.bytes.is_empty());
    }
    shown
}

fn figure(shown: &[Shown<'_>], number: usize, sentence: &Sentence, name: &str) -> Markup {
    let total = |shown: &Shown<'_>| -> u64 {
        let looked = shown.tokens.iter().filter_map(|t| t.looked.get(number));
        looked.map(|&layers| u64::from(layers)).sum()
    };
    let mut order: Vec<&Shown<'_>> = shown.iter().collect();
    order.sort_by_key(|shown| std::cmp::Reverse(total(shown)));
    order.truncate(MOST_PICTURES);
    order.sort_by_key(|shown| shown.number);
    let heats: Vec<Heat> = order
        .iter()
        .map(|shown| Heat::of(shown, number, sentence.layers))
        .collect();
    let most = heats.iter().flat_map(|heat| &heat.values);
    let most = most.copied().fold(0.0, f64::max);
    let many = shown.len() > 1;
    html! {
        figure {
            @for (shown, heat) in order.iter().zip(&heats) {
                (picture(shown, (sentence.steps > 0).then(|| heat.png(most)), name))
            }
            figcaption {
                (shortened(&sentence.text))
                @if sentence.steps == 0 {
                    div.soft { "every layer saw everything" }
                } @else {
                    div.soft {
                        @if many { "Pictures " @for (i, s) in order.iter().enumerate() { @if i > 0 { ", " } (s.number + 1) } ". " }
                        (sentence.steps) " token" @if sentence.steps > 1 { "s" }
                        ", up to " (percent(most)) " of layers"
                    }
                }
            }
        }
    }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(MOST_TEXT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// `mask`: the address of what lies over the picture.
fn picture(shown: &Shown<'_>, mask: Option<String>, name: &str) -> Markup {
    let (width, height) = match &shown.page {
        Some((page, _)) => (page.width as usize, page.height as usize),
        None => shown.grid(),
    };
    html! {
        svg.seen viewBox={ "0 0 " (width) " " (height) } role="img"
            aria-label={ "what was looked at of picture " (shown.number + 1) } {
            rect x="0" y="0" width=(width) height=(height) fill="#fff" {}
            @if shown.page.is_some() && shown.drawn {
                use href={ "#" (id(name, shown.number)) } {}
            }
            @if let Some(mask) = mask {
                image x="0" y="0" width=(width) height=(height) preserveAspectRatio="none" href=(mask) {}
            }
        }
    }
}

/// How much each part of a picture was looked at: a share of layers, the mean over steps.
struct Heat {
    cols: usize,
    /// `[rows, cols]`
    values: Vec<f64>,
}

impl Heat {
    fn of(shown: &Shown<'_>, sentence: usize, layers: u64) -> Self {
        let layers = layers.max(1) as f64;
        let value = |token: &Token| {
            let looked = token.looked.get(sentence).copied().unwrap_or(0);
            f64::from(looked) / layers
        };
        let Some((page, layout)) = &shown.page else {
            let (cols, rows) = shown.grid();
            let mut values: Vec<f64> = shown.tokens.iter().map(|token| value(token)).collect();
            values.resize(cols * rows, 0.0);
            return Heat { cols, values };
        };
        let n = layout.cut.tokens as usize;
        let (cols, rows) = (page.cols as usize * n, page.rows as usize * n);
        let mut values = vec![0.0; cols * rows];
        let (wide, high) = (f64::from(page.width), f64::from(page.height));
        for (place, token) in layout.places().iter().zip(&shown.tokens) {
            let Place::Patch(_, rect) = place else {
                continue;
            };
            let part = |at: f64, of: f64, n: usize| ((at / of * n as f64).round() as usize).min(n);
            let right = part(rect.x + rect.width, wide, cols);
            for row in part(rect.y, high, rows)..part(rect.y + rect.height, high, rows) {
                for at in &mut values[row * cols..][part(rect.x, wide, cols)..right] {
                    *at = f64::max(*at, value(token));
                }
            }
        }
        Heat { cols, values }
    }

    /// A pixel for each part, darker the less it was looked at, as a PNG's address. Empty where it
    /// cannot be made.
    fn png(&self, most: f64) -> String {
        let pixels = self.values.iter().flat_map(|&value| {
            let seen = if most > 0.0 { value / most } else { 0.0 };
            let dark = (1.0 - seen.clamp(0.0, 1.0)) * DARK;
            [8, dark as u8]
        });
        let side = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (cols, rows) = (side(self.cols), side(self.values.len() / self.cols));
        let mask = image::GrayAlphaImage::from_raw(cols, rows, pixels.collect());
        let mut bytes = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        match mask.map(|mask| mask.write_with_encoder(encoder)) {
            Some(Ok(())) => format!("data:image/png;base64,{}", BASE64.encode(&bytes)),
            _ => String::new(),
        }
    }
}

/// The share of the cells that a layer attended to, by decoded token; nothing where none chose.
///
/// # Errors
/// When the chart cannot be drawn.
pub fn shares(story: &Story) -> Result<Markup> {
    let shares: Vec<(f64, Shares)> = story
        .moments
        .iter()
        .enumerate()
        .filter_map(|(step, moment)| Some((step as f64, moment.attended.shares()?)))
        .collect();
    let (Some((first, _)), Some((last, _))) = (shares.first(), shares.last()) else {
        return Ok(html! {});
    };
    if first == last {
        return Ok(html! {});
    }
    let line = |ink: Ink, points: Vec<(f64, f64)>| Line {
        ink,
        points,
        filled: false,
    };
    let all = shares.iter().map(|(step, shares)| (*step, shares.all));
    let vision = shares
        .iter()
        .filter_map(|(step, shares)| Some((*step, shares.vision?)));
    let lines = [line(ALL, all.collect()), line(VISION, vision.collect())];
    let most = lines.iter().flat_map(|line| &line.points);
    let most = most.map(|(_, y)| *y).fold(0.0, f64::max);
    let axes = Axes {
        x: "decoded tokens",
        y: "share of cells",
        x_range: *first..*last,
        y_range: 0.0..(most * 1.08).clamp(0.05, 1.0),
    };
    let chip = |ink: Ink, name: &str| {
        html! { span { span.chip style={ "background:var(--c" (ink.0) ")" } {} (name) } }
    };
    Ok(html! {
        h3 { "Share of the cache that a layer attends to" }
        div.legend {
            (chip(ALL, "of all cells"))
            @if !lines[1].points.is_empty() { (chip(VISION, "of visual cells")) }
        }
        div.wide { (PreEscaped(chart::lines(&axes, &lines)?)) }
    })
}
