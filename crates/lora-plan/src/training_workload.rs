//! The settings of training that determine a worker's memory.

use lora_spec::{
    ActivationCheckpointing, AdapterSpec, DeviceKind, EIGHT_BIT_BLOCK_SIZE, EIGHT_BIT_MIN_ELEMENTS,
    LinearModule, Optim, PAGED_WINDOW_ELEMENTS,
};

/// The largest micro-batch of a worker, and the number of micro-batches.
#[derive(Debug, Clone, Copy)]
pub struct MicroBatchShape {
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Positions of a row, including padding.
    pub positions: usize,
    /// Micro-batches of a step that this worker computes.
    pub count: usize,
}

/// The settings of training that determine its memory.
#[derive(Debug, Clone, Copy)]
pub struct TrainingWorkload<'a> {
    /// Modules with an adapter.
    pub modules: &'a [LinearModule],
    /// The adapter.
    pub adapter: &'a AdapterSpec,
    /// The largest micro-batch.
    pub shape: MicroBatchShape,
    /// The activations that are recomputed.
    pub checkpointing: ActivationCheckpointing,
    /// The optimizer.
    pub optim: Optim,
    /// Whether the best parameters so far are kept, in addition to the newest.
    pub keeps_best: bool,
}

impl TrainingWorkload<'_> {
    /// Returns the number of elements of each trained matrix.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = u64> {
        let r = self.adapter.r;
        self.modules.iter().flat_map(move |m| [m.in_features, m.out_features].map(|side| (r * side) as u64))
    }

    /// Returns the bytes of the optimizer's moments in the memory of a device.
    pub(crate) fn moment_bytes(&self, device: DeviceKind) -> u64 {
        const BLOCK: u64 = EIGHT_BIT_BLOCK_SIZE as u64;
        // Elements of one moment in f32, its elements in 8 bits, and the blocks of the latter.
        let (mut full, mut codes, mut blocks) = (0, 0, 0);
        for elements in self.matrices() {
            if self.optim.is_8bit() && elements >= EIGHT_BIT_MIN_ELEMENTS as u64 {
                codes += elements;
                blocks += elements.div_ceil(BLOCK);
            } else {
                full += elements;
            }
        }
        if device == DeviceKind::Cpu || !self.optim.is_paged() {
            return 2 * (4 * full + codes + 4 * blocks);
        }
        // Both halves of the window are on the GPU, or the whole moment if it fits one half.
        let half = PAGED_WINDOW_ELEMENTS as u64 / 2;
        let resident = |n: u64| if n <= half { n } else { 2 * half };
        if blocks > half / BLOCK {
            (blocks, codes) = (2 * (half / BLOCK), 2 * half);
        }
        // Each block has an entry of three numbers with its location.
        2 * (4 * resident(full) + codes + 4 * blocks) + 12 * blocks
    }
}
