//! Asks a model one question after the other, under several cache policies by turns.
//!
//! Pictures are encoded once for all policies. Policies that want the same of a context share it:
//! it is emptied before each question, and each question gets a policy in its first state.

pub mod attempt;
mod reading;

use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::answer::{Answer, Evicted};
use crate::attend::Attend;
use crate::bench::Pulse;
use crate::error::Result;
use crate::eval::distance::{self, AttentiveFull, Followed, Places, Said};
use crate::eval::question::Question;
use crate::eval::record::{self, CacheReport, Distance};
use crate::generate::{Finish, Hooks, Session};
use crate::image::Picture;
use crate::llama::{ByPolicy, ContextOptions, LlamaEngine, Model, SamplerOptions, Vision};
use crate::open::{Opened, Plan, Reach, RopeChoice};
use crate::policy::{Amount, PolicyOptions, PolicySpec};
use crate::prompt::{ChatTemplate, Transcript};
use crate::trace;
use crate::turn::{self, Prompts, Talk, Turn};

/// A policy that can be asked.
#[derive(Clone, Debug)]
pub struct Contender {
    /// How results files name it.
    pub record: record::Contender,
    /// What is asked for; every question gets one in its first state.
    pub policy: PolicySpec,
    /// As the user chose it; what the policy wants of it is added when it is asked.
    pub context: ContextOptions,
}

/// What the full cache says to each turn of a question.
pub type Reference = Vec<(Said, String)>;

/// Asks questions on one model.
pub struct Asker {
    model: Model,
    prompts: Prompts,
    /// `None`: prompts go in as they are.
    template: Option<ChatTemplate>,
    rope: RopeChoice,
    stages: Vec<Opened>,
    /// [`Asker::read_at_once`].
    at_once: bool,
    /// Where the next conversation is recorded, and the model's name to show.
    trace: Option<(PathBuf, String)>,
}

impl Asker {
    /// For a model and its vision file, if there is one. `template` as in [`Transcript::new`].
    pub fn new(
        model: &Model,
        vision: Option<Vision>,
        template: Option<ChatTemplate>,
        rope: RopeChoice,
    ) -> Self {
        Asker {
            model: model.clone(),
            prompts: Prompts::keeping(vision),
            template,
            rope,
            stages: Vec::new(),
            at_once: false,
            trace: None,
        }
    }

