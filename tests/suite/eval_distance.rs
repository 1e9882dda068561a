//! Distance to the full cache on the small model: nothing between the full cache and itself, and
//! for a policy what its own logits, a softmax written down once more, and attention read another
//! way say.

use std::time::Duration;

use hae::asker::{Asker, Contender};
use hae::bench::Pulse;
use hae::cache::Pos;
use hae::controller::Controller;
use hae::engine::{Batch, Engine, Input, Observation};
use hae::eval::files::Source;
use hae::eval::question::Question;
use hae::eval::record::Distance;
use hae::generate::Session;
use hae::image::Picture;
use hae::llama::{ContextOptions, FlashAttention, LlamaEngine, Model, ScoreSource};
use hae::open::{Plan, RopeChoice};
use hae::policy::{Amount, PolicyOptions, PolicySpec};
use hae::prompt::{Template, place_pictures, tokenize};
use hae::{generate::Segment, llama::Piece, turn};

use crate::model::{TEXT, VISION, engine, exact, load, load_vision, prefill, repository};

const SET: &str = "tests/eval/small-phi3v/dev";
const N_CTX: u32 = 1024;

fn questions(file: &str) -> Vec<Question> {
    let source = Source {
        path: repository(&format!("{SET}/{file}")),
        ..Source::default()
    };
    source.read().unwrap().1
}

fn contender(
    asker: &Asker,
    policy: &str,
    options: PolicyOptions,
    base: &ContextOptions,
) -> Contender {
    let budget = options.kv_budget;
    let policy = PolicySpec::new(policy, options);
    let contender = asker.contender(policy.name.clone(), policy, budget, base);
    contender.unwrap()
}

fn at_budget(share: f64) -> PolicyOptions {
    PolicyOptions {
        kv_budget: Some(Amount::Share(share)),
        ..PolicyOptions::default()
    }
}

fn pictures(question: &Question) -> Vec<Picture> {
    let images = question.images.iter();
    images
        .map(|image| image.load(question.num_crops).unwrap())
        .collect()
}

fn watch<'a>() -> Pulse<'a> {
    Pulse {
        now: &|| Duration::ZERO,
        cancelled: &|| false,
    }
}

fn distances(
    contenders: &[Contender],
    base: &ContextOptions,
    asker: &mut Asker,
    question: &Question,
    n: usize,
) -> Vec<Vec<Distance>> {
    let pictures = pictures(question);
    let n_predict = vec![n; question.turns.len()];
    asker.next_question();
    let reference = asker.reference(base, question, &pictures, &n_predict, watch());
    let reference = reference.unwrap().unwrap();
    contenders
        .iter()
        .map(|contender| {
            let distances = asker.distance(
                contender,
                question,
                &pictures,
                &n_predict,
                &reference,
                watch(),
            );
            let (distances, _) = distances.unwrap().unwrap();
            distances.into_iter().map(Option::unwrap).collect()
        })
        .collect()
}

/// With flash attention and the taps beside it, on a question, a story and a chat of eight turns.
#[test]
fn the_full_cache_is_at_no_distance_of_itself() {
    let model = load(&repository(TEXT));
    let vision = load_vision(&repository(VISION), &model);
    let base = ContextOptions {
        flash_attention: FlashAttention::Auto,
        ..exact(N_CTX)
    };
    let mut asker = Asker::new(
        &model,
        Some(vision),
        Template::default().of(&model).unwrap(),
        RopeChoice::Auto,
    );
    let full = [contender(&asker, "full", PolicyOptions::default(), &base)];
    for (file, turns) in [
        ("understanding.jsonl", 1),
        ("story.jsonl", 1),
        ("chat.jsonl", 8),
    ] {
        let question = &questions(file)[0];
        let all = distances(&full, &base, &mut asker, question, 24);
        assert_eq!(all[0].len(), turns);
        for distance in &all[0] {
            assert!(
                distance.kl.iter().all(|&kl| kl == 0.0),
                "{file}: {distance:?}"
            );
            assert_eq!(
                (distance.kl_mean, distance.top1, distance.ppl_ratio),
                (0.0, 1.0, 1.0)
            );
            assert_eq!(distance.first_differing, None);
            assert_eq!(distance.lost.len(), distance.n_tokens - 1);
            assert_eq!(distance.attention_lost, Some(0.0));
        }
    }
}

/// The prompt of a question as segments.
fn segments(question: &Question, model: &Model) -> Vec<Segment> {
    let mut vision = load_vision(&repository(VISION), model);
    let pictures = pictures(question);
    let raw = question.turns[0].raw.as_ref().unwrap();
    let (text, _) = place_pictures(raw, 0, pictures.len(), true).unwrap();
    let pieces = tokenize(
        model,
        Some(&vision),
        &text,
        &pictures.iter().collect::<Vec<_>>(),
        true,
    );
    let segment = |piece| match piece {
        Piece::Text(tokens) => Segment::Tokens(tokens),
        Piece::Image(tokens) => turn::segment(vision.encode(&tokens).unwrap(), 0),
    };
    pieces.unwrap().into_iter().map(segment).collect()
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let most = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let powers: Vec<f64> = logits
        .iter()
        .map(|&x| (f64::from(x) - most).exp())
        .collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|x| x / sum).collect()
}

