//! Compares the memory of a plan with sums that were computed by hand.

use lora_plan::{MicroBatchShape, ModelFootprint, TrainingWorkload};
use lora_spec::{
    ActivationCheckpointing, AdapterSpec, BaseDtype, BaseFormat, DeviceKind, InitLoraWeights, ModelConfig,
    Optim, Quantization,
};

/// Llama-3.1-8B: 32 blocks of 218,103,808 elements in 224 modules, embedding and head of
/// 128256 x 4096 each, 65 norms.
const LLAMA: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256}"#;

/// Bytes of embedding and head in bf16, and of the norms in f32.
const OTHERS: u64 = 2 * 2 * 128_256 * 4096 + 4 * 65 * 4096;

fn base_bytes(quantization: Quantization) -> Result<u64, String> {
    let model = ModelConfig::parse(LLAMA)?;
    let format = BaseFormat { dtype: BaseDtype::Bf16, quantization };
    Ok(ModelFootprint { model: &model, index: None, format, device: DeviceKind::Gpu }.base_bytes())
}

#[test]
fn quantized_base_bytes_are_codes_plus_scales() -> Result<(), String> {
    let weights = 32 * 218_103_808;
    // The sixteen values of each module's codes.
    let values = 224 * 64;
    assert_eq!(base_bytes(Quantization::None)?, OTHERS + 2 * weights);
    assert_eq!(
        base_bytes(Quantization::Nf4 { double_quant: false })?,
        OTHERS + weights / 2 + values + 4 * weights / 64
    );
    assert_eq!(
        base_bytes(Quantization::Nf4 { double_quant: true })?,
        OTHERS + weights / 2 + values + weights / 64 + 4 * weights / 64 / 256 + 224 * 1024
    );
    // Rows: q, o and down 4096 each, k and v 1024, gate and up 14336.
    let rows = 32 * (3 * 4096 + 2 * 1024 + 2 * 14_336);
    assert_eq!(base_bytes(Quantization::Int8)?, OTHERS + weights + 4 * rows);
    Ok(())
}

/// QLoRA of rank 16 on all modules (41,943,040 parameters), with micro-batches of one row of 2048
/// tokens and recomputed blocks, on a GPU.
#[test]
fn qlora_of_an_8b_model_fits_in_8_gb() -> Result<(), String> {
    let model = ModelConfig::parse(LLAMA)?;
    let format =
        BaseFormat { dtype: BaseDtype::Bf16, quantization: Quantization::Nf4 { double_quant: true } };
    let modules = model.linear_modules();
    let training = TrainingWorkload {
        modules: &modules,
        adapter: &AdapterSpec { r: 16, ..AdapterSpec::default() },
        shape: MicroBatchShape { rows: 1, positions: 2048, count: 2 },
        checkpointing: ActivationCheckpointing::Block,
        optim: Optim::Adamw,
        keeps_best: false,
    };
    let footprint = ModelFootprint { model: &model, index: None, format, device: DeviceKind::Gpu };
    let memory = footprint.memory(&training);
    let parameters = 41_943_040;
    // Parameters in f32 and bf16; two moments; gradients: the sum, and two levels of the tree over
    // two micro-batches.
    assert_eq!(
        (memory.adapter, memory.moments, memory.gradients),
        (6 * parameters, 8 * parameters, 12 * parameters)
    );
    // The blocks' inputs; then the loss: three times the hidden states, 512 rows of logits in f32
    // with their gradient in bf16, and the hidden states of those rows in f32.
    let inputs = 32 * 2 * 2048 * 4096;
    let loss = 3 * 2 * 2048 * 4096 + 512 * 128_256 * (4 + 2) + 4 * 512 * 4096;
    assert_eq!(memory.activations, inputs + loss);
    // cuBLAS's workspace, and gate, up or down dequantized to bf16.
    assert_eq!(memory.workspace, (32 << 20) + 2 * 14_336 * 4096);
    let sum = memory.base + memory.adapter + memory.moments + memory.gradients;
    assert_eq!(memory.peak, sum + memory.activations + memory.workspace);
    assert!(memory.peak < 8_000_000_000, "{memory:?}");

    // In 8 bits each 256 elements have a scale of 4 bytes.
    let eight_bit = footprint.memory(&TrainingWorkload { optim: Optim::Adamw8bit, ..training });
    assert_eq!(eight_bit.moments, 2 * (parameters + 4 * parameters / 256));
    // 4 Mi elements of each paged moment are on the GPU. In 8 bits each block has an entry of three
    // numbers with its location.
    let window = 4 << 20;
    for (optim, moments) in [
        (Optim::PagedAdamw32bit, 8 * window),
        (Optim::PagedAdamw8bit, 2 * (window + 4 * window / 256) + 12 * window / 256),
    ] {
        let paged = footprint.memory(&TrainingWorkload { optim, ..training });
        assert_eq!(paged.moments, moments, "{optim:?}");
        assert_eq!(memory.peak - paged.peak, memory.moments - moments, "{optim:?}");
    }
    // In addition to the inputs, attention's output and a sum for each head are kept.
    let attention = footprint
        .memory(&TrainingWorkload { checkpointing: ActivationCheckpointing::BlockSaveAttention, ..training });
    assert_eq!(attention.activations - memory.activations, 32 * (2 * 2048 * 4096 + 4 * 2048 * 32));
    Ok(())
}

