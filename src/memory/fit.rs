//! What is made smaller, in which order, until a run fits (llama.cpp's `--fit` chooses in another: it makes the context
//! smaller first).

use serde::Serialize;

use super::Estimate;
use crate::error::{Error, Result};
use crate::llama::{CacheType, ContextOptions};

/// The cache grows in steps of as many cells.
const STEP: u32 = 256;

/// What may be chosen: what nobody has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// The types of the cache.
    pub types: bool,
    /// Layers on the GPU, of so many; `None`: they are said, or there is no GPU.
    pub layers: Option<u32>,
    /// Cells, down to as many; `None`: they are said.
    pub cells: Option<u32>,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// What it takes.
    #[serde(flatten)]
    pub estimate: Estimate,
    /// Cells.
    pub n_ctx: u32,
    /// Layers on the GPU; `None`: as many as llama.cpp chooses.
    pub n_gpu_layers: Option<u32>,
    /// All of the context.
    #[serde(skip)]
    pub context: ContextOptions,
}

/// What a run with these layers on the GPU and this context takes.
pub type Measure<'m> = dyn FnMut(Option<u32>, &ContextOptions) -> Result<Estimate> + 'm;

/// As asked, if that fits. Otherwise, in this order and each on top of what was before: the cache as q8_0; as many layers on the
/// GPU as fit; as many cells as fit, with as many layers. If nothing fits, the estimate says so.
///
/// # Errors
/// Those of `measure`.
pub fn choose(
    asked: (Option<u32>, &ContextOptions),
    may: Fit,
    measure: &mut Measure<'_>,
) -> Result<Choice> {
    let (layers, context) = asked;
    let mut context = context.clone();
    let mut best = chosen(layers, &context, measure(layers, &context)?);
    let small = CacheType::Q8_0;
    if !best.estimate.fits
        && may.types
        && [best.estimate.type_k, best.estimate.type_v] != [small; 2]
    {
        let quantized = ContextOptions {
            type_k: small,
            type_v: small,
            by_policy: crate::llama::ByPolicy {
                types: false,
                ..context.by_policy
            },
            ..context.clone()
        };
        match measure(layers, &quantized) {
            Ok(estimate) => {
                best = chosen(layers, &quantized, estimate);
                context = quantized;
            }
            // Heads that are no whole blocks, or no flash attention.
            Err(Error::Option { .. } | Error::Llama { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    if best.estimate.fits {
        return Ok(best);
    }
    // The most layers that fit beside the context.
    let mut with_layers = |context: &ContextOptions| match may.layers {
        Some(all) => largest(0, all, &mut |n| {
            let estimate = measure(Some(n), context)?;
            Ok(match estimate.fits {
                true => Fits::Yes(chosen(Some(n), context, estimate)),
                // What is not on the GPU is there.
                false if estimate.lacks_main_memory() => Fits::TooFew,
                false => Fits::TooMany,
            })
        }),
        None => {
            let estimate = measure(layers, context)?;
            Ok(estimate.fits.then(|| chosen(layers, context, estimate)))
        }
    };
    if may.layers.is_some()
        && let Some(choice) = with_layers(&context)?
    {
        return Ok(choice);
    }
    let full = u32::try_from(best.estimate.cells.full).unwrap_or(u32::MAX);
    if let Some(least) = may.cells.filter(|&least| least < full) {
        let (from, to) = (least.div_ceil(STEP), (full - 1) / STEP);
        let fewer = largest(from, to.max(from), &mut |steps| {
            let n_ctx = steps * STEP;
            let choice = with_layers(&ContextOptions {
                n_ctx,
                n_batch: context.n_batch.min(n_ctx),
                n_ubatch: context.n_ubatch.min(n_ctx),
                ..context.clone()
            })?;
            Ok(choice.map_or(Fits::TooMany, Fits::Yes))
        })?;
        return Ok(fewer.unwrap_or(best));
    }
    Ok(best)
}

fn chosen(n_gpu_layers: Option<u32>, context: &ContextOptions, estimate: Estimate) -> Choice {
    Choice {
        n_ctx: u32::try_from(estimate.cells.full).unwrap_or(u32::MAX),
        estimate,
        n_gpu_layers,
        context: context.clone(),
    }
}

/// Whether a number fits.
enum Fits<R> {
    Yes(R),
    TooFew,
    TooMany,
}

/// What `fits` gives for the largest number that fits: those that do lie together.
fn largest<R>(
    mut from: u32,
    mut to: u32,
    fits: &mut dyn FnMut(u32) -> Result<Fits<R>>,
) -> Result<Option<R>> {
    let mut best = None;
    while from <= to {
        let middle = from + (to - from) / 2;
        match fits(middle)? {
            Fits::Yes(found) => {
                best = Some(found);
                from = middle + 1;
            }
            Fits::TooFew => from = middle + 1,
            Fits::TooMany if middle == 0 => break,
            Fits::TooMany => to = middle - 1,
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::super::{Cells, KvBytes, Share};
    use super::*;
    use crate::llama::Place;

    /// A made-up machine: 10 layers of 10 bytes, which lie on the GPU with their cells, and cells of 2 bytes
    /// in all, 1 as q8_0. `room`: of main memory and of the GPU.
    fn measured(layers: Option<u32>, context: &ContextOptions, room: [u32; 2]) -> Estimate {
        let n = layers.unwrap_or(10).min(10);
        let small = context.type_k == CacheType::Q8_0;
        let cells = context.n_ctx * if small { 1 } else { 2 };
        let gpu = n * 10 + cells * n / 10;
        let host = (10 - n) * 10 + cells * (10 - n) / 10;
        let share = |device: Option<&str>, bytes, room: u32| Share {
            place: Place {
                device: device.map(str::to_owned),
                free: Some(room.into()),
                total: None,
            },
            weights: u64::from(bytes),
            kv: 0,
            compute: 0,
            vision: 0,
            encoding: 0,
            pictures: 0,
            trial: 0,
        };
        Estimate {
            places: vec![
                share(None, host, room[0]),
                share(Some("GPU0"), gpu, room[1]),
            ],
            bytes: u64::from(gpu + host),
            fits: host <= room[0] && gpu <= room[1],
            margin: 0,
            cells: Cells {
                full: context.n_ctx as usize,
                prompt: 0,
                decoding: 0,
            },
            kv: KvBytes {
                full: 0,
                prompt: 0,
                decoding: 0,
            },
            image_tokens: 0,
            type_k: context.type_k,
            type_v: context.type_v,
        }
    }

    fn fit(room: [u32; 2], may: Fit) -> (u32, bool, Option<u32>, bool) {
        let context = ContextOptions {
            n_ctx: 2560,
            ..ContextOptions::default()
        };
        let choice = choose((None, &context), may, &mut |layers, context| {
            Ok(measured(layers, context, room))
        });
        let choice = choice.unwrap();
        let small = choice.context.type_k == CacheType::Q8_0;
        (
            choice.n_ctx,
            small,
            choice.n_gpu_layers,
            choice.estimate.fits,
        )
    }

    #[test]
    fn the_cache_gets_smaller_before_the_gpu_has_fewer_layers_and_these_before_the_context() {
        let all = Fit {
            types: true,
            layers: Some(10),
            cells: Some(512),
        };
        assert_eq!(fit([0, 6000], all), (2560, false, None, true));
        assert_eq!(fit([0, 3000], all), (2560, true, None, true));
        assert_eq!(fit([9000, 1500], all), (2560, true, Some(5), true));
        assert_eq!(fit([9000, 0], all), (2560, true, Some(0), true));
        assert_eq!(fit([0, 1000], all), (768, true, Some(10), true));
        assert_eq!(fit([400, 1000], all), (1024, true, Some(8), true));
        assert_eq!(fit([0, 100], all), (2560, true, None, false));
        // What was said stays.
        let none = Fit {
            types: false,
            layers: None,
            cells: None,
        };
        assert_eq!(fit([0, 3000], none), (2560, false, None, false));
        let cells = Fit {
            cells: Some(512),
            ..none
        };
        assert_eq!(fit([0, 3000], cells), (1280, false, None, true));
    }

    #[test]
    fn types_that_the_model_cannot_take_are_left() {
        let context = ContextOptions::default();
        let may = Fit {
            types: true,
            layers: None,
            cells: None,
        };
        let choice = choose(
            (None, &context),
            may,
            &mut |layers, context| match context.type_k {
                CacheType::Q8_0 => Err(Error::option("type_k", "no")),
                _ => Ok(measured(layers, context, [0, 0])),
            },
        );
        assert_eq!(choice.unwrap().context.type_k, CacheType::F16);
    }
}