/// What the full cache says and predicts, and its attention by position, read by the callback
/// with flash attention off: no session, no taps.
struct Naive {
    engine: LlamaEngine,
    pos: Pos,
}

impl Naive {
    fn step(&mut self, token: i32) -> Vec<f32> {
        let batch = Batch {
            seq: 0,
            input: Input::Tokens(&[token]),
            pos: &[self.pos],
            queries: &[0],
            logits: true,
            lookup: None,
        };
        let (mut cells, mut seen) = (Vec::new(), Observation::default());
        self.engine.decode(batch, &mut cells, &mut seen).unwrap();
        // Nothing was ever removed: cells are positions.
        assert_eq!(cells, [self.pos as u32]);
        self.pos += 1;
        seen.sum
    }
}

#[test]
fn distances_are_what_logits_and_attention_say() {
    let model = load(&repository(TEXT));
    let question = &questions("story.jsonl")[0];
    // Exact sums on both sides, so that only the policy makes a difference.
    let base = exact(N_CTX);
    let vision = load_vision(&repository(VISION), &model);
    let mut asker = Asker::new(&model, Some(vision), None, RopeChoice::Auto);
    let n = 40;
    let contenders = ["hae", "random"].map(|name| contender(&asker, name, at_budget(0.4), &base));
    let measured = distances(&contenders, &base, &mut asker, question, n);

    let prompt = segments(question, &model);
    let mut naive = Naive {
        engine: engine(
            &model,
            ContextOptions {
                score_layers: (0..model.n_layer()).collect(),
                score_source: ScoreSource::Callback,
                ..base.clone()
            },
        ),
        pos: 0,
    };
    naive.pos = prefill(
        &mut naive.engine,
        &prompt,
        &mut Observation::default(),
        |_| false,
    );
    let best = |logits: &[f32]| {
        (0..logits.len())
            .rev()
            .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
            .unwrap()
    };
    let (mut full, mut attention, mut tokens) = (Vec::new(), Vec::new(), Vec::<i32>::new());
    while tokens.len() < n {
        if let Some(&token) = tokens.last() {
            attention.push(naive.step(token));
        }
        let logits = naive.engine.logits().unwrap().to_vec();
        tokens.push(best(&logits) as i32);
        full.push(logits);
    }

    for (contender, distance) in contenders.iter().zip(&measured) {
        let [distance] = &distance[..] else { panic!() };
        let mut policy = contender.policy.clone();
        policy.options.seed = seed_of(&question.id);
        let plan = Plan::new(&model, None, &base, &policy).unwrap();
        let engine = engine(&model, plan.context().clone());
        let policy = policy.create(plan.limits()).unwrap();
        let mut session = Session::new(engine, Controller::new(policy, N_CTX as usize));
        session.expect(n - 1);
        session.prefill(&prompt, &|| false).unwrap();
        let (mut kl, mut lost, mut same, mut ratio) = (Vec::new(), Vec::new(), Vec::new(), 0.0);
        for (i, full) in full.iter().enumerate() {
            if let Some(fed) = i.checked_sub(1) {
                let ledger = session.controller.ledger();
                let mut gone = attention[fed].clone();
                for entry in ledger.entries() {
                    gone[entry.pos as usize] = 0.0;
                }
                let own = ledger.newest().unwrap() as usize + 1;
                gone[own] = 0.0;
                lost.push(gone.iter().map(|&x| f64::from(x)).sum::<f64>());
                session.step(tokens[fed]).unwrap();
            }
            let logits = session.engine.logits().unwrap();
            let (p, q) = (softmax(full), softmax(logits));
            kl.push(
                p.iter()
                    .zip(&q)
                    .map(|(p, q)| if *p > 0.0 { p * (p / q).ln() } else { 0.0 })
                    .sum::<f64>(),
            );
            same.push(best(logits) as i32 == tokens[i]);
            ratio += (p[tokens[i] as usize] / q[tokens[i] as usize]).ln();
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let name = &contender.record.name;
        println!("{name}: KL {:.4}, lost {:.4}", mean(&kl), mean(&lost));
        assert_eq!(distance.n_tokens, n, "{name}");
        for (a, &b) in kl.iter().zip(&distance.kl) {
            assert!(
                (a - f64::from(b)).abs() < 1e-4 * (1.0 + a),
                "{name}: {a} {b}"
            );
        }
        assert!(
            (distance.kl_mean - mean(&kl)).abs() < 1e-4 * (1.0 + mean(&kl)),
            "{name}"
        );
        assert!(
            (distance.ppl_ratio.ln() - ratio / n as f64).abs() < 1e-4,
            "{name}"
        );
        assert_eq!(
            distance.first_differing,
            same.iter().position(|s| !s),
            "{name}"
        );
        let right = same.iter().filter(|&&s| s).count() as f64 / n as f64;
        assert_eq!(distance.top1, right, "{name}");
        assert!(mean(&lost) > 0.01, "{name} loses something");
        for (a, &b) in lost.iter().zip(&distance.lost) {
            assert!((a - f64::from(b)).abs() < 1e-4, "{name}: {a} {b}");
        }
    }
}

/// The seed that `hae eval` gives a policy for a question, of the seed 0.
fn seed_of(id: &str) -> u64 {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(id);
    u64::from_be_bytes(digest[..8].try_into().unwrap())
}
