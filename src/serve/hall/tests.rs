//! The hall with a scripted engine: who gets a slot, who waits, and what is told.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::desk::Desk;
use super::mind::Mind;
use super::units::{Held, Piece, Unit};
use super::work::Worker;
use crate::attend::Attend;
use crate::cache::{BinOptions, Pos};
use crate::controller::Controller;
use crate::engine::scripted::Scripted;
use crate::engine::{Constraint, Engine, Greedy, Sampler, Token};
use crate::error::{Error, Result};
use crate::generate::{Finish, Segment, Slot};
use crate::image::Picture;
use crate::llama::SamplerOptions;
use crate::policy::{Amount, Limits, PolicySpec};
use crate::serve::ask::{Ask, End, Part, Refused, Told};

const WAIT: Duration = Duration::from_secs(20);

/// A model whose texts are bytes, and whose pictures have as many rows as they are wide.
struct Script {
    engine: Scripted,
    encoded: Arc<AtomicUsize>,
}

impl Mind for Script {
    type Engine = Scripted;
    type Picture = usize;
    type Saved = ();

    fn engine(&mut self) -> &mut Scripted {
        &mut self.engine
    }

    fn look(&self) -> &Scripted {
        &self.engine
    }

    fn read(&self, prompt: &[Part]) -> Result<Vec<Piece<usize>>> {
        let read = prompt.iter().map(|part| match part {
            Part::Text(text) => Piece::Tokens(text.bytes().map(Token::from).collect()),
            Part::Tokens(tokens) => Piece::Tokens(tokens.clone()),
            Part::Picture(picture) => {
                let rows = picture.width as usize;
                let unit = Unit::Picture {
                    content: (picture.sha256(), 0),
                    rows,
                    positions: rows,
                };
                Piece::Picture(unit, rows)
            }
        });
        Ok(read.collect())
    }

    fn encode(&mut self, &n: &usize) -> Result<Segment> {
        self.encoded.fetch_add(1, Ordering::Relaxed);
        if n == 13 {
            // What a bug does.
            std::panic::resume_unwind(Box::new("thirteen"));
        }
        Ok(Segment::Image {
            embeddings: vec![0.5; 3 * n],
            n,
            image: 0,
            axes: None,
            separators: Vec::new(),
        })
    }

    fn controller(&self, policy: &PolicySpec) -> Result<Controller> {
        let n_cells = self.engine.n_cells();
        let limits = Limits {
            n_layer: 2,
            n_cells,
        };
        Ok(Controller::new(policy.create(limits)?, n_cells))
    }

    fn bin(&self) -> BinOptions {
        BinOptions::ram(1 << 16)
    }

    fn check_attend(&self, attend: &Attend) -> Result<()> {
        match attend.is_whole() {
            true => Ok(()),
            false => Err(Error::option("attend", "everything")),
        }
    }

    fn sampler(&self, _: &SamplerOptions) -> Box<dyn Sampler> {
        Box::new(Greedy)
    }

    fn save(&mut self, _: &mut Slot<'static>, _: &Held, _: &std::path::Path) -> Result<u64> {
        Err(Error::contract("a script is not saved"))
    }

    fn open(&self, _: &std::path::Path) -> Result<((), usize, u64)> {
        Err(Error::contract("a script is not saved"))
    }

    fn restore(&mut self, _: &mut Slot<'static>, (): ()) -> Result<Held> {
        Err(Error::contract("a script is not saved"))
    }
}

struct World {
    desk: Desk,
    encoded: Arc<AtomicUsize>,
}

/// What is said at each position: 30 texts of a letter and a digit, then nothing more from 90 on.
fn says(pos: Pos) -> Token {
    match pos {
        90.. => 0,
        pos => 150 + pos % 30,
    }
}

/// A hall of a cache of so many cells.
fn world(n_cells: usize, slots: usize, queue: usize) -> World {
    let encoded = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&encoded);
    let desk = Desk::open(slots, queue, move |shared| {
        let engine = Scripted::new(n_cells, 8).patched().with_says(says);
        let mind = Script {
            engine,
            encoded: count,
        };
        let policy = PolicySpec::full();
        let worker = Worker::new(mind, slots, policy, 1000, shared);
        worker.unwrap().run();
    });
    World {
        desk: desk.unwrap(),
        encoded,
    }
}

