//! Asks a model one question after the other, under several cache policies by turns.
//!
//! Pictures are encoded once for all policies. Policies that want the same of a context share it:
//! it is emptied before each question, and each question gets a policy in its first state.

pub mod attempt;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::attend::{Attend, Shares};
use crate::bench::{Watch as Clock, wake};
use crate::controller::Controller;
use crate::conversation::{segment, tell_pictures};
use crate::engine::{Engine, Token};
use crate::error::{Error, Result};
use crate::eval::distance::{self, Followed, Places, Said, Watch};
use crate::eval::question::Question;
use crate::eval::record::{self, Distance, Evicted, Kv, Timings};
use crate::generate::{Finish, Hooks, Length, Segment, Session};
use crate::image::Picture;
use crate::llama::{ContextOptions, LlamaEngine, Model, Piece, SamplerOptions, Vision};
use crate::policy::{EvictionPolicy, Limits, PolicySpec};
use crate::prompt::{Transcript, place_pictures, tokenize};
use crate::trace;

/// A policy that is asked.
#[derive(Clone, Debug)]
pub struct Entrant {
    pub contender: record::Contender,
    pub policy: PolicySpec,
    /// With what the policy wants of it.
    pub context: ContextOptions,
}

/// One answer with its costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Answered {
    pub text: String,
    pub finish: Finish,
    pub tokens: record::Tokens,
    pub kv: Kv,
    pub attended: Option<Shares>,
    pub timings: Timings,
    pub evicted: Evicted,
}

/// What the full cache says to each turn of a question.
pub type Reference = Vec<(Said, String)>;

/// A turn's prompt, ready to go in.
struct Prepared {
    segments: Vec<Segment>,
    /// Visual tokens of each picture.
    images: Vec<usize>,
    /// Which of the question's pictures these are.
    order: Vec<usize>,
    encode: Duration,
}

/// A conversation on its way.
struct Talk {
    transcript: Transcript,
    pending: Option<Token>,
}

/// A context and what it was made for.
struct Stage {
    score_layers: Vec<u32>,
    kv_size: Option<u32>,
    attend: Attend,
    session: Session<LlamaEngine>,
}

pub struct Asker {
    model: Model,
    vision: Option<Vision>,
    /// `None`: prompts go in as they are.
    template: Option<String>,
    /// Positions that the chosen rope factors reach, if not all.
    max_positions: Option<usize>,
    stages: Vec<Stage>,
    /// This question's prompts by what they say.
    prepared: HashMap<String, Rc<Prepared>>,
    /// Pictures by content, of this question and the one before it.
    encoded: HashMap<[u8; 32], Encoded>,
    /// Where the next conversation is recorded, and the model's name to show.
    trace: Option<(PathBuf, String)>,
}

struct Encoded {
    /// As picture 0.
    segment: Segment,
    n: usize,
    time: Duration,
    used: bool,
}

impl Asker {
    pub fn new(
        model: &Model,
        vision: Option<Vision>,
        template: Option<String>,
        max_positions: Option<usize>,
    ) -> Self {
        Asker {
            model: model.clone(),
            vision,
            template,
            max_positions,
            stages: Vec::new(),
            prepared: HashMap::new(),
            encoded: HashMap::new(),
            trace: None,
        }
    }

    /// Begins with another question.
    pub fn next_question(&mut self) {
        self.prepared.clear();
        self.encoded
            .retain(|_, encoded| std::mem::take(&mut encoded.used));
    }

    /// Records what the next [`Asker::ask`] sees and decides. Under `full` this reads the attention
    /// of the layers that the entrant's context names.
    pub fn trace_next(&mut self, path: PathBuf, model: String) {
        self.trace = Some((path, model));
    }

