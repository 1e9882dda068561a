//! One turn of a conversation, whoever asks: text and pictures to a transcript, tokens and
//! embeddings, into the model, to an answer and what it cost. A chat, a question file and a
//! benchmark cook by this recipe.

mod prompts;

use std::sync::Arc;
use std::time::Duration;

use crate::answer::{Answer, Bin, Evicted, Kv, PolicyReport, Timings, Tokens};
use crate::controller::{Controller, Event};
use crate::engine::{Engine, Token};
use crate::error::{Error, Result};
use crate::generate::{Hooks, Length, Segment};
use crate::image::Picture;
use crate::llama::{Model, Vision};
use crate::open::{Opened, Reach};
use crate::prompt::{Transcript, place_pictures};
use prompts::{Key, Shape};

pub use prompts::{Content, Prompts, contents, numbered, segment};

/// What a user says and shows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn<'a> {
    /// What is said, as the user wrote it: the chat template is put around it later.
    pub text: &'a str,
    /// In the order in which they are given; the text may say where they go
    /// ([`place_pictures`]).
    pub pictures: &'a [Picture],
    /// Tokens to generate at most; `None`: until the model ends or the context is full.
    pub n_predict: Option<usize>,
    /// Tokens that will go through the model after the prompt, where that is known better than by
    /// `n_predict`: policies leave room for them.
    pub expected: Option<usize>,
}

/// A conversation so far, beside what the cache holds of it.
#[derive(Clone, Debug, Default)]
pub struct Talk {
    /// What was said, as the model has seen it.
    pub transcript: Transcript,
    /// Last token of the last answer, when it has not gone through the model yet.
    pub pending: Option<Token>,
    /// Pictures that were shown.
    pub images: u32,
}

impl Talk {
    /// A conversation that goes on from this transcript, with no picture and no pending token.
    pub fn new(transcript: Transcript) -> Self {
        Talk {
            transcript,
            pending: None,
            images: 0,
        }
    }

    /// Forgets all turns but a system prompt.
    pub fn clear(&mut self) {
        self.transcript.clear();
        self.pending = None;
        self.images = 0;
    }
}

/// A turn's prompt, ready to go in.
#[derive(Debug)]
pub struct Prompt {
    /// Text and pictures in the order of their positions.
    pub segments: Vec<Segment>,
    /// Visual tokens of each picture.
    pub images: Vec<usize>,
    /// Tokens at its start that belong to the answer before it: 1, or 0.
    pub carried: usize,
    /// What tokenizing it and encoding its pictures took.
    pub encode: Duration,
}

/// One turn.
///
/// An answer that was cancelled before the whole prompt was in takes the question back: the
/// conversation is as it was before the turn.
///
/// # Errors
/// [`Error::PromptTooLong`] and [`Error::Option`] leave the conversation as it was before the turn;
/// after other errors it has to be cleared.
pub fn answer(
    opened: &mut Opened,
    prompts: &mut Prompts,
    talk: &mut Talk,
    turn: Turn<'_>,
    hooks: Hooks<'_>,
) -> Result<Answer> {
    let before = talk.clone();
    let answer = say(opened, prompts, talk, turn, hooks);
    if answer.as_ref().map_or(true, |answer| answer.taken_back) {
        *talk = before;
    }
    answer
}

fn say(
    opened: &mut Opened,
    prompts: &mut Prompts,
    talk: &mut Talk,
    turn: Turn<'_>,
    hooks: Hooks<'_>,
) -> Result<Answer> {
    let prompt = prepare(opened, prompts, talk, turn, hooks.now, hooks.cancelled)?;
    let length = Length {
        n_predict: turn.n_predict,
        reach: positions_left(opened, &prompt.segments),
    };
    let session = &mut opened.session;
    if let Some(n) = turn.expected {
        session.expect(n);
    }
    let generated = session.generate(&prompt.segments, length, hooks)?;
    talk.transcript.answered(&generated.text);
    talk.pending = generated.pending;
    let report = session.controller.report();
    Ok(Answer {
        finish: generated.finish,
        taken_back: generated.taken_back,
        tokens: Tokens {
            prompt: generated.prompt.without_text(prompt.carried),
            images: prompt.images,
            generated: generated.tokens.len(),
        },
        kv: Kv::of(session, &report),
        attended: generated.attended.shares(),
        timings: Timings::of(&generated.timings, prompt.encode),
        evicted: Evicted::of(&report),
        bin: Bin::of(session.store()),
        policy: PolicyReport::of(report),
        text: generated.text,
    })
}

