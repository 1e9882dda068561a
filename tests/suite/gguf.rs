//! The GGUF wrapper: what is written can be read, and no file makes ggml abort.

use std::collections::HashSet;
use std::path::Path;

use hae::llama::gguf::{Gguf, TensorType, Value, Writer, fingerprint, quantize};
use proptest::prelude::*;
use tempfile::TempDir;

/// A small file with values of several types and two tensors.
fn sample() -> Vec<u8> {
    let mut w = Writer::new("sample.gguf".as_ref()).unwrap();
    w.set_text("general.architecture", "phi3").unwrap();
    w.set_u32("phi3.block_count", 6).unwrap();
    w.set_f32("eps", 0.5).unwrap();
    w.set_bool("flag", true).unwrap();
    w.set_text_array("words", &["a".into(), String::new(), "▁b".into()])
        .unwrap();
    w.set_f32_array("floats", &[1.0, -2.0]).unwrap();
    w.set_i32_array("ints", &[-1, 0, 7]).unwrap();
    w.add_tensor("a.weight", TensorType::F16, &[3, 5]).unwrap();
    w.add_tensor("b.weight", TensorType::Q8_0, &[64]).unwrap();
    let mut data = w.begin(Vec::new()).unwrap();
    data.write(&[1; 30]).unwrap();
    data.end_tensor().unwrap();
    data.write(&[2; 68]).unwrap();
    data.end_tensor().unwrap();
    data.finish().unwrap()
}

fn open(bytes: &[u8]) -> hae::Result<Gguf> {
    at_path(bytes, Gguf::open)
}

fn at_path<T>(bytes: &[u8], f: impl FnOnce(&Path) -> T) -> T {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.gguf");
    std::fs::write(&path, bytes).unwrap();
    f(&path)
}

/// What tells models apart: any byte of the metadata, the first ones of every tensor, the length.
#[test]
fn a_fingerprint_changes_with_every_part_of_the_file() {
    let of = |bytes: &[u8]| at_path(bytes, fingerprint).unwrap();
    let bytes = sample();
    let whole = of(&bytes);
    assert_eq!(whole, of(&bytes));
    assert_eq!(whole.len(), 64);
    let mut seen = HashSet::from([whole]);
    // A letter of the architecture, a number, then the first and last bytes of both tensors.
    let g = open(&bytes).unwrap();
    let name = bytes.windows(4).position(|w| w == b"phi3").unwrap();
    let number = bytes.windows(4).position(|w| w == 0.5f32.to_le_bytes());
    let tensors = g.tensors();
    let ends = tensors
        .iter()
        .flat_map(|t| [t.offset, t.offset + t.bytes - 1].map(|at| at as usize));
    for at in [name, number.unwrap()].into_iter().chain(ends) {
        let mut other = bytes.clone();
        other[at] ^= 1;
        assert!(seen.insert(of(&other)), "byte {at}");
    }
    let longer = [&bytes[..], &[0; 32]].concat();
    assert!(seen.insert(of(&longer)));
    let error = at_path(&bytes[..bytes.len() - 60], fingerprint).unwrap_err();
    assert!(error.to_string().contains("tensor b.weight"), "{error}");
}

/// Large tensors are not read to their ends: that is what makes it cheap.
#[test]
fn a_fingerprint_takes_the_first_4096_bytes_of_a_tensor() {
    let with = |at: usize| {
        let mut w = Writer::new("large.gguf".as_ref()).unwrap();
        w.add_tensor("a", TensorType::F32, &[2048]).unwrap();
        let mut values = [0; 8192];
        values[at] = 1;
        let mut data = w.begin(Vec::new()).unwrap();
        data.write(&values).unwrap();
        data.end_tensor().unwrap();
        at_path(&data.finish().unwrap(), fingerprint).unwrap()
    };
    assert_ne!(with(0), with(4095));
    assert_eq!(with(4096), with(8191));
    assert_ne!(with(4095), with(4096));
}

#[test]
fn what_is_written_is_read() {
    let bytes = sample();
    let g = open(&bytes).unwrap();
    assert_eq!(g.keys().len(), 7);
    assert_eq!(g.text("general.architecture").unwrap(), "phi3");
    assert_eq!(g.unsigned("phi3.block_count").unwrap(), 6);
    assert_eq!(g.float("eps").unwrap(), 0.5);
    assert_eq!(g.get("flag"), Some(Value::Bool(true)));
    assert_eq!(
        g.get("words"),
        Some(Value::Array(
            ["a", "", "▁b"].map(|s| Value::Text(s.into())).into()
        ))
    );
    assert_eq!(
        g.get("floats"),
        Some(Value::Array(vec![Value::Float(1.0), Value::Float(-2.0)]))
    );
    assert_eq!(
        g.get("ints"),
        Some(Value::Array([-1, 0, 7].map(Value::Signed).into()))
    );
    assert_eq!(g.get("none"), None);
    let [a, b] = g.tensors().try_into().unwrap();
    assert_eq!(
        (a.name.as_str(), a.kind, a.dims.as_slice(), a.bytes),
        ("a.weight", TensorType::F16, &[3, 5][..], 30)
    );
    assert_eq!(
        (b.name.as_str(), b.kind, b.dims.as_slice(), b.bytes),
        ("b.weight", TensorType::Q8_0, &[64][..], 68)
    );
    assert_eq!(bytes[a.offset as usize..][..30], [1; 30]);
    assert_eq!(bytes[b.offset as usize..][..68], [2; 68]);
    assert_eq!((a.offset % 32, b.offset % 32), (0, 0));
    assert!(
        g.unsigned("eps")
            .unwrap_err()
            .to_string()
            .contains("eps is Float(0.5), expected a non-negative integer")
    );
    assert!(
        g.text("none")
            .unwrap_err()
            .to_string()
            .contains("none is missing")
    );
}

