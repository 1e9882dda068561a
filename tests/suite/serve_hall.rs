//! The hall of slots over the small model: many questions with pictures at once, each answered as a chat alone
//! would answer it.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hae::chat::{Begin, ChatOptions};
use hae::generate::Finish;
use hae::inspect::{Kind, inspect};
use hae::llama::{ByPolicy, CacheType, ContextOptions, Model, Vision};
use hae::policy::PolicySpec;
use hae::serve::ask::{Ask, End, Hall, Part, Told};
use hae::serve::hall::{HallOptions, open};
use hae::turn::Turn;
use hae::{Chat, Error};

use crate::model::{
    Golden, PICTURE, TEXT, VISION, exact, goldens_of, load, load_vision, quiet, repository,
};
use crate::others::{gemma3, mamba, qwen2vl};
use crate::precision;

const WAIT: Duration = Duration::from_secs(600);

fn model() -> Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| load(&repository(TEXT))).clone()
}

fn hall(policy: PolicySpec, n_ctx: u32, slots: u32) -> Arc<dyn Hall> {
    let options = HallOptions {
        context: exact(n_ctx),
        policy,
        n_parallel: Some(slots),
        ..HallOptions::default()
    };
    let model = model();
    let vision = load_vision(&repository(VISION), &model);
    open(options, model, Some(vision)).unwrap()
}

/// Questions about a picture each, with few crops, and a story.
fn questions() -> Vec<(Golden, usize)> {
    let goldens = goldens_of("small-phi3v").into_iter();
    let limit = |golden: Golden| match golden.id() {
        id if id.starts_with("qa") => Some((golden, 24)),
        "story0" => Some((golden, 40)),
        _ => None,
    };
    let mut all: Vec<_> = goldens.filter_map(limit).collect();
    let story = all.pop().unwrap();
    all.truncate(5);
    all.push(story);
    all
}

/// The question without the template and the picture's place.
fn question(golden: &Golden) -> &str {
    let text = golden
        .prompt()
        .strip_prefix("<|user|>\n<|image_1|>\n")
        .unwrap();
    text.strip_suffix("<|end|>\n<|assistant|>\n").unwrap()
}

/// A picture and what follows it in the prompt.
fn ask(golden: &Golden, behind: &str, n_predict: usize) -> Ask {
    Ask {
        prompt: vec![
            Part::Text("<|user|>\n".to_owned()),
            Part::Picture(Arc::new(golden.pictures[0].clone())),
            Part::Text(format!("\n{}", question(golden))),
            Part::Text(behind.to_owned()),
        ],
        n_predict: Some(n_predict),
        ..Ask::default()
    }
}

const TURN: &str = "<|end|>\n<|assistant|>\n";

#[derive(Debug, Default)]
struct Heard {
    slot: Option<usize>,
    cached: usize,
    prompt: usize,
    text: String,
    end: Option<End>,
    failed: Option<Error>,
    /// Rows of the prompt that went in.
    fed: usize,
    evicted: usize,
}

fn start(hall: &Arc<dyn Hall>, ask: Ask) -> Receiver<Told> {
    let (tell, told) = channel();
    let tell = Box::new(move |what| tell.send(what).is_ok());
    hall.ask(ask, tell).unwrap();
    told
}

fn heard(told: &Receiver<Told>) -> Heard {
    let mut heard = Heard::default();
    loop {
        match told.recv_timeout(WAIT).unwrap() {
            Told::Slot {
                slot,
                cached,
                prompt,
            } => (heard.slot, heard.cached, heard.prompt) = (Some(slot), cached, prompt),
            Told::Said { text, .. } => heard.text.push_str(&text),
            Told::Ended { end, rest, answer } => {
                heard.text.push_str(&rest);
                assert_eq!(answer.text, heard.text);
                heard.end = Some(end);
                heard.fed = answer.tokens.prompt.total();
                heard.evicted = answer.kv.cells.evicted.vision;
                return heard;
            }
            Told::Failed(error) => {
                heard.failed = Some(error);
                return heard;
            }
            _ => {}
        }
    }
}

fn whole(hall: &Arc<dyn Hall>, ask: Ask) -> Heard {
    heard(&start(hall, ask))
}

