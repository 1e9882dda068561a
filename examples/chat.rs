//! Asks a model about a picture, and asks again: `cargo run --release --example chat -- MODEL.gguf MMPROJ.gguf
//! PICTURE QUESTION...`

use std::path::Path;

use hae::image::{Limits, load};
use hae::llama::{ModelOptions, VisionOptions};
use hae::{Chat, Error, Model, PolicySpec, Vision};

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, mmproj, picture, questions @ ..] = &args[..] else {
        eprintln!("usage: chat MODEL.gguf MMPROJ.gguf PICTURE QUESTION...");
        std::process::exit(2);
    };
    let model = Model::load(Path::new(model), &ModelOptions::default())?;
    let vision = Vision::load(Path::new(mmproj), &model, &VisionOptions::default())?;
    let mut pictures = vec![load(Path::new(picture), &Limits::default())?];
    let mut chat = Chat::open(model, Some(vision), PolicySpec::hae())?;
    for question in questions {
        // The picture comes with the first question.
        let answer = chat.ask(question, &std::mem::take(&mut pictures))?;
        let kv = answer.kv;
        let (cells, bytes) = (kv.cells.cells(), kv.bytes_in_use);
        println!("{}\n  {cells} cells, {bytes} bytes", answer.text.trim());
    }
    Ok(())
}
