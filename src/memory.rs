//! What a run will take of which memory, before anything of it is loaded: llama.cpp makes the model, the context and the
//! graphs without memory and says how large their buffers would be.

pub mod fit;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::image::Picture;
use crate::llama::{
    CacheType, ContextOptions, Footprint, LlamaEngine, Model, Part, Piece, Place, SamplerOptions,
    Vision, by_device, grown, places,
};
use crate::open::Plan;
use crate::policy::{DapMode, PolicySpec};

/// Of a picture: width and height in pixels, and crops at most.
pub type Size = (u32, u32, Option<u32>);

/// What a run does with its context.
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// Pictures of a prompt.
    pub pictures: Vec<Size>,
    /// Tokens of text in the prompt; `None`: as many as the context holds.
    pub n_prompt: Option<usize>,
    /// Tokens that are written; `None`: as many as the context holds.
    pub n_predict: Option<usize>,
}

/// Bytes of one memory, all of them taken at once at the peak.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Which, and what is free of it.
    #[serde(flatten)]
    pub place: Place,
    /// Of the text model.
    pub weights: u64,
    /// Of the KV cache.
    pub kv: u64,
    /// Of the buffers that the text model is computed in.
    pub compute: u64,
    /// Of the vision file.
    pub vision: u64,
    /// Of the buffers that pictures are encoded in.
    pub encoding: u64,
    /// Of pictures and their embeddings, which stay for later questions.
    pub pictures: u64,
    /// Of a trial run of the first layers.
    pub trial: u64,
}

impl Share {
    /// All of them.
    pub fn all(&self) -> u64 {
        let model = self.weights + self.kv + self.compute + self.trial;
        model + self.vision + self.encoding + self.pictures
    }
}

/// Cells of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cells {
    /// That `full` allocates.
    pub full: usize,
    /// At most while the prompt is read.
    pub prompt: usize,
    /// At most while the answer is written.
    pub decoding: usize,
}

/// Bytes of the KV cache for as many cells, on all devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KvBytes {
    /// Of the full cache.
    pub full: u64,
    /// At most while the prompt is read.
    pub prompt: u64,
    /// At most while the answer is written.
    pub decoding: u64,
}

/// What a run will take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// Main memory first, then each GPU.
    pub places: Vec<Share>,
    /// Of all of them together.
    pub bytes: u64,
    /// Whether each fits into what is free, with `margin` left; unknown memory fits.
    pub fits: bool,
    /// Bytes that stay free on each device.
    pub margin: u64,
    /// Of the cache.
    pub cells: Cells,
    /// Of the cache.
    pub kv: KvBytes,
    /// Tokens of all pictures.
    pub image_tokens: usize,
    /// What K is stored as.
    pub type_k: CacheType,
    /// What V is stored as.
    pub type_v: CacheType,
}

impl Share {
    /// Whether it fits into what is free, with `margin` left; unknown memory fits.
    fn fits(&self, margin: u64) -> bool {
        let (all, free) = (self.all(), self.place.free);
        all == 0 || free.is_none_or(|free| all.saturating_add(margin) <= free)
    }
}

impl Estimate {
    /// Whether main memory is too small.
    fn lacks_main_memory(&self) -> bool {
        let mut main = self
            .places
            .iter()
            .filter(|share| share.place.device.is_none());
        !main.all(|share| share.fits(self.margin))
    }
}

/// What the pictures of a prompt take.
#[derive(Default)]
struct Pictures {
    tokens: usize,
    /// Weights and compute buffers by device.
    parts: Vec<Footprint>,
    /// In main memory.
    kept: u64,
}

/// Estimates a run. Model and vision file are loaded to be measured ([`crate::llama::ModelOptions::measure`]).
///
/// # Errors
/// Those of [`Plan::new`] and of making a context; [`Error::Option`] for pictures without a vision file.
pub fn estimate(
    model: &Model,
    mut vision: Option<&mut Vision>,
    context: &ContextOptions,
    policy: &PolicySpec,
    work: &Work,
    margin: u64,
) -> Result<Estimate> {
    if !model.options().measure {
        return Err(Error::contract(
            "a model with memory, expected one to be measured",
        ));
    }
    let plan = Plan::new(model, vision.as_deref(), context, policy)?;
    let pictures = match vision.as_mut() {
        Some(vision) => pictures(vision, model, work)?,
        None if work.pictures.is_empty() => Pictures::default(),
        None => {
            let reason = "pictures need a vision file, give one with `mmproj`";
            return Err(Error::option("images", reason));
        }
    };
    let options = plan.context();
    let cells = cells(&plan, policy, work, pictures.tokens);
    let peak = cells.prompt.max(cells.decoding);
    let sized = |n: usize| ContextOptions {
        kv_size: options
            .kv_size
            .map(|_| u32::try_from(n).unwrap_or(u32::MAX)),
        ..options.clone()
    };
    let greedy = &SamplerOptions::GREEDY;
    let engine = LlamaEngine::new(model, sized(peak), greedy)?;
    let taken = engine.footprint();
    let trial = match plan.policy().prune_when() {
        DapMode::Exact => Vec::new(),
        when => {
            let prompt = work.n_prompt.map_or(cells.full, |n| n + pictures.tokens);
            engine.footprint_of_trial(prompt, when == DapMode::Midway)?
        }
    };
    drop(engine);
    let kv_of = |parts: &[Footprint]| parts.iter().map(|part| part.kv).sum::<u64>();
    let at_peak = kv_of(&taken);
    let full = match cells.full == peak {
        true => at_peak,
        false => kv_of(&LlamaEngine::new(model, sized(cells.full), greedy)?.footprint()),
    };
    // Where a policy evicts, every cell takes the same.
    let share = |n: usize| at_peak / peak.max(1) as u64 * n as u64;
    let places = shares(places()?, &taken, &trial, &pictures);
    Ok(Estimate {
        bytes: places.iter().map(Share::all).sum(),
        fits: places.iter().all(|share| share.fits(margin)),
        places,
        margin,
        cells,
        kv: KvBytes {
            full,
            prompt: share(cells.prompt),
            decoding: share(cells.decoding),
        },
        image_tokens: pictures.tokens,
        type_k: options.type_k,
        type_v: options.type_v,
    })
}

