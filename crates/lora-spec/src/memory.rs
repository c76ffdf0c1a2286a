//! The memory of a worker, computed from shapes. Every term is a buffer of the engine.
//! `benches/cpu/memory.sh` compares the sum with measured memory.

use serde::Serialize;

use crate::{
    ActivationCheckpointing, AdapterSpec, BaseDtype, BaseFormat, DeviceKind, InitLoraWeights, LinearModule,
    ModelConfig, Optim, Quantization, SafetensorsIndex, StoredWeight,
};

/// Number of f32 logits that the loss computes at a time on the CPU (48 MiB), at least one row.
pub const CPU_LOGITS_PER_CHUNK: usize = 12 << 20;

/// Number of f32 logits that the loss computes at a time on a GPU (256 MiB), at least one row.
pub const GPU_LOGITS_PER_CHUNK: usize = 64 << 20;

/// Number of elements that a product on the CPU widens or dequantizes to f32 at a time (4 MiB), for
/// weights that are not f32.
pub const CPU_PANEL_ELEMENTS: usize = 1 << 20;

/// Bytes of a quantized weight that a product dequantizes at a time on a GPU (256 MiB), or
/// [`GPU_PANEL_ROW_ALIGNMENT`] rows if those take more. Every weight of a 7B or 8B model is then
/// one panel in bf16: one product a weight, and an input gradient that is rounded to bf16 once. The
/// panel of Llama-3.1-8B takes 117 MB; the saved inputs of a row of 2048 tokens take 537 MB.
pub const GPU_PANEL_BYTES: usize = 256 << 20;

/// On a GPU, panels start at multiples of this many rows, so that the operands of a panel's product
/// start at multiples of 16 bytes. cuBLAS has its fast kernels for such addresses only.
pub const GPU_PANEL_ROW_ALIGNMENT: usize = 256;

/// Bytes of cuBLAS's workspace, as NVIDIA recommends for Hopper. The size is the same on every GPU,
/// so that cuBLAS chooses the same algorithms.
pub const GPU_WORKSPACE_BYTES: usize = 32 << 20;

/// Elements of an 8-bit moment that share a maximum.
pub const EIGHT_BIT_BLOCK_SIZE: usize = 256;

/// Smallest number of elements of a tensor whose moments are in 8 bits. The moments of smaller
/// tensors are f32.
pub const EIGHT_BIT_MIN_ELEMENTS: usize = 4096;

/// Number of weights that are decomposed at a time to initialize an adapter.
pub const MAX_CONCURRENT_DECOMPOSITIONS: usize = 4;

/// Measured bytes for each element of a weight that is widened to f32.
const WIDENED_BYTES_PER_ELEMENT: u64 = 5;
/// Measured bytes for each element of a weight whose singular values are computed.
const SVD_BYTES_PER_ELEMENT: u64 = 23;
/// Measured bytes for each element of a weight that further rounds of LoftQ add.
const LOFTQ_ROUND_BYTES_PER_ELEMENT: u64 = 4;

/// Elements of each paged moment that are on a GPU at a time, in two halves (32 MiB for both
/// moments in f32, 8 MiB in 8 bits).
pub const PAGED_WINDOW_ELEMENTS: usize = 1 << 22;

/// Measured bytes of the program, its threads, the packed tiles of the matrix product, and the
/// memory that the allocator keeps.
const CPU_PROCESS_BYTES: u64 = 36 << 20;

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
    fn matrices(&self) -> impl Iterator<Item = u64> {
        let r = self.adapter.r;
        self.modules.iter().flat_map(move |m| [m.in_features, m.out_features].map(|side| (r * side) as u64))
    }

    fn moment_bytes(&self, device: DeviceKind) -> u64 {
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

/// The base model in a worker's memory.
#[derive(Debug, Clone, Copy)]
pub struct ModelFootprint<'a> {
    /// The configuration with the shapes.
    pub model: &'a ModelConfig,
    /// The stored tensors; `None`: all are stored as f32.
    pub index: Option<&'a SafetensorsIndex>,
    /// The format of the weights in memory.
    pub format: BaseFormat,
    /// The kind of the worker's device.
    pub device: DeviceKind,
}

