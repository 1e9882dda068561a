//! Pictures that others made to test their readers: Pillow's (`Tests/images`) and pypng's (PngSuite), decoded by
//! hae, one process each, and by Pillow (`pictures.py`).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::python::{self, venv};
use crate::sdist::Sdist;
use crate::steps;

/// Below the repository's root; Git ignores it.
const FOLDER: &str = "target/oracle/pictures";
const SCRIPT: &str = include_str!("pictures.py");
/// A picture of these tests takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// Of a channel of 255, by which readers of JPEG and WebP may differ: each rounds in its own place.
const ROUNDING: u32 = 4;

const SOURCES: [Sdist; 2] = [
    Sdist {
        name: "pillow",
        version: "13.0.0",
        sha256: "cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510",
        within: "Tests/images",
    },
    Sdist {
        name: "pypng",
        version: "0.20220715.0",
        sha256: "739c433ba96f078315de54c0db975aee537cbc3e1d0ae4ed9aab0ca1e427e2c1",
        within: "code",
    },
];

/// PngSuite is a program there, that holds the files.
const PNGSUITE: &str = "import pngsuite
for name, data in pngsuite.png.items():
    open(name + '.png', 'wb').write(data)";

/// What is not as Pillow has it, and why: the end of a file's path or a part of what hae says, and the reason.
const KNOWN: [(&str, &str); 22] = [
    (
        "expected sides of at least 2",
        "a side of one pixel has no neighbours to resize between",
    ),
    (
        "badplanes.bmp",
        "damaged on purpose; Pillow looks at nothing but the pixels",
    ),
    (
        "badrle.bmp",
        "damaged on purpose; Pillow fills what is missing",
    ),
    (
        "rletopdown.bmp",
        "runs from top to bottom, which the format forbids",
    ),
    (
        "pal8os2v2.bmp",
        "the header of OS/2 2, which hae's reader does not know",
    ),
    (
        "truncated_app14.jpg",
        "damaged on purpose: a segment that is too short",
    ),
    (
        "chunk_no_fctl.png",
        "an animation that is broken behind its first frame, which is whole",
    ),
    (
        "rgb32bf.bmp",
        "channels in an order that Pillow does not read",
    ),
    (
        "rgb16-231.bmp",
        "channels of widths that Pillow does not read",
    ),
    (
        "rgb32-111110.bmp",
        "channels of widths that Pillow does not read",
    ),
    (
        "rgba16-4444.bmp",
        "channels of widths that Pillow does not read",
    ),
    ("pal2.bmp", "two bits a pixel, which Pillow does not read"),
    (
        "unknown_compression_method.png",
        "the number of the method is wrong, the data are whole",
    ),
    (
        "rletrns.bmp",
        "pixels that no run names: hae's reader and Pillow fill them with other colours",
    ),
    (
        "rgb32bf-abgr.bmp",
        "alpha is 0 everywhere, which hae takes for opaque",
    ),
    (
        "mmap_error.bmp",
        "its header says that the pixels begin within the palette",
    ),
    (
        "tbbn1g04.png",
        "Pillow compares a transparent grey of 4 bits with pixels of 8",
    ),
    (
        "exif_imagemagick_orientation.png",
        "its orientation stands in a text chunk; hae reads EXIF blocks",
    ),
    (
        "xmp_tags_orientation.png",
        "its orientation stands in XMP; hae reads EXIF blocks",
    ),
    (
        "xmp_tags_orientation_exiftool.png",
        "its orientation stands in XMP; hae reads EXIF blocks",
    ),
    (
        "app13.jpg",
        "4x4 pixels with colours at half the size: the readers interpolate otherwise",
    ),
    (
        "hopper_bad_exif.jpg",
        "its scan is damaged: hae's reader leaves the rest grey, Pillow goes on behind it",
    ),
];

#[derive(clap::Args)]
pub struct Args {
    /// Folder with the packages' sources (.tar.gz), where they were fetched before
    #[arg(long, value_name = "DIR")]
    sdists: Option<PathBuf>,
    /// Say of each picture what came of it
    #[arg(long)]
    all: bool,
}

/// What hae made of a file.
enum Ours {
    Decoded(PathBuf),
    Refused(String),
    /// Killed by a signal, or panicked.
    Crashed(String),
    Hung,
}

/// What Pillow made of it, beside ours.
#[derive(Deserialize)]
struct Theirs {
    /// None: of a kind that hae does not read.
    format: Option<String>,
    said: Option<String>,
    most: Option<u32>,
    apart: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Same,
    Rounding,
    Differs,
    BothRefuse,
    WeRefuse,
    TheyRefuse,
    Crashed,
}

const OUTCOMES: [(Outcome, &str); 7] = [
    (Outcome::Same, "same"),
    (Outcome::Rounding, "differ by rounding (most)"),
    (Outcome::Differs, "differ"),
    (Outcome::BothRefuse, "both refuse"),
    (Outcome::WeRefuse, "hae alone refuses"),
    (Outcome::TheyRefuse, "Pillow alone refuses"),
    (Outcome::Crashed, "crashed or hung"),
];

