//! The parts of a worker's peak memory.

use serde::Serialize;

/// Peak memory of a worker, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// The frozen base.
    pub base: u64,
    /// The trained parameters in f32, on a GPU also in bf16 if the base is bf16, and the frozen
    /// initial term, which has the same size. On a CPU also the best parameters so far, if they are
    /// kept.
    pub adapter: u64,
    /// The optimizer's moments. For paged moments on a GPU, the windows that are on the GPU during
    /// a step.
    pub moments: u64,
    /// Gradients: the sum, and one vector for each level of the canonical tree.
    pub gradients: u64,
    /// Activations that the forward pass keeps, and the buffers of the backward pass at its peak.
    pub activations: u64,
    /// Buffers of matrix products, and the program.
    pub workspace: u64,
    /// The sum of all of these. On a CPU it is the maximum of that sum, the base with the buffers
    /// for reading it or for computing the initial adapter, and the sum with two checkpoint files
    /// instead of the activations.
    pub peak: u64,
}

impl MemoryEstimate {
    /// Returns the bytes that are allocated while a step is computed.
    pub fn step_bytes(&self) -> u64 {
        let Self { base, adapter, moments, gradients, activations, workspace, peak: _ } = self;
        base + adapter + moments + gradients + activations + workspace
    }
}

/// The memory of each worker if the job runs on `workers.min` workers.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PlanMemory {
    /// Memory of a worker on a CPU.
    pub cpu: MemoryEstimate,
    /// Memory on a GPU, without CUDA's own memory.
    pub gpu: MemoryEstimate,
}
