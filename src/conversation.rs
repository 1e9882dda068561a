//! A conversation with a model: pictures and text in, an answer and what it cost out.

mod file;

use std::time::Duration;

use serde::Serialize;

use crate::attend::Shares;
use crate::cache::{Counts, PerModality, Pos};
use crate::controller::{Controller, Event};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::generate::{Axes, Finish, Hooks, Length, Segment, Session};
use crate::image::Picture;
use crate::llama::{ImageEmbeddings, LlamaEngine, Mrope, Piece, Vision};
use crate::prompt::{Transcript, place_pictures, tokenize};

const NO_VISION: &str = "pictures need a vision file, give one with --mmproj";

/// One user turn.
#[derive(Debug, Default)]
pub struct Turn {
    pub text: String,
    pub pictures: Vec<Picture>,
    /// Tokens to generate at most; `None`: until the model ends or the context is full.
    pub n_predict: Option<usize>,
}

/// An answer with its costs, as reports show it.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    pub text: String,
    pub finish: Finish,
    /// Cancelled before the whole question was read: the conversation is as it was before.
    #[serde(skip)]
    pub taken_back: bool,
    pub tokens: TokenCounts,
    pub kv: KvReport,
    /// What decoding steps attended to, where they looked cells up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attended: Option<Shares>,
    pub timings: TimingReport,
    pub policy: PolicyReport,
}

#[derive(Clone, Debug, Serialize)]
pub struct TokenCounts {
    /// Of this turn's prompt, without the token that the answer before it was cut off at, which
    /// goes through the model with it: that one was generated.
    pub prompt: PerModality,
    /// Visual tokens of each picture of this turn.
    pub images: Vec<usize>,
    pub generated: usize,
}

/// The KV cache after the answer.
#[derive(Clone, Debug, Serialize)]
pub struct KvReport {
    pub cells: Counts,
    /// Cells that the cache can hold.
    pub n_cells: usize,
    /// Bytes that the cells in use take.
    pub bytes_in_use: u64,
    /// Bytes that the most cells ever in use took.
    pub bytes_peak: u64,
    /// Bytes of the buffers behind the cache, whatever is in use.
    pub bytes_allocated: u64,
    /// The most that these ever were, trial runs included.
    pub bytes_allocated_peak: u64,
    /// Bytes of evicted text that waits in host memory.
    pub bytes_host: u64,
}

/// Milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct TimingReport {
    /// Cutting up and encoding the pictures; the prompt's tokenization is in it.
    pub vision_encode_ms: f64,
    /// The trial run of the first layers before the prefill (`--dap-mode early` or `midway`).
    pub probe_ms: f64,
    pub prefill_ms: f64,
    /// From the question to the first token, encoding included.
    pub ttft_ms: Option<f64>,
    /// Mean time of a token after the first.
    pub tpot_ms: Option<f64>,
    pub decode_ms: f64,
}

/// The policy; its counts run over the whole conversation.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyReport {
    pub name: &'static str,
    pub params: serde_json::Value,
    /// The file of `hae calibrate` that parameters were taken from, where one was.
    pub calibration: Option<String>,
    pub evicted_after_prefill: usize,
    pub evicted_in_decoding: usize,
    /// Decoding steps that emptied the recycle bin.
    pub flushes: usize,
    /// Evicted tokens that came back for a later question.
    pub recalled: usize,
    /// The most cells that were taken at once outside of prefills: what `--kv-budget` bounds.
    pub peak_decoding: usize,
}

/// A model, its cache and what was said.
pub struct Conversation {
    session: Session<LlamaEngine>,
    vision: Option<Vision>,
    transcript: Transcript,
    /// Last token of the last answer, when it has not gone through the model yet.
    pending: Option<i32>,
    images: u32,
    /// Positions that the chosen rope factors reach, when they end before the cache does.
    max_positions: Option<usize>,
}

/// What a turn that fails puts back.
struct Before {
    transcript: Transcript,
    pending: Option<i32>,
    images: u32,
}

impl std::fmt::Debug for Conversation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conversation")
            .field("transcript", &self.transcript)
            .finish_non_exhaustive()
    }
}

impl Conversation {
    /// `max_positions`: how far the rope factors reach, if not everywhere; `host_bin`: bytes of
    /// host memory for evicted text.
    pub fn new(
        engine: LlamaEngine,
        vision: Option<Vision>,
        controller: Controller,
        transcript: Transcript,
        max_positions: Option<usize>,
        host_bin: usize,
    ) -> Self {
        Conversation {
            session: Session::new(engine, controller).with_host_bin(host_bin),
            vision,
            transcript,
            pending: None,
            images: 0,
            max_positions,
        }
    }