/// 0: nothing crashed, and every difference has a reason. 1: not so, and it was printed what.
///
/// # Errors
/// Without Python, pip, the network or the program, and when what comes is not what is pinned.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    let folder = root.join(FOLDER);
    let python = venv(&folder, &root.join("tests/oracle/pictures.txt"))?;
    let mut pictures = Vec::new();
    for package in &SOURCES {
        let given = args.sdists.as_ref().map(|given| given.join(package.file()));
        let sdist = package.fetch(&folder, &python, given.as_deref())?;
        let target = folder.join(package.name);
        package.unpack(&sdist, &target, &[""])?;
        if target.join("pngsuite.py").is_file() {
            python::run(
                Command::new(&python)
                    .args(["-c", PNGSUITE])
                    .current_dir(&target),
            )?;
        }
        find(&target, &mut pictures)?;
    }
    pictures.sort();
    let program = build(root)?;
    let shown = folder.join("rgb");
    fs::create_dir_all(&shown).with_context(|| shown.display().to_string())?;
    let mut ours = Vec::new();
    for (i, picture) in pictures.iter().enumerate() {
        ours.push(decode(&program, picture, &shown.join(format!("{i}.ppm")))?);
    }
    let theirs = compare(&folder, &python, &pictures, &ours)?;
    ensure!(theirs.len() == ours.len(), "pictures.py left some out");
    Ok(report(&folder, &pictures, &ours, &theirs, args.all))
}

/// All files below a folder.
fn find(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        match path.is_dir() {
            true => find(&path, found)?,
            false => found.push(path),
        }
    }
    Ok(())
}

/// The example that decodes.
fn build(root: &Path) -> Result<PathBuf> {
    let built = steps::cargo(root, &["build", "--release", "--example", "rgb"])?;
    ensure!(built.success(), "the build failed");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
    let name = format!("rgb{}", std::env::consts::EXE_SUFFIX);
    Ok(target.join("release/examples").join(name))
}

fn decode(program: &Path, picture: &Path, out: &Path) -> Result<Ours> {
    let said = out.with_extension("txt");
    let mut child = Command::new(program)
        .args([picture, out])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&said)?)
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            return Ok(Ours::Hung);
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let said = fs::read_to_string(&said).unwrap_or_default();
    let said = said.trim_end();
    Ok(match status.code() {
        Some(0) => Ours::Decoded(out.to_owned()),
        Some(1) if !said.contains('\n') && !said.is_empty() => {
            let reason = said.strip_prefix(&format!("{}: ", picture.display()));
            Ours::Refused(reason.unwrap_or(said).to_owned())
        }
        _ => Ours::Crashed(format!("{status}: {said:?}")),
    })
}

fn compare(
    folder: &Path,
    python: &Path,
    pictures: &[PathBuf],
    ours: &[Ours],
) -> Result<Vec<Theirs>> {
    let (script, list) = (folder.join("pictures.py"), folder.join("list.json"));
    fs::write(&script, SCRIPT).with_context(|| script.display().to_string())?;
    let all: Vec<(&PathBuf, Option<&PathBuf>)> = pictures
        .iter()
        .zip(ours)
        .map(|(picture, ours)| match ours {
            Ours::Decoded(rgb) => (picture, Some(rgb)),
            _ => (picture, None),
        })
        .collect();
    fs::write(&list, serde_json::to_vec(&all)?).with_context(|| list.display().to_string())?;
    let output = Command::new(python)
        .arg(&script)
        .arg(&list)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run Python")?;
    ensure!(output.status.success(), "pictures.py failed");
    serde_json::from_slice(&output.stdout).context("what pictures.py says")
}

fn outcome(ours: &Ours, theirs: &Theirs) -> Outcome {
    match (ours, theirs.most) {
        (Ours::Crashed(_) | Ours::Hung, _) => Outcome::Crashed,
        (Ours::Decoded(_), Some(0)) => Outcome::Same,
        (Ours::Decoded(_), Some(most)) if most <= ROUNDING => Outcome::Rounding,
        (Ours::Decoded(_), Some(_)) => Outcome::Differs,
        // The sizes, where something was said of them.
        (Ours::Decoded(_), None) => match theirs.said.as_deref() {
            Some(said) if said.contains(", not ") => Outcome::Differs,
            _ => Outcome::TheyRefuse,
        },
        (Ours::Refused(_), _) if theirs.said.is_some() => Outcome::BothRefuse,
        (Ours::Refused(_), _) => Outcome::WeRefuse,
    }
}