impl ModelFootprint<'_> {
    /// Returns the bytes of the base in memory.
    pub fn base_bytes(&self) -> u64 {
        let modules = self.model.linear_modules();
        let weights: u64 = modules.iter().map(|module| self.weight_bytes(module)).sum();
        let others = self.non_linear_tensors(&modules).map(|(name, shape)| {
            let elements = shape.iter().product::<usize>() as u64;
            elements * if shape.len() > 1 { self.element_bytes(&name) } else { 4 }
        });
        weights + others.sum::<u64>()
    }

    /// Returns the bytes that reading takes in addition to the base: the largest tensor as it is
    /// stored and, if it is quantized while it is read, also as f32.
    fn load_bytes(&self) -> u64 {
        let modules = self.model.linear_modules();
        let weights = modules.iter().map(|module| {
            let elements = (module.in_features * module.out_features) as u64;
            let quantized = self.format.quantization != Quantization::None;
            elements
                * (self.stored_element_bytes(&format!("{}.weight", module.name))
                    + if quantized { 4 } else { 0 })
        });
        let others = self
            .non_linear_tensors(&modules)
            .map(|(name, shape)| shape.iter().product::<usize>() as u64 * self.stored_element_bytes(&name));
        weights.chain(others).max().unwrap_or(0)
    }

    /// Returns the bytes that computing the initial adapter from the base's weights takes: those of
    /// the largest [`MAX_CONCURRENT_DECOMPOSITIONS`] weights.
    fn init_bytes(&self, training: &TrainingWorkload) -> u64 {
        let AdapterSpec { init_lora_weights: init, loftq_iter: rounds, .. } = training.adapter;
        let decomposing = match init {
            InitLoraWeights::Default => return 0,
            InitLoraWeights::Olora | InitLoraWeights::PissaNiter(_) => 0,
            InitLoraWeights::Loftq if *rounds > 1 => SVD_BYTES_PER_ELEMENT + LOFTQ_ROUND_BYTES_PER_ELEMENT,
            InitLoraWeights::Pissa | InitLoraWeights::Loftq => SVD_BYTES_PER_ELEMENT,
        };
        let mut sizes: Vec<u64> = training
            .modules
            .iter()
            .map(|module| {
                let elements = (module.in_features * module.out_features) as u64;
                let is_f32 = self.weight_bytes(module) == 4 * elements;
                elements * (decomposing + if is_f32 { 0 } else { WIDENED_BYTES_PER_ELEMENT })
            })
            .collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes.iter().take(MAX_CONCURRENT_DECOMPOSITIONS).sum()
    }

    /// Returns the bytes of the largest panel that a product on a GPU dequantizes to elements of
    /// `width` bytes; 0 if no weight is quantized.
    fn largest_panel_bytes(&self, width: usize) -> u64 {
        let is_quantized = |module: &LinearModule| {
            let stored = self.index.and_then(|index| index.weight(module).ok());
            self.format.quantization != Quantization::None
                || stored.is_some_and(|stored| stored != StoredWeight::Dense)
        };
        let modules = self.model.linear_modules().into_iter().filter(is_quantized);
        let panel_bytes = |module: LinearModule| {
            let (rows, cols) = (module.out_features, module.in_features);
            (gpu_panel_rows(rows, cols, width) * cols * width) as u64
        };
        modules.map(panel_bytes).max().unwrap_or(0)
    }

    /// Returns name and shape of the tensors that are not weights of linear modules.
    fn non_linear_tensors(&self, modules: &[LinearModule]) -> impl Iterator<Item = (String, Vec<usize>)> {
        let weights: std::collections::HashSet<String> =
            modules.iter().map(|module| format!("{}.weight", module.name)).collect();
        self.model.tensors().into_iter().filter(move |(name, _)| !weights.contains(name))
    }

    fn weight_bytes(&self, module: &LinearModule) -> u64 {
        let (rows, cols) = (module.out_features as u64, module.in_features as u64);
        let elements = rows * cols;
        let stored = self.index.and_then(|index| index.weight(module).ok());
        match (stored, self.format.quantization) {
            (Some(StoredWeight::FourBit(state)), _) => {
                four_bit_bytes(elements, state.block as u64, state.nested.map(|(block, _)| block as u64))
            }
            (Some(StoredWeight::Int8), _) | (_, Quantization::Int8) => elements + 4 * rows,
            (_, Quantization::Nf4 { double_quant }) => {
                four_bit_bytes(elements, 64, double_quant.then_some(256))
            }
            (_, Quantization::None) => elements * self.element_bytes(&format!("{}.weight", module.name)),
        }
    }

    /// Returns the bytes of an element of the dense matrix `name` in memory.
    fn element_bytes(&self, name: &str) -> u64 {
        match self.format.dtype {
            BaseDtype::F32 => 4,
            BaseDtype::Bf16 => 2,
            BaseDtype::Auto if self.stored_dtype(name) == "BF16" => 2,
            BaseDtype::Auto => 4,
        }
    }

    fn stored_dtype(&self, name: &str) -> &str {
        self.index.and_then(|c| c.tensors.get(name)).map_or("F32", |entry| entry.dtype.as_str())
    }

    fn stored_element_bytes(&self, name: &str) -> u64 {
        match self.stored_dtype(name) {
            "F32" => 4,
            "U8" | "I8" => 1,
            _ => 2,
        }
    }

    /// Returns the memory of a worker that trains.
    pub fn memory(&self, training: &TrainingWorkload) -> MemoryEstimate {
        let parameters: u64 = training.matrices().sum();
        let base = self.base_bytes();
        let half = self.device == DeviceKind::Gpu && self.element_bytes("model.embed_tokens.weight") == 2;
        let copies = if training.adapter.init_lora_weights.subtracts_initial() { 2 } else { 1 };
        let best = if training.keeps_best { 4 * parameters } else { 0 };
        // If a GPU trains, the best parameters are in the host's memory.
        let adapter = if self.device == DeviceKind::Gpu { 0 } else { best }
            + copies * parameters * if half { 6 } else { 4 };
        let levels = u64::from(training.shape.count.max(1).ilog2()) + 1;
        let gradients = 4 * parameters * (1 + levels);
        let width = if half { 2 } else { 4 };
        let activations = self.activation_bytes(training, width);
        let workspace = match self.device {
            DeviceKind::Gpu => GPU_WORKSPACE_BYTES as u64 + self.largest_panel_bytes(width as usize),
            DeviceKind::Cpu => CPU_PROCESS_BYTES + 4 * CPU_PANEL_ELEMENTS as u64,
        };
        let moments = training.moment_bytes(self.device);
        let state = base + adapter + moments + gradients + workspace;
        let peak = match self.device {
            // The buffers for reading and for checkpoint files are in the host's memory.
            DeviceKind::Gpu => state + activations,
            DeviceKind::Cpu => {
                let starting = self.init_bytes(training) + (4 + 4 * copies) * parameters;
                let reading = base + self.load_bytes().max(starting) + workspace;
                // A file is written while the previous one is still uploaded.
                let saving = state + 2 * (4 * copies * parameters + moments + best);
                (state + activations).max(reading).max(saving)
            }
        };
        MemoryEstimate { base, adapter, moments, gradients, activations, workspace, peak }
    }

    /// Returns the peak of the activations in bytes. An activation has `width` bytes.
    fn activation_bytes(&self, training: &TrainingWorkload, width: u64) -> u64 {
        let model = self.model;
        let TrainingWorkload { modules, adapter, shape, checkpointing, .. } = *training;
        let tokens = (shape.rows * shape.positions) as u64;
        let (hidden, mlp) = (model.hidden_size as u64, model.intermediate_size as u64);
        let (heads, head_dim) = (model.num_attention_heads as u64, model.head_dim as u64);
        let (q, kv) = (heads * head_dim, model.num_key_value_heads as u64 * head_dim);
        let (vocab, layers) = (model.vocab_size as u64, model.num_hidden_layers as u64);
        let lowest = modules.iter().map(|module| module.layer).min().unwrap_or(0) as u64;
        let adapted = modules.iter().filter(|module| module.layer as u64 == lowest).count() as u64;
        let of = |features: u64| width * tokens * features;

        let attended = of(q) + 4 * tokens * heads;
        // The residual between attention and MLP, queries, keys and values, gate and up, the
        // adapters' inner activations, attention's output, and two norms.
        let saved = of(hidden + q + 2 * kv + 2 * mlp + adapted * adapter.r as u64) + attended + 8 * tokens;
        let kept = of(hidden)
            + match checkpointing {
                ActivationCheckpointing::None => saved,
                ActivationCheckpointing::BlockSaveAttention => attended,
                ActivationCheckpointing::Block => 0,
            };
        let all_kept = (layers - lowest) * kept;
        let budget =
            if self.device == DeviceKind::Gpu { GPU_LOGITS_PER_CHUNK } else { CPU_LOGITS_PER_CHUNK } as u64;
        let chunk = chunk_rows(tokens as usize, model.vocab_size, budget as usize) as u64;
        // A GPU also has the gradient of the logits, in the activations' type.
        let logits = chunk * vocab * if self.device == DeviceKind::Gpu && width == 2 { 6 } else { 4 };
        let loss = of(3 * hidden) + logits + 4 * chunk * hidden;
        // The maximum of the gradients of the MLP's inner activations, those around attention, and
        // those within attention.
        let transient = of((3 * mlp).max(2 * mlp + 2 * hidden).max(3 * hidden + 2 * q + 2 * kv))
            .max(of(hidden + q) + self.attention_backward_bytes(tokens, width));
        let recomputed = if checkpointing == ActivationCheckpointing::None { 0 } else { saved };
        let backward = of(hidden) + recomputed + transient;
        all_kept + loss.max(backward)
    }

    /// Returns the bytes that attention's backward pass takes in addition to its operands: the
    /// gradients of queries, keys and values. A GPU also needs four f32 for each query and head. If
    /// tensor cores compute heads that share keys, it also needs the partial gradients of keys and
    /// values in f32 for each query head.
    fn attention_backward_bytes(&self, tokens: u64, width: u64) -> u64 {
        let model = self.model;
        let (heads, kv_heads) = (model.num_attention_heads as u64, model.num_key_value_heads as u64);
        let head = tokens * model.head_dim as u64;
        let gradients = width * head * (heads + 2 * kv_heads);
        if self.device == DeviceKind::Cpu {
            return gradients;
        }
        let is_partial = width == 2 && model.head_dim.is_multiple_of(8) && heads != kv_heads;
        let partial = if is_partial { 2 * 4 * head * heads } else { 0 };
        gradients + 16 * tokens * heads + partial
    }
}

