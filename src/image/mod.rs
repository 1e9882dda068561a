//! Pictures from files: what the vision encoder gets to see.
//!
//! PNG, JPEG, WebP, GIF and BMP, told apart by content and not by name, become 8-bit RGB.
//! Animations give their first frame, EXIF orientation is applied, transparency is laid on
//! white; a BMP that would be transparent everywhere is opaque. Sizes are read from the header and checked before anything is decoded, so that a
//! small file cannot ask for much memory. Colour profiles are ignored, as the reference
//! preprocessing of Phi-3.5-vision ignores them.

mod decode;
pub mod hd;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

pub use decode::decode;

use crate::error::{Error, Result};

/// A decoded picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels, after the orientation was applied.
    pub width: u32,
    /// Pixels, after the orientation was applied.
    pub height: u32,
    /// Row-major `[height, width, 3]`, sRGB, 0 to 255.
    pub rgb: Vec<u8>,
    /// Crops that Phi-3.5-vision may cut the picture into; `None`: what the vision file says.
    pub num_crops: Option<u32>,
}

impl Picture {
    /// SHA-256 of the size, the crops and the pixels. Files that decode to the same picture share
    /// it, whatever their format, so it can name what was computed from the picture.
    pub fn sha256(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.width.to_le_bytes());
        hash.update(self.height.to_le_bytes());
        hash.update(self.num_crops.unwrap_or(0).to_le_bytes());
        hash.update(&self.rgb);
        hash.finalize().into()
    }
}

/// What is accepted. The defaults take every photograph that a camera makes today.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the file.
    pub file: u64,
    /// Shortest side, in pixels. A side of one pixel has no neighbours to resize between.
    pub min_side: u32,
    /// Longest side, in pixels.
    pub max_side: u32,
    /// Pixels of the whole picture.
    pub pixels: u64,
    /// Longest side over shortest side. Phi-3.5's HD transform scales the long side to a row of
    /// crops and cuts the fraction off the short one, `floor(long / aspect)`: with crops of
    /// more than 100 pixels and this limit at least one pixel row is left even in a single crop.
    pub aspect: u32,
    /// Bytes that the decoder may allocate, its output included. The RGB copy comes on top.
    pub memory: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            file: 256 << 20,
            min_side: 2,
            max_side: 65_535,
            pixels: 64 << 20,
            aspect: 100,
            // Room for the largest picture with 16-bit RGBA, and half of that for the decoder.
            memory: 768 << 20,
        }
    }
}

impl Limits {
    /// Refuses sizes that are not accepted, with the reason.
    ///
    /// # Errors
    /// What was found and what was expected.
    pub fn check_size(&self, width: u32, height: u32) -> Result<(), String> {
        let (short, long) = (width.min(height), width.max(height));
        let found = format!("is {width}x{height} pixels");
        if short < self.min_side {
            return Err(format!(
                "{found}, expected sides of at least {}",
                self.min_side
            ));
        }
        if long > self.max_side {
            return Err(format!(
                "{found}, expected sides of at most {}",
                self.max_side
            ));
        }
        if u64::from(width) * u64::from(height) > self.pixels {
            return Err(format!(
                "{found}, expected at most {} pixels in all",
                self.pixels
            ));
        }
        if u64::from(long) > u64::from(short) * u64::from(self.aspect) {
            return Err(format!(
                "{found}, expected an aspect ratio of at most {}:1",
                self.aspect
            ));
        }
        Ok(())
    }
}

/// Reads and decodes a picture file.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read, [`Error::File`] when it is a folder, larger than
/// the limits, none of the formats, or broken.
pub fn load(path: &Path, limits: &Limits) -> Result<Picture> {
    let io = |source| Error::io(path, source);
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.is_dir() {
        return Err(Error::file(path, "is a folder, expected a picture file"));
    }
    read(path, file, limits)
}

/// As [`load`], from what is open already; `path` is what messages name.
///
/// # Errors
/// As [`load`].
pub fn read(path: &Path, input: impl Read, limits: &Limits) -> Result<Picture> {
    let io = |source| Error::io(path, source);
    // One byte more than allowed shows that there is more; a pipe or a device has no size.
    let mut bytes = Vec::new();
    input
        .take(limits.file.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(io)?;
    if bytes.len() as u64 > limits.file {
        return Err(Error::file(
            path,
            format!(
                "has more than {} bytes, the limit for a picture file",
                limits.file
            ),
        ));
    }
    decode(path, &bytes, limits)
}
