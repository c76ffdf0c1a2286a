//! One row of the table.

use anyhow::Result;

use super::BenchInputs;

/// An operation with its inputs.
pub(super) type BenchFn = Box<dyn Fn() -> Result<()>>;

type Make = Box<dyn Fn(&BenchInputs) -> Result<BenchFn>>;

/// The part of a run that is timed.
#[derive(Clone, Copy)]
pub(super) enum TimedPart {
    /// The whole run, between two events.
    Whole,
    /// The kernels whose names start with this prefix.
    Kernels(&'static str),
}

pub(super) struct BenchRow {
    pub(super) name: String,
    /// Least number of bytes that the operation reads and writes.
    pub(super) bytes: f64,
    /// Floating-point operations. A multiplication and its addition count as two. 0 for an
    /// operation that memory bounds.
    pub(super) flops: f64,
    pub(super) timed_part: TimedPart,
    /// Creates the inputs and returns the operation.
    pub(super) make: Make,
}

impl BenchRow {
    pub(super) fn new(
        name: impl Into<String>,
        bytes: usize,
        make: impl Fn(&BenchInputs) -> Result<BenchFn> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            bytes: bytes as f64,
            flops: 0.0,
            timed_part: TimedPart::Whole,
            make: Box::new(make),
        }
    }

    pub(super) fn with_flops(self, flops: f64) -> Self {
        Self { flops, ..self }
    }

    pub(super) fn of_kernels(self, prefix: &'static str) -> Self {
        Self { timed_part: TimedPart::Kernels(prefix), ..self }
    }
}
