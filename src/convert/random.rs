//! A model with the shapes of Phi-3.5-vision and made-up weights, in both GGUFs: for measuring
//! speed and memory, which depend on shapes and types alone, where the real weights are not.
//!
//! It says nothing of sense. But what it computes is as large as in a trained model: every matrix
//! keeps the variance of what it is multiplied with, and those that add to the residual stream are
//! scaled down by the number of them, so that logits are finite and differ.

mod llava;
mod mix;
mod shapes;
mod vocabulary;

use std::path::PathBuf;

use super::config::{TextConfig, VisionConfig};
use super::output::{Model, Summary};
use super::tensors::{Planned, Role};
use super::{OutType, text, vision};
use crate::error::{Error, Result};
use crate::llama::gguf::TensorType;
use crate::outfile::FilesInUse;

pub use super::blocks::Blocks;
pub use llava::write as write_llava;
pub use mix::Mix;
pub use shapes::{phi35_text, phi35_vision};

/// `general.name` of both files; llama.cpp's tokenizer has rules for models called so.
const NAME: &str = "Phi-3.5-vision-random";

/// What to make up, and where it goes.
#[derive(Clone, Debug)]
pub struct Options {
    /// [`phi35_text`], or something smaller. llama.cpp's K types need rows of 256 values.
    pub text: TextConfig,
    /// [`phi35_vision`], or something smaller.
    pub vision: VisionConfig,
    /// Types of the text model's tensors.
    pub mix: Mix,
    /// The same seed gives the same bytes.
    pub seed: u64,
    /// Where the text model goes.
    pub text_out: PathBuf,
    /// Where the vision file goes.
    pub mmproj_out: PathBuf,
}

/// Writes both files. `progress` is told the bytes written so far and in all.
///
/// # Errors
/// [`Error::Option`] for shapes that cannot be, [`Error::File`] or [`Error::Io`] for files that
/// cannot. No output is left behind then.
pub fn write(options: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Summary> {
    let Options { text, vision, .. } = options;
    let mut seeds = Seeds(options.seed);
    // Additions to the residual stream: one by attention and one by the MLP of every layer.
    let text_tensors = text::tensors(text, &mut |_, shape, name, role| {
        let kind = match role {
            Role::Matrix => options.mix.kind(name, text.n_layer),
            _ => TensorType::F32,
        };
        plan(shape, name, role, kind, 2 * text.n_layer, seeds.next())
    })?;
    let vision_tensors = vision::tensors(vision, text, &mut |_, shape, name, role| {
        plan_vision(shape, name, role, vision, &mut seeds)
    })?;
    let model = Model {
        name: NAME.to_owned(),
        text: text.clone(),
        vision: vision.clone(),
        vocabulary: vocabulary::made_up(text.n_vocab)?,
        text_type: options.mix.file_type(),
        text_tensors,
        vision_type: OutType::F16.file_type(),
        vision_tensors,
    };
    let read = FilesInUse::default();
    model.write(&options.text_out, &options.mmproj_out, read, progress)
}

/// A seed for each tensor.
struct Seeds(u64);

impl Seeds {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1 << 32);
        self.0
    }
}

/// A tensor of a vision file, which is F16 but for vectors.
fn plan_vision(
    shape: &[u32],
    name: &str,
    role: Role,
    config: &VisionConfig,
    seeds: &mut Seeds,
) -> Result<Planned<'static>> {
    let kind = match role {
        Role::Matrix | Role::Kernel => TensorType::F16,
        _ => TensorType::F32,
    };
    plan(shape, name, role, kind, 2 * config.n_layer, seeds.next())
}

fn plan(
    shape: &[u32],
    name: &str,
    role: Role,
    kind: TensorType,
    additions: u32,
    seed: u64,
) -> Result<Planned<'static>> {
    let dims: Vec<u64> = shape.iter().rev().map(|&n| n.into()).collect();
    if dims.contains(&0) {
        return Err(Error::option(
            "shapes",
            format!("{name} has shape {shape:?}"),
        ));
    }
    // A norm scales by 1, and nothing is shifted.
    let constant = match (role, name.rsplit('.').next()) {
        (Role::Vector, Some("weight")) => Some(1.0),
        (Role::Vector, Some("bias")) => Some(0.0),
        _ => None,
    };
    if let Some(value) = constant {
        return Ok(Planned::values(name, vec![value; shape[0] as usize]));
    }
    let inputs: u64 = dims[..dims.len() - 1].iter().product();
    let deviation = deviation(name, role, inputs, additions);
    let blocks = Blocks { deviation, seed };
    Ok(Planned::random(name, kind, dims, blocks))
}

/// The standard deviation of a tensor's values; `inputs`: of each of its sums.
fn deviation(name: &str, role: Role, inputs: u64, additions: u32) -> f32 {
    let keeps = 1.0 / (inputs as f32).sqrt();
    let part = |name_part: &str| name.contains(name_part);
    match role {
        Role::Vector | Role::Positions => 1.0,
        _ if part("token_embd") => 1.0,
        // Logits with a deviation of about 2: clear favourites, but no certainty.
        _ if name == "output.weight" => 2.0 * keeps,
        _ if part("attn_out") || part("ffn_down") => keeps / (additions as f32).sqrt(),
        _ => keeps,
    }
}