    /// As [`Session::prepare`].
    ///
    /// # Errors
    /// The engine's own.
    pub fn prepare(&mut self) -> Result<()> {
        self.session.prepare()
    }

    /// Forgets everything that was said and shown.
    pub fn clear(&mut self) {
        self.session.engine.clear();
        self.session.controller.clear();
        self.session.forget();
        self.transcript.clear();
        self.pending = None;
        self.images = 0;
    }

    /// Ends the recording of a trace, if there is one.
    ///
    /// # Errors
    /// As [`Controller::finish_recording`].
    pub fn finish_recording(&mut self) -> Result<()> {
        self.session.controller.finish_recording()
    }

    /// The position that the next token takes, whatever was evicted.
    pub fn next_pos(&self) -> Pos {
        self.session.controller.next_pos()
    }

    /// Whether it can be shown pictures.
    pub fn has_vision(&self) -> bool {
        self.vision.is_some()
    }

    /// Checks a number of crops for the pictures to come.
    ///
    /// # Errors
    /// [`Error::Option`] without a vision model, otherwise as [`Vision::check_num_crops`].
    pub fn check_num_crops(&self, n: u32) -> Result<()> {
        match &self.vision {
            Some(vision) => vision.check_num_crops(n),
            None => Err(Error::option("--num-crops", NO_VISION)),
        }
    }

    /// The state of the cache.
    pub fn kv(&self) -> KvReport {
        let cells = self.session.controller.ledger().counts();
        let bytes = self.session.engine.kv_bytes();
        KvReport {
            cells,
            n_cells: self.session.engine.n_cells(),
            bytes_in_use: bytes.per_cell * cells.cells() as u64,
            bytes_peak: bytes.per_cell * cells.peak as u64,
            bytes_allocated: bytes.allocated,
            bytes_allocated_peak: self.session.peak_bytes().max(bytes.allocated),
            bytes_host: self.session.host_bin().bytes() as u64,
        }
    }

    /// One turn.
    ///
    /// An answer that was cancelled before the whole prompt was in takes the question back: the
    /// conversation is as it was before the turn.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] and [`Error::Option`] leave the conversation as it was before
    /// the turn; other errors leave it unusable until [`Conversation::clear`].
    pub fn ask(&mut self, turn: &Turn, hooks: Hooks<'_>) -> Result<Answer> {
        let before = Before {
            transcript: self.transcript.clone(),
            pending: self.pending,
            images: self.images,
        };
        let answer = self.answer(turn, hooks);
        if answer.as_ref().map_or(true, |answer| answer.taken_back) {
            self.transcript = before.transcript;
            self.pending = before.pending;
            self.images = before.images;
        }
        answer
    }

    fn answer(&mut self, turn: &Turn, hooks: Hooks<'_>) -> Result<Answer> {
        let model = self.session.engine.model();
        let start = (hooks.now)();
        let is_new = self.transcript.is_new();
        let line = self.vision.as_ref().is_some_and(Vision::bos_per_text);
        let (content, order) = place_pictures(
            &turn.text,
            self.transcript.pictures(),
            turn.pictures.len(),
            line,
        )?;
        let pictures: Vec<&Picture> = order.iter().map(|&i| &turn.pictures[i]).collect();
        let text = self.transcript.ask(model, content)?;
        let pieces = tokenize(model, self.vision.as_ref(), &text, &pictures, is_new)?;
        self.check_fit(&pieces)?;

        let numbered = (self.images..).zip(pictures.iter().copied());
        tell_pictures(&mut self.session.controller, self.vision.as_ref(), numbered);
        let carried = usize::from(self.pending.is_some());
        let (segments, images) = self.encode(pieces, hooks.cancelled)?;
        let encoded = (hooks.now)();
        let length = Length {
            n_predict: turn.n_predict,
            reach: self.positions_left(&segments),
        };
        let generated = self.session.generate(&segments, length, hooks)?;
        self.transcript.answered(&generated.text);
        self.pending = generated.pending;

        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let encode = encoded.saturating_sub(start);
        let report = self.session.controller.report();
        Ok(Answer {
            finish: generated.finish,
            taken_back: generated.taken_back,
            tokens: TokenCounts {
                prompt: generated.prompt.without_text(carried),
                images,
                generated: generated.tokens.len(),
            },
            kv: self.kv(),
            attended: generated.attended.shares(),
            timings: TimingReport {
                vision_encode_ms: ms(encode),
                probe_ms: ms(generated.timings.probe),
                prefill_ms: ms(generated.timings.prefill),
                ttft_ms: generated.timings.first_token.map(|t| ms(t + encode)),
                tpot_ms: generated.timings.per_token().map(ms),
                decode_ms: ms(generated.timings.decode),
            },
            policy: PolicyReport {
                name: report.policy,
                params: report.params,
                calibration: None,
                evicted_after_prefill: report.evicted_after_prefill,
                evicted_in_decoding: report.evicted_in_decoding,
                flushes: report.flushes,
                recalled: report.recalled,
                peak_decoding: report.peak_decoding,
            },
            text: generated.text,
        })
    }

