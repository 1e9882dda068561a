//! What a policy makes of a question to which the full cache's answer is known: the cheapest way
//! to a verdict and a distance.
//!
//! A policy that is fed the full cache's answer and predicts each of its tokens, the end included,
//! would have said the same. It is asked for an answer of its own only where it would not.

use super::{Asker, Contender, Reference};
use crate::answer::{Answer, Evicted};
use crate::bench::Pulse;
use crate::error::Result;
use crate::eval::question::Question;
use crate::eval::record::Distance;
use crate::generate::Finish;
use crate::image::Picture;
use crate::open::Opened;

/// What came of one question: `[turns]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    /// Each turn's answer, and whether the model ended it.
    pub answers: Vec<(String, bool)>,
    /// How far the policy's predictions are from the full cache's; `None` where a turn has no token
    /// to compare.
    pub distances: Vec<Option<Distance>>,
    /// Over the whole conversation, fed the full cache's answers.
    pub evicted: Evicted,
}

impl Asker {
    /// Asks every turn of a question. `None`: cancelled.
    ///
    /// # Errors
    /// As [`Asker::ask`].
    pub fn attempt(
        &mut self,
        contender: &Contender,
        question: &Question,
        pictures: &[Picture],
        n_predict: &[usize],
        reference: &Reference,
        watch: Pulse<'_>,
    ) -> Result<Option<Attempt>> {
        let followed = self.distance(contender, question, pictures, n_predict, reference, watch)?;
        let Some((distances, evicted)) = followed else {
            return Ok(None);
        };
        let same = |d: &Option<Distance>| d.as_ref().is_some_and(|d| d.first_differing.is_none());
        let answers = if distances.iter().all(same) {
            answers(reference)
        } else {
            let expected: Vec<usize> = reference.iter().map(|(said, _)| said.fed().len()).collect();
            let expected = Some(&expected[..]);
            let asked = self.ask(contender, question, pictures, n_predict, expected, watch)?;
            let Some(asked) = asked else { return Ok(None) };
            let answer = |a: Answer| (a.text, a.finish == Finish::Eog);
            asked.into_iter().map(answer).collect()
        };
        Ok(Some(Attempt {
            answers,
            distances,
            evicted,
        }))
    }

    /// Empties every context, so that those that wait hold no more memory than they began with.
    ///
    /// # Errors
    /// The engine's own.
    pub fn rest(&mut self) -> Result<()> {
        self.stages.iter_mut().try_for_each(Opened::empty)
    }

    /// Gives all contexts back; those that are wanted again are made anew.
    pub fn drop_contexts(&mut self) {
        self.stages.clear();
    }
}

/// The full cache's own.
pub fn answers(reference: &Reference) -> Vec<(String, bool)> {
    let answer = |(said, text): &(super::Said, String)| (text.clone(), said.ended);
    reference.iter().map(answer).collect()
}
