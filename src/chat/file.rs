//! A chat into a file and out of one. What comes out is believed only as far as it was
//! checked: a checksum tells damage, not intent.

use std::path::Path;

use super::Chat;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::generate::{History, Segment, Session};
use crate::llama::{LlamaEngine, Model, RopeFactors, gguf};
use crate::saved::{ModelIdentity, Saved, Storage};

/// Pictures of one conversation; their numbers are counted on.
const MOST_IMAGES: u32 = 1 << 24;

impl Chat {
    /// Keeps the conversation in a file.
    ///
    /// # Errors
    /// Those of [`Saved::write`] and [`LlamaEngine::save`].
    pub fn save(&mut self, path: &Path) -> Result<()> {
        let Session {
            engine,
            controller,
            sampler,
            ..
        } = &mut self.opened.session;
        // Where tokens move to other positions, nothing can be called back to where it was.
        let shifts = controller.shifts();
        let saved = Saved {
            model: identity(engine.model())?,
            rope_factors: engine.rope_factors(),
            storage: storage(engine),
            transcript: self.talk.transcript.clone(),
            pending: self.talk.pending,
            sampled: sampler.chosen(),
            images: self.talk.images,
            ledger: controller.ledger().save(),
            state: engine.save()?,
            history: match shifts {
                true => History::default(),
                false => self.opened.session.history().clone(),
            },
            host_bin: match shifts {
                true => Vec::new(),
                false => self.opened.session.store().texts()?,
            },
        };
        saved.write(path)
    }

    /// Goes on with a conversation from a file, in the place of this one.
    ///
    /// # Errors
    /// [`Error::Option`] naming what the file does not go with: another model, other rope
    /// factors or cache types, too small a context; or what in it cannot be. The conversation is
    /// then empty.
    pub fn resume(&mut self, saved: Saved) -> Result<()> {
        self.clear();
        let resumed = self.go_on_with(saved);
        if resumed.is_err() {
            self.clear();
        }
        resumed.map_err(|e| match e {
            Error::Option { name, .. } if name == SESSION => e,
            e => refuse(format!("is damaged: {e}")),
        })
    }

    fn go_on_with(&mut self, saved: Saved) -> Result<()> {
        let engine = &mut self.opened.session.engine;
        check_model(&saved, engine)?;
        check_numbers(&saved, engine.model())?;
        let tokens = saved.ledger.entries.len();
        if tokens > engine.n_cells() {
            let n_ctx = engine.n_cells();
            return Err(refuse(format!(
                "holds {tokens} cells, the context {n_ctx}: give a larger `n_ctx`"
            )));
        }
        let pos: Vec<_> = saved.ledger.entries.iter().map(|e| e.pos).collect();
        let cells = match tokens {
            0 => Vec::new(),
            _ => engine
                .restore_tokens(&saved.state, &pos)
                .map_err(|e| does_not_fit(&saved.storage, &storage(engine), &e))?,
        };
        self.opened.session.sampler.resume(&saved.sampled)?;
        self.opened.session.controller.load(&saved.ledger, &cells)?;
        self.opened.session.resume(saved.history, &saved.host_bin)?;
        self.talk.transcript = saved.transcript;
        self.talk.pending = saved.pending;
        self.talk.images = saved.images;
        Ok(())
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
    let model = identity(engine.model())?;
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

fn identity(model: &Model) -> Result<ModelIdentity> {
    let bytes = std::fs::metadata(model.path())
        .map_err(|e| Error::io(model.path(), e))?
        .len();
    Ok(ModelIdentity {
        arch: model.arch().to_owned(),
        n_layer: model.n_layer(),
        n_embd: model.n_embd(),
        n_vocab: model.n_vocab(),
        bytes,
        fingerprint: gguf::fingerprint(model.path())?,
    })
}