/// Makes a turn's prompt: its text behind what was said, its pictures encoded, its size checked before
/// that. The conversation is then one turn further; [`Talk::pending`] is in the prompt.
///
/// # Errors
/// As [`answer`].
pub fn prepare(
    opened: &mut Opened,
    prompts: &mut Prompts,
    talk: &mut Talk,
    turn: Turn<'_>,
    now: &dyn Fn() -> Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<Prompt> {
    let (key, pictures) = place(prompts, talk, turn)?;
    let read = prompts.read(opened.model(), &key, &pictures, now)?;
    let shapes = read.shapes();
    let carried = usize::from(talk.pending.is_some());
    check_fit(opened, prompts.vision(), &shapes, carried)?;

    let numbered = (talk.images..).zip(pictures.iter().copied());
    let controller = &mut opened.session.controller;
    tell_pictures(controller, prompts.vision(), numbered);
    let encoded = prompts.encode(read, shapes, key, &pictures, now, cancelled)?;
    let encoded = Arc::unwrap_or_clone(encoded);
    let n_images = u32::try_from(encoded.images.len()).unwrap_or(u32::MAX);
    talk.images = talk.images.saturating_add(n_images);
    let pending = talk.pending.take();
    let pending = pending.map(|token| Segment::Tokens(vec![token]));
    Ok(Prompt {
        segments: pending.into_iter().chain(encoded.segments).collect(),
        images: encoded.images,
        carried,
        encode: encoded.time,
    })
}

/// Puts a turn behind what was said: the text that goes in for it, and its pictures in the order of
/// their places.
fn place<'p>(
    prompts: &Prompts,
    talk: &mut Talk,
    turn: Turn<'p>,
) -> Result<(Key, Vec<&'p Picture>)> {
    let first = talk.transcript.is_new();
    let line = prompts.vision().is_some_and(Vision::bos_per_text);
    let shown = talk.transcript.pictures();
    let (content, order) = place_pictures(turn.text, shown, turn.pictures.len(), line)?;
    let key = Key {
        text: talk.transcript.ask(content)?,
        first,
        images: talk.images,
    };
    Ok((key, order.iter().map(|&i| &turn.pictures[i]).collect()))
}

/// How far a turn reaches that nothing follows: its prompt and the tokens of its answer.
///
/// # Errors
/// As [`prepare`]; nothing is encoded.
pub fn reach(model: &Model, prompts: &Prompts, talk: &Talk, turn: Turn<'_>) -> Result<Reach> {
    let Some(n_predict) = turn.n_predict else {
        return Ok(Reach::Cache);
    };
    let (key, pictures) = place(prompts, &mut talk.clone(), turn)?;
    let read = prompts.read(model, &key, &pictures, &|| Duration::ZERO)?;
    let positions: usize = read.shapes().iter().map(|shape| shape.positions).sum();
    Ok(Reach::Positions(positions.saturating_add(n_predict)))
}

/// Tokens after this prompt that the chosen rope factors reach, if they end anywhere.
pub fn positions_left(opened: &Opened, segments: &[Segment]) -> Option<usize> {
    let next = opened.session.controller.next_pos();
    let taken = next as usize + segments.iter().map(Segment::positions).sum::<usize>();
    opened.reach.map(|reach| reach.saturating_sub(taken))
}

/// Checks the size of a prompt before its pictures are encoded. `carried` rows go in before it.
fn check_fit(
    opened: &Opened,
    vision: Option<&Vision>,
    shapes: &[Shape],
    carried: usize,
) -> Result<()> {
    let session = &opened.session;
    // One decode call has to hold a picture whose tokens attend to all of it.
    let n_ubatch = session.engine.n_ubatch();
    let non_causal = vision.is_some_and(Vision::non_causal);
    let images = || shapes.iter().filter(|shape| shape.is_image);
    if non_causal {
        images().try_for_each(|image| check_picture(image.rows, n_ubatch))?;
    }
    let judged = session.judges_first(images().next().is_some());
    let counts = session.controller.ledger().counts();
    let n_ctx = session.engine.n_cells();
    // Where a trial run says what of the pictures goes in, the loop decides; text does.
    let (held, rows): (usize, usize) = match judged {
        true => {
            let text = shapes.iter().filter(|shape| !shape.is_image);
            let held = counts.live.text + counts.binned.text;
            (held, text.map(|shape| shape.rows).sum())
        }
        false => (counts.cells(), shapes.iter().map(|shape| shape.rows).sum()),
    };
    let needed = held + rows + carried;
    // Where older tokens make room, the loop decides, too.
    let shifts = session.controller.shifts();
    if needed > n_ctx && !shifts {
        return Err(Error::PromptTooLong { needed, n_ctx });
    }
    let new: usize = shapes.iter().map(|shape| shape.positions).sum();
    let positions = session.controller.next_pos() as usize + carried + new;
    match opened.reach.filter(|_| !shifts) {
        Some(reach) => check_reach(positions, reach),
        None => Ok(()),
    }
}

/// Whether a picture of so many rows that attend to all of it can go in at once.
///
/// # Errors
/// [`Error::Option`] when not.
pub fn check_picture(rows: usize, n_ubatch: usize) -> Result<()> {
    if rows <= n_ubatch {
        return Ok(());
    }
    let reason = format!(
        "{n_ubatch} rows, but a picture takes {rows} at once with this model: give at least as many with `n_batch` and `n_ubatch`"
    );
    Err(Error::option("n_ubatch", reason))
}

/// Whether a prompt that ends at so many positions is within the reach of the rope factors.
///
/// # Errors
/// [`Error::Option`] when not.
pub fn check_reach(positions: usize, reach: usize) -> Result<()> {
    if positions <= reach {
        return Ok(());
    }
    let reason = format!(
        "the short factors reach {reach} positions, the prompt ends at {positions}: give long, or a larger `n_ctx`"
    );
    Err(Error::option("rope_factors", reason))
}

/// Tells a recorder, if there is one, which pictures are shown, with their numbers.
fn tell_pictures<'p>(
    controller: &mut Controller,
    vision: Option<&Vision>,
    pictures: impl Iterator<Item = (u32, &'p Picture)>,
) {
    for (image, picture) in pictures {
        let layout = vision.and_then(|v| v.hd_layout(picture));
        controller.tell(Event::Shown {
            image,
            picture,
            layout,
        });
    }
}
