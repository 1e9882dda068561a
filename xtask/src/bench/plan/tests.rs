use super::*;

const HEAD: &str = r#"
threads = 2
rounds = 3
[models]
full = { file = "{models}/full.gguf", make = "--type q4_0" }
small = { file = "small.gguf" }
[quick]
model = "small"
parts = []
[quick.set]
"-n" = "4"
"-d" = "64"
"#;

fn parse(parts: &str) -> Result<Plan> {
    Plan::parse(&format!("{HEAD}{parts}"), "benches/x.toml")
}

fn error(parts: &str) -> String {
    format!("{:#}", parse(parts).unwrap_err())
}

#[test]
fn the_plans_in_the_repository_can_be_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for suite in ["cpu", "cuda"] {
        let plan = Plan::read(root, suite).unwrap();
        for part in &plan.parts {
            for run in plan.runs(part, true).unwrap() {
                let Kind::Hae(args) = &run.kind else { continue };
                assert!(
                    args.windows(2)
                        .all(|w| w[0] != "-d" || w[1] == "64" || w[1] == "0"),
                    "{run:?}"
                );
            }
            // What a table tells rows apart by is a value of `each`, or a field of the results.
            let known = ["run", "n_depth", "type_k", "policy", "what", "line"];
            for table in &part.tables {
                let is =
                    |name: &String| part.each.contains_key(name) || known.contains(&name.as_str());
                assert!(table.rows.iter().all(is), "{}", table.name);
            }
        }
    }
    let e = Plan::read(root, "metal").unwrap_err();
    assert_eq!(e.to_string(), "metal: expected one of cpu, cuda");
    assert!(Plan::read(root, "../Cargo").is_err());
}

#[test]
fn an_unknown_key_is_refused_with_its_line() {
    let line = HEAD.lines().count() + 1;
    let part = "[[part]]\nname = \"a\"\nabout = \"b\"\nmodel = \"full\"\nargs = \"-n 1\"\n";
    assert!(parse(part).is_ok());
    for (wrong, at) in [
        ("argz = \"-n 1\"\n", 5),
        ("[[part.run]]\nname = \"r\"\nwarm = true\n", 7),
        (
            "[[part.table]]\nname = \"t\"\nrows = []\ncolumns = [\n  { head = \"h\", valu = \"v\" },\n]\n",
            9,
        ),
        ("rounds = \"three\"\n", 5),
    ] {
        let error = error(&format!("{part}{wrong}"));
        assert!(
            error.starts_with(&format!("benches/x.toml:{}: ", line + at)),
            "{wrong}: {error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn a_run_for_each_combination_and_program() {
    let plan = parse(
        r#"
[[part]]
name = "p"
about = "a"
model = "full"
program = "both"
args = "-n 8 -d {depth} --kv-policy full {cache}"
each = { depth = [16, 4096], cache = ["-fa on", "-fa off -ctk f16"] }
env = { SPINS = "{depth}" }
"#,
    )
    .unwrap();
    let runs = plan.runs(&plan.parts[0], false).unwrap();
    let told: Vec<String> = runs
        .iter()
        .map(|run| match &run.kind {
            Kind::Hae(args) => format!("hae {}", args.join(" ")),
            Kind::Stock(args) => format!("stock {}", args.join(" ")),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(told.len(), 8);
    assert_eq!(told[0], "hae -n 8 -d 16 --kv-policy full -fa on");
    assert_eq!(told[1], "stock -n 8 -d 16 -fa on");
    assert_eq!(told[7], "stock -n 8 -d 4096 -fa off -ctk f16");
    assert_eq!(runs[7].name, "p 4096 -fa off -ctk f16");
    assert_eq!(runs[7].env["SPINS"], "4096");
    assert_eq!(runs[7].model.as_deref(), Some("full"));
    let quick = plan.runs(&plan.parts[0], true).unwrap();
    let Kind::Hae(args) = &quick[6].kind else {
        panic!("{quick:?}")
    };
    assert_eq!(
        args.join(" "),
        "-n 4 -d 64 --kv-policy full -fa off -ctk f16"
    );
    assert_eq!(quick[6].model.as_deref(), Some("small"));
}

#[test]
fn a_run_adds_to_what_its_part_says() {
    let plan = parse(
        r#"
[[part]]
name = "p"
about = "a"
model = "full"
args = "-n 0"
[[part.run]]
name = "bench"
args = "-p 1"
[[part.run]]
name = "memory"
program = "read"
[[part.run]]
name = "tests"
command = "{suite} 'a b' {out}"
keep = ["ok"]
"#,
    )
    .unwrap();
    let runs = plan.runs(&plan.parts[0], false).unwrap();
    assert_eq!(
        runs[0].kind,
        Kind::Hae(["-n", "0", "-p", "1"].map(str::to_owned).into())
    );
    assert_eq!(runs[1].kind, Kind::Read);
    let Kind::Command { words, .. } = &runs[2].kind else {
        panic!("{runs:?}")
    };
    assert_eq!(words[..], ["{suite}", "a b", "{out}"]);
    // Nothing stays nothing in a quick run.
    let quick = plan.runs(&plan.parts[0], true).unwrap();
    assert_eq!(quick[0].kind, runs[0].kind);
}

#[test]
fn what_cannot_run_is_refused() {
    let part = |rest: &str| error(&format!("[[part]]\nname = \"p\"\nabout = \"a\"\n{rest}\n"));
    for (rest, reason) in [
        ("args = \"-n 1\"", "no model"),
        (
            "model = \"other\"\nargs = \"-n 1\"",
            "model other: expected one of full, small",
        ),
        ("model = \"full\"", "no args, no command"),
        (
            "model = \"full\"\nargs = \"-n 1\"\ncommand = \"x\"",
            "either args or a command",
        ),
        (
            "model = \"full\"\nargs = \"-n {n}\"",
            "{n} is no key of `each`",
        ),
        ("model = \"full\"\nargs = \"-n 'a\"", "an open quote"),
        (
            "model = \"full\"\nargs = \"-n 1\"\neach = { out = [1] }",
            "each.out: this name is taken",
        ),
        (
            "model = \"full\"\nargs = \"-n 1\"\neach = { n = 1 }",
            "each.n: expected a list",
        ),
        (
            "model = \"full\"\nprogram = \"both\"\nargs = \"--kv-policy hae\"",
            "stock is compared with --kv-policy full alone",
        ),
        (
            "model = \"full\"\nargs = \"-n 1\"\n[[part.run]]\nname = \"r\"\n[[part.run]]\nname = \"r\"",
            "two runs of the name `r`",
        ),
        (
            "model = \"full\"\nargs = \"-n 1\"\n[[part.run]]\nname = \"r\"\nrounds = 2",
            "run `r`: about, optional, rounds, each, run and table are its part's",
        ),
    ] {
        let error = part(rest);
        assert!(error.ends_with(reason), "{rest}: {error}");
    }
    let twice = "[[part]]\nname = \"p\"\nabout = \"a\"\ncommand = \"x\"\n".repeat(2);
    assert!(
        error(&twice).ends_with("two of part p"),
        "{}",
        error(&twice)
    );
}
