//! From what is told of one answer to the pieces of a stream, whatever they look like.

use std::time::Duration;

use serde_json::{Value, json};

use super::answering::{Listening, News, Prob, Whole};
use super::fields::Settings;
use super::report;
use super::wire::{Broken, Wire};
use crate::engine::Token;

/// How the pieces of one answer look.
pub(super) trait Writer: Send {
    /// Whether pieces have names.
    const NAMED: bool;

    /// Before all else.
    fn begin(&mut self) -> Vec<Value>;
    /// A piece without text.
    fn empty(&mut self) -> Value;
    /// Behind each token.
    fn said(&mut self, token: Token, text: &str, prob: Option<&Prob>) -> Vec<Value>;
    /// At the end, with the text that was held back.
    fn ended(&mut self, whole: &Whole) -> Vec<Value>;
}

/// Sends the pieces of several answers as they come, and behind them the usage of all, where that is asked for. Each has
/// a writer, which is told its index and whether its last piece says what the answer cost: costs are told once, with the
/// usage of a single answer.
pub(super) async fn choices<W: Writer>(
    wire: &Wire,
    listening: Vec<Listening>,
    settings: &Settings,
    head: Value,
    mut writer: impl FnMut(usize, bool) -> W,
) -> Result<(), Broken> {
    let apart = settings.include_usage && listening.len() == 1;
    let pumps = listening
        .into_iter()
        .enumerate()
        .map(|(index, listening)| pump(wire, listening, writer(index, !apart), settings));
    let answers = futures_util::future::try_join_all(pumps).await?;
    if settings.include_usage {
        let mut last = head;
        last["choices"] = json!([]);
        last["usage"] = report::usage(&answers, settings.n);
        if let (true, Some(first)) = (apart, answers.first()) {
            last["timings"] = report::timings(first);
            last["hae"] = report::hae(first);
        }
        wire.send(&last).await?;
    }
    wire.done().await
}

/// Sends the pieces of one answer.
pub(super) async fn pump<W: Writer>(
    wire: &Wire,
    mut listening: Listening,
    mut writer: W,
    settings: &Settings,
) -> Result<Whole, Broken> {
    let send = async |pieces: Vec<Value>| -> Result<(), Broken> {
        for piece in &pieces {
            match W::NAMED {
                true => wire.named(piece).await?,
                false => wire.send(piece).await?,
            }
        }
        Ok(())
    };
    send(writer.begin()).await?;
    let mut first: Option<Duration> = None;
    let mut told = None;
    loop {
        let news = wire.while_open(listening.next()).await??;
        if settings.return_progress && first.is_none() {
            // The first one says where the slot began, the last one that all is in.
            let begin = told.is_none().then(|| listening.begin());
            let now = match &news {
                News::Progress(progress) => Some(*progress),
                News::Said { .. } => Some(listening.read()),
                _ => None,
            };
            for progress in begin.into_iter().chain(now) {
                if told == Some(progress.processed) {
                    continue;
                }
                told = Some(progress.processed);
                let mut piece = writer.empty();
                piece["prompt_progress"] = report::progress(&progress);
                if settings.timings_per_token {
                    piece["timings"] = report::timings_of_progress(&progress);
                }
                send(vec![piece]).await?;
            }
        }
        match news {
            News::Progress(_) => {}
            News::Seen {
                step,
                cells,
                pictures,
            } => {
                let mut piece = writer.empty();
                let seen = json!({ "step": step, "cells": cells, "pictures": pictures });
                piece["hae"] = json!({ "seen": seen });
                send(vec![piece]).await?;
            }
            News::Said { token, text, prob } => {
                first.get_or_insert(listening.so_far().1);
                let mut pieces = writer.said(token, &text, prob.as_ref());
                if let Some(last) = pieces.last_mut().filter(|_| settings.timings_per_token) {
                    last["timings"] = report::timings_so_far(&listening, first);
                }
                send(pieces).await?;
            }
            News::Ended(whole) => {
                send(writer.ended(&whole)).await?;
                return Ok(*whole);
            }
        }
    }
}
