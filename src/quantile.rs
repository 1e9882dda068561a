//! Quantiles of a few numbers, as numpy takes them.

/// Of sorted values, by linear interpolation; 0 of none.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = share * last as f64;
    let (low, part) = (place.floor() as usize, place.fract());
    let high = sorted[(low + 1).min(last)];
    sorted[low] + part * (high - sorted[low])
}

/// The middle of values in any order, between the two in the middle of an even number. `None` of no
/// values.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    (!values.is_empty()).then(|| quantile(&values, 0.5))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// numpy.quantile
    #[test]
    fn quantiles_are_numpys() {
        let values = [1.0, 2.0, 5.0, 10.0];
        for (share, value) in [
            (0.0, 1.0),
            (0.25, 1.75),
            (0.5, 3.5),
            (0.99, 9.85),
            (1.0, 10.0),
        ] {
            assert!((quantile(&values, share) - value).abs() < 1e-12, "{share}");
        }
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    /// numpy.median
    #[test]
    fn medians_are_numpys() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0]), Some(2.5));
        assert_eq!(median([]), None);
    }
}
