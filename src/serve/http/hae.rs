//! `hae` in a request: what leaves the cache, and what decoding steps attend to, for this answer alone.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::failure::Failure;
use super::service::Service;
use crate::attend::Attend;
use crate::policy::{Amount, PolicyOptions, PolicySpec};

/// What is not said is as the server was started.
#[derive(Clone, Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct HaeFields {
    /// The policy's name, as in `hae policies`.
    pub kv_policy: Option<String>,
    /// Most cells after the prompt: a number of cells such as 512, or a share such as 0.5 or "1.0".
    #[schema(value_type = serde_json::Value)]
    pub kv_budget: Option<Value>,
    /// More of the policy's parameters, as the answer's `hae.policy.params` names them.
    #[schema(value_type = serde_json::Value)]
    pub options: Option<Map<String, Value>>,
    /// Visual tokens that a layer looks at: a number, or a share.
    #[schema(value_type = serde_json::Value)]
    pub attend: Option<Value>,
    /// The same of text.
    #[schema(value_type = serde_json::Value)]
    pub attend_text: Option<Value>,
    /// Whether a stream tells what becomes of the patches of pictures.
    pub watch: bool,
}

impl HaeFields {
    /// Refuses what cannot be, before anything is computed for it.
    pub fn check(&self, service: &Service) -> Result<(), Failure> {
        self.policy(service)?;
        self.attend(service)?;
        Ok(())
    }

    /// `None`: as the server was started.
    pub fn policy(&self, service: &Service) -> Result<Option<PolicySpec>, Failure> {
        if self.kv_policy.is_none() && self.kv_budget.is_none() && self.options.is_none() {
            return Ok(None);
        }
        let own = &service.about.policy;
        let mut spec = match &self.kv_policy {
            Some(name) if *name != own.name => PolicySpec::new(name, PolicyOptions::default()),
            _ => own.clone(),
        };
        if let Some(options) = &self.options {
            spec.options = merged(&spec.options, options)?;
        }
        if let Some(budget) = amount("kv_budget", self.kv_budget.as_ref())? {
            spec.options.kv_budget = Some(budget);
        }
        // The name first: nothing is read by a policy that is not there.
        spec.create(service.about.limits)?;
        spec.check()?;
        Ok(Some(spec))
    }

    /// `None`: as the server was started.
    pub fn attend(&self, service: &Service) -> Result<Option<Attend>, Failure> {
        let vision = amount("attend", self.attend.as_ref())?;
        let text = amount("attend_text", self.attend_text.as_ref())?;
        if vision.or(text).is_none() {
            return Ok(None);
        }
        let own = service.about.attend;
        let attend = Attend {
            vision: vision.or(own.vision),
            text: text.or(own.text),
            ..own
        };
        attend.check(service.about.limits.n_layer)?;
        Ok(Some(attend))
    }
}

/// The options with some of them replaced.
fn merged(own: &PolicyOptions, given: &Map<String, Value>) -> Result<PolicyOptions, Failure> {
    let mut all = json!(own);
    for (name, value) in given {
        match all.get_mut(name) {
            Some(old) => *old = value.clone(),
            None => {
                let reason = format!("`hae.options.{name}`: no policy has such a parameter");
                return Err(Failure::invalid(reason));
            }
        }
    }
    serde_path_to_error::deserialize(&all).map_err(|e| {
        let path = e.path().to_string();
        Failure::invalid(format!("`hae.options.{path}`: {}", e.into_inner()))
    })
}

/// A whole number is one of cells, another a share; a text is read as the command line reads it, so that
/// a language without whole numbers can say "1.0".
fn amount(name: &str, value: Option<&Value>) -> Result<Option<Amount>, Failure> {
    let read = |text: &str| {
        let read = text.parse::<Amount>();
        read.map_err(|reason| Failure::invalid(format!("`hae.{name}`: {reason}")))
    };
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => read(text).map(Some),
        Some(Value::Number(number)) => read(&number.to_string()).map(Some),
        Some(other) => Err(Failure::invalid(format!(
            "`hae.{name}`: {other}, expected a number of cells or a share such as 0.4"
        ))),
    }
}
