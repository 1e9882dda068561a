//! A chat with a model: pictures and text in, an answer and what it cost out.

mod file;

use std::path::Path;
use std::time::{Duration, Instant};

use crate::answer::{Answer, Kv};
use crate::attend::Attend;
use crate::cache::Pos;
use crate::constrain::{Grammar, Grammars};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::generate::Hooks;
use crate::image::Picture;
use crate::llama::{ByPolicy, ContextOptions, Model, RopeFactors, SamplerOptions, Vision};
use crate::open::{Opened, Plan, Reach, RopeChoice, rope_name};
use crate::policy::PolicySpec;
use crate::prompt::{ChatTemplate, Template, Transcript};
use crate::saved::Saved;
use crate::trace;
use crate::turn::{self, Prompts, Talk, Turn};

const NO_VISION: &str = "pictures need a vision file, give one with `mmproj`";

/// How to chat. The defaults are llama.cpp's, but for the policy `full`'s name and greedy answers,
/// which are the same every time.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// How the cache is made; the policy adds what it needs.
    pub context: ContextOptions,
    /// Which longrope factors a model with two sets takes.
    pub rope: RopeChoice,
    /// What leaves the cache.
    pub policy: PolicySpec,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Where the chat template comes from.
    pub template: Template,
    /// Goes before the first turn. Needs a template with such a role.
    pub system_prompt: Option<String>,
    /// What each answer must keep to.
    pub grammar: Option<Grammar>,
}

impl Default for ChatOptions {
    fn default() -> Self {
        ChatOptions {
            context: ContextOptions {
                by_policy: ByPolicy::ALL,
                ..ContextOptions::default()
            },
            rope: RopeChoice::default(),
            policy: PolicySpec::default(),
            sampler: SamplerOptions::default(),
            template: Template::default(),
            system_prompt: None,
            grammar: None,
        }
    }
}

/// What is known when a chat is opened of what it will hold.
#[derive(Clone, Copy, Debug, Default)]
pub struct Begin<'a> {
    /// The only turn, where there is no other: how far it reaches decides the rope factors.
    pub only: Option<Turn<'a>>,
    /// An earlier conversation to go on with.
    pub saved: Option<&'a Saved>,
    /// Where to write what the cache sees and decides, and the model's name to show there.
    pub trace: Option<(&'a Path, &'a str)>,
}

/// A model, its cache and what was said.
pub struct Chat {
    opened: Opened,
    prompts: Prompts,
    talk: Talk,
    grammar: Option<(Grammars, Grammar)>,
}

impl std::fmt::Debug for Chat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chat")
            .field("talk", &self.talk)
            .finish_non_exhaustive()
    }
}

impl Chat {
    /// A new chat under this policy, with the defaults of [`ChatOptions`].
    ///
    /// # Errors
    /// As [`Chat::begin`].
    pub fn open(model: Model, vision: Option<Vision>, policy: PolicySpec) -> Result<Self> {
        let options = ChatOptions {
            policy,
            ..ChatOptions::default()
        };
        Chat::begin(&model, vision, &options, Begin::default())
    }

