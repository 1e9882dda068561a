//! Pictures: formats, orientation, transparency, limits, and files that are broken.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use hae::image::{Limits, Picture, decode, load};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};

const FORMATS: [ImageFormat; 5] = [
    ImageFormat::Png,
    ImageFormat::Jpeg,
    ImageFormat::WebP,
    ImageFormat::Gif,
    ImageFormat::Bmp,
];

/// What the files of tests/data show: two halves.
const LEFT: [u8; 3] = [200, 40, 40];
const RIGHT: [u8; 3] = [40, 40, 200];

fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn read(bytes: &[u8]) -> Picture {
    decode(Path::new("x"), bytes, &Limits::default()).unwrap()
}

fn refusal(bytes: &[u8]) -> String {
    let error = decode(Path::new("dir/x.png"), bytes, &Limits::default())
        .unwrap_err()
        .to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.starts_with("dir/x.png: "), "{error}");
    error
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn pixel(picture: &Picture, x: u32, y: u32) -> [u8; 3] {
    let at = (y as usize * picture.width as usize + x as usize) * 3;
    picture.rgb[at..at + 3].try_into().unwrap()
}

fn near(a: [u8; 3], b: [u8; 3]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.abs_diff(b) <= 6)
}

/// Every pixel differs from its neighbours, so a shifted or swapped row shows.
fn gradient(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        Rgb([(x * 7) as u8, (y * 11) as u8, (x + y) as u8])
    })
}

#[test]
fn lossless_formats_give_back_every_pixel() {
    let image = gradient(31, 17);
    for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp] {
        let picture = read(&encode(image.clone(), format));
        assert_eq!((picture.width, picture.height), (31, 17), "{format:?}");
        assert_eq!(picture.rgb, *image.as_raw(), "{format:?}");
    }
}

#[test]
fn lossy_and_palette_formats_come_close() {
    let image = RgbImage::from_fn(32, 16, |x, _| Rgb(if x < 16 { LEFT } else { RIGHT }));
    let written = [ImageFormat::Jpeg, ImageFormat::Gif].map(|f| encode(image.clone(), f));
    let others =
        ["lossy.webp", "animated.webp", "progressive.jpg"].map(|f| fs::read(data(f)).unwrap());
    for (n, bytes) in written.iter().chain(&others).enumerate() {
        let picture = read(bytes);
        assert_eq!((picture.width, picture.height), (32, 16), "{n}");
        assert!(
            near(pixel(&picture, 4, 8), LEFT),
            "{n}: {:?}",
            pixel(&picture, 4, 8)
        );
        assert!(
            near(pixel(&picture, 27, 8), RIGHT),
            "{n}: {:?}",
            pixel(&picture, 27, 8)
        );
    }
    // Print colours have no exact counterpart; the halves must still be told apart.
    let cmyk = read(&fs::read(data("cmyk.jpg")).unwrap());
    let [r, _, b] = pixel(&cmyk, 4, 8);
    assert!(r > b.saturating_add(80), "{r} {b}");
}

#[test]
fn the_first_frame_of_an_animation_counts() {
    use image::codecs::gif::GifEncoder;
    let mut bytes = Vec::new();
    let frame = |color| image::Frame::new(RgbaImage::from_pixel(8, 8, Rgba(color)));
    let mut encoder = GifEncoder::new(&mut bytes);
    encoder.encode_frame(frame([255, 0, 0, 255])).unwrap();
    encoder.encode_frame(frame([0, 255, 0, 255])).unwrap();
    drop(encoder);
    assert_eq!(pixel(&read(&bytes), 3, 3), [255, 0, 0]);
}

