//! Checks that a setting is within its range. An error names all bounds of the range.

use std::fmt::Display;
use std::ops::{Bound, RangeBounds};

use crate::FieldError;

/// Checks a whole number.
///
/// # Errors
/// `value` is outside of `range`.
pub(crate) fn check_count(field: &str, value: u64, range: impl RangeBounds<u64>) -> Result<(), FieldError> {
    if range.contains(&value) {
        return Ok(());
    }
    let bounds = [low_text(range.start_bound(), "at least"), high_text(range.end_bound())];
    Err(FieldError::new(field, format!("is {value}; it must be {}", joined(bounds))))
}

/// Checks a floating-point number.
///
/// # Errors
/// `value` is outside of `range`, infinite or not a number.
pub(crate) fn check_number(field: &str, value: f64, range: impl RangeBounds<f64>) -> Result<(), FieldError> {
    if value.is_finite() && range.contains(&value) {
        return Ok(());
    }
    let bounds = [low_text(range.start_bound(), "of at least"), high_text(range.end_bound())];
    Err(FieldError::new(field, format!("is {value}; it must be a finite number {}", joined(bounds))))
}

/// The range of numbers above `low`, up to and including `high`.
pub(crate) fn above(low: f64, high: Bound<f64>) -> (Bound<f64>, Bound<f64>) {
    (Bound::Excluded(low), high)
}

fn low_text(bound: Bound<&impl Display>, at_least: &str) -> Option<String> {
    match bound {
        Bound::Included(low) => Some(format!("{at_least} {low}")),
        Bound::Excluded(low) => Some(format!("above {low}")),
        Bound::Unbounded => None,
    }
}

fn high_text(bound: Bound<&impl Display>) -> Option<String> {
    match bound {
        Bound::Included(high) => Some(format!("at most {high}")),
        Bound::Excluded(high) => Some(format!("below {high}")),
        Bound::Unbounded => None,
    }
}

fn joined(bounds: [Option<String>; 2]) -> String {
    bounds.into_iter().flatten().collect::<Vec<_>>().join(" and ")
}
