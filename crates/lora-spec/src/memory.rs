//! What a worker needs in memory, from shapes alone. Every term is a buffer that the engine has; `benches/cpu/memory.sh` holds
//! the sum against what is measured.

use serde::Serialize;

use crate::{
    ActivationCheckpointing, AdapterSpec, BaseDtype, BaseFormat, InitLoraWeights, LinearModule, ModelConfig,
    Optim, Quantization, SafetensorsIndex, StoredWeight,
};

/// f32 logits that the loss makes at a time on the CPU (48 MiB), at least a row.
pub const CPU_LOGITS_PER_CHUNK: usize = 12 << 20;

/// The same on a GPU (256 MiB).
pub const GPU_LOGITS_PER_CHUNK: usize = 64 << 20;

/// Elements of a weight that is not f32 that a product turns into f32 at a time on the CPU (4 MiB).
pub const CPU_PANEL_ELEMENTS: usize = 1 << 20;

/// Bytes of a quantized weight that a product dequantizes at a time on a GPU (256 MiB), or
/// [`GPU_PANEL_ROW_ALIGNMENT`] rows where those take more. Every weight of a 7B or 8B model is then one
/// panel in bf16: one product a weight, and an input gradient that is rounded to bf16 once. The
/// panel of Llama-3.1-8B takes 117 MB; the saved inputs of a row of 2048 tokens take 537 MB.
pub const GPU_PANEL_BYTES: usize = 256 << 20;

/// On a GPU, panels start at multiples of this many rows, so that the operands of a panel's product
/// start at multiples of 16 bytes. cuBLAS has its fast kernels for such addresses only.
pub const GPU_PANEL_ROW_ALIGNMENT: usize = 256;

/// Bytes of cuBLAS's workspace: what NVIDIA recommends for Hopper; equal everywhere, so that the choice of algorithms is.
pub const GPU_WORKSPACE_BYTES: usize = 32 << 20;

/// Elements of a moment in 8 bits that share a maximum.
pub const EIGHT_BIT_BLOCK_SIZE: usize = 256;

/// Elements that a tensor must have for moments in 8 bits; those of a smaller one are f32.
pub const EIGHT_BIT_MIN_ELEMENTS: usize = 4096;

/// Weights that adapters which start from them are computed from at a time.
pub const MAX_CONCURRENT_DECOMPOSITIONS: usize = 4;

/// Bytes an element, as measured: of a weight that is widened to f32, while its singular values are computed, and what another
/// round of LoftQ adds.
const WIDENED_BYTES_PER_ELEMENT: u64 = 5;
const SVD_BYTES_PER_ELEMENT: u64 = 23;
const LOFTQ_ROUND_BYTES_PER_ELEMENT: u64 = 4;

/// Elements of each paged moment that are on a GPU at a time, in two halves (32 MiB for both moments in f32, 8
/// in 8 bits).
pub const PAGED_WINDOW_ELEMENTS: usize = 1 << 22;

/// The program itself, its threads, the matrix product's packed tiles and what the allocator keeps, as measured.
const CPU_PROCESS_BYTES: u64 = 36 << 20;

/// Peak memory of a worker, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// The frozen base.
    pub base: u64,
    /// The trained parameters, f32 (on a GPU also in bf16; on a CPU also the best so far, where they are kept), and what is taken off
    /// the base, which is as large.
    pub adapter: u64,
    /// The optimizer's moments; of paged ones, on a GPU, what is there while a step is made.
    pub moments: u64,
    /// Gradients: the sum, and one vector for each level of the tree that is being added up.
    pub gradients: u64,
    /// What the forward pass keeps, and what the backward pass has beside it at its peak.
    pub activations: u64,
    /// Buffers of products, and the program.
    pub workspace: u64,
    /// All of these; or, on a CPU where it is more, the base and what is beside it while it is read or the adapter computed from it,
    /// or two checkpoint files in the place of the activations.
    pub peak: u64,
}

impl MemoryEstimate {
    /// What is held while a step is computed.
    pub fn step_bytes(&self) -> u64 {
        let Self { base, adapter, moments, gradients, activations, workspace, peak: _ } = self;
        base + adapter + moments + gradients + activations + workspace
    }
}

/// What a worker computes at a time.
#[derive(Debug, Clone, Copy)]
pub struct MicroBatchShape {
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Positions of a row, with padding.
    pub positions: usize,
    /// Micro-batches of a step that this worker computes.
    pub count: usize,
}