/// Returns the number of rows of a chunk of logits `[rows, vocab]`. A chunk has at most `budget`
/// logits, or one row if a row has more. All chunks are about equally long.
pub fn chunk_rows(rows: usize, vocab: usize, budget: usize) -> usize {
    let most = (budget / vocab.max(1)).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

/// Returns the number of rows of the panels in which a product on a GPU dequantizes a weight
/// `[rows, cols]` to elements of `width` bytes; the last panel may have fewer. These are all rows
/// if they fit [`GPU_PANEL_BYTES`], otherwise a multiple of [`GPU_PANEL_ROW_ALIGNMENT`] such that
/// the panels are about equally high.
pub fn gpu_panel_rows(rows: usize, cols: usize, width: usize) -> usize {
    let fitting = GPU_PANEL_BYTES / (cols * width).max(1);
    if rows <= fitting {
        return rows.max(1);
    }
    let most = (fitting / GPU_PANEL_ROW_ALIGNMENT).max(1) * GPU_PANEL_ROW_ALIGNMENT;
    rows.div_ceil(rows.div_ceil(most)).next_multiple_of(GPU_PANEL_ROW_ALIGNMENT).min(rows)
}

/// Returns the bytes of a 4-bit weight: codes, the sixteen values, and the scales. With `nested`,
/// the scales are quantized in blocks of this size.
fn four_bit_bytes(elements: u64, block: u64, nested: Option<u64>) -> u64 {
    let blocks = elements.div_ceil(block);
    let scales = match nested {
        None => 4 * blocks,
        Some(nested) => blocks + 4 * blocks.div_ceil(nested) + 4 * 256,
    };
    elements.div_ceil(2) + 4 * 16 + scales
}
