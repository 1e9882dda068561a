//! `hae demo`: the same question twice, with llama.cpp's KV cache as it is and with HAE.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Attribute, Cell, ContentArrangement, Table};

use super::answer::answer;
use super::crops::CropArgs;
use super::inputs::picture;
use super::load::{Files, Setup};
use super::options::{ContextArgs, ModelArgs, PolicyArgs};
use super::{Done, interrupt};
use hae::answer::Answer;
use hae::chat::{Begin, ChatOptions};
use hae::embedded;
use hae::generate::Finish;
use hae::image::{self, Picture};
use hae::policy::PolicySpec;
use hae::quantile::median;
use hae::turn::Turn;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Prompt")]
pub struct Args {
    /// Picture to ask about [default: one inside this program]
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    #[command(flatten)]
    crops: CropArgs,
    /// The question
    #[arg(
        short,
        long,
        default_value = "Where is the red triangle?",
        value_name = "TEXT"
    )]
    prompt: String,
    /// Most tokens to write
    #[arg(short, long, default_value_t = 256, value_name = "N")]
    n_predict: u32,
    /// Times that each side answers
    ///
    /// By turns. The table shows medians.
    #[arg(short, long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    repetitions: u32,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub context: ContextArgs,
    #[command(flatten)]
    policy: PolicyArgs,
}

pub fn run(args: &Args) -> Result<Done> {
    let hae_options = args.policy.options()?;
    args.policy
        .refuse_unread(&[PolicySpec::hae().name], false)?;
    let picture = shown(args)?;
    let files = Files::find(&args.model)?;
    let (mut stock, mut hae) = (Vec::new(), Vec::new());
    // By turns, so that a machine that gets busier does not favour one side.
    for _ in 0..args.repetitions {
        stock.push(ask(args, &files, &picture, &PolicySpec::full())?);
        hae.push(ask(
            args,
            &files,
            &picture,
            &PolicySpec::new("hae", hae_options.clone()),
        )?);
        if stock
            .iter()
            .chain(&hae)
            .any(|x| x.finish == Finish::Cancelled)
        {
            return Ok(Done::Interrupted);
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{} on a {}x{} picture: {}",
        files.names().0,
        picture.width,
        picture.height,
        args.prompt
    )?;
    let mut table = table(&stock, &hae);
    if !out.is_terminal() {
        table.set_width(100);
    }
    writeln!(out, "{table}")?;
    Ok(Done::Whole)
}

/// The picture to ask about.
fn shown(args: &Args) -> Result<Picture> {
    let num_crops = args.crops.num_crops()?;
    if let Some(path) = &args.image {
        return Ok(picture(path, num_crops)?);
    }
    let name = Path::new("demo.png");
    let picture = image::decode(name, embedded::PICTURE, &image::Limits::default())?;
    // The embedded model has to see it at the scale that it was trained on.
    let scale = args
        .model
        .model
        .is_none()
        .then_some(embedded::PICTURE_CROPS);
    Ok(Picture {
        num_crops: num_crops.or(scale),
        ..picture
    })
}

/// One greedy answer in a context of its own.
fn ask(args: &Args, files: &Files, picture: &Picture, policy: &PolicySpec) -> Result<Answer> {
    let setup = Setup {
        files,
        model: &args.model,
        options: ChatOptions {
            context: args.context.options()?,
            rope: args.model.rope_factors,
            policy: policy.clone(),
            ..ChatOptions::default()
        },
        num_crops: picture.num_crops,
    };
    let turn = Turn {
        text: &args.prompt,
        pictures: std::slice::from_ref(picture),
        n_predict: Some(args.n_predict as usize),
        expected: None,
    };
    let begin = Begin {
        only: Some(turn),
        ..Begin::default()
    };
    let (mut chat, _) = setup.open(begin)?;
    interrupt::working(|| answer(&mut chat, turn, false))
}

/// Two columns and what the second saves. Neither side is empty.
fn table(stock: &[Answer], hae: &[Answer]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(
            ["", "llama.cpp (full)", "HAE", "HAE / full"]
                .map(|t| Cell::new(t).add_attribute(Attribute::Bold)),
        );
    table.add_row([
        "answer",
        stock[0].text.trim(),
        hae[0].text.trim(),
        if stock[0].text == hae[0].text {
            "same"
        } else {
            "differs"
        },
    ]);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut row = |name: &str, unit: &str, of: &dyn Fn(&Answer) -> f64| {
        let middle = |answers: &[Answer]| median(answers.iter().map(of)).unwrap_or_default();
        let (a, b) = (middle(stock), middle(hae));
        let show = |x: f64| {
            if unit.is_empty() {
                format!("{x:.0}")
            } else {
                format!("{x:.2} {unit}")
            }
        };
        let ratio = if a > 0.0 {
            format!("{:.2}", b / a)
        } else {
            String::new()
        };
        table.add_row([name.to_owned(), show(a), show(b), ratio]);
    };
    row("visual tokens in the prompt", "", &|x| {
        x.tokens.prompt.vision as f64
    });
    row("KV cells at the end", "", &|x| x.kv.cells.cells() as f64);
    row("KV cells at most", "", &|x| x.kv.cells.peak as f64);
    row("KV bytes in use at the end", "MiB", &|x| {
        mib(x.kv.bytes_in_use)
    });
    row("KV bytes allocated", "MiB", &|x| mib(x.kv.bytes_allocated));
    row("vision encode", "ms", &|x| x.timings.vision_encode_ms);
    row("prefill", "ms", &|x| x.timings.prefill_ms);
    row("time to first token (TTFT)", "ms", &|x| {
        x.timings.ttft_ms.unwrap_or(0.0)
    });
    row("time per token (TPOT)", "ms", &|x| {
        x.timings.tpot_ms.unwrap_or(0.0)
    });
    table
}
