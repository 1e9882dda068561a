//! Who imports whom: the table of ARCHITECTURE.md, checked row by row, and no circles between the
//! files of a folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use regex::Regex;

use crate::house::{root, sources};

/// A module's path in the crate, without `crate`; the root has none.
type Path = Vec<String>;

/// The modules of a crate and what each of them names of the others, tests left out.
struct Crate {
    text: BTreeMap<Path, String>,
    /// What the `use` lines of a module bring in: the name, and the path as it stands there.
    imports: BTreeMap<Path, BTreeMap<String, Path>>,
}

impl Crate {
    fn read(folder: &str) -> Self {
        let files = sources(folder).into_iter().filter_map(|(name, text)| {
            let name = name.strip_prefix(folder)?.strip_prefix('/')?;
            let mut path: Path = name
                .strip_suffix(".rs")?
                .split('/')
                .map(String::from)
                .collect();
            if path.iter().any(|part| part == "tests") {
                return None;
            }
            if path
                .last()
                .is_some_and(|last| last == "mod" || last == "lib")
            {
                path.pop();
            }
            let text = text.split("#[cfg(test)]\nmod tests {").next()?.to_owned();
            Some((path, text))
        });
        Crate::of(files)
    }

    fn of(files: impl IntoIterator<Item = (Path, String)>) -> Self {
        let text: BTreeMap<Path, String> = files.into_iter().collect();
        let imports = text.iter().map(|(module, text)| {
            let paths = use_lines(text).into_iter();
            let named =
                paths.filter_map(|(path, name)| Some((name, path)).filter(|(n, _)| n != "_"));
            (module.clone(), named.collect())
        });
        let imports = imports.collect();
        Crate { text, imports }
    }

    /// The module that a path leads to, as seen from another: through what others hand on, up to
    /// the item itself. `None`: another crate's.
    fn resolve(&self, from: &Path, path: &[String], depth: usize) -> Option<Path> {
        let mut rest = path;
        let mut module = match path.first()?.as_str() {
            "crate" | "hae" => {
                rest = &rest[1..];
                Path::new()
            }
            "self" => {
                rest = &rest[1..];
                from.clone()
            }
            "super" => {
                let mut module = from.clone();
                while rest.first().is_some_and(|part| part == "super") {
                    module.pop();
                    rest = &rest[1..];
                }
                module
            }
            _ => {
                let known = self.imports.get(from)?.contains_key(&path[0]);
                let child = [from.as_slice(), &path[..1]].concat();
                match known || self.text.contains_key(&child) {
                    true => from.clone(),
                    false => return None,
                }
            }
        };
        while let Some(part) = rest.first() {
            let child = [module.as_slice(), std::slice::from_ref(part)].concat();
            if self.text.contains_key(&child) {
                (module, rest) = (child, &rest[1..]);
                continue;
            }
            let handed_on = self.imports.get(&module).and_then(|names| names.get(part));
            return match handed_on {
                Some(next) if depth < 8 => {
                    let whole = [next.as_slice(), &rest[1..]].concat();
                    self.resolve(&module, &whole, depth + 1).or(Some(module))
                }
                _ => Some(module),
            };
        }
        Some(module)
    }

    /// Each module with the modules that it names, and how.
    fn named(&self) -> impl Iterator<Item = (&Path, Path, String)> {
        self.text.iter().flat_map(move |(module, text)| {
            let used = use_lines(text).into_iter().map(|(path, _)| path);
            let paths = used.chain(inline_paths(text));
            paths.filter_map(move |path| {
                let found = self.resolve(module, &path, 0)?;
                Some((module, found, path.join("::")))
            })
        })
    }

    /// Circles between what lies in one folder: the folder, and the names of those in the circle.
    fn circles(&self) -> BTreeSet<(String, BTreeSet<String>)> {
        let mut edges: BTreeMap<Path, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
        for (from, to, _) in self.named() {
            let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
            // A folder's own file names what lies in it, and is named by it.
            if let (Some(a), Some(b)) = (from.get(shared), to.get(shared)) {
                let folder = edges.entry(from[..shared].to_vec()).or_default();
                folder.entry(a.clone()).or_default().insert(b.clone());
            }
        }
        let mut circles = BTreeSet::new();
        for (folder, edges) in &edges {
            let reach: BTreeMap<&String, BTreeSet<&String>> = edges
                .keys()
                .map(|from| (from, reached(edges, from)))
                .collect();
            for (from, to) in reach.iter().filter(|(from, to)| to.contains(*from)) {
                let back = to
                    .iter()
                    .filter(|to| reach.get(**to).is_some_and(|r| r.contains(from)));
                circles.insert((folder.join("/"), back.map(|to| (*to).clone()).collect()));
            }
        }
        circles
    }
}