#[test]
fn the_writer_refuses_what_ggml_would_abort_on() {
    let mut w = Writer::new("w.gguf".as_ref()).unwrap();
    w.add_tensor("t", TensorType::F32, &[4]).unwrap();
    for (name, kind, dims) in [
        ("t", TensorType::F32, &[4][..]),
        ("", TensorType::F32, &[4]),
        (&"n".repeat(64), TensorType::F32, &[4]),
        ("none", TensorType::F32, &[]),
        ("zero", TensorType::F32, &[4, 0]),
        ("five", TensorType::F32, &[1, 1, 1, 1, 1]),
        ("row", TensorType::Q8_0, &[33]),
        ("huge", TensorType::F32, &[u64::MAX, 2]),
    ] {
        assert!(w.add_tensor(name, kind, dims).is_err(), "{name} {dims:?}");
    }
    assert!(w.set_u32("", 1).is_err());
    assert!(w.set_u32("general.alignment", 7).is_err());
    assert!(w.set_text("k", "a\0b").is_err());
    let mut data = w.begin(Vec::new()).unwrap();
    data.write(&[0; 12]).unwrap();
    assert!(
        data.end_tensor()
            .unwrap_err()
            .to_string()
            .contains("tensor t: 12 bytes, expected 16")
    );
    assert!(
        data.finish()
            .unwrap_err()
            .to_string()
            .contains("tensor t was not written")
    );
}

#[test]
fn every_cut_is_refused() {
    let bytes = sample();
    open(&bytes).unwrap();
    // The last 28 bytes are padding behind the last tensor.
    for len in 0..bytes.len() - 28 {
        let message = open(&bytes[..len])
            .expect_err("a cut file was opened")
            .to_string();
        assert!(
            message.contains("x.gguf: ") && !message.contains('\n'),
            "{message}"
        );
    }
}

/// Replaces the bytes at the first occurrence of `old`.
fn patched(old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut bytes = sample();
    let at = bytes.windows(old.len()).position(|w| w == old).unwrap();
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

#[test]
fn lies_are_named() {
    let after = |text: &str, old: &[u8], new: &[u8]| {
        patched(
            &[text.as_bytes(), old].concat(),
            &[text.as_bytes(), new].concat(),
        )
    };
    for (bytes, expected) in [
        (
            patched(b"GGUF", b"GGML"),
            "starts with \"GGML\", expected \"GGUF\"",
        ),
        (patched(b"GGUF\x03", b"GGUF\x01"), "GGUF version 1"),
        (
            patched(
                b"GGUF\x03\0\0\0\x02",
                b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f",
            ),
            "tensor count counts",
        ),
        (
            after("ints", &[9, 0, 0, 0, 5], &[9, 0, 0, 0, 9]),
            "unknown value type 9",
        ),
        (
            after(
                "ints",
                &[9, 0, 0, 0, 5, 0, 0, 0, 3],
                &[9, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, 1],
            ),
            "ints counts",
        ),
        (
            after("a.weight", &[2, 0, 0, 0], &[5, 0, 0, 0]),
            "has 5 dimensions",
        ),
        (
            after("a.weight", &[2, 0, 0, 0, 3], &[2, 0, 0, 0, 0]),
            "cannot have shape [0, 5]",
        ),
        (
            after(
                "a.weight",
                &[2, 0, 0, 0, 3],
                &[2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0xf0],
            ),
            "cannot have shape",
        ),
        (patched(b"b.weight", b"a.weight"), "occurs twice"),
        (patched(b"flag", b"ints"), "occurs twice"),
    ] {
        let message = open(&bytes).expect_err(expected).to_string();
        assert!(
            message.contains(expected),
            "expected \"{expected}\" in: {message}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// Whatever a few bytes are changed to: an answer, no abort. All values are asked for.
    #[test]
    fn damaged_files_are_answered(changes in prop::collection::vec((0usize..600, any::<u8>()), 1..6)) {
        let mut bytes = sample();
        let len = bytes.len();
        for (at, value) in changes {
            bytes[at % len] = value;
        }
        if let Ok(g) = open(&bytes) {
            g.keys().iter().for_each(|key| drop(g.get(key)));
            g.tensors();
        }
    }
}

#[test]
fn q8_0_is_within_half_a_step() {
    let values: Vec<f32> = (0..320)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.03)
        .collect();
    let mut out = Vec::new();
    quantize(TensorType::Q8_0, &values, 64, &mut out).unwrap();
    assert_eq!(out.len(), 10 * 34);
    for (block, values) in out.chunks_exact(34).zip(values.chunks_exact(32)) {
        let scale = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (q, v) in block[2..].iter().zip(values) {
            // Half a step, and the scale's own rounding to F16 (11 bits) times up to 127 steps.
            let bound = scale * 0.501 + largest / 2048.0;
            assert!((f32::from(*q as i8) * scale - v).abs() <= bound);
        }
    }
    assert!(quantize(TensorType::Q8_0, &values[..33], 33, &mut out).is_err());
    assert!(quantize(TensorType::Q8_0, &values[..33], 32, &mut out).is_err());
    assert!(quantize(TensorType::Q8_0, &values[..32], 0, &mut out).is_err());
}
