//! What all requests for an answer have in common: how tokens are chosen, when it ends, what it keeps to.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::super::ask::{Ask, Part};
use super::failure::Failure;
use super::hae::HaeFields;
use super::ids;
use super::service::{Rule, Service};
use super::shaped::{Shape, Shaped};
use crate::engine::{Constraint, Token};
use crate::llama::SamplerOptions;

/// Texts that end an answer; more would be searched for at every token.
const STOPS: usize = 32;
/// Likeliest tokens that can be asked for.
const PROBS: usize = 100;

/// Fields of every request for an answer. Those of OpenAI and those of llama.cpp's server; null is as if
/// it were not there.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub(super) struct Fields {
    /// Any name: there is one model.
    pub model: Option<String>,
    /// 0: the likeliest token.
    #[schema(maximum = 100)]
    pub temperature: Option<f32>,
    /// Draws among the likeliest tokens that together have this probability.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Draws among this many of the likeliest tokens; 0: all.
    pub top_k: Option<i32>,
    /// Drops tokens below this share of the likeliest one's probability.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// What the logits of recent tokens are divided by.
    #[schema(exclusive_minimum = 0, maximum = 100)]
    pub repeat_penalty: Option<f32>,
    /// Tokens that the penalties look back on; -1: all.
    #[schema(minimum = -1)]
    pub repeat_last_n: Option<i32>,
    /// Taken from the logits of tokens that the answer holds.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// The same for each time that it holds one.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// -1: another one each time.
    pub seed: Option<i64>,
    /// Added to the logits of tokens: `{"id": bias}`, or `[[id or text, bias or false]]`.
    #[schema(value_type = serde_json::Value)]
    pub logit_bias: Option<Value>,
    /// Whether the tokens that end an answer never come.
    pub ignore_eos: Option<bool>,
    /// A text that ends the answer, or a list of them.
    #[schema(value_type = serde_json::Value)]
    pub stop: Option<Value>,
    /// Tokens at most; -1: no limit.
    #[schema(minimum = -2)]
    pub max_tokens: Option<i64>,
    /// The same, and before it.
    #[schema(minimum = -2)]
    pub max_completion_tokens: Option<i64>,
    /// The same, and before both.
    #[schema(minimum = -2)]
    pub n_predict: Option<i64>,
    /// Answers.
    #[schema(minimum = 1, maximum = 8)]
    pub n: Option<usize>,
    /// Whether the answer comes in pieces.
    pub stream: Option<bool>,
    /// About the pieces.
    pub stream_options: Option<StreamOptions>,
    /// Whether pieces say how long it has taken.
    pub timings_per_token: Option<bool>,
    /// Whether pieces say how much of the prompt is in.
    pub return_progress: Option<bool>,
    /// A grammar of llama.cpp's kind that the answer keeps to.
    pub grammar: Option<String>,
    /// A JSON schema that the answer keeps to.
    #[schema(value_type = serde_json::Value)]
    pub json_schema: Option<Value>,
    /// `text`, `json_object` or `json_schema`.
    pub response_format: Option<ResponseFormat>,
    /// Whether what a slot holds of the prompt is used. Default: yes.
    pub cache_prompt: Option<bool>,
    /// The slot that has to answer; -1: any.
    #[schema(minimum = -1)]
    pub id_slot: Option<i64>,
    /// Whether the answer tells of its prompt and settings.
    pub verbose: Option<bool>,
    /// What leaves the cache, and what decoding steps attend to.
    pub hae: Option<HaeFields>,
}

/// About a stream.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub(super) struct StreamOptions {
    /// Whether the last piece counts the tokens.
    pub include_usage: Option<bool>,
}

/// What the answer is.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub(super) struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    pub r#type: String,
    /// llama.cpp's: a schema for `json_object`.
    #[schema(value_type = serde_json::Value)]
    pub schema: Option<Value>,
    /// For `json_schema`: `{"schema": ...}`.
    #[schema(value_type = serde_json::Value)]
    pub json_schema: Option<Value>,
}

/// Whether a value changes nothing.
type Unchanged = fn(f64) -> bool;

/// Samplers of llama.cpp that are not here, each with the values that change nothing.
const ABSENT: [(&str, Unchanged); 7] = [
    ("mirostat", |x| x == 0.0),
    ("dry_multiplier", |x| x == 0.0),
    ("xtc_probability", |x| x == 0.0),
    ("typical_p", |x| x >= 1.0),
    ("dynatemp_range", |x| x == 0.0),
    ("top_n_sigma", |x| x <= 0.0),
    ("adaptive_target", |x| x < 0.0),
];