fn text(text: &str, n_predict: impl Into<Option<usize>>) -> Ask {
    Ask {
        prompt: vec![Part::Text(text.to_owned())],
        n_predict: n_predict.into(),
        ..Ask::default()
    }
}

fn picture(width: u32) -> Part {
    Part::Picture(Arc::new(Picture {
        width,
        height: 1,
        rgb: vec![7; 3 * width as usize],
        num_crops: None,
    }))
}

/// An answer as its asker hears it. At each token the model's thread waits for [`Listener::go`], if there is a
/// gate.
struct Listener {
    told: Receiver<Told>,
    gate: Option<Sender<bool>>,
    before: Heard,
}

impl World {
    fn try_ask(&self, ask: Ask) -> std::result::Result<Receiver<Told>, Refused> {
        let (tell, told) = channel();
        let tell = Box::new(move |what| tell.send(what).is_ok());
        self.desk.ask(ask, tell).map(|()| told)
    }

    fn ask(&self, ask: Ask) -> Receiver<Told> {
        self.try_ask(ask).unwrap()
    }

    /// At each token the thread waits to be told whether it is listened to.
    fn gated(&self, ask: Ask) -> Listener {
        let ((tell, told), (gate, go)) = (channel(), channel());
        let tell = move |what: Told| {
            let token = matches!(what, Told::Said { .. });
            tell.send(what).is_ok() && (!token || go.recv().unwrap_or(true))
        };
        self.desk.ask(ask, Box::new(tell)).unwrap();
        Listener {
            told,
            gate: Some(gate),
            before: Heard::default(),
        }
    }

    fn whole(&self, ask: Ask) -> Heard {
        heard(&self.ask(ask))
    }