/// What a worker trains, and how.
#[derive(Debug, Clone, Copy)]
pub struct TrainingWorkload<'a> {
    /// Modules with an adapter.
    pub modules: &'a [LinearModule],
    /// The adapter.
    pub adapter: &'a AdapterSpec,
    /// What is computed at a time.
    pub shape: MicroBatchShape,
    /// What is computed again.
    pub checkpointing: ActivationCheckpointing,
    /// The optimizer.
    pub optim: Optim,
    /// The best parameters so far are kept beside the newest.
    pub keeps_best: bool,
}

impl TrainingWorkload<'_> {
    /// Elements of each trained matrix.
    fn matrices(&self) -> impl Iterator<Item = u64> {
        let r = self.adapter.r;
        self.modules.iter().flat_map(move |m| [m.in_features, m.out_features].map(|side| (r * side) as u64))
    }

    fn moment_bytes(&self, gpu: bool) -> u64 {
        const BLOCK: u64 = EIGHT_BIT_BLOCK_SIZE as u64;
        // Elements of one moment.
        let (mut full, mut codes, mut blocks) = (0, 0, 0);
        for elements in self.matrices() {
            if self.optim.is_8bit() && elements >= EIGHT_BIT_MIN_ELEMENTS as u64 {
                codes += elements;
                blocks += elements.div_ceil(BLOCK);
            } else {
                full += elements;
            }
        }
        if !gpu || !self.optim.is_paged() {
            return 2 * (4 * full + codes + 4 * blocks);
        }
        // Two halves of the window, or all where it is no more than one of them.
        let half = PAGED_WINDOW_ELEMENTS as u64 / 2;
        let there = |n: u64, half: u64| if n <= half { n } else { 2 * half };
        if blocks > half / BLOCK {
            (blocks, codes) = (2 * (half / BLOCK), 2 * half);
        }
        // With each block comes where it lies: three numbers.
        2 * (4 * there(full, half) + codes + 4 * blocks) + 12 * blocks
    }
}

/// The model as a worker holds it.
#[derive(Debug, Clone, Copy)]
pub struct ModelFootprint<'a> {
    /// Shapes.
    pub model: &'a ModelConfig,
    /// How the weights are stored; `None`: as f32.
    pub index: Option<&'a SafetensorsIndex>,
    /// How they are held.
    pub format: BaseFormat,
    /// On a GPU rather than a CPU.
    pub gpu: bool,
}

