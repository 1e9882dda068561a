//! Hugging Face directories. The first byte says which file of a very small one the rest takes the place of.

#![no_main]

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use hae::convert::{Options, OutType, convert};
use hae::llama::gguf::Gguf;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// Each file as it is where it is not the one that is damaged.
const FILES: [(&str, &[u8]); 8] = [
    ("config.json", include_bytes!("../convert/config.json")),
    (
        "preprocessor_config.json",
        include_bytes!("../convert/preprocessor_config.json"),
    ),
    (
        "tokenizer.model",
        include_bytes!("../convert/tokenizer.model"),
    ),
    ("tokenizer.json", b""),
    (
        "tokenizer_config.json",
        include_bytes!("../convert/tokenizer_config.json"),
    ),
    (
        "added_tokens.json",
        include_bytes!("../convert/added_tokens.json"),
    ),
    (
        "generation_config.json",
        include_bytes!("../convert/generation_config.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../convert/model.safetensors"),
    ),
];
const TOKENIZER_MODEL: usize = 2;
const TOKENIZER_JSON: usize = 3;

thread_local! {
    static FOLDER: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

fn put(folder: &Path, file: usize, bytes: &[u8]) {
    fs::write(folder.join(FILES[file].0), bytes).unwrap();
}

fn put_back(folder: &Path, file: usize) {
    match FILES[file] {
        (name, b"") => fs::remove_file(folder.join(name)).unwrap(),
        (_, bytes) => put(folder, file, bytes),
    }
}

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    let Some((&first, data)) = data.split_first() else {
        return;
    };
    let file = usize::from(first) % FILES.len();
    FOLDER.with_borrow_mut(|folder| {
        let folder = folder.get_or_insert_with(|| {
            let folder = hae_fuzz::new_folder();
            for (file, (_, bytes)) in FILES.iter().enumerate().filter(|(_, (_, b))| !b.is_empty()) {
                put(folder.path(), file, bytes);
            }
            folder
        });
        let folder = folder.path();
        put(folder, file, data);
        if file == TOKENIZER_JSON {
            fs::remove_file(folder.join(FILES[TOKENIZER_MODEL].0)).unwrap();
        }
        let options = Options {
            model_dir: folder.to_owned(),
            text_out: folder.join("text.gguf"),
            mmproj_out: folder.join("mmproj.gguf"),
            outtype: OutType::F16,
            name: None,
        };
        let made = hae_fuzz::one_line(convert(&options, &mut |_, _| {}));
        let outputs = [&options.text_out, &options.mmproj_out];
        for path in outputs {
            assert_eq!(path.exists(), made.is_some(), "both outputs, or none");
            if made.is_some() {
                Gguf::open(path).expect("what was written can be read");
                fs::remove_file(path).unwrap();
            }
        }
        put_back(folder, file);
        if file == TOKENIZER_JSON {
            put_back(folder, TOKENIZER_MODEL);
        }
    });
});