/// Prints the table, and below it what is not the same, with its reason.
fn report(folder: &Path, pictures: &[PathBuf], ours: &[Ours], theirs: &[Theirs], all: bool) -> u8 {
    let mut counts: BTreeMap<&str, BTreeMap<Outcome, (usize, u32)>> = BTreeMap::new();
    let (mut others, mut unexplained) = (0, 0);
    let mut lines = String::new();
    for ((picture, ours), theirs) in pictures.iter().zip(ours).zip(theirs) {
        let name = picture.strip_prefix(folder).unwrap_or(picture);
        let name = name.to_string_lossy().replace('\\', "/");
        let outcome = match (&theirs.format, ours) {
            (None, Ours::Refused(_)) => {
                others += 1;
                continue;
            }
            // What nobody can tell the format of is no picture, whatever hae takes it for.
            (None, Ours::Decoded(_)) => Outcome::Differs,
            _ => outcome(ours, theirs),
        };
        let format = theirs.format.as_deref().unwrap_or("none");
        let count = counts
            .entry(format)
            .or_default()
            .entry(outcome)
            .or_default();
        count.0 += 1;
        count.1 = count.1.max(theirs.most.unwrap_or(0));
        let reason = KNOWN
            .iter()
            .find(|(end, _)| name.ends_with(end))
            .map(|(_, r)| *r);
        let wants_reason = matches!(
            outcome,
            Outcome::Differs | Outcome::WeRefuse | Outcome::TheyRefuse | Outcome::Crashed
        );
        if outcome == Outcome::Crashed || wants_reason && reason.is_none() {
            unexplained += 1;
        }
        if all || wants_reason {
            let what = match ours {
                Ours::Decoded(_) => match (theirs.most, theirs.apart) {
                    (Some(most), Some(apart)) => {
                        format!("differs by {most} in {apart:.4} of values")
                    }
                    _ => String::new(),
                },
                Ours::Refused(reason) => format!("refused: {reason}"),
                Ours::Crashed(how) => format!("CRASHED: {how}"),
                Ours::Hung => "HUNG".to_owned(),
            };
            let said = theirs
                .said
                .as_deref()
                .map_or(String::new(), |s| format!("; Pillow: {s}"));
            let reason = reason.unwrap_or(if wants_reason { "NO REASON" } else { "" });
            let _ = writeln!(lines, "{name}: {what}{said} [{reason}]");
        }
    }
    print!("{}", table(&counts));
    println!("\n{others} files are of other formats, and refused.");
    print!("{lines}");
    u8::from(unexplained > 0)
}

fn table(counts: &BTreeMap<&str, BTreeMap<Outcome, (usize, u32)>>) -> String {
    let heads: Vec<&str> = OUTCOMES.iter().map(|(_, head)| *head).collect();
    let mut out = format!("| format | files | {} |\n", heads.join(" | "));
    let _ = writeln!(out, "|---|{}", "---|".repeat(heads.len() + 1));
    for (format, by_outcome) in counts {
        let files: usize = by_outcome.values().map(|(n, _)| n).sum();
        let _ = write!(out, "| {format} | {files} |");
        for (outcome, _) in OUTCOMES {
            let (n, most) = by_outcome.get(&outcome).copied().unwrap_or_default();
            let _ = match outcome {
                Outcome::Rounding if n > 0 => write!(out, " {n} ({most}) |"),
                _ => write!(out, " {n} |"),
            };
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn theirs(said: Option<&str>, most: Option<u32>) -> Theirs {
        Theirs {
            format: Some("PNG".into()),
            said: said.map(str::to_owned),
            most,
            apart: most.map(|_| 0.5),
        }
    }

    #[test]
    fn what_came_of_a_picture() {
        let decoded = || Ours::Decoded("a".into());
        let refused = || Ours::Refused("no".into());
        for (ours, said, most, expected) in [
            (decoded(), None, Some(0), Outcome::Same),
            (decoded(), None, Some(ROUNDING), Outcome::Rounding),
            (decoded(), None, Some(ROUNDING + 1), Outcome::Differs),
            (decoded(), Some("2x1, not 1x2"), None, Outcome::Differs),
            (decoded(), Some("OSError: no"), None, Outcome::TheyRefuse),
            (refused(), Some("OSError: no"), None, Outcome::BothRefuse),
            (refused(), None, None, Outcome::WeRefuse),
            (Ours::Hung, None, None, Outcome::Crashed),
            (
                Ours::Crashed("9".into()),
                Some("no"),
                None,
                Outcome::Crashed,
            ),
        ] {
            assert_eq!(outcome(&ours, &theirs(said, most)), expected);
        }
    }

    #[test]
    fn the_table_has_a_row_for_each_format() {
        let row = BTreeMap::from([(Outcome::Same, (3, 0)), (Outcome::Rounding, (2, 1))]);
        let table = table(&BTreeMap::from([("PNG", row)]));
        assert!(
            table.ends_with("| PNG | 5 | 3 | 2 (1) | 0 | 0 | 0 | 0 | 0 |\n"),
            "{table}"
        );
    }
}
