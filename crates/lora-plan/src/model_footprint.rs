//! The memory of a worker, computed from shapes. Every term is a buffer of the engine.
//! `benches/cpu/memory.sh` compares the sum with measured memory.

use lora_spec::{
    ActivationCheckpointing, AdapterSpec, AttentionConfig, BaseDtype, BaseFormat, BlockConfig,
    CPU_LOGITS_PER_CHUNK, CPU_PANEL_ELEMENTS, DeviceKind, GPU_LOGITS_PER_CHUNK, GPU_WORKSPACE_BYTES,
    InitLoraWeights, LinearModule, MAX_CONCURRENT_DECOMPOSITIONS, MAX_MMA_HEAD_DIM, ModelConfig, NormKind,
    Quantization, SafetensorsIndex, StoredWeight, chunk_rows, gpu_panel_rows,
};

use crate::{MemoryEstimate, TrainingWorkload};

/// Measured bytes for each element of a weight that is widened to f32.
const WIDENED_BYTES_PER_ELEMENT: u64 = 5;
/// Measured bytes for each element of a weight whose singular values are computed.
const SVD_BYTES_PER_ELEMENT: u64 = 23;
/// Measured bytes for each element of a weight that further rounds of LoftQ add.
const LOFTQ_ROUND_BYTES_PER_ELEMENT: u64 = 4;

/// Measured bytes of the program, its threads, the packed tiles of the matrix product, and the
/// memory that the allocator keeps.
const CPU_PROCESS_BYTES: u64 = 36 << 20;

