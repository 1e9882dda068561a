//! A search along one parameter after the other: each stage tries the values of one, the others
//! being the best so far, and the best of all goes on.
//!
//! More points win; of as many, the smaller distance to the full cache; of the same distance, what
//! costs less to read; of the same cost, what was tried first, and the defaults are tried first.

use serde::{Deserialize, Serialize};

use super::grid::{Grid, Stage};
use super::{Score, Setting};

/// A setting with its score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tried {
    /// What was varied when it was tried: `defaults`, or a stage's name.
    pub stage: String,
    /// What was tried.
    pub parameters: Setting,
    /// What the questions said of it.
    pub score: Score,
}

/// Settings that are to be scored on the same questions.
#[derive(Clone, Copy, Debug)]
pub struct Round<'a> {
    /// What differs between them.
    pub stage: Stage,
    /// At least one.
    pub settings: &'a [Setting],
    /// How many settings may come after these, at most.
    pub left: usize,
}

/// What a search came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Of [`Found::tried`].
    best: usize,
    /// In the order in which they were asked; the defaults are the first.
    pub tried: Vec<Tried>,
}

impl Found {
    /// The one to use.
    pub fn best(&self) -> &Tried {
        &self.tried[self.best]
    }

    /// The one that the others have to beat.
    pub fn defaults(&self) -> &Tried {
        &self.tried[0]
    }
}

/// Settings that a pass tries at most.
pub fn most(grid: Grid) -> usize {
    let stages = Stage::ALL.iter();
    let values = stages.map(|&stage| grid.settings(stage, &Setting::default()).len() - 1);
    values.sum()
}