    /// A chat that begins, or goes on.
    ///
    /// # Errors
    /// Those of [`Plan::new`], [`Template::of`], [`Chat::resume`] and of the trace's file.
    pub fn begin(
        model: &Model,
        vision: Option<Vision>,
        options: &ChatOptions,
        begin: Begin<'_>,
    ) -> Result<Self> {
        let ChatOptions { policy, .. } = options;
        let mut context = options.context.clone();
        if let Some(saved) = begin.saved.filter(|_| context.by_policy.types) {
            // Nobody says anything else.
            (context.type_k, context.type_v) = (saved.storage.type_k, saved.storage.type_v);
            context.by_policy.types = false;
        }
        let mut plan = Plan::new(model, vision.as_ref(), &context, policy)?;
        if begin.trace.is_some() {
            plan.read_for_trace(&policy.options)?;
        }
        let template = options.template.of(model)?;
        if template.is_none() && options.system_prompt.is_some() {
            let reason =
                "the model has no chat template to put it into, name one with `chat_template`";
            return Err(Error::option("system_prompt", reason));
        }
        let talk = Talk::new(Transcript::new(template, options.system_prompt.clone()));
        let grammar = match &options.grammar {
            Some(grammar) => {
                let grammars = Grammars::of(model)?;
                grammars.constraint(grammar)?;
                Some((grammars, grammar.clone()))
            }
            None => None,
        };
        let prompts = Prompts::new(vision);
        // Cached keys were rotated once and for all.
        let rope = match (options.rope, begin.saved) {
            (RopeChoice::Auto, Some(saved)) if saved.rope_factors == RopeFactors::Long => {
                RopeChoice::Long
            }
            (RopeChoice::Auto, Some(_)) => RopeChoice::Short,
            (choice, _) => choice,
        };
        plan.choose_rope(rope, || match begin.only {
            Some(turn) => turn::reach(model, &prompts, &talk, turn),
            None => Ok(Reach::Cache),
        })?;
        let (limits, layers) = (plan.limits(), plan.context().score_layers.clone());
        let mut opened = plan.open(&options.sampler)?;
        if let Some((path, name)) = begin.trace {
            let header = trace::Header::new(name.to_owned(), limits, policy, layers);
            trace::record(&mut opened.session.controller, path, header)?;
        }
        let mut chat = Chat {
            opened,
            prompts,
            talk,
            grammar,
        };
        if let Some(saved) = begin.saved {
            chat.resume(saved.clone())?;
        }
        Ok(chat)
    }

    /// Says this and shows these pictures; the answer comes as a whole. [`Chat::turn`] gives it word
    /// by word.
    ///
    /// # Errors
    /// As [`Chat::turn`].
    pub fn ask(&mut self, text: &str, pictures: &[Picture]) -> Result<Answer> {
        let start = Instant::now();
        let turn = Turn {
            text,
            pictures,
            ..Turn::default()
        };
        let hooks = Hooks {
            on_text: &mut |_| {},
            cancelled: &|| false,
            now: &|| -> Duration { start.elapsed() },
        };
        self.turn(turn, hooks)
    }

    /// One turn, as [`turn::answer`].
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] and [`Error::Option`] leave the chat as it was before the turn;
    /// other errors leave it unusable until [`Chat::clear`].
    pub fn turn(&mut self, turn: Turn<'_>, hooks: Hooks<'_>) -> Result<Answer> {
        let Chat {
            opened,
            prompts,
            talk,
            grammar,
        } = self;
        if let Some((grammars, grammar)) = grammar {
            opened.session.constraint = Some(grammars.constraint(grammar)?);
        }
        let answer = turn::answer(opened, prompts, talk, turn, hooks);
        opened.session.constraint = None;
        answer
    }

    /// Forgets everything that was said and shown.
    pub fn clear(&mut self) {
        self.opened.clear();
        self.talk.clear();
    }

    /// Ends the recording of a trace, if there is one.
    ///
    /// # Errors
    /// As [`crate::controller::Controller::finish_recording`].
    pub fn finish_recording(&mut self) -> Result<()> {
        self.opened.session.controller.finish_recording()
    }

    /// The position that the next token takes, whatever was evicted.
    pub fn next_pos(&self) -> Pos {
        self.opened.session.controller.next_pos()
    }

    /// The chat template; `None`: prompts go in as they are.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.talk.transcript.template()
    }

    /// Whether it can be shown pictures.
    pub fn has_vision(&self) -> bool {
        self.prompts.vision().is_some()
    }

    /// Checks a number of crops for the pictures to come.
    ///
    /// # Errors
    /// [`Error::Option`] without a vision model, otherwise as [`Vision::check_num_crops`].
    pub fn check_num_crops(&self, n: u32) -> Result<()> {
        match self.prompts.vision() {
            Some(vision) => vision.check_num_crops(n),
            None => Err(Error::option("num_crops", NO_VISION)),
        }
    }

    /// How its context was made.
    pub fn context(&self) -> &ContextOptions {
        self.opened.session.engine.options()
    }

    /// What its decoding steps attend to; `None`: everything.
    pub fn attend(&self) -> Option<Attend> {
        self.opened.session.engine.attend().copied()
    }

    /// The set of rope factors: `short`, `long`, or `none` for models without two sets.
    pub fn rope_factors(&self) -> &'static str {
        rope_name(self.opened.model(), self.context())
    }

    /// The state of the cache.
    pub fn kv(&self) -> Kv {
        let session = &self.opened.session;
        Kv::of(session, &session.controller.report())
    }
}
