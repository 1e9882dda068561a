//! A session into what a file holds, and back. What comes back is believed only as far as it was
//! checked: a checksum tells damage, not intent.

use std::borrow::BorrowMut;

use super::{ModelIdentity, Saved, Storage};
use crate::engine::{Engine, Token};
use crate::error::{Error, Result};
use crate::generate::{History, Segment, Session};
use crate::llama::{LlamaEngine, Model, RopeFactors};
use crate::prompt::Transcript;

/// Pictures of one conversation; their numbers are counted on.
const MOST_IMAGES: u32 = 1 << 24;

impl Saved {
    /// What a session holds, with what belongs to its conversation beside: what was said, the token that
    /// has not gone in yet, and how many pictures were shown.
    ///
    /// # Errors
    /// Those of [`LlamaEngine::save_of`].
    pub fn of<E: Engine + BorrowMut<LlamaEngine>>(
        session: &mut Session<E>,
        transcript: Transcript,
        pending: Option<Token>,
        images: u32,
    ) -> Result<Self> {
        let seq = session.sequence();
        let engine: &mut LlamaEngine = session.engine.borrow_mut();
        let (model, rope_factors) = (identity(engine.model()), engine.rope_factors());
        let (storage, state) = (storage(engine), engine.save_of(seq)?);
        // Where tokens move to other positions, nothing can be called back to where it was.
        let shifts = session.controller.shifts();
        Ok(Saved {
            model,
            rope_factors,
            storage,
            transcript,
            pending,
            sampled: session.sampler.chosen(),
            images,
            ledger: session.controller.ledger().save(),
            state,
            history: match shifts {
                true => History::default(),
                false => session.history().clone(),
            },
            host_bin: match shifts {
                true => Vec::new(),
                false => session.store().texts()?,
            },
        })
    }

    /// Lets an empty session go on from here. Its transcript, its pending token and its pictures are
    /// the caller's.
    ///
    /// # Errors
    /// [`Error::Option`] that names what the file does not go with: another model, other rope
    /// factors or cache types, too small a context; or what in it cannot be. The session has to be
    /// cleared then.
    pub fn put_back<E: Engine + BorrowMut<LlamaEngine>>(
        &self,
        session: &mut Session<E>,
    ) -> Result<()> {
        self.fill(session).map_err(|e| match e {
            Error::Option { name, .. } if name == SESSION => e,
            e => refuse(format!("is damaged: {e}")),
        })
    }

    fn fill<E: Engine + BorrowMut<LlamaEngine>>(&self, session: &mut Session<E>) -> Result<()> {
        let seq = session.sequence();
        let engine: &mut LlamaEngine = session.engine.borrow_mut();
        check_model(self, engine)?;
        check_numbers(self, engine.model())?;
        let tokens = self.ledger.entries.len();
        if tokens > engine.n_cells() {
            let n_ctx = engine.n_cells();
            return Err(refuse(format!(
                "holds {tokens} cells, the context {n_ctx}: give a larger `n_ctx`"
            )));
        }
        let pos: Vec<_> = self.ledger.entries.iter().map(|e| e.pos).collect();
        let cells = match (tokens, seq) {
            (0, _) => Ok(Vec::new()),
            (_, 0) => engine.restore_tokens(&self.state, &pos),
            _ => engine.restore_tokens_of(seq, &self.state, &pos),
        };
        let cells = cells.map_err(|e| does_not_fit(&self.storage, &storage(engine), &e))?;
        session.sampler.resume(&self.sampled)?;
        session.controller.load(&self.ledger, &cells)?;
        session.resume(self.history.clone(), &self.host_bin)
    }
}

const SESSION: &str = "session";

fn refuse(reason: String) -> Error {
    Error::option(SESSION, reason)
}

fn storage(engine: &LlamaEngine) -> Storage {
    let options = engine.options();
    Storage {
        type_k: options.type_k,
        type_v: options.type_v,
        flash_attention: options.effective_flash_attention(),
    }
}

/// Why llama.cpp does not take a state, by the flags that say how K and V are stored.
fn does_not_fit(saved: &Storage, now: &Storage, e: &Error) -> Error {
    match saved.flags_beside(now) {
        same if same.is_empty() => refuse(format!("does not fit this run: {e}")),
        then => {
            let now = now.flags_beside(saved);
            refuse(format!(
                "was made with {then}, this run has {now}: give {then}"
            ))
        }
    }
}

fn check_model(saved: &Saved, engine: &LlamaEngine) -> Result<()> {
    let model = identity(engine.model());
    if saved.model != model {
        let of = |m: &ModelIdentity| {
            let print = m.fingerprint.get(..8).unwrap_or_default();
            format!(
                "{} of {} layers, {} bytes, {print}",
                m.arch, m.n_layer, m.bytes
            )
        };
        let (then, now) = (of(&saved.model), of(&model));
        return Err(refuse(format!(
            "was made with another model ({then}), expected {now}"
        )));
    }
    if saved.rope_factors != engine.rope_factors() {
        let of = |factors: RopeFactors| format!("{factors:?}").to_lowercase();
        return Err(refuse(format!(
            "was made with {0} rope factors, this run has {1} ones: give `rope_factors` {0}",
            of(saved.rope_factors),
            of(engine.rope_factors())
        )));
    }
    Ok(())
}

/// Numbers that mean something to the model alone.
fn check_numbers(saved: &Saved, model: &Model) -> Result<()> {
    let wrong = |reason: String| Err(Error::contract(reason));
    let (n_vocab, n_embd) = (model.n_vocab(), model.n_embd());
    let images = saved.images;
    if images > MOST_IMAGES {
        return wrong(format!("{images} pictures"));
    }
    let known = |image: u32| image < images;
    let mut tokens: Vec<i32> = saved.pending.into_iter().collect();
    tokens.extend(&saved.sampled);
    for placed in saved.history.pieces() {
        match placed.segment.as_ref() {
            Segment::Tokens(all) => tokens.extend(all),
            Segment::Image { image, .. } if !known(*image) => {
                return wrong(format!("picture {image} of {images}"));
            }
            Segment::Image { embeddings, n, .. }
                if n.checked_mul(n_embd) != Some(embeddings.len()) =>
            {
                let values = embeddings.len();
                return wrong(format!(
                    "{values} values for {n} embeddings of width {n_embd}"
                ));
            }
            Segment::Image { .. } => {}
        }
    }
    if let Some(token) = tokens.iter().find(|&&token| !model.has_token(token)) {
        return wrong(format!(
            "token {token} is not in the vocabulary of {n_vocab}"
        ));
    }
    let shown = saved.ledger.entries.iter().filter_map(|entry| entry.image);
    match shown.max().is_none_or(known) {
        true => Ok(()),
        false => wrong(format!("tokens of more than {images} pictures")),
    }
}

fn identity(model: &Model) -> ModelIdentity {
    ModelIdentity {
        arch: model.arch().to_owned(),
        n_layer: model.n_layer(),
        n_embd: model.n_embd(),
        n_vocab: model.n_vocab(),
        bytes: model.file_bytes(),
        fingerprint: model.fingerprint().to_owned(),
    }
}
