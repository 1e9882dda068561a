//! A loaded text model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::model::{LlamaModel, RopeType};
use llama_cpp_2::token::LlamaToken;
use llama_cpp_sys_2 as sys;

use super::cache_type::CacheType;
use super::gguf::{Gguf, c_path};
use super::placement::Placement;
use super::rows::check_token;
use super::{backend, devices, gguf, hparams, log, tokens, weights};
use crate::engine::{Token, Vocabulary};
use crate::error::{Error, Result};

/// How to load a model.
#[derive(Clone, Debug, Default)]
pub struct ModelOptions {
    /// Layers to keep on the GPU (`-ngl`); `None` lets llama.cpp decide.
    pub n_gpu_layers: Option<u32>,
    /// Read the weights into memory instead of mapping the file (`--no-mmap`).
    pub no_mmap: bool,
    /// Keep the weights from being swapped out (`--mlock`).
    pub mlock: bool,
    /// Take no memory for weights, contexts and their caches, and say how much it would be ([`crate::memory`]). Nothing
    /// can be computed with it.
    pub measure: bool,
    /// Which devices it goes to.
    pub placement: Placement,
    /// Only the vocabulary, which may be all that the file has. Nothing can be computed with it.
    pub vocabulary: bool,
}

/// A GGUF text model. Clones share its weights, and so do the contexts made from it, each of which
/// holds a clone.
#[derive(Clone)]
pub struct Model {
    pub(super) inner: Arc<LlamaModel>,
    path: PathBuf,
    file_bytes: u64,
    fingerprint: String,
    options: ModelOptions,
    arch: String,
    /// Positions that the short rope factors were trained for, when the model has two sets.
    long_rope_from: Option<u32>,
    /// Values of a head, of K and of V, where all layers have the same.
    head: Option<[u64; 2]>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("path", &self.path)
            .field("arch", &self.arch)
            .finish()
    }
}

impl Model {
    /// Loads a text model.
    ///
    /// # Errors
    /// [`Error::File`] when the file is not a GGUF text model that llama.cpp can load.
    pub fn load(path: &Path, options: &ModelOptions) -> Result<Self> {
        let meta = Gguf::open(path)?;
        let arch = meta.text("general.architecture")?;
        if arch == "clip" {
            return Err(Error::file(
                path,
                "is a vision file (architecture clip), expected a text model: pass it as `mmproj`",
            ));
        }
        tokens::check(&meta)?;
        // Now: whoever keeps a conversation later must not need the file, which may be another one then.
        let file_bytes = std::fs::metadata(path)
            .map_err(|e| Error::io(path, e))?
            .len();
        let fingerprint = gguf::fingerprint::of(&meta)?;
        if options.vocabulary {
            let params = LlamaModelParams::default().with_vocab_only(true);
            let inner = load(path, &params)?;
            return Ok(Model {
                inner,
                path: path.to_owned(),
                file_bytes,
                fingerprint,
                options: options.clone(),
                arch,
                long_rope_from: None,
                head: None,
            });
        }
        let mut tensors = meta.tensors();
        weights::check(&meta)?;
        // Of a model in several files llama.cpp opens the others by itself.
        let in_parts = meta.unsigned("split.count").is_ok_and(|n| n > 1);
        for part in path
            .to_str()
            .filter(|_| in_parts)
            .map_or(Vec::new(), gguf::parts)
            .iter()
            .skip(1)
        {
            let part = Gguf::open(part.as_ref())?;
            weights::check(&part)?;
            tensors.extend(part.tensors());
        }
        hparams::check(&meta, &arch, &tensors)?;
        let orig_key = format!("{arch}.rope.scaling.original_context_length");
        let two_sets = tensors
            .iter()
            .any(|t| t.name.ends_with("rope_factors_long.weight"));
        let long_rope_from = two_sets
            .then(|| meta.unsigned(&orig_key).ok())
            .flatten()
            .and_then(|n| u32::try_from(n).ok());

        let (mut params, pointed) = options.placement.set(LlamaModelParams::default())?;
        if let Some(n) = options.n_gpu_layers {
            params = params.with_n_gpu_layers(n);
        }
        if options.no_mmap {
            params = params.with_use_mmap(false);
        }
        if options.mlock {
            params = params.with_use_mlock(true);
        }
        if options.measure {
            params = params.with_no_alloc(true);
        }
        let inner = load(path, &params)?;
        drop(pointed);
        Ok(Model {
            inner,
            path: path.to_owned(),
            file_bytes,
            fingerprint,
            options: options.clone(),
            head: head(&meta, &arch),
            arch,
            long_rope_from,
        })
    }

