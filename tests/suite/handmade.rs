//! GGUFs made by hand, byte by byte, one for each way in which a file can lie: the kinds of llama.cpp's
//! `tests/test-gguf.cpp`, and some of ours. Each is refused with one line before anything is loaded, and no size
//! that a file claims is ever allocated.

use std::path::Path;

use hae::llama::gguf::Gguf;
use tempfile::TempDir;

use crate::bin::{answer, refusal};

const U8: u32 = 0;
const I32: u32 = 5;
const U32: u32 = 4;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

const F32: u32 = 0;
const Q4_K: u32 = 12;
const I8: u32 = 24;
const I64: u32 = 27;

/// The first 24 bytes.
fn start(n_tensors: u64, n_keys: u64) -> Vec<u8> {
    let numbers = [n_tensors, n_keys].map(u64::to_le_bytes).concat();
    [&b"GGUF\x03\0\0\0"[..], &numbers].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A key with the bytes of its value.
fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(name)[..], &kind.to_le_bytes(), value].concat()
}

fn array(kind: u32, n: u64, values: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &n.to_le_bytes(), values].concat()
}

fn alignment(kind: u32, value: u32) -> Vec<u8> {
    key("general.alignment", kind, &value.to_le_bytes())
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend((dims.len() as u32).to_le_bytes());
    bytes.extend(dims.iter().flat_map(|n| n.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// The parts, and as many bytes of tensors behind them.
fn file(parts: &[Vec<u8>], alignment: usize, data: usize) -> Vec<u8> {
    let mut bytes = parts.concat();
    bytes.resize(bytes.len().next_multiple_of(alignment) + data, 0);
    bytes
}

/// One tensor of 128 bytes where it should be, if it were another.
fn one(table: Vec<u8>) -> Vec<u8> {
    file(&[start(1, 0), table], 32, 128)
}

/// Two tensors.
fn two(first: Vec<u8>, second: Vec<u8>) -> Vec<u8> {
    file(&[start(2, 0), first, second], 32, 256)
}

fn keys(all: &[Vec<u8>]) -> Vec<u8> {
    let first = start(0, all.len() as u64);
    file(&[&[first], all].concat(), 32, 0)
}

fn numbers(name: &str, n: u64) -> Vec<u8> {
    key(name, ARRAY, &array(U32, n, &[0; 16]))
}

/// What is wrong, the file, and what the message says.
fn broken() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let with = |at: usize, new: &[u8]| {
        let mut bytes = keys(&[key("a", U8, &[1])]);
        bytes[at..at + new.len()].copy_from_slice(new);
        bytes
    };
    let huge = u64::MAX.to_le_bytes();
    let good = || tensor("a", &[32], F32, 0);
    let long = "n".repeat(64);
    let most = i64::MAX as u64 - 63;
    let aligned = |kind, value, table: Vec<u8>, data| {
        file(&[start(1, 1), alignment(kind, value), table], 32, data)
    };
    vec![
        // The header.
        ("magic", with(0, b"FUGG"), "starts with \"FUGG\""),
        (
            "the other byte order",
            with(4, &[0, 0, 0, 3]),
            "version 50331648",
        ),
        ("version 0", with(4, &[0]), "GGUF version 0"),
        ("version 1", with(4, &[1]), "GGUF version 1"),
        ("a version to come", with(4, &[4]), "GGUF version 4"),
        ("tensor count", with(8, &huge), "tensor count counts"),
        (
            "more tensors than there are",
            with(8, &[9]),
            "has 0 dimensions",
        ),
        ("key count", with(16, &huge), "key count counts"),
        (
            "more keys than there are",
            with(16, &[9]),
            "key \"\" is empty",
        ),
        (
            "nothing behind the magic",
            b"GGUF".to_vec(),
            "ends within version",
        ),
        // Keys.
        ("key length", with(24, &huge), "key counts"),
        (
            "key longer than the file",
            with(24, &[0xff, 0xff]),
            "ends within key",
        ),
        ("empty key", keys(&[key("", U8, &[1])]), "is empty"),
        ("key that is no text", with(32, &[0xff]), "is not text"),
        ("key with a zero", with(32, &[0]), "is not text"),
        (
            "value type",
            keys(&[key("a", 13, &[1])]),
            "unknown value type 13",
        ),
        (
            "array of arrays",
            keys(&[key("a", ARRAY, &array(ARRAY, 1, &[0; 16]))]),
            "unknown value type 9",
        ),
        (
            "key twice",
            keys(&[key("a", U8, &[1]), key("a", U8, &[2])]),
            "occurs twice",
        ),
        (
            "alignment 0",
            keys(&[alignment(U32, 0)]),
            "general.alignment is not",
        ),
        (
            "alignment 13",
            keys(&[alignment(U32, 13)]),
            "general.alignment is not",
        ),
        (
            "alignment of 2 GiB",
            keys(&[alignment(U32, 1 << 31)]),
            "general.alignment is not",
        ),
        (
            "alignment of another type",
            keys(&[alignment(I32, 32)]),
            "general.alignment is not",
        ),
        (
            "length of a string",
            keys(&[key("a", TEXT, &huge)]),
            "ends within a",
        ),
        (
            "length of a string in an array",
            keys(&[key("a", ARRAY, &array(TEXT, 1, &huge))]),
            "ends within a",
        ),
        (
            "length of an array",
            keys(&[numbers("a", u64::MAX)]),
            "a counts",
        ),
        (
            "array of 2^61 numbers",
            keys(&[numbers("a", 1 << 61)]),
            "a counts",
        ),
        (
            "array longer than the file",
            keys(&[numbers("a", 1 << 24)]),
            "ends within a",
        ),
        // Tensors.
        (
            "name too long",
            one(tensor(&long, &[32], F32, 0)),
            "is longer than 63 bytes",
        ),
        (
            "no dimensions",
            one(tensor("a", &[], F32, 0)),
            "has 0 dimensions",
        ),
        (
            "five dimensions",
            one(tensor("a", &[1; 5], F32, 0)),
            "has 5 dimensions",
        ),
        (
            "2^32 dimensions",
            one([text("a"), vec![0xff; 64]].concat()),
            "has 4294967295 dimensions",
        ),
        (
            "negative dimension",
            one(tensor("a", &[u64::MAX], F32, 0)),
            "cannot have shape",
        ),
        (
            "dimension of zero",
            one(tensor("a", &[32, 0], F32, 0)),
            "cannot have shape",
        ),
        (
            "too many elements",
            one(tensor("a", &[4 << 31; 2], F32, 0)),
            "cannot have shape",
        ),
        (
            "too many bytes",
            one(tensor("a", &[1_533_916_891; 2], I64, 0)),
            "cannot have shape",
        ),
        (
            "bytes that wrap when padded",
            one(tensor("a", &[4, (1 << 30) - 1, (1 << 30) + 1], F32, 0)),
            "ends behind the end of the file",
        ),
        (
            "row of half a block",
            one(tensor("a", &[128], Q4_K, 0)),
            "cannot have shape",
        ),
        (
            "type to come",
            one(tensor("a", &[32], 999, 0)),
            "has the unknown type 999",
        ),
        (
            "type that was removed",
            one(tensor("a", &[32], 4, 0)),
            "has the unknown type 4",
        ),
        (
            "offset outside",
            one(tensor("a", &[32], F32, u64::MAX)),
            "lies at offset",
        ),
        (
            "offset of another alignment",
            one(tensor("a", &[32], F32, 1)),
            "lies at offset 1",
        ),
        (
            "name twice",
            two(good(), tensor("a", &[32], F32, 128)),
            "occurs twice",
        ),
        (
            "tensors over each other",
            two(good(), tensor("b", &[32], F32, 64)),
            "lies at offset 64, expected 128",
        ),
        (
            "a hole between tensors",
            two(good(), tensor("b", &[16], F32, 192)),
            "lies at offset 192, expected 128",
        ),
        (
            "tensors in another order",
            two(tensor("b", &[32], F32, 128), good()),
            "lies at offset 128, expected 0",
        ),
        (
            "offsets without alignment",
            two(tensor("a", &[3], F32, 0), tensor("b", &[3], F32, 12)),
            "lies at offset 12, expected 32",
        ),
        (
            "alignment 13 with a tensor",
            aligned(U32, 13, good(), 128),
            "general.alignment is not",
        ),
        // Data.
        (
            "a byte too few",
            file(&[start(1, 0), good()], 32, 127),
            "ends behind the end of the file",
        ),
        (
            "no data",
            file(&[start(1, 0), good()], 32, 0),
            "ends behind the end of the file",
        ),
        (
            "sizes whose sum overflows",
            two(tensor("a", &[most], I8, 0), tensor("b", &[most], I8, most)),
            "ends behind the end of the file",
        ),
    ]
}

/// Right as GGUFs, and no models.
fn whole() -> Vec<(&'static str, Vec<u8>)> {
    let every_type: Vec<Vec<u8>> = (0..=12u32)
        .filter(|kind| ![TEXT, ARRAY].contains(kind))
        .flat_map(|kind| {
            let size = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][kind as usize];
            let values = vec![1; 3 * size];
            let array = key(&format!("array{kind}"), ARRAY, &array(kind, 3, &values));
            [key(&format!("key{kind}"), kind, &values[..size]), array]
        })
        .chain([key("text", TEXT, &text("a\x1b[2J\nb"))])
        .collect();
    let aligned = [start(1, 1), alignment(U32, 1), tensor("a", &[32], F32, 0)];
    vec![
        ("nothing in it", start(0, 0)),
        ("every type of value", keys(&every_type)),
        ("a tensor", one(tensor("a", &[32], F32, 0))),
        ("alignment 1", file(&aligned, 1, 128)),
    ]
}

fn with_file(bytes: &[u8], test: impl FnOnce(&Path)) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("made.gguf");
    std::fs::write(&path, bytes).unwrap();
    test(&path);
}