/// In f32 the largest weights of Qwen2.5-7B have two panels. Each of these panels is larger than
/// any other weight.
#[test]
fn the_workspace_holds_the_largest_panel() -> Result<(), String> {
    let model = ModelConfig::parse(include_str!("../../../benches/models/qwen2.5-7b.json"))?;
    let modules = &model.linear_modules()[..7];
    let workspace = |dtype, quantization, device| {
        let footprint =
            ModelFootprint { model: &model, index: None, format: BaseFormat { dtype, quantization }, device };
        let shape = MicroBatchShape { rows: 1, positions: 16, count: 1 };
        let (checkpointing, optim) = (ActivationCheckpointing::None, Optim::Adamw);
        let adapter = &AdapterSpec::default();
        let training = TrainingWorkload { modules, adapter, shape, checkpointing, optim, keeps_best: false };
        footprint.memory(&training).workspace
    };
    let nf4 = Quantization::Nf4 { double_quant: true };
    let cublas = 32 << 20;
    assert_eq!(workspace(BaseDtype::Bf16, Quantization::None, DeviceKind::Gpu), cublas);
    assert_eq!(workspace(BaseDtype::Bf16, nf4, DeviceKind::Gpu), cublas + 2 * 18_944 * 3584);
    assert_eq!(workspace(BaseDtype::Bf16, Quantization::Int8, DeviceKind::Gpu), cublas + 2 * 18_944 * 3584);
    assert_eq!(workspace(BaseDtype::F32, nf4, DeviceKind::Gpu), cublas + 4 * 9472 * 3584);
    assert_eq!(
        workspace(BaseDtype::F32, nf4, DeviceKind::Cpu),
        workspace(BaseDtype::F32, Quantization::None, DeviceKind::Cpu)
    );
    Ok(())
}

#[test]
fn paging_reduces_gpu_memory_to_the_window() -> Result<(), String> {
    let model = ModelConfig::parse(LLAMA)?;
    let modules = &model.linear_modules()[..1];
    let moments = |device, r, optim| {
        let footprint = ModelFootprint { model: &model, index: None, format: BaseFormat::default(), device };
        let shape = MicroBatchShape { rows: 1, positions: 64, count: 1 };
        let checkpointing = ActivationCheckpointing::None;
        let adapter = &AdapterSpec { r, ..AdapterSpec::default() };
        footprint
            .memory(&TrainingWorkload { modules, adapter, shape, checkpointing, optim, keeps_best: false })
            .moments
    };
    let pairs = [(Optim::Adamw, Optim::PagedAdamw32bit), (Optim::Adamw8bit, Optim::PagedAdamw8bit)];
    for (plain, paged) in pairs {
        for r in [1, 512, 4096] {
            assert_eq!(
                moments(DeviceKind::Cpu, r, paged),
                moments(DeviceKind::Cpu, r, plain),
                "{paged:?} of rank {r}"
            );
        }
        assert!(moments(DeviceKind::Gpu, 4096, paged) < moments(DeviceKind::Gpu, 4096, plain), "{paged:?}");
    }
    // The module has 4096 inputs and outputs, so its two matrices have r * 4096 elements each.
    assert_eq!(moments(DeviceKind::Gpu, 512, Optim::PagedAdamw32bit), 8 * 2 * 512 * 4096);
    assert_eq!(moments(DeviceKind::Gpu, 513, Optim::PagedAdamw32bit), 8 * 2 * 512 * 4096);
    Ok(())
}

