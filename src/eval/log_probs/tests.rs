use std::fs;

use tempfile::TempDir;

use super::*;

/// Logits of five tokens, one of them far below the others.
const LOGITS: [[f32; 5]; 3] = [
    [1.0, 2.0, -3.0, 0.5, -40.0],
    [0.0; 5],
    [-1.0, 9.0, 4.0, 8.99, 3.0],
];

fn exact(logits: &[f32]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    logits.iter().map(|&x| f64::from(x) - sum.ln()).collect()
}

#[test]
fn log_probabilities_survive_sixteen_bits() {
    for logits in &LOGITS {
        let kept = LogProbs::of(logits);
        let exact = exact(logits);
        let most = exact.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        assert_eq!((kept.len(), kept.is_empty()), (5, false));
        for (i, (kept, exact)) in kept.iter().zip(&exact).enumerate() {
            let exact = exact.max(most - 16.0);
            // Half a step, and the rounding of F32.
            let bound = 0.5 * 16.0 / 65535.0 + 1e-5;
            assert!(
                (f64::from(kept) - exact).abs() < bound,
                "{i}: {kept} {exact}"
            );
        }
        assert_eq!(kept.get(1), kept.iter().nth(1));
        assert_eq!((kept.get(5), kept.get(-1)), (None, None));
    }
}

#[test]
fn chunks_are_cut_in_their_middle() {
    let text: Vec<Token> = (10..31).collect();
    let all = chunks(&text, 8, usize::MAX);
    assert_eq!(all, [(10..18).collect::<Vec<_>>(), (18..26).collect()]);
    assert_eq!(chunks(&text, 8, 1).len(), 1);
    assert!(chunks(&text, 22, 9).is_empty());
    let own = window(&all[1], None);
    assert_eq!(
        (own.prompt, own.text),
        (vec![18, 19, 20, 21, 22], vec![23, 24, 25])
    );
    // The token stands in the place of the first, not in front of it.
    let begun = window(&all[1], Some(1));
    assert_eq!(
        (begun.prompt, begun.text),
        (vec![1, 19, 20, 21, 22], vec![23, 24, 25])
    );
    // An odd chunk has one more token in its second half.
    let odd = window(&text[..7], None);
    assert_eq!((odd.prompt.len(), odd.text.len()), (4, 3));
    for n_ctx in [4, 7, 8, 512] {
        let shape = Shape {
            n_ctx,
            n_vocab: 5,
            n_chunks: 1,
        };
        let tokens = vec![0; n_ctx];
        assert_eq!(shape.scored(), window(&tokens, None).text.len());
    }
}

/// Two chunks of four tokens: one scored token each.
fn file(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("base");
    let chunks = [vec![0, 1, 2, 3], vec![4, 3, 2, 1]];
    let mut writer = Writer::create(&path, 5, &chunks).unwrap();
    writer.add(&LOGITS[0]).unwrap();
    assert!(writer.add(&LOGITS[0][..4]).is_err());
    writer.add(&LOGITS[2]).unwrap();
    assert!(writer.add(&LOGITS[2]).is_err());
    assert!(!path.exists());
    writer.commit().unwrap();
    path
}

