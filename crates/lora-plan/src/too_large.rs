//! The error for a job that does not fit a worker's memory.

use std::error::Error;
use std::fmt;

use lora_spec::{DeviceKind, DeviceMemory, format_bytes};

use crate::alternative::Alternative;

/// A worker of a job needs more memory than a worker has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TooLarge {
    /// The bytes that a worker needs.
    pub(crate) peak: u64,
    /// The part of `peak` that the base takes.
    pub(crate) base: u64,
    /// The memory that the worker has.
    pub(crate) memory: DeviceMemory,
    /// Settings with which the job would fit.
    pub(crate) fitting: Vec<Alternative>,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = match self.memory.kind {
            DeviceKind::Gpu => "of a GPU's memory",
            DeviceKind::Cpu => "of memory",
        };
        let (peak, available) = (format_bytes(self.peak), format_bytes(self.memory.bytes));
        write!(f, "a worker needs {peak} {of}, more than {available}; ")?;
        if self.fitting.is_empty() {
            return write!(
                f,
                "no activation_checkpointing, micro_batch_size or quantization would make it fit, the base \
                 alone takes {}",
                format_bytes(self.base)
            );
        }
        let fitting: Vec<String> = self.fitting.iter().map(ToString::to_string).collect();
        write!(f, "it would fit with {}", fitting.join(", or with "))
    }
}

impl Error for TooLarge {}