/// With heads of 128 features and a narrow MLP, the backward pass of attention takes the most
/// memory.
#[test]
fn tensor_core_partial_gradients_of_shared_keys_are_counted() -> Result<(), String> {
    const TOKENS: u64 = 4 * 256;
    let activations = |kv_heads: u64, dtype, device| -> Result<u64, String> {
        let model = ModelConfig::parse(&format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 1024,
            "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": {kv_heads},
            "head_dim": 128, "vocab_size": 64}}"#
        ))?;
        let modules = model.linear_modules();
        let format = BaseFormat { dtype, quantization: Quantization::None };
        let training = TrainingWorkload {
            modules: &modules,
            adapter: &AdapterSpec { r: 8, ..AdapterSpec::default() },
            shape: MicroBatchShape { rows: 4, positions: 256, count: 1 },
            checkpointing: ActivationCheckpointing::None,
            optim: Optim::Adamw,
            keeps_best: false,
        };
        Ok(ModelFootprint { model: &model, index: None, format, device }.memory(&training).activations)
    };
    // Elements for each token: the block's input and saved activations (the residual between
    // attention and MLP, q, k and v, attention's output, gate and up, the inner activations of
    // seven adapters), and the gradient of the output. In `sums`, bytes: a sum for each head, and
    // two norms.
    let kept = |kv: u64| 1024 + 1024 + 2048 + 2 * kv + 2048 + 2 * 1024 + 7 * 8 + 1024;
    let sums = 4 * 16 + 8;
    // The gradients of the residual, of attention's output, and of q, k and v. In `rows`, bytes:
    // four numbers for each query and head.
    let inner = |kv: u64| 1024 + 2 * 2048 + 2 * kv;
    let rows = 16 * 16;
    // Without partial gradients, the gradients around attention take more, on every device.
    let around = |kv: u64| 3 * 1024 + 2 * 2048 + 2 * kv;
    for kv_heads in [1, 2, 8] {
        let kv = 128 * kv_heads;
        let partial = 2 * 4 * 2048;
        let bytes = 2 * (kept(kv) + inner(kv)) + sums + rows + partial;
        assert_eq!(
            activations(kv_heads, BaseDtype::Bf16, DeviceKind::Gpu)?,
            TOKENS * bytes,
            "{kv_heads} heads"
        );
        let bytes = 4 * (kept(kv) + around(kv)) + sums;
        assert_eq!(
            activations(kv_heads, BaseDtype::F32, DeviceKind::Gpu)?,
            TOKENS * bytes,
            "{kv_heads} heads"
        );
        assert_eq!(
            activations(kv_heads, BaseDtype::F32, DeviceKind::Cpu)?,
            TOKENS * bytes,
            "{kv_heads} heads"
        );
    }
    let bytes = 2 * (kept(2048) + around(2048)) + sums;
    assert_eq!(activations(16, BaseDtype::Bf16, DeviceKind::Gpu)?, TOKENS * bytes);
    Ok(())
}

/// With rank 256 on a small base and a row of 16 tokens, checkpoint files are larger than
/// activations.
#[test]
fn two_checkpoint_files_can_be_the_peak() -> Result<(), String> {
    let model = ModelConfig::parse(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000}"#,
    )?;
    let format = BaseFormat { dtype: BaseDtype::F32, quantization: Quantization::None };
    let modules = model.linear_modules();
    let training = TrainingWorkload {
        modules: &modules,
        adapter: &AdapterSpec { r: 256, ..AdapterSpec::default() },
        shape: MicroBatchShape { rows: 1, positions: 16, count: 1 },
        checkpointing: ActivationCheckpointing::None,
        optim: Optim::Adamw,
        keeps_best: false,
    };
    let of = |training: &TrainingWorkload, device| {
        ModelFootprint { model: &model, index: None, format, device }.memory(training)
    };
    // In each of two blocks q, k, v and o of 64 x 64, and gate, up and down of 64 x 128.
    let parameters = 256 * 2 * (4 * (64 + 64) + 3 * (64 + 128));
    let memory = of(&training, DeviceKind::Cpu);
    assert_eq!(
        (memory.adapter, memory.moments, memory.gradients),
        (4 * parameters, 8 * parameters, 8 * parameters)
    );
    let state = memory.base + memory.workspace + (4 + 8 + 8) * parameters;
    // Parameters and two moments, in the file that is written and in the one that is uploaded.
    assert_eq!(memory.peak, state + 2 * (4 + 8) * parameters);
    assert!(memory.peak > state + memory.activations);

    // The best adapter is kept, and is part of the files.
    let best = of(&TrainingWorkload { keeps_best: true, ..training }, DeviceKind::Cpu);
    assert_eq!(best.adapter, 8 * parameters);
    assert_eq!(best.peak, state + 4 * parameters + 2 * (4 + 8 + 4) * parameters);

    // With 8-bit moments the files are smaller: all matrices have 256 x 64 elements or more.
    let eight_bit = of(&TrainingWorkload { optim: Optim::Adamw8bit, ..training }, DeviceKind::Cpu);
    let moments = 2 * (parameters + 4 * parameters / 256);
    assert_eq!(eight_bit.moments, moments);
    assert_eq!(eight_bit.peak, state - 8 * parameters + moments + 2 * (4 * parameters + moments));

    // With longer rows, the activations are the peak. On a GPU they always are.
    let long = MicroBatchShape { rows: 4, positions: 2048, count: 1 };
    let long = of(&TrainingWorkload { shape: long, ..training }, DeviceKind::Cpu);
    assert_eq!(long.peak, state + long.activations);
    let gpu = of(&TrainingWorkload { keeps_best: true, ..training }, DeviceKind::Gpu);
    assert_eq!((gpu.adapter, gpu.peak), (4 * parameters, gpu.step_bytes()));
    Ok(())
}

