//! From the bytes of a file to RGB.

use std::io::Cursor;
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};

use super::{Limits, Picture};
use crate::error::{Error, Result};
use crate::guard::guarded;

const FORMATS: [ImageFormat; 5] = [
    ImageFormat::Png,
    ImageFormat::Jpeg,
    ImageFormat::WebP,
    ImageFormat::Gif,
    ImageFormat::Bmp,
];

/// Decodes a picture that is in memory; `path` is what messages name.
///
/// # Errors
/// [`Error::File`] when the bytes are none of the formats, break a limit, or are broken.
pub fn decode(path: &Path, bytes: &[u8], limits: &Limits) -> Result<Picture> {
    decode_bytes(bytes, limits).map_err(|reason| Error::file(path, reason))
}

/// As [`decode`]; the error is the reason alone.
fn decode_bytes(bytes: &[u8], limits: &Limits) -> Result<Picture, String> {
    if bytes.is_empty() {
        return Err("is empty, expected a picture".into());
    }
    let format = image::guess_format(bytes)
        .ok()
        .filter(|f| FORMATS.contains(f));
    let format =
        format.ok_or("is no picture that can be read, expected PNG, JPEG, WebP, GIF or BMP")?;
    // These two decoders would fill what is missing with something.
    let whole = match format {
        ImageFormat::Jpeg => jpeg_ends(bytes),
        ImageFormat::WebP => webp_is_whole(bytes),
        _ => true,
    };
    if !whole {
        return Err(format!("broken {}: the file is cut off", name(format)));
    }
    // zune-jpeg panics at some damage.
    guarded(|| pixels(bytes, format, limits))
        .unwrap_or_else(|| Err(format!("broken {}", name(format))))
}

fn pixels(bytes: &[u8], format: ImageFormat, limits: &Limits) -> Result<Picture, String> {
    let broken = |e: ImageError| describe(format, &e, limits);
    let mut memory = image::Limits::no_limits();
    memory.max_alloc = Some(limits.memory);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(memory.clone());
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    limits.check_size(width, height)?;
    memory.reserve(decoder.total_bytes()).map_err(broken)?;
    decoder.set_limits(memory).map_err(broken)?;

    let orientation = orientation(&mut decoder);
    let mut image = DynamicImage::from_decoder(decoder).map_err(broken)?;
    if format == ImageFormat::Bmp {
        image = without_empty_alpha(image);
    }
    image.apply_orientation(orientation);
    let (width, height) = (image.width(), image.height());
    Ok(Picture {
        width,
        height,
        rgb: on_white(image),
        num_crops: None,
    })
}

/// As the EXIF block says, before which many writers of WebP put JPEG's mark of one. A broken block is no
/// reason to refuse the pixels.
fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    let exif = decoder.exif_metadata().ok().flatten().unwrap_or_default();
    let block = exif.strip_prefix(b"Exif\0\0".as_slice()).unwrap_or(&exif);
    Orientation::from_exif_chunk(block).unwrap_or(Orientation::NoTransforms)
}

fn name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Png => "PNG",
        ImageFormat::Jpeg => "JPEG",
        ImageFormat::WebP => "WebP",
        ImageFormat::Gif => "GIF",
        _ => "BMP",
    }
}

fn describe(format: ImageFormat, error: &ImageError, limits: &Limits) -> String {
    let format = name(format);
    if matches!(error, ImageError::Limits(_)) {
        return format!("{format} needs more than {} bytes to decode", limits.memory);
    }
    // Messages of decoders may run over several lines.
    let text = error.to_string();
    let text: Vec<&str> = text.split_whitespace().collect();
    format!("broken {format}: {}", text.join(" "))
}

/// Clipboards and Photoshop write BMPs whose header has an alpha that is 0 everywhere. Windows,
/// Photoshop, llama.cpp and the reference's Pillow all show what is in them.
fn without_empty_alpha(image: DynamicImage) -> DynamicImage {
    let empty = |rgba: &image::RgbaImage| rgba.pixels().all(|pixel| pixel[3] == 0);
    match image.as_rgba8().is_some_and(empty) {
        true => image.into_rgb8().into(),
        false => image,
    }
}

/// 8-bit RGB, transparency laid on white. Grey, palettes and 16 bits a channel included.
fn on_white(image: DynamicImage) -> Vec<u8> {
    if !image.color().has_alpha() {
        return image.into_rgb8().into_raw();
    }
    let rgba = image.into_rgba8().into_raw();
    let mut rgb = Vec::with_capacity(rgba.len() / 4 * 3);
    for pixel in rgba.chunks_exact(4) {
        let alpha = u32::from(pixel[3]);
        rgb.extend(pixel[..3].iter().map(|&c| {
            // At most 255, because the weights add up to 255.
            ((u32::from(c) * alpha + 255 * (255 - alpha) + 127) / 255) as u8
        }));
    }
    rgb
}

/// Whether a JPEG has an end marker behind its first scan. Segments before the scan are skipped
/// by their lengths, because an embedded thumbnail has an end marker of its own; within a scan
/// the byte 0xff is never followed by 0xd9 unless it is the marker.
fn jpeg_ends(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xda;
    let mut at = 2;
    while let [0xff, marker, rest @ ..] = bytes.get(at..).unwrap_or_default() {
        match (marker, rest) {
            // Fill bytes, and markers without a segment.
            (0xff, _) => at += 1,
            (0x01 | 0xd0..=0xd7, _) => at += 2,
            (&START_OF_SCAN, _) => return rest.windows(2).any(|w| w == [0xff, 0xd9]),
            (_, [high, low, ..]) => at += 2 + usize::from(u16::from_be_bytes([*high, *low])),
            _ => return false,
        }
    }
    // Stray bytes between segments: leave the verdict to the decoder.
    at < bytes.len()
}

/// Whether a WebP has as many bytes as its RIFF header says, behind that header's eight.
fn webp_is_whole(bytes: &[u8]) -> bool {
    let Some(size) = bytes.get(4..8) else {
        return false;
    };
    let size = u32::from_le_bytes([size[0], size[1], size[2], size[3]]);
    bytes.len() as u64 >= u64::from(size) + 8
}
