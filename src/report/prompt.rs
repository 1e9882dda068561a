//! A conversation out of a trace: its pictures with what became of their patches, its text, and
//! the cache as it went.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use maud::{Markup, PreEscaped, html};

use super::Traced;
use super::chart::{self, Axes, Ink, Line};
use super::seen;
use super::story::{Fate, Image, Story, Token};
use crate::cache::Modality;
use crate::error::Result;
use crate::image::hd::{Place, Rect, View};

const TEXT: Ink = Ink(1);
const VISION: Ink = Ink(3);
const BINNED: Ink = Ink(5);
const EVICTED: Ink = Ink(2);
const RESTORED: Ink = Ink(6);

/// `number` of the trace keeps the names of its pictures apart from others.
pub fn section(traced: &Traced, number: usize) -> Result<Markup> {
    let header = &traced.header;
    let mut out = String::new();
    for (i, story) in traced.stories.iter().enumerate() {
        let many = traced.stories.len() > 1;
        let name = format!("p{number}-{i}");
        let text = html! {
            h2 { (traced.path.display()) @if many { " #" (i + 1) } }
            p.soft {
                (header.model) " under " (header.policy)
                @if !header.is_full() { ", " (parameters(traced)) }
                @if !traced.complete { ". The run did not come to its end." }
            }
            (counts(story))
            @for image in &story.images { (picture(story, image, &seen::id(&name, image.image))) }
            (words(story))
            (seen::strip(story, &name))
            (seen::shares(story)?)
            (charts(story)?)
        };
        out.push_str(&text.into_string());
    }
    Ok(PreEscaped(out))
}

fn parameters(traced: &Traced) -> String {
    let options = &traced.header.options;
    let budget = match options.kv_budget {
        Some(crate::policy::Amount::Cells(cells)) => format!("budget {cells} cells"),
        Some(crate::policy::Amount::Share(share)) => format!("budget {share} of the prompt"),
        None => "no budget".into(),
    };
    format!("{budget}, bin {}", options.bin_size)
}

fn counts(story: &Story) -> Markup {
    const FATES: [(&str, &[Fate]); 5] = [
        ("kept", &[Fate::Kept]),
        ("gone and back", &[Fate::Back]),
        ("in the recycle bin", &[Fate::Binned]),
        ("pruned after a prompt", &[Fate::Pruned]),
        ("evicted while decoding", &[Fate::Evicted]),
    ];
    let restored = story.moments.last().map_or(0, |moment| moment.restored);
    html! {
        div.wide { table {
            thead { tr { th { "tokens" } @for (name, _) in FATES { th { (name) } } } }
            tbody { @for (name, modality) in [("visual", Modality::Vision), ("text", Modality::Text)] { tr {
                td { (name) }
                @for (_, fates) in FATES { td { (story.count(modality, fates)) } }
            } } }
        } }
        p.soft {
            (story.peak) " cells at most, " (story.peak_decoding) " while decoding; "
            (story.flushes) " flushes, " (restored) " restores."
        }
    }
}

fn class(fate: Fate) -> &'static str {
    match fate {
        Fate::Kept => "kept",
        Fate::Back => "back",
        Fate::Binned => "binned",
        Fate::Pruned => "pruned",
        Fate::Evicted => "evicted",
    }
}

fn told(token: &Token) -> String {
    match token.fate {
        Fate::Kept => "kept".into(),
        Fate::Back if token.back_at == 0 => "pruned, and back for a question".into(),
        Fate::Back => format!(
            "pruned, and back before token {} of the answer",
            token.back_at
        ),
        Fate::Binned => "in the recycle bin".into(),
        Fate::Pruned => "pruned after the prompt".into(),
        Fate::Evicted => format!("evicted after token {}", token.left_at),
    }
}

