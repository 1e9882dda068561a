//! Compiles the pinned Metal backend's own C++ as it is, and cuts the functions out of the sources of all
//! backends that say which operations they have. When the sources have moved, the crate still builds, and
//! [`broken`] in `src/lib.rs` says what was not found: the tests then fail with that line.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// The backend's C++ files. Its two Objective-C files are what `src/apple.cpp` stands in for.
const FILES: [&str; 6] = ["", "-common", "-device", "-fusion", "-ops", "-tuning"];

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let ggml = here.join("../../vendor/llama-cpp-sys-2/llama.cpp/ggml");
    println!(
        "cargo::rerun-if-changed={}",
        here.join("build.rs").display()
    );
    println!("cargo::rerun-if-changed={}", here.join("src").display());
    println!("cargo::rustc-check-cfg=cfg(dry)");
    let reason = match compile(&here, &ggml, &out) {
        Ok(()) => {
            println!("cargo::rustc-cfg=dry");
            String::new()
        }
        Err(reason) => reason.lines().collect::<Vec<_>>().join(" "),
    };
    println!("cargo::rustc-env=DRY_METAL_BROKEN={reason}");
}

fn compile(here: &Path, ggml: &Path, out: &Path) -> Result<(), String> {
    let metal = ggml.join("src/ggml-metal");
    fs::write(
        out.join("metal.inc"),
        metal_rules(&read(&metal.join("ggml-metal-device.m"))?)?,
    )
    .map_err(|e| e.to_string())?;
    let others = [
        ("cuda.inc", cuda_helpers(ggml)?),
        ("cuda-ops.inc", cuda_rules(ggml)?),
        ("vulkan.inc", vulkan_rules(ggml)?),
    ];
    for (name, text) in others {
        fs::write(out.join(name), text).map_err(|e| e.to_string())?;
    }
    fs::write(out.join("kernels.inc"), kernels(&metal.join("kernels"))?)
        .map_err(|e| e.to_string())?;
    let mut build = cc::Build::new();
    build
        .include(out)
        .include(ggml.join("include"))
        .include(ggml.join("src"))
        .include(&metal)
        .cargo_warnings(false)
        .warnings(false)
        .opt_level(1)
        .debug(false);
    let mut c = build.clone();
    c.std("c11").file(here.join("src/rules.c"));
    c.try_compile("dry_metal_rules")
        .map_err(|e| e.to_string())?;
    // <memory> comes with Apple's library wherever <string> does
    build
        .cpp(true)
        .std("c++17")
        .flag("-include")
        .flag("memory")
        .file(here.join("src/apple.cpp"))
        .file(here.join("src/others.cpp"));
    for file in FILES {
        let file = metal.join(format!("ggml-metal{file}.cpp"));
        println!("cargo::rerun-if-changed={}", file.display());
        build.file(file);
    }
    build.try_compile("dry_metal").map_err(|e| e.to_string())
}