/// As a model and as a vision file.
fn refused_by_all(path: &Path, what: &str, expected: &str) {
    let path = path.to_str().unwrap();
    let good = crate::model::repository(crate::model::TEXT)
        .display()
        .to_string();
    for args in [
        &["inspect", path][..],
        &["tokenize", "-p", "hi", "-m", path],
        &["run", "-p", "hi", "-m", path],
        &["run", "-p", "hi", "-m", &good, "--mmproj", path],
    ] {
        let line = refusal(args);
        assert!(
            line.contains("made.gguf: ") && line.contains(expected),
            "{what}: expected \"{expected}\" in: {line}"
        );
    }
}

#[test]
fn every_kind_of_lie_is_refused_in_one_line() {
    let all = broken();
    assert!(all.len() > 45);
    for (what, bytes, expected) in all {
        with_file(&bytes, |path| refused_by_all(path, what, expected));
    }
}

#[test]
fn files_that_are_no_models() {
    for (what, bytes) in whole() {
        with_file(&bytes, |path| {
            let gguf = Gguf::open(path).unwrap_or_else(|e| panic!("{what}: {e}"));
            let path = path.to_str().unwrap();
            let shown = answer(&["inspect", path]);
            assert!(shown.contains("GGUF without an architecture"), "{what}");
            assert!(gguf.keys().iter().all(|key| shown.contains(key)), "{what}");
            let line = refusal(&["run", "-p", "hi", "-m", path]);
            assert!(
                line.contains("general.architecture is missing"),
                "{what}: {line}"
            );
        });
    }
}

/// As many keys and tensors as a file may have take no minutes.
#[test]
fn the_most_keys_and_tensors_take_seconds() {
    let n = 1 << 16;
    let name = |i: usize| format!("phi3.{i:050}.epsilon");
    let mut many = start(0, n as u64);
    many.extend(key("general.architecture", TEXT, &text("phi3")));
    many.extend(key("phi3.block_count", U32, &2u32.to_le_bytes()));
    many.extend((2..n).flat_map(|i| key(&name(i), U8, &[1])));
    let mut table = start(n as u64, 2);
    table.extend(key("general.architecture", TEXT, &text("phi3")));
    table.extend(key("phi3.block_count", U32, &2u32.to_le_bytes()));
    table.extend((0..n).flat_map(|i| tensor(&format!("{i:060}"), &[8], F32, 32 * i as u64)));
    let table = file(&[table], 32, 32 * n);
    for (what, bytes) in [("keys", many), ("tensors", table)] {
        with_file(&bytes, |path| {
            let start = std::time::Instant::now();
            refusal(&["run", "-p", "hi", "-m", path.to_str().unwrap()]);
            assert!(
                start.elapsed().as_secs() < 30,
                "{what}: {:?}",
                start.elapsed()
            );
        });
    }
}
