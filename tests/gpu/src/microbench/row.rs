//! One line of the table.

use anyhow::Result;

use super::BenchInputs;

/// An operation over inputs that were made before.
pub(super) type BenchFn = Box<dyn Fn() -> Result<()>>;

type Make = Box<dyn Fn(&BenchInputs) -> Result<BenchFn>>;

/// What of a run is timed.
#[derive(Clone, Copy)]
pub(super) enum TimedPart {
    /// All of it, from an event before to one after.
    Whole,
    /// The kernels whose names begin so.
    Kernels(&'static str),
}

pub(super) struct BenchRow {
    pub(super) name: String,
    /// Read and written at least.
    pub(super) bytes: f64,
    /// A multiplication with its addition counts as two; 0 where the memory bounds an operation.
    pub(super) flops: f64,
    pub(super) timed_part: TimedPart,
    /// Makes the inputs.
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