/// What an answer keeps to, owned.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Keep {
    Grammar(String),
    Schema(Value),
    Object,
}

impl Keep {
    fn rule(&self) -> Rule<'_> {
        match self {
            Keep::Grammar(text) => Rule::Grammar(text),
            Keep::Schema(schema) => Rule::Schema(schema),
            Keep::Object => Rule::Object,
        }
    }
}

/// Fields that were checked: questions are made of it.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub sampler: SamplerOptions,
    pub n_predict: Option<usize>,
    pub stop: Vec<String>,
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub timings_per_token: bool,
    pub return_progress: bool,
    pub n_probs: usize,
    pub keep: Option<Keep>,
    pub shape: Shape,
    pub ignore_eos: bool,
    pub cache_prompt: bool,
    pub slot: Option<usize>,
    pub verbose: bool,
    hae: HaeFields,
}

/// Reads and checks them. `body`: the whole request.
pub(super) fn settings(service: &Service, body: &Value) -> Result<Settings, Failure> {
    refuse_absent(body)?;
    refuse_lists(body)?;
    let fields: Fields = super::body::read(body)?;
    let sampler = sampler(service, &fields)?;
    let ignore_eos = fields.ignore_eos.unwrap_or(false);
    let mut shape = Shape {
        presence: finite("presence_penalty", fields.presence_penalty, -2.0, 2.0)?.unwrap_or(0.0),
        frequency: finite("frequency_penalty", fields.frequency_penalty, -2.0, 2.0)?.unwrap_or(0.0),
        back: usize::try_from(sampler.repeat_last_n).unwrap_or(usize::MAX),
        bias: bias(service, fields.logit_bias.as_ref())?,
    };
    if ignore_eos {
        let eog = service.about.eog.iter();
        shape
            .bias
            .extend(eog.map(|&token| (token, f32::NEG_INFINITY)));
    }
    let n = fields.n.unwrap_or(1);
    let most = service.rules.answers;
    if n == 0 || n > most {
        let reason = format!("`n`: {n} answers, expected 1 to {most}");
        return Err(Failure::invalid(reason));
    }
    let hae = fields.hae.clone().unwrap_or_default();
    hae.check(service)?;
    Ok(Settings {
        sampler,
        n_predict: n_predict(service, &fields)?,
        stop: stop(fields.stop.as_ref())?,
        n,
        stream: fields.stream.unwrap_or(false),
        include_usage: (fields.stream_options.as_ref())
            .and_then(|options| options.include_usage)
            .unwrap_or(false),
        timings_per_token: fields.timings_per_token.unwrap_or(false),
        return_progress: fields.return_progress.unwrap_or(false),
        n_probs: 0,
        keep: keep(&fields)?,
        shape,
        ignore_eos,
        cache_prompt: fields.cache_prompt.unwrap_or(true),
        slot: slot(service, fields.id_slot)?,
        verbose: fields.verbose.unwrap_or(service.rules.verbose),
        hae,
    })
}

impl Settings {
    /// The likeliest tokens that each token comes with.
    pub fn with_probs(mut self, name: &str, n: usize) -> Result<Self, Failure> {
        if n > PROBS {
            let reason = format!("`{name}`: {n}, expected at most {PROBS}");
            return Err(Failure::invalid(reason));
        }
        self.n_probs = n;
        Ok(self)
    }

    /// The question for one of `n` answers, counted from 0: each has a seed of its own.
    pub fn ask(&self, service: &Service, prompt: Vec<Part>, index: usize) -> Result<Ask, Failure> {
        let inner = match &self.keep {
            None => None,
            Some(keep) => Some(constraint(service, keep)?),
        };
        let constraint = match self.shape.is_plain() {
            true => inner,
            false => Some(Box::new(Shaped::new(self.shape.clone(), inner)) as Box<dyn Constraint>),
        };
        let seed = self.sampler.seed.wrapping_add(index as u32);
        Ok(Ask {
            prompt,
            n_predict: self.n_predict,
            sampler: SamplerOptions {
                seed,
                ..self.sampler
            },
            stop: self.stop.clone(),
            n_probs: self.n_probs,
            constraint,
            policy: self.hae.policy(service)?,
            attend: self.hae.attend(service)?,
            slot: self.slot,
            cache_prompt: self.cache_prompt,
            watch: self.stream && self.hae.watch,
        })
    }
}

