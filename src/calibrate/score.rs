//! How well a setting does: answers, facts, and the distance to the full cache.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::eval::record::{Answer, Distance, FactScore};

/// What the questions say of a setting.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Answers that are right or wrong, each turn of a chat, and those that are right.
    pub asked: usize,
    /// Those of them that are right.
    pub right: usize,
    /// Answers that are judged by their facts.
    pub stories: usize,
    /// Mentions that the stories have to make, and those that they make.
    pub facts_required: usize,
    /// Those that the stories make.
    pub facts_made: usize,
    /// A right answer counts 1, a story the share of its facts that it tells.
    pub points: f64,
    /// Mean KL to the full cache, of all predictions together; none where nothing was predicted,
    /// or it is no finite number.
    pub kl_mean: Option<f64>,
    /// How many predictions the mean is of.
    pub predictions: usize,
    /// Tokens that left the cache, in all, and those that did while answers grew.
    pub evicted: usize,
    /// Those that left while answers grew.
    pub evicted_in_decoding: usize,
}

/// Points closer than this are the same: they are sums of shares.
const SAME: f64 = 1e-9;

impl Score {
    /// Adds up saved answers.
    pub fn of<'a>(answers: impl Iterator<Item = &'a Answer>) -> Self {
        let mut tally = Tally::default();
        for answer in answers {
            tally.judged(answer.right, answer.facts.as_ref());
            tally.distance(answer.distance.as_ref());
            let evicted = &answer.evicted;
            // The counts of a chat run on from turn to turn.
            if answer.turn == 0 {
                tally.ended();
            }
            tally.evicted(evicted.after_prefill, evicted.in_decoding);
        }
        tally.score()
    }

    /// Whether it is better than another: more points, or as many at a smaller distance.
    pub fn beats(&self, other: &Score) -> bool {
        self.compared(other).is_gt()
    }

    /// The better is the greater.
    pub(super) fn compared(&self, other: &Score) -> Ordering {
        if (self.points - other.points).abs() > SAME {
            return self.points.total_cmp(&other.points);
        }
        let kl = |score: &Score| score.kl_mean.unwrap_or(f64::INFINITY);
        kl(other).total_cmp(&kl(self))
    }

    /// Of all facts that its stories have to state, the share that they state.
    pub fn recall(&self) -> Option<f64> {
        let share = self.facts_made as f64 / self.facts_required as f64;
        (self.facts_required > 0).then_some(share)
    }
}

/// Adds up a [`Score`], answer by answer.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    score: Score,
    kl: f64,
    /// Of the conversation that is under way.
    evicted: (usize, usize),
}

impl Tally {
    /// Takes in an answer's verdict; `None`: nobody knows what is right.
    pub fn judged(&mut self, right: Option<bool>, facts: Option<&FactScore>) {
        let score = &mut self.score;
        match (facts, right) {
            (Some(facts), _) => {
                score.stories += 1;
                score.facts_required += facts.required;
                score.facts_made += facts.made;
                score.points += facts.made as f64 / facts.required.max(1) as f64;
            }
            (None, Some(right)) => {
                score.asked += 1;
                score.right += usize::from(right);
                score.points += f64::from(u8::from(right));
            }
            (None, None) => {}
        }
    }

    /// Takes in how far the answer's predictions were from the full cache's, where they were compared.
    pub fn distance(&mut self, distance: Option<&Distance>) {
        if let Some(distance) = distance {
            self.score.predictions += distance.kl.len();
            self.kl += distance.kl.iter().map(|&x| f64::from(x)).sum::<f64>();
        }
    }

    /// What a conversation has evicted so far.
    pub fn evicted(&mut self, after_prefill: usize, in_decoding: usize) {
        self.evicted = (after_prefill, in_decoding);
    }

    /// The conversation is over.
    pub fn ended(&mut self) {
        let (after_prefill, in_decoding) = std::mem::take(&mut self.evicted);
        self.score.evicted += after_prefill + in_decoding;
        self.score.evicted_in_decoding += in_decoding;
    }

    /// All that was taken in.
    pub fn score(mut self) -> Score {
        self.ended();
        let mean = self.kl / self.score.predictions as f64;
        self.score.kl_mean = Some(mean).filter(|mean| mean.is_finite());
        self.score
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stories_count_by_their_facts() {
        let mut tally = Tally::default();
        tally.judged(Some(true), None);
        tally.judged(Some(false), None);
        let facts = FactScore {
            required: 8,
            made: 6,
            said: 7,
            correct: 6,
            by_fact: Vec::new(),
        };
        tally.judged(Some(false), Some(&facts));
        // Two turns of a chat: the second counts on.
        tally.evicted(10, 2);
        tally.evicted(15, 3);
        let score = tally.score();
        assert_eq!((score.asked, score.right, score.stories), (2, 1, 1));
        assert_eq!((score.points, score.recall()), (1.75, Some(0.75)));
        assert_eq!((score.evicted, score.evicted_in_decoding), (18, 3));
        assert_eq!(score.kl_mean, None);
    }
}