/// What a chat alone says to turns of one conversation, and the rows of their prompts.
fn alone(policy: &PolicySpec, golden: &Golden, turns: &[(&str, usize)]) -> Vec<(String, usize)> {
    let model = model();
    let options = ChatOptions {
        context: exact(4096),
        policy: policy.clone(),
        ..ChatOptions::default()
    };
    let vision = load_vision(&repository(VISION), &model);
    let mut chat = Chat::begin(&model, Some(vision), &options, Begin::default()).unwrap();
    let mut pictures = &golden.pictures[..];
    let mut said = Vec::new();
    for &(text, n_predict) in turns {
        let turn = Turn {
            text,
            pictures: std::mem::take(&mut pictures),
            n_predict: Some(n_predict),
            ..Turn::default()
        };
        let answer = quiet(|hooks| chat.turn(turn, hooks)).unwrap();
        said.push((answer.text, answer.tokens.prompt.total()));
    }
    said
}

#[test]
fn questions_at_once_are_each_answered_as_alone() {
    let questions = questions();
    for policy in [PolicySpec::full(), PolicySpec::hae()] {
        let hall = hall(policy.clone(), 4096, 3);
        let asked = questions
            .iter()
            .map(|(g, n)| start(&hall, ask(g, TURN, *n)));
        let asked: Vec<_> = asked.collect();
        let mut evicted = 0;
        for ((golden, n_predict), told) in questions.iter().zip(&asked) {
            let heard = heard(told);
            let (text, rows) = &alone(&policy, golden, &[(question(golden), *n_predict)])[0];
            assert_eq!(heard.text, *text, "{} {heard:?}", golden.id());
            assert_eq!(heard.prompt, *rows, "{}", golden.id());
            assert_eq!(heard.cached + heard.fed, *rows, "{}", golden.id());
            evicted += heard.evicted;
        }
        assert_eq!(evicted > 0, policy.name == "hae");
        let stats = hall.stats();
        assert_eq!((stats.questions, stats.processing), (6, 0));
        // Alone each would take a step for a token, one for its end, and three for its prompt.
        let tokens = stats.predicted_tokens;
        let steps = stats.steps;
        assert!(steps < tokens + 6 * 2, "{steps} steps for {tokens} tokens");
    }
}

#[test]
fn a_second_turn_goes_on_from_what_the_slot_holds() {
    let (golden, _) = &questions()[0];
    let second = "How many brown objects are there?";
    for policy in [PolicySpec::full(), PolicySpec::hae()] {
        let hall = hall(policy.clone(), 4096, 2);
        let first = whole(&hall, ask(golden, TURN, 24));
        let behind = format!("{TURN}{}<|end|>\n<|user|>\n{second}{TURN}", first.text);
        let next = whole(&hall, ask(golden, &behind, 24));
        let turns = [(question(golden), 24), (second, 24)];
        let expected = alone(&policy, golden, &turns);
        assert_eq!(first.text, expected[0].0);
        assert_eq!(
            (next.text.as_str(), next.fed),
            (&*expected[1].0, expected[1].1)
        );
        assert_eq!(
            (next.slot, next.cached),
            (first.slot, next.prompt - next.fed)
        );
        assert_eq!(hall.stats().pictures.misses, 1);
        // A slot that begins anew says the same under the full cache.
        if policy.name == "full" {
            let fresh = Ask {
                cache_prompt: false,
                ..ask(golden, &behind, 24)
            };
            let fresh = whole(&hall, fresh);
            assert_eq!((fresh.cached, fresh.text), (0, next.text));
            assert_eq!(hall.stats().pictures.misses, 1);
        }
    }
}

#[test]
fn who_vanishes_frees_the_slot() {
    let all = questions();
    let (story, _) = &all[5];
    let hall = hall(PolicySpec::full(), 2048, 1);
    let told = start(&hall, ask(story, TURN, 1000));
    while !matches!(told.recv_timeout(WAIT).unwrap(), Told::Said { .. }) {}
    drop(told);
    let next = whole(&hall, ask(&all[0].0, TURN, 24));
    assert_eq!(
        next.text,
        alone(&PolicySpec::full(), &all[0].0, &[(question(&all[0].0), 24)])[0].0
    );
    assert!(hall.stats().predicted_tokens < 100);
}