#[test]
fn files_are_read_as_they_were_written() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir);
    let mut reader = Reader::open(&path).unwrap();
    let shape = Shape {
        n_ctx: 4,
        n_vocab: 5,
        n_chunks: 2,
    };
    assert_eq!(reader.shape(), shape);
    assert_eq!(reader.chunk(1).unwrap(), [4, 3, 2, 1]);
    assert_eq!(reader.read().unwrap(), LogProbs::of(&LOGITS[2]));
    assert!(reader.read().is_err() && reader.chunk(2).is_err());
    assert_eq!(reader.chunk(0).unwrap(), [0, 1, 2, 3]);
    assert_eq!(reader.read().unwrap(), LogProbs::of(&LOGITS[0]));
    reader.seek(0).unwrap();
    assert_eq!(reader.read().unwrap(), LogProbs::of(&LOGITS[0]));

    // Where everything stands: an odd vocabulary is filled up.
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 20 + 4 * 8 + 2 * (8 + 2 * 6));
    assert_eq!(&bytes[..8], b"_logits_");
    assert_eq!(bytes[8..20], [4, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(bytes[36..40], [4, 0, 0, 0]);
    let row = LogProbs::of(&LOGITS[0]);
    assert_eq!(bytes[52..56], row.scale.to_le_bytes());
    assert_eq!(bytes[56..60], row.least.to_le_bytes());
    // The likeliest, and those that were cut off.
    assert_eq!(bytes[62..64], [0xff, 0xff]);
    assert_eq!(bytes[68..72], [0, 0, 0, 0]);
}

#[test]
fn a_file_without_all_predictions_does_not_appear() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("base");
    let mut writer = Writer::create(&path, 5, &[vec![0, 1, 2, 3]]).unwrap();
    assert!(writer.add(&LOGITS[0]).is_ok());
    drop(writer);
    let writer = Writer::create(&path, 5, &[vec![0, 1, 2, 3]]).unwrap();
    assert!(writer.commit().is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(Writer::create(&path, 5, &[vec![0, 1, 2, 3], vec![0]]).is_err());
}

#[test]
fn damaged_files_are_refused_before_memory_is_taken() {
    let dir = TempDir::new().unwrap();
    let path = file(&dir);
    let whole = fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let read = |mut reader: Reader| reader.chunk(0);
        Reader::open(&path).and_then(read).unwrap_err().to_string()
    };
    for (at, with, expected) in [
        (0, &b"GGUF"[..], "does not begin with _logits_"),
        (
            8,
            &3i32.to_le_bytes()[..],
            "has 92 bytes for 2 chunks of 3 tokens",
        ),
        (8, &2i32.to_le_bytes()[..], "expected at least 1 of 3"),
        (8, &(-4i32).to_le_bytes()[..], "holds 2 chunks of 0 tokens"),
        (8, &i32::MAX.to_le_bytes()[..], "has 92 bytes"),
        (12, &0i32.to_le_bytes()[..], "tokens of 0"),
        (12, &i32::MAX.to_le_bytes()[..], "has 92 bytes"),
        (16, &i32::MAX.to_le_bytes()[..], "has 92 bytes"),
        (16, &0i32.to_le_bytes()[..], "holds 0 chunks"),
        (
            20,
            &5i32.to_le_bytes()[..],
            "has the token 5, expected less than 5",
        ),
        (24, &(-1i32).to_le_bytes()[..], "has the token -1"),
    ] {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        let line = refused(&bytes);
        assert!(line.contains(expected), "{line}, expected {expected}");
        assert_eq!(line.lines().count(), 1);
    }
    // All three at once: more bytes than 64 bits count.
    let mut bytes = whole.clone();
    bytes[8..20].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f].repeat(3));
    assert!(refused(&bytes).contains("which no file has"));
    for length in 0..whole.len() {
        refused(&whole[..length]);
    }
    refused(&[&whole[..], &[0]].concat());
    // Numbers that are none, and probabilities of more than 1.
    let nothing = "expected finite numbers";
    for (scale, least, expected) in [
        (f32::NAN, -1.0, nothing),
        (f32::INFINITY, -1.0, nothing),
        (-1.0, -1.0, nothing),
        (0.0, f32::NEG_INFINITY, nothing),
        (
            0.0,
            0.02,
            "a log probability of 0.02, expected none above 0",
        ),
        (
            1.0,
            -16.0,
            "a log probability of 65519, expected none above 0",
        ),
    ] {
        let mut bytes = whole.clone();
        bytes[52..56].copy_from_slice(&scale.to_le_bytes());
        bytes[56..60].copy_from_slice(&f32::to_le_bytes(least));
        fs::write(&path, &bytes).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        reader.seek(0).unwrap();
        let line = reader.read().unwrap_err().to_string();
        assert!(line.contains(expected), "{line}");
    }
}

/// A file of zeros that takes no room, as long as what it promises: opening it takes no memory by that.
#[cfg(target_os = "linux")]
#[test]
fn a_long_file_of_nothing_is_opened_as_it_is() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sparse");
    let shape = Shape {
        n_ctx: 1 << 20,
        n_vocab: 1 << 10,
        n_chunks: 1 << 10,
    };
    let mut head = MAGIC.to_vec();
    for n in [shape.n_ctx, shape.n_vocab, shape.n_chunks] {
        head.extend(i32::try_from(n).unwrap().to_le_bytes());
    }
    fs::write(&path, head).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(shape.bytes().unwrap()).unwrap();
    let mut reader = None;
    let cost = allocation_counter::measure(|| reader = Some(Reader::open(&path).unwrap()));
    assert!(cost.bytes_max < 1 << 16, "{} bytes", cost.bytes_max);
    let mut reader = reader.unwrap();
    assert_eq!(reader.shape(), shape);
    assert_eq!(reader.chunk(1023).unwrap().len(), 1 << 20);
    assert_eq!(reader.read().unwrap().len(), 1 << 10);
}
