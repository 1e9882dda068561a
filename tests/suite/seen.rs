//! What lookups chose, in a trace and on its page.

use hae::attend::Attend;
use hae::cache::{Cell, Modality, Pos};
use hae::controller::Controller;
use hae::generate::Session;
use hae::llama::ContextOptions;
use hae::policy::{Amount, Limits, PolicyOptions, PolicySpec};
use hae::report;
use hae::trace::{self, Cut, Record};
use tempfile::TempDir;

use crate::bin::answer;
use crate::model::{
    PICTURE, STORY, TEXT, VISION, engine, exact, goldens_of, load, load_vision, repository,
};

/// By position, how many layers attended to each token, step by step: as the sets are when they
/// are asked for, and as the trace has them.
#[test]
fn traces_hold_the_sets_of_every_layer() {
    let (text, vision) = (repository(TEXT), repository(VISION));
    let model = load(&text);
    let mut vision = load_vision(&vision, &model);
    let goldens = goldens_of("small-phi3v");
    let golden = goldens.iter().find(|g| g.id() == "story0").unwrap();
    let prompt = golden.segments(&model, &mut vision);
    let folder = TempDir::new().unwrap();
    for (first_layer, plain) in [(0, false), (2, true)] {
        let context = ContextOptions {
            attend: Attend {
                vision: Some(Amount::Share(0.15)),
                text: Some(Amount::Share(0.25)),
                recent: 4,
                first_layer,
                ..Attend::default()
            },
            keep_sets: true,
            plain_lookups: plain,
            ..exact(512)
        };
        let attend = context.attend;
        let engine = engine(&model, context);
        let limits = Limits {
            n_layer: model.n_layer(),
            n_cells: 512,
        };
        let full = PolicySpec::new("full", PolicyOptions::default());
        let controller = Controller::new(full.create(limits).unwrap(), limits.n_cells);
        let mut session = Session::new(engine, controller);
        let path = folder.path().join(format!("{first_layer}.trace"));
        let header = trace::Header::new("small".into(), limits, &full, Vec::new());
        // Nobody asks for attention here.
        let writer = trace::Writer::create(&path, header).unwrap();
        session.controller.record(Box::new(writer));
        session.prefill(&prompt, &|| false).unwrap();
        let mut expected: Vec<Vec<(Pos, u32)>> = Vec::new();
        for _ in 0..80 {
            let token = session.sample().unwrap();
            session.step(token).unwrap();
            let ledger = session.controller.ledger();
            let mut counts: Vec<(Pos, u32)> = ledger.entries().map(|e| (e.pos, 0)).collect();
            counts.sort_unstable();
            for layer in first_layer..model.n_layer() {
                for cell in session.engine.looked_up(layer).unwrap() {
                    let pos = session.controller.ledger().get(cell).unwrap().pos;
                    counts[pos as usize].1 += 1;
                }
            }
            expected.push(counts);
        }
        session.controller.finish_recording().unwrap();

        let (_, records) = trace::read(&path, Cut::Refuse).unwrap();
        let mut cells: Vec<(Cell, Pos, Modality)> = Vec::new();
        let mut told = Vec::new();
        let prompt_end = session.controller.next_pos() - 80;
        for record in &records {
            match record {
                Record::Inserted {
                    cells: taken,
                    pos,
                    origin,
                } => {
                    let rows = taken.iter().zip(pos);
                    cells.extend(rows.map(|(&cell, &pos)| (cell, pos, origin.modality)));
                }
                Record::Looked { layers, counts } => {
                    assert_eq!(*layers, model.n_layer() - first_layer);
                    let counts: Vec<Option<u32>> = counts.iter().collect();
                    let next = cells.last().unwrap().1;
                    let of = |&(cell, pos, modality): &(Cell, Pos, Modality)| {
                        let count = counts.get(cell as usize).copied().flatten();
                        let question = prompt_end - 64..prompt_end;
                        let always = pos < attend.sinks as Pos
                            || pos >= next - attend.recent as Pos
                            || modality == Modality::Text && question.contains(&pos);
                        assert_eq!(count.is_none(), always, "position {pos} at {next}");
                        (pos, count.unwrap_or(*layers))
                    };
                    told.push(cells.iter().map(of).collect::<Vec<_>>());
                }
                _ => {}
            }
        }
        assert_eq!(told, expected);
    }
}

/// The program's own trace: it changes no answer, its shares are those of the report, and the
/// page has a picture for each sentence.
#[test]
fn a_page_shows_what_was_looked_at() {
    let folder = TempDir::new().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (path, page) = (file("a.trace"), file("a.html"));
    let picture = repository(PICTURE);
    let told = |flags: &[&str]| -> serde_json::Value {
        let start = ["run", "--image", picture.to_str().unwrap(), "-p", STORY];
        let rest = ["--temp", "0", "-t", "1", "-n", "120", "-o", "json"];
        serde_json::from_str(&answer(&[&start[..], &rest, flags].concat())).unwrap()
    };
    let ways: [&[&str]; 3] = [
        &["--attend", "0.15", "--attend-text", "0.25"],
        &["--attend", "20", "--attend-from", "1", "-fa", "off"],
        &[
            "--attend",
            "0.2",
            "--kv-policy",
            "hae",
            "--kv-budget",
            "0.6",
        ],
    ];
    for way in ways {
        let report = told(&[way, &["--trace", &path]].concat());
        assert_eq!(report["text"], told(way)["text"], "{way:?}");
        let traced = report::Traced::read(path.as_ref(), Cut::Refuse).unwrap();
        let story = &traced.stories[0];
        let mut all = hae::attend::Attended::default();
        for moment in &story.moments {
            all.steps += moment.attended.steps;
            all.in_view += moment.attended.in_view;
            all.attended += moment.attended.attended;
            all.in_view_vision += moment.attended.in_view_vision;
            all.attended_vision += moment.attended.attended_vision;
        }
        let shares = serde_json::to_value(all.shares()).unwrap();
        assert_eq!(shares, report["attended"], "{way:?}");

        // A story of a few sentences, which are all there.
        let text = report["text"].as_str().unwrap();
        let n = story.sentences.len();
        let steps: usize = story.sentences.iter().map(|s| s.steps).sum();
        assert!(n > 5 && story.sentences_left_out == 0, "{n}");
        assert_eq!(steps as u64, all.steps);
        for sentence in &story.sentences {
            assert!(text.contains(&sentence.text), "{sentence:?}");
        }
        assert_eq!(
            answer(&["report", "--trace", &path, "-o", &page]),
            "",
            "{way:?}"
        );
        let html = std::fs::read_to_string(&page).unwrap();
        assert_eq!(html.matches("<svg class=\"seen\"").count(), n, "{way:?}");
        assert!(html.contains("Share of the cache that a layer attends to"));
        // What was told is checked as ever.
        if !way.contains(&"hae") {
            answer(&["replay", &path, "--kv-policy", "h2o@0.5"]);
        } else {
            answer(&["replay", &path]);
        }
    }
    // Without lookups there is nothing of it.
    told(&["--trace", &path]);
    answer(&["report", "--trace", &path, "-o", &page]);
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(!html.contains("class=\"strip\"") && !html.contains("Share of the cache"));
}
