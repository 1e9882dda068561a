//! GGUF files: what passes the header's check must be safe to be read by ggml, and every key and tensor of it.
//! llama.cpp then loads it without its weights.

#![no_main]

use hae::Model;
use hae::llama::ModelOptions;
use hae::llama::gguf::Gguf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: hae_fuzz::catch_what_hae_catches(), |data: &[u8]| {
    hae_fuzz::with_file(data, |path| {
        let Some(gguf) = hae_fuzz::one_line(Gguf::open(path)) else {
            return;
        };
        let len = data.len() as u64;
        for tensor in gguf.tensors() {
            assert!(tensor.offset.checked_add(tensor.bytes).is_some_and(|end| end <= len));
        }
        for key in gguf.keys() {
            assert!(gguf.get(&key).is_some(), "{key}");
        }
        let options = ModelOptions {
            measure: true,
            ..ModelOptions::default()
        };
        hae_fuzz::one_line(Model::load(path, &options));
    });
});
