//! A hall without a model: every byte is a token, and the answer is known before.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::answer::{Answer, Evicted, Kv, PolicyReport, Timings, Tokens};
use crate::cache::{Counts, PerModality};
use crate::engine::Token;
use crate::error::{Error, Result};
use crate::generate::Finish;
use crate::llama::SamplerOptions;
use crate::policy::PolicySpec;
use crate::serve::ask::{
    Ask, Choice, End, Facts, Hall, Part, Refused, Seen, SlotState, Stats, Told,
};

pub const BOS: Token = 256;
pub const EOG: Token = 257;
pub const N_VOCAB: usize = 258;
pub const N_CTX: usize = 500;

/// What was asked, as far as tests look at it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Text as it is, pictures by their size, ids by their number.
    pub prompt: String,
    pub n_predict: Option<usize>,
    pub sampler: SamplerOptions,
    pub stop: Vec<String>,
    pub n_probs: usize,
    /// Tokens that may begin the answer, where something says so.
    pub allowed: Option<Vec<Token>>,
    pub policy: Option<PolicySpec>,
    pub attend: Option<crate::attend::Attend>,
    pub slot: Option<usize>,
    pub cache_prompt: bool,
}

#[derive(Default)]
pub struct Scripted {
    pub answer: String,
    /// Between tokens.
    pub pause: Duration,
    pub slots: usize,
    pub queue: usize,
    pub vision: bool,
    pub asked: Mutex<Vec<Asked>>,
    /// Answers that nobody listened to any more.
    pub gone: Arc<AtomicUsize>,
    pub open: Arc<AtomicUsize>,
    pub closing: AtomicBool,
    pub cancel: Mutex<Arc<AtomicBool>>,
    pub facts: std::sync::OnceLock<Facts>,
}

impl Scripted {
    pub fn new(answer: &str) -> Self {
        Scripted {
            answer: answer.into(),
            slots: 2,
            queue: 2,
            vision: true,
            ..Scripted::default()
        }
    }

    pub fn last(&self) -> Asked {
        self.asked
            .lock()
            .unwrap()
            .last()
            .expect("nothing was asked")
            .clone()
    }
}

fn shown(prompt: &[Part]) -> String {
    let part = |part: &Part| match part {
        Part::Text(text) => text.clone(),
        Part::Picture(picture) => format!("[{}x{}]", picture.width, picture.height),
        Part::Tokens(tokens) => format!("{tokens:?}"),
    };
    prompt.iter().map(part).collect()
}

fn length(prompt: &[Part]) -> usize {
    let part = |part: &Part| match part {
        Part::Text(text) => text.len(),
        Part::Picture(_) => 10,
        Part::Tokens(tokens) => tokens.len(),
    };
    1 + prompt.iter().map(part).sum::<usize>()
}

fn choice(token: Token, logprob: f32) -> Choice {
    Choice {
        token,
        bytes: vec![token as u8],
        logprob,
    }
}

pub fn answer_of(text: &str, finish: Finish, generated: usize, prompt: usize) -> Answer {
    let cells = Counts {
        live: PerModality { text: 7, vision: 3 },
        evicted: PerModality { text: 1, vision: 4 },
        ..Counts::default()
    };
    Answer {
        text: text.into(),
        finish,
        taken_back: false,
        tokens: Tokens {
            prompt: PerModality {
                text: prompt,
                vision: 0,
            },
            images: Vec::new(),
            generated,
        },
        kv: Kv {
            cells,
            peak_decoding: 12,
            n_cells: N_CTX,
            bytes_per_cell: 100,
            bytes_in_use: 1000,
            bytes_peak: 1500,
            bytes_peak_decoding: 1200,
            bytes_allocated: 50_000,
            bytes_allocated_peak: 50_000,
            bytes_host: 0,
        },
        attended: None,
        timings: Timings {
            vision_encode_ms: 1.0,
            probe_ms: 0.0,
            prefill_ms: 9.0,
            ttft_ms: Some(10.0),
            tpot_ms: Some(2.0),
            decode_ms: 20.0,
        },
        evicted: Evicted {
            after_prefill: 5,
            in_decoding: 0,
            flushes: 0,
            restores: 0,
            recalled: 0,
        },
        bin: None,
        policy: PolicyReport {
            name: "full",
            params: serde_json::json!({}),
            calibration: None,
        },
    }
}