    /// The GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of that file when it was loaded.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// What told it from others when it was loaded ([`gguf::fingerprint`]).
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// How it was loaded.
    pub fn options(&self) -> &ModelOptions {
        &self.options
    }

    /// Whether layers of it may be on a GPU.
    pub(super) fn may_use_gpu(&self) -> bool {
        // Not what llama.cpp says, which with the RPC backend is yes on any machine.
        let offloads = || self.options.placement.offloads().unwrap_or(false);
        self.options.n_gpu_layers != Some(0) && offloads()
    }

    /// `general.architecture`.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// What llama.cpp calls it: architecture, size and type.
    pub fn description(&self) -> String {
        devices::description(&self.inner)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        // SAFETY: the pointer is valid while `self.inner` lives.
        unsafe { sys::llama_model_size(self.inner.as_ptr()) }
    }

    /// All weights, counted one by one.
    pub fn n_params(&self) -> u64 {
        // SAFETY: the pointer is valid while `self.inner` lives.
        unsafe { sys::llama_model_n_params(self.inner.as_ptr()) }
    }

    /// Positions after which a longrope model needs its long factors; `None` for other models.
    pub fn long_rope_from(&self) -> Option<u32> {
        self.long_rope_from
    }

    /// Whether a cache of this type can hold its heads: a quantized one holds whole blocks of them. False
    /// where that is not known.
    pub fn takes_cache(&self, kind: CacheType) -> bool {
        // SAFETY: a type that ggml knows.
        let block = unsafe { sys::ggml_blck_size(kind.raw().into()) };
        let block = u64::try_from(block).unwrap_or(u64::MAX);
        let whole = |head: [u64; 2]| head.iter().all(|n| n.is_multiple_of(block));
        block == 1 || self.head.is_some_and(whole)
    }

    /// Transformer layers.
    pub fn n_layer(&self) -> u32 {
        self.inner.n_layer()
    }

    /// Context length that the model was trained for.
    pub fn n_ctx_train(&self) -> u32 {
        // SAFETY: the pointer is valid while `self.inner` lives.
        let n = unsafe { sys::llama_model_n_ctx_train(self.inner.as_ptr()) };
        u32::try_from(n).unwrap_or(0)
    }

    /// Width of an embedding row that the decoder takes.
    pub fn n_embd(&self) -> usize {
        // SAFETY: the pointer is valid while `self.inner` lives.
        let n = unsafe { sys::llama_model_n_embd_inp(self.inner.as_ptr()) };
        usize::try_from(n).unwrap_or(0)
    }

    /// Tokens of the vocabulary: the length of the logits.
    pub fn n_vocab(&self) -> usize {
        usize::try_from(self.inner.n_vocab()).unwrap_or(0)
    }

    /// Whether it is a token of this model's vocabulary.
    pub fn has_token(&self, token: Token) -> bool {
        usize::try_from(token).is_ok_and(|token| token < self.n_vocab())
    }

    /// Positions of the attention window; 0: none.
    pub(super) fn n_swa(&self) -> i32 {
        // SAFETY: the pointer is valid while `self.inner` lives.
        unsafe { sys::llama_model_n_swa(self.inner.as_ptr()) }
    }