fn picture(story: &Story, shown: &Image, id: &str) -> Markup {
    let tokens = story.picture(shown.image);
    let places = shown.layout.map(|layout| layout.places());
    let places = places.filter(|places| places.len() == tokens.len());
    let page = shown.layout.and_then(|layout| layout.page());
    let (Some(places), Some(page)) = (places, page) else {
        return html! {
            h3 { "Picture " (shown.image + 1) }
            p.soft { (tokens.len()) " visual tokens; where they lie on the picture is not known for this model." }
            @if !shown.jpeg.bytes.is_empty() {
                figure { img style="max-width:100%" alt={ "picture " (shown.image + 1) } src=(data(shown)); }
            }
        };
    };
    let whole = Rect {
        x: 0.0,
        y: 0.0,
        width: f64::from(page.width),
        height: f64::from(page.height),
    };
    // Row ends are drawn beside the page.
    let edge = whole.width * 0.045;
    let view = |view: View, caption: String| {
        let own = places
            .iter()
            .zip(&tokens)
            .filter_map(|(place, token)| match place {
                Place::Patch(of, rect) if *of == view => Some((rect, token, false)),
                Place::RowEnd(of, rect) if *of == view => Some((rect, token, true)),
                _ => None,
            });
        let own: Vec<_> = own.collect();
        let kept = own
            .iter()
            .filter(|(_, token, _)| matches!(token.fate, Fate::Kept | Fate::Back))
            .count();
        let Rect {
            x,
            y,
            width,
            height,
        } = page.picture;
        html! {
            figure {
                svg.picture viewBox={ "0 0 " (whole.width + edge) " " (whole.height) } role="img"
                    aria-label={ "picture " (shown.image + 1) ", " (caption) } {
                    rect x="0" y="0" width=(whole.width) height=(whole.height) fill="#fff" {}
                    @if view == View::Whole {
                        use href={ "#" (id) } {}
                    } @else if !shown.jpeg.bytes.is_empty() {
                        image id=(id) x=(x) y=(y) width=(width) height=(height)
                            preserveAspectRatio="none" href=(data(shown)) {}
                    }
                    @for (rect, token, is_end) in &own {
                        rect.(class(token.fate)).end[*is_end]
                            x=(number(rect.x)) y=(number(rect.y))
                            width=(number(if *is_end { edge * 0.8 } else { rect.width }))
                            height=(number(rect.height)) {
                            title { (if *is_end { "row end: " } else { "" }) (told(token)) }
                        }
                    }
                }
                figcaption { (caption) ": " (kept) " of " (own.len()) " tokens kept" }
            }
        }
    };
    let separator = places
        .iter()
        .zip(&tokens)
        .find(|(place, _)| **place == Place::Separator);
    let lost = |fate: Fate| tokens.iter().any(|token| token.fate == fate);
    html! {
        h3 { "Picture " (shown.image + 1) }
        div.legend {
            span { span.chip style="background:#0b1016;border:1px solid var(--line)" {} "pruned after the prompt" }
            @if lost(Fate::Back) { span { span.chip style="background:#2563eb" {} "pruned, and back when it was asked for" } }
            @if lost(Fate::Evicted) { span { span.chip style="background:#7f1d1d" {} "evicted while decoding" } }
            @if lost(Fate::Binned) { span { span.chip style="background:#f59e0b" {} "in the recycle bin" } }
            span { span.chip style="background:#16a34a" {} "row ends, kept" }
        }
        div.pictures {
            (view(View::Crops, format!("{} x {} crops", page.rows, page.cols)))
            (view(View::Whole, "the picture as a whole".into()))
        }
        @if let Some((_, token)) = separator {
            p.soft { "Separator between the two: " (told(token)) "." }
        }
    }
}