    /// Asks every turn of a question. `n_predict` and `expected` are for each turn; `expected`
    /// is how many tokens will go through the model after its prompt, if that is known. `None`:
    /// cancelled.
    ///
    /// # Errors
    /// Those of the pictures, the engine and the policy.
    pub fn ask(
        &mut self,
        entrant: &Entrant,
        question: &Question,
        pictures: &[Picture],
        n_predict: &[usize],
        expected: Option<&[usize]>,
        watch: Clock<'_>,
    ) -> Result<Option<Vec<Answered>>> {
        let stage = self.stage(&entrant.context, |limits| {
            policy_of(entrant, question).create(limits)
        })?;
        self.begin_trace(stage, entrant, question)?;
        let mut talk = self.talk();
        let mut answers = Vec::new();
        for turn in 0..question.turns.len() {
            let carried = usize::from(talk.pending.is_some());
            let (prepared, segments) = self.prompt(&mut talk, question, turn, pictures, watch)?;
            let length = Length {
                n_predict: n_predict.get(turn).copied(),
                reach: self.positions_left(stage, &segments)?,
            };
            let session = &mut self.stages[stage].session;
            let shown = (0..).zip(prepared.order.iter().map(|&i| &pictures[i]));
            tell_pictures(&mut session.controller, self.vision.as_ref(), shown);
            if let Some(&n) = expected.and_then(|all| all.get(turn)) {
                session.expect(n);
            }
            let hooks = Hooks {
                on_text: &mut |_| {},
                cancelled: watch.cancelled,
                now: watch.now,
            };
            let generated = session.generate(&segments, length, hooks)?;
            if generated.finish == Finish::Cancelled {
                return Ok(None);
            }
            talk.transcript.answered(&generated.text);
            talk.pending = generated.pending;
            let ms = |d: Duration| d.as_secs_f64() * 1e3;
            let timings = Timings {
                vision_encode_ms: ms(prepared.encode),
                probe_ms: ms(generated.timings.probe),
                prefill_ms: ms(generated.timings.prefill),
                ttft_ms: generated
                    .timings
                    .first_token
                    .map(|t| ms(t + prepared.encode)),
                tpot_ms: generated.timings.per_token().map(ms),
                decode_ms: ms(generated.timings.decode),
            };
            answers.push(Answered {
                tokens: record::Tokens {
                    prompt: generated.prompt.without_text(carried),
                    images: prepared.images.clone(),
                    generated: generated.tokens.len(),
                },
                finish: generated.finish,
                kv: kv(session),
                attended: generated.attended.shares(),
                evicted: evicted(session),
                timings,
                text: generated.text,
            });
        }
        let controller = &mut self.stages[stage].session.controller;
        controller.finish_recording()?;
        Ok(Some(answers))
    }

    /// Begins the recording that [`Asker::trace_next`] has asked for.
    fn begin_trace(&mut self, stage: usize, entrant: &Entrant, question: &Question) -> Result<()> {
        let Some((path, model)) = self.trace.take() else {
            return Ok(());
        };
        let Session {
            engine, controller, ..
        } = &mut self.stages[stage].session;
        let limits = limits(&self.model, engine);
        let policy = policy_of(entrant, question);
        let layers = entrant.context.score_layers.clone();
        let header = trace::Header::new(model, limits, &policy, layers);
        trace::record(controller, &path, header)
    }

    /// What the full cache says to every turn, greedily, and what it attends to. `context` is
    /// that of `full`. `None`: cancelled.
    ///
    /// # Errors
    /// As [`Asker::ask`].
    pub fn reference(
        &mut self,
        context: &ContextOptions,
        question: &Question,
        pictures: &[Picture],
        n_predict: &[usize],
        watch: Clock<'_>,
    ) -> Result<Option<Reference>> {
        let readable = self.model.eviction_obstacle().is_none();
        let n_layer = self.model.n_layer();
        let mut context = context.clone();
        context.attend = Attend::default();
        let stage = if readable {
            context.score_layers = (0..n_layer).collect();
            self.stage(&context, |_| Ok(Box::new(Watch::all(n_layer)) as _))?
        } else {
            self.stage(&context, |limits| PolicySpec::full().create(limits))?
        };
        let mut talk = self.talk();
        let mut reference = Vec::new();
        for turn in 0..question.turns.len() {
            let (_, segments) = self.prompt(&mut talk, question, turn, pictures, watch)?;
            let reach = self.positions_left(stage, &segments)?;
            let n_predict = n_predict.get(turn).copied().unwrap_or(usize::MAX);
            let n_predict = reach.map_or(n_predict, |reach| n_predict.min(reach));
            let session = &mut self.stages[stage].session;
            let said = distance::listen(session, &segments, n_predict, watch.cancelled)?;
            let Some(said) = said else { return Ok(None) };
            let mut bytes = Vec::new();
            let last = said.tokens.len() - usize::from(said.ended);
            for &token in &said.tokens[..last] {
                session.vocabulary()?.piece(token, &mut bytes)?;
            }
            let text = String::from_utf8_lossy(&bytes).into_owned();
            talk.transcript.answered(&text);
            talk.pending = said.pending();
            reference.push((said, text));
        }
        Ok(Some(reference))
    }