#[test]
fn where_cells_run_short_questions_wait() {
    let questions = questions();
    let (golden, _) = &questions[0];
    let rows = whole(&hall(PolicySpec::full(), 2048, 1), ask(golden, TURN, 1)).prompt;
    // Room for one prompt and a half.
    let n_ctx = u32::try_from(rows + rows / 2)
        .unwrap()
        .next_multiple_of(256);
    let hall = hall(PolicySpec::full(), n_ctx, 3);
    let asked: Vec<_> = questions[..5]
        .iter()
        .map(|(golden, n)| start(&hall, ask(golden, TURN, *n)))
        .collect();
    for ((golden, n), told) in questions[..5].iter().zip(&asked) {
        let heard = heard(told);
        assert!(heard.failed.is_none(), "{heard:?}");
        let expected = &alone(&PolicySpec::full(), golden, &[(question(golden), *n)])[0].0;
        assert_eq!(heard.text, *expected, "{}", golden.id());
        assert_eq!(heard.end, Some(End::Finish(Finish::Eog)));
    }
    let long = Ask {
        prompt: vec![Part::Tokens(vec![5; n_ctx as usize + 1])],
        ..Ask::default()
    };
    let failed = whole(&hall, long).failed;
    assert!(
        matches!(failed, Some(Error::PromptTooLong { .. })),
        "{failed:?}"
    );
}

#[test]
fn a_slot_goes_to_a_file_and_comes_back() {
    let (golden, _) = &questions()[0];
    let folder = tempfile::tempdir().unwrap();
    let second = "How many brown objects are there?";
    for policy in [PolicySpec::full(), PolicySpec::hae()] {
        let file = folder.path().join(&policy.name);
        let first_hall = hall(policy.clone(), 4096, 2);
        let first = whole(&first_hall, ask(golden, TURN, 24));
        let slot = first.slot.unwrap();
        let (tokens, bytes) = first_hall.save(slot, &file).unwrap();
        assert_eq!(bytes, std::fs::metadata(&file).unwrap().len());
        let behind = format!("{TURN}{}<|end|>\n<|user|>\n{second}{TURN}", first.text);
        let expected = whole(&first_hall, ask(golden, &behind, 24));
        // In another slot of another hall.
        let hall = hall(policy.clone(), 2048, 2);
        let found = inspect(&file, 0).unwrap();
        assert_eq!((found.kind, found.bytes), (Kind::Slot, bytes));
        assert_eq!(found.facts["policy"], policy.name);
        let kept = found.facts["tokens in the cache"].as_u64().unwrap() as usize;
        assert_eq!(kept == tokens, policy.name == "full", "{kept} of {tokens}");
        assert_eq!(hall.restore(1, &file).unwrap(), (tokens, bytes));
        let next = whole(&hall, ask(golden, &behind, 24));
        assert_eq!(next.slot, Some(1));
        assert_eq!((next.cached, next.fed), (expected.cached, expected.fed));
        assert_eq!(next.text, expected.text);
        // The picture was never seen there.
        assert_eq!(hall.stats().pictures.misses, 0);
        assert!(hall.erase(1).unwrap() >= tokens);
        assert_eq!(hall.slots()[1].cells.cells(), 0);
    }
    let options = HallOptions {
        context: ContextOptions {
            type_k: CacheType::F16,
            ..exact(512)
        },
        n_parallel: Some(1),
        ..HallOptions::default()
    };
    let hall = open(options, model(), None).unwrap();
    let line = hall.restore(0, &folder.path().join("full")).unwrap_err();
    assert!(line.to_string().contains("give `type_k` f32"), "{line}");
    std::fs::write(folder.path().join("other"), "something else").unwrap();
    assert!(hall.restore(0, &folder.path().join("other")).is_err());
    assert_eq!(hall.slots()[0].cells.cells(), 0);
}

#[test]
fn a_question_chooses_its_policy_and_what_it_cannot_have_is_refused() {
    let (golden, _) = &questions()[0];
    let hall = hall(PolicySpec::full(), 4096, 2);
    let with = |policy: PolicySpec| Ask {
        policy: Some(policy),
        ..ask(golden, TURN, 24)
    };
    let hae = whole(&hall, with(PolicySpec::hae()));
    let expected = alone(&PolicySpec::hae(), golden, &[(question(golden), 24)]);
    assert_eq!(hae.text, expected[0].0);
    assert!(hae.evicted > 0);
    let mut other = PolicySpec::hae();
    other.options.layers = hae::policy::Layers::List(vec![0]);
    let wants_other = match hall.facts().score_layers.as_slice() {
        [0] => None,
        _ => whole(&hall, with(other)).failed,
    };
    assert!(matches!(
        wants_other,
        Some(Error::Option {
            name: "kv_policy",
            ..
        })
    ));
    let none = whole(&hall, with(PolicySpec::new("nothing", Default::default())));
    assert!(matches!(none.failed, Some(Error::Option { .. })));
    let shifts = whole(
        &hall,
        with(PolicySpec::new("context_shift", Default::default())),
    );
    assert!(
        matches!(shifts.failed, Some(Error::Option { .. })),
        "{shifts:?}"
    );
    let looks = Ask {
        attend: Some(hae::attend::Attend::FEW),
        ..ask(golden, TURN, 24)
    };
    let looks = whole(&hall, looks).failed;
    assert!(
        matches!(looks, Some(Error::Option { name: "attend", .. })),
        "{looks:?}"
    );
    // None of them has done any harm.
    let full = whole(&hall, ask(golden, TURN, 24));
    assert_eq!(
        full.text,
        alone(&PolicySpec::full(), golden, &[(question(golden), 24)])[0].0
    );
}