/// Goes `passes` times over all stages, or until one changes nothing. `score` gives a score for
/// each setting of a round. `None`: it was cancelled.
///
/// # Errors
/// Those of `score`.
pub fn search<E>(
    grid: Grid,
    passes: usize,
    mut score: impl FnMut(Round<'_>) -> Result<Option<Vec<Score>>, E>,
) -> Result<Option<Found>, E> {
    let mut found = Found {
        best: 0,
        tried: Vec::new(),
    };
    let mut left = passes.saturating_mul(most(grid));
    for pass in 0..passes {
        let before = found.best;
        for stage in Stage::ALL {
            let first = found.tried.is_empty();
            let best = match first {
                true => Setting::default(),
                false => found.best().parameters.clone(),
            };
            let mut settings = grid.settings(stage, &best);
            left = left.saturating_sub(settings.len() - 1);
            settings.retain(|s| found.tried.iter().all(|tried| tried.parameters != *s));
            // Where nothing leaves while answers grow, the bin has nothing to do.
            let idle = stage == Stage::Bin && found.best().score.evicted_in_decoding == 0;
            if settings.is_empty() || idle {
                continue;
            }
            let round = Round {
                stage,
                settings: &settings,
                left,
            };
            let Some(scores) = score(round)? else {
                return Ok(None);
            };
            let name = |i| match first && i == 0 {
                true => "defaults".to_owned(),
                false => stage.name().to_owned(),
            };
            let tried = settings.into_iter().zip(scores).enumerate();
            found
                .tried
                .extend(tried.map(|(i, (parameters, score))| Tried {
                    stage: name(i),
                    parameters,
                    score,
                }));
            found.best = best_of(&found.tried, grid.n_layer);
        }
        if pass > 0 && found.best == before {
            break;
        }
    }
    Ok((!found.tried.is_empty()).then_some(found))
}

fn best_of(tried: &[Tried], n_layer: u32) -> usize {
    let mut best = 0;
    for (i, new) in tried.iter().enumerate().skip(1) {
        let old = &tried[best];
        let cost = |tried: &Tried| tried.parameters.cost(n_layer);
        let order = new.score.compared(&old.score);
        if order.then_with(|| cost(old).cmp(&cost(new))).is_gt() {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::policy::{Layers, Queries};

    const GRID: Grid = Grid { n_layer: 32 };

    fn scored(points: f64, kl: f64) -> Score {
        Score {
            points,
            kl_mean: Some(kl),
            evicted: 9,
            evicted_in_decoding: 3,
            ..Score::default()
        }
    }

    /// The search with a made-up model, and the rounds that it took.
    fn searched(passes: usize, of: impl Fn(&Setting) -> Score) -> (Found, Vec<(Stage, usize)>) {
        let mut rounds = Vec::new();
        let mut left = usize::MAX;
        let found = search(GRID, passes, |round| {
            rounds.push((round.stage, round.settings.len()));
            assert!(round.left < left && round.settings.len() <= left);
            left = round.left;
            let scores = round.settings.iter().map(&of).collect();
            Ok::<_, Infallible>(Some(scores))
        });
        let found = found.unwrap().unwrap();
        for (i, tried) in found.tried.iter().enumerate() {
            let twice = found.tried[..i]
                .iter()
                .any(|t| t.parameters == tried.parameters);
            assert!(!twice, "{} is tried twice", tried.parameters);
        }
        (found, rounds)
    }

    fn planted() -> Setting {
        Setting {
            layers: Layers::List((16..32).collect()),
            queries: Queries::All,
            tau: Some(1.0),
            bin_size: 8,
        }
    }

    /// How many parameters are as planted.
    fn hits(setting: &Setting) -> usize {
        let planted = planted();
        usize::from(setting.layers == planted.layers)
            + usize::from(setting.queries == planted.queries)
            + usize::from(setting.tau == planted.tau)
            + usize::from(setting.bin_size == planted.bin_size)
    }

    #[test]
    fn a_planted_best_is_found() {
        let (found, rounds) = searched(1, |s| scored(hits(s) as f64, 1.0));
        assert_eq!(found.best().parameters, planted());
        assert_eq!(found.defaults().parameters, Setting::default());
        assert_eq!(found.defaults().stage, "defaults");
        let stages: Vec<Stage> = rounds.iter().map(|(stage, _)| *stage).collect();
        assert_eq!(stages, Stage::ALL);
        let sizes: Vec<usize> = rounds.iter().map(|(_, n)| *n).collect();
        assert_eq!(sizes, [9, 1, 3, 3]);
        assert_eq!(found.tried.len(), most(GRID) + 1);
        // The same by distances alone, where all answers are right.
        let (found, _) = searched(1, |s| scored(5.0, 1.0 - 0.1 * hits(s) as f64));
        assert_eq!(found.best().parameters, planted());
    }

    #[test]
    fn points_go_before_distance() {
        let layer_8 = Layers::List(vec![8]);
        let (found, _) = searched(1, |s| match s.layers == layer_8 {
            true => scored(6.0, 9.0),
            false => scored(5.0, 0.1),
        });
        assert_eq!(found.best().parameters.layers, layer_8);
        // Sums of shares differ by rounding, which is no difference.
        let (found, _) = searched(1, |s| match s.layers == layer_8 {
            true => scored(5.0 + 1e-12, 9.0),
            false => scored(5.0, 0.1),
        });
        assert_ne!(found.best().parameters.layers, layer_8);
    }

    #[test]
    fn what_makes_no_difference_stays_or_becomes_cheaper() {
        // Fewer layers and shallower ones cost less; the rest has no price and stays.
        let (found, _) = searched(1, |_| scored(5.0, 0.5));
        let cheapest = Setting {
            layers: Layers::List(vec![0]),
            ..Setting::default()
        };
        assert_eq!(found.best().parameters, cheapest);
        // All layers are better than any choice of them.
        let (found, _) = searched(3, |s| match s.layers {
            Layers::All => scored(5.0, 0.4),
            Layers::List(_) => scored(5.0, 0.5),
        });
        assert_eq!(found.best().parameters, Setting::default());
        // No number is no distance.
        let none = Score {
            kl_mean: None,
            ..scored(5.0, 0.0)
        };
        let (found, _) = searched(1, |s| match s.layers {
            Layers::All => scored(5.0, 0.4),
            Layers::List(_) => none.clone(),
        });
        assert_eq!(found.best().parameters.layers, Layers::All);
    }

    #[test]
    fn a_second_pass_finds_what_depends_on_a_later_stage() {
        // Layer 8 is good for all queries together only, and these are good in any case.
        let of = |s: &Setting| {
            let all = s.queries == Queries::All;
            let eighth = s.layers == Layers::List(vec![8]);
            scored(
                f64::from(u8::from(all)) + f64::from(u8::from(all && eighth)),
                1.0,
            )
        };
        let eighth = Layers::List(vec![8]);
        let (found, _) = searched(1, of);
        assert_ne!(found.best().parameters.layers, eighth);
        let (found, rounds) = searched(5, of);
        assert_eq!(found.best().parameters.layers, eighth);
        // The third pass changes nothing and is the last.
        let passes = rounds.iter().filter(|(stage, _)| *stage == Stage::Layers);
        assert!(passes.count() <= 3);
    }

    #[test]
    fn the_bin_is_left_alone_where_nothing_leaves_while_decoding() {
        let (found, rounds) = searched(1, |_| Score {
            evicted_in_decoding: 0,
            ..scored(5.0, 0.5)
        });
        assert!(rounds.iter().all(|(stage, _)| *stage != Stage::Bin));
        assert_eq!(found.best().parameters.bin_size, 8);
    }

    #[test]
    fn a_cancelled_or_failed_search_finds_nothing() {
        let cancelled = search(GRID, 1, |_| Ok::<_, Infallible>(None));
        assert_eq!(cancelled.unwrap(), None);
        assert_eq!(search(GRID, 1, |_| Err("no")).unwrap_err(), "no");
    }
}