#[test]
fn orientation_is_applied() {
    // Turned clockwise the left half comes to lie on top.
    for name in ["turned.jpg", "turned.webp"] {
        let picture = load(&data(name), &Limits::default()).unwrap();
        assert_eq!((picture.width, picture.height), (16, 32), "{name}");
        assert!(near(pixel(&picture, 8, 4), LEFT), "{name}");
        assert!(near(pixel(&picture, 8, 27), RIGHT), "{name}");
    }

    // All eight, with an EXIF block written by hand, on a picture whose four corners differ.
    // By the EXIF standard the value says where the stored corners belong: this is the corner
    // that the stored top left pixel comes to, and whether the sides are swapped.
    let corners = [
        (1, (0, 0)),
        (2, (1, 0)),
        (3, (1, 1)),
        (4, (0, 1)),
        (5, (0, 0)),
        (6, (1, 0)),
        (7, (1, 1)),
        (8, (0, 1)),
    ];
    let mut image = RgbImage::from_pixel(32, 16, Rgb([255, 255, 255]));
    for (x, y, _) in gradient(8, 8).enumerate_pixels() {
        image.put_pixel(x, y, Rgb([0, 0, 0]));
    }
    let jpeg = encode(image, ImageFormat::Jpeg);
    for (value, (right, bottom)) in corners {
        let picture = read(&with_orientation(&jpeg, value));
        let (w, h) = (picture.width, picture.height);
        assert_eq!(
            (w, h),
            if value < 5 { (32, 16) } else { (16, 32) },
            "{value}"
        );
        let black: Vec<(u32, u32)> = [(0, 0), (1, 0), (0, 1), (1, 1)]
            .into_iter()
            .filter(|&(x, y)| near(pixel(&picture, 3 + x * (w - 7), 3 + y * (h - 7)), [0; 3]))
            .collect();
        assert_eq!(black, [(right, bottom)], "{value}");
    }
    // A value outside the standard changes nothing.
    assert_eq!(read(&with_orientation(&jpeg, 9)), read(&jpeg));
}

/// Puts an APP1 segment behind the start marker: a big-endian TIFF header with one entry.
fn with_orientation(jpeg: &[u8], value: u8) -> Vec<u8> {
    let mut exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([value, 0, 0, 0, 0, 0, 0]);
    let mut bytes = jpeg[..2].to_vec();
    bytes.extend([0xff, 0xe1]);
    bytes.extend(u16::try_from(exif.len() + 2).unwrap().to_be_bytes());
    bytes.extend(exif);
    bytes.extend(&jpeg[2..]);
    bytes
}

#[test]
fn transparency_is_laid_on_white() {
    let image = RgbaImage::from_fn(4, 2, |x, _| {
        Rgba([100, 0, 255, [0, 51, 128, 255][x as usize]])
    });
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        let picture = read(&encode(image.clone(), format));
        assert_eq!(pixel(&picture, 0, 0), [255, 255, 255]);
        // 100 * 0.2 + 255 * 0.8 = 224, 255 * 0.8 = 204
        assert_eq!(pixel(&picture, 1, 1), [224, 204, 255]);
        // With alpha 128 / 255: 177.2 and 127.0
        assert_eq!(pixel(&picture, 2, 0), [177, 127, 255]);
        assert_eq!(pixel(&picture, 3, 1), [100, 0, 255]);
    }
    let gray = image::GrayAlphaImage::from_pixel(4, 2, image::LumaA([0, 51]));
    assert_eq!(
        pixel(&read(&encode(gray, ImageFormat::Png)), 1, 1),
        [204; 3]
    );
    let gif = RgbaImage::from_fn(4, 2, |x, _| {
        if x < 2 {
            Rgba([0, 0, 0, 0])
        } else {
            Rgba([10, 20, 30, 255])
        }
    });
    let gif = read(&encode(gif, ImageFormat::Gif));
    assert_eq!(
        (pixel(&gif, 0, 0), pixel(&gif, 3, 1)),
        ([255; 3], [10, 20, 30])
    );
}