#[test]
fn probabilities_are_those_of_the_tokens_that_were_said() {
    let (golden, _) = &questions()[0];
    let hall = hall(PolicySpec::full(), 2048, 1);
    let told = start(
        &hall,
        Ask {
            n_probs: 3,
            ..ask(golden, TURN, 24)
        },
    );
    let mut tokens = 0;
    loop {
        match told.recv_timeout(WAIT).unwrap() {
            Told::Said {
                token,
                chosen,
                likeliest,
                ..
            } => {
                tokens += 1;
                let chosen = chosen.unwrap();
                // Greedily.
                assert_eq!((chosen.token, &chosen), (token, &likeliest[0]));
                assert_eq!(likeliest.len(), 3);
                assert!(chosen.logprob <= 0.0);
                let sum: f32 = likeliest.iter().map(|choice| choice.logprob.exp()).sum();
                assert!(sum <= 1.001, "{likeliest:?}");
                assert_eq!(chosen.bytes, hall.piece(token).unwrap());
            }
            Told::Ended { .. } => break,
            _ => {}
        }
    }
    assert!(tokens > 0);
    assert!(matches!(hall.piece(-1), Err(Error::Contract { .. })));
}

#[test]
fn evicted_patches_are_seen() {
    let (golden, _) = &questions()[0];
    let hall = hall(PolicySpec::hae(), 2048, 1);
    let watch = Ask {
        watch: true,
        ..ask(golden, TURN, 24)
    };
    let told = start(&hall, watch);
    let seen = loop {
        if let Told::Seen { pictures, .. } = told.recv_timeout(WAIT).unwrap() {
            break pictures;
        }
    };
    let [picture] = &seen[..] else {
        panic!("{seen:?}");
    };
    // Crops of twelve by twelve patches.
    assert_eq!(picture.states.len(), picture.cols * picture.rows);
    assert_eq!(
        (picture.cols % 12, picture.rows % 12),
        (0, 0),
        "{picture:?}"
    );
    let of = |state: u8| picture.states.iter().filter(|&&s| s == state).count();
    assert!(of(0) > 0 && of(2) > of(0), "{picture:?}");
}

/// Alone in its hall a conversation looks up what it needs, and who watches sees what.
#[test]
fn a_hall_of_one_slot_looks_up() {
    // Long enough that patches are told between its tokens.
    let (golden, n_predict) = &questions()[5];
    let context = ContextOptions {
        by_policy: ByPolicy::ALL,
        n_ctx: 2048,
        n_threads: 1,
        n_threads_batch: 1,
        ..ContextOptions::default()
    };
    let options = HallOptions {
        context: context.clone(),
        policy: PolicySpec::hae(),
        n_parallel: Some(1),
        watch: true,
        ..HallOptions::default()
    };
    let vision = || load_vision(&repository(VISION), &model());
    let hall = open(options, model(), Some(vision())).unwrap();
    assert_eq!(hall.facts().attend.is_none(), precision::on_gpu());
    if precision::on_gpu() {
        // Attention to everything is as fast there.
        return;
    }
    let watch = Ask {
        watch: true,
        attend: hall.facts().attend,
        ..ask(golden, TURN, *n_predict)
    };
    let told = start(&hall, watch);
    let mut looked_up = 0;
    let text = loop {
        match told.recv_timeout(WAIT).unwrap() {
            Told::Seen { pictures, .. } => {
                let states = pictures.iter().flat_map(|picture| &picture.states);
                looked_up += states.filter(|&&state| state == 3).count();
            }
            Told::Ended { answer, .. } => break answer.text,
            _ => {}
        }
    };
    assert!(looked_up > 0);
    let options = ChatOptions {
        context,
        policy: PolicySpec::hae(),
        ..ChatOptions::default()
    };
    let mut chat = Chat::begin(&model(), Some(vision()), &options, Begin::default()).unwrap();
    let turn = Turn {
        text: question(golden),
        pictures: &golden.pictures,
        n_predict: Some(*n_predict),
        ..Turn::default()
    };
    let alone = quiet(|hooks| chat.turn(turn, hooks)).unwrap();
    assert_eq!(text, alone.text);
}

