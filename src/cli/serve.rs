//! `hae serve`: a model for others, by HTTP.

mod model;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::calibration::CalibrationArgs;
use super::crops::CropArgs;
use super::load::{self, Files};
use super::options::{
    ContextArgs, FitArgs, ModelArgs, POLICY, PolicyArgs, SamplerArgs, TemplateArgs,
};
use super::{Done, inputs, interrupt, note, warn};
use hae::Error;
use hae::build::build;
use hae::constrain::Grammars;
use hae::llama::Model;
use hae::memory::Work;
use hae::policy::Limits;
use hae::serve::hall::{self, HallOptions};
use hae::serve::http::listen;
use hae::serve::http::service::{About, Constrain, Render, Rules, Service};

/// Answers under way may go on for so long once the program is asked to end.
const DRAIN: Duration = Duration::from_secs(10);

/// Steps are shared and so are cells, the slot's prompt is used, caches are whole, and nothing is shifted or
/// warmed up.
const AS_IT_IS: [&str; 8] = [
    "kv-unified",
    "swa-full",
    "cache-prompt",
    "no-context-shift",
    "no-cache-idle-slots",
    "no-warmup",
    "perf",
    "no-perf",
];

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server", allow_negative_numbers = true)]
pub struct Args {
    /// Address to listen at; several with commas between them
    ///
    /// With another one than this machine's own, others can ask: give an --api-key then.
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    host: String,
    /// Port to listen at; 0: any that is free
    #[arg(long, default_value_t = 8080, value_name = "N")]
    port: u16,
    /// Name of the model; several with commas between them [default: the file's]
    #[arg(short, long, value_delimiter = ',', value_name = "NAME")]
    alias: Vec<String>,
    /// Tags of the model that /v1/models shows; several with commas between them
    #[arg(
        long,
        hide_short_help = true,
        value_delimiter = ',',
        value_name = "TAG"
    )]
    tags: Vec<String>,
    /// Key that requests have to come with; several with commas between them
    ///
    /// As Authorization: Bearer KEY, or X-Api-Key: KEY. Other users of this machine can read a command
    /// line: --api-key-file is safer.
    #[arg(long, value_delimiter = ',', value_name = "KEY")]
    api_key: Vec<String>,
    /// File with a key on each line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// -np: conversations at the same time, which share the context
    ///
    /// [default: 4; 1 where the model's cache holds one, or with --attend]
    #[arg(long, value_name = "N")]
    parallel: Option<u32>,
    /// Questions that may wait for a slot
    #[arg(long, hide_short_help = true, default_value_t = 64, value_name = "N")]
    queue: usize,
    /// -to: seconds that an answer may take, waiting included
    #[arg(long, hide_short_help = true, default_value_t = 3600, value_name = "N")]
    timeout: u64,
    /// Most tokens of an answer where a request does not say; -1: no limit
    #[arg(short, long, alias = "predict", default_value_t = -1, value_name = "N")]
    n_predict: i64,
    /// Folder of pictures that requests may name
    ///
    /// As file://NAME or by their path. Without it pictures come in the requests themselves.
    #[arg(long, value_name = "FOLDER")]
    media_path: Option<PathBuf>,
    /// Fetch pictures from other machines
    ///
    /// By https, from the public internet alone, within limits of size and time.
    #[arg(long)]
    media_remote: bool,
    /// Folder of slots that are kept in files
    #[arg(long, value_name = "FOLDER")]
    slot_save_path: Option<PathBuf>,
    /// Show counts for Prometheus at /metrics
    #[arg(long)]
    metrics: bool,
    /// Show what each slot does at /slots [the default]
    #[arg(long, hide_short_help = true, overrides_with = "no_slots")]
    slots: bool,
    /// Do not show it
    #[arg(long, hide_short_help = true, overrides_with = "slots")]
    no_slots: bool,
    /// No page for people at /
    #[arg(long, hide_short_help = true, aliases = ["no-webui", "no-ui"])]
    no_page: bool,
    /// Web pages that may ask: *, localhost, or origins such as https://app.example
    ///
    /// Several with commas between them. Without it no page of another origin may.
    #[arg(
        long,
        hide_short_help = true,
        value_delimiter = ',',
        value_name = "ORIGIN"
    )]
    cors_origins: Vec<String>,
    /// MiB of a request at most
    #[arg(long, hide_short_help = true, default_value_t = 64, value_name = "N")]
    body_mib: u32,
    /// Pictures of a request at most
    #[arg(long, hide_short_help = true, default_value_t = 16, value_name = "N")]
    max_pictures: usize,
    #[command(flatten)]
    crops: CropArgs,
    /// llama-server's flags for what is so here in any case: scripts may say them
    #[arg(
        long = "cont-batching",
        aliases = AS_IT_IS,
        hide = true,
        action = clap::ArgAction::Count
    )]
    _as_it_is: u8,
    /// Whether the model thinks first, where its template knows enable_thinking: on, off, or auto, which is on
    #[arg(
        long,
        hide_short_help = true,
        default_value = "auto",
        value_parser = ["on", "off", "auto"],
        value_name = "WHETHER"
    )]
    reasoning: String,
    /// Answers are told as the model writes them, thoughts included
    #[arg(long, hide = true, value_parser = ["none"])]
    _reasoning_format: Option<String>,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub context: ContextArgs,
    #[command(flatten)]
    fit: FitArgs,
    #[command(flatten)]
    sampler: SamplerArgs,
    /// full keeps all, hae prunes
    ///
    /// For requests that say nothing of it. full is llama.cpp's cache as it is. hae drops the visual tokens
    /// that the question does not look at. hae help policies lists those to compare with.
    #[arg(
        long,
        default_value = "full",
        value_name = "NAME",
        help_heading = POLICY
    )]
    kv_policy: String,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Show llama.cpp's log on stderr, and in answers their prompts and settings
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