    /// Waits until the slots are idle.
    fn settled(&self) {
        let start = std::time::Instant::now();
        while self.desk.slots().iter().any(|slot| slot.is_processing) {
            assert!(start.elapsed() < WAIT, "{:?}", self.desk.slots());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Listener {
    /// Until the next token.
    fn next(&mut self) {
        let before = self.before.tokens;
        while self.before.tokens == before {
            self.before.hear(self.told.recv_timeout(WAIT).unwrap());
        }
    }

    fn go(&self, listens: bool) {
        self.gate.as_ref().unwrap().send(listens).unwrap();
    }

    /// Lets it go on to its end.
    fn rest(mut self) -> Heard {
        drop(self.gate.take());
        let mut heard = self.before;
        while !heard.hear(self.told.recv_timeout(WAIT).unwrap()) {}
        heard
    }
}

#[derive(Debug, Default, PartialEq)]
struct Heard {
    slot: Option<usize>,
    cached: usize,
    text: String,
    tokens: usize,
    end: Option<End>,
    failed: Option<String>,
}

impl Heard {
    /// Whether it is over.
    fn hear(&mut self, told: Told) -> bool {
        match told {
            Told::Slot { slot, cached, .. } => {
                (self.slot, self.cached) = (Some(slot), cached);
            }
            Told::Said { text, .. } => {
                self.text.push_str(&text);
                self.tokens += 1;
            }
            Told::Ended { end, rest, answer } => {
                self.text.push_str(&rest);
                self.end = Some(end);
                assert_eq!(answer.text, self.text);
                return true;
            }
            Told::Failed(error) => {
                self.failed = Some(error.to_string());
                return true;
            }
            _ => {}
        }
        false
    }
}

fn heard(told: &Receiver<Told>) -> Heard {
    let mut heard = Heard::default();
    while !heard.hear(told.recv_timeout(WAIT).unwrap()) {}
    heard
}

/// The words from this position on.
fn words(from: Pos, n: Pos) -> String {
    (from..from + n)
        .map(|pos| format!(" {}", says(pos)))
        .collect()
}

#[test]
fn the_queue_is_bounded_and_a_place_in_it_is_freed() {
    let world = world(400, 1, 1);
    let mut first = world.gated(text("abc", 3));
    first.next();
    let second = world.ask(text("abcd", 2));
    let refused = world.try_ask(text("x", 1)).err();
    assert_eq!(refused, Some(Refused::Busy));
    assert_eq!(world.desk.stats().refused, 1);
    assert_eq!(world.desk.stats().waiting, 1);
    assert_eq!(first.rest().text, words(2, 3));
    assert_eq!(heard(&second).text, words(3, 2));
    assert_eq!(world.whole(text("x", 1)).text, words(0, 1));
    let stats = world.desk.stats();
    assert_eq!((stats.questions, stats.refused), (3, 1));
    assert_eq!(stats.predicted_tokens, 6);
}

#[test]
fn who_went_away_frees_the_slot_and_its_place() {
    let world = world(400, 1, 4);
    let mut first = world.gated(text("abc", 50));
    first.next();
    let gone = world.ask(text("gone before its turn", 50));
    // Who waits hears of it.
    std::thread::sleep(Duration::from_millis(250));
    first.go(true);
    first.next();
    assert!(matches!(
        gone.recv_timeout(WAIT),
        Ok(Told::Waits { before: 0 })
    ));
    drop(gone);
    let last = world.ask(text("abcde", 2));
    first.go(true);
    first.next();
    first.go(false);
    assert_eq!(heard(&last).text, words(4, 2));
    let stats = world.desk.stats();
    assert_eq!(stats.questions, 2);
    // Three tokens of the one, two of the other.
    assert_eq!(stats.predicted_tokens, 5);
}

#[test]
fn an_answer_ends_at_a_stop_text() {
    let world = world(400, 2, 4);
    let ask = Ask {
        stop: vec!["nothing".to_owned(), "3 154".to_owned()],
        n_probs: 1,
        ..text("ab", 20)
    };
    let heard = world.whole(ask);
    assert_eq!(heard.text, " 151 152 15");
    assert_eq!(heard.end, Some(End::Stop("3 154".to_owned())));
    assert_eq!(heard.tokens, 4);
    // What was held back comes where the answer ends otherwise.
    let ask = Ask {
        stop: vec![" 152 154".to_owned()],
        ..text("ab", 2)
    };
    let heard = world.whole(ask);
    assert_eq!(heard.text, " 151 152");
    assert_eq!(heard.end, Some(End::Finish(Finish::Length)));
}

#[test]
fn what_a_slot_holds_is_not_read_again() {
    let world = world(400, 2, 4);
    let first = world.whole(text("0123456789", 3));
    assert_eq!((first.slot, first.cached), (Some(0), 0));
    // The prompt, the answer but for its last token, and the next question.
    let ask = |tail: &[Token]| Ask {
        prompt: vec![
            Part::Text("0123456789".to_owned()),
            Part::Tokens(tail.to_vec()),
        ],
        n_predict: Some(2),
        ..Ask::default()
    };
    let longer = ask(&[159, 160, 161, 5]);
    let second = world.whole(longer);
    assert_eq!((second.slot, second.cached), (Some(0), 12));
    assert_eq!(second.text, words(13, 2));
    // Another end: what does not fit is taken back.
    let third = world.whole(ask(&[159, 7]));
    assert_eq!((third.slot, third.cached), (Some(0), 11));
    assert_eq!(third.text, words(11, 2));
    // The same again: the last token goes in.
    let again = world.whole(ask(&[159, 7]));
    assert_eq!((again.cached, again.text), (11, words(11, 2)));
    // Another prompt has the slot that was never used.
    let other = world.whole(text("x", 1));
    assert_eq!((other.slot, other.cached), (Some(1), 0));
    let fresh = Ask {
        cache_prompt: false,
        slot: Some(0),
        ..ask(&[159, 7])
    };
    assert_eq!(world.whole(fresh).cached, 0);
    let held: Vec<usize> = world.desk.slots().iter().map(|s| s.n_held).collect();
    assert_eq!(held, [13, 1]);
    assert_eq!(world.desk.erase(0).unwrap(), 13);
    assert_eq!(world.desk.slots()[0].cells.cells(), 0);
}

#[test]
fn a_policy_that_evicts_goes_on_where_the_prompt_extends_what_is_held() {
    let world = world(400, 1, 4);
    let ask = |prompt: &str, tail: &[Token]| Ask {
        prompt: vec![Part::Text(prompt.to_owned()), Part::Tokens(tail.to_vec())],
        n_predict: Some(3),
        policy: Some(PolicySpec::hae()),
        ..Ask::default()
    };
    assert_eq!(world.whole(ask("0123456789", &[])).cached, 0);
    // The answer was 159, 160, 161; its end is another now.
    assert_eq!(world.whole(ask("0123456789", &[159, 7, 8])).cached, 11);
    // Into the prompt nothing is taken back.
    assert_eq!(world.whole(ask("0123456789", &[159, 9])).cached, 0);
    assert_eq!(world.whole(text("0123456789", 1)).cached, 0);
}

#[test]
fn a_picture_is_encoded_once_as_long_as_it_is_kept() {
    let world = world(400, 2, 4);
    let ask = |tail: &str, wide: u32| Ask {
        prompt: vec![picture(wide), Part::Text(tail.to_owned())],
        n_predict: Some(1),
        cache_prompt: false,
        ..Ask::default()
    };
    let encoded = || world.encoded.load(Ordering::Relaxed);
    for tail in ["a", "b", "c"] {
        world.whole(ask(tail, 20));
    }
    assert_eq!(encoded(), 1);
    // A thousand bytes hold 83 rows.
    world.whole(ask("a", 70));
    assert_eq!(encoded(), 2);
    world.whole(ask("a", 20));
    assert_eq!(encoded(), 3);
    let stats = world.desk.stats().pictures;
    assert_eq!((stats.hits, stats.misses, stats.entries), (2, 3, 1));
    assert_eq!(stats.bytes, 240);
    // In the slot it is not even looked for.
    let kept = Ask {
        cache_prompt: true,
        ..ask("ab", 20)
    };
    assert_eq!(world.whole(kept).cached, 21);
    assert_eq!(world.desk.stats().pictures.hits, 2);
}

#[test]
fn who_finds_no_cells_waits_and_nothing_is_lost() {
    let world = world(64, 4, 8);
    // 24 cells each: two at a time.
    let asks: Vec<_> = (0..6)
        .map(|i| world.ask(text(&format!("prompt {i} 89 1"), 12)))
        .collect();
    for told in &asks {
        let heard = heard(told);
        assert_eq!(heard.failed, None);
        assert_eq!(heard.end, Some(End::Finish(Finish::Length)));
        assert_eq!(heard.text, words(12, 12));
    }
    let too_long = world.whole(text(&"x".repeat(65), 1));
    let line = too_long.failed.unwrap();
    assert!(
        line.contains("needs 65 cells but the context holds 64"),
        "{line}"
    );
    world.settled();
    assert!(world.desk.stats().cells.peak <= 64 * 4);
}

#[test]
fn a_slot_that_a_waiting_question_goes_on_from_is_spared() {
    let world = world(64, 3, 8);
    assert_eq!(world.whole(text("0123456789", 10)).slot, Some(0));
    let mut works = world.gated(text("abcdefghij", 20));
    works.next();
    // 19 and 30 cells are taken; this one needs 22, and the slot that was idle longest is the first.
    let new = world.ask(text("xyzxyzxyzxyz", 10));
    let answer = (9..19).map(says).chain([5]).collect();
    let further = world.ask(Ask {
        prompt: vec![Part::Text("0123456789".to_owned()), Part::Tokens(answer)],
        n_predict: Some(2),
        ..Ask::default()
    });
    assert_eq!(works.rest().tokens, 20);
    let (new, further) = (heard(&new), heard(&further));
    assert_eq!((new.failed, new.tokens), (None, 10));
    assert_eq!((further.slot, further.cached), (Some(0), 19));
}

#[test]
fn a_prompt_waits_for_one_that_is_pruned_and_idle_slots_keep_theirs() {
    let world = world(160, 4, 8);
    let mut params = PolicySpec::hae();
    params.options.kv_budget = Some(Amount::Cells(22));
    let pruned = |rows: u32| Ask {
        prompt: vec![picture(rows), Part::Text("a".to_owned())],
        n_predict: Some(2),
        policy: Some(params.clone()),
        ..Ask::default()
    };
    assert_eq!(world.whole(text("0123456789", 10)).slot, Some(0));
    let mut works = world.gated(text("ab", 5));
    works.next();
    // 19 and 7 cells are taken. The first of these needs 63, and what is left is too little for the second.
    let asks = [world.ask(pruned(60)), world.ask(pruned(75))];
    assert_eq!(works.rest().tokens, 5);
    for told in &asks {
        let heard = heard(told);
        assert_eq!((heard.failed, heard.tokens), (None, 2));
    }
    let answer = (9..19).map(says).chain([5]).collect();
    let further = world.whole(Ask {
        prompt: vec![Part::Text("0123456789".to_owned()), Part::Tokens(answer)],
        n_predict: Some(2),
        ..Ask::default()
    });
    assert_eq!((further.slot, further.cached), (Some(0), 19));
}

#[test]
fn an_answer_without_a_limit_keeps_no_more_than_its_share_of_a_pruned_prompt() {
    let world = world(160, 4, 8);
    let mut policy = PolicySpec::hae();
    policy.options.kv_budget = Some(Amount::Cells(22));
    let mut answer = world.gated(Ask {
        prompt: vec![picture(60), Part::Text("a".to_owned())],
        policy: Some(policy),
        ..Ask::default()
    });
    answer.next();
    answer.go(true);
    answer.next();
    assert_eq!(world.desk.slots()[0].n_reserved, 40);
    answer.rest();
}

#[test]
fn answers_without_a_limit_wait_for_each_other_and_the_largest_ends() {
    let world = world(64, 2, 8);
    let asks = [
        world.ask(text("0123456789", None)),
        world.ask(text("01234", None)),
    ];
    let [first, second] = [heard(&asks[0]), heard(&asks[1])];
    // They would go on until position 90; one has most cells when there are no more.
    let full = Some(End::Finish(Finish::Context));
    assert_eq!((&first.end, &second.end), (&full, &full));
    assert!(
        first.tokens + second.tokens >= 64 - 15,
        "{first:?} {second:?}"
    );
    // The other went on when the larger had ended, over what that held. The last token has no cell.
    let (larger, smaller) = (10 + first.tokens, 5 + second.tokens);
    assert_eq!(larger.max(smaller), 65);
    // Alone it has all that there is.
    let alone = world.whole(text("zz", None));
    assert_eq!((alone.end, alone.tokens), (full, 63));
}

#[test]
fn a_limit_is_kept_beside_an_answer_that_has_none() {
    let world = world(64, 2, 8);
    let mut endless = world.gated(text("0123", None));
    endless.next();
    let limited = world.ask(text("01", 26));
    let (limited, endless) = std::thread::scope(|scope| {
        let endless = scope.spawn(|| endless.rest());
        (heard(&limited), endless.join().unwrap())
    });
    assert_eq!(limited.end, Some(End::Finish(Finish::Length)));
    assert_eq!(limited.tokens, 26);
    assert_eq!(endless.end, Some(End::Finish(Finish::Context)));
}

#[test]
fn a_slot_that_was_named_is_waited_for_while_others_pass() {
    let world = world(400, 2, 8);
    let mut first = world.gated(Ask {
        slot: Some(1),
        ..text("abc", 9)
    });
    first.next();
    let named = world.ask(Ask {
        slot: Some(1),
        ..text("x", 1)
    });
    let other = world.ask(text("yz", 1));
    for _ in 0..4 {
        first.go(true);
        first.next();
    }
    assert_eq!(heard(&other).slot, Some(0));
    let taken = |told: Told| matches!(told, Told::Slot { .. });
    assert!(!named.try_iter().any(taken));
    assert_eq!(first.rest().slot, Some(1));
    assert_eq!(heard(&named).slot, Some(1));
    let none = world.whole(Ask {
        slot: Some(2),
        ..text("x", 1)
    });
    assert_eq!(
        none.failed.as_deref(),
        Some("`slot`: 2, expected less than 2")
    );
    assert!(world.desk.erase(2).is_err());
}

/// Only even tokens.
struct Even;

impl Constraint for Even {
    fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let odd = logits.iter_mut().skip(1).step_by(2);
        odd.for_each(|logit| *logit = f32::NEG_INFINITY);
        Ok(())
    }

    fn accept(&mut self, token: Token) -> Result<()> {
        match token % 2 {
            0 => Ok(()),
            _ => Err(Error::contract("an odd token")),
        }
    }
}

#[test]
fn a_constraint_is_kept_to() {
    let world = world(400, 1, 1);
    let ask = Ask {
        constraint: Some(Box::new(Even)),
        ..text("a", 5)
    };
    let heard = world.whole(ask);
    // Where the engine would say 151, nothing is as likely as token 0, which ends it.
    assert_eq!(heard.text, " 150");
    assert_eq!(heard.end, Some(End::Finish(Finish::Eog)));
}

#[test]
fn the_hall_drains_or_is_cancelled() {
    let desk = |cancel: bool| {
        let world = world(400, 1, 4);
        let mut first = world.gated(text("abc", 20));
        first.next();
        let second = world.ask(text("abcd", 2));
        let flag = Arc::new(AtomicBool::new(cancel));
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| world.desk.close(Arc::clone(&flag)));
            while !matches!(world.try_ask(text("x", 1)), Err(Refused::Closing)) {
                std::thread::sleep(Duration::from_millis(1));
            }
            let first = first.rest();
            closing.join().unwrap();
            (first, heard(&second))
        })
    };
    let (first, second) = desk(false);
    assert_eq!((first.tokens, second.tokens), (20, 2));
    let (first, second) = desk(true);
    assert_eq!(first.end, Some(End::Finish(Finish::Cancelled)));
    assert_eq!(first.text, words(2, first.tokens as Pos));
    assert_eq!(second.failed.as_deref(), Some("the server has closed"));
}

