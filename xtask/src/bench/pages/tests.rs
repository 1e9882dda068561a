use serde_json::json;

use super::super::origin::tests::origin;
use super::super::results::tests::line;
use super::*;

const PLAN: &str = r#"
threads = 2
rounds = 1
[models]
m = { file = "m.gguf" }
[quick]
model = "m"
parts = []
[[part]]
name = "p"
about = "What p is."
model = "m"
[[part.run]]
name = "a"
args = "-n 1"
[[part.run]]
name = "b"
args = "-n 2"
[[part.table]]
name = "t"
rows = ["run"]
columns = [{ head = "ms", value = "ms" }]
"#;

/// A result of a run of [`PLAN`].
fn result(plan: &Plan, run: &str, commit: &str, ms: f64) -> Line {
    let runs = plan.runs(&plan.parts[0], false).unwrap();
    let of = runs.iter().find(|r| r.name == run).unwrap();
    Line {
        what: results::what(of, 2, false),
        origin: origin(commit),
        ..line(run, 0, vec![json!({ "ms": ms })])
    }
}

fn tables(plan: &Plan, lines: &[Line]) -> Vec<Ready> {
    let source = Source {
        suite: "cpu",
        plan,
        lines,
        threads: 2,
        quick: false,
    };
    source.tables(&[&plan.parts[0]]).unwrap()
}

#[test]
fn a_table_is_of_one_commit_the_newest_that_has_all_of_it() {
    let plan = Plan::parse(PLAN, "x").unwrap();
    let mut lines = vec![
        result(&plan, "a", "aaaaaaa", 1.0),
        result(&plan, "b", "aaaaaaa", 2.0),
        result(&plan, "a", "bbbbbbb", 3.0),
    ];
    let ready = tables(&plan, &lines);
    assert_eq!(ready.len(), 1);
    let text = &ready[0].text;
    assert!(
        text.starts_with("|   | ms |\n|---|---|\n| a | 1.00 |\n| b | 2.00 |\n\nAMD EPYC (avx2"),
        "{text}"
    );
    let below = "2 cores, 23 GiB. Built with release, rustc 1.90.0, `-C target-cpu=native`, cc 13. \
                 Commit `aaaaaaa`, 2026-01-02. `cargo xtask bench cpu p`, one run each, 2 threads.\n\n\
                 ```\nhae bench\n```\n";
    assert!(text.ends_with(below), "{text}");
    lines.push(result(&plan, "b", "bbbbbbb", 4.0));
    assert!(
        tables(&plan, &lines)[0]
            .text
            .contains("| a | 3.00 |\n| b | 4.00 |")
    );
    // Nothing whole: the newest, and what is missing is said.
    let text = &tables(&plan, &lines[2..3])[0].text;
    assert!(
        text.contains("| a | 3.00 |\n\n") && text.contains("2 threads; 1 of 2 runs are missing."),
        "{text}"
    );
    // A result whose arguments are no longer in the plan is none of it.
    let mut other = lines[..1].to_vec();
    other[0].what = "else".into();
    assert!(tables(&plan, &other).is_empty());
}

#[test]
fn a_page_keeps_what_is_written_by_hand() {
    let plan = Plan::parse(PLAN, "x").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut lines = vec![result(&plan, "a", "aaaaaaa", 1.0)];
    let path = dir.path().join("amd-epyc-avx512-2-cores.md");
    let said = write(dir.path(), &tables(&plan, &lines)).unwrap();
    assert!(said[0].ends_with("t is new, at the end"), "{said:?}");
    let page = fs::read_to_string(&path).unwrap();
    assert!(
        page.contains("\n## p\n\nWhat p is.\n\n<!-- bench:t -->\n| "),
        "{page}"
    );
    let by_hand = page.replace("What p is.", "By hand.") + "\nBehind it.\n";
    fs::write(&path, &by_hand).unwrap();
    write(dir.path(), &tables(&plan, &lines)).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), by_hand);
    lines[0].rows[0]["ms"] = json!(9.0);
    let said = write(dir.path(), &tables(&plan, &lines)).unwrap();
    assert_eq!(said.len(), 1, "{said:?}");
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        by_hand.replace("1.00", "9.00")
    );
}

#[test]
fn markers_without_a_partner_are_named_and_leave_the_page_alone() {
    let put = |page: &str| put(page, "t", "new\n");
    let done = put("a\n<!-- bench:t -->\nold\n<!-- /bench -->\nb\n")
        .unwrap()
        .unwrap();
    assert_eq!(done, "a\n<!-- bench:t -->\nnew\n<!-- /bench -->\nb\n");
    assert_eq!(put("a\n<!-- bench:u -->\n<!-- /bench -->\n").unwrap(), None);
    for (page, reason) in [
        (
            "a\n<!-- bench:t -->\nold\n",
            "line 2: `<!-- bench:t -->` is not closed",
        ),
        (
            "<!-- bench:u -->\n<!-- bench:t -->\n<!-- /bench -->\n",
            "line 1: `<!-- bench:u -->` is not closed before line 2",
        ),
        (
            "a\n<!-- /bench -->\n",
            "line 2: `<!-- /bench -->` closes nothing",
        ),
        (
            "<!-- bench:t -->\n<!-- /bench -->\n<!-- bench:t -->\n<!-- /bench -->\n",
            "line 3: a second `<!-- bench:t -->`",
        ),
    ] {
        assert_eq!(put(page).unwrap_err().to_string(), reason);
    }
}

#[test]
fn commits_that_a_page_names_are_found() {
    let found: Vec<&str> = named("Commit `aaaaaaa`, then commit `bbbbbbb` and `ccccccc`").collect();
    assert_eq!(found, ["aaaaaaa", "bbbbbbb"]);
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join(FOLDER)).unwrap();
    let page = "x\n<!-- bench:t -->\ncommit `aaaaaaa`\n<!-- /bench -->\ncommit `bbbbbbb`\n";
    fs::write(dir.path().join(FOLDER).join("m.md"), page).unwrap();
    let said = check(dir.path()).unwrap();
    assert_eq!(said.len(), 2);
    assert!(
        said[0].starts_with("docs/performance/m.md:3: t: `aaaaaaa` is in no history"),
        "{said:?}"
    );
    assert!(
        said[1].starts_with("docs/performance/m.md:5: `bbbbbbb`"),
        "{said:?}"
    );
}