pub fn run(args: &Args) -> Result<Done> {
    if args.verbose {
        super::show_log();
    }
    let policy_options = args.policy.options()?;
    args.policy.refuse_unread(&[&args.kv_policy], false)?;
    let mut rules = args.rules()?;
    let mut template = args.template.template()?;
    // Templates that ask for it are told so in any case, as by llama.cpp's server.
    let thinks = args.reasoning != "off";
    let kwargs = &mut template.kwargs;
    kwargs.entry("enable_thinking").or_insert(thinks.into());
    // A port that is taken is better said before the model is loaded.
    let listeners = args.listeners()?;
    let addresses = listeners.iter().map(TcpListener::local_addr);
    let addresses = addresses
        .collect::<std::io::Result<Vec<_>>>()
        .context("socket")?;
    rules.only_local_hosts = addresses.iter().all(|address| address.ip().is_loopback());
    if !rules.only_local_hosts && rules.keys.is_empty() {
        warn("whoever reaches this machine can ask: give an --api-key");
    }
    let files = Files::find(&args.model)?;
    rules.num_crops = args.crops.num_crops()?.or(files.scale());
    let named = (&*args.kv_policy, &args.policy);
    let (policy, calibrated) = args.calibration.policy(&files, named, policy_options)?;
    args.context.refuse_unread(&policy)?;
    let sampler = args.sampler.options(load::clock_seed())?;
    let mut context = args.context.options()?;
    context.n_seq_max = args.parallel.unwrap_or(hall::SLOTS);
    let flags = (&args.model, &args.context, &args.fit);
    let (model, context) = load::fitted(&files, flags, context, (&policy, &Work::default()))?;
    let options = HallOptions {
        rope: args.model.rope_factors,
        policy: policy.clone(),
        sampler,
        n_parallel: args.parallel,
        queue: args.queue,
        alias: args.alias.first().cloned().or_else(|| files.alias()),
        context,
        ..HallOptions::default()
    };
    let args_of_model = model;
    let model = load::load_model(&files, &args_of_model)?;
    let vision = load::load_vision(&files, &args_of_model, options.context.n_threads, &model)?;
    if let (Some(n), Some(vision)) = (rules.num_crops, &vision) {
        vision.check_num_crops(n)?;
    }
    let made = template.of(&model)?;
    load::warn_about_template(&model, &template, made.as_ref());
    let render = made.map(|made| {
        let kwargs = template.kwargs.clone();
        Arc::new(model::Template { made, kwargs }) as Arc<dyn Render>
    });
    let constrain = grammars(&model);
    let (n_layer, eog) = (model.n_layer(), model.ends());
    let hall = hall::open(options, model, vision).map_err(|e| match &calibrated {
        Some(calibrated) => calibrated.blamed(e.into()),
        None => e.into(),
    })?;
    let facts = hall.facts();
    let about = About {
        aliases: args.alias.clone(),
        tags: args.tags.clone(),
        build: fingerprint(),
        limits: Limits {
            n_layer,
            n_cells: facts.n_ctx,
        },
        eog,
        sampler,
        random_seed: args.sampler.is_random(),
        policy,
        attend: facts.attend.unwrap_or_default(),
    };
    let slots = facts.slots;
    let service = Service::new(hall, render, constrain, about, rules);
    tell(&addresses, slots)?;
    interrupt::working(|| listen::run(listeners, &service, DRAIN, interrupt::cancelled))?;
    Ok(Done::Whole)
}

