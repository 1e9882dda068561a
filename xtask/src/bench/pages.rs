//! One page a machine, `docs/performance/MACHINE.md`: tables between markers, prose by hand around them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::origin;
use super::plan::{Part, Plan, Run};
use super::results::{self, Line, Setting};
use super::table::Samples;

pub const FOLDER: &str = "docs/performance";
const END: &str = "<!-- /bench -->";

/// What of the results a page is made of.
pub struct Source<'a> {
    pub suite: &'a str,
    pub plan: &'a Plan,
    pub lines: &'a [Line],
    pub threads: usize,
    pub quick: bool,
}

/// A table that is ready to go between its markers.
pub struct Ready {
    /// The page's name and the machine in words.
    slug: String,
    machine: String,
    part: String,
    about: String,
    name: String,
    text: String,
}

impl Source<'_> {
    /// The tables of these parts on every machine that the results know.
    ///
    /// # Errors
    /// When a table's plan does not fit its results.
    pub fn tables(&self, parts: &[&Part]) -> Result<Vec<Ready>> {
        let mut out = Vec::new();
        for part in parts {
            let runs = self.plan.runs(part, self.quick)?;
            let mut slugs: Vec<String> = Vec::new();
            for line in self.lines.iter().filter(|line| self.knows(line, part)) {
                let slug = line.machine.slug(self.plan.gpu);
                if !slugs.contains(&slug) {
                    slugs.push(slug);
                }
            }
            for slug in slugs {
                out.extend(self.of_machine(part, &runs, &slug)?);
            }
        }
        Ok(out)
    }

    fn knows(&self, line: &Line, part: &Part) -> bool {
        line.suite == self.suite && line.part == part.name && line.quick == self.quick
    }

    fn of_machine(&self, part: &Part, runs: &[Run], slug: &str) -> Result<Vec<Ready>> {
        let mut settings: Vec<Setting> = Vec::new();
        let of_page =
            |line: &&Line| self.knows(line, part) && line.machine.slug(self.plan.gpu) == slug;
        for line in self.lines.iter().filter(of_page) {
            let setting = line.setting();
            settings.retain(|known| *known != setting);
            settings.push(setting);
        }
        // The newest last. One that has every run goes before a newer one that does not.
        let whats: Vec<String> = runs
            .iter()
            .map(|run| results::what(run, self.threads, self.quick))
            .collect();
        let of = |setting: &Setting| -> Vec<&Line> {
            let lines = |what: &String| {
                let mut lines: Vec<&Line> = self
                    .lines
                    .iter()
                    .filter(|l| l.what == *what && l.is_of(setting))
                    .collect();
                lines.sort_by_key(|line| line.round);
                lines
            };
            whats.iter().flat_map(lines).collect()
        };
        let whole = |lines: &[&Line]| {
            whats
                .iter()
                .all(|what| lines.iter().any(|l| l.what == *what))
        };
        let all: Vec<Vec<&Line>> = settings
            .iter()
            .rev()
            .map(of)
            .filter(|l| !l.is_empty())
            .collect();
        let Some(lines) = all.iter().find(|lines| whole(lines)).or(all.first()) else {
            return Ok(Vec::new());
        };
        let missing = whats
            .iter()
            .filter(|what| !lines.iter().any(|l| l.what == **what))
            .count();
        let samples = Samples::new(lines);
        let below = self.below(part, runs, lines, missing);
        // All tables of a part come of the same commands; they stand below the last.
        let commands = commands(lines).join("\n");
        let mut out: Vec<Ready> = Vec::new();
        for table in &part.tables {
            if let Some(markdown) = samples.markdown(table)? {
                out.push(Ready {
                    slug: slug.to_owned(),
                    machine: lines[0].machine.words(),
                    part: part.name.clone(),
                    about: part.about.clone(),
                    name: table.name.clone(),
                    text: format!("{markdown}\n{below}\n"),
                });
            }
        }
        if let Some(last) = out.last_mut() {
            last.text += &format!("\n```\n{commands}\n```\n");
        }
        Ok(out)
    }

    /// What stands below a table: machine, build, commit, dates, command.
    fn below(&self, part: &Part, runs: &[Run], lines: &[&Line], missing: usize) -> String {
        let line = lines[0];
        let dates: BTreeSet<&str> = lines.iter().map(|line| &*line.date).collect();
        let dates: Vec<&str> = [dates.first(), dates.last()]
            .into_iter()
            .flatten()
            .copied()
            .collect();
        let dates = match dates[..] {
            [first, last] if first != last => format!("{first} to {last}"),
            _ => dates[0].to_owned(),
        };
        let rounds = lines.iter().map(|line| line.round + 1).max().unwrap_or(1);
        let medians = match rounds {
            1 => "one run each".to_owned(),
            n => format!("medians of {n} rounds by turns"),
        };
        format!(
            "{}. Built with {}. {}, {dates}. `cargo xtask bench {} {}`, {medians}, {} threads{}.",
            line.machine.words(),
            line.origin.build.words(),
            sentence(&line.origin.words()),
            self.suite,
            part.name,
            line.threads,
            match missing {
                0 => String::new(),
                n => format!("; {n} of {} runs are missing", runs.len()),
            }
        )
    }
}