    /// A policy that is to be asked, checked against the model.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn contender(
        &self,
        name: String,
        policy: PolicySpec,
        budget: Option<Amount>,
        context: &ContextOptions,
    ) -> Result<Contender> {
        let plan = Plan::new(&self.model, self.prompts.vision(), context, &policy)?;
        Ok(Contender {
            record: record::Contender {
                name,
                policy: policy.name.clone(),
                budget,
                params: plan.policy().params(),
                cache: (context.by_policy != ByPolicy::default()).then(|| report(&plan)),
            },
            policy,
            context: context.clone(),
        })
    }

    /// How a contender's cache is made, whoever decided it.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn cache(&self, contender: &Contender) -> Result<CacheReport> {
        let plan = self.plan(&contender.context, &contender.policy)?;
        Ok(report(&plan))
    }

    /// Begins with another question.
    pub fn next_question(&mut self) {
        self.prompts.next_question();
    }

    /// Records what the next [`Asker::ask`] sees and decides. Under `full` this reads the attention
    /// of the layers that its options name.
    pub fn trace_next(&mut self, path: PathBuf, model: String) {
        self.trace = Some((path, model));
    }

    /// Asks every turn of a question. `n_predict` and `expected` are for each turn; `expected`
    /// is how many tokens will go through the model after its prompt, if that is known. `None`:
    /// cancelled.
    ///
    /// # Errors
    /// Those of the pictures, the engine and the policy.
    pub fn ask(
        &mut self,
        contender: &Contender,
        question: &Question,
        pictures: &[Picture],
        n_predict: &[usize],
        expected: Option<&[usize]>,
        watch: Pulse<'_>,
    ) -> Result<Option<Vec<Answer>>> {
        let trace = self.trace.take();
        let policy = policy_of(contender, question);
        let mut plan = self.plan(&contender.context, &policy)?;
        if trace.is_some() {
            plan.read_for_trace(&policy.options)?;
        }
        let (limits, layers) = (plan.limits(), plan.context().score_layers.clone());
        let (stage, mut talk) = self.stage(plan, question, pictures, n_predict)?;
        if let Some((path, model)) = trace {
            let header = trace::Header::new(model, limits, &policy, layers);
            trace::record(&mut self.stages[stage].session.controller, &path, header)?;
        }
        let mut answers = Vec::new();
        for i in 0..question.turns.len() {
            let turn = Turn {
                n_predict: n_predict.get(i).copied(),
                expected: expected.and_then(|all| all.get(i)).copied(),
                ..self.turn(question, i, pictures)
            };
            let hooks = Hooks {
                on_text: &mut |_| {},
                cancelled: watch.cancelled,
                now: watch.now,
            };
            let opened = &mut self.stages[stage];
            let answer = turn::answer(opened, &mut self.prompts, &mut talk, turn, hooks)?;
            if answer.finish == Finish::Cancelled {
                return Ok(None);
            }
            answers.push(answer);
        }
        let controller = &mut self.stages[stage].session.controller;
        controller.finish_recording()?;
        Ok(Some(answers))
    }

    /// What the full cache says to every turn, greedily, and what it attends to. `context` is
    /// that of `full`. `None`: cancelled.
    ///
    /// # Errors
    /// As [`Asker::ask`].
    pub fn reference(
        &mut self,
        context: &ContextOptions,
        question: &Question,
        pictures: &[Picture],
        n_predict: &[usize],
        watch: Pulse<'_>,
    ) -> Result<Option<Reference>> {
        let mut context = context.clone();
        context.attend = Attend::default();
        let mut plan = self.plan(&context, &PolicySpec::full())?;
        if self.model.eviction_obstacle().is_none() {
            plan.read_for_trace(&PolicyOptions::default())?;
            plan = plan.under(Box::new(AttentiveFull::all(self.model.n_layer())));
        }
        let (stage, mut talk) = self.stage(plan, question, pictures, n_predict)?;
        let mut reference = Vec::new();
        for i in 0..question.turns.len() {
            let prompt = self.prepare(stage, &mut talk, question, i, pictures, watch)?;
            let opened = &mut self.stages[stage];
            let reach = turn::positions_left(opened, &prompt.segments);
            let n_predict = n_predict.get(i).copied().unwrap_or(usize::MAX);
            let n_predict = reach.map_or(n_predict, |reach| n_predict.min(reach));
            let session = &mut opened.session;
            let said = distance::listen(session, &prompt.segments, n_predict, watch.cancelled)?;
            let Some(said) = said else { return Ok(None) };
            let mut bytes = Vec::new();
            let last = said.tokens.len() - usize::from(said.ended);
            for &token in &said.tokens[..last] {
                session.vocabulary()?.piece(token, &mut bytes)?;
            }
            let text = String::from_utf8_lossy(&bytes).into_owned();
            talk.transcript.answered(&text);
            talk.pending = said.pending();
            reference.push((said, text));
        }
        Ok(Some(reference))
    }

    /// How far a contender's predictions are from the reference, for each turn, and what was evicted
    /// on the way. `n_predict` as for the reference. `None`: cancelled.
    ///
    /// # Errors
    /// As [`Asker::ask`].
    pub fn distance(
        &mut self,
        contender: &Contender,
        question: &Question,
        pictures: &[Picture],
        n_predict: &[usize],
        reference: &Reference,
        watch: Pulse<'_>,
    ) -> Result<Option<(Vec<Option<Distance>>, Evicted)>> {
        let plan = self.plan(&contender.context, &policy_of(contender, question))?;
        let (stage, mut talk) = self.stage(plan, question, pictures, n_predict)?;
        let mut places = Places::default();
        let mut distances = Vec::new();
        for (i, (said, text)) in reference.iter().enumerate() {
            let prompt = self.prepare(stage, &mut talk, question, i, pictures, watch)?;
            let session = &mut self.stages[stage].session;
            session.expect(said.fed().len());
            let followed = distance::follow(
                session,
                &prompt.segments,
                said,
                &mut places,
                watch.cancelled,
            )?;
            let Some(followed) = followed else {
                return Ok(None);
            };
            distances.push(Followed::distance(&followed));
            talk.transcript.answered(text);
            talk.pending = said.pending();
        }
        let report = self.stages[stage].session.controller.report();
        Ok(Some((distances, Evicted::of(&report))))
    }

    /// An empty session for a window of so many positions.
    fn opened_for(
        &mut self,
        context: &ContextOptions,
        policy: &PolicySpec,
        positions: usize,
    ) -> Result<&mut Session<LlamaEngine>> {
        let mut plan = self.plan(context, policy)?;
        plan.choose_rope(self.rope, || Ok(Reach::Positions(positions)))?;
        let stage = self.opened(plan)?;
        Ok(&mut self.stages[stage].session)
    }

    fn plan(&self, context: &ContextOptions, policy: &PolicySpec) -> Result<Plan> {
        Plan::new(&self.model, self.prompts.vision(), context, policy)
    }

    /// An empty context as planned, with rope factors for this question, and a new conversation.
    fn stage(
        &mut self,
        mut plan: Plan,
        question: &Question,
        pictures: &[Picture],
        n_predict: &[usize],
    ) -> Result<(usize, Talk)> {
        let talk = Talk::new(Transcript::new(self.template.clone(), None));
        // Of a chat nobody knows how far it goes.
        let only = match (&question.turns[..], n_predict) {
            ([_], [n]) => Some(Turn {
                n_predict: Some(*n),
                ..self.turn(question, 0, pictures)
            }),
            _ => None,
        };
        plan.choose_rope(self.rope, || match only {
            Some(turn) => turn::reach(&self.model, &self.prompts, &talk, turn),
            None => Ok(Reach::Cache),
        })?;
        Ok((self.opened(plan)?, talk))
    }

    /// The place of an empty context as planned.
    fn opened(&mut self, plan: Plan) -> Result<usize> {
        if let Some(at) = self.stages.iter().position(|opened| plan.fits(opened)) {
            plan.reopen(&mut self.stages[at])?;
            return Ok(at);
        }
        // One that differs in its rope factors alone gives its memory back.
        self.stages.retain(|opened| !plan.fits_but_for_rope(opened));
        let mut opened = plan.open(&SamplerOptions::GREEDY)?;
        opened.warm_up()?;
        self.stages.push(opened);
        Ok(self.stages.len() - 1)
    }

    /// A turn of a question; pictures come with its first.
    fn turn<'q>(&self, question: &'q Question, i: usize, pictures: &'q [Picture]) -> Turn<'q> {
        let asked = &question.turns[i];
        Turn {
            text: match (&self.template, &asked.raw) {
                (None, Some(raw)) => raw,
                _ => &asked.text,
            },
            pictures: if i == 0 { pictures } else { &[] },
            ..Turn::default()
        }
    }

    /// The prompt of a turn.
    fn prepare(
        &mut self,
        stage: usize,
        talk: &mut Talk,
        question: &Question,
        i: usize,
        pictures: &[Picture],
        watch: Pulse<'_>,
    ) -> Result<turn::Prompt> {
        let turn = self.turn(question, i, pictures);
        let (opened, prompts) = (&mut self.stages[stage], &mut self.prompts);
        turn::prepare(opened, prompts, talk, turn, watch.now, watch.cancelled)
    }
}

/// How a cache will be made.
fn report(plan: &Plan) -> CacheReport {
    let context = plan.context();
    CacheReport {
        type_k: context.type_k.name().into(),
        type_v: context.type_v.name().into(),
        attend: context.attend.if_any(),
    }
}

/// The policy for this question.
fn policy_of(contender: &Contender, question: &Question) -> PolicySpec {
    policy_for(contender, &question.id)
}

/// The policy for a question or a window by its name. One that draws by lot draws anew for each: the
/// same places of every picture or text would be a pattern, not chance.
fn policy_for(contender: &Contender, name: &str) -> PolicySpec {
    let digest = Sha256::digest(name);
    let number = digest.iter().take(8).fold(0, |n, &b| n << 8 | u64::from(b));
    let mut policy = contender.policy.clone();
    policy.options.seed ^= number;
    policy
}
