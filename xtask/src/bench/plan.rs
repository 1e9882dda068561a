//! What a suite measures: `benches/SUITE.toml`, read, checked and spelled out run by run.
//! docs/bench.md explains the file.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// The file as it stands. Keys that are not listed here are refused.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Threads of every run, unless `--threads` says otherwise.
    pub threads: usize,
    /// Rounds of every part that names none.
    pub rounds: usize,
    /// Whether a page is named after the GPU.
    #[serde(default)]
    pub gpu: bool,
    /// Models by their short names.
    pub models: BTreeMap<String, Model>,
    pub quick: Quick,
    #[serde(rename = "part")]
    pub parts: Vec<Part>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// From the repository's root; `{models}` stands for the folder of those that are made.
    pub file: String,
    /// Arguments of `cargo xtask model full` that make it; none: it lies in the repository.
    pub make: Option<String>,
}

/// What `--quick` changes, so that every step runs within a minute. The figures mean nothing.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quick {
    pub model: String,
    pub parts: Vec<String>,
    /// Flags that get this value wherever a run has them.
    #[serde(default)]
    pub set: BTreeMap<String, String>,
}

/// A part of the suite; its runs are written in the same way, and say only what is their own.
// One struct for both: flattened ones lose the line of a key that is wrong.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// A run's is a column of the tables.
    pub name: String,
    /// A line or two above its tables. Of parts alone, as all down to `tables`.
    #[serde(default)]
    pub about: String,
    /// Only runs when it is named.
    #[serde(default)]
    pub optional: bool,
    pub rounds: Option<usize>,
    /// One run for each combination of these values, which `{key}` stands for.
    #[serde(default)]
    pub each: toml::Table,
    #[serde(default, rename = "run")]
    pub runs: Vec<Part>,
    #[serde(default, rename = "table")]
    pub tables: Vec<Table>,
    pub model: Option<String>,
    /// hae, stock, both or read; a `command` needs none.
    pub program: Option<Program>,
    /// Arguments of `hae bench`, which hae-stock gets too; a run's come behind its part's.
    pub args: Option<String>,
    /// Other programs, word by word.
    pub command: Option<String>,
    /// Lines of a command's output that are kept: those with one of these in them.
    pub keep: Option<Vec<String>>,
    /// Whether the command is a criterion benchmark, whose estimates are read.
    pub criterion: Option<bool>,
    /// Seconds after which a command is stopped.
    pub limit: Option<u64>,
    /// Whether each process runs once before it counts; on a GPU it has to.
    pub warmup: Option<bool>,
    /// Environment of the run.
    pub env: Option<BTreeMap<String, String>>,
    /// Busy loops beside it, on its processors.
    pub loops: Option<String>,
    /// Processors that it is bound to, as taskset writes them.
    pub cpus: Option<String>,
    /// Whether the most that the GPU's driver says is taken is watched.
    pub gpu_memory: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Program {
    /// This project.
    Hae,
    /// llama.cpp without patches.
    Stock,
    /// One and the other, by turns.
    Both,
    /// How fast the threads read main memory.
    Read,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Unique in the suite: the name between the page's markers.
    pub name: String,
    /// Fields that tell one row from the other; they are its first columns.
    pub rows: Vec<String>,
    pub columns: Vec<Column>,
}

/// A figure of each row.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    pub head: String,
    /// A field of `hae bench -o jsonl`, or one that xtask works out.
    pub value: String,
    /// s of milliseconds, MiB, GB, %.
    pub unit: Option<Unit>,
    /// Only results with these fields.
    #[serde(default)]
    pub of: toml::Table,
    /// Divided by the results with these fields, round by round.
    pub to: Option<toml::Table>,
    /// Of results that differ in this field alone the smallest counts, in `of` and in `to`.
    pub best: Option<String>,
    /// Whether the best one is named beside its figure.
    #[serde(default)]
    pub named: bool,
    /// Whether the smallest and the largest of all rounds stand beside the median.
    #[serde(default)]
    pub spread: bool,
    pub digits: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Unit {
    #[serde(rename = "s")]
    Seconds,
    #[serde(rename = "MiB")]
    MiB,
    #[serde(rename = "GB")]
    Gigabytes,
    #[serde(rename = "%")]
    Percent,
}