/// A BMP of two pixels, `LEFT` and `RIGHT`, whose header of this many bytes names masks; `alpha` is
/// that of both.
fn bmp_with_masks(header: u32, bits: u16, alpha: bool) -> Vec<u8> {
    // Red, green, blue, alpha.
    let masks: [u32; 4] = match bits {
        16 => [0x7c00, 0x03e0, 0x001f, 0x8000],
        _ => [0xff_0000, 0xff00, 0xff, 0xff00_0000],
    };
    let pixel = |rgb: [u8; 3]| {
        let channels = rgb.iter().zip(masks).map(|(&value, mask)| {
            let width = mask.count_ones();
            (u32::from(value) >> (8 - width)) << mask.trailing_zeros()
        });
        channels.sum::<u32>() | if alpha { masks[3] } else { 0 }
    };
    let data: Vec<u8> = [LEFT, RIGHT, LEFT, RIGHT]
        .into_iter()
        .flat_map(|rgb| pixel(rgb).to_le_bytes()[..usize::from(bits / 8)].to_vec())
        .collect();
    let offset = 14 + header;
    let mut bytes = b"BM".to_vec();
    bytes.extend((offset + data.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(offset.to_le_bytes());
    // Width, height, planes, bits, BI_BITFIELDS, size, resolution, colours.
    for field in [
        header,
        2,
        2,
        1 | u32::from(bits) << 16,
        3,
        data.len() as u32,
        0,
        0,
        0,
        0,
    ] {
        bytes.extend(field.to_le_bytes());
    }
    masks
        .iter()
        .for_each(|mask| bytes.extend(mask.to_le_bytes()));
    bytes.resize(offset as usize, 0);
    bytes.extend(data);
    bytes
}

/// Clipboards and Photoshop write such files, and every other program shows them.
#[test]
fn a_bmp_whose_alpha_is_0_everywhere_is_opaque() {
    for header in [56, 108, 124] {
        for bits in [16, 32] {
            let empty = read(&bmp_with_masks(header, bits, false));
            let full = read(&bmp_with_masks(header, bits, true));
            assert_eq!(empty, full, "{header} {bits}");
            let [left, right] = [0, 1].map(|x| pixel(&empty, x, 0));
            assert!(
                near(left, LEFT) && near(right, RIGHT),
                "{header} {bits}: {empty:?}"
            );
        }
    }
    // One pixel that is not transparent makes it an alpha.
    let mut mixed = bmp_with_masks(124, 32, false);
    *mixed.last_mut().unwrap() = 255;
    let mixed = read(&mixed);
    assert_eq!(pixel(&mixed, 0, 0), [255; 3]);
    assert_eq!(pixel(&mixed, 1, 0), RIGHT);
}

/// A full-page screenshot.
#[test]
fn long_pictures_are_taken() {
    let image = RgbImage::from_pixel(400, 20_000, Rgb(LEFT));
    let picture = read(&encode(image, ImageFormat::Png));
    assert_eq!((picture.width, picture.height), (400, 20_000));
}

#[test]
fn grey_and_16_bit_pictures_become_8_bit_rgb() {
    use image::{ImageBuffer, Luma, LumaA};
    let l8 = image::GrayImage::from_pixel(2, 2, Luma([77]));
    assert_eq!(read(&encode(l8, ImageFormat::Png)).rgb, [77; 12]);
    let l16 = ImageBuffer::from_pixel(2, 2, Luma([0x8080u16]));
    assert_eq!(
        read(&encode(DynamicImage::ImageLuma16(l16), ImageFormat::Png)).rgb,
        [0x80; 12]
    );
    let la16 = ImageBuffer::from_pixel(2, 2, LumaA([0xffffu16, 0]));
    assert_eq!(
        read(&encode(DynamicImage::ImageLumaA16(la16), ImageFormat::Png)).rgb,
        [255; 12]
    );
    let rgba16 = ImageBuffer::from_pixel(2, 2, Rgba([0u16, 0x8080, 0xffff, 0xffff]));
    let picture = read(&encode(DynamicImage::ImageRgba16(rgba16), ImageFormat::Png));
    assert_eq!(pixel(&picture, 1, 1), [0, 0x80, 255]);
}

#[test]
fn sizes_that_cannot_be_used_are_refused() {
    for (width, height, expected) in [
        (1, 1, "is 1x1 pixels, expected sides of at least 2"),
        (1, 5000, "is 1x5000 pixels, expected sides of at least 2"),
        (
            5000,
            2,
            "is 5000x2 pixels, expected an aspect ratio of at most 100:1",
        ),
        (
            65_536,
            700,
            "is 65536x700 pixels, expected sides of at most 65535",
        ),
    ] {
        let bytes = encode(image::GrayImage::new(width, height), ImageFormat::Png);
        assert_eq!(refusal(&bytes), format!("dir/x.png: {expected}"));
    }
    assert_eq!(read(&encode(gradient(200, 2), ImageFormat::Png)).width, 200);
}

#[test]
fn a_decompression_bomb_is_refused_by_its_header() {
    // The header is all that these files have: decoding them could only fail otherwise.
    let mut png = encode(gradient(2, 2), ImageFormat::Png);
    png[16..24].copy_from_slice(&[0, 0, 0x40, 0, 0, 0, 0x40, 0]);
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    assert_eq!(
        refusal(&png),
        "dir/x.png: is 16384x16384 pixels, expected at most 67108864 pixels in all"
    );

    let mut gif = encode(gradient(2, 2), ImageFormat::Gif);
    gif[6..10].copy_from_slice(&[0xff; 4]);
    assert_eq!(
        refusal(&gif),
        "dir/x.png: is 65535x65535 pixels, expected at most 67108864 pixels in all"
    );

    let mut bmp = encode(gradient(2, 2), ImageFormat::Bmp);
    bmp[18..26].copy_from_slice(&[0, 0x20, 0, 0, 0, 0x40, 0, 0]);
    assert!(
        refusal(&bmp).contains("is 8192x16384 pixels, expected at most"),
        "{}",
        refusal(&bmp)
    );
}

#[test]
fn memory_and_file_size_are_limited() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    fs::write(&path, encode(gradient(64, 64), ImageFormat::Png)).unwrap();
    let name = path.display();
    let limits = Limits {
        memory: 4096,
        ..Limits::default()
    };
    let error = load(&path, &limits).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("{name}: PNG needs more than 4096 bytes to decode")
    );
    let limits = Limits {
        file: 100,
        ..Limits::default()
    };
    let error = load(&path, &limits).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("{name}: has more than 100 bytes, the limit for a picture file")
    );
    let size = fs::metadata(&path).unwrap().len();
    assert!(
        load(
            &path,
            &Limits {
                file: size,
                ..Limits::default()
            }
        )
        .is_ok()
    );
}