impl Hall for Scripted {
    fn ask(
        &self,
        mut ask: Ask,
        mut tell: Box<dyn FnMut(Told) -> bool + Send>,
    ) -> std::result::Result<(), Refused> {
        if self.closing.load(Ordering::SeqCst) {
            return Err(Refused::Closing);
        }
        if self.open.load(Ordering::SeqCst) >= self.slots + self.queue {
            return Err(Refused::Busy);
        }
        self.open.fetch_add(1, Ordering::SeqCst);
        let allowed = ask.constraint.as_mut().map(|constraint| {
            let mut logits = vec![0.0; N_VOCAB];
            constraint.mask(&mut logits).unwrap();
            (0..)
                .zip(&logits)
                .filter(|(_, l)| l.is_finite())
                .map(|(t, _)| t)
                .collect()
        });
        self.asked.lock().unwrap().push(Asked {
            prompt: shown(&ask.prompt),
            n_predict: ask.n_predict,
            sampler: ask.sampler,
            stop: ask.stop.clone(),
            n_probs: ask.n_probs,
            allowed,
            policy: ask.policy.clone(),
            attend: ask.attend,
            slot: ask.slot,
            cache_prompt: ask.cache_prompt,
        });
        let (text, pause) = (self.answer.clone(), self.pause);
        let (gone, open) = (Arc::clone(&self.gone), Arc::clone(&self.open));
        let cancel = Arc::clone(&self.cancel.lock().unwrap());
        std::thread::spawn(move || {
            if !answer(&ask, &text, pause, &cancel, &mut tell) {
                gone.fetch_add(1, Ordering::SeqCst);
            }
            open.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(())
    }

    fn slots(&self) -> Vec<SlotState> {
        let open = self.open.load(Ordering::SeqCst);
        let slot = |id| SlotState {
            id,
            is_processing: id < open,
            policy: "full".into(),
            ..SlotState::default()
        };
        (0..self.slots).map(slot).collect()
    }

    fn stats(&self) -> Stats {
        Stats {
            prompt_tokens: 30,
            prompt_seconds: 2.0,
            predicted_tokens: 12,
            steps: 5,
            slot_steps: 10,
            ..Stats::default()
        }
    }

    fn facts(&self) -> &Facts {
        self.facts.get_or_init(|| Facts {
            model_path: "/somewhere/tiny.gguf".into(),
            alias: "tiny".into(),
            bos: "<s>".into(),
            n_ctx: N_CTX,
            slots: self.slots,
            vision: self.vision,
            n_vocab: N_VOCAB,
            ..Facts::default()
        })
    }

    fn tokenize(&self, text: &str, bos: bool, _: bool) -> Result<Vec<Token>> {
        let bytes = text.bytes().map(Token::from);
        Ok(bos.then_some(BOS).into_iter().chain(bytes).collect())
    }

    fn piece(&self, token: Token) -> Result<Vec<u8>> {
        match u8::try_from(token) {
            Ok(byte) => Ok(vec![byte]),
            Err(_) => Ok(b"<s>".to_vec()),
        }
    }

    fn save(&self, slot: usize, file: &Path) -> Result<(usize, u64)> {
        std::fs::write(file, [slot as u8]).map_err(|e| Error::io(file, e))?;
        Ok((40 + slot, 1))
    }

    fn restore(&self, _: usize, file: &Path) -> Result<(usize, u64)> {
        let bytes = std::fs::read(file).map_err(|e| Error::io(file, e))?;
        match bytes[..] {
            [slot] => Ok((40 + usize::from(slot), 1)),
            _ => Err(Error::file(file, "is no saved slot")),
        }
    }

    fn count(&self, prompt: Vec<Part>) -> Result<usize> {
        let rows = |part: &Part| match part {
            Part::Text(text) => text.len(),
            Part::Picture(_) => 7,
            Part::Tokens(tokens) => tokens.len(),
        };
        Ok(prompt.iter().map(rows).sum())
    }

    fn erase(&self, slot: usize) -> Result<usize> {
        Ok(40 + slot)
    }

    fn close(&self, cancel: Arc<AtomicBool>) {
        self.closing.store(true, Ordering::SeqCst);
        while self.open.load(Ordering::SeqCst) > 0 {
            if cancel.load(Ordering::SeqCst) {
                self.cancel.lock().unwrap().store(true, Ordering::SeqCst);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// False: nobody listened to the end.
fn answer(
    ask: &Ask,
    text: &str,
    pause: Duration,
    cancel: &AtomicBool,
    tell: &mut dyn FnMut(Told) -> bool,
) -> bool {
    let prompt = length(&ask.prompt);
    if !tell(Told::Waits { before: 1 }) {
        return false;
    }
    if prompt > N_CTX {
        return tell(Told::Failed(Error::PromptTooLong {
            needed: prompt,
            n_ctx: N_CTX,
        }));
    }
    let cached = if ask.cache_prompt { 2.min(prompt) } else { 0 };
    let rows = prompt - cached;
    let begun = tell(Told::Slot {
        slot: ask.slot.unwrap_or(1),
        cached,
        prompt,
    }) && tell(Told::Prompt {
        done: rows / 2,
        rows,
    }) && tell(Told::Prompt { done: rows, rows });
    if !begun {
        return false;
    }
    if ask.watch {
        let seen = Seen {
            image: 0,
            cols: 2,
            rows: 1,
            frame: None,
            states: vec![0, 2],
        };
        if !tell(Told::Seen {
            step: 0,
            cells: Counts::default(),
            pictures: vec![seen],
        }) {
            return false;
        }
    }
    let stop = ask
        .stop
        .iter()
        .filter_map(|stop| Some((text.find(stop)?, stop)))
        .min();
    let most = ask.n_predict.unwrap_or(usize::MAX);
    let (until, mut end) = match stop {
        Some((at, stop)) => (at, End::Stop(stop.clone())),
        None => (text.len(), End::Finish(Finish::Eog)),
    };
    let until = match until > most {
        true => {
            end = End::Finish(Finish::Length);
            most
        }
        false => until,
    };
    let whole = String::from_utf8_lossy(&text.as_bytes()[..until]).into_owned();
    // The last character is held back, as if it might begin a text that ends the answer.
    let mut sent = 0;
    for (at, byte) in whole.bytes().enumerate() {
        std::thread::sleep(pause);
        if cancel.load(Ordering::SeqCst) {
            return tell(Told::Failed(Error::Closed));
        }
        let mut upto = at;
        while !whole.is_char_boundary(upto) {
            upto -= 1;
        }
        let token = Token::from(byte);
        let probs = (0..ask.n_probs as Token).map(|i| choice((token + i) % 256, -0.5 - i as f32));
        let said = Told::Said {
            token,
            text: whole[sent..upto].into(),
            chosen: (ask.n_probs > 0).then(|| choice(token, -0.5)),
            likeliest: probs.collect(),
        };
        sent = upto;
        if !tell(said) {
            return false;
        }
    }
    let finish = match &end {
        End::Finish(finish) => *finish,
        End::Stop(_) => Finish::Cancelled,
    };
    tell(Told::Ended {
        end,
        rest: whole[sent..].into(),
        answer: Box::new(answer_of(&whole, finish, whole.len(), prompt)),
    })
}
