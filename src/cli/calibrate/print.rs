//! What was tried, how it was checked, and what that says.

use super::Outcome;
use crate::cli::asking::{percent, summary_text};
use crate::cli::table::Columns;
use hae::calibrate::file::{Calibration, Chosen};
use hae::calibrate::search::Tried;
use hae::calibrate::{Score, Setting};
use hae::eval::summary::Summary;

pub fn tables(outcome: &Outcome) -> String {
    let Outcome {
        calibration,
        header,
        answers,
    } = outcome;
    let (tune, held_out) = (&calibration.tune, &calibration.held_out);
    let budget = calibration.kv_budget;
    let summary = Summary::of(header, answers);
    format!(
        "{}, --kv-budget {budget}: chosen on {} of {}, checked on {}\n\n{}\n\nThe check: {}\n{}\n",
        calibration.model.file,
        count(tune.n),
        tune.file.file,
        count(held_out.n),
        tried(calibration),
        summary_text(header, &summary),
        verdict(calibration),
    )
}

fn count(n: usize) -> String {
    format!("{n} question{}", if n == 1 { "" } else { "s" })
}

/// A row for each setting, the full cache in front.
fn tried(calibration: &Calibration) -> String {
    let full = (None, &calibration.scores.tune.full);
    let settings = calibration.tried.iter().map(|t| (Some(t), &t.score));
    let rows: Vec<(Option<&Tried>, &Score)> = [full].into_iter().chain(settings).collect();
    let mut columns = Columns::default();
    let mut setting = |title: &str, right: bool, of: &dyn Fn(&Tried) -> String| {
        columns.add(title, right, &rows, |row| {
            row.0.map_or_else(String::new, of)
        });
    };
    let best = |t: &Tried| t.parameters == calibration.found;
    let tau = |t: &Tried| t.parameters.tau.map_or("-".into(), |tau| tau.to_string());
    let kl = |t: &Tried| t.score.kl_mean.map_or("-".into(), |kl| format!("{kl:.4}"));
    setting("layers", false, &|t| t.parameters.layers.to_string());
    setting("queries", false, &|t| t.parameters.queries_name().into());
    setting("tau", true, &tau);
    setting("bin", true, &|t| t.parameters.bin_size.to_string());
    setting("KL mean", true, &kl);
    columns.add("right", true, &rows, |(_, score)| match score.asked {
        0 => String::new(),
        n => format!("{} of {n}", score.right),
    });
    columns.add("facts %", true, &rows, |(_, score)| {
        score.recall().map_or_else(String::new, percent)
    });
    columns.add("tried as", false, &rows, |(tried, _)| match tried {
        None => "full".into(),
        Some(t) if best(t) => format!("{}, best", t.stage),
        Some(t) => t.stage.clone(),
    });
    columns.table().to_string()
}

fn verdict(calibration: &Calibration) -> String {
    let same = calibration.found == Setting::default();
    match calibration.chosen {
        Chosen::Found => format!(
            "Found and kept, for it does better on the held-out questions, too: {}",
            calibration.parameters
        ),
        Chosen::Defaults if same => {
            format!(
                "The defaults stay, nothing was better: {}",
                calibration.parameters
            )
        }
        Chosen::Defaults => format!(
            "The defaults stay, what was found does no better on the held-out questions: {}",
            calibration.parameters
        ),
    }
}