/// The base model in a worker's memory.
#[derive(Debug, Clone, Copy)]
pub struct ModelFootprint<'a> {
    /// The configuration with the shapes.
    pub model: &'a ModelConfig,
    /// The stored tensors; `None`: all are stored as f32.
    pub index: Option<&'a SafetensorsIndex>,
    /// The format of the weights in memory. For a GPU, `auto` must be resolved
    /// ([`SafetensorsIndex::gpu_dtype`]), because there all dense matrices have one type.
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
        let blocks: Vec<BlockConfig> = self.model.blocks().collect();
        let final_norm = self.model.final_norm();
        let embedding = self.model.per_layer_embedding();
        let embedding_norm = embedding.as_ref().map(|embedding| &embedding.norm);
        let norms = blocks.iter().flat_map(BlockConfig::norms).chain([&final_norm]).chain(embedding_norm);
        let factors = norms
            .filter(|norm| norm.has_own_factors())
            .map(|norm| 4 * (norm.features * if norm.has_bias { 2 } else { 1 }) as u64);
        weights + others.sum::<u64>() + factors.sum::<u64>()
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
                let initializing = self.init_bytes(training) + (4 + 4 * copies) * parameters;
                let loading = base + self.load_bytes().max(initializing) + workspace;
                // A file is written while the previous one is still uploaded.
                let saving = state + 2 * (4 * copies * parameters + moments + best);
                (state + activations).max(loading).max(saving)
            }
        };
        MemoryEstimate { base, adapter, moments, gradients, activations, workspace, peak }
    }

    /// Returns the peak of the activations in bytes. An activation has `width` bytes.
    fn activation_bytes(&self, training: &TrainingWorkload, width: u64) -> u64 {
        let model = self.model;
        let TrainingWorkload { modules, shape, .. } = *training;
        let tokens = (shape.rows * shape.positions) as u64;
        let (hidden, vocab) = (model.hidden_size as u64, model.vocab_size as u64);
        let of = |features: u64| width * tokens * features;
        let lowest = modules.iter().map(|module| module.layer).min().unwrap_or(0);
        // Embeddings of the blocks exist during the whole pass. While they are computed, there are
        // three matrices of them, with an adapter four. If they are trained, their gradients are
        // kept too, and the input of their norm.
        let embedding = model.per_layer_embedding().map(|embedding| embedding.projection);
        let embedded = of(embedding.as_ref().map_or(0, |projection| projection.out_features as u64));
        let is_trained = embedding.is_some_and(|projection| modules.contains(&projection));
        // What is kept up to a block, and the peak of the backward passes, which begin with the
        // last block.
        let (mut kept, mut backward) = (if is_trained { 3 * embedded } else { embedded }, 0);
        let embedding = if is_trained { 4 } else { 3 } * embedded + of(hidden);
        for (layer, block) in model.blocks().enumerate() {
            if block.attn.is_kv_source {
                // Later blocks read keys and values, and add to their gradients.
                kept += of(4 * (block.attn.kv_heads * block.attn.head_dim) as u64);
            }
            if layer < lowest {
                continue;
            }
            let adapted = modules.iter().filter(|module| module.layer == layer).count() as u64;
            let of_block = self.block_activations(&block, adapted, training, width);
            kept += of_block.kept;
            backward = backward.max(kept + of(hidden) + of_block.recomputed + of_block.transient);
        }
        let budget =
            if self.device == DeviceKind::Gpu { GPU_LOGITS_PER_CHUNK } else { CPU_LOGITS_PER_CHUNK } as u64;
        let chunk = chunk_rows(tokens as usize, model.vocab_size, budget as usize) as u64;
        // A GPU also has the gradient of the logits, in the activations' type.
        let logits = chunk * vocab * if self.device == DeviceKind::Gpu && width == 2 { 6 } else { 4 };
        let loss = of(3 * hidden) + logits + 4 * chunk * hidden;
        backward.max(kept + loss).max(embedding)
    }

    /// Returns the activations of a block, of which `adapted` modules have an adapter.
    fn block_activations(
        &self,
        block: &BlockConfig,
        adapted: u64,
        training: &TrainingWorkload,
        width: u64,
    ) -> BlockActivations {
        let TrainingWorkload { adapter, shape, checkpointing, .. } = *training;
        let tokens = (shape.rows * shape.positions) as u64;
        let BlockConfig { attn, mlp, .. } = block;
        let (hidden, mlp_width) = (attn.o_proj.out_features as u64, mlp.down_proj.in_features as u64);
        let (heads, kv_heads) = (attn.heads as u64, attn.kv_heads as u64);
        let (q, kv) = (heads * attn.head_dim as u64, kv_heads * attn.head_dim as u64);
        let of = |features: u64| width * tokens * features;

        let attended = of(q) + 4 * tokens * heads;
        // Queries, keys and values before their norms are saved; after the norms they are
        // recomputed.
        let head_norms = [(&attn.q_norm, q), (&attn.k_norm, kv), (&attn.v_norm, kv)];
        let head_norms =
            head_norms.into_iter().filter_map(|(norm, features)| Some((norm.as_ref()?, features)));
        let (mut normed, mut roots) = (0, 0);
        for (norm, features) in head_norms {
            normed += of(features);
            roots += 4 * tokens * features / norm.features as u64;
        }
        // A norm after attention or the MLP needs the output before the norm.
        let layer_input = block.layer_input.as_ref();
        let out_norms = [&block.attn_out_norm, &block.mlp_out_norm].into_iter().flatten().count() as u64
            + u64::from(layer_input.is_some());
        let in_norms = [&block.attn_norm, &block.mlp_norm].into_iter().flatten().count() as u64;
        // LayerNorm also saves the mean.
        let is_layer_norm = block.norms().any(|norm| norm.kind == NormKind::Layer);
        let of_norm = if is_layer_norm { 8 } else { 4 };
        // The residual between attention and MLP, queries, keys and values, gate and up, the
        // adapters' inner activations, attention's output, and the square roots of the norms.
        let keys_values = match (attn.kv_source, attn.values_are_keys) {
            (Some(_), _) => 0,
            (None, true) => kv,
            (None, false) => 2 * kv,
        };
        // The residual stream and the gate before the block's embedding.
        let of_input = layer_input.map_or(0, |input| hidden + input.gate.out_features as u64);
        let inner = adapted * adapter.r as u64;
        let mlp_inputs = if mlp.is_gated { 2 * mlp_width } else { mlp_width };
        let saved = of(hidden + q + keys_values + mlp_inputs + of_input + inner)
            + attended
            + roots
            + of(out_norms * hidden)
            + of_norm * tokens * (in_norms + out_norms);
        let kept = of(hidden)
            + match checkpointing {
                ActivationCheckpointing::None => saved,
                ActivationCheckpointing::BlockSaveAttention => attended,
                ActivationCheckpointing::Block => 0,
            };
        // The gradient of an output before its norm and its multiplier, that of the block's output
        // before its factor, and that of the MLP's input beside attention.
        let is_plain = out_norms == 0 && block.residual_multiplier == 1.0;
        let outputs =
            u64::from(!is_plain) + u64::from(block.output_scale.is_some()) + u64::from(block.is_parallel);
        // The gradients of the outputs of one module are joined.
        let is_joined = attn.qkv_proj.len() == 1 && attn.kv_source.is_none();
        let joined_qkv = if is_joined { 2 * hidden + 2 * q + 4 * kv } else { 0 };
        let joined_mlp = if mlp.is_gated && mlp.gate_up_proj.len() == 1 { 4 * mlp_width } else { 0 };
        // The maximum of the gradients of the MLP's inner activations, those around attention, and
        // those within attention.
        let around = (mlp_inputs + mlp_width).max(mlp_inputs + 2 * hidden).max(3 * hidden + 2 * q + 2 * kv);
        let transient = of(outputs * hidden)
            + of(around.max(joined_qkv).max(joined_mlp))
                .max(of(hidden + q) + normed + self.attention_backward_bytes(attn, tokens, width));
        let recomputed = if checkpointing == ActivationCheckpointing::None { 0 } else { saved };
        BlockActivations { kept, recomputed, transient }
    }

    /// Returns the bytes that attention's backward pass takes in addition to its operands: the
    /// gradients of queries, keys and values. A GPU also needs four f32 for each query and head. If
    /// tensor cores compute heads that share keys, it also needs the partial gradients of keys and
    /// values in f32 for each query head.
    fn attention_backward_bytes(&self, attn: &AttentionConfig, tokens: u64, width: u64) -> u64 {
        let (heads, kv_heads) = (attn.heads as u64, attn.kv_heads as u64);
        let head = tokens * attn.head_dim as u64;
        let gradients = width * head * (heads + 2 * kv_heads);
        if self.device == DeviceKind::Cpu {
            return gradients;
        }
        let has_tensor_cores = width == 2
            && attn.head_dim.is_multiple_of(8)
            && attn.head_dim <= MAX_MMA_HEAD_DIM
            && attn.softcap.is_none();
        let partial = if has_tensor_cores && heads != kv_heads { 2 * 4 * head * heads } else { 0 };
        gradients + 16 * tokens * heads + partial
    }
}

/// The activations of a block in bytes.
struct BlockActivations {
    /// What is kept between the passes.
    kept: u64,
    /// What the backward pass recomputes before it starts.
    recomputed: u64,
    /// The largest gradients that exist at a time during the backward pass.
    transient: u64,
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
