//! The same tower in a vision file of llama.cpp's LLaVA, made up as well: what one crop costs in
//! llama.cpp's own graph is the measure of ours.

use std::path::Path;

use super::{Seeds, plan_vision};
use crate::convert::OutType;
use crate::convert::config::{TextConfig, VisionConfig};
use crate::convert::output::{Output, Written};
use crate::convert::vision::{self, Projector};
use crate::error::Result;
use crate::outfile::OutFile;

const NAME: &str = "llava-random";

/// Writes a vision file with `vision`'s tower for a text model of `text`'s width. Each patch is
/// projected by itself: four times the tokens of a crop of Phi-3.5-vision.
///
/// # Errors
/// As [`super::write`]. No output is left behind then.
pub fn write(vision: &VisionConfig, text: &TextConfig, seed: u64, out: &Path) -> Result<Written> {
    let mut seeds = Seeds(seed);
    let mut plan = |_: &str, shape: &[u32], name: &str, role| {
        plan_vision(shape, name, role, vision, &mut seeds)
    };
    // clip.cpp loads the last layer of a LLaVA's file and does not run it.
    let n_layer = vision.n_layer + 1;
    let mut tensors = vision::tower(vision, n_layer, &mut plan)?;
    tensors.extend(vision::projection(vision.n_embd, text, &mut plan)?);
    let kind = ("clip", "mmproj", OutType::F16.file_type());
    let mut output = Output::new(OutFile::create(out)?, kind, NAME, tensors)?;
    let projector = Projector {
        name: "mlp",
        n_layer,
        sizes: &[],
    };
    projector.metadata(&mut output.writer, vision, text)?;
    let (file, written) = output.write(&mut |_| ())?;
    file.commit()?;
    Ok(written)
}