impl Unit {
    /// What a value is divided by.
    pub fn divisor(self) -> f64 {
        match self {
            Unit::Seconds => 1e3,
            Unit::MiB => f64::from(1 << 20),
            Unit::Gigabytes => 1e9,
            Unit::Percent => 1e-2,
        }
    }
}

/// One thing to run and to time, with everything filled in that does not depend on the machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub part: String,
    /// The run's name and the values of `each`; unique within the part but for `stock`.
    pub name: String,
    pub kind: Kind,
    /// The model's short name.
    pub model: Option<String>,
    /// Columns that it brings into tables: `run`, and those of `each`.
    pub fields: Vec<(String, String)>,
    pub warmup: bool,
    pub env: BTreeMap<String, String>,
    pub loops: usize,
    pub cpus: Option<String>,
    pub gpu_memory: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// `hae bench` with these arguments.
    Hae(Vec<String>),
    /// hae-stock with these.
    Stock(Vec<String>),
    Read,
    Command {
        words: Vec<String>,
        keep: Vec<String>,
        criterion: bool,
        limit: Option<u64>,
    },
}

/// Placeholders that the runner fills in.
const BUILT_IN: [&str; 8] = [
    "hae",
    "suite",
    "kv",
    "controller",
    "model",
    "models",
    "threads",
    "out",
];

