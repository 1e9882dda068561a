//! What a file is and what it says of itself, for people who were given one: nothing of it is loaded, and nothing that
//! it says is believed further than the readers of its kind believe it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use crate::calibrate::file::Calibration;
use crate::convert::{self, Stored};
use crate::error::{Error, Result};
use crate::eval::files::{Format, Source};
use crate::eval::question::Expected;
use crate::eval::results;
use crate::llama::gguf::{Gguf, Value};
use crate::llama::{CacheType, Model, ModelOptions};
use crate::memory::kv_of_token;
use crate::saved::Saved;
use crate::serve::hall;
use crate::text::without_bom;
use crate::trace::{Cut, Reader};

/// The types of which a token's bytes are told.
const TYPES: [CacheType; 3] = [CacheType::F16, CacheType::Q8_0, CacheType::Q4_0];

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A GGUF with a language model.
    TextModel,
    /// A GGUF for mtmd.
    VisionFile,
    /// A GGUF that says no architecture.
    Gguf,
    /// A part of a checkpoint of the Hugging Face layout.
    Safetensors,
    /// All of one: a directory.
    Checkpoint,
    /// A conversation.
    Session,
    /// A conversation of `hae serve`.
    Slot,
    /// What a controller saw and decided.
    Trace,
    /// Parameters that were found for a model.
    Calibration,
    /// Answers of an evaluation.
    Results,
    /// What an evaluation asks.
    Questions,
}

impl Kind {
    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::TextModel => "text model (GGUF)",
            Kind::VisionFile => "vision file (GGUF)",
            Kind::Gguf => "GGUF without an architecture",
            Kind::Safetensors => "safetensors",
            Kind::Checkpoint => "Hugging Face checkpoint",
            Kind::Session => "session",
            Kind::Slot => "session of a server's slot",
            Kind::Trace => "trace",
            Kind::Calibration => "calibration",
            Kind::Results => "results",
            Kind::Questions => "questions",
        }
    }
}

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// ggml's name of its type; of an array, that of its elements.
    #[serde(rename = "type")]
    pub kind: String,
    /// Elements of an array; absent: it is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub len: Option<usize>,
    /// All of it, or the beginning of an array. Numbers that JSON does not have are null.
    pub value: Json,
}

/// A tensor as the file says it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its type, in the file's own spelling.
    #[serde(rename = "type")]
    pub kind: String,
    /// In the file's own order: fastest first in a GGUF, slowest first in safetensors.
    pub shape: Vec<u64>,
    /// That it takes in the file.
    pub bytes: u64,
}

/// All tensors of a type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OfType {
    /// The type.
    #[serde(rename = "type")]
    pub kind: String,
    /// How many.
    pub tensors: usize,
    /// Values in all of them.
    pub values: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// What a token takes in the KV cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kv {
    /// What K and V are stored as.
    #[serde(rename = "type")]
    pub kind: CacheType,
    /// Of a token, in all layers.
    pub bytes_per_token: u64,
    /// Beside them, however long a text is: recurrent states, windows.
    pub bytes_beside: u64,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspected {
    /// The file.
    pub file: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Its length.
    pub bytes: u64,
    /// What matters of it, by name.
    pub facts: Map<String, Json>,
    /// Of a text model that was [measured](Inspected::measure): bytes of a token in the cache, for each type that can
    /// hold its heads.
    pub kv: Vec<Kv>,
    /// Of a text model that cannot be run, of a checkpoint that cannot be converted: why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub obstacle: Option<String>,
    /// In the file's order.
    pub metadata: Vec<Entry>,
    /// By type, the most bytes first.
    pub types: Vec<OfType>,
    /// In the file's order.
    pub tensors: Vec<Tensor>,
}

