use serde_json::json;

use super::super::results::tests::line;
use super::*;

fn table(text: &str) -> Table {
    toml::from_str(text).unwrap()
}

fn row(policy: &str, flash: &str, tpot: f64) -> Value {
    json!({ "kv_policy": policy, "flash_attn": flash, "n_depth": 4096, "samples": { "tpot_ms": [tpot] } })
}

fn markdown(lines: &[Line], text: &str) -> String {
    let lines: Vec<&Line> = lines.iter().collect();
    Samples::new(&lines)
        .markdown(&table(text))
        .unwrap()
        .unwrap()
}

#[test]
fn ratios_are_medians_of_rounds_and_not_ratios_of_medians() {
    // The machine slows down on the way, and the second round of `hae` is the odd one.
    let rounds = [(100.0, 50.0), (1000.0, 900.0), (2000.0, 1000.0)];
    let lines: Vec<Line> = rounds
        .iter()
        .enumerate()
        .map(|(i, &(full, hae))| line("r", i, vec![row("full", "on", full), row("hae", "on", hae)]))
        .collect();
    let text = r#"
        name = "t"
        rows = ["n_depth", "run"]
        columns = [
            { head = "full", value = "tpot_ms", of = { policy = "full" } },
            { head = "hae, s", value = "tpot_ms", unit = "s", of = { policy = "hae" }, spread = true },
            { head = "ratio", value = "tpot_ms", of = { policy = "hae" }, to = { policy = "full" }, spread = true },
        ]"#;
    assert_eq!(
        markdown(&lines, text),
        "| depth |   | full | hae, s | ratio |\n|---|---|---|---|---|\n\
         | 4,096 | r | 1,000 | 0.90 (0.05 to 1.00) | 0.50 (0.50 to 0.90) |\n"
    );
}

#[test]
fn the_better_setting_is_the_base_and_is_named() {
    let lines = [
        line("off", 0, vec![row("stock", "off", 200.0)]),
        line("on", 0, vec![row("stock", "on", 400.0)]),
        line("ours", 0, vec![row("full", "on", 100.0)]),
        line("off", 1, vec![row("stock", "off", 220.0)]),
    ];
    let text = r#"
        name = "t"
        rows = ["n_depth"]
        columns = [
            { head = "llama.cpp", value = "tpot_ms", of = { policy = "stock" }, best = "flash_attn", named = true },
            { head = "ratio", value = "tpot_ms", of = { policy = "full" }, to = { policy = "stock" }, best = "flash_attn" },
        ]"#;
    assert!(markdown(&lines, text).ends_with("| 4,096 | 210 (`-fa off`) | 0.50 |\n"));
    // Where rows are runs, the base is the best of them.
    let text = r#"
        name = "t"
        rows = ["run"]
        columns = [{ head = "ratio", value = "tpot_ms", to = { policy = "stock" }, best = "run" }]"#;
    assert!(markdown(&lines, text).ends_with("| off | 1.00 |\n| on | 2.00 |\n| ours | 0.50 |\n"));
}

#[test]
fn a_column_that_does_not_say_which_is_an_error() {
    let lines = [line(
        "r",
        0,
        vec![row("full", "on", 1.0), row("hae", "on", 2.0)],
    )];
    let lines: Vec<&Line> = lines.iter().collect();
    let text =
        "name = \"t\"\nrows = [\"n_depth\"]\ncolumns = [{ head = \"ms\", value = \"tpot_ms\" }]";
    let error = Samples::new(&lines)
        .markdown(&table(text))
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("table t, column `ms`: several results in one round of `r`"),
        "{error}"
    );
}

#[test]
fn what_is_not_there_is_a_dash_and_a_row_of_dashes_is_none() {
    let lines = [
        line("a", 0, vec![row("full", "on", 12.25)]),
        line(
            "b",
            0,
            vec![json!({ "kv_policy": "hae", "tpot_ms_median": null })],
        ),
    ];
    let text = r#"
        name = "t"
        rows = ["run"]
        columns = [
            { head = "ms", value = "tpot_ms" },
            { head = "hae", value = "tpot_ms", of = { policy = "hae" } },
        ]"#;
    assert!(markdown(&lines, text).ends_with("|---|---|---|\n| a | 12.2 | - |\n"));
    let lines: Vec<&Line> = lines[1..].iter().collect();
    assert_eq!(Samples::new(&lines).markdown(&table(text)).unwrap(), None);
}

#[test]
fn a_token_is_weighed_against_what_the_threads_read_in_its_round() {
    // 80 bytes of weights, 20 of 10 cells of which 9 are in view on average: 98 bytes in 10 ms.
    let token = json!({
        "kv_policy": "full", "model_size": 80, "kv_bytes_in_use": 20, "kv_cells_end": 10, "n_gen": 2,
        "samples": { "tpot_ms": [10.0] },
    });
    let lines = [
        line("memory", 0, vec![json!({ "read_bytes_per_s": 19_600.0 })]),
        line("token", 0, vec![token]),
        line("memory", 1, vec![json!({ "read_bytes_per_s": 1.0 })]),
    ];
    let text = r#"
        name = "t"
        rows = ["run"]
        columns = [
            { head = "bytes", value = "token_bytes", digits = 0 },
            { head = "a second", value = "token_bytes_per_s", digits = 0 },
            { head = "share", value = "bandwidth_share", unit = "%", digits = 0 },
        ]"#;
    assert!(markdown(&lines, text).ends_with("|\n| token | 98 | 9,800 | 50 |\n"));
}

#[test]
fn a_policy_that_looks_up_is_another_one() {
    let with = |attend: Value| {
        let mut row = row("full", "on", 1.0);
        row["attend"] = attend;
        row
    };
    let share = |share: f64| json!({ "vision": { "share": share }, "text": null });
    let lines = [line("r", 0, vec![with(Value::Null), with(share(0.15))])];
    let text = "name = \"t\"\nrows = [\"policy\"]\ncolumns = []";
    assert!(markdown(&lines, text).ends_with("| full |\n| full --attend |\n"));
    let lines = [line("r", 0, vec![with(share(1.0))])];
    assert!(markdown(&lines, text).ends_with("| full |\n"));
}

#[test]
fn thousands_stand_apart() {
    assert_eq!(number(1_234_567.891, 1), "1,234,567.9");
    assert_eq!(number(-1234.0, 0), "-1,234");
    assert_eq!(number(999.0, 0), "999");
    assert_eq!(text(&json!("-fa on")), "`-fa on`");
    assert_eq!(text(&json!("16384")), "16,384");
    assert_eq!(text(&json!("a|b")), "a\\|b");
}