impl Plan {
    /// # Errors
    /// With the line, when the file is not such a plan.
    pub fn read(root: &Path, suite: &str) -> Result<Plan> {
        let folder = root.join("benches");
        let path = folder.join(format!("{suite}.toml"));
        let known = |word: &str| word.chars().all(|c| c.is_alphanumeric() || c == '-');
        if !known(suite) || !path.is_file() {
            let mut names = Vec::new();
            for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
                let path = entry?.path();
                if path.extension().is_some_and(|e| e == "toml") {
                    names.extend(path.file_stem().map(|s| s.to_string_lossy().into_owned()));
                }
            }
            names.sort();
            bail!("{suite}: expected one of {}", names.join(", "));
        }
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Plan::parse(&text, &format!("benches/{suite}.toml"))
    }

    /// `name` is the file's, for messages.
    ///
    /// # Errors
    /// As [`Plan::read`].
    pub fn parse(text: &str, name: &str) -> Result<Plan> {
        let plan: Plan = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            let line = text[..at].lines().count() + usize::from(text[..at].ends_with('\n'));
            let message = e.message().lines().collect::<Vec<_>>().join(" ");
            anyhow::anyhow!("{name}:{}: {message}", line.max(1))
        })?;
        plan.check().with_context(|| name.to_owned())?;
        Ok(plan)
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.threads > 0 && self.rounds > 0,
            "threads and rounds: expected at least 1"
        );
        let mut parts: Vec<&str> = self.parts.iter().map(|part| &*part.name).collect();
        let mut tables: Vec<&str> = Vec::new();
        for part in &self.parts {
            let runs = self
                .runs(part, false)
                .with_context(|| format!("part {}", part.name))?;
            ensure!(!runs.is_empty(), "part {}: no runs", part.name);
            ensure!(!part.about.is_empty(), "part {}: no about", part.name);
            tables.extend(part.tables.iter().map(|table| &*table.name));
        }
        for name in &self.quick.parts {
            self.part(name).context("quick")?;
        }
        self.model(&self.quick.model).context("quick")?;
        for (what, names) in [("part", &mut parts), ("table", &mut tables)] {
            names.sort_unstable();
            if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
                bail!("two of {what} {}", twice[0]);
            }
        }
        Ok(())
    }

    /// # Errors
    /// When there is none of this name; the message lists the others.
    pub fn part(&self, name: &str) -> Result<&Part> {
        let found = self.parts.iter().find(|part| part.name == name);
        found.with_context(|| {
            let names: Vec<&str> = self.parts.iter().map(|part| &*part.name).collect();
            format!("{name}: expected one of {}", names.join(", "))
        })
    }

    /// # Errors
    /// As [`Plan::part`].
    pub fn model(&self, name: &str) -> Result<&Model> {
        self.models.get(name).with_context(|| {
            let names: Vec<&str> = self.models.keys().map(String::as_str).collect();
            format!("model {name}: expected one of {}", names.join(", "))
        })
    }

    /// Every run of a part, in the order in which they run.
    ///
    /// # Errors
    /// When a run says too much or too little of what it is, or names something unknown.
    pub fn runs(&self, part: &Part, quick: bool) -> Result<Vec<Run>> {
        let nameless = [Part::default()];
        let specs = match part.runs.is_empty() {
            true => &nameless[..],
            false => &part.runs,
        };
        let mut out: Vec<Run> = Vec::new();
        for values in combinations(&part.each)? {
            for spec in specs {
                let alone = spec.about.is_empty() && !spec.optional && spec.rounds.is_none();
                let alone =
                    alone && spec.each.is_empty() && spec.runs.is_empty() && spec.tables.is_empty();
                ensure!(
                    alone,
                    "run `{}`: about, optional, rounds, each, run and table are its part's",
                    spec.name
                );
                let runs = self.expand(part, &part.with(spec), &values, quick);
                out.extend(runs.with_context(|| format!("run `{}`", spec.name))?);
            }
        }
        for (i, run) in out.iter().enumerate() {
            let stock = |run: &Run| matches!(run.kind, Kind::Stock(_));
            let twice = out[..i]
                .iter()
                .any(|b| b.name == run.name && stock(b) == stock(run));
            ensure!(!twice, "two runs of the name `{}`", run.name);
        }
        Ok(out)
    }

    fn expand(
        &self,
        part: &Part,
        settings: &Part,
        values: &[(String, String)],
        quick: bool,
    ) -> Result<Vec<Run>> {
        let fill = |text: &str| fill(text, values);
        let program = settings.program.unwrap_or(Program::Hae);
        let kinds = match (&settings.command, &settings.args, program) {
            (Some(_), Some(_), _) => bail!("either args or a command"),
            (Some(command), None, _) => vec![Kind::Command {
                words: words(&fill(command)?)?,
                keep: settings.keep.clone().unwrap_or_default(),
                criterion: settings.criterion.unwrap_or(false),
                limit: settings.limit,
            }],
            (None, None, Program::Read) => vec![Kind::Read],
            (None, Some(_), Program::Read) => bail!("program read takes no args"),
            (None, None, _) => bail!("no args, no command"),
            (None, Some(args), program) => {
                let mut args = words(&fill(args)?)?;
                if quick {
                    self.quicker(&mut args);
                }
                let stock = || Ok::<_, anyhow::Error>(Kind::Stock(for_stock(&args)?));
                match program {
                    Program::Stock => vec![stock()?],
                    Program::Both => vec![Kind::Hae(args.clone()), stock()?],
                    _ => vec![Kind::Hae(args.clone())],
                }
            }
        };
        let model = match quick {
            true => settings.model.as_ref().map(|_| self.quick.model.clone()),
            false => settings.model.clone(),
        };
        match &model {
            Some(name) => _ = self.model(name)?,
            None => ensure!(
                !kinds
                    .iter()
                    .any(|k| matches!(k, Kind::Hae(_) | Kind::Stock(_))),
                "no model"
            ),
        }
        let run = match settings.name.is_empty() {
            true => &part.name,
            false => &settings.name,
        };
        let mut fields = vec![("run".to_owned(), run.clone())];
        fields.extend(values.iter().cloned());
        let words: Vec<&str> = fields.iter().map(|(_, value)| &**value).collect();
        let name = words.join(" ");
        let env = settings.env.iter().flatten();
        let env = env.map(|(key, value)| Ok((key.clone(), fill(value)?)));
        let env = env.collect::<Result<BTreeMap<_, _>>>()?;
        let loops = fill(settings.loops.as_deref().unwrap_or("0"))?;
        let loops = loops.parse().with_context(|| format!("loops: {loops}"))?;
        let run = |kind| Run {
            part: part.name.clone(),
            name: name.clone(),
            kind,
            model: model.clone(),
            fields: fields.clone(),
            warmup: settings.warmup.unwrap_or(false),
            env: env.clone(),
            loops,
            cpus: settings.cpus.clone(),
            gpu_memory: settings.gpu_memory.unwrap_or(false),
        };
        Ok(kinds.into_iter().map(run).collect())
    }

    fn quicker(&self, args: &mut [String]) {
        for i in 1..args.len() {
            // Nothing stays nothing.
            if let Some(value) = self.quick.set.get(&args[i - 1])
                && args[i] != "0"
            {
                args[i].clone_from(value);
            }
        }
    }
}

