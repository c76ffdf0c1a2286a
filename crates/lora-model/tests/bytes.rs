//! What `plan` says that a base takes is what it takes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use candle_core::Device;
use lora_model::Base;
use lora_spec::{BaseDtype, BaseFormat, Checkpoint, Held, ModelConfig, Quantization};

#[test]
fn the_planned_bytes_of_a_base_are_those_it_takes() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
    let dense = ["llama-gqa", "llama3-rope", "llama-linear-rope", "qwen2", "llama-bf16"];
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
            let config = ModelConfig::read(&dir).unwrap();
            let checkpoint = Checkpoint::open(&dir).unwrap();
            let held = Held { model: &config, checkpoint: Some(&checkpoint), format, gpu: false };
            let base = Base::load(&dir, format, &Device::Cpu).unwrap();
            assert_eq!(held.base_bytes(), base.bytes() as u64, "{model} {format:?}");
        }
    }
}