fn constraint(service: &Service, keep: &Keep) -> Result<Box<dyn Constraint>, Failure> {
    let Some(constrain) = &service.constrain else {
        let reason = "grammars and schemas cannot be used with this model";
        return Err(Failure::unsupported(reason));
    };
    Ok(constrain.constraint(&keep.rule())?)
}

fn refuse_absent(body: &Value) -> Result<(), Failure> {
    for (name, changes_nothing) in ABSENT {
        match &body[name] {
            Value::Null => {}
            value if value.as_f64().is_some_and(changes_nothing) => {}
            value => {
                let reason = format!("`{name}`: {value}, but there is no such sampler here");
                return Err(Failure::invalid(reason));
            }
        }
    }
    Ok(())
}

/// What is read as an object could be read from a list of its values, too, which nobody means.
fn refuse_lists(body: &Value) -> Result<(), Failure> {
    let objects = ["stream_options", "response_format", "hae"];
    match objects.iter().find(|&&name| body[name].is_array()) {
        Some(name) => Err(Failure::invalid(format!("`{name}`: expected an object"))),
        None => Ok(()),
    }
}

/// A number within bounds.
fn finite(name: &str, x: Option<f32>, least: f32, most: f32) -> Result<Option<f32>, Failure> {
    match x {
        Some(x) if !(x >= least && x <= most) => Err(Failure::invalid(format!(
            "`{name}`: {x}, expected a number from {least} to {most}"
        ))),
        x => Ok(x),
    }
}

fn sampler(service: &Service, fields: &Fields) -> Result<SamplerOptions, Failure> {
    let own = service.about.sampler;
    let fresh = || match service.about.random_seed {
        true => ids::seed(),
        false => own.seed,
    };
    let seed = match fields.seed {
        None => fresh(),
        // The largest is llama.cpp's own -1.
        Some(-1) | Some(0xffff_ffff) => ids::seed(),
        // llama.cpp takes any number, and its lowest bits.
        Some(seed) => (seed & 0xffff_ffff) as u32,
    };
    let repeat_penalty = finite("repeat_penalty", fields.repeat_penalty, 0.0, 100.0)?;
    if repeat_penalty == Some(0.0) {
        return Err(Failure::invalid(
            "`repeat_penalty`: 0, expected more than 0",
        ));
    }
    let repeat_last_n = fields.repeat_last_n.unwrap_or(own.repeat_last_n);
    if repeat_last_n < -1 {
        let reason = format!("`repeat_last_n`: {repeat_last_n}, expected -1 or more");
        return Err(Failure::invalid(reason));
    }
    Ok(SamplerOptions {
        seed,
        temp: finite("temperature", fields.temperature, f32::MIN, 100.0)?.unwrap_or(own.temp),
        top_k: fields.top_k.unwrap_or(own.top_k),
        top_p: finite("top_p", fields.top_p, 0.0, 1.0)?.unwrap_or(own.top_p),
        min_p: finite("min_p", fields.min_p, 0.0, 1.0)?.unwrap_or(own.min_p),
        repeat_penalty: repeat_penalty.unwrap_or(own.repeat_penalty),
        repeat_last_n,
    })
}

fn n_predict(service: &Service, fields: &Fields) -> Result<Option<usize>, Failure> {
    let asked = [
        ("n_predict", fields.n_predict),
        ("max_completion_tokens", fields.max_completion_tokens),
        ("max_tokens", fields.max_tokens),
    ];
    let own = service.rules.n_predict;
    let Some((name, n)) = asked.into_iter().find_map(|(name, n)| Some((name, n?))) else {
        return Ok(own);
    };
    match usize::try_from(n) {
        Ok(n) => Ok(Some(n)),
        // -2 is llama.cpp's "until the context is full".
        Err(_) if n >= -2 => Ok(own),
        Err(_) => Err(Failure::invalid(format!(
            "`{name}`: {n}, expected -1 or more"
        ))),
    }
}

fn stop(stop: Option<&Value>) -> Result<Vec<String>, Failure> {
    let wrong = || Failure::invalid("`stop`: expected a text or a list of texts");
    let texts: Vec<String> = match stop {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(list)) => (list.iter())
            .map(|text| Some(text.as_str()?.to_owned()))
            .collect::<Option<_>>()
            .ok_or_else(wrong)?,
        Some(_) => return Err(wrong()),
    };
    if texts.len() > STOPS {
        let reason = format!("`stop`: {} texts, expected at most {STOPS}", texts.len());
        return Err(Failure::invalid(reason));
    }
    // An empty one would end every answer at once; llama.cpp leaves it out, too.
    Ok(texts.into_iter().filter(|text| !text.is_empty()).collect())
}