/// The command lines; more than a dozen are cut short.
fn commands(lines: &[&Line]) -> Vec<String> {
    const MOST: usize = 12;
    let mut all: Vec<String> = Vec::new();
    for line in lines.iter().filter(|line| !line.command.is_empty()) {
        if !all.contains(&line.command) {
            all.push(line.command.clone());
        }
    }
    if all.len() > MOST {
        let more = all.len() - MOST;
        all.truncate(MOST);
        all.push(format!("# and {more} more: the same with --list"));
    }
    all
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

/// Writes the tables into the pages below `folder`, which are made where they are missing. Returns
/// what was done, one line each.
///
/// # Errors
/// When a page's markers are broken or a file cannot be written; then that page is as it was.
pub fn write(folder: &Path, tables: &[Ready]) -> Result<Vec<String>> {
    let mut said = Vec::new();
    let slugs: BTreeSet<&str> = tables.iter().map(|table| &*table.slug).collect();
    for slug in slugs {
        let path = folder.join(format!("{slug}.md"));
        let mut page = match fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            read => read.with_context(|| path.display().to_string())?,
        };
        let tables = tables.iter().filter(|table| table.slug == slug);
        for table in tables {
            if page.is_empty() {
                page = front(&table.machine);
            }
            let put = put(&page, &table.name, &table.text);
            page = match put.with_context(|| path.display().to_string())? {
                Some(page) => page,
                None => {
                    said.push(format!(
                        "{}: {} is new, at the end",
                        path.display(),
                        table.name
                    ));
                    add(&page, table)
                }
            };
        }
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        fs::write(&path, page).with_context(|| path.display().to_string())?;
        said.push(format!("{}: written", path.display()));
    }
    Ok(said)
}

fn front(machine: &str) -> String {
    format!(
        "# Speed and memory: {machine}\n\n\
         `cargo xtask bench` writes what stands between the markers, here as comments; the rest is written \
         by hand. [bench.md](../bench.md#the-suites) explains the suites, [performance.md](../performance.md) \
         what the figures mean.\n"
    )
}

fn add(page: &str, table: &Ready) -> String {
    let heading = format!("## {}\n", table.part);
    // A second table of the same part goes below the first.
    let head = match page.lines().any(|line| line == heading.trim_end()) {
        true => String::new(),
        false => format!("{heading}\n{}\n\n", table.about.trim()),
    };
    format!(
        "{}\n\n{head}{}\n{}{END}\n",
        page.trim_end(),
        start(&table.name),
        table.text
    )
}

fn start(name: &str) -> String {
    format!("<!-- bench:{name} -->")
}

/// The page with this text between the table's markers; `None`: it has no such markers.
///
/// # Errors
/// When a marker has no partner, with its line.
fn put(page: &str, name: &str, text: &str) -> Result<Option<String>> {
    let mut out = String::new();
    let mut open: Option<(usize, &str)> = None;
    let mut found = false;
    for (i, line) in page.lines().enumerate() {
        let marker = line.trim();
        let opens = marker
            .strip_prefix("<!-- bench:")
            .and_then(|rest| rest.strip_suffix(" -->"));
        match (opens, open) {
            (Some(_), Some((at, other))) => {
                bail!(
                    "line {}: `{}` is not closed before line {}",
                    at,
                    start(other),
                    i + 1
                )
            }
            (Some(opens), None) => {
                open = Some((i + 1, opens));
                if opens == name {
                    if found {
                        bail!("line {}: a second `{}`", i + 1, start(name));
                    }
                    found = true;
                    out += &format!("{line}\n{text}");
                    continue;
                }
            }
            (None, None) if marker == END => bail!("line {}: `{END}` closes nothing", i + 1),
            (None, Some(_)) if marker == END => open = None,
            (None, Some((_, inside))) if inside == name => continue,
            _ => {}
        }
        out += line;
        out.push('\n');
    }
    if let Some((at, other)) = open {
        bail!("line {at}: `{}` is not closed", start(other));
    }
    Ok(found.then_some(out))
}

/// Says of every commit that a page names whether what is measured changed since. For people: a figure
/// may well be true still.
///
/// # Errors
/// When a page cannot be read.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let docs = root.join("docs");
    let mut pages = Vec::new();
    for folder in [docs.clone(), root.join(FOLDER)] {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "md") {
                pages.push(path);
            }
        }
    }
    pages.sort();
    let mut said = Vec::new();
    for path in pages {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let name = path.strip_prefix(root).unwrap_or(&path).display();
        let mut table = "";
        for (i, line) in text.lines().enumerate() {
            if let Some(rest) = line.trim().strip_prefix("<!-- bench:") {
                table = rest.trim_end_matches(" -->");
            } else if line.trim() == END {
                table = "";
            }
            for commit in named(line) {
                let at = format!("{name}:{}: {table}", i + 1);
                let at = at.trim_end_matches([':', ' ']);
                said.push(match origin::since(root, commit) {
                    Ok(later) if later.is_empty() => format!("{at}: `{commit}`, up to date"),
                    Ok(later) => format!(
                        "{at}: `{commit}`, {} later commits touched what it measures, the last `{}`",
                        later.len(),
                        later[0]
                    ),
                    Err(e) => format!("{at}: {e:#}"),
                });
            }
        }
    }
    Ok(said)
}

/// Commits in a line: a word in backquotes behind `commit`.
fn named(line: &str) -> impl Iterator<Item = &str> {
    let lower = line
        .match_indices("ommit `")
        .map(|(at, word)| at + word.len());
    lower.filter_map(|at| line[at..].split('`').next())
}

#[cfg(test)]
mod tests;
