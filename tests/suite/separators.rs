//! `--dap-mode early` on pictures whose patches look alike: what separates parts of a picture is
//! known from its layout, it counts among what is kept, and budgets hold.

use hae::controller::Controller;
use hae::generate::{Generated, Segment, Session};
use hae::image::{self, Picture};
use hae::llama::{ContextOptions, LlamaEngine, Model, Piece, Vision};
use hae::policy::{
    Amount, DapMode, DapOptions, DapRule, Layers, Limits, PolicyOptions, Scope, create,
};
use hae::prompt::{Template, Transcript, place_pictures, tokenize};
use hae::turn::segment;

use crate::model::{TEXT, VISION, engine, exact, load, load_vision, quiet, repository};

const N_CTX: u32 = 1024;
const QUESTION: &str = "Where is the red triangle?";

/// A picture of one grey, but for what `draw` says of a pixel.
fn drawn(side: u32, num_crops: u32, draw: impl Fn(u32, u32) -> Option<u8>) -> Picture {
    let pixels = (0..side * side).map(|i| draw(i % side, i / side).unwrap_or(255));
    Picture {
        width: side,
        height: side,
        rgb: pixels.flat_map(|grey| [grey; 3]).collect(),
        num_crops: Some(num_crops),
    }
}

fn noise(x: u32, y: u32) -> u8 {
    (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(2_246_822_519))
        .wrapping_mul(3_266_489_917)
        .to_be_bytes()[0]
}

fn demo() -> Picture {
    let picture = image::load(&repository("models/demo.png"), &image::Limits::default()).unwrap();
    Picture {
        num_crops: Some(16),
        ..picture
    }
}

fn mostly_blank() -> Picture {
    drawn(672, 16, |x, y| {
        let within = (180..220).contains(&x) && (350..390).contains(&y);
        within.then_some(40)
    })
}

fn prompt(model: &Model, vision: &mut Vision, picture: &Picture) -> Vec<Segment> {
    let (content, _) = place_pictures(QUESTION, 0, 1, true).unwrap();
    let mut transcript = Transcript::new(Template::default().of(model).unwrap(), None);
    let text = transcript.ask(content).unwrap();
    let pieces = tokenize(model, Some(&*vision), &text, &[picture], true).unwrap();
    let segments = pieces.into_iter().map(|piece| match piece {
        Piece::Text(tokens) => Segment::Tokens(tokens),
        Piece::Image(tokens) => segment(vision.encode(&tokens).unwrap(), 0),
    });
    segments.collect()
}

fn session(model: &Model, policy: &str, options: &PolicyOptions) -> Session<LlamaEngine> {
    let limits = Limits {
        n_layer: model.n_layer(),
        n_cells: N_CTX as usize,
    };
    let context = ContextOptions {
        score_layers: options.layers.resolve(model.n_layer()),
        ..exact(N_CTX)
    };
    let policy = create(policy, options, limits).unwrap();
    Session::new(
        engine(model, context),
        Controller::new(policy, N_CTX as usize),
    )
}

fn early(keep: Option<Amount>, kv_budget: Option<Amount>) -> PolicyOptions {
    PolicyOptions {
        layers: Layers::List(vec![0, 1, 2, 3]),
        dap: Some(DapOptions {
            rule: keep.map_or(DapRule::Auto, DapRule::Keep),
            alpha: None,
            scope: Scope::Turn,
        }),
        dap_mode: DapMode::Early,
        kv_budget,
        ..PolicyOptions::default()
    }
}

fn ask(session: &mut Session<LlamaEngine>, prompt: &[Segment], n: usize) -> Generated {
    session.engine.clear();
    session.controller.clear();
    session.forget();
    quiet(|hooks| session.generate(prompt, Some(n), hooks)).unwrap()
}

/// Visual tokens in the cache, and those of them that separate.
fn kept(session: &Session<LlamaEngine>) -> (usize, usize) {
    let visual = session.controller.ledger().counts().live.vision;
    let entries = session.controller.ledger().entries();
    (visual, entries.filter(|entry| entry.separator).count())
}

#[test]
fn as_many_are_kept_as_were_asked_for_whatever_looks_alike() {
    let model = load(&repository(TEXT));
    let mut vision = load_vision(&repository(VISION), &model);
    // Name, picture, visual tokens, separators, and pairs of what is asked for and what is kept.
    let share = Amount::Share;
    let small = [(share(0.2), 17)];
    let large = [(share(0.1), 64), (Amount::Cells(30), 30), (share(0.4), 257)];
    type Case<'a> = (&'a str, Picture, usize, &'a [(Amount, usize)]);
    let cases: [Case<'_>; 6] = [
        ("demo", demo(), 643, &large),
        ("mostly blank", mostly_blank(), 643, &large),
        ("white", drawn(672, 16, |_, _| None), 643, &large),
        (
            "noise",
            drawn(672, 16, |x, y| Some(noise(x, y))),
            643,
            &large,
        ),
        (
            "a line of noise on black",
            drawn(1344, 16, |x, y| match y {
                600..=623 => Some(noise(x, y)),
                _ => Some(0),
            }),
            643,
            &[(share(0.2), 129)],
        ),
        // The crop and the whole view are the same.
        (
            "one crop",
            drawn(336, 1, |x, y| Some(noise(x, y))),
            85,
            &small,
        ),
    ];
    for (name, picture, n, amounts) in cases {
        let prompt = prompt(&model, &mut vision, &picture);
        for &(amount, expected) in amounts {
            let mut session = session(&model, "hae", &early(Some(amount), None));
            let generated = ask(&mut session, &prompt, 1);
            assert_eq!(generated.prompt.vision, n, "{name}");
            // The rows of the crops and of the whole view, and what stands between them.
            let rows = (n as f64).sqrt() as usize / 6 * 6 + 6 + 1;
            let (visual, separators) = kept(&session);
            assert_eq!(visual, expected, "{name}");
            assert_eq!(separators, rows.min(expected / 2), "{name}");
            let counts = session.controller.ledger().counts();
            assert_eq!(
                counts.peak,
                counts.cells(),
                "{name}: the rest never went in"
            );
        }
    }
}

#[test]
fn the_object_stays_and_the_blank_page_goes() {
    let model = load(&repository(TEXT));
    let mut vision = load_vision(&repository(VISION), &model);
    let prompt = prompt(&model, &mut vision, &demo());
    let options = PolicyOptions {
        layers: Layers::All,
        ..early(None, None)
    };
    let mut session = session(&model, "hae", &options);
    let generated = ask(&mut session, &prompt, 24);
    assert_eq!(generated.text.trim(), "Row 6, column 7");
    assert_eq!(kept(&session), (257, 31));
}

#[test]
fn a_budget_holds_on_pictures_of_blank_page() {
    let model = load(&repository(TEXT));
    let mut vision = load_vision(&repository(VISION), &model);
    for picture in [demo(), mostly_blank()] {
        let prompt = prompt(&model, &mut vision, &picture);
        for policy in ["hae", "dap", "fastv", "mustdrop"] {
            for budget in [Amount::Cells(100), Amount::Cells(40), Amount::Share(0.1)] {
                let mut session = session(&model, policy, &early(None, Some(budget)));
                let generated = ask(&mut session, &prompt, 8);
                let most = match budget {
                    Amount::Cells(cells) => cells,
                    Amount::Share(share) => {
                        (share * generated.prompt.total() as f64).round() as usize
                    }
                };
                let report = session.controller.report();
                assert!(
                    report.peak_decoding <= most && report.cells.peak <= most,
                    "{policy}: {} of {most}",
                    report.cells.peak
                );
            }
        }
    }
}