    /// Why sequence-level eviction of single tokens cannot serve this model, if it cannot.
    pub fn eviction_obstacle(&self) -> Option<&'static str> {
        let n_swa = self.n_swa();
        if self.inner.is_recurrent() || self.inner.is_hybrid() {
            Some("its memory is recurrent, single tokens cannot be removed from it")
        } else if n_swa > 0 {
            Some("it uses sliding-window attention, whose cells differ between layers")
        } else if matches!(
            self.inner.rope_type(),
            Some(RopeType::MRope | RopeType::IMRope | RopeType::Vision)
        ) {
            Some(
                "all tokens of a picture share one position (M-RoPE), single ones cannot be removed",
            )
        } else {
            None
        }
    }

    pub(super) fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the pointer is valid while `self.inner` lives; the vocabulary is a part of it.
        unsafe { sys::llama_model_get_vocab(self.inner.as_ptr()) }
    }

    /// Token ids of a text. `special` parses special tokens, `add_bos` adds what the model wants
    /// at the start of a text.
    ///
    /// # Errors
    /// [`Error::Llama`] for more text than llama.cpp counts, or when its tokenizer fails.
    pub fn tokenize(&self, text: &str, add_bos: bool, special: bool) -> Result<Vec<Token>> {
        const CALL: &str = "llama_tokenize";
        let len = i32::try_from(text.len())
            .map_err(|_| Error::llama(CALL, format!("a text of {} bytes", text.len())))?;
        // Most texts have fewer tokens than half of their bytes.
        let mut tokens = vec![0; text.len() / 2 + 8];
        for _ in 0..2 {
            let most = i32::try_from(tokens.len()).unwrap_or(i32::MAX);
            log::forget();
            // SAFETY: the model is alive, the text as long as is said, and so is the room for
            // tokens.
            let n = unsafe {
                sys::llama_tokenize(
                    self.vocab(),
                    text.as_ptr().cast(),
                    len,
                    tokens.as_mut_ptr(),
                    most,
                    add_bos,
                    special,
                )
            };
            match (usize::try_from(n), n.checked_neg()) {
                (Ok(n), _) => {
                    tokens.truncate(n);
                    return Ok(tokens);
                }
                // So many there are.
                (Err(_), Some(needed)) => tokens.resize(needed as usize, 0),
                // The smallest integer: the tokenizer has failed.
                (Err(_), None) => break,
            }
        }
        Err(Error::llama(
            CALL,
            log::take_reason("the text has too many tokens"),
        ))
    }

    /// Appends a token's text bytes to `out`; `special`: also those of one that only controls.
    ///
    /// # Errors
    /// [`Error::Llama`] for a token that is not in the vocabulary.
    pub fn text(&self, token: Token, special: bool, out: &mut Vec<u8>) -> Result<()> {
        const CALL: &str = "llama_token_to_piece";
        check_token(CALL, token, self.n_vocab())?;
        let start = out.len();
        let mut room = 32;
        for _ in 0..2 {
            out.resize(start + room as usize, 0);
            let to = out[start..].as_mut_ptr().cast();
            log::forget();
            // SAFETY: the model is alive, the token one of its vocabulary, and `to` has as much
            // room as is said.
            let n = unsafe { sys::llama_token_to_piece(self.vocab(), token, to, room, 0, special) };
            match (usize::try_from(n), n.checked_neg()) {
                (Ok(n), _) => {
                    out.truncate(start + n);
                    return Ok(());
                }
                (Err(_), Some(needed)) => room = needed,
                (Err(_), None) => break,
            }
        }
        out.truncate(start);
        Err(Error::llama(
            CALL,
            log::take_reason("the token has no text"),
        ))
    }

    /// The token that a text begins with, where the vocabulary has one.
    pub fn bos(&self) -> Option<Token> {
        Some(self.inner.vocab().bos().0).filter(|&token| self.has_token(token))
    }

    /// The token that ends a text, where the vocabulary has one.
    pub fn eos(&self) -> Option<Token> {
        Some(self.inner.vocab().eos().0).filter(|&token| self.has_token(token))
    }

    /// How the vocabulary writes a token, special ones too; empty for one that it does not have.
    pub fn written(&self, token: Token) -> String {
        let vocab = self.inner.vocab();
        let text = (self.has_token(token)).then(|| vocab.text(LlamaToken(token)));
        let text = text.flatten().map(|text| text.to_string_lossy());
        text.unwrap_or_default().into_owned()
    }

    /// The chat template in the file.
    pub fn chat_template(&self) -> Option<String> {
        self.inner
            .chat_template(None)
            .ok()
            .and_then(|t| t.to_string().ok())
    }
}

fn load(path: &Path, params: &LlamaModelParams) -> Result<Arc<LlamaModel>> {
    let backend = backend()?;
    c_path(path)?;
    log::forget();
    let inner = LlamaModel::load_from_file(backend, path, params).map_err(|e| {
        let reason = log::take_reason(&e.to_string());
        Error::file(path, format!("cannot be loaded: {reason}"))
    })?;
    Ok(Arc::new(inner))
}

/// Values of a head as llama.cpp reads them (`load_hparams`): of K and of V.
fn head(meta: &Gguf, arch: &str) -> Option<[u64; 2]> {
    let number = |key: &str| meta.unsigned(&format!("{arch}.{key}")).ok();
    let (width, heads) = (number("embedding_length")?, number("attention.head_count")?);
    let usual = width.checked_div(heads);
    let own = |key| number(key).or(usual);
    Some([own("attention.key_length")?, own("attention.value_length")?])
}

impl Vocabulary for Model {
    fn is_eog(&self, token: Token) -> bool {
        self.inner.vocab().is_eog(LlamaToken(token))
    }

    fn piece(&self, token: Token, out: &mut Vec<u8>) -> Result<()> {
        self.text(token, false, out)
    }
}
