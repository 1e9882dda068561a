//! `cargo xtask bench`: everything that docs/performance.md states, measured by the plans in `benches/`.
//!
//! A plan is read and spelled out (`plan`), the programs are built or carried in (`programs`), every
//! round that the results folder lacks is run (`runner`, `results`), and the tables go into one page a
//! machine (`table`, `pages`).

mod bandwidth;
mod machine;
mod origin;
mod pages;
mod plan;
mod programs;
mod results;
mod runner;
mod table;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use time::OffsetDateTime;

use machine::Machine;
use origin::Origin;
use plan::{Kind, Part, Plan, Run};
use results::{Line, Setting, Store};
use runner::Runner;

#[derive(clap::Args)]
pub struct Args {
    /// cpu or cuda: a plan in benches/
    #[arg(required_unless_present_any = ["check", "build"])]
    suite: Option<String>,
    /// Parts of it [default: all that are not optional]
    parts: Vec<String>,
    /// Folder of the results; what lies there is not run again
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    out: PathBuf,
    /// Rounds of every run [default: the plan's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Threads [default: the plan's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Folder of the models of full size, made where they are missing
    #[arg(long, value_name = "DIR", default_value = "models/full")]
    models: PathBuf,
    /// Features to build with, beside the default ones [default: cuda for the suite cuda]
    #[arg(long, value_name = "LIST")]
    features: Option<String>,
    /// Run the programs of this folder and build nothing
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Only build the programs into this folder, to be carried to another machine
    #[arg(long, value_name = "DIR", conflicts_with = "programs")]
    build: Option<PathBuf>,
    /// Show every command and whether its rounds are done
    #[arg(long)]
    list: bool,
    /// Only write the tables of what is there
    #[arg(long, conflicts_with = "list")]
    tables: bool,
    /// The small model and small numbers, to see that all of it runs; the pages stay as they are
    #[arg(long)]
    quick: bool,
    /// Only say which commits the pages' figures belong to, and what changed since
    #[arg(long, conflicts_with_all = ["suite", "build", "list", "tables"])]
    check: bool,
}

/// 0: all done; 1: a run failed.
///
/// # Errors
/// When the plan, the results or a page cannot be read, or a build fails.
pub fn run(root: &Path, args: &Args) -> Result<u8> {
    // Carried to another machine, this program works in the checkout that it is started in.
    let carried = args
        .programs
        .as_ref()
        .map(|_| programs::checkout())
        .transpose()?;
    let root = carried.as_deref().unwrap_or(root);
    if args.check {
        pages::check(root)?
            .iter()
            .for_each(|line| println!("{line}"));
        return Ok(0);
    }
    let suite = args.suite.as_deref();
    let features = args.features.clone().unwrap_or_else(|| match suite {
        Some("cuda") => "cuda".to_owned(),
        _ => String::new(),
    });
    if let Some(folder) = &args.build {
        return programs::pack(root, folder, &features).map(|()| 0);
    }
    let suite = suite.context("no suite")?;
    let plan = Plan::read(root, suite)?;
    let parts = chosen(&plan, args)?;
    Suite {
        root,
        args,
        suite,
        plan: &plan,
        parts,
        features,
        out: std::path::absolute(&args.out)?,
    }
    .all()
}

/// The tests that hold on a GPU, as the suite's program takes them: filters, and what is left out. They are those of the
/// part `parity` of the suite `cuda`.
///
/// # Errors
/// When the plan has no such part.
pub fn tests_on_a_gpu(root: &Path) -> Result<Vec<String>> {
    let plan = Plan::read(root, "cuda")?;
    let runs = plan.runs(plan.part("parity")?, false)?;
    let [
        Run {
            kind: Kind::Command { words, .. },
            ..
        },
    ] = &runs[..]
    else {
        bail!("benches/cuda.toml: `parity` is not one command");
    };
    // Behind the program and the number of its threads.
    let words = words.iter().skip(1);
    let words = words.skip_while(|word| word.starts_with("--") || word.parse::<u32>().is_ok());
    Ok(words.cloned().collect())
}

