//! A policy against its own trace: told the same, it must decide the same.

use std::path::Path;

use super::play::Player;
use crate::controller::After;
use crate::error::{Error, Result};
use crate::policy::{self, Limits};
use crate::trace::{Header, Record};

/// How a policy did against its own decisions.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Verified {
    /// Plans that were made, the empty ones included.
    pub plans: usize,
    /// Of those, plans after decoded tokens.
    pub steps: usize,
    /// Where it decided otherwise for the first time; nothing after it was compared.
    pub difference: Option<String>,
}

/// Replays the very policy that made a trace.
///
/// # Errors
/// [`Error::File`] when the records do not fit each other, [`Error::Option`] for parameters that
/// cannot be.
pub fn verify(path: &Path, header: &Header, records: &[Record]) -> Result<Verified> {
    let limits = Limits {
        n_layer: header.n_layer,
        n_cells: header.n_cells,
    };
    let policy = policy::create(&header.policy, &header.options, limits)?;
    let mut player = Player::under(policy, records);
    let mut verified = Verified {
        plans: 0,
        steps: 0,
        difference: None,
    };
    for record in records {
        let judged = player
            .take(record)
            .map_err(|e| Error::file(path, format!("cannot be replayed: {e}")))?;
        let same = match record {
            Record::Judged { pruned, .. } => judged.as_ref() == Some(pruned),
            Record::Planned { after, .. } => {
                verified.plans += 1;
                verified.steps += usize::from(*after == After::Step);
                record.plan().as_ref() == Some(player.controller().plan())
            }
            _ => true,
        };
        if !same {
            let Verified { plans, steps, .. } = verified;
            verified.difference = Some(format!(
                "plan {plans}, after {steps} decoded tokens, is not the recorded one"
            ));
            break;
        }
    }
    Ok(verified)
}