/// Bytes of the cache that a token takes in all layers, and those that it takes however long a text is (recurrent states, windows):
/// what contexts of two sizes would allocate. `model` was loaded to be measured.
///
/// # Errors
/// Those of [`LlamaEngine::new`]: heads that are no whole blocks, or no flash attention.
pub fn kv_of_token(model: &Model, types: CacheType) -> Result<(u64, u64)> {
    // Behind any window: what grows from here on grows for good.
    const CELLS: u32 = 1 << 17;
    let kv = |n_ctx: u32| -> Result<u64> {
        let options = ContextOptions {
            n_ctx,
            type_k: types,
            type_v: types,
            ..ContextOptions::default()
        };
        let engine = LlamaEngine::new(model, options, &SamplerOptions::GREEDY)?;
        Ok(engine.footprint().iter().map(|part| part.kv).sum())
    };
    let (some, more) = (kv(CELLS)?, kv(CELLS + 256)?);
    let token = more.saturating_sub(some) / 256;
    Ok((token, some.saturating_sub(token * u64::from(CELLS))))
}

/// The cells that a run takes at most. What a question prunes depends on it, so pruning is not counted on.
fn cells(plan: &Plan, policy: &PolicySpec, work: &Work, images: usize) -> Cells {
    let full = plan.limits().n_cells;
    if !plan.policy().evicts() {
        return Cells {
            full,
            prompt: full,
            decoding: full,
        };
    }
    let prompt = work.n_prompt.map_or(full, |n| (n + images).min(full));
    let went_in = work.n_predict.map_or(full, |n| (prompt + n).min(full));
    let decoding = match policy.options.kv_budget {
        Some(budget) => budget.of(prompt).min(went_in),
        None => went_in,
    };
    // The cache has some more cells than tokens.
    let grown = |n: usize| grown(n).min(full);
    Cells {
        full,
        prompt: grown(prompt),
        decoding: grown(decoding),
    }
}

/// Cuts up empty pictures of the sizes.
fn pictures(vision: &mut Vision, model: &Model, work: &Work) -> Result<Pictures> {
    let mut all = Pictures {
        parts: vision.footprint(None)?,
        ..Pictures::default()
    };
    all.parts.iter_mut().for_each(|part| part.compute = 0);
    let mut known: Vec<(Size, usize)> = Vec::new();
    for &size in &work.pictures {
        let (width, height, num_crops) = size;
        let rgb = 3 * u64::from(width) * u64::from(height);
        let seen = known.iter().find(|(known, _)| *known == size);
        let tokens = match seen {
            Some(&(_, tokens)) => tokens,
            None => {
                let picture = Picture {
                    width,
                    height,
                    rgb: vec![0; usize::try_from(rgb).unwrap_or(usize::MAX)],
                    num_crops,
                };
                let pieces = vision.tokenize(&[Part::Picture(&picture)], false)?;
                for piece in &pieces {
                    let Piece::Image(image) = piece else { continue };
                    let parts = vision.footprint(Some(image))?;
                    for part in parts {
                        match all.parts.iter_mut().find(|p| p.device == part.device) {
                            // The buffers grow to what the largest needs.
                            Some(known) => known.compute = known.compute.max(part.compute),
                            None => all.parts.push(part),
                        }
                    }
                    // The last encoding's output is there twice.
                    all.kept = all.kept.max(4 * (image.n * model.n_embd()) as u64);
                }
                let tokens = pieces.iter().map(Piece::len).sum();
                known.push((size, tokens));
                tokens
            }
        };
        all.tokens += tokens;
    }
    let sizes = work.pictures.iter();
    let rgb: u64 = sizes
        .map(|&(w, h, _)| 3 * u64::from(w) * u64::from(h))
        .sum();
    all.kept += rgb + 4 * (all.tokens * model.n_embd()) as u64;
    Ok(all)
}

fn shares(
    places: Vec<Place>,
    taken: &[Footprint],
    trial: &[Footprint],
    pictures: &Pictures,
) -> Vec<Share> {
    let on = |parts: &[Footprint], place: &Place| {
        let own = parts.iter().filter(|part| part.device == place.device);
        by_device(own.map(|part| Footprint {
            device: None,
            ..part.clone()
        }))
        .swap_remove(0)
    };
    let share = |place: Place| {
        let (taken, trial) = (on(taken, &place), on(trial, &place));
        let vision = on(&pictures.parts, &place);
        Share {
            weights: taken.weights,
            kv: taken.kv,
            compute: taken.compute,
            vision: vision.weights,
            encoding: vision.compute,
            pictures: if place.device.is_none() {
                pictures.kept
            } else {
                0
            },
            trial: trial.kv + trial.compute,
            place,
        }
    };
    places.into_iter().map(share).collect()
}
