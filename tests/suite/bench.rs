//! `hae bench` on the embedded model: what it prints and what has to hold between its figures.
//! How long anything takes is no matter here.

use serde_json::Value;

use crate::bin::{answer, hae, refusal};
use crate::model::repository;

/// `hae bench` with these words, quick ones added.
fn words(args: &str) -> Vec<String> {
    let quick = ["bench", "-t", "1", "-r", "2", "--no-warmup"];
    let args = args.split_whitespace().map(|word| match word {
        "TEXT" => repository("models/small-phi3v-Q8_0.gguf")
            .to_str()
            .unwrap()
            .to_owned(),
        "VISION" => repository("models/mmproj-small-phi3v-F16.gguf")
            .to_str()
            .unwrap()
            .to_owned(),
        _ => word.to_owned(),
    });
    quick.iter().map(|&w| w.to_owned()).chain(args).collect()
}

fn rows(args: &str) -> Vec<Value> {
    let text = answer(&words(&format!("{args} -o json")));
    match serde_json::from_str(&text).unwrap() {
        Value::Array(rows) => rows,
        other => panic!("{other}"),
    }
}

fn number(row: &Value, key: &str) -> f64 {
    let value = &row[key];
    value.as_f64().unwrap_or_else(|| panic!("{key}: {value}"))
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    let value = &row[key];
    value.as_str().unwrap_or_else(|| panic!("{key}: {value}"))
}

/// What holds for every row, whatever was measured.
fn check(row: &Value) {
    let repetitions = number(row, "repetitions") as usize;
    for (metric, values) in row["samples"].as_object().unwrap() {
        let values = values.as_array().unwrap();
        assert_eq!(values.len(), repetitions, "{metric}");
        let [q1, median, q3] = ["q1", "median", "q3"].map(|part| &row[format!("{metric}_{part}")]);
        if values.iter().all(Value::is_null) {
            assert!(median.is_null(), "{metric}");
            continue;
        }
        let values: Vec<f64> = values.iter().map(|v| v.as_f64().unwrap()).collect();
        let [q1, median, q3] = [q1, median, q3].map(|v| v.as_f64().unwrap());
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        assert!(
            0.0 < least && least <= q1 && q1 <= median && median <= q3 && q3 <= most,
            "{metric}: {values:?}, {q1} {median} {q3}"
        );
    }
    // The parts of each repetition's time to the first token.
    let samples = |metric: &str, i: usize| row["samples"][metric][i].as_f64();
    for i in 0..repetitions {
        if let Some(ttft) = samples("ttft_ms", i) {
            let parts = ["encode_ms", "probe_ms", "prefill_ms"];
            let sum: f64 = parts.iter().filter_map(|part| samples(part, i)).sum();
            assert!((ttft - sum).abs() < 1e-6, "{ttft} is not {sum}");
        }
    }
    let [end, peak] = ["kv_cells_end", "kv_cells_peak"].map(|key| number(row, key));
    assert!(0.0 < end && end <= peak && peak <= number(row, "n_ctx"));
    let [used, most, allocated, highest] = [
        "kv_bytes_in_use",
        "kv_bytes_peak",
        "kv_bytes_allocated",
        "kv_bytes_allocated_peak",
    ]
    .map(|key| number(row, key));
    assert!(used <= most && used <= allocated && most <= highest && allocated <= highest);
    // Bytes of a cell: K and V of 8 layers of 256 values.
    let value = match text(row, "type_k") {
        "q8_0" => 34.0 / 32.0,
        _ => 2.0,
    };
    assert_eq!(used, end * 8.0 * 2.0 * 256.0 * value);
    for key in ["cpu_info", "backends", "ggml", "system_info", "hae_version"] {
        assert!(!text(row, key).is_empty(), "{key}");
    }
    if cfg!(target_os = "linux") && !row["peak_rss_bytes"].is_null() {
        assert!(number(row, "peak_rss_bytes") > most);
    }
}