/// Two blocks of seven weights; the largest weights have 2048 x 4096 elements. With rank 1 the
/// adapter is small.
#[test]
fn initialization_from_the_base_can_be_the_peak() -> Result<(), String> {
    let model = ModelConfig::parse(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 4096,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 512,
        "tie_word_embeddings": true}"#,
    )?;
    let modules = model.linear_modules();
    let of = |init_lora_weights, loftq_iter, quantization| {
        let format = BaseFormat { dtype: BaseDtype::F32, quantization };
        let adapter = AdapterSpec { r: 1, init_lora_weights, loftq_iter, ..AdapterSpec::default() };
        ModelFootprint { model: &model, index: None, format, device: DeviceKind::Cpu }.memory(
            &TrainingWorkload {
                modules: &modules,
                adapter: &adapter,
                shape: MicroBatchShape { rows: 1, positions: 16, count: 1 },
                checkpointing: ActivationCheckpointing::None,
                optim: Optim::Adamw,
                keeps_best: false,
            },
        )
    };
    let nf4 = Quantization::Nf4 { double_quant: false };
    let parameters = 2 * (4 * (2048 + 2048) + 3 * (2048 + 4096));
    // Four weights of 2048 x 4096 are decomposed at a time.
    let largest = 4 * 2048 * 4096;
    let plain = of(InitLoraWeights::Default, 1, Quantization::None);
    let pissa = of(InitLoraWeights::Pissa, 1, Quantization::None);
    assert_eq!(pissa.adapter, 2 * plain.adapter, "the initial term is as large as the adapter");
    assert_eq!(pissa.peak, pissa.base + pissa.workspace + 23 * largest + 12 * parameters);
    let olora = of(InitLoraWeights::Olora, 1, Quantization::None);
    assert_eq!(olora.step_bytes(), pissa.step_bytes());
    assert!(olora.peak < pissa.peak / 2);
    for (rounds, bytes) in [(1, 23), (2, 27), (5, 27)] {
        let loftq = of(InitLoraWeights::Loftq, rounds, nf4);
        assert_eq!(loftq.peak, loftq.base + loftq.workspace + (bytes + 5) * largest + 8 * parameters);
        assert_eq!(loftq.adapter, plain.adapter);
    }
    Ok(())
}

/// Activations of one block over 64 tokens, with heads of 4 x 32 (2 x 32 of keys and values) in f32
/// on a CPU, on an architecture with these fields.
fn block_activations(architecture: &str, mlp: u64, fields: &str) -> Result<u64, String> {
    let model = ModelConfig::parse(&format!(
        r#"{{"architectures": ["{architecture}"], "hidden_size": 128, "intermediate_size": {mlp},
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "vocab_size": 16 {fields}}}"#
    ))?;
    let modules = model.linear_modules();
    let training = TrainingWorkload {
        modules: &modules,
        adapter: &AdapterSpec { r: 8, ..AdapterSpec::default() },
        shape: MicroBatchShape { rows: 1, positions: 64, count: 1 },
        checkpointing: ActivationCheckpointing::None,
        optim: Optim::Adamw,
        keeps_best: false,
    };
    let format = BaseFormat { dtype: BaseDtype::F32, quantization: Quantization::None };
    let footprint = ModelFootprint { model: &model, index: None, format, device: DeviceKind::Cpu };
    Ok(footprint.memory(&training).activations)
}

