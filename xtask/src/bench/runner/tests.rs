use super::super::plan::Plan;
use super::*;

const PLAN: &str = r#"
threads = 2
rounds = 1
[models]
m = { file = "{models}/m.gguf" }
[quick]
model = "m"
parts = []
[[part]]
name = "p"
about = "a"
model = "m"
[[part.run]]
name = "ours"
program = "both"
args = "-n 8 --kv-policy full"
cpus = "0,1"
[[part.run]]
name = "counted"
args = "-r 5 -t 1 -p 'a b'"
warmup = true
env = { SPINS = "0" }
[[part.run]]
name = "tests"
command = "{suite} --out {out}"
"#;

fn runner<'a>(plan: &'a Plan, root: &'a Path, programs: Programs) -> Runner<'a> {
    Runner {
        root,
        out: root,
        plan,
        programs,
        models: root.join("full"),
        threads: 4,
        quick: true,
    }
}

#[test]
fn commands_are_told_as_they_can_be_repeated() {
    let plan = Plan::parse(PLAN, "x").unwrap();
    let programs = Programs::from([("hae".to_owned(), PathBuf::from("/far/hae"))]);
    let root = Path::new("/clone");
    let runner = runner(&plan, root, programs);
    let runs = plan.runs(&plan.parts[0], false).unwrap();
    let told: Vec<String> = runs.iter().map(|run| runner.told(run).unwrap()).collect();
    assert_eq!(
        told,
        [
            "taskset -c 0,1 hae bench -m full/m.gguf -t 4 -r 1 --no-warmup -n 8 --kv-policy full -o jsonl",
            "taskset -c 0,1 hae-stock -m full/m.gguf -t 4 -n 8",
            "SPINS=0 hae bench -m full/m.gguf -r 5 -t 1 -p 'a b' -o jsonl",
            "suite --out /clone",
        ]
    );
    assert_eq!(runner.line(&runs[2]).unwrap().words[0], "/far/hae");
    let can: Vec<bool> = runs.iter().map(|run| runner.can(run)).collect();
    assert_eq!(can, [true, false, true, false]);
    let error = runner.make("m").err().unwrap().to_string();
    assert_eq!(error, "/clone/full/m.gguf: missing");
}

/// A command of the plan, run in a folder of its own.
#[cfg(unix)]
fn outcome(settings: &str) -> Result<Vec<Value>> {
    let dir = tempfile::tempdir().unwrap();
    let part = format!("[[part]]\nname = \"p\"\nabout = \"a\"\n{settings}\n");
    let head = PLAN.split("[[part]]").next().unwrap();
    let plan = Plan::parse(&format!("{head}{part}"), "x").unwrap();
    let run = plan.runs(&plan.parts[0], false).unwrap().remove(0);
    let runner = runner(&plan, dir.path(), Programs::new());
    runner.run(&run, 0).map(|outcome| outcome.rows)
}

#[cfg(unix)]
#[test]
fn lines_that_are_kept_come_from_either_output_and_once() {
    let rows = outcome(
        r#"command = '''sh -c "echo '{\"a\":1}'; echo test result: ok; echo else; echo test result: ok >&2"'''
           keep = ["test result"]"#,
    );
    assert_eq!(
        rows.unwrap(),
        [json!({ "a": 1 }), json!({ "line": "test result: ok" })]
    );
}

#[cfg(unix)]
#[test]
fn a_run_that_fails_says_why() {
    let error = |settings: &str| format!("{:#}", outcome(settings).err().unwrap());
    let failed = error("command = '''sh -c 'echo the reason >&2; exit 3' '''");
    assert!(
        failed.starts_with("exit status: 3; ") && failed.ends_with("\nthe reason"),
        "{failed}"
    );
    let silent = error("command = \"true\"");
    assert!(
        silent.starts_with("printed nothing that can be read"),
        "{silent}"
    );
    let missing = error("command = \"/no/such/program\"");
    assert!(missing.starts_with("/no/such/program: "), "{missing}");
    let slow = error("command = \"sleep 60\"\nlimit = 0");
    assert!(slow.starts_with("took more than 0 s"), "{slow}");
}

#[test]
fn criterions_medians_are_read_in_the_order_of_their_sizes() {
    let dir = tempfile::tempdir().unwrap();
    for (name, ns) in [("step/16384", 3000.0), ("step/1024", 1500.0)] {
        let folder = dir.path().join("parts").join(name).join("new");
        fs::create_dir_all(&folder).unwrap();
        let text = json!({ "median": { "point_estimate": ns } }).to_string();
        fs::write(folder.join("estimates.json"), text).unwrap();
    }
    let rows = estimates(dir.path()).unwrap();
    assert_eq!(
        rows,
        [
            json!({ "what": "parts/step/1024", "us": 1.5 }),
            json!({ "what": "parts/step/16384", "us": 3.0 }),
        ]
    );
}

#[test]
fn a_word_is_quoted_where_a_shell_would_split_it() {
    assert_eq!(quoted("--kv-policy=full,hae"), "--kv-policy=full,hae");
    assert_eq!(quoted("Where is it?"), "'Where is it?'");
    assert_eq!(quoted("it's"), r"'it'\''s'");
    assert_eq!(quoted(""), "''");
}
