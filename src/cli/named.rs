//! Values of the library that users choose by name: what the command line calls each of them.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use hae::cache::BinStore;
use hae::convert::OutType;
use hae::eval::files::Format;
use hae::llama::{CacheType, FlashAttention, SplitMode};
use hae::open::RopeChoice;
use hae::policy::{DapMode, Norm, Pooling, Queries};
use hae::replay::Against;

/// A type whose values have names. A new flag of this kind needs nothing but an `impl`.
pub trait Named: Copy + Send + Sync + 'static {
    /// The values in the order in which help lists them, each with its name and, behind that, what
    /// else llama.cpp's users may write.
    const NAMES: &'static [(Self, &'static [&'static str])];
    /// Names that are known, so that their refusal has its own reason, and are not offered.
    const REFUSED: &'static [&'static str] = &[];
}

impl Named for CacheType {
    const NAMES: &'static [(Self, &'static [&'static str])] = &[
        (CacheType::F32, &["f32"]),
        (CacheType::F16, &["f16"]),
        (CacheType::Bf16, &["bf16"]),
        (CacheType::Q8_0, &["q8_0"]),
        (CacheType::Q4_0, &["q4_0"]),
        (CacheType::Q4_1, &["q4_1"]),
        (CacheType::Iq4Nl, &["iq4_nl"]),
        (CacheType::Q5_0, &["q5_0"]),
        (CacheType::Q5_1, &["q5_1"]),
    ];
}

impl Named for FlashAttention {
    const NAMES: &'static [(Self, &'static [&'static str])] = &[
        (FlashAttention::On, &["on", "1", "true", "enabled"]),
        (FlashAttention::Off, &["off", "0", "false", "disabled"]),
        (FlashAttention::Auto, &["auto", "-1"]),
    ];
}

impl Named for SplitMode {
    const NAMES: &'static [(Self, &'static [&'static str])] = &[
        (SplitMode::None, &["none"]),
        (SplitMode::Layer, &["layer"]),
        (SplitMode::Row, &["row"]),
        (SplitMode::Tensor, &["tensor"]),
    ];
    const REFUSED: &'static [&'static str] = &["tensor"];
}

impl Named for RopeChoice {
    const NAMES: &'static [(Self, &'static [&'static str])] = &[
        (RopeChoice::Auto, &["auto"]),
        (RopeChoice::Short, &["short"]),
        (RopeChoice::Long, &["long"]),
        (RopeChoice::Context, &["context"]),
    ];
}

impl Named for DapMode {
    const NAMES: &'static [(Self, &'static [&'static str])] = &[
        (DapMode::Exact, &["exact"]),
        (DapMode::Early, &["early"]),
        (DapMode::Midway, &["midway"]),
    ];
}

impl Named for Queries {
    const NAMES: &'static [(Self, &'static [&'static str])] =
        &[(Queries::All, &["all"]), (Queries::Last, &["last"])];
}

impl Named for Norm {
    const NAMES: &'static [(Self, &'static [&'static str])] =
        &[(Norm::PerQuery, &["query"]), (Norm::Sum, &["sum"])];
}

impl Named for Pooling {
    const NAMES: &'static [(Self, &'static [&'static str])] =
        &[(Pooling::Avg, &["avg"]), (Pooling::Max, &["max"])];
}

impl Named for Format {
    const NAMES: &'static [(Self, &'static [&'static str])] = &[
        (Format::Jsonl, &["jsonl"]),
        (Format::Gqa, &["gqa"]),
        (Format::ScienceQa, &["scienceqa"]),
        (Format::MmBench, &["mmbench"]),
        (Format::Mmmu, &["mmmu"]),
    ];
}

impl Named for BinStore {
    const NAMES: &'static [(Self, &'static [&'static str])] = &[
        (BinStore::File, &["file"]),
        (BinStore::Ram, &["ram"]),
        (BinStore::Off, &["off"]),
    ];
}

impl Named for Against {
    const NAMES: &'static [(Self, &'static [&'static str])] = &[
        (Against::Peak, &["peak"]),
        (Against::Mean, &["mean"]),
        (Against::Live, &["live"]),
    ];
}

impl Named for OutType {
    const NAMES: &'static [(Self, &'static [&'static str])] = &[
        (OutType::F32, &["f32"]),
        (OutType::F16, &["f16"]),
        (OutType::Bf16, &["bf16"]),
        (OutType::Q8_0, &["q8_0"]),
    ];
}

/// The value of this name, in small letters or large ones.
///
/// # Errors
/// One line with the names that there are.
pub fn parse<T: Named>(text: &str) -> Result<T, String> {
    let lower = text.to_ascii_lowercase();
    let known = T::NAMES.iter();
    let found = known.clone().find(|(_, names)| names.contains(&&*lower));
    found.map(|(value, _)| *value).ok_or_else(|| {
        let mut names: Vec<&str> = known
            .filter_map(|(_, names)| names.first().copied())
            .filter(|name| !T::REFUSED.contains(name))
            .collect();
        let last = names.pop().unwrap_or_default();
        format!("expected {} or {last}", names.join(", "))
    })
}

/// The same for a flag whose help and errors list the names.
pub fn named<T: Named>() -> impl TypedValueParser<Value = T> {
    let values = T::NAMES.iter().filter_map(|(_, names)| {
        let (name, others) = names.split_first()?;
        let value = PossibleValue::new(*name).aliases(others.iter().copied());
        Some(value.hide(T::REFUSED.contains(name)))
    });
    PossibleValuesParser::new(values).try_map(|name| parse::<T>(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each value's first name, which is the one that reports write.
    fn all<T: Named>() -> impl Iterator<Item = (T, &'static str)> {
        T::NAMES.iter().map(|(value, names)| (*value, names[0]))
    }

    #[test]
    fn names_are_those_of_reports() {
        all::<CacheType>().for_each(|(value, name)| assert_eq!(value.name(), name));
        all::<FlashAttention>().for_each(|(value, name)| assert_eq!(value.name(), name));
        all::<RopeChoice>().for_each(|(value, name)| assert_eq!(value.name(), name));
        let formats: Vec<_> = all::<Format>().collect();
        assert_eq!(formats, Format::ALL.map(|format| (format, format.name())));
    }

    #[test]
    fn what_has_no_such_name_is_told_which_there_are() {
        assert_eq!(parse::<CacheType>("IQ4_NL"), Ok(CacheType::Iq4Nl));
        assert_eq!(parse::<FlashAttention>("-1"), Ok(FlashAttention::Auto));
        let error = parse::<FlashAttention>("maybe").unwrap_err();
        assert_eq!(error, "expected on, off or auto");
        // One that is refused elsewhere, with the reason, is not offered.
        let error = parse::<SplitMode>("cols").unwrap_err();
        assert_eq!(error, "expected none, layer or row");
        assert_eq!(parse::<SplitMode>("tensor"), Ok(SplitMode::Tensor));
    }
}