/// Where it listens, on stdout, for people and for programs that wait for it.
fn tell(addresses: &[SocketAddr], slots: usize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for address in addresses {
        writeln!(out, "listening at http://{address}").context("stdout")?;
    }
    out.flush().context("stdout")?;
    let plural = if slots == 1 { "" } else { "s" };
    note(&format!(
        "{slots} slot{plural}; Ctrl-C ends it once its answers are out"
    ));
    Ok(())
}

/// A vocabulary that grammars cannot be made for serves all else.
fn grammars(model: &Model) -> Option<Arc<dyn Constrain>> {
    match Grammars::of(model) {
        Ok(grammars) => Some(Arc::new(model::Rules(grammars))),
        Err(e) => {
            warn(&format!(
                "grammars and schemas cannot be used with this model: {e}"
            ));
            None
        }
    }
}

/// llama.cpp's begins with b, too.
fn fingerprint() -> String {
    let build = build();
    format!("b{}-hae-{}", build.llama_cpp_sys_2, build.version)
}

impl Args {
    fn rules(&self) -> Result<Rules> {
        let mut keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            let text = inputs::text(path)?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let before = keys.len();
            keys.extend(lines.map(str::to_owned));
            if keys.len() == before {
                return Err(Error::file(path, "holds no key, expected one on each line").into());
            }
        }
        if keys.iter().any(|key| key.trim().is_empty()) {
            return Err(Error::option("--api-key", "is empty").into());
        }
        if self.timeout == 0 {
            return Err(Error::option("--timeout", "0 seconds, expected at least 1").into());
        }
        if self.parallel == Some(0) {
            return Err(Error::option("--parallel", "0 slots, expected at least 1").into());
        }
        let n = self.n_predict;
        let n_predict = match usize::try_from(n) {
            Ok(n) => Some(n),
            Err(_) if n >= -2 => None,
            Err(_) => {
                return Err(Error::option("-n", format!("{n}, expected -1 or more")).into());
            }
        };
        Ok(Rules {
            keys,
            media_path: folder("--media-path", self.media_path.as_deref())?,
            media_remote: self.media_remote,
            slot_save_path: folder("--slot-save-path", self.slot_save_path.as_deref())?,
            metrics: self.metrics,
            show_slots: !self.no_slots,
            page: !self.no_page,
            origins: self.cors_origins.clone(),
            verbose: self.verbose,
            body: (self.body_mib.max(1) as usize) << 20,
            pictures: self.max_pictures,
            n_predict,
            timeout: Duration::from_secs(self.timeout),
            ..Rules::default()
        })
    }

    /// A socket for each host.
    fn listeners(&self) -> Result<Vec<TcpListener>> {
        let hosts = self.host.split(',').map(str::trim);
        hosts
            .map(|host| {
                let bare = host.trim_start_matches('[').trim_end_matches(']');
                let wrong = |reason: String| Error::option("--host", reason);
                let found = (bare, self.port).to_socket_addrs();
                let found = found.map_err(|e| wrong(format!("{host:?} cannot be found: {e}")))?;
                let found: Vec<SocketAddr> = found.collect();
                TcpListener::bind(&found[..]).map_err(|e| {
                    let at = format!("{host}:{}", self.port);
                    wrong(format!("cannot listen at {at}: {e}")).into()
                })
            })
            .collect()
    }
}

/// A folder that is there.
fn folder(flag: &'static str, path: Option<&Path>) -> Result<Option<PathBuf>> {
    match path {
        Some(path) if !path.is_dir() => {
            let reason = format!("{} is no folder", path.display());
            Err(Error::option(flag, reason).into())
        }
        path => Ok(path.map(Path::to_owned)),
    }
}