#[test]
fn files_are_judged_by_content_and_named_in_errors() {
    let dir = tempfile::tempdir().unwrap();
    let jpeg_that_is_png = dir.path().join("a.jpg");
    fs::write(&jpeg_that_is_png, encode(gradient(4, 4), ImageFormat::Png)).unwrap();
    assert!(load(&jpeg_that_is_png, &Limits::default()).is_ok());

    let refusal = |name: &str, bytes: Option<&[u8]>| {
        let path = dir.path().join(name);
        if let Some(bytes) = bytes {
            fs::write(&path, bytes).unwrap();
        }
        let error = load(&path, &Limits::default()).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 1);
        error
            .strip_prefix(&format!("{}: ", path.display()))
            .unwrap()
            .to_owned()
    };
    let none = "is no picture that can be read, expected PNG, JPEG, WebP, GIF or BMP";
    assert_eq!(refusal("b.jpg", Some(b"not a picture at all")), none);
    assert_eq!(refusal("c.png", Some(b"GGUF\x03\0\0\0")), none);
    assert_eq!(refusal("d.tiff", Some(b"II*\0\x08\0\0\0\0\0")), none);
    assert_eq!(refusal("e.png", Some(b"")), "is empty, expected a picture");
    assert_eq!(refusal("", None), "is a folder, expected a picture file");
    assert!(refusal("missing.png", None).contains("No such file") || cfg!(windows));
}