/// What can be come to from a file along the edges.
fn reached<'e>(
    edges: &'e BTreeMap<String, BTreeSet<String>>,
    from: &String,
) -> BTreeSet<&'e String> {
    let mut reached = BTreeSet::new();
    let mut open: Vec<&String> = edges[from].iter().collect();
    while let Some(next) = open.pop() {
        if reached.insert(next) {
            open.extend(edges.get(next).into_iter().flatten());
        }
    }
    reached
}

/// The paths of all `use` lines, with the name that each brings in.
fn use_lines(text: &str) -> Vec<(Path, String)> {
    let uses = Regex::new(r"\buse\s+([^;]+);").unwrap();
    let mut out = Vec::new();
    for found in uses.captures_iter(text) {
        let tree = found[1].split_whitespace().collect::<Vec<_>>().join(" ");
        spread(&[], &tree, &mut out);
    }
    out
}

/// `a::{b, c::d as e}` one by one.
fn spread(before: &[String], tree: &str, out: &mut Vec<(Path, String)>) {
    let tree = tree.trim();
    if let Some((head, inner)) = tree.split_once('{') {
        let head = head.split("::").filter(|part| !part.trim().is_empty());
        let head: Path = before
            .iter()
            .cloned()
            .chain(head.map(|p| p.trim().to_owned()))
            .collect();
        let inner = inner.rsplit_once('}').map_or(inner, |(inner, _)| inner);
        let (mut depth, mut start) = (0, 0);
        for (at, c) in inner.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    spread(&head, &inner[start..at], out);
                    start = at + 1;
                }
                _ => {}
            }
        }
        return spread(&head, &inner[start..], out);
    }
    if tree.is_empty() {
        return;
    }
    let (path, alias) = match tree.split_once(" as ") {
        Some((path, alias)) => (path, Some(alias.trim().to_owned())),
        None => (tree, None),
    };
    let mut whole: Path = before.to_vec();
    whole.extend(path.split("::").map(|part| part.trim().to_owned()));
    if whole.len() > 1 && whole.last().is_some_and(|last| last == "self") {
        whole.pop();
    }
    let name = alias.or_else(|| whole.last().cloned()).unwrap_or_default();
    out.push((whole, name));
}

/// Paths outside `use` lines.
fn inline_paths(text: &str) -> Vec<Path> {
    let uses = Regex::new(r"\buse\s+[^;]+;").unwrap();
    let path = Regex::new(r"\b[A-Za-z_]\w*(?:::[A-Za-z_]\w*)+").unwrap();
    let text = uses.replace_all(text, "");
    path.find_iter(&text)
        .map(|found| found.as_str().split("::").map(String::from).collect())
        .collect()
}

/// A row of the table: the modules that it is about, and those that they may know.
struct Row {
    modules: Vec<String>,
    /// `None`: everything.
    known: Option<Vec<String>>,
}

/// The names in backticks, without `/` and `.rs`.
fn quoted(cell: &str) -> Vec<String> {
    let names = cell.split('`').skip(1).step_by(2);
    let bare = |name: &str| {
        name.trim_end_matches('/')
            .trim_end_matches(".rs")
            .to_owned()
    };
    names.map(bare).collect()
}