#[test]
fn the_gradients_of_a_wide_mlp_are_counted() -> Result<(), String> {
    // Two widths of which the MLP's three gradients dominate: for each feature more, gate and up
    // are saved, and three gradients are alive at a time.
    let of = |mlp| block_activations("LlamaForCausalLM", mlp, "");
    assert_eq!(of(1024)? - of(1000)?, 4 * 64 * 24 * (2 + 3));
    Ok(())
}

#[test]
fn the_norms_of_an_architecture_are_counted() -> Result<(), String> {
    let llama = block_activations("LlamaForCausalLM", 1024, "")?;
    // A square root for each head of the queries and keys.
    let qwen3 = block_activations("Qwen3ForCausalLM", 1024, "")?;
    assert_eq!(qwen3 - llama, 4 * 64 * (4 + 2));
    // Norms over all heads, and after attention and the MLP: the outputs before these norms, and
    // the gradient of one of them.
    let olmo2 = block_activations("Olmo2ForCausalLM", 1024, "")?;
    assert_eq!(olmo2 - llama, 64 * (4 * 2 * 128 + 2 * 4) + 4 * 64 * 128);
    // Three modules fewer with inner activations of rank 8, but four gradients of a wide MLP
    // instead of three while those of gate and up are joined.
    let phi3 = block_activations("Phi3ForCausalLM", 1024, "")?;
    assert_eq!(phi3 + 4 * 64 * 3 * 8, llama + 4 * 64 * 1024);
    // Only gate and up are one module.
    let dense = r#", "num_local_experts": 0, "layer_types": ["attention"],
        "shared_intermediate_size": 1024"#;
    let granite4 = block_activations("GraniteMoeHybridForCausalLM", 1024, dense)?;
    assert_eq!(granite4 + 4 * 64 * 8, llama + 4 * 64 * 1024);
    // As Gemma 3 below, and a norm of the values, and the gradient of the output before its factor.
    let gemma4 = block_activations(
        "Gemma4ForCausalLM",
        1024,
        r#", "hidden_size_per_layer_input": 0, "global_head_dim": 32"#,
    )?;
    assert_eq!(gemma4 - llama, 4 * 64 * (4 + 2 + 2) + 64 * (4 * 2 * 128 + 2 * 4) + 2 * 4 * 64 * 128);
    // The residual stream, the gate and the output before the norm that adds the block's own
    // embedding of 8 features; adapters of three modules more; and the embedding, the input of its
    // norm, and its gradient.
    let gemma4_input = block_activations(
        "Gemma4ForCausalLM",
        1024,
        r#", "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 16, "global_head_dim": 32"#,
    )?;
    assert_eq!(gemma4_input - gemma4, 4 * 64 * (128 + 8 + 128 + 3 * 8 + 3 * 8) + 4 * 64);
    // Two norms save means too, and there is one module fewer and no gate: of a wide MLP one inner
    // activation and two gradients.
    let starcoder2 = block_activations("Starcoder2ForCausalLM", 1024, "")?;
    assert_eq!(starcoder2 + 4 * 64 * (8 + 1024 + 1024), llama + 2 * 4 * 64);
    // One norm, which saves means too, and the gradient of its output from the MLP.
    let cohere2 = block_activations("Cohere2ForCausalLM", 1024, "")?;
    assert_eq!(cohere2, llama + 4 * 64 * 128);
    // Values that are the keys are saved once.
    let values_are_keys = block_activations(
        "Gemma4ForCausalLM",
        1024,
        r#", "hidden_size_per_layer_input": 0, "global_head_dim": 32, "attention_k_eq_v": true"#,
    )?;
    assert_eq!(values_are_keys, gemma4 - 4 * 64 * (2 * 32 + 8));
    // The second block keeps its keys, its values and their gradients for the third one, which has
    // none, neither their norms nor the inner activations of two modules.
    let three_blocks = |shared: usize| {
        let fields = format!(
            r#", "hidden_size_per_layer_input": 0, "global_head_dim": 32, "num_hidden_layers": 3,
            "layer_types": ["full_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": {shared}"#
        );
        block_activations("Gemma4ForCausalLM", 1024, &fields)
    };
    assert_eq!(three_blocks(1)? + 4 * 64 * (2 * 64 + 2 * 8 + 2 * 2), three_blocks(0)? + 4 * 64 * 4 * 64);
    // Norms of heads, and four norms around attention and the MLP.
    let gemma3 = block_activations("Gemma3ForCausalLM", 1024, "")?;
    assert_eq!(gemma3 - llama, 4 * 64 * (4 + 2) + 64 * (4 * 2 * 128 + 2 * 4) + 4 * 64 * 128);
    Ok(())
}