/// Coordinates do not need more digits than a screen shows.
fn number(x: f64) -> String {
    let text = format!("{x:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn data(shown: &Image) -> String {
    format!(
        "data:image/jpeg;base64,{}",
        BASE64.encode(&shown.jpeg.bytes)
    )
}

/// Tokens that share a fate, as one piece of text.
struct Run {
    fate: Fate,
    bytes: Vec<u8>,
    /// A picture's number and tokens, in the place of text.
    place: Option<(u32, usize)>,
    answer: bool,
}

fn runs(story: &Story) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for token in &story.tokens {
        let last = runs.last_mut();
        match (token.image, last) {
            (
                Some(image),
                Some(Run {
                    place: Some((of, n)),
                    ..
                }),
            ) if *of == image => *n += 1,
            (Some(image), _) => runs.push(Run {
                fate: Fate::Kept,
                bytes: Vec::new(),
                place: Some((image, 1)),
                answer: token.answer,
            }),
            (None, Some(run))
                if run.place.is_none()
                    && run.answer == token.answer
                    // The rest of a character belongs to its beginning.
                    && (run.fate == token.fate || is_open(&run.bytes)) =>
            {
                run.bytes.extend(&token.bytes);
            }
            (None, _) => runs.push(Run {
                fate: token.fate,
                bytes: token.bytes.clone(),
                place: None,
                answer: token.answer,
            }),
        }
    }
    runs
}

/// Whether the bytes end inside of a character.
fn is_open(bytes: &[u8]) -> bool {
    match std::str::from_utf8(bytes) {
        Ok(_) => false,
        Err(e) => e.error_len().is_none(),
    }
}

fn words(story: &Story) -> Markup {
    let runs = runs(story);
    html! {
        h3 { "Text" }
        div.legend {
            span { "dimmed: pruned after a prompt" }
            span { "dimmed and struck: evicted while decoding" }
            span { "dotted: in the recycle bin" }
        }
        div.words {
            @for part in runs.chunk_by(|a, b| a.answer == b.answer) {
                div.answer[part[0].answer] {
                    @for run in part {
                        @match run.place {
                            Some((image, n)) => span.place { "picture " (image + 1) ": " (n) " tokens" },
                            None if matches!(run.fate, Fate::Kept | Fate::Back) => (String::from_utf8_lossy(&run.bytes)),
                            None => span.(class(run.fate)) { (String::from_utf8_lossy(&run.bytes)) },
                        }
                    }
                }
            }
        }
    }
}

fn charts(story: &Story) -> Result<Markup> {
    // One moment is no line.
    if story.moments.len() < 3 {
        return Ok(html! {});
    }
    let points = |of: &dyn Fn(&super::Moment) -> usize| -> Vec<(f64, f64)> {
        let numbered = story.moments.iter().enumerate();
        numbered
            .map(|(step, moment)| (step as f64, of(moment) as f64))
            .collect()
    };
    let line = |ink: Ink, filled: bool, of: &dyn Fn(&super::Moment) -> usize| Line {
        ink,
        points: points(of),
        filled,
    };
    let cells = [
        line(VISION, true, &|m| m.vision),
        line(TEXT, true, &|m| m.vision + m.text),
        line(BINNED, true, &|m| m.vision + m.text + m.binned),
    ];
    let counts = [
        line(EVICTED, false, &|m| m.evicted),
        line(RESTORED, false, &|m| m.restored),
    ];
    let most = |lines: &[Line]| {
        let all = lines.iter().flat_map(|line| &line.points);
        all.map(|(_, y)| *y).fold(1.0, f64::max) * 1.08
    };
    let axes = |y: &'static str, lines: &[Line]| Axes {
        x: "decoded tokens",
        y,
        x_range: 0.0..(story.moments.len() - 1) as f64,
        y_range: 0.0..most(lines),
    };
    let chip = |ink: Ink, name: &str| {
        html! { span { span.chip style={ "background:var(--c" (ink.0) ")" } {} (name) } }
    };
    Ok(html! {
        h3 { "Cells of the cache" }
        div.legend {
            (chip(VISION, "visual, live")) (chip(TEXT, "text, live")) (chip(BINNED, "recycle bin"))
        }
        div.wide { (PreEscaped(chart::lines(&axes("cells", &cells), &cells)?)) }
        h3 { "Evicted and restored so far" }
        div.legend { (chip(EVICTED, "evicted")) (chip(RESTORED, "restored")) }
        div.wide { (PreEscaped(chart::lines(&axes("tokens", &counts), &counts)?)) }
    })
}