    /// Checks the size of a prompt before its pictures are encoded.
    fn check_fit(&self, pieces: &[Piece]) -> Result<()> {
        // One decode call has to hold a picture whose tokens attend to all of it.
        let n_ubatch = self.session.engine.n_ubatch();
        let non_causal = self.vision.as_ref().is_some_and(Vision::non_causal);
        for piece in pieces {
            if let (true, Piece::Image(image)) = (non_causal, piece)
                && image.n > n_ubatch
            {
                let reason = format!(
                    "{n_ubatch} rows, but a picture takes {} at once with this model: give at least as many with -b and -ub",
                    image.n
                );
                return Err(Error::option("-ub", reason));
            }
        }
        let is_picture = |piece: &Piece| matches!(piece, Piece::Image(_));
        let judged = self.session.judges_first(pieces.iter().any(is_picture));
        let counts = self.session.controller.ledger().counts();
        let n_ctx = self.session.engine.n_cells();
        // Where a trial run says what of the pictures goes in, the loop decides; text does.
        let (held, rows): (usize, usize) = match judged {
            true => {
                let text = pieces.iter().filter(|piece| !is_picture(piece));
                let held = counts.live.text + counts.binned.text;
                (held, text.map(Piece::len).sum())
            }
            false => (counts.cells(), pieces.iter().map(Piece::len).sum()),
        };
        let needed = held + rows + usize::from(self.pending.is_some());
        // Where older tokens make room, the loop decides, too.
        let shifts = self.session.controller.shifts();
        if needed > n_ctx && !shifts {
            return Err(Error::PromptTooLong { needed, n_ctx });
        }
        let positions = self.session.controller.next_pos() as usize
            + usize::from(self.pending.is_some())
            + pieces.iter().map(Piece::positions).sum::<usize>();
        if let Some(max) = self.max_positions.filter(|&max| positions > max && !shifts) {
            let reason = format!(
                "the short factors reach {max} positions, the prompt ends at {positions}: give long, or a larger -c"
            );
            return Err(Error::option("--rope-factors", reason));
        }
        Ok(())
    }

    /// Encodes the pictures. Cancelled on the way, what is there does not matter: the loop asks
    /// again before it feeds anything.
    fn encode(
        &mut self,
        pieces: Vec<Piece>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(Vec<Segment>, Vec<usize>)> {
        let mut segments: Vec<Segment> = self
            .pending
            .take()
            .map(|t| Segment::Tokens(vec![t]))
            .into_iter()
            .collect();
        let mut images = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Text(tokens) => segments.push(Segment::Tokens(tokens)),
                Piece::Image(image) => {
                    let Some(vision) = &mut self.vision else {
                        return Err(Error::option("--image", NO_VISION));
                    };
                    images.push(image.n);
                    if cancelled() {
                        // Keeps the prompt from being empty, which would be an error.
                        segments.push(Segment::Tokens(vec![0]));
                        break;
                    }
                    segments.push(segment(vision.encode(&image)?, self.images));
                    self.images += 1;
                }
            }
        }
        Ok((segments, images))
    }

    /// Tokens after this prompt that the chosen rope factors reach, if they end anywhere.
    fn positions_left(&self, segments: &[Segment]) -> Option<usize> {
        let taken = self.session.controller.next_pos() as usize
            + segments.iter().map(Segment::positions).sum::<usize>();
        self.max_positions.map(|max| max.saturating_sub(taken))
    }
}

/// Tells a recorder, if there is one, which pictures are shown, with their numbers.
pub fn tell_pictures<'p>(
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

/// An encoded picture as the loops take it.
pub fn segment(encoded: ImageEmbeddings, image: u32) -> Segment {
    let ImageEmbeddings {
        data,
        n,
        n_pos,
        mrope,
        separators,
    } = encoded;
    Segment::Image {
        embeddings: data,
        n,
        image,
        axes: mrope.map(|Mrope { rows, moves }| Axes { rows, moves, n_pos }),
        separators,
    }
}