#[test]
fn each_combination_is_a_row() {
    let rows = rows("-p 16,32 -n 4 -pg 8,4 -d 0,20 -ub 16,32 --kv-policy hae,full");
    let expected: Vec<String> = ["16", "32"]
        .iter()
        .flat_map(|n_ubatch| {
            ["", " @ d20"].into_iter().flat_map(move |depth| {
                ["pp16", "pp32", "tg4", "pp8+tg4"]
                    .into_iter()
                    .flat_map(move |test| {
                        ["hae", "full"].map(|policy| format!("{n_ubatch} {test}{depth} {policy}"))
                    })
            })
        })
        .collect();
    let found: Vec<String> = rows
        .iter()
        .map(|row| {
            let [test, policy] = ["test", "kv_policy"].map(|key| text(row, key));
            format!("{} {test} {policy}", row["n_ubatch"])
        })
        .collect();
    assert_eq!(found, expected);
    for row in &rows {
        check(row);
        let [prompt, generated, depth] =
            ["n_prompt", "n_gen", "n_depth"].map(|key| number(row, key));
        // Decoding needs a token to go on from.
        let before = if depth + prompt == 0.0 { 1.0 } else { depth };
        assert_eq!(number(row, "kv_cells_peak"), before + prompt + generated);
        assert_eq!(row["ttft_ms_median"].is_null(), prompt == 0.0);
        assert_eq!(row["tpot_ms_median"].is_null(), generated == 0.0);
        let first = text(row, "kv_policy") == "hae";
        assert_eq!(row["compared_with"].is_null(), first);
        assert_eq!(row["ttft_ratio_median"].is_null(), first || prompt == 0.0);
        assert_eq!(
            row["tpot_ratio_median"].is_null(),
            first || generated == 0.0
        );
        // The cache of `full` is llama.cpp's, which has its size from the start.
        assert_eq!(row["kv_size"].is_null(), !first);
        assert_eq!(text(row, "flash_attn"), "auto");
    }
}

/// A depth of copies is as deep as one that went through the model.
#[test]
fn a_depth_can_be_copies() {
    for flash_attention in ["on", "off"] {
        let flags = "-p 0 -n 2 -d 1200 --kv-policy full,h2o --kv-budget 0.9 -r 1 --no-warmup";
        let rows = rows(&format!("{flags} -fa {flash_attention} --depth-copies"));
        let cells = rows.iter().map(|row| number(row, "kv_cells_peak"));
        let cells: Vec<f64> = cells.collect();
        assert!(cells[0] == 1202.0 && cells[1] > 1100.0, "{cells:?}");
        assert!(rows.iter().all(|row| number(row, "depth_copies") == 1.0));
    }
}

#[test]
fn pictures_go_in_front_of_prompts_and_hae_prunes_them() {
    let rows = rows(
        "-p 8 -n 2 -pg 8,30 --images 0,2 --image-size 336x336 --dap-keep 50 --no-ddes --recall-after 99",
    );
    let tests: Vec<&str> = rows.iter().map(|row| text(row, "test")).collect();
    let expected = ["pp8", "2img+pp8", "tg2", "pp8+tg30", "2img+pp8+tg30"];
    assert_eq!(tests, expected.map(|test| [test; 2]).concat());
    for row in &rows {
        check(row);
        let shown = number(row, "n_images");
        let hae = text(row, "kv_policy") == "hae" && shown > 0.0;
        assert_eq!(row["encode_ms_median"].is_null(), shown == 0.0);
        assert_eq!(row["image_width"].is_null(), shown == 0.0);
        if shown > 0.0 {
            assert_eq!(number(row, "image_tokens"), 199.0);
        }
        let evicted = if hae { 2.0 * 199.0 - 50.0 } else { 0.0 };
        assert_eq!(number(row, "evicted_vision"), evicted, "{}", row["test"]);
        assert_eq!(number(row, "evicted_text"), 0.0);
        let all = 199.0 * shown + number(row, "n_prompt") + number(row, "n_gen");
        let before = if number(row, "n_prompt") == 0.0 {
            1.0
        } else {
            0.0
        };
        assert_eq!(number(row, "kv_cells_end"), all + before - evicted);
    }
}

#[test]
fn a_picture_takes_as_many_rows_as_its_crops() {
    let rows = |crops: &str| {
        let rows = rows(&format!("-p 4 -n 0 --images 1 --kv-policy full {crops}"));
        check(&rows[0]);
        number(&rows[0], "image_tokens")
    };
    // A square picture: (crops + 1) * 36, the line ends of both views, and the separator.
    assert_eq!(rows(""), 199.0);
    assert_eq!(rows("--num-crops 1"), 2.0 * 36.0 + 2.0 * 6.0 + 1.0);
    assert_eq!(rows("--num-crops 9"), 10.0 * 36.0 + 4.0 * 6.0 + 1.0);
}

