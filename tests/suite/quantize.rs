//! `hae quantize`: llama.cpp does the work, so it is the reference; what is tested is what reaches
//! it and what comes out.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hae::Result;
use hae::convert::OutType;
use hae::llama::gguf::{Gguf, TensorType, Writer};
use hae::llama::quantize::{Options, Progress, QuantType, Sizes, TYPES, quantize};
use tempfile::TempDir;

use crate::fixture::{checkpoint, convert, load};

fn run(input: &Path, output: &Path, kind: QuantType) -> Result<Sizes> {
    quantize(input, output, Options::of(kind), &Arc::default())
}

/// The message of a run that must fail and leave nothing in `out`.
fn refused(input: &Path, kind: QuantType) -> String {
    let out = TempDir::new().unwrap();
    let message = run(input, &out.path().join("q.gguf"), kind)
        .expect_err("quantized")
        .to_string();
    assert!(!message.contains('\n'), "more than one line: {message}");
    assert_eq!(
        std::fs::read_dir(out.path()).unwrap().count(),
        0,
        "left behind: {message}"
    );
    message
}

fn q8_0() -> QuantType {
    QuantType::parse("Q8_0").unwrap()
}

#[test]
fn names_are_llama_cpps() {
    assert_eq!(QuantType::parse("q4_k_m").unwrap().name, "Q4_K_M");
    assert_eq!(QuantType::parse("Copy").unwrap().name, "COPY");
    let unknown = QuantType::parse("Q9").unwrap_err().to_string();
    assert!(
        unknown.contains("\"Q9\" is none of") && unknown.contains("Q4_K_M"),
        "{unknown}"
    );
    let needs = QuantType::parse("iq2_xxs").unwrap_err().to_string();
    assert!(
        needs.contains("IQ2_XXS needs an importance matrix"),
        "{needs}"
    );
}

#[test]
fn every_type_makes_a_model_that_llama_cpp_loads() {
    let source = convert(&checkpoint(), OutType::F32);
    for &kind in TYPES.iter().filter(|t| !t.needs_imatrix()) {
        let output = source.dir.path().join(format!("{}.gguf", kind.name));
        let sizes = run(&source.text(), &output, kind).unwrap();
        assert_eq!(sizes.output, std::fs::metadata(&output).unwrap().len());
        assert!(
            matches!(kind.name, "F32" | "COPY") || sizes.output < sizes.input,
            "{} {sizes:?}",
            kind.name
        );
        assert_eq!(load(&output).n_vocab(), 1024, "{}", kind.name);
        std::fs::remove_file(output).unwrap();
    }
}

#[test]
fn llama_cpp_itself_refuses_the_types_that_are_refused_by_name() {
    let source = convert(&checkpoint(), OutType::F32);
    for &kind in TYPES.iter().filter(|t| t.needs_imatrix()) {
        let message = refused(&source.text(), kind);
        assert!(message.contains("imatrix"), "{}: {message}", kind.name);
    }
}

/// The converter's Q8_0 and llama.cpp's are one.
#[test]
fn converted_q8_0_equals_quantized_q8_0() {
    let (from, direct) = (
        convert(&checkpoint(), OutType::F16),
        convert(&checkpoint(), OutType::Q8_0),
    );
    let output = from.dir.path().join("q.gguf");
    let progress = Arc::<Progress>::default();
    quantize(&from.text(), &output, Options::of(q8_0()), &progress).unwrap();
    assert_eq!(
        (
            progress.done.load(Ordering::Relaxed),
            progress.total.load(Ordering::Relaxed)
        ),
        (40, 41)
    );
    let read = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        let mut tensors: Vec<_> = Gguf::open(path)
            .unwrap()
            .tensors()
            .into_iter()
            .map(|t| {
                (
                    t.name,
                    t.kind,
                    t.dims,
                    bytes[t.offset as usize..][..t.bytes as usize].to_vec(),
                )
            })
            .collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        tensors
    };
    assert!(read(&output) == read(&direct.text()));
}

/// A block of Q8_0 is a scale in F16 and 32 numbers of eight bits.
#[test]
fn what_is_quantized_is_unpacked_where_that_is_allowed() {
    let from = convert(&checkpoint(), OutType::Q8_0);
    let output = from.dir.path().join("f32.gguf");
    let f32 = QuantType::parse("F32").unwrap();
    assert!(refused(&from.text(), f32).contains("`allow_requantize`"));
    let options = Options {
        allow_requantize: true,
        ..Options::of(f32)
    };
    quantize(&from.text(), &output, options, &Arc::default()).unwrap();
    let [packed, plain] =
        [from.text(), output].map(|path| (std::fs::read(&path).unwrap(), Gguf::open(&path)));
    let plain_tensors = plain.1.unwrap().tensors();
    let mut n = 0;
    for t in packed.1.unwrap().tensors() {
        if t.kind != TensorType::Q8_0 {
            continue;
        }
        let own = plain_tensors.iter().find(|own| own.name == t.name).unwrap();
        assert_eq!((own.kind, &own.dims), (TensorType::F32, &t.dims));
        let blocks = packed.0[t.offset as usize..][..t.bytes as usize].chunks(34);
        let values = plain.0[own.offset as usize..][..own.bytes as usize].chunks(4 * 32);
        for (block, values) in blocks.zip(values) {
            let scale = half::f16::from_le_bytes([block[0], block[1]]).to_f32();
            let said = values
                .chunks(4)
                .map(|v| f32::from_le_bytes(v.try_into().unwrap()));
            let meant = block[2..].iter().map(|&q| scale * f32::from(q as i8));
            assert!(said.eq(meant), "{}", t.name);
            n += 1;
        }
    }
    assert!(n > 1000, "{n} blocks");
}