#[test]
fn a_cut_file_is_an_error_or_lost_nothing() {
    let mut whole: Vec<(String, Vec<u8>)> = FORMATS
        .iter()
        .map(|f| (format!("{f:?}"), encode(gradient(24, 20), *f)))
        .collect();
    for name in [
        "lossy.webp",
        "animated.webp",
        "progressive.jpg",
        "turned.jpg",
        "cmyk.jpg",
    ] {
        whole.push((name.into(), fs::read(data(name)).unwrap()));
    }
    for (name, bytes) in whole {
        let picture = read(&bytes);
        let mut accepted = 0;
        for cut in 0..bytes.len() {
            match decode(Path::new("x"), &bytes[..cut], &Limits::default()) {
                Ok(cut_picture) => {
                    assert!(
                        cut_picture == picture,
                        "{name}: cut at {cut} of {}",
                        bytes.len()
                    );
                    accepted += 1;
                }
                Err(e) => assert_eq!(e.to_string().lines().count(), 1, "{name}: {e}"),
            }
        }
        // Only trailers may be missing.
        assert!(accepted <= 24, "{name}: {accepted} cuts were accepted");
    }
}

#[test]
fn flipped_bits_never_panic() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |n: usize| {
        // xorshift64: the same files in every run.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % n as u64).unwrap()
    };
    // A flipped size must not make the test slow.
    let limits = Limits {
        pixels: 1 << 20,
        memory: 16 << 20,
        ..Limits::default()
    };
    let mut whole: Vec<Vec<u8>> = FORMATS
        .iter()
        .map(|f| encode(gradient(24, 20), *f))
        .collect();
    for name in [
        "lossy.webp",
        "animated.webp",
        "progressive.jpg",
        "turned.jpg",
        "cmyk.jpg",
    ] {
        whole.push(fs::read(data(name)).unwrap());
    }
    for bytes in whole {
        for _ in 0..400 {
            let mut bytes = bytes.clone();
            for _ in 0..=random(4) {
                let at = random(bytes.len());
                bytes[at] ^= 1 << random(8);
            }
            if let Err(e) = decode(Path::new("x"), &bytes, &limits) {
                assert_eq!(e.to_string().lines().count(), 1, "{e}");
            }
        }
    }
}

/// Fuzzing found that zune-jpeg panics at this one, where the processor has AVX2.
#[test]
fn a_reader_that_gives_up_is_a_broken_file() {
    let find = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/picture/found.jpg");
    let error = match load(&find, &Limits::default()) {
        Err(error) => error.to_string(),
        Ok(_) => return,
    };
    assert!(error.contains("found.jpg: broken JPEG"), "{error}");
}

#[test]
fn the_hash_is_of_the_picture_not_of_the_file() {
    let image = gradient(12, 10);
    let png = read(&encode(image.clone(), ImageFormat::Png));
    assert_eq!(
        png.sha256(),
        read(&encode(image, ImageFormat::Bmp)).sha256()
    );
    let mut other = png.clone();
    other.rgb[5] ^= 1;
    assert_ne!(png.sha256(), other.sha256());
    let turned = Picture {
        width: png.height,
        height: png.width,
        rgb: png.rgb.clone(),
        num_crops: None,
    };
    assert_ne!(png.sha256(), turned.sha256());
    let mut cut = png.clone();
    cut.num_crops = Some(4);
    assert_ne!(png.sha256(), cut.sha256());
}

/// CRC-32 as PNG uses it, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