impl Inspected {
    fn new(file: &Path, kind: Kind, bytes: u64) -> Self {
        Inspected {
            file: file.to_owned(),
            kind,
            bytes,
            facts: Map::new(),
            kv: Vec::new(),
            obstacle: None,
            metadata: Vec::new(),
            types: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// Of a text model: whether it can be run, and what a token of it takes, by llama.cpp itself. Its weights are not
    /// loaded. What it asserts on ends the process, as [`crate::llama::on_abort`] was told to.
    pub fn measure(&mut self) {
        if self.kind == Kind::TextModel {
            match kv(&self.file) {
                Ok(kv) => self.kv = kv,
                Err(Error::File { reason, .. }) => self.obstacle = Some(reason),
                Err(e) => self.obstacle = Some(e.to_string()),
            }
        }
    }

    fn fact(&mut self, name: &str, value: impl Into<Json>) {
        self.facts.insert(name.to_owned(), value.into());
    }

    /// Takes the tensors, and adds them up by type.
    fn take(&mut self, tensors: Vec<Tensor>) {
        let mut types: BTreeMap<&str, OfType> = BTreeMap::new();
        for tensor in &tensors {
            let of = types.entry(&tensor.kind).or_insert_with(|| OfType {
                kind: tensor.kind.clone(),
                tensors: 0,
                values: 0,
                bytes: 0,
            });
            of.tensors += 1;
            of.values = of.values.saturating_add(tensor.shape.iter().product());
            of.bytes = of.bytes.saturating_add(tensor.bytes);
        }
        let mut types: Vec<OfType> = types.into_values().collect();
        types.sort_by_key(|of| std::cmp::Reverse(of.bytes));
        self.fact("tensors", tensors.len());
        self.fact("parameters", types.iter().map(|of| of.values).sum::<u64>());
        self.types = types;
        self.tensors = tensors;
    }
}

/// Says what the file at `path` is; of arrays in its metadata `most` elements.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] for a file that is damaged or of no known kind.
pub fn inspect(path: &Path, most: usize) -> Result<Inspected> {
    let io = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if meta.is_dir() {
        return checkpoint(path);
    }
    if !meta.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    let mut first = Vec::new();
    file.by_ref().take(64).read_to_end(&mut first).map_err(io)?;
    let bytes = meta.len();
    let named = |extension: &str| {
        let own = path.extension().and_then(|e| e.to_str());
        own.is_some_and(|own| own.eq_ignore_ascii_case(extension))
    };
    let text = without_bom(&first).trim_ascii_start();
    let header = first.first_chunk().map(|n| u64::from_le_bytes(*n));
    let is_safetensors = first.get(8) == Some(&b'{') && header.is_some_and(|n| n < bytes);
    match &first[..] {
        [b'G', b'G', b'U', b'F', ..] => gguf(path, bytes, most),
        [b'H', b'A', b'E', b'-', b'S', b'E', b'S', b'S', ..] => session(path, bytes),
        [b'H', b'A', b'E', b'-', b'S', b'L', b'O', b'T', ..] => slot(path, bytes),
        [b'H', b'A', b'E', b'-', b'T', b'R', b'A', b'C', ..] => trace(path, bytes),
        _ if text.starts_with(b"{\"record\":\"header\"") => answers(path, bytes),
        _ if Format::of(path).is_ok() => questions(path, bytes),
        _ if text.starts_with(b"{") => calibration(path, bytes),
        _ if is_safetensors || named("safetensors") => safetensors(path, bytes),
        // Its reader says what is wrong with it.
        _ if named("gguf") => gguf(path, bytes, most),
        _ => Err(Error::file(
            path,
            "is none of the files that are known here, expected a GGUF, safetensors, questions, or a session, trace, calibration or results of hae",
        )),
    }
}

fn gguf(path: &Path, bytes: u64, most: usize) -> Result<Inspected> {
    let gguf = Gguf::open(path)?;
    let arch = gguf.text("general.architecture").ok();
    let kind = match arch.as_deref() {
        Some("clip") => Kind::VisionFile,
        Some(_) => Kind::TextModel,
        None => Kind::Gguf,
    };
    let mut out = Inspected::new(path, kind, bytes);
    out.fact("version", gguf.header().version);
    if let Some(arch) = &arch {
        out.fact("architecture", arch.clone());
    }
    for (name, key) in [("name", "general.name"), ("size", "general.size_label")] {
        if let Ok(text) = gguf.text(key) {
            out.fact(name, text);
        }
    }
    match (kind, &arch) {
        (Kind::TextModel, Some(arch)) => {
            numbers(&gguf, &mut out, &TEXT, arch);
            let tokens = gguf.glimpse("tokenizer.ggml.tokens", 0);
            if let Some(n) = tokens.and_then(|tokens| tokens.len) {
                out.fact("vocabulary", n);
            }
            out.fact(
                "chat template",
                gguf.text("tokenizer.chat_template").is_ok(),
            );
        }
        (Kind::VisionFile, _) => vision(&gguf, &mut out),
        _ => {}
    }
    let entry = |key: String| {
        let found = gguf.glimpse(&key, most)?;
        Some(Entry {
            key,
            kind: found.kind,
            len: found.len,
            value: plain(found.value),
        })
    };
    out.metadata = gguf.keys().into_iter().filter_map(entry).collect();
    let tensors = gguf.tensors().into_iter();
    let tensors: Vec<Tensor> = tensors
        .map(|tensor| Tensor {
            name: tensor.name,
            kind: tensor.kind.name().to_owned(),
            shape: tensor.dims,
            bytes: tensor.bytes,
        })
        .collect();
    out.take(tensors);
    Ok(out)
}

/// What people call the sizes of a text model, and the end of their keys.
const TEXT: [(&str, &str); 6] = [
    ("blocks", "block_count"),
    ("width", "embedding_length"),
    ("feed-forward width", "feed_forward_length"),
    ("heads", "attention.head_count"),
    ("KV heads", "attention.head_count_kv"),
    ("context", "context_length"),
];

/// The same of a vision file.
const VISION: [(&str, &str); 7] = [
    ("blocks", "block_count"),
    ("width", "embedding_length"),
    ("feed-forward width", "feed_forward_length"),
    ("heads", "attention.head_count"),
    ("picture side", "image_size"),
    ("patch side", "patch_size"),
    ("width of a visual token", "projection_dim"),
];

fn numbers(gguf: &Gguf, out: &mut Inspected, names: &[(&str, &str)], prefix: &str) {
    for (name, end) in names {
        let found = gguf.glimpse(&format!("{prefix}.{end}"), 64);
        if let Some(found) = found {
            out.fact(name, plain(found.value));
        }
    }
}

/// What pictures become.
fn vision(gguf: &Gguf, out: &mut Inspected) {
    let projector = ["clip.projector_type", "clip.vision.projector_type"];
    if let Some(projector) = projector.iter().find_map(|key| gguf.text(key).ok()) {
        out.fact("projector", projector);
    }
    for (name, key) in [
        ("pictures", "clip.has_vision_encoder"),
        ("sound", "clip.has_audio_encoder"),
    ] {
        if let Some(Value::Bool(has)) = gguf.get(key) {
            out.fact(name, has);
        }
    }
    numbers(gguf, out, &VISION, "clip.vision");
    let number = |key: &str| gguf.unsigned(key).ok();
    let sides = number("clip.vision.image_size").zip(number("clip.vision.patch_size"));
    if let Some(side) = sides.and_then(|(picture, patch)| picture.checked_div(patch)) {
        out.fact("patches of a picture", side.saturating_mul(side));
    }
}

/// What a token takes, as llama.cpp would allocate it. Weights are not loaded.
fn kv(path: &Path) -> Result<Vec<Kv>> {
    let options = ModelOptions {
        n_gpu_layers: Some(0),
        measure: true,
        ..ModelOptions::default()
    };
    let model = Model::load(path, &options)?;
    let mut all = Vec::new();
    for kind in TYPES {
        match kv_of_token(&model, kind) {
            Ok((bytes_per_token, bytes_beside)) => all.push(Kv {
                kind,
                bytes_per_token,
                bytes_beside,
            }),
            // Heads that are no whole blocks.
            Err(_) if kind.is_quantized() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

fn plain(value: Value) -> Json {
    match value {
        Value::Unsigned(n) => n.into(),
        Value::Signed(n) => n.into(),
        Value::Float(x) => x.into(),
        Value::Bool(b) => b.into(),
        Value::Text(text) => text.into(),
        Value::Array(all) => all.into_iter().map(plain).collect(),
    }
}

fn safetensors(path: &Path, bytes: u64) -> Result<Inspected> {
    let mut out = Inspected::new(path, Kind::Safetensors, bytes);
    out.take(stored(convert::safetensors(path)?));
    Ok(out)
}

fn stored(tensors: Vec<(String, Stored)>) -> Vec<Tensor> {
    let tensor = |(name, stored): (String, Stored)| Tensor {
        name,
        kind: format!("{:?}", stored.dtype),
        shape: stored.shape.iter().map(|&n| n as u64).collect(),
        bytes: stored.bytes,
    };
    tensors.into_iter().map(tensor).collect()
}

/// A directory as `hae convert` takes it. Its bytes are those of its tensors.
fn checkpoint(dir: &Path) -> Result<Inspected> {
    let found = convert::directory(dir)?;
    let tensors = stored(found.tensors);
    let bytes = tensors.iter().map(|tensor| tensor.bytes).sum();
    let mut out = Inspected::new(dir, Kind::Checkpoint, bytes);
    match found.configs {
        Ok((text, vision)) => {
            out.fact("architecture", "phi3_v");
            for (name, value) in [
                ("blocks", text.n_layer),
                ("width", text.n_embd),
                ("heads", text.n_head),
                ("KV heads", text.n_head_kv),
                ("context", text.n_ctx),
                ("vocabulary", text.n_vocab),
                ("vision blocks", vision.n_layer),
                ("vision width", vision.n_embd),
                ("picture side", vision.image_size),
            ] {
                out.fact(name, value);
            }
        }
        Err(e) => out.obstacle = Some(e.to_string()),
    }
    out.take(tensors);
    Ok(out)
}

fn session(path: &Path, bytes: u64) -> Result<Inspected> {
    let mut out = Inspected::new(path, Kind::Session, bytes);
    conversation(&mut out, Saved::read(path)?);
    Ok(out)
}

fn slot(path: &Path, bytes: u64) -> Result<Inspected> {
    let mut out = Inspected::new(path, Kind::Slot, bytes);
    let (policy, saved) = hall::saved_slot(path)?;
    out.fact("policy", policy.name);
    conversation(&mut out, saved);
    Ok(out)
}

fn conversation(out: &mut Inspected, saved: Saved) {
    out.fact("architecture", saved.model.arch);
    out.fact("blocks", saved.model.n_layer);
    out.fact("width", saved.model.n_embd);
    out.fact("vocabulary", saved.model.n_vocab);
    out.fact("model's bytes", saved.model.bytes);
    out.fact("model's fingerprint", saved.model.fingerprint);
    out.fact("K", saved.storage.type_k.name());
    out.fact("V", saved.storage.type_v.name());
    out.fact("pictures", saved.images);
    out.fact("tokens in the cache", saved.ledger.entries.len());
    out.fact("bytes of the cache", saved.state.len());
}

/// Their pictures are not opened.
fn questions(path: &Path, bytes: u64) -> Result<Inspected> {
    let source = Source {
        path: path.to_owned(),
        unanswered: true,
        ..Source::default()
    };
    let (format, questions) = source.read()?;
    let mut out = Inspected::new(path, Kind::Questions, bytes);
    let turns = || questions.iter().flat_map(|question| &question.turns);
    let tasks: BTreeSet<&str> = turns().map(|turn| turn.task.as_str()).collect();
    let unanswered = turns().filter(|turn| turn.expected == Expected::Nothing);
    out.fact("format", format.name());
    out.fact("questions", questions.len());
    out.fact("turns", turns().count());
    out.fact("without an answer", unanswered.count());
    let pictures = questions.iter().map(|question| question.images.len());
    out.fact("pictures", pictures.sum::<usize>());
    out.fact("tasks", json!(tasks));
    Ok(out)
}

fn trace(path: &Path, bytes: u64) -> Result<Inspected> {
    let mut reader = Reader::open(path, Cut::Accept)?;
    let mut out = Inspected::new(path, Kind::Trace, bytes);
    let mut records = 0u64;
    while reader.record()?.is_some() {
        records += 1;
    }
    let header = reader.header();
    out.fact("written by", format!("hae {}", header.build));
    out.fact("model", header.model.clone());
    out.fact("blocks", header.n_layer);
    out.fact("cells", header.n_cells);
    out.fact("policy", header.policy.clone());
    out.fact("layers that were read", header.layers.clone());
    out.fact("records", records);
    out.fact("came to its end", reader.is_complete());
    Ok(out)
}

fn calibration(path: &Path, bytes: u64) -> Result<Inspected> {
    let found = Calibration::read(path)?;
    let mut out = Inspected::new(path, Kind::Calibration, bytes);
    out.fact("model", found.model.file);
    out.fact("questions", found.tune.file.file);
    out.fact("tried", found.tried.len());
    for (name, value) in [
        ("budget", serde_json::to_value(found.kv_budget)),
        ("chosen", serde_json::to_value(found.chosen)),
        ("parameters", serde_json::to_value(found.parameters)),
    ] {
        out.fact(name, value.unwrap_or_default());
    }
    Ok(out)
}

fn answers(path: &Path, bytes: u64) -> Result<Inspected> {
    let (header, answers) = results::read(path)?;
    let mut out = Inspected::new(path, Kind::Results, bytes);
    out.fact("command", format!("hae {}", header.command));
    out.fact("model", header.model.file);
    out.fact("questions", header.questions.file.file);
    out.fact("contenders", header.contenders.len());
    out.fact("answers", answers.len());
    out.fact("distances", json!(header.distance));
    Ok(out)
}