fn read(path: &Path) -> Result<String, String> {
    println!("cargo::rerun-if-changed={}", path.display());
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// A definition that begins with the line `start` and ends with the first line that is `end`, with the
/// source's line numbers. Each `return` notes its line in `dry_line`.
fn cut(name: &str, text: &str, start: &str, end: &str) -> Result<String, String> {
    let at = text
        .lines()
        .position(|line| line.starts_with(start))
        .ok_or_else(|| {
            format!("{name} has no line that begins with `{start}`: the source has moved")
        })?;
    let mut out = format!("#line {} \"{name}\"\n", at + 1);
    for line in text.lines().skip(at) {
        let noted = line.replace("return ", "return dry_line = __LINE__, ");
        writeln!(out, "{noted}").unwrap();
        if line == end {
            return Ok(out);
        }
    }
    Err(format!(
        "{name}: `{start}` has no end: the source has moved"
    ))
}

fn metal_rules(text: &str) -> Result<String, String> {
    let cut = |start, end| cut("ggml-metal-device.m", text, start, end);
    Ok(cut("static bool ggml_metal_supports_mul_mat_op(", "}")?
        + &cut("bool ggml_metal_device_supports_op(", "}")?)
}

/// What flash attention on CUDA, and its other rules, need of other files.
fn cuda_helpers(ggml: &Path) -> Result<String, String> {
    let (fattn, fwht) = ("fattn.cu", "fwht.cu");
    let at = |name: &str| read(&ggml.join("src/ggml-cuda").join(name));
    let (attention, hadamard) = (at(fattn)?, at(fwht)?);
    Ok([
        cut(fattn, &attention, "enum best_fattn_kernel {", "};")?,
        cut(
            fattn,
            &attention,
            "static bool ggml_cuda_fattn_kv_type_supported(",
            "}",
        )?,
        cut(
            fattn,
            &attention,
            "static best_fattn_kernel ggml_cuda_get_best_fattn_kernel(",
            "}",
        )?,
        cut(fwht, &hadamard, "bool ggml_cuda_op_mul_mat_use_fwht(", "}")?,
    ]
    .concat())
}

fn cuda_rules(ggml: &Path) -> Result<String, String> {
    let text = read(&ggml.join("src/ggml-cuda/ggml-cuda.cu"))?;
    cut(
        "ggml-cuda.cu",
        &text,
        "static bool ggml_backend_cuda_device_supports_op(",
        "}",
    )
}

fn vulkan_rules(ggml: &Path) -> Result<String, String> {
    let text = read(&ggml.join("src/ggml-vulkan/ggml-vulkan.cpp"))?;
    let cut = |start| cut("ggml-vulkan.cpp", &text, start, "}");
    Ok([
        cut("bool ggml_vk_concat_supported(")?,
        cut("bool ggml_vk_dim01_contiguous(")?,
        cut("static bool ggml_backend_vk_device_supports_op(")?,
    ]
    .concat())
}

/// The kernels that the Metal sources define, as `{ "name", needs, forbids }` with the bits of
/// [`Macros`]: a table for `apple.cpp`.
fn kernels(folder: &Path) -> Result<String, String> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .map_err(|e| format!("{}: {e}", folder.display()))?
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "metal"))
        .collect();
    files.sort();
    let mut out = String::new();
    for file in files {
        let mut macros = Macros::default();
        let mut is_template = false;
        // The names that a macro makes of its first argument, by the macro's name.
        let mut made: Vec<(String, String, String)> = Vec::new();
        let mut defines = "";
        let text = read(&file)?;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("#define ") {
                defines = rest.split('(').next().unwrap_or("");
            }
            if macros.line(line) {
                continue;
            }
            let Some((needs, forbids)) = macros.of_line() else {
                continue;
            };
            let mut push =
                |name: &str| writeln!(out, "{{ \"{name}\", {needs}, {forbids} }},").unwrap();
            // `template [[host_name("x")]] kernel` is an instance, `kernel void x(` a kernel of its own unless a
            // template's head stands before it.
            if let Some((_, rest)) = line.split_once("host_name(") {
                match rest.split('"').collect::<Vec<_>>()[..] {
                    ["", name, end, ..] if end.trim_start().starts_with(')') => push(name),
                    ["", before, _, after, ..] => {
                        made.push((defines.to_owned(), before.to_owned(), after.to_owned()));
                    }
                    _ => {
                        return Err(format!(
                            "{}: {line}: the sources have moved",
                            file.display()
                        ));
                    }
                }
            } else if let Some(rest) = line.strip_prefix("kernel void ") {
                if !is_template {
                    push(rest.split('(').next().unwrap_or(rest).trim());
                }
            } else if let Some((name, rest)) = line.split_once("(\"") {
                let argument = rest.split('"').next().unwrap_or(rest);
                for (_, before, after) in made.iter().filter(|(by, ..)| by == name) {
                    push(&format!("{before}{argument}{after}"));
                }
            }
            is_template = line.starts_with("template")
                || is_template && !line.starts_with("kernel void ") && !line.trim().is_empty();
        }
    }
    if out.is_empty() {
        return Err(format!(
            "{}: no kernels: the sources have moved",
            folder.display()
        ));
    }
    Ok(out)
}

/// Which of the two macros that Metal's library is compiled with a line needs: 1 `GGML_METAL_HAS_BF16`, 2
/// `GGML_METAL_HAS_TENSOR`.
#[derive(Default)]
struct Macros(Vec<Branch>);

#[derive(Clone, Copy)]
struct Branch {
    needs: u8,
    forbids: u8,
    never: bool,
}

impl Macros {
    /// Whether it is a line of the preprocessor.
    fn line(&mut self, line: &str) -> bool {
        let Some(line) = line.trim_start().strip_prefix('#') else {
            return false;
        };
        let line = line.trim_start();
        let bit = match line {
            l if l.contains("GGML_METAL_HAS_BF16") => 1,
            l if l.contains("GGML_METAL_HAS_TENSOR") => 2,
            _ => 0,
        };
        if line.starts_with("if") {
            let not = line.starts_with("ifndef") || line.contains('!');
            self.0.push(Branch {
                needs: if not { 0 } else { bit },
                forbids: if not { bit } else { 0 },
                never: line == "if 0",
            });
        } else if line.starts_with("else") {
            if let Some(last) = self.0.last_mut() {
                let known = last.needs | last.forbids != 0 || last.never;
                *last = Branch {
                    needs: last.forbids,
                    forbids: last.needs,
                    never: !known,
                };
            }
        } else if line.starts_with("endif") {
            self.0.pop();
        }
        true
    }

    /// What a line here needs and forbids; nothing where it is never compiled.
    fn of_line(&self) -> Option<(u8, u8)> {
        let all = |f: fn(&Branch) -> u8| self.0.iter().fold(0, |bits, branch| bits | f(branch));
        (!self.0.iter().any(|branch| branch.never)).then(|| (all(|b| b.needs), all(|b| b.forbids)))
    }
}