#[test]
fn a_model_without_a_vision_file_takes_made_up_embeddings() {
    let rows = rows(
        "-m TEXT -p 8 -n 0 --images 1 --image-tokens 20,40 --sinks 0 --recent 8 --dap-keep 0.4",
    );
    assert_eq!(rows.len(), 4);
    for (row, tokens) in rows.iter().zip([20.0, 20.0, 40.0, 40.0]) {
        check(row);
        assert!(row["encode_ms_median"].is_null());
        assert_eq!(number(row, "image_tokens"), tokens);
        assert!(row["image_width"].is_null() && row["mmproj_filename"].is_null());
        assert_eq!(number(row, "kv_cells_peak"), tokens + 8.0);
        let evicted = match text(row, "kv_policy") {
            "full" => 0.0,
            // 40 % stay.
            _ => 0.6 * tokens,
        };
        assert_eq!(number(row, "evicted_vision"), evicted);
    }
}

#[test]
fn all_formats_carry_the_same_columns() {
    const CASE: &str = "-p 8 -n 4 --kv-policy full,hae";
    let json = rows(CASE);
    let names: Vec<String> = json[0]
        .as_object()
        .unwrap()
        .keys()
        .filter(|name| *name != "samples")
        .cloned()
        .collect();

    let jsonl = answer(&words(&format!("{CASE} -o jsonl")));
    assert_eq!(jsonl.lines().count(), 4);
    for line in jsonl.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        assert!(
            row.as_object()
                .unwrap()
                .keys()
                .eq(json[0].as_object().unwrap().keys())
        );
    }

    let csv = answer(&words(&format!("{CASE} -o csv")));
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    assert!(reader.headers().unwrap().iter().eq(names.iter()));
    let records: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    assert_eq!(records.len(), 4);
    let column = |name: &str| names.iter().position(|n| n == name).unwrap();
    for (record, row) in records.iter().zip(&json) {
        for name in ["kv_policy", "test", "model_filename"] {
            assert_eq!(&record[column(name)], text(row, name));
        }
        let params: Value = serde_json::from_str(&record[column("kv_params")]).unwrap();
        assert_eq!(params, row["kv_params"]);
        assert_eq!(
            record[column("kv_cells_end")],
            row["kv_cells_end"].to_string()
        );
        assert_eq!(
            record[column("ttft_ms_median")].is_empty(),
            row["ttft_ms_median"].is_null()
        );
    }

    let sql = answer(&words(&format!("{CASE} -o sql")));
    let lines: Vec<&str> = sql.lines().collect();
    assert!(lines[0].starts_with("CREATE TABLE IF NOT EXISTS hae_bench (hae_version TEXT, "));
    assert_eq!(lines[0].matches(", ").count() + 1, names.len());
    let insert = format!("INSERT INTO hae_bench ({}) VALUES ('", names.join(", "));
    assert_eq!(lines.len(), 5);
    assert!(
        lines[1..]
            .iter()
            .all(|line| line.starts_with(&insert) && line.ends_with(");"))
    );

    let table = answer(&words(&format!("{CASE} -o md")));
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 2 + 4);
    let cells = |line: &str| {
        let cells = line.split('|').map(|cell| cell.trim().to_owned());
        cells.collect::<Vec<_>>()
    };
    let titles = cells(lines[0]);
    for title in [
        "kv policy",
        "TTFT ms",
        "TPOT ms",
        "TTFT / full",
        "KV used MiB",
    ] {
        assert!(titles.iter().any(|t| t == title), "{title}: {titles:?}");
    }
    // No pictures, no trial run.
    assert!(
        !titles
            .iter()
            .any(|t| t.starts_with("encode") || t.starts_with("probe"))
    );
    assert!(lines.iter().all(|line| cells(line).len() == titles.len()));
}

#[test]
fn the_same_seed_feeds_the_same_tokens() {
    let evicted = |seed| {
        let rows = rows(&format!(
            "-p 0 -n 0 -pg 8,40 --images 1 --kv-policy hae -s {seed} --kv-budget 60 --bin-size 8"
        ));
        let row = rows[0].clone();
        check(&row);
        (number(&row, "evicted_text"), number(&row, "evicted_vision"))
    };
    assert_eq!(evicted(1), evicted(1));
}