/// What cannot be taken back begins anew: windows, and a memory that is a state. Pictures whose rows share
/// positions go as a whole.
#[test]
fn models_whose_cache_holds_one_conversation_have_one_slot() {
    let pictures = [qwen2vl(1.0), gemma3(1.0)];
    let pictures = pictures.iter().map(|pair| {
        let model = load(&pair.file("text.gguf"));
        let vision = load_vision(&pair.file("vision.gguf"), &model);
        (model, Some(vision))
    });
    let (folder, recurrent) = (tempfile::tempdir().unwrap(), mamba());
    let file = folder.path().join("mamba.gguf");
    recurrent.write(&file);
    let all = pictures.chain([(load(&file), None)]);
    let mut cached = Vec::new();
    for (model, vision) in all.collect::<Vec<(Model, Option<Vision>)>>() {
        let picture = vision.is_some().then(|| {
            let limits = hae::image::Limits::default();
            let picture = hae::image::load(&repository(PICTURE), &limits).unwrap();
            Part::Picture(Arc::new(picture))
        });
        let arch = model.arch().to_owned();
        let options = HallOptions {
            context: exact(1024),
            ..HallOptions::default()
        };
        let hall = open(options, model, vision).unwrap();
        assert_eq!(hall.facts().slots, 1);
        let ask = |tail: &str, cache_prompt| Ask {
            prompt: [Part::Text("A picture of a dog. ".to_owned())]
                .into_iter()
                .chain(picture.clone())
                .chain([Part::Text(tail.to_owned())])
                .collect(),
            n_predict: Some(4),
            cache_prompt,
            ..Ask::default()
        };
        for tail in ["What is it?", "What is it for?", "Who are they?"] {
            let again = whole(&hall, ask(tail, true));
            cached.push((arch.clone(), again.cached));
            let fresh = whole(&hall, ask(tail, false));
            assert!(
                again.failed.is_none() && fresh.failed.is_none(),
                "{arch}: {again:?}"
            );
            assert_eq!((again.text, fresh.cached), (fresh.text, 0), "{arch}");
        }
    }
    println!("{cached:?}");
    // The picture stays where it can.
    let mut picture_stays = cached.iter().filter(|(arch, _)| arch == "qwen2vl").skip(1);
    assert!(picture_stays.all(|(_, cached)| *cached > 100), "{cached:?}");
}

#[test]
fn a_hall_says_what_it_is() {
    let start = Instant::now();
    let hall = hall(PolicySpec::hae(), 1024, 2);
    let facts = hall.facts();
    assert_eq!((facts.slots, facts.n_ctx, facts.vision), (2, 1024, true));
    assert_eq!((facts.bos.as_str(), facts.policy.as_str()), ("<s>", "hae"));
    assert_eq!(facts.n_vocab, model().n_vocab());
    let ids = hall.tokenize("<|user|>\nHi", true, true).unwrap();
    assert_eq!(ids[0], model().bos().unwrap());
    // A template that writes the first token itself is read as one that does not.
    let prompt = |text: &str| Ask {
        prompt: vec![Part::Text(text.to_owned())],
        n_predict: Some(0),
        cache_prompt: false,
        ..Ask::default()
    };
    let bare = whole(&hall, prompt("<|user|>\nHi"));
    let written = whole(&hall, prompt("<s><|user|>\nHi"));
    assert_eq!((bare.prompt, written.prompt), (ids.len(), ids.len()));
    assert_eq!(bare.end, Some(End::Finish(Finish::Length)));
    hall.close(Arc::default());
    assert!(start.elapsed() < Duration::from_secs(120));
}

#[test]
fn slots_that_cannot_be_are_refused() {
    let options = HallOptions {
        context: ContextOptions {
            n_batch: 4,
            ..exact(512)
        },
        n_parallel: Some(8),
        ..HallOptions::default()
    };
    let error = open(options, model(), None).err().unwrap();
    assert!(
        matches!(
            error,
            Error::Option {
                name: "n_seq_max",
                ..
            }
        ),
        "{error}"
    );
}
