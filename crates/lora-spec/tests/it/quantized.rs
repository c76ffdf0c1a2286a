//! Quantized checkpoints: formats that are accepted, and errors for invalid metadata.

use std::fs;

use lora_spec::{
    BaseFormat, FourBitType, JobSpec, ModelConfig, ModelSpec, Quantization, QuantizationType,
    SafetensorsIndex, StoredWeight,
};
use lora_test_kit::golden;
use serde_json::{Map, Value, json};

const WEIGHT: &str = "model.layers.1.mlp.up_proj.weight";

/// Returns the header of a golden model's file and the bytes after it.
fn parts(model: &str) -> (Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(golden(format!("models/{model}")).join("model.safetensors")).unwrap();
    let (size, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*size) as usize);
    (serde_json::from_slice(header).unwrap(), data.to_vec())
}

/// Returns the error for a golden model after `change`.
fn refused(model: &str, change: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) -> String {
    let (mut header, mut data) = parts(model);
    change(&mut header, &mut data);
    let dir = tempfile::tempdir().unwrap();
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let config = ModelConfig::read(&golden(format!("models/{model}")).into()).unwrap();
    SafetensorsIndex::open(&dir.path().into()).and_then(|c| c.check(&config)).unwrap_err().message
}

#[test]
fn every_weight_format_is_recognized() {
    let weight = |model: &str| {
        let config = ModelConfig::read(&golden(format!("models/{model}")).into()).unwrap();
        let index = SafetensorsIndex::open(&golden(format!("models/{model}")).into()).unwrap();
        index.check(&config).unwrap();
        index.weight(&config.linear_modules()[8]).unwrap()
    };
    assert_eq!(weight("llama-gqa"), StoredWeight::Dense);
    assert_eq!(weight("llama-int8"), StoredWeight::Int8);
    let StoredWeight::FourBit(plain) = weight("qwen2-nf4") else { panic!("no 4-bit weight") };
    assert_eq!((plain.quant_type, plain.block, plain.nested), (FourBitType::Nf4, 64, None));
    let StoredWeight::FourBit(nested) = weight("llama-nf4") else { panic!("no 4-bit weight") };
    assert_eq!(nested.nested.unwrap().0, 256);
}

#[test]
fn missing_or_invalid_quantization_metadata_is_named() {
    let state = format!("{WEIGHT}.quant_state.bitsandbytes__nf4");
    let without = |name: &str| refused("llama-nf4", |header, _| drop(header.remove(name).unwrap()));
    let expected = format!("tensor {WEIGHT} is U8, but {state} is missing");
    assert_eq!(without(&state), expected);
    for suffix in ["absmax", "quant_map", "nested_absmax", "nested_quant_map"] {
        let name = format!("{WEIGHT}.{suffix}");
        assert_eq!(without(&name), format!("tensor {name} is missing"));
    }
    let scb = "model.layers.1.mlp.up_proj.SCB";
    let error = refused("llama-int8", |header, _| drop(header.remove(scb).unwrap()));
    assert_eq!(error, format!("tensor {scb} is missing"));

    // The length of the state's JSON is fixed, so a replacement must be as long as the original.
    let with = |from: &str, to: &str| {
        refused("llama-nf4", |header, data| {
            let at = header[&state]["data_offsets"][0].as_u64().unwrap() as usize;
            let end = header[&state]["data_offsets"][1].as_u64().unwrap() as usize;
            let json = String::from_utf8(data[at..end].to_vec()).unwrap();
            assert!(json.contains(from) && from.len() == to.len(), "{json}");
            data[at..end].copy_from_slice(json.replace(from, to).as_bytes());
        })
    };
    for (from, to, expected) in [
        ("\"blocksize\": 64", "\"blocksize\": 63", "blocksize 63 is not supported; supported: [32, 64,"),
        ("\"blocksize\": 64", "\"blocksize\": 32", "up_proj.weight.absmax is U8 [72]; it must be U8 [144]"),
        ("[72, 64]", "[64, 72]", "shape is [64, 72]; config.json requires [72, 64]"),
        ("\"nf4\"", "\"nf5\"", "unknown variant `nf5`"),
        ("\"nested_offset\"", "\"nested_offsit\"", "nested_blocksize must be a power of two, and nested"),
        ("\"nested_blocksize\": 256", "\"nested_blocksize\": 255", "nested_blocksize must be a power of two"),
        ("{\"quant", "[\"quant", "bitsandbytes__nf4: "),
    ] {
        let error = with(from, to);
        assert!(
            error.starts_with("tensor model.layers.1.mlp.up_proj.weight") && error.contains(expected),
            "{error}"
        );
    }

    let error = refused("llama-nf4", |header, _| {
        let end = header[WEIGHT]["data_offsets"][1].as_u64().unwrap();
        header[WEIGHT]["data_offsets"][1] = json!(end - 1);
        header[WEIGHT]["shape"] = json!([2303, 1]);
    });
    assert_eq!(error, format!("tensor {WEIGHT} has 2303 bytes; [72, 64] in 4 bits has 2304"));
}

#[test]
fn a_quantized_base_cannot_be_quantized_again() {
    let check = |model: &str, quantization| {
        let config = ModelConfig::read(&golden(format!("models/{model}")).into()).unwrap();
        let format = BaseFormat { quantization, ..BaseFormat::default() };
        SafetensorsIndex::open(&golden(format!("models/{model}")).into())
            .unwrap()
            .check_format(&config, format)
            .map_err(|e| e.to_string())
    };
    let nf4 = Quantization::Nf4 { double_quant: false };
    for (model, quantization) in [
        ("llama-nf4", Quantization::None),
        ("llama-nf4", nf4),
        ("llama-int8", Quantization::None),
        ("llama-int8", Quantization::Int8),
        ("llama-gqa", nf4),
        ("llama-gqa", Quantization::Int8),
    ] {
        assert_eq!(check(model, quantization), Ok(()), "{model} {quantization:?}");
    }
    let error = check("llama-nf4", Quantization::Int8).unwrap_err();
    assert_eq!(
        error,
        "model.quantization: the base already stores model.layers.0.self_attn.q_proj.weight in nf4; \
         remove this key"
    );
    assert!(check("llama-int8", nf4).unwrap_err().contains("q_proj.weight in int8; remove"));
}

#[test]
fn double_quantization_requires_nf4() {
    let job = |quantization| JobSpec {
        name: "job".into(),
        model: ModelSpec {
            base: "/base".into(),
            quantization,
            bnb_4bit_use_double_quant: true,
            ..ModelSpec::default()
        },
        data: lora_spec::DataSpec { train: "/train".into(), ..lora_spec::DataSpec::default() },
        ..JobSpec::default()
    };
    assert_eq!(job(QuantizationType::Nf4).check(), Ok(()));
    assert_eq!(
        job(QuantizationType::Nf4).model.format().quantization,
        Quantization::Nf4 { double_quant: true }
    );
    for quantization in [QuantizationType::None, QuantizationType::Int8] {
        assert_eq!(job(quantization).check().unwrap_err().field, "model.bnb_4bit_use_double_quant");
    }
}
