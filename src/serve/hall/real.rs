//! A model behind the slots: llama.cpp's context, and the vision file.

use std::path::Path;

use super::file;
use super::mind::Mind;
use super::units::{Held, Piece, Unit};
use crate::attend::Attend;
use crate::cache::{BinOptions, Cell};
use crate::controller::Controller;
use crate::engine::{Engine, Sampler};
use crate::error::{Error, Result};
use crate::generate::{Segment, Slot};
use crate::image::Picture;
use crate::image::hd::Layout;
use crate::llama::{self, ImageTokens, LlamaEngine, Model, SamplerOptions, Vision};
use crate::policy::{Limits, Observe, PolicySpec};
use crate::prompt::tokenize_parts;
use crate::serve::ask::Part;
use crate::turn::{check_picture, contents, segment};

/// What a model needs to sit behind slots.
pub(super) struct Real {
    pub engine: LlamaEngine,
    pub vision: Option<Vision>,
    pub limits: Limits,
    pub reach: Option<usize>,
}

impl Real {
    fn model(&self) -> &Model {
        self.engine.model()
    }

    /// Texts and pictures that follow one another; `first`: the prompt begins with them.
    fn read_run(&self, run: &[&Part], first: bool) -> Result<Vec<Piece<ImageTokens>>> {
        let mut parts: Vec<llama::Part<'_>> = Vec::new();
        for part in run {
            match (part, parts.last_mut()) {
                (Part::Text(text), Some(llama::Part::Text(before))) => before.push_str(text),
                (Part::Text(text), _) => parts.push(llama::Part::Text(text.clone())),
                (Part::Picture(picture), _) => parts.push(llama::Part::Picture(picture)),
                (Part::Tokens(_), _) => {}
            }
        }
        let shown: Vec<&Picture> = run.iter().filter_map(|part| picture(part)).collect();
        let mut pieces = tokenize_parts(self.model(), self.vision.as_ref(), parts, first)?;
        // A template may write what the tokenizer adds.
        if let (true, Some(llama::Piece::Text(head)), Some(bos)) =
            (first, pieces.first_mut(), self.model().bos())
            && head.starts_with(&[bos, bos])
        {
            head.remove(0);
        }
        let is_image = |piece: &&llama::Piece| matches!(piece, llama::Piece::Image(_));
        let n = pieces.iter().filter(is_image).count();
        let mut contents = contents(n, shown.into_iter()).into_iter();
        let mut read = Vec::new();
        for piece in pieces {
            let (rows, positions) = (piece.len(), piece.positions());
            match piece {
                llama::Piece::Text(tokens) => read.push(Piece::Tokens(tokens)),
                llama::Piece::Image(tokens) => {
                    let missing = || Error::contract("a piece of no picture");
                    let content = contents.next().ok_or_else(missing)?;
                    if self.vision.as_ref().is_some_and(Vision::non_causal) {
                        check_picture(rows, self.engine.n_ubatch())?;
                    }
                    let unit = Unit::Picture {
                        content,
                        rows,
                        positions,
                    };
                    read.push(Piece::Picture(unit, tokens));
                }
            }
        }
        Ok(read)
    }
}

fn picture(part: &Part) -> Option<&Picture> {
    match part {
        Part::Picture(picture) => Some(picture),
        _ => None,
    }
}

impl Mind for Real {
    type Engine = LlamaEngine;
    type Picture = ImageTokens;
    type Saved = file::Kept;

    fn engine(&mut self) -> &mut LlamaEngine {
        &mut self.engine
    }

    fn look(&self) -> &LlamaEngine {
        &self.engine
    }

    fn read(&self, prompt: &[Part]) -> Result<Vec<Piece<ImageTokens>>> {
        let mut pieces = Vec::new();
        let mut run: Vec<&Part> = Vec::new();
        let mut first = true;
        for part in prompt {
            let Part::Tokens(tokens) = part else {
                run.push(part);
                continue;
            };
            if let Some(token) = tokens.iter().find(|&&token| !self.model().has_token(token)) {
                let n = self.model().n_vocab();
                let reason = format!("token {token} is not in the vocabulary of {n}");
                return Err(Error::option("the prompt", reason));
            }
            if !run.is_empty() {
                pieces.extend(self.read_run(&run, first)?);
                run.clear();
            }
            pieces.push(Piece::Tokens(tokens.clone()));
            first = false;
        }
        if !run.is_empty() {
            pieces.extend(self.read_run(&run, first)?);
        }
        Ok(pieces)
    }

    fn encode(&mut self, picture: &ImageTokens) -> Result<Segment> {
        match &mut self.vision {
            Some(vision) => Ok(segment(vision.encode(picture)?, 0)),
            None => Err(Error::contract("a picture without a vision file")),
        }
    }

    fn controller(&self, policy: &PolicySpec) -> Result<Controller> {
        let made = policy.create(self.limits)?;
        let obstacle = self.model().eviction_obstacle();
        if let Some(reason) = obstacle.filter(|_| made.evicts()) {
            return Err(Error::Unsupported {
                policy: made.name(),
                reason: reason.into(),
            });
        }
        let refused = |reason: String| Err(Error::option("kv_policy", reason));
        let name = made.name();
        if let Observe::Layers { layers, .. } = made.observe() {
            let read = &self.engine.options().score_layers;
            if layers != *read {
                return refused(format!(
                    "{name} asks for the attention of layers {layers:?}, this server reads that of {read:?}"
                ));
            }
        }
        if made.shifts() && !self.engine.capabilities().shifts {
            return refused(format!(
                "{name} moves tokens to other positions, which this cache cannot beside other slots"
            ));
        }
        Ok(Controller::new(made, self.engine.n_cells()))
    }

    fn bin(&self) -> BinOptions {
        self.engine.options().bin
    }

    fn check_attend(&self, attend: &Attend) -> Result<()> {
        let own = self.engine.attend().copied().unwrap_or_default();
        let same = *attend == own || attend.is_whole() && own.is_whole();
        match same {
            true => Ok(()),
            false => Err(Error::option(
                "attend",
                "all slots of a server attend to the same, as it was started: expected that, or nothing",
            )),
        }
    }

    fn sampler(&self, options: &SamplerOptions) -> Box<dyn Sampler> {
        self.engine.sampler_of(options)
    }

    fn reach(&self) -> Option<usize> {
        self.reach
    }

    fn layouts(&self, prompt: &[Part]) -> Vec<Option<Layout>> {
        let layout = |picture| self.vision.as_ref().and_then(|v| v.hd_layout(picture));
        prompt.iter().filter_map(picture).map(layout).collect()
    }

    fn looked_up(&mut self) -> Vec<Cell> {
        let mut all = Vec::new();
        if self.engine.attend().is_none() {
            return all;
        }
        // Behind a batch that looked nothing up there is nothing to see.
        let read = self.engine.sets(&mut |set| all.extend_from_slice(set));
        if read.is_err() {
            all.clear();
        }
        all.sort_unstable();
        all
    }

    fn save(&mut self, slot: &mut Slot<'static>, held: &Held, path: &Path) -> Result<u64> {
        slot.with(&mut self.engine, |session| file::save(session, held, path))
    }

    fn open(&self, path: &Path) -> Result<(file::Kept, usize, u64)> {
        file::read(path)
    }

    fn restore(&mut self, slot: &mut Slot<'static>, kept: file::Kept) -> Result<Held> {
        let controller = self.controller(kept.policy())?;
        let seq = slot.session()?.sequence();
        *slot = super::work::slot(self, controller, seq);
        slot.with(&mut self.engine, |session| kept.put_back(session))
    }
}
