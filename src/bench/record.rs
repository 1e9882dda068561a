//! A row of the results: what was measured, on what, how often, and what came out.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::stats::{Summary, ratio};
use super::{Pictures, Sample, Test};
use crate::attend::{Attend, Attended, Shares};
use crate::build::Build;
use crate::error::Result;
use crate::llama::{CacheType, FlashAttention, Model, Poll, devices};

/// The machine, as ggml sees it.
#[derive(Clone, Debug)]
pub struct Hardware {
    /// The processor's description; empty where ggml has none of it.
    pub cpu: String,
    /// The descriptions of all GPUs, with commas between them; empty without one.
    pub gpu: String,
    /// The names of all devices, those of GPUs first, with commas between them.
    pub backends: String,
}

impl Hardware {
    /// # Errors
    /// As [`devices`].
    pub fn here() -> Result<Self> {
        let devices = devices()?;
        let (gpus, others): (Vec<_>, Vec<_>) = devices.into_iter().partition(|d| d.is_gpu);
        let joined = |list: Vec<String>| list.join(", ");
        let cpu = others.iter().find(|d| d.name == "CPU");
        Ok(Hardware {
            cpu: cpu.map_or_else(String::new, |d| d.description.clone()),
            gpu: joined(gpus.iter().map(|d| d.description.clone()).collect()),
            backends: joined(gpus.iter().chain(&others).map(|d| d.name.clone()).collect()),
        })
    }
}

/// The model that was measured.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// The text model's file name, as shown.
    pub file: String,
    /// The vision file's name, if there is one.
    pub mmproj: Option<String>,
    /// As [`Model::description`].
    pub description: String,
    /// Bytes of the weights.
    pub bytes: u64,
    /// Number of weights.
    pub n_params: u64,
}

impl ModelInfo {
    /// `names` are those of the model's and the vision file.
    pub fn new(model: &Model, names: (String, Option<String>)) -> Self {
        ModelInfo {
            file: names.0,
            mmproj: names.1,
            description: model.description(),
            bytes: model.bytes(),
            n_params: model.n_params(),
        }
    }
}

/// How the contexts were made.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Cells that the cache can hold.
    pub n_ctx: u32,
    /// Cells that the cache begins with; `None`: all of them, for good.
    pub kv_size: Option<u32>,
    /// Rows of one decode call.
    pub n_batch: u32,
    /// Rows that are computed at once.
    pub n_ubatch: u32,
    /// Threads of the processor.
    pub n_threads: i32,
    /// How eagerly threads wait for work.
    pub poll: Poll,
    /// `None`: llama.cpp's choice.
    pub n_gpu_layers: Option<u32>,
    /// As it was used.
    pub flash_attention: FlashAttention,
    /// What K is stored as.
    pub type_k: CacheType,
    /// What V is stored as.
    pub type_v: CacheType,
    /// As [`crate::open::rope_name`].
    pub rope_factors: &'static str,
}

/// A test under one policy.
#[derive(Clone, Debug)]
pub struct Record {
    /// What measured.
    pub build: Build,
    /// On which machine.
    pub hardware: Hardware,
    /// With which model.
    pub model: ModelInfo,
    /// In which contexts.
    pub settings: Settings,
    /// What was fed and timed.
    pub test: Test,
    /// What stood for pictures.
    pub pictures: Pictures,
    /// Rows that a picture takes.
    pub image_tokens: usize,
    /// The policy's name.
    pub policy: &'static str,
    /// Every parameter of the policy with its value.
    pub params: Value,
    /// What decoded tokens were to attend to; `None`: everything.
    pub attend: Option<Attend>,
    /// When the last repetition ended.
    pub time: SystemTime,
    /// One for each repetition, in their order.
    pub samples: Vec<Sample>,
    /// The first policy of the list and its samples, for all others.
    pub first: Option<(&'static str, Vec<Sample>)>,
}

/// A figure that each repetition has, or does not have.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its column in the results, with its unit at the end.
    pub name: &'static str,
    /// Reads it from a repetition; `None` where that has none.
    pub of: fn(&Sample) -> Option<f64>,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn per_second(n: usize, d: Duration) -> Option<f64> {
    (n > 0 && !d.is_zero()).then(|| n as f64 / d.as_secs_f64())
}

/// The columns that have a spread.
pub const METRICS: [Metric; 9] = [
    Metric {
        name: "encode_ms",
        of: |s| (!s.encode.is_zero()).then(|| ms(s.encode)),
    },
    Metric {
        name: "probe_ms",
        of: |s| (!s.probe.is_zero()).then(|| ms(s.probe)),
    },
    Metric {
        name: "prefill_ms",
        of: |s| s.ttft().map(|_| ms(s.prefill)),
    },
    Metric {
        name: "ttft_ms",
        of: |s| s.ttft().map(ms),
    },
    Metric {
        name: "tpot_ms",
        of: |s| s.tpot().map(ms),
    },
    Metric {
        name: "total_ms",
        of: |s| s.ttft().map(|_| ms(s.total())),
    },
    Metric {
        name: "prompt_tokens_per_s",
        of: |s| per_second(s.prompt.total(), s.probe + s.prefill),
    },
    Metric {
        name: "gen_tokens_per_s",
        of: |s| per_second(s.steps, s.decode),
    },
    Metric {
        name: "joules",
        of: |s| s.joules,
    },
];

/// What a field holds, for formats with types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Kind {
    /// A string, or an object for formats that have them.
    Text,
    /// A whole number.
    Integer,
    /// A number with a fraction.
    Real,
}

