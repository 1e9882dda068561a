//! Pictures of many shapes, cut into as many crops as the caller says.

use hae::Error;
use hae::generate::Segment;
use hae::image::{self, Picture};
use hae::llama::{Part, Piece, Vision};
use hae::turn::segment;

use crate::bin::{answer, refusal};
use crate::fixture::json;
use crate::model::{PICTURE, converted, converted_of, load, load_vision, repository};
use crate::npz::{golden, read};
use crate::parity::relative_error;

/// The numpy and Pillow port of the processor, on shapes that no drawn picture has.
#[test]
fn pictures_of_other_shapes_are_the_ports() {
    let (text, vision) = converted("f32");
    let model = load(text);
    let mut vision = load_vision(vision, &model);
    let index = json(&golden("hd/index.json"));
    let pictures = index["pictures"].as_array().unwrap();
    assert_eq!(pictures.len(), 5);
    for row in pictures {
        let name = row["image"].as_str().unwrap();
        let path = golden(&format!("hd/{name}"));
        let picture = image::load(&path, &image::Limits::default()).unwrap();
        let pieces = vision.tokenize(&[Part::Picture(&picture)], true);
        let tokens = pieces.unwrap().into_iter().find_map(|piece| match piece {
            Piece::Image(tokens) => Some(tokens),
            Piece::Text(_) => None,
        });
        let tokens = tokens.unwrap();
        assert_eq!(tokens.n as u64, row["tokens"].as_u64().unwrap(), "{name}");
        let encoded = segment(vision.encode(&tokens).unwrap(), 0);
        let Segment::Image { embeddings, .. } = encoded else {
            panic!("{encoded:?}")
        };
        let expected = read(&format!("hd/{}", row["embeddings"].as_str().unwrap()));
        let expected = expected.values().next().unwrap();
        let error = relative_error(&embeddings, &expected.data);
        println!("{name}: {error:.1e}");
        assert!(error < 2e-3, "{name}: {error}");
    }
}

/// Visual tokens of a blank picture: 6 x 6 merged patches a crop, a line end behind every row of
/// the grid and of the global view, and one separator.
fn tokens(vision: &Vision, size: (u32, u32), num_crops: Option<u32>) -> hae::Result<usize> {
    let (width, height) = size;
    let picture = Picture {
        width,
        height,
        rgb: vec![255; (width * height * 3) as usize],
        num_crops,
    };
    let pieces = vision.tokenize(&[Part::Picture(&picture)], false)?;
    Ok(pieces.iter().map(Piece::len).sum())
}

#[test]
fn every_picture_has_its_own_number_of_crops() {
    let (text, vision) = converted_of("small-phi3v", "f16");
    let model = load(text);
    let vision = load_vision(vision, &model);
    let expected = |rows: usize, cols: usize| (rows * cols + 1) * 36 + 1 + (rows + 1) * 6;
    for (size, num_crops, rows, cols) in [
        ((336, 336), None, 2, 2),
        ((336, 336), Some(1), 1, 1),
        ((336, 336), Some(4), 2, 2),
        ((336, 336), Some(8), 2, 2),
        ((336, 336), Some(9), 3, 3),
        ((336, 336), Some(64), 8, 8),
        ((504, 336), Some(6), 2, 3),
        ((336, 504), Some(6), 3, 2),
        ((336, 504), None, 2, 2),
        ((500, 100), Some(16), 2, 8),
    ] {
        let n = tokens(&vision, size, num_crops).unwrap();
        assert_eq!(n, expected(rows, cols), "{size:?} {num_crops:?}");
    }
    for n in [0, 65, u32::MAX] {
        let error = tokens(&vision, (336, 336), Some(n)).unwrap_err();
        assert!(matches!(error, Error::Option { .. }), "{error}");
        let text = format!("`num_crops`: {n}, expected 1 to 64");
        assert_eq!(error.to_string(), text);
    }
    // Nothing stays behind from one picture to the next.
    assert_eq!(tokens(&vision, (336, 336), None).unwrap(), expected(2, 2));
}

#[test]
fn the_program_passes_the_number_on() {
    let picture = repository(PICTURE);
    let images = |more: &[&str]| {
        let args = ["run", "-p", "hi", "-n", "1", "--temp", "0", "-o", "json"];
        let picture = ["--image", picture.to_str().unwrap()];
        let args = [&args[..], &picture, &picture, more].concat();
        let report: serde_json::Value = serde_json::from_str(&answer(&args)).unwrap();
        report["tokens"]["images"].clone()
    };
    assert_eq!(images(&[]), serde_json::json!([199, 199]));
    assert_eq!(images(&["--num-crops", "1"]), serde_json::json!([85, 85]));
    let more = images(&["--num-crops", "9", "--kv-policy", "hae"]);
    assert_eq!(more, serde_json::json!([385, 385]));
    // More than the cache holds, and said before anything is encoded.
    let picture = picture.to_str().unwrap();
    let args = ["run", "-p", "hi", "--num-crops", "64", "-c", "1024"];
    let line = refusal(&[&args[..], &["--image", picture]].concat());
    assert!(line.contains("but the context holds 1024"), "{line}");
}

fn text_of(value: &serde_json::Value) -> &str {
    value.as_str().unwrap()
}

/// Wide, tall, padded and large pictures, as PyTorch answers them.
#[test]
fn the_program_answers_about_pictures_of_up_to_16_crops() {
    let index = json(&golden("small-phi3v/index.json"));
    let prompts = index["prompts"].as_array().unwrap();
    let large = prompts.iter().filter(|row| row["num_crops"] != 4);
    let mut seen = Vec::new();
    for row in large {
        let text = |key: &str| text_of(&row[key]);
        let num_crops = row["num_crops"].to_string();
        let name = format!("small-phi3v/{}", text_of(&row["images"][0]));
        let picture = golden(&name);
        let image = ["run", "--image", picture.to_str().unwrap()];
        let prompt = ["--no-conversation", "-p", text("prompt"), "--temp", "0"];
        let crops = ["--num-crops", &num_crops];
        let answer = answer(&[&image[..], &crops, &prompt].concat());
        assert_eq!(answer.trim(), text("greedy_text"), "{}", text("id"));
        seen.push(row["num_crops"].as_u64().unwrap());
    }
    assert_eq!(seen, [6, 6, 9, 16]);
}
