//! `hae plan`: what a run will take of which memory, and whether it fits, before anything is loaded.

use std::io::Write;

use anyhow::{Context, Result};

use super::Done;
use super::crops::CropArgs;
use super::load::{self, Files};
use super::options::{ContextArgs, FitArgs, ModelArgs, POLICY, PolicyArgs};
use super::output::Format;
use super::table::Columns;
use hae::memory::{Estimate, Share, Work};
use hae::policy::PolicySpec;

/// Pixels of a side that a picture may have here.
const MOST_PIXELS: u32 = 1 << 14;

#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "Exit code 1: it does not fit."
)]
pub struct Args {
    /// Pictures: 5x1344x1344
    ///
    /// How many, and their width and height in pixels. Repeat for other sizes, or put commas between them.
    #[arg(long, value_name = "NxWxH", value_delimiter = ',', value_parser = pictures)]
    images: Vec<(u32, u32, u32)>,
    #[command(flatten)]
    crops: CropArgs,
    /// Tokens of text in the prompt [default: a full context]
    #[arg(short = 'p', long, value_name = "N")]
    n_prompt: Option<u32>,
    /// Tokens to write [default: a full context]
    #[arg(short = 'n', long, value_name = "N")]
    n_gen: Option<u32>,
    /// -np: conversations at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    parallel: u32,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub context: ContextArgs,
    #[command(flatten)]
    pub fit: FitArgs,
    /// Policy that rules the cache
    #[arg(long, default_value = "full", value_name = "NAME", help_heading = POLICY)]
    kv_policy: String,
    #[command(flatten)]
    policy: PolicyArgs,
    /// text, or one json object
    #[arg(short, long, value_enum, hide_possible_values = true, default_value_t = Format::Text, value_name = "FORMAT", help_heading = "Output")]
    output: Format,
    /// Show llama.cpp's log on stderr
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

/// `5x1344x1344`, or `1344x1344` for one.
fn pictures(text: &str) -> Result<(u32, u32, u32), String> {
    let expected =
        || format!("expected NxWIDTHxHEIGHT, sides up to {MOST_PIXELS}, as in 5x1344x1344");
    let numbers = text
        .split('x')
        .map(|n| n.parse().ok())
        .collect::<Option<Vec<u32>>>();
    let (n, w, h) = match numbers.as_deref() {
        Some(&[w, h]) => (1, w, h),
        Some(&[n, w, h]) => (n, w, h),
        _ => return Err(expected()),
    };
    let side = |pixels| (1..=MOST_PIXELS).contains(&pixels);
    match side(w) && side(h) && n <= 1 << 12 {
        true => Ok((n, w, h)),
        false => Err(expected()),
    }
}

pub fn run(args: &Args) -> Result<Done> {
    if args.verbose {
        super::show_log();
    }
    let policy = PolicySpec {
        name: args.kv_policy.clone(),
        options: args.policy.options()?,
    };
    args.policy.refuse_unread(&[&policy.name], false)?;
    let num_crops = args.crops.num_crops()?;
    let sizes = args.images.iter();
    let work = Work {
        pictures: sizes
            .flat_map(|&(n, w, h)| std::iter::repeat_n((w, h, num_crops), n as usize))
            .collect(),
        n_prompt: args.n_prompt.map(|n| n as usize),
        n_predict: args.n_gen.map(|n| n as usize),
    };
    let mut context = args.context.options()?;
    context.n_seq_max = args.parallel;
    let files = Files::find(&args.model)?;
    let chosen = load::measured(
        &files,
        &args.model,
        &context,
        args.fit.may(&args.model, &args.context),
        args.fit.margin(),
        (&policy, &work),
    )?;
    let mut out = std::io::stdout().lock();
    match args.output {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&chosen)?),
        Format::Text => print(&mut out, &chosen.estimate, chosen.n_gpu_layers, &policy),
    }
    .context("stdout")?;
    Ok(match chosen.estimate.fits {
        true => Done::Whole,
        false => Done::Missed,
    })
}

/// One of a share's numbers.
type Bytes = fn(&Share) -> u64;

fn mib(bytes: u64) -> String {
    match bytes {
        0 => String::new(),
        _ => format!("{:.1}", bytes as f64 / f64::from(1 << 20)),
    }
}

fn print(
    out: &mut impl Write,
    estimate: &Estimate,
    layers: Option<u32>,
    policy: &PolicySpec,
) -> std::io::Result<()> {
    let used: Vec<&Share> = estimate
        .places
        .iter()
        .filter(|share| share.all() > 0)
        .collect();
    let mut columns = Columns::default();
    columns.add("MiB", false, &used, |share| {
        let device = share.place.device.clone();
        device.unwrap_or_else(|| "main memory".into())
    });
    let all: [(&str, Bytes); 8] = [
        ("weights", |s| s.weights),
        ("KV", |s| s.kv),
        ("compute", |s| s.compute),
        ("vision", |s| s.vision),
        ("encoding", |s| s.encoding),
        ("pictures", |s| s.pictures),
        ("trial", |s| s.trial),
        ("all", Share::all),
    ];
    for (title, of) in all {
        columns.add(title, true, &used, |share| mib(of(share)));
    }
    columns.add("free", true, &used, |share| {
        share.place.free.map_or("?".into(), mib)
    });
    writeln!(out, "{}", columns.table())?;
    let (cells, kv) = (estimate.cells, estimate.kv);
    let (k, v) = (estimate.type_k.name(), estimate.type_v.name());
    writeln!(
        out,
        "KV cache: {} cells, K {k}, V {v}: {} MiB",
        cells.full,
        mib(kv.full)
    )?;
    if cells.decoding != cells.full || cells.prompt != cells.full {
        writeln!(
            out,
            "under {}: at most {} cells ({} MiB) while the prompt is read, {} ({} MiB) while the answer is written",
            policy.name,
            cells.prompt,
            mib(kv.prompt),
            cells.decoding,
            mib(kv.decoding),
        )?;
    }
    if estimate.image_tokens > 0 {
        writeln!(out, "pictures: {} tokens", estimate.image_tokens)?;
    }
    if let Some(layers) = layers {
        writeln!(out, "layers on the GPU: {layers}")?;
    }
    let margin = match estimate.margin {
        0 => String::new(),
        margin => format!(" with {} MiB to spare", mib(margin)),
    };
    match estimate.fits {
        true => writeln!(out, "{} MiB: fits{margin}", mib(estimate.bytes)),
        false => writeln!(out, "{} MiB: does not fit{margin}", mib(estimate.bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::pictures;

    #[test]
    fn pictures_are_a_number_and_two_sides() {
        assert_eq!(pictures("5x1344x672"), Ok((5, 1344, 672)));
        assert_eq!(pictures("336x336"), Ok((1, 336, 336)));
        for wrong in [
            "",
            "5",
            "1x2x3x4",
            "5x0x1",
            "1x1x16385",
            "ax1x1",
            "-1x2x3",
            "4097x1x1",
        ] {
            assert!(pictures(wrong).is_err(), "{wrong}");
        }
    }
}