/// The parts that were named, else all that need not be.
fn chosen<'a>(plan: &'a Plan, args: &Args) -> Result<Vec<&'a Part>> {
    if !args.parts.is_empty() {
        return args.parts.iter().map(|name| plan.part(name)).collect();
    }
    let usual = |part: &&Part| match args.quick {
        true => plan.quick.parts.contains(&part.name),
        false => !part.optional,
    };
    Ok(plan.parts.iter().filter(usual).collect())
}

struct Suite<'a> {
    root: &'a Path,
    args: &'a Args,
    suite: &'a str,
    plan: &'a Plan,
    parts: Vec<&'a Part>,
    features: String,
    out: PathBuf,
}

/// A round of a run.
struct Job {
    run: Run,
    what: String,
    round: usize,
    done: bool,
}

impl Suite<'_> {
    fn all(&self) -> Result<u8> {
        let mut store = Store::open(&self.out)?;
        let mut failed = 0;
        if !self.args.tables {
            let setting = Setting {
                machine: Machine::here(),
                origin: match &self.args.programs {
                    Some(programs) => Origin::carried(programs)?,
                    None => Origin::here(self.root, &self.features)?,
                },
            };
            let jobs = self.jobs(&store, &setting)?;
            if self.args.list {
                return self.list(&jobs, &setting).map(|()| 0);
            }
            failed = self.run(&mut store, &setting, jobs)?;
        }
        self.write(&store)?;
        if failed > 0 {
            eprintln!("{failed} runs failed; the same command runs them again");
        }
        Ok(u8::from(failed > 0))
    }

    fn threads(&self) -> usize {
        self.args.threads.map_or(self.plan.threads, usize::from)
    }

    fn rounds(&self, part: &Part) -> usize {
        match (self.args.rounds, self.args.quick) {
            (Some(n), _) => usize::from(n),
            (None, true) => 1,
            (None, false) => part.rounds.unwrap_or(self.plan.rounds),
        }
    }

    /// Every round of every run, in the order in which they run: by turns, each second round backwards,
    /// so that none of two that are compared always comes first.
    fn jobs(&self, store: &Store, setting: &Setting) -> Result<Vec<Job>> {
        let mut jobs = Vec::new();
        for part in &self.parts {
            let runs = self.plan.runs(part, self.args.quick)?;
            for round in 0..self.rounds(part) {
                let mut turn: Vec<Job> = runs
                    .iter()
                    .map(|run| {
                        let what = results::what(run, self.threads(), self.args.quick);
                        Job {
                            done: store.has(setting, &what, round),
                            run: run.clone(),
                            what,
                            round,
                        }
                    })
                    .collect();
                if round % 2 == 1 {
                    turn.reverse();
                }
                jobs.extend(turn);
            }
        }
        Ok(jobs)
    }

    fn runner(&self, programs: programs::Programs) -> Result<Runner<'_>> {
        Ok(Runner {
            root: self.root,
            out: &self.out,
            plan: self.plan,
            programs,
            models: self.root.join(&self.args.models),
            threads: self.threads(),
            quick: self.args.quick,
        })
    }

    fn list(&self, jobs: &[Job], setting: &Setting) -> Result<()> {
        let runner = self.runner(programs::Programs::new())?;
        println!("{}", setting.machine.words());
        println!(
            "{}; built with {}",
            setting.origin.words(),
            setting.origin.build.words()
        );
        let mut part = "";
        for job in jobs.iter().filter(|job| job.round == 0) {
            if job.run.part != part {
                part = &job.run.part;
                let about = &self.plan.part(part)?.about;
                println!("\n{part}: {}", about.trim().replace('\n', " "));
            }
            let rounds = jobs.iter().filter(|other| other.what == job.what);
            let (done, all) = rounds.fold((0, 0), |(done, all), job| {
                (done + usize::from(job.done), all + 1)
            });
            let told = match job.run.kind {
                Kind::Read => "# how fast the threads read main memory".to_owned(),
                _ => runner.told(&job.run)?,
            };
            println!("  {done}/{all}  {told}");
        }
        Ok(())
    }

    /// Runs what is not done; returns how many runs failed.
    fn run(&self, store: &mut Store, setting: &Setting, jobs: Vec<Job>) -> Result<usize> {
        let n_done = jobs.iter().filter(|job| job.done).count();
        let mut jobs: Vec<Job> = jobs.into_iter().filter(|job| !job.done).collect();
        eprintln!("{} rounds of runs to do, {n_done} done", jobs.len());
        if jobs.is_empty() {
            return Ok(0);
        }
        let models: BTreeSet<String> = jobs
            .iter()
            .filter_map(|job| job.run.model.clone())
            .collect();
        let programs = match &self.args.programs {
            Some(folder) => programs::carried(folder)?,
            None => {
                let needed = jobs.iter().flat_map(|job| runner::needs(&job.run));
                let mut needed: BTreeSet<String> = needed.map(str::to_owned).collect();
                // Tests start it, and rows name its build.
                needed.insert("hae".to_owned());
                let made = models
                    .iter()
                    .any(|name| self.plan.models[name].make.is_some());
                if made {
                    needed.insert("full_model".to_owned());
                }
                programs::build(self.root, &needed, &self.features)?
            }
        };
        let runner = self.runner(programs)?;
        let mut left_out = BTreeSet::new();
        jobs.retain(|job| {
            let can = runner.can(&job.run);
            if !can {
                left_out.extend(runner::needs(&job.run));
            }
            can
        });
        left_out.retain(|name| !runner.programs.contains_key(*name));
        for name in left_out {
            eprintln!("no {name} here: its runs are left out");
        }
        for model in &models {
            runner.make(model)?;
        }
        let bar = ProgressBar::new(jobs.len() as u64);
        bar.set_style(ProgressStyle::with_template(
            "{bar:24} {pos}/{len} {elapsed} {msg}",
        )?);
        bar.enable_steady_tick(Duration::from_millis(500));
        let mut failed = 0;
        for job in jobs {
            let Job {
                run, what, round, ..
            } = job;
            let stock = if matches!(run.kind, Kind::Stock(_)) {
                ", stock"
            } else {
                ""
            };
            let name = format!("{}: {}{stock}, round {}", run.part, run.name, round + 1);
            bar.set_message(name.clone());
            if bar.is_hidden() {
                eprintln!("{name}");
            }
            match runner.run(&run, round) {
                Ok(outcome) => store.append(Line {
                    suite: self.suite.to_owned(),
                    part: run.part.clone(),
                    run: run.name.clone(),
                    what,
                    round,
                    threads: self.threads(),
                    quick: self.args.quick,
                    machine: setting.machine.clone(),
                    origin: setting.origin.clone(),
                    date: OffsetDateTime::now_utc().date().to_string(),
                    seconds: outcome.seconds,
                    command: runner.told(&run)?,
                    fields: run.fields.iter().cloned().collect(),
                    rows: outcome.rows,
                })?,
                Err(e) => {
                    failed += 1;
                    bar.suspend(|| eprintln!("failed: {name}: {e:#}"));
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(failed)
    }

    fn write(&self, store: &Store) -> Result<()> {
        let source = pages::Source {
            suite: self.suite,
            plan: self.plan,
            lines: &store.lines,
            threads: self.threads(),
            quick: self.args.quick,
        };
        let tables = source.tables(&self.parts)?;
        ensure!(
            !tables.is_empty() || !self.args.tables,
            "{}: no results of these parts",
            self.out.display()
        );
        let folder = match self.args.quick {
            true => self.out.join("quick"),
            false => self.root.join(pages::FOLDER),
        };
        if self.args.quick && folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        pages::write(&folder, &tables)?
            .iter()
            .for_each(|line| println!("{line}"));
        Ok(())
    }
}

/// Keeps a processor busy as long as `parent` lives; what a plan's `loops` starts.
pub use runner::spin;
