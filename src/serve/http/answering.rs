//! From questions to what is told of their answers, for streams and for whole ones.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::time::Instant;

use super::super::ask::{Ask, Choice, End, Seen, Told};
use super::failure::Failure;
use super::service::Service;
use crate::answer::Answer;
use crate::cache::Counts;
use crate::engine::Token;
use crate::generate::Finish;

/// A token and its probability, and the likeliest beside it.
#[derive(Clone, Debug)]
pub(super) struct Prob {
    pub chosen: Choice,
    pub likeliest: Vec<Choice>,
}

/// What is told, as requests need it.
#[derive(Debug)]
pub(super) enum News {
    /// So many tokens of the prompt are in, those that the slot held included.
    Progress(Progress),
    Said {
        token: Token,
        text: String,
        prob: Option<Prob>,
    },
    Seen {
        step: usize,
        cells: Counts,
        pictures: Vec<Seen>,
    },
    Ended(Box<Whole>),
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    pub total: usize,
    pub cache: usize,
    pub processed: usize,
    pub time: Duration,
}

/// An answer and how it came about.
#[derive(Debug)]
pub(super) struct Whole {
    pub slot: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Those of them that the slot held.
    pub cached: usize,
    pub tokens: Vec<Token>,
    pub probs: Vec<Prob>,
    pub end: End,
    /// What was held back until now; part of the answer's text.
    pub rest: String,
    pub answer: Answer,
}

impl Whole {
    pub fn text(&self) -> &str {
        &self.answer.text
    }

    /// Tokens of the answer.
    pub fn predicted(&self) -> usize {
        self.answer.tokens.generated
    }

    /// Whether the answer ended because there was no room, or older tokens made room for it, as
    /// llama.cpp's context shift does.
    pub fn truncated(&self) -> bool {
        let shifted = self.answer.policy.name == "context_shift";
        shifted && self.answer.evicted.in_decoding > 0
            || matches!(self.end, End::Finish(Finish::Context | Finish::Positions))
    }

    /// OpenAI's word for the end.
    pub fn finish_reason(&self) -> &'static str {
        match self.end {
            End::Stop(_) | End::Finish(Finish::Eog) => "stop",
            End::Finish(_) => "length",
        }
    }
}

/// A question that was taken. Dropping it tells the hall that nobody listens any more.
pub(super) struct Listening {
    told: UnboundedReceiver<Told>,
    /// Came before anybody listened.
    first: Option<News>,
    began: Instant,
    end: Instant,
    timeout: Duration,
    slot: usize,
    prompt: usize,
    cached: usize,
    tokens: Vec<Token>,
    probs: Vec<Prob>,
}

/// Asks.
pub(super) fn ask(service: &Arc<Service>, ask: Ask) -> Result<Listening, Failure> {
    // As long as an answer at most, so it needs no bound; and the model's thread must not wait.
    let (tell, told) = mpsc::unbounded_channel();
    service
        .hall
        .ask(ask, Box::new(move |news| tell.send(news).is_ok()))?;
    let (began, timeout) = (Instant::now(), service.rules.timeout);
    Ok(Listening {
        told,
        first: None,
        began,
        end: began + timeout,
        timeout,
        slot: 0,
        prompt: 0,
        cached: 0,
        tokens: Vec::new(),
        probs: Vec::new(),
    })
}

impl Listening {
    async fn told(&mut self) -> Result<Told, Failure> {
        match tokio::time::timeout_at(self.end, self.told.recv()).await {
            Ok(Some(told)) => Ok(told),
            Ok(None) => Err(Failure::server("the model's thread gave no whole answer")),
            Err(_) => Err(Failure::too_slow(self.timeout.as_secs())),
        }
    }

    /// Waits until the question turned out to be one that can be answered.
    ///
    /// # Errors
    /// Why it cannot.
    pub async fn accepted(&mut self) -> Result<(), Failure> {
        self.first = Some(self.next().await?);
        Ok(())
    }

    /// How far the prompt was when the slot took it.
    pub fn begin(&self) -> Progress {
        self.progress(0, self.prompt.saturating_sub(self.cached))
    }

    /// The same once all of it is in.
    pub fn read(&self) -> Progress {
        let rows = self.prompt.saturating_sub(self.cached);
        self.progress(rows, rows)
    }

    /// The slot that took it.
    pub fn slot(&self) -> usize {
        self.slot
    }

    fn progress(&self, done: usize, rows: usize) -> Progress {
        Progress {
            total: self.cached + rows,
            cache: self.cached,
            processed: self.cached + done,
            time: self.began.elapsed(),
        }
    }

    /// What comes next; nothing comes behind [`News::Ended`].
    ///
    /// # Errors
    /// Why there is no answer.
    pub async fn next(&mut self) -> Result<News, Failure> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        loop {
            match self.told().await? {
                Told::Waits { .. } => {}
                Told::Slot {
                    slot,
                    cached,
                    prompt,
                } => (self.slot, self.cached, self.prompt) = (slot, cached, prompt),
                Told::Prompt { done, rows } => {
                    return Ok(News::Progress(self.progress(done, rows)));
                }
                Told::Seen {
                    step,
                    cells,
                    pictures,
                } => {
                    return Ok(News::Seen {
                        step,
                        cells,
                        pictures,
                    });
                }
                Told::Said {
                    token,
                    text,
                    chosen,
                    likeliest,
                } => {
                    self.tokens.push(token);
                    let prob = chosen.map(|chosen| Prob { chosen, likeliest });
                    self.probs.extend(prob.clone());
                    return Ok(News::Said { token, text, prob });
                }
                Told::Ended { end, rest, answer } => {
                    return Ok(News::Ended(Box::new(Whole {
                        slot: self.slot,
                        prompt: self.prompt,
                        cached: self.cached,
                        tokens: std::mem::take(&mut self.tokens),
                        probs: std::mem::take(&mut self.probs),
                        end,
                        rest,
                        answer: *answer,
                    })));
                }
                Told::Failed(e) => return Err(e.into()),
            }
        }
    }

    /// The whole answer.
    pub async fn whole(mut self) -> Result<Whole, Failure> {
        loop {
            if let News::Ended(whole) = self.next().await? {
                return Ok(*whole);
            }
        }
    }

    /// Tokens so far, and the time since the question.
    pub fn so_far(&self) -> (usize, Duration) {
        (self.tokens.len(), self.began.elapsed())
    }

    /// Tokens of the prompt, and those that the slot held.
    pub fn sizes(&self) -> (usize, usize) {
        (self.prompt, self.cached)
    }
}

/// Asks all, and waits until the first turned out to be one that can be answered: until then a request
/// can still be refused.
pub(super) async fn open(
    service: &Arc<Service>,
    asks: Vec<Ask>,
) -> Result<Vec<Listening>, Failure> {
    let asks = asks.into_iter().map(|one| ask(service, one));
    let mut all = asks.collect::<Result<Vec<_>, _>>()?;
    if let Some(first) = all.first_mut() {
        first.accepted().await?;
    }
    Ok(all)
}

/// All answers, in the order of the questions.
pub(super) async fn wholes(service: &Arc<Service>, asks: Vec<Ask>) -> Result<Vec<Whole>, Failure> {
    let asks = asks.into_iter().map(|one| ask(service, one));
    let all = asks.collect::<Result<Vec<_>, _>>()?;
    futures_util::future::try_join_all(all.into_iter().map(Listening::whole)).await
}