/// The rows from the top. "and below" adds all rows under that of the last name.
fn rows(text: &str) -> Vec<Row> {
    let cells: Vec<Vec<&str>> = text
        .lines()
        .skip_while(|line| !line.starts_with("| module |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let modules: Vec<Vec<String>> = cells.iter().map(|cells| quoted(cells[0])).collect();
    let known = |cell: &str| {
        if cell == "everything" {
            return None;
        }
        let mut known = quoted(cell);
        if cell.ends_with(" and below") {
            let last = known.last().expect("a name before \"and below\"");
            let row = modules.iter().position(|m| m.contains(last));
            let row = row.unwrap_or_else(|| panic!("no row is about {last}"));
            known.extend(modules[row + 1..].iter().flatten().cloned());
        }
        known.extend(modules.last().into_iter().flatten().cloned());
        Some(known)
    };
    let known: Vec<_> = cells.iter().map(|cells| known(cells[2])).collect();
    let rows = modules.iter().cloned().zip(known);
    rows.map(|(modules, known)| Row { modules, known })
        .collect()
}

#[test]
fn every_module_knows_only_what_its_row_allows() {
    let rows = rows(&fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap());
    let hae = Crate::read("src");
    let modules: BTreeSet<&String> = hae.text.keys().filter_map(|path| path.first()).collect();
    for name in rows
        .iter()
        .flat_map(|row| row.modules.iter().chain(row.known.iter().flatten()))
    {
        assert!(
            modules.contains(name),
            "ARCHITECTURE.md: no module is called {name}"
        );
    }
    let mut wrong = BTreeSet::new();
    for (from, to, how) in hae.named() {
        let (Some(from), Some(to)) = (from.first(), to.first()) else {
            continue;
        };
        let mut own = rows.iter().filter(|row| row.modules.contains(from));
        let (Some(row), None) = (own.next(), own.next()) else {
            panic!("ARCHITECTURE.md: expected one row about {from}");
        };
        let allowed = from == to || row.known.as_ref().is_none_or(|known| known.contains(to));
        if !allowed {
            wrong.insert(format!("{from} names {how}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "not in ARCHITECTURE.md's table: {wrong:#?}"
    );
}

/// Circles that may stay: the folder, and all that may be part of one.
const ALLOWED: [(&str, &[&str]); 3] = [
    // Each file adds methods to the engine, which is made of what they define.
    (
        "llama",
        &[
            "attend", "engine", "layers", "memory", "model", "options", "room", "rope", "rows",
            "sampler", "state", "taps", "threads", "trial",
        ],
    ),
    // All options lie in one bag, with what each policy says of its own, and policies are made of it.
    (
        "policy",
        &[
            "budget",
            "ddes",
            "greedy",
            "h2o",
            "lowest",
            "options",
            "random",
            "registered",
            "scores",
            "snapkv",
        ],
    ),
    // The feed hands its rows to a trial run, which is a feed with fewer layers.
    ("generate", &["feed", "trial"]),
];

#[test]
fn the_files_of_a_folder_import_each_other_in_one_direction() {
    for folder in ["src", "xtask/src"] {
        for (place, circle) in Crate::read(folder).circles() {
            let mut allowed = ALLOWED.iter().filter(|(at, _)| *at == place);
            let known =
                allowed.any(|(_, files)| circle.iter().all(|f| files.contains(&f.as_str())));
            assert!(known, "{folder}/{place}: {circle:?} import each other");
        }
    }
}

#[test]
fn the_checks_of_imports_see_what_they_look_for() {
    let files = [
        (
            "a",
            "pub use inner::Thing;\nuse crate::b::{self, One as Other};",
        ),
        (
            "a/inner",
            "use super::super::c;\nfn f() { crate::b::f(c::X, std::mem::take(x)) }",
        ),
        ("b", "use crate::a::Thing;"),
        ("c", ""),
    ];
    let split = |path: &str| -> Path { path.split('/').map(String::from).collect() };
    let made = Crate::of(files.map(|(path, text)| (split(path), text.to_owned())));
    let named: BTreeSet<String> = made
        .named()
        .map(|(from, to, _)| format!("{} {}", from.join("/"), to.join("/")))
        .collect();
    let expected = ["a a/inner", "a b", "a/inner b", "a/inner c", "b a/inner"];
    assert_eq!(named, expected.map(String::from).into());
    let circle = ["a", "b"].map(String::from).into();
    assert_eq!(made.circles(), [(String::new(), circle)].into());

    let table = "| module | what | may know |\n|---|---|---|\n| `a.rs` | x | everything |\n\
        | `b/`, `c` | | `d` and below |\n| `d` | | nothing |\n| `e` | | nothing |\n| `f` | | nothing |";
    let rows = rows(table);
    assert_eq!(rows[0].modules, ["a"]);
    assert!(rows[0].known.is_none());
    assert_eq!(rows[1].modules, ["b", "c"]);
    assert_eq!(rows[1].known.as_deref().unwrap(), ["d", "e", "f", "f"]);
    assert_eq!(rows[2].known.as_deref().unwrap(), ["f"]);
}
