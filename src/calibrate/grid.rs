//! What is tried: a handful of values of each parameter. Each costs every question of the tuning
//! part another answer, so they are few and far apart.

use super::Setting;
use crate::policy::{Layers, Queries};

/// One parameter of a setting. In this order: which attention judges comes before what is made of
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `--score-layers`.
    Layers,
    /// `--score-queries`.
    Queries,
    /// `--dap-tau`, or none.
    Rule,
    /// `--bin-size`.
    Bin,
}

impl Stage {
    /// In the order of the search.
    pub const ALL: [Stage; 4] = [Stage::Layers, Stage::Queries, Stage::Rule, Stage::Bin];

    /// As the calibration file and the tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Layers => "score layers",
            Stage::Queries => "score queries",
            Stage::Rule => "tau",
            Stage::Bin => "bin size",
        }
    }
}

/// Beside the budget's own choice. A budget takes the tokens that are looked at least, however
/// many it must; these also take those that are looked at little, so no tau exceeds it.
const TAUS: [f64; 3] = [0.5, 1.0, 2.0];
const BINS: [usize; 4] = [1, 8, 32, 64];

/// The values for a model of so many layers.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Layers of the model.
    pub n_layer: u32,
}

impl Grid {
    /// Every value of one parameter, with the others as they are in `best`, which is among them.
    pub fn settings(self, stage: Stage, best: &Setting) -> Vec<Setting> {
        let best = || best.clone();
        match stage {
            Stage::Layers => {
                let layers = self.layers().into_iter();
                layers.map(|layers| Setting { layers, ..best() }).collect()
            }
            Stage::Queries => [Queries::Last, Queries::All]
                .map(|queries| Setting { queries, ..best() })
                .to_vec(),
            Stage::Rule => [None]
                .into_iter()
                .chain(TAUS.map(Some))
                .map(|tau| Setting { tau, ..best() })
                .collect(),
            Stage::Bin => BINS.map(|bin_size| Setting { bin_size, ..best() }).to_vec(),
        }
    }

    /// All layers, single ones spread over the depth (0 is the paper's), the upper half, the
    /// middle third. Models of few layers have some of these twice.
    fn layers(self) -> Vec<Layers> {
        let n = self.n_layer;
        let single = [0, 1, n / 4, n / 2, 3 * n / 4, n.saturating_sub(1)];
        let spans = [n / 2..n, n / 3..2 * n / 3];
        let lists = single.into_iter().map(|layer| vec![layer]);
        let lists = lists.chain(spans.map(|span| span.collect()));
        let mut all = vec![Layers::All];
        for list in lists {
            let layers = Layers::List(list);
            let resolved = layers.resolve(n);
            let known = all.iter().any(|known| known.resolve(n) == resolved);
            if !known && !resolved.is_empty() && resolved.iter().all(|&layer| layer < n) {
                all.push(layers);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(n_layer: u32) -> Vec<String> {
        let layers = Grid { n_layer }.layers();
        layers.iter().map(Layers::to_string).collect()
    }

    #[test]
    fn layers_are_spread_over_the_depth() {
        let of_32 = ["all", "0", "1", "8", "16", "24", "31", "16-31", "10-20"];
        assert_eq!(layers(32), of_32);
        assert_eq!(layers(4), ["all", "0", "1", "2", "3", "2-3"]);
        assert_eq!(layers(2), ["all", "0", "1"]);
        assert_eq!(layers(1), ["all"]);
        assert_eq!(layers(0), ["all"]);
    }

    #[test]
    fn each_stage_changes_one_parameter_and_holds_the_best() {
        let best = Setting {
            layers: Layers::List(vec![8]),
            queries: Queries::All,
            tau: Some(1.0),
            bin_size: 8,
        };
        for stage in Stage::ALL {
            let all = Grid { n_layer: 32 }.settings(stage, &best);
            assert_eq!(all.iter().filter(|s| **s == best).count(), 1, "{stage:?}");
            for setting in &all {
                let changed = [
                    setting.layers != best.layers,
                    setting.queries != best.queries,
                    setting.tau != best.tau,
                    setting.bin_size != best.bin_size,
                ];
                assert!(changed.iter().filter(|&&c| c).count() <= 1, "{setting}");
            }
        }
    }
}