    /// How far an entrant's predictions are from the reference, for each turn, and what was evicted
    /// on the way. `None`: cancelled.
    ///
    /// # Errors
    /// As [`Asker::ask`].
    pub fn distance(
        &mut self,
        entrant: &Entrant,
        question: &Question,
        pictures: &[Picture],
        reference: &Reference,
        watch: Clock<'_>,
    ) -> Result<Option<(Vec<Option<Distance>>, Evicted)>> {
        let stage = self.stage(&entrant.context, |limits| {
            policy_of(entrant, question).create(limits)
        })?;
        let mut talk = self.talk();
        let mut places = Places::default();
        let mut distances = Vec::new();
        for (turn, (said, text)) in reference.iter().enumerate() {
            let (_, segments) = self.prompt(&mut talk, question, turn, pictures, watch)?;
            let session = &mut self.stages[stage].session;
            session.expect(said.fed().len());
            let followed =
                distance::follow(session, &segments, said, &mut places, watch.cancelled)?;
            let Some(followed) = followed else {
                return Ok(None);
            };
            distances.push(Followed::distance(&followed));
            talk.transcript.answered(text);
            talk.pending = said.pending();
        }
        Ok(Some((distances, evicted(&self.stages[stage].session))))
    }

    fn talk(&self) -> Talk {
        Talk {
            transcript: Transcript::new(self.template.clone(), None),
            pending: None,
        }
    }

    /// An empty session on a context like this one, with a new policy.
    fn stage(
        &mut self,
        context: &ContextOptions,
        policy: impl Fn(Limits) -> Result<Box<dyn EvictionPolicy>>,
    ) -> Result<usize> {
        let like = |stage: &Stage| {
            stage.score_layers == context.score_layers
                && stage.kv_size == context.kv_size
                && stage.attend == context.attend
        };
        let Some(at) = self.stages.iter().position(like) else {
            let mut engine =
                LlamaEngine::new(&self.model, context.clone(), &SamplerOptions::GREEDY)?;
            wake(&mut engine, 0)?;
            let policy = policy(limits(&self.model, &engine))?;
            let controller = Controller::new(policy, engine.n_cells());
            self.stages.push(Stage {
                score_layers: context.score_layers.clone(),
                kv_size: context.kv_size,
                attend: context.attend,
                session: Session::new(engine, controller),
            });
            return Ok(self.stages.len() - 1);
        };
        let session = &mut self.stages[at].session;
        empty(session)?;
        let policy = policy(limits(&self.model, &session.engine))?;
        session.controller = Controller::new(policy, session.engine.n_cells());
        session.forget();
        Ok(at)
    }

    /// The prompt of a turn, and what of it has to go in.
    fn prompt(
        &mut self,
        talk: &mut Talk,
        question: &Question,
        turn: usize,
        pictures: &[Picture],
        watch: Clock<'_>,
    ) -> Result<(Rc<Prepared>, Vec<Segment>)> {
        let pictures = if turn == 0 { pictures } else { &[] };
        let asked = &question.turns[turn];
        let text = match (&self.template, &asked.raw) {
            (None, Some(raw)) => raw,
            _ => &asked.text,
        };
        let start = (watch.now)();
        let line = self.vision.as_ref().is_some_and(Vision::bos_per_text);
        let is_new = talk.transcript.is_new();
        let (content, order) =
            place_pictures(text, talk.transcript.pictures(), pictures.len(), line)?;
        let text = talk.transcript.ask(&self.model, content)?;
        let key = format!("{turn} {text}");
        let prepared = match self.prepared.get(&key) {
            Some(prepared) => Rc::clone(prepared),
            None => {
                let ordered: Vec<&Picture> = order.iter().map(|&i| &pictures[i]).collect();
                let pieces = tokenize(&self.model, self.vision.as_ref(), &text, &ordered, is_new)?;
                let tokenized = (watch.now)().saturating_sub(start);
                let mut prepared = self.encode(pieces, &ordered, tokenized, watch)?;
                prepared.order = order;
                let prepared = Rc::new(prepared);
                self.prepared.insert(key, Rc::clone(&prepared));
                prepared
            }
        };
        let pending = talk
            .pending
            .take()
            .map(|token| Segment::Tokens(vec![token]));
        let segments = pending.into_iter().chain(prepared.segments.iter().cloned());
        let segments = segments.collect();
        Ok((prepared, segments))
    }