impl Part {
    /// What one of its runs is: the part's settings with the run's own; of both the `args`.
    fn with(&self, own: &Part) -> Part {
        let args = match (&self.args, &own.args) {
            (Some(all), Some(own)) => Some(format!("{all} {own}")),
            (all, own) => own.clone().or_else(|| all.clone()),
        };
        // What a run is comes from the run as soon as it says anything of it.
        let other = own.command.is_some() || own.program == Some(Program::Read);
        Part {
            name: own.name.clone(),
            model: own.model.clone().or_else(|| self.model.clone()),
            program: own.program.or(self.program),
            args: if other { own.args.clone() } else { args },
            command: own.command.clone().or_else(|| self.command.clone()),
            keep: own.keep.clone().or_else(|| self.keep.clone()),
            criterion: own.criterion.or(self.criterion),
            limit: own.limit.or(self.limit),
            warmup: own.warmup.or(self.warmup),
            env: own.env.clone().or_else(|| self.env.clone()),
            loops: own.loops.clone().or_else(|| self.loops.clone()),
            cpus: own.cpus.clone().or_else(|| self.cpus.clone()),
            gpu_memory: own.gpu_memory.or(self.gpu_memory),
            ..Part::default()
        }
    }
}

/// Every combination of the values, the last key's changing fastest; one empty one of none.
fn combinations(each: &toml::Table) -> Result<Vec<Vec<(String, String)>>> {
    let mut all = vec![Vec::new()];
    for (key, values) in each {
        let values = values
            .as_array()
            .with_context(|| format!("each.{key}: expected a list"))?;
        ensure!(
            !BUILT_IN.contains(&&**key),
            "each.{key}: this name is taken"
        );
        let mut next = Vec::new();
        for before in &all {
            for value in values {
                let mut with = before.clone();
                with.push((key.clone(), plain(value)));
                next.push(with);
            }
        }
        all = next;
    }
    Ok(all)
}

/// A value as a word.
pub fn plain(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Puts values in the place of `{key}`, and leaves the runner's own alone.
fn fill(text: &str, values: &[(String, String)]) -> Result<String> {
    let mut out = text.to_owned();
    for (key, value) in values {
        out = out.replace(&format!("{{{key}}}"), value);
    }
    // Braces that hold no name are the command's own.
    let mut rest = &*out;
    while let Some((_, after)) = rest.split_once('{') {
        let name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let end = after.find(|c| !name(c)).unwrap_or(after.len());
        let key = &after[..end];
        if after[end..].starts_with('}') && !key.is_empty() {
            ensure!(BUILT_IN.contains(&key), "{{{key}}} is no key of `each`");
        }
        rest = after;
    }
    Ok(out)
}

fn words(text: &str) -> Result<Vec<String>> {
    shlex::split(text).with_context(|| format!("{text}: an open quote"))
}

/// The arguments without the policy, which hae-stock does not have.
fn for_stock(args: &[String]) -> Result<Vec<String>> {
    let mut out = Vec::new();
    let mut args = args.iter();
    while let Some(word) = args.next() {
        if word == "--kv-policy" {
            let policy = args.next();
            ensure!(
                policy.is_some_and(|p| p == "full"),
                "stock is compared with --kv-policy full alone"
            );
        } else {
            out.push(word.clone());
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