#[test]
fn vision_files_take_the_plain_types_only() {
    let source = convert(&checkpoint(), OutType::F32);
    let output = source.dir.path().join("q.gguf");
    run(&source.mmproj(), &output, q8_0()).unwrap();
    let kind = |name: &str| {
        Gguf::open(&output)
            .unwrap()
            .tensors()
            .into_iter()
            .find(|t| t.name == name)
            .unwrap()
            .kind
    };
    assert_eq!(kind("v.blk.0.attn_q.weight"), TensorType::Q8_0);
    assert_eq!(kind("mm.0.weight"), TensorType::Q8_0);
    assert_eq!(kind("v.patch_embd.weight"), TensorType::F32);
    assert_eq!(kind("v.position_embd.weight"), TensorType::F32);
    let message = refused(&source.mmproj(), QuantType::parse("Q4_K_M").unwrap());
    assert!(
        message.contains("is a vision file (mmproj), for which Q4_K_M is not possible"),
        "{message}"
    );
}

#[test]
fn inputs_that_are_no_models() {
    let dir = TempDir::new().unwrap();
    let write = |name: &str, bytes: &[u8]| -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    assert!(refused(&dir.path().join("nowhere.gguf"), q8_0()).contains("nowhere.gguf"));
    assert!(refused(dir.path(), q8_0()).contains("is not a regular file"));
    assert!(refused(&write("empty", b""), q8_0()).contains("ends within magic"));
    assert!(refused(&write("png", b"\x89PNG\r\n\x1a\n"), q8_0()).contains("expected \"GGUF\""));
    let good = convert(&checkpoint(), OutType::Q8_0);
    let bytes = std::fs::read(good.text()).unwrap();
    assert!(
        refused(&write("cut", &bytes[..bytes.len() - 100]), q8_0())
            .contains("ends behind the end of the file")
    );
    let again = refused(&good.text(), QuantType::parse("Q4_0").unwrap());
    assert!(
        again.contains("is quantized already (token_embd.weight is q8_0)"),
        "{again}"
    );
    let message = run(
        &good.text(),
        &good.text(),
        QuantType::parse("COPY").unwrap(),
    )
    .unwrap_err()
    .to_string();
    assert!(
        message.contains("is the same file as the input"),
        "{message}"
    );
    assert_eq!(std::fs::read(good.text()).unwrap(), bytes);
}

/// Metadata on which `llama_model_quantize` would abort, and some that it refuses itself.
#[test]
fn hostile_metadata() {
    type Change = fn(&mut Writer) -> Result<()>;
    let cases: &[(Change, &str)] = &[
        (
            |w| w.set_u32("phi3.block_count", 0),
            "phi3.block_count is 0, expected 1 to 512",
        ),
        (
            |w| w.set_u32("phi3.block_count", 513),
            "phi3.block_count is 513",
        ),
        (
            |w| w.set_text("phi3.block_count", "6"),
            "phi3.block_count is Text",
        ),
        (
            |w| w.set_u32("phi3.nextn_predict_layers", 1),
            "phi3.nextn_predict_layers is 1",
        ),
        (
            |w| w.set_text("phi3.rope.scaling.type", "spiral"),
            "phi3.rope.scaling.type is Text(\"spiral\")",
        ),
        (
            |w| w.set_u32("phi3.rope.scaling.type", 1),
            "phi3.rope.scaling.type is Unsigned(1)",
        ),
        (
            |w| w.set_u32("phi3.expert_count", 8),
            "phi3.expert_count is 8 and expert_used_count 0",
        ),
        (
            |w| w.set_u32("phi3.expert_used_count", 8),
            "phi3.expert_count is 0 and expert_used_count 8",
        ),
        (
            |w| w.set_u32("phi3.expert_group_count", 8),
            "phi3.expert_group_count is 8",
        ),
        (|w| w.set_u32("split.count", 3), "is one of 3 parts"),
        (
            |w| w.set_text("general.architecture", "nonsense"),
            "nonsense.block_count is missing",
        ),
        (
            |w| w.set_text("phi3.context_length", "long"),
            "phi3.context_length is Text(\"long\"), expected a non-negative integer",
        ),
    ];
    let dir = TempDir::new().unwrap();
    for (i, (change, expected)) in cases.iter().enumerate() {
        let path = dir.path().join(format!("{i}.gguf"));
        let mut w = Writer::new(&path).unwrap();
        w.set_text("general.architecture", "phi3").unwrap();
        w.set_u32("phi3.block_count", 1).unwrap();
        w.set_u32("phi3.context_length", 64).unwrap();
        w.set_u32("phi3.embedding_length", 32).unwrap();
        w.set_u32("phi3.attention.head_count", 2).unwrap();
        w.set_f32("phi3.attention.layer_norm_rms_epsilon", 1e-5)
            .unwrap();
        change(&mut w).unwrap();
        w.add_tensor("token_embd.weight", TensorType::F32, &[32, 4])
            .unwrap();
        let mut data = w.begin(std::fs::File::create(&path).unwrap()).unwrap();
        data.write(&[0; 512]).unwrap();
        data.end_tensor().unwrap();
        data.finish().unwrap();
        let message = refused(&path, q8_0());
        assert!(
            message.contains(expected),
            "expected \"{expected}\" in: {message}"
        );
    }
}