    /// Encodes the pictures that are not known yet.
    fn encode(
        &mut self,
        pieces: Vec<Piece>,
        pictures: &[&Picture],
        tokenized: Duration,
        watch: Clock<'_>,
    ) -> Result<Prepared> {
        let mut prepared = Prepared {
            segments: Vec::new(),
            images: Vec::new(),
            order: Vec::new(),
            encode: tokenized,
        };
        for piece in pieces {
            let tokens = match piece {
                Piece::Text(tokens) => {
                    prepared.segments.push(Segment::Tokens(tokens));
                    continue;
                }
                Piece::Image(tokens) => tokens,
            };
            let number = prepared.images.len();
            let (Some(vision), Some(picture)) = (&mut self.vision, pictures.get(number)) else {
                return Err(Error::contract("a picture that was not given"));
            };
            let hash = picture.sha256();
            let encoded = match self.encoded.entry(hash) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => {
                    let start = (watch.now)();
                    let embeddings = vision.encode(&tokens)?;
                    let time = (watch.now)().saturating_sub(start);
                    place.insert(Encoded {
                        n: tokens.n,
                        segment: segment(embeddings, 0),
                        time,
                        used: true,
                    })
                }
            };
            encoded.used = true;
            prepared.encode += encoded.time;
            prepared.images.push(encoded.n);
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            prepared.segments.push(numbered(&encoded.segment, number));
        }
        Ok(prepared)
    }

    /// Tokens after this prompt that the chosen rope factors reach, if they end anywhere.
    fn positions_left(&self, stage: usize, segments: &[Segment]) -> Result<Option<usize>> {
        let Some(max) = self.max_positions else {
            return Ok(None);
        };
        let next = self.stages[stage].session.controller.next_pos();
        let taken = next as usize + segments.iter().map(Segment::positions).sum::<usize>();
        match max.checked_sub(taken) {
            Some(left) => Ok(Some(left)),
            None => {
                let reason = format!(
                    "the short factors reach {max} positions, the prompt ends at {taken}: give long, or a larger -c"
                );
                Err(Error::option("--rope-factors", reason))
            }
        }
    }
}

fn limits(model: &Model, engine: &LlamaEngine) -> Limits {
    Limits {
        n_layer: model.n_layer(),
        n_cells: engine.n_cells(),
    }
}

/// Empties a context and gives back what a question made it grow by.
fn empty(session: &mut Session<LlamaEngine>) -> Result<()> {
    session.engine.clear();
    session.engine.compact(0, &mut Vec::new())
}

/// The policy for this question. One that draws by lot draws anew for each: the same places of
/// every picture would be a pattern, not chance.
fn policy_of(entrant: &Entrant, question: &Question) -> PolicySpec {
    let digest = Sha256::digest(&question.id);
    let number = digest.iter().take(8).fold(0, |n, &b| n << 8 | u64::from(b));
    let mut policy = entrant.policy.clone();
    policy.options.seed ^= number;
    policy
}

fn numbered(segment: &Segment, number: u32) -> Segment {
    let mut segment = segment.clone();
    if let Segment::Image { image, .. } = &mut segment {
        *image = number;
    }
    segment
}

fn kv(session: &Session<LlamaEngine>) -> Kv {
    let report = session.controller.report();
    let bytes = session.engine.kv_bytes();
    Kv {
        cells: report.cells,
        peak_decoding: report.peak_decoding,
        n_cells: session.engine.n_cells(),
        bytes_per_cell: bytes.per_cell,
        bytes_in_use: bytes.per_cell * report.cells.cells() as u64,
        bytes_peak: bytes.per_cell * report.cells.peak as u64,
        bytes_peak_decoding: bytes.per_cell * report.peak_decoding as u64,
        bytes_allocated: bytes.allocated,
        bytes_allocated_peak: session.peak_bytes().max(bytes.allocated),
    }
}

fn evicted(session: &Session<LlamaEngine>) -> Evicted {
    let report = session.controller.report();
    Evicted {
        after_prefill: report.evicted_after_prefill,
        in_decoding: report.evicted_in_decoding,
        flushes: report.flushes,
        restores: report.restores,
        recalled: report.recalled,
    }
}