fn slot(service: &Service, slot: Option<i64>) -> Result<Option<usize>, Failure> {
    let slots = service.hall.facts().slots;
    match slot {
        None | Some(-1) => Ok(None),
        Some(n) => match usize::try_from(n) {
            Ok(n) if n < slots => Ok(Some(n)),
            _ => Err(Failure::invalid(format!(
                "`id_slot`: {n}, but the slots are 0 to {}",
                slots.saturating_sub(1)
            ))),
        },
    }
}

/// What the answer keeps to, of three ways to say it.
fn keep(fields: &Fields) -> Result<Option<Keep>, Failure> {
    let format = match &fields.response_format {
        None => None,
        Some(format) => of_format(format)?,
    };
    let grammar = fields.grammar.clone().filter(|text| !text.is_empty());
    let mut given = [
        grammar.map(Keep::Grammar),
        fields.json_schema.clone().map(Keep::Schema),
        format,
    ]
    .into_iter()
    .flatten();
    let keep = given.next();
    match given.next() {
        None => Ok(keep),
        Some(_) => Err(Failure::invalid(
            "`grammar`, `json_schema`, `response_format`: expected one of them",
        )),
    }
}

pub(super) fn of_format(format: &ResponseFormat) -> Result<Option<Keep>, Failure> {
    let wrong = |reason: &str| Err(Failure::invalid(format!("`response_format`: {reason}")));
    let object = |schema: &Value| match schema.is_object() {
        true => Ok(Some(Keep::Schema(schema.clone()))),
        false => wrong("the schema is no object"),
    };
    match format.r#type.as_str() {
        "text" => Ok(None),
        "json_object" => match &format.schema {
            None => Ok(Some(Keep::Object)),
            Some(schema) => object(schema),
        },
        "json_schema" => {
            let inner = format
                .json_schema
                .as_ref()
                .and_then(|json| json.get("schema"));
            match inner.or(format.schema.as_ref()) {
                Some(schema) => object(schema),
                None => wrong("json_schema wants a schema"),
            }
        }
        _ => wrong("expected the type text, json_object or json_schema"),
    }
}

/// Both of llama.cpp's spellings: an object, or a list of pairs. A text stands for each of its tokens.
fn bias(service: &Service, bias: Option<&Value>) -> Result<Vec<(Token, f32)>, Failure> {
    let wrong = || {
        Failure::invalid("`logit_bias`: expected {\"id\": bias}, or a list of [id or text, bias]")
    };
    let pairs: Vec<(Value, &Value)> = match bias {
        None => Vec::new(),
        Some(Value::Object(map)) => map
            .iter()
            .map(|(key, bias)| match key.parse::<i64>() {
                Ok(id) => (id.into(), bias),
                Err(_) => (key.as_str().into(), bias),
            })
            .collect(),
        Some(Value::Array(list)) => list
            .iter()
            .map(|pair| match pair.as_array().map(Vec::as_slice) {
                Some([what, bias]) => Ok((what.clone(), bias)),
                _ => Err(wrong()),
            })
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(wrong()),
    };
    let mut out = Vec::new();
    for (what, bias) in pairs {
        let bias = match bias {
            Value::Bool(false) => f32::NEG_INFINITY,
            bias => bias.as_f64().ok_or_else(wrong)? as f32,
        };
        match what {
            Value::String(text) => {
                let tokens = service.hall.tokenize(&text, false, false)?;
                out.extend(tokens.into_iter().map(|token| (token, bias)));
            }
            id => {
                let id = id.as_i64().ok_or_else(wrong)?;
                out.push((token(service, id)?, bias));
            }
        }
    }
    Ok(out)
}

/// An id of the vocabulary.
pub(super) fn token(service: &Service, id: i64) -> Result<Token, Failure> {
    let n_vocab = service.hall.facts().n_vocab;
    match Token::try_from(id) {
        Ok(token) if usize::try_from(token).is_ok_and(|t| t < n_vocab) => Ok(token),
        _ => Err(Failure::invalid(format!(
            "token {id}, but the vocabulary has 0 to {}",
            n_vocab.saturating_sub(1)
        ))),
    }
}