#[test]
fn everybody_hears_of_a_thread_that_died() {
    let world = world(400, 2, 4);
    let mut first = world.gated(text("abc", 20));
    first.next();
    let bad = world.ask(Ask {
        prompt: vec![picture(13)],
        ..Ask::default()
    });
    let waits = world.ask(text("never", 1));
    let [first, bad, waits] = [first.rest(), heard(&bad), heard(&waits)];
    let closed = Some("the server has closed");
    assert_eq!(first.failed.as_deref(), closed);
    assert_eq!(bad.failed.as_deref(), closed);
    assert_eq!(waits.failed.as_deref(), closed);
    world.desk.close(Arc::default());
    assert_eq!(world.try_ask(text("x", 1)).err(), Some(Refused::Closing));
    assert!(matches!(world.desk.erase(0), Err(Error::Closed)));
}

#[test]
fn an_asker_that_panics_is_nobody() {
    let world = world(400, 1, 4);
    let heard = Arc::new(Mutex::new(0));
    let count = Arc::clone(&heard);
    let tell = move |_| {
        *count.lock().unwrap() += 1;
        std::panic::resume_unwind(Box::new("an asker's bug"))
    };
    world.desk.ask(text("abc", 3), Box::new(tell)).unwrap();
    assert_eq!(world.whole(text("abcd", 1)).text, words(3, 1));
    assert_eq!(*heard.lock().unwrap(), 1);
}

#[test]
fn patches_of_a_picture_are_told_to_who_watches() {
    let world = world(400, 1, 4);
    let told = world.ask(Ask {
        prompt: vec![picture(10), Part::Text("abc".to_owned())],
        n_predict: Some(6),
        watch: true,
        ..Ask::default()
    });
    let mut seen = Vec::new();
    loop {
        match told.recv_timeout(WAIT).unwrap() {
            Told::Seen {
                step,
                cells,
                pictures,
            } => {
                assert_eq!(cells.live.vision, 10);
                seen.push((step, pictures));
            }
            Told::Ended { .. } => break,
            _ => {}
        }
    }
    let steps: Vec<usize> = seen.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [1, 5, 6]);
    let [picture] = &seen[1].1[..] else {
        panic!("{seen:?}");
    };
    assert_eq!((picture.cols, picture.rows), (4, 3));
    assert_eq!(picture.states, [0; 10]);
}