/// A column and its value; null: not measured, or does not apply.
#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    /// The column's name.
    pub name: String,
    /// What every record has in this column, beside null.
    pub kind: Kind,
    /// The value, of this kind, or null.
    pub value: Value,
}

/// Fields in their order.
#[derive(Default)]
struct Fields(Vec<Field>);

impl Fields {
    fn add(&mut self, kind: Kind, name: &str, value: Value) {
        let name = name.to_owned();
        self.0.push(Field { name, kind, value });
    }

    fn text(&mut self, name: &str, value: impl Serialize) {
        self.add(Kind::Text, name, json!(value));
    }

    fn integer(&mut self, name: &str, value: impl Serialize) {
        self.add(Kind::Integer, name, json!(value));
    }

    fn real(&mut self, name: &str, value: impl Serialize) {
        self.add(Kind::Real, name, json!(value));
    }

    fn summary(&mut self, name: &str, summary: Option<Summary>) {
        for (part, value) in [
            ("median", summary.map(|s| s.median)),
            ("q1", summary.map(|s| s.q1)),
            ("q3", summary.map(|s| s.q3)),
        ] {
            self.add(Kind::Real, &format!("{name}_{part}"), json!(value));
        }
    }
}

impl Record {
    /// The metric's quartiles over the repetitions that have it.
    pub fn summary(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<Summary> {
        let values: Vec<f64> = self.samples.iter().filter_map(of).collect();
        Summary::of(&values)
    }

    /// How many times as long as under the first policy.
    pub fn ratio(&self, of: fn(&Sample) -> Option<f64>) -> Option<Summary> {
        let values = |samples: &[Sample]| samples.iter().filter_map(of).collect::<Vec<f64>>();
        let (_, first) = self.first.as_ref()?;
        ratio(&values(&self.samples), &values(first))
    }

    /// Times whose spread is too large to tell small differences.
    pub fn noisy(&self) -> impl Iterator<Item = (&'static str, Summary)> {
        let metrics = METRICS.iter().filter(|m| m.name.ends_with("_ms"));
        metrics.filter_map(|m| {
            let summary = self.summary(m.of).filter(Summary::is_noisy)?;
            Some((m.name, summary))
        })
    }

    /// Every column, the same ones in the same order for every record.
    pub fn fields(&self) -> Vec<Field> {
        let mut all = Fields::default();
        self.origin(&mut all);
        self.question(&mut all);
        self.result(&mut all);
        all.0
    }

    /// An object of all columns, and each repetition's figures.
    pub fn to_json(&self) -> Value {
        let mut object: Map<String, Value> = self
            .fields()
            .into_iter()
            .map(|field| (field.name, field.value))
            .collect();
        let samples = METRICS.iter().map(|metric| {
            let values: Vec<Option<f64>> = self.samples.iter().map(metric.of).collect();
            (metric.name.to_owned(), json!(values))
        });
        object.insert("samples".into(), Value::Object(samples.collect()));
        Value::Object(object)
    }

    /// What measured, and on what.
    fn origin(&self, all: &mut Fields) {
        let Build {
            version,
            llama_cpp_2,
            llama_cpp_sys_2,
            ggml,
            system,
        } = &self.build;
        all.text("hae_version", version);
        all.text("llama_cpp_2", llama_cpp_2);
        all.text("llama_cpp_sys_2", llama_cpp_sys_2);
        all.text("ggml", ggml);
        all.text("system_info", system);
        all.text("cpu_info", &self.hardware.cpu);
        all.text("gpu_info", &self.hardware.gpu);
        all.text("backends", &self.hardware.backends);
        all.text("model_filename", &self.model.file);
        all.text("mmproj_filename", &self.model.mmproj);
        all.text("model_type", &self.model.description);
        all.integer("model_size", self.model.bytes);
        all.integer("model_n_params", self.model.n_params);
    }

    /// What was asked for.
    fn question(&self, all: &mut Fields) {
        let s = &self.settings;
        all.integer("n_ctx", s.n_ctx);
        all.integer("kv_size", s.kv_size);
        all.integer("n_batch", s.n_batch);
        all.integer("n_ubatch", s.n_ubatch);
        all.integer("n_threads", s.n_threads);
        all.integer("poll", u32::from(s.poll));
        all.integer("n_gpu_layers", s.n_gpu_layers);
        all.text("flash_attn", s.flash_attention);
        all.text("type_k", s.type_k);
        all.text("type_v", s.type_v);
        all.text("rope_factors", s.rope_factors);
        all.text("kv_policy", self.policy);
        all.text("kv_params", &self.params);
        all.text("attend", self.attend);
        all.text("test", self.test.name());
        all.integer("n_prompt", self.test.n_prompt());
        all.integer("n_gen", self.test.n_gen());
        all.integer("n_depth", self.test.n_depth);
        all.integer("depth_copies", u8::from(self.test.depth_copies));
        all.integer("n_images", self.test.n_images());
        all.integer("n_turns", self.test.turns.len());
        let shown = self.test.n_images() > 0;
        let (width, height, crops) = match self.pictures {
            Pictures::Noise {
                width,
                height,
                num_crops,
            } if shown => (Some(width), Some(height), num_crops),
            _ => (None, None, None),
        };
        all.integer("image_width", width);
        all.integer("image_height", height);
        all.integer("num_crops", crops);
        all.integer("image_tokens", shown.then_some(self.image_tokens));
        all.integer("repetitions", self.samples.len());
        let time = self.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        all.integer("test_time", time.as_secs());
    }

    /// What came out.
    fn result(&self, all: &mut Fields) {
        for metric in &METRICS {
            all.summary(metric.name, self.summary(metric.of));
        }
        let middle = |of: fn(&Sample) -> u64| {
            let mut values: Vec<u64> = self.samples.iter().map(of).collect();
            values.sort_unstable();
            values.get(values.len().saturating_sub(1) / 2).copied()
        };
        let longest = |of: fn(&Sample) -> f64| self.samples.iter().map(of).reduce(f64::max);
        all.integer("kv_cells_end", middle(|s| s.cells.cells() as u64));
        all.integer("kv_cells_peak", middle(|s| s.cells.peak as u64));
        all.integer("kv_bytes_in_use", middle(Sample::bytes_in_use));
        all.integer("kv_bytes_peak", middle(Sample::bytes_peak));
        all.integer("kv_bytes_allocated", middle(|s| s.kv.allocated));
        all.integer("kv_bytes_allocated_peak", middle(|s| s.allocated_peak));
        let shares = self.attended();
        let vision = shares.and_then(|shares| shares.vision);
        all.real("attended", shares.map(|shares| shares.all));
        all.real("attended_vision", vision);
        all.integer("evicted_text", middle(|s| s.cells.evicted.text as u64));
        all.integer("evicted_vision", middle(|s| s.cells.evicted.vision as u64));
        all.integer("bin_rows_out", middle(|s| s.bin.rows_out));
        all.integer("bin_rows_back", middle(|s| s.bin.rows_back));
        all.integer("bin_rows_decoded", middle(|s| s.bin.rows_decoded));
        all.real("bin_ms", longest(|s| ms(s.bin.time)));
        all.real("bin_pause_ms", longest(|s| ms(s.bin.pause)));
        all.integer("peak_rss_bytes", self.peak_rss());
        all.text("compared_with", self.first.as_ref().map(|(name, _)| name));
        all.summary("ttft_ratio", self.ratio(|s| s.ttft().map(ms)));
        all.summary("tpot_ratio", self.ratio(|s| s.tpot().map(ms)));
        all.summary(
            "total_ratio",
            self.ratio(|s| s.ttft().map(|_| ms(s.total()))),
        );
        all.integer("noisy", u8::from(self.noisy().next().is_some()));
    }

    /// What decoded tokens attended to over all repetitions, where they looked cells up.
    pub fn attended(&self) -> Option<Shares> {
        let mut all = Attended::default();
        for sample in &self.samples {
            all += sample.attended;
        }
        all.shares()
    }

    /// The most that any repetition held.
    pub fn peak_rss(&self) -> Option<u64> {
        self.samples.iter().filter_map(|s| s.peak_rss).max()
    }
}

impl Sample {
    /// Bytes of the cells in use at the end.
    pub fn bytes_in_use(&self) -> u64 {
        self.kv.per_cell * self.cells.cells() as u64
    }

    /// Bytes of the most cells ever in use.
    pub fn bytes_peak(&self) -> u64 {
        self.kv.per_cell * self.cells.peak as u64
    }
}