impl ModelFootprint<'_> {
    /// Bytes of the base.
    pub fn base_bytes(&self) -> u64 {
        let modules = self.model.linear_modules();
        let weights: u64 = modules.iter().map(|module| self.weight_bytes(module)).sum();
        let others = self.non_linear_tensors(&modules).map(|(name, shape)| {
            let elements = shape.iter().product::<usize>() as u64;
            elements * if shape.len() > 1 { self.element_bytes(&name) } else { 4 }
        });
        weights + others.sum::<u64>()
    }

    /// Bytes of the largest tensor as it is stored and, where it is quantized, as f32: what reading takes beside the base.
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

    /// What computing an adapter from the base's weights takes, for as many of the largest as are decomposed at a time.
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

    /// Bytes of the largest panel that a product on a GPU dequantizes, in elements of `width` bytes;
    /// 0 if no weight is quantized.
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

    /// The tensors that are no linear weights.
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

    /// Bytes of an element of a dense matrix.
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

    /// Peak of a worker that trains.
    pub fn memory(&self, training: &TrainingWorkload) -> MemoryEstimate {
        let parameters: u64 = training.matrices().sum();
        let base = self.base_bytes();
        let half = self.gpu && self.element_bytes("model.embed_tokens.weight") == 2;
        let copies = if training.adapter.init_lora_weights.subtracts_initial() { 2 } else { 1 };
        let best = if training.keeps_best { 4 * parameters } else { 0 };
        // What is kept beside a GPU's is on its host.
        let adapter = if self.gpu { 0 } else { best } + copies * parameters * if half { 6 } else { 4 };
        let levels = u64::from(training.shape.count.max(1).ilog2()) + 1;
        let gradients = 4 * parameters * (1 + levels);
        let width = if half { 2 } else { 4 };
        let activations = self.activation_bytes(training, width);
        let workspace = match self.gpu {
            true => GPU_WORKSPACE_BYTES as u64 + self.largest_panel_bytes(width as usize),
            false => CPU_PROCESS_BYTES + 4 * CPU_PANEL_ELEMENTS as u64,
        };
        let moments = training.moment_bytes(self.gpu);
        let state = base + adapter + moments + gradients + workspace;
        let peak = match self.gpu {
            // What is read and written for it is on its host.
            true => state + activations,
            false => {
                let starting = self.init_bytes(training) + (4 + 4 * copies) * parameters;
                let reading = base + self.load_bytes().max(starting) + workspace;
                // One file is made while the one before is still uploaded.
                let saving = state + 2 * (4 * copies * parameters + moments + best);
                (state + activations).max(reading).max(saving)
            }
        };
        MemoryEstimate { base, adapter, moments, gradients, activations, workspace, peak }
    }

    /// `width`: bytes of an activation.
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
        // Middle, queries, keys and values, attention's output, gate and up, the adapters' inner products, two norms.
        let saved = of(hidden + q + 2 * kv + 2 * mlp + adapted * adapter.r as u64) + attended + 8 * tokens;
        let kept = of(hidden)
            + match checkpointing {
                ActivationCheckpointing::None => saved,
                ActivationCheckpointing::BlockSaveAttention => attended,
                ActivationCheckpointing::Block => 0,
            };
        let all_kept = (layers - lowest) * kept;
        let budget = if self.gpu { GPU_LOGITS_PER_CHUNK } else { CPU_LOGITS_PER_CHUNK } as u64;
        let chunk = chunk_rows(tokens as usize, model.vocab_size, budget as usize) as u64;
        // A GPU has the logits' gradient beside them, in the activations' type.
        let logits = chunk * vocab * if self.gpu && width == 2 { 6 } else { 4 };
        let loss = of(3 * hidden) + logits + 4 * chunk * hidden;
        // The gradients of the MLP's inner activations; or those around attention; or those within
        // it.
        let transient = of((3 * mlp).max(2 * mlp + 2 * hidden).max(3 * hidden + 2 * q + 2 * kv))
            .max(of(hidden + q) + self.attention_backward_bytes(tokens, width));
        let recomputed = if checkpointing == ActivationCheckpointing::None { 0 } else { saved };
        let backward = of(hidden) + recomputed + transient;
        all_kept + loss.max(backward)
    }

    /// Bytes that attention's backward pass takes beside its operands: the gradients of queries,
    /// keys and values; on a GPU also four f32 for each query and head and, where tensor cores
    /// compute heads that share keys, the partial gradients of keys and values, f32 for each query
    /// head.
    fn attention_backward_bytes(&self, tokens: u64, width: u64) -> u64 {
        let model = self.model;
        let (heads, kv_heads) = (model.num_attention_heads as u64, model.num_key_value_heads as u64);
        let head = tokens * model.head_dim as u64;
        let gradients = width * head * (heads + 2 * kv_heads);
        if !self.gpu {
            return gradients;
        }
        let is_partial = width == 2 && model.head_dim.is_multiple_of(8) && heads != kv_heads;
        let partial = if is_partial { 2 * 4 * head * heads } else { 0 };
        gradients + 16 * tokens * heads + partial
    }
}

/// Rows of a chunk such that no chunk has more than `budget` logits (but a row) and all are about equally long.
pub fn chunk_rows(rows: usize, vocab: usize, budget: usize) -> usize {
    let most = (budget / vocab.max(1)).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

/// Rows of the panels in which a product on a GPU dequantizes a weight `[rows, cols]` to elements of
/// `width` bytes; the last panel may have fewer. All rows if they fit [`GPU_PANEL_BYTES`], otherwise a
/// multiple of [`GPU_PANEL_ROW_ALIGNMENT`] such that the panels are about equally high.
pub fn gpu_panel_rows(rows: usize, cols: usize, width: usize) -> usize {
    let fitting = GPU_PANEL_BYTES / (cols * width).max(1);
    if rows <= fitting {
        return rows.max(1);
    }
    let most = (fitting / GPU_PANEL_ROW_ALIGNMENT).max(1) * GPU_PANEL_ROW_ALIGNMENT;
    rows.div_ceil(rows.div_ceil(most)).next_multiple_of(GPU_PANEL_ROW_ALIGNMENT).min(rows)
}

/// Codes, the sixteen values, and the scales, which are quantized themselves where `nested` says in which blocks.
fn four_bit_bytes(elements: u64, block: u64, nested: Option<u64>) -> u64 {
    let blocks = elements.div_ceil(block);
    let scales = match nested {
        None => 4 * blocks,
        Some(nested) => blocks + 4 * blocks.div_ceil(nested) + 4 * 256,
    };
    elements.div_ceil(2) + 4 * 16 + scales
}
