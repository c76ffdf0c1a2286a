//! The memory that `plan` reports for bases and moments is the memory that they take.

use candle_core::Device;
use lora_model::{AdapterLayout, Base};
use lora_ops::adamw_8bit;
use lora_plan::{MicroBatchShape, ModelFootprint, TrainingWorkload};
use lora_spec::{
    ActivationCheckpointing, AdapterSpec, BaseDtype, BaseFormat, DeviceKind, ModelConfig, Optim,
    Quantization, SafetensorsIndex,
};

#[test]
fn planned_base_bytes_match_the_loaded_base() {
    let models = lora_test_kit::golden("models");
    let dense = [
        "llama-gqa",
        "llama3-rope",
        "llama-linear-rope",
        "qwen2",
        "llama-bf16",
        "qwen3",
        "olmo3",
        "granite",
        "gemma3",
        "phi3",
        "granite4",
        "gemma4",
        "gemma4-shared",
        "starcoder2",
        "cohere2",
    ];
    let quantizations = [
        Quantization::None,
        Quantization::Nf4 { double_quant: false },
        Quantization::Nf4 { double_quant: true },
        Quantization::Int8,
    ];
    let all = dense.into_iter().flat_map(|model| quantizations.map(|it| (model, it)));
    let stored = ["llama-nf4", "qwen2-nf4", "llama-int8"].map(|model| (model, Quantization::None));
    for (model, quantization) in all.chain(stored) {
        for dtype in [BaseDtype::Auto, BaseDtype::F32, BaseDtype::Bf16] {
            let (dir, format) = (models.join(model), BaseFormat { dtype, quantization });
            let config = ModelConfig::read(&dir.as_path().into()).unwrap();
            let index = SafetensorsIndex::open(&dir.as_path().into()).unwrap();
            let footprint =
                ModelFootprint { model: &config, index: Some(&index), format, device: DeviceKind::Cpu };
            let base = Base::load(&dir.as_path().into(), format, &Device::Cpu).unwrap();
            assert_eq!(footprint.base_bytes(), base.bytes() as u64, "{model} {format:?}");
        }
    }
}

#[test]
fn planned_moment_bytes_match_the_optimizer_state() {
    let dir = lora_test_kit::golden("models/llama-gqa");
    let model = ModelConfig::read(&dir.as_path().into()).unwrap();
    let modules = model.linear_modules();
    // With rank 128 some matrices have moments in 8 bits; with 130 some of these end in an
    // incomplete block.
    for r in [4, 128, 130] {
        let layout = AdapterLayout::new(&model, &modules, r);
        let ranges: Vec<_> = layout.tensors().map(|(_, _, range)| range).collect();
        for (optim, bytes) in
            [(Optim::Adamw, 8 * layout.len), (Optim::Adamw8bit, adamw_8bit::bytes(&ranges).unwrap())]
        {
            let footprint = ModelFootprint {
                model: &model,
                index: None,
                format: BaseFormat::default(),
                device: DeviceKind::Cpu,
            };
            let planned = footprint.memory(&TrainingWorkload {
                modules: &modules,
                adapter: &AdapterSpec { r, ..AdapterSpec::default() },
                keeps_best: false,
                shape: MicroBatchShape { rows: 1, positions: 16, count: 1 },
                checkpointing: ActivationCheckpointing::None,
                optim,
            });
            assert_eq!(planned.moments, bytes as u64, "{optim:?} of rank {r}");
        }
    }
}
