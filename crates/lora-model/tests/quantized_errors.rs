//! Bases that cannot be quantized to 4 or 8 bits, or have corrupt quantized weights: the error
//! names the tensor.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use candle_core::Device;
use lora_model::Base;
use lora_spec::{BaseDtype, BaseFormat, Quantization, SafetensorsIndex};
use lora_test_kit::golden;

const WEIGHT: &str = "model.layers.1.mlp.up_proj.weight";

/// Returns the error of loading a golden model after `bytes` have replaced the first bytes of
/// `tensor`.
fn refused(model: &str, tensor: &str, bytes: &[u8], quantization: Quantization) -> String {
    let entry =
        SafetensorsIndex::open(&golden(format!("models/{model}")).into()).unwrap().tensors[tensor].clone();
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden(format!("models/{model}")).join("config.json"), dir.path().join("config.json"))
        .unwrap();
    let mut file = std::fs::read(golden(format!("models/{model}")).join("model.safetensors")).unwrap();
    file[entry.bytes.start as usize..][..bytes.len()].copy_from_slice(bytes);
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let format = BaseFormat { dtype: BaseDtype::Auto, quantization };
    Base::load(&dir.path().into(), format, &Device::Cpu).unwrap_err().to_string()
}

#[test]
fn non_finite_dense_weights_are_rejected() {
    for quantization in [Quantization::Nf4 { double_quant: true }, Quantization::Int8] {
        let error = refused("llama-gqa", WEIGHT, &f32::NAN.to_le_bytes(), quantization);
        assert!(error.contains(&format!("tensor {WEIGHT}: element 0 is NaN")), "{error}");
    }
    let error = refused("llama-gqa", WEIGHT, &1e9_f32.to_le_bytes(), Quantization::Int8);
    assert!(error.contains(&format!("tensor {WEIGHT}: a value is too large for f16")), "{error}");
}

#[test]
fn non_finite_scales_are_rejected() {
    let nan = f32::NAN.to_le_bytes();
    for (model, tensor) in [
        ("qwen2-nf4", format!("{WEIGHT}.absmax")),
        ("llama-nf4", format!("{WEIGHT}.nested_absmax")),
        ("llama-int8", "model.layers.1.mlp.up_proj.SCB".into()),
    ] {
        let error = refused(model, &tensor, &nan, Quantization::None);
        assert!(error.contains(&format!("tensor {tensor}: element 0 is NaN")), "{error}");
    }
}

#[test]
fn unexpected_codebooks_are_rejected() {
    let map = format!("{WEIGHT}.quant_map");
    let error = refused("llama-nf4", &map, &0.5_f32.to_le_bytes(), Quantization::None);
    assert!(error.contains(&format!("tensor {map}: is not the codebook of nf4")), "{error}");
}
