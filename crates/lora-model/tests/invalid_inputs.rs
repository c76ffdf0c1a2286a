//! Bases and adapters that can be read and must not be trained or used.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use lora_model::{Base, PeftAdapter};
use lora_spec::BaseLayout;
use lora_test_kit::golden;
use tempfile::TempDir;

fn copy(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

/// Sets element 3 of a tensor in a safetensors file.
fn set(file: &Path, name: &str, value: f32) {
    let mut tensors = safetensors::load(file, &Device::Cpu).unwrap();
    let tensor = &tensors[name];
    let mut values = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values[3] = value;
    let changed = Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap();
    tensors.insert(name.to_owned(), changed.to_dtype(tensor.dtype()).unwrap());
    safetensors::save(&tensors, file).unwrap();
}

#[test]
fn a_base_with_a_value_that_is_not_finite_is_refused() {
    for (model, name) in [
        ("llama-gqa", "model.norm.weight"),
        ("llama-gqa", "model.layers.1.mlp.up_proj.weight"),
        ("llama-bf16", "model.embed_tokens.weight"),
    ] {
        for (value, text) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
            let dir = copy(&golden(format!("models/{model}")));
            set(&dir.path().join("model.safetensors"), name, value);
            let error = Base::load(&dir.path().into(), BaseLayout::default(), &Device::Cpu).unwrap_err();
            let expected = format!("model.safetensors: tensor {name}: element 3 is {text}; download");
            assert!(error.to_string().contains(&expected), "{error}");
        }
    }
}

#[test]
fn an_adapter_with_a_value_that_is_not_finite_is_refused() {
    let dir = copy(&golden("cases/llama-gqa/adapter"));
    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    set(&dir.path().join("adapter_model.safetensors"), name, f32::INFINITY);
    let error = PeftAdapter::read(&dir.path().into()).unwrap_err().to_string();
    assert!(
        error.contains(&format!("adapter_model.safetensors: tensor {name} has the value inf")),
        "{error}"
    );
}

#[test]
fn an_adapter_that_changes_its_base_is_refused() {
    for (init, is_accepted) in [
        ("true", true),
        ("false", true),
        ("\"gaussian\"", true),
        ("\"pissa\"", false),
        ("\"pissa_niter_4\"", false),
        ("\"olora\"", false),
        ("\"loftq\"", false),
    ] {
        let dir = copy(&golden("cases/llama-gqa/adapter"));
        let path = dir.path().join("adapter_config.json");
        let config = fs::read_to_string(&path).unwrap();
        let changed =
            config.replace("\"init_lora_weights\": true", &format!("\"init_lora_weights\": {init}"));
        fs::write(&path, changed).unwrap();
        match PeftAdapter::read(&dir.path().into()) {
            Ok(_) => assert!(is_accepted, "{init}"),
            Err(error) => {
                let error = error.to_string();
                let expected =
                    format!("adapter_config.json: init_lora_weights: {init} means that PEFT changes");
                assert!(!is_accepted && error.contains(&expected), "{error}");
            }
        }
    }
}
