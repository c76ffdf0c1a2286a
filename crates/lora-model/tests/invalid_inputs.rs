//! Bases and adapters that can be read and must not be trained or used.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use lora_model::{Adapter, Base, MergeTarget, PeftAdapter};
use lora_spec::{BaseDtype, BaseLayout, ModelConfig};
use lora_test_kit::golden;
use serde_json::json;
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

/// Reads the golden adapter after `change` of its `adapter_config.json`, for the golden base.
fn with_config(change: impl FnOnce(&mut serde_json::Value)) -> Result<Adapter, String> {
    let dir = copy(&golden("cases/llama-gqa/adapter"));
    let path = dir.path().join("adapter_config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
    let base = ModelConfig::read(&golden("models/llama-gqa").into()).unwrap();
    let adapter = PeftAdapter::read(&dir.path().into()).and_then(|adapter| adapter.to_adapter(&base));
    adapter.map_err(|error| error.to_string())
}

#[test]
fn a_setting_that_is_more_than_plain_lora_is_refused() {
    for (key, value, message) in [
        ("use_dora", json!(true), "is not supported"),
        ("modules_to_save", json!(["lm_head"]), "is not supported"),
        ("alora_invocation_tokens", json!([7, 8]), "is not supported"),
        ("megatron_config", json!({"a": 1}), "is not supported"),
        ("arrow_config", json!({"top_k": 1}), "is not supported"),
        ("use_bdlora", json!({"nblocks": 2}), "is not supported"),
        ("peft_type", json!("LOHA"), "is not supported; supported: \"LORA\""),
        ("a_setting_of_2030", json!(16), "if it has no effect, remove it"),
        ("r", json!(-1), "is -1; it must be a whole number from 1 on"),
        ("r", json!("4"), "is \"4\"; it must be a whole number"),
        ("r", json!(0), "is 0; it must be at least 1"),
        ("lora_alpha", json!(null), "is missing"),
        ("target_modules", json!(["q_proj"]), "leaves out model.layers.0."),
        ("target_modules", json!(".*\\.q_proj"), "leaves out model.layers.0."),
        ("target_modules", json!([]), "leaves out model.layers.0."),
        ("target_modules", json!(null), "is missing"),
        ("exclude_modules", json!(["k_proj"]), "leaves out model.layers.0.self_attn.k_proj"),
        ("exclude_modules", json!(".*k_proj"), "leaves out model.layers.0.self_attn.k_proj"),
        ("layers_to_transform", json!([1]), "leaves out model.layers.0."),
        ("layers_to_transform", json!(1), "leaves out model.layers.0."),
    ] {
        let error = with_config(|config| config[key] = value.clone()).err().unwrap();
        let found = error.contains(&format!("adapter_config.json: {key}: ")) && error.contains(message);
        assert!(found, "{key}: {value}: {error}");
    }
    for (key, value) in [
        ("target_modules", json!("all-linear")),
        ("exclude_modules", json!(["lm_head"])),
        ("layers_to_transform", json!([0, 1])),
        ("layers_to_transform", json!([])),
        // Not a regular expression of this library.
        ("target_modules", json!("(?!x).*")),
        ("a_setting_of_2030", json!(false)),
        ("runtime_config", json!({"ephemeral_gpu_offload": false})),
        ("lora_dropout", json!(0.5)),
    ] {
        assert!(with_config(|config| config[key] = value.clone()).is_ok(), "{key}: {value}");
    }
}

#[test]
fn a_merged_weight_that_is_not_finite_is_refused() {
    let base = golden("models/llama-gqa").into();
    let merged = |alpha: f64, dtype| {
        let adapter = with_config(|config| config["lora_alpha"] = json!(alpha)).unwrap();
        Base::merged(&base, &BaseLayout::default(), MergeTarget::Original, dtype, &adapter)
    };
    for dtype in [BaseDtype::F32, BaseDtype::Bf16] {
        let error = merged(1e308, dtype).unwrap_err().to_string();
        assert!(error.contains("would have the value"), "{error}");
        assert!(merged(1e30, dtype).is_ok());
    }
}