#[test]
fn what_cannot_be_measured_is_refused_in_one_line() {
    for (args, expected) in [
        ("-p 1,,2", "-p: \"1,,2\" has an empty place"),
        ("-p many", "-p: \"many\": expected numbers from 0"),
        ("-p 9-3", "-p: \"9-3\": runs backwards"),
        ("-n -5", "-n: \"-5\": expected numbers"),
        ("-d 5+", "-d: \"5+\": expected numbers"),
        ("-p 0 -n 0", "-p, -n: 0, expected at least one test"),
        ("-p 16777216 -n 0 -d 16777216", "expected at most 16777216"),
        ("-pg 512", "-pg: \"512\": expected the tokens of a prompt"),
        ("-r 0", "-r: \"0\", expected 1 to 10000"),
        ("-r many", "-r: \"many\""),
        ("-t 0", "-t: \"0\": expected numbers from 1 to 512"),
        ("-b 0", "-b: \"0\": expected numbers from 1"),
        ("-ub 0", "-ub: \"0\": expected numbers from 1"),
        ("-fa maybe", "-fa: \"maybe\": expected on, off or auto"),
        ("-ctk q9", "-ctk: \"q9\": expected f32, f16"),
        ("-ngl some", "-ngl: \"some\": expected a number of layers"),
        (
            "-ctv q8_0 -fa off",
            "-ctv: a quantized V cache needs flash attention",
        ),
        (
            "--kv-policy lru",
            "--kv-policy: \"lru\": expected names of full, hae",
        ),
        (
            "--kv-policy hae,hae",
            "--kv-policy: hae is in the list twice",
        ),
        (
            "--kv-policy full --no-dap",
            "--no-dap: the policy full does not read it",
        ),
        (
            "--kv-budget 9",
            "--kv-budget: 9 cells, expected at least 22",
        ),
        ("--images x", "--images: \"x\""),
        (
            "--images 1 --image-size 5",
            "--image-size: \"5\": expected pixels",
        ),
        ("--images 1 --image-size 1x1", "--image-size: is 1x1 pixels"),
        ("--images 1 --image-tokens 0", "--image-tokens: \"0\""),
        (
            "-m TEXT --images 1",
            "--images: pictures need a vision file",
        ),
        ("-m nowhere.gguf", "nowhere.gguf: "),
        ("-m TEXT -m nowhere.gguf", "nowhere.gguf: "),
        ("-m TEXT --mmproj nowhere.gguf", "nowhere.gguf: "),
        ("-m VISION", "is a vision file"),
        ("-m TEXT --mmproj TEXT --images 1", "is a text model"),
        ("--mmproj VISION", "--mmproj: belongs to a text model"),
        (
            "-m TEXT --mmproj VISION --mmproj VISION",
            "2 vision files for 1 models",
        ),
    ] {
        let line = refusal(&words(args));
        assert!(
            line.starts_with("hae: ") && line.contains(expected),
            "{args}: expected \"{expected}\" in: {line}"
        );
    }
}

#[test]
fn few_repetitions_are_called_few() {
    let output = hae()
        .args(words("-p 4 -n 0 --kv-policy full"))
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("fewer than 3 repetitions"), "{stderr}");
}

/// Which of two rows of the same policy looked cells up, and how many.
#[test]
fn rows_say_what_was_looked_at() {
    let case = "-p 0 -n 4 -d 300 --kv-policy full,full --attend-text 0.1";
    let rows = rows(case);
    let [whole, looked] = &rows[..] else {
        panic!("{rows:?}");
    };
    check(whole);
    check(looked);
    assert!(whole["attend"].is_null() && whole["attended"].is_null());
    assert_eq!(looked["attend"]["text"]["share"], 0.1);
    assert!(looked["attend"]["vision"].is_null());
    // Of 301 to 304 cells the first 4, what stands for the question (64), and a tenth of the others; this
    // token and those before it are among the last 16.
    let share = number(looked, "attended");
    let expected = (4.0 + 64.0 + 23.0 + 2.5) / 302.5;
    assert!((share - expected).abs() < 0.005, "{share}, {expected}");
    assert!(looked["attended_vision"].is_null());

    let table = answer(&words(case));
    assert!(table.contains("| attended |"), "{table}");
    assert!(table.contains(&format!(" {share:.2} |")), "{table}");
    let plain = answer(&words("-p 0 -n 4 -d 300 --kv-policy full"));
    assert!(!plain.contains("attended"), "{plain}");
}
