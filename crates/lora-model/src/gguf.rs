//! Adapters as GGUF files, as llama.cpp loads them (`--lora`).
//!
//! Format: GGUF (ggml-org/ggml, `docs/gguf.md`); keys and tensors of an adapter as llama.cpp's
//! `src/llama-adapter.cpp` reads them. The names and the order of rows are those of the base in
//! GGUF, so they depend on the architecture.

use std::io::Cursor;
use std::ops::Range;

use candle_core::quantized::gguf_file::{Value, write};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use lora_ops::transfer::to_vec;
use lora_spec::{Architecture, FieldError, LinearModule, ModelConfig};

use crate::adapter::AdaptedModule;
use crate::{Adapter, ModelError};

/// What llama.cpp calls an architecture, and how its conversion changes the base.
struct GgufArchitecture {
    /// `general.architecture` of the base.
    name: &'static str,
    /// Whether the rows of query and key projections are interleaved: the rotary embedding of
    /// llama.cpp then rotates neighbouring features instead of the two halves of a head.
    interleaved: bool,
}

impl GgufArchitecture {
    fn of(model: &ModelConfig) -> Self {
        let (name, interleaved) = match model.architecture {
            // llama.cpp converts the text tower of Mistral 3 as this one.
            Architecture::Mistral if model.is_multimodal() => ("mistral3", true),
            Architecture::Llama | Architecture::Mistral => ("llama", true),
            Architecture::Ministral3 => ("mistral3", true),
            Architecture::SmolLm3 => ("smollm3", true),
            Architecture::Granite | Architecture::GraniteHybrid => ("granite", true),
            Architecture::Qwen2 => ("qwen2", false),
            Architecture::Qwen3 => ("qwen3", false),
            Architecture::Olmo2 | Architecture::Olmo3 => ("olmo2", false),
            Architecture::Gemma2 => ("gemma2", false),
            Architecture::Gemma3 => ("gemma3", false),
            Architecture::Gemma4 => ("gemma4", false),
            Architecture::Phi3 => ("phi3", false),
            Architecture::Starcoder2 => ("starcoder2", false),
            Architecture::Cohere2 => ("cohere2", false),
        };
        Self { name, interleaved }
    }
}

/// Returns the file of `adapter`, an adapter of a base with the configuration `model`, in f32. The
/// scale is written as `adapter.lora.alpha`, which llama.cpp divides by the rank.
///
/// # Errors
/// The adapter's scale is not positive (llama.cpp reads 0 as 1); it is on a module that llama.cpp
/// does not adapt; or it has an initial term, which only an adapter in training has.
pub fn gguf_adapter(adapter: &Adapter, model: &ModelConfig) -> Result<Vec<u8>, ModelError> {
    let GgufArchitecture { name, interleaved } = GgufArchitecture::of(model);
    let r = adapter.layout().modules.first().map_or(0, |adapted| adapted.r);
    let alpha = (adapter.scaling() * r as f64) as f32;
    if !(alpha > 0.0 && alpha.is_finite()) {
        return Err(FieldError::new("lora_alpha", format!("is {alpha}; it must be above 0")).into());
    }
    if adapter.initial().is_some() {
        return Err(FieldError::new("adapter", "has an initial term; export it first".into()).into());
    }
    let params: Vec<f32> = to_vec(adapter.params())?;
    let matrix = |rows: usize, cols: usize, values: Vec<f32>| {
        let tensor = Tensor::from_vec(values, (rows, cols), &Device::Cpu)?;
        QTensor::quantize(&tensor, GgmlDType::F32)
    };
    let mut tensors = Vec::new();
    for AdaptedModule { module, r, a, b, .. } in &adapter.layout().modules {
        let (projections, heads) = gguf_projections(module, model)?;
        let mut rows = params[b.clone()].to_vec();
        if let Some(heads) = heads.filter(|_| interleaved) {
            rows = interleave(&rows, *r, heads);
        }
        // The parts of a module that llama.cpp has as several ones share its `A`.
        let part = module.out_features / projections.len();
        for (projection, rows) in projections.iter().zip(rows.chunks(part * r)) {
            let name = |matrix| format!("blk.{}.{projection}.weight.lora_{matrix}", module.layer);
            tensors.push((name("a"), matrix(*r, module.in_features, params[a.clone()].to_vec())?));
            tensors.push((name("b"), matrix(part, *r, rows.to_vec())?));
        }
    }
    let text = |value: &str| Value::String(value.to_owned());
    let metadata = [
        ("general.architecture", text(name)),
        ("general.type", text("adapter")),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", Value::F32(alpha)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = Cursor::new(Vec::new());
    write(&mut file, &metadata, &tensors)?;
    Ok(file.into_inner())
}

/// Returns llama.cpp's names of a module's parts, in the order of its rows, and the number of heads
/// of a query or key projection.
fn gguf_projections(
    module: &LinearModule,
    model: &ModelConfig,
) -> Result<(&'static [&'static str], Option<usize>), ModelError> {
    Ok(match module.name.rsplit('.').next().unwrap_or_default() {
        "q_proj" => (&["attn_q"], Some(model.num_attention_heads)),
        "k_proj" => (&["attn_k"], Some(model.layers[module.layer].num_key_value_heads)),
        "v_proj" => (&["attn_v"], None),
        "qkv_proj" => (&["attn_qkv"], None),
        "o_proj" => (&["attn_output"], None),
        "gate_proj" => (&["ffn_gate"], None),
        // Phi-3's gate and gated values are one matrix with the name of the values.
        "up_proj" | "gate_up_proj" | "c_fc" => (&["ffn_up"], None),
        "input_linear" => (&["ffn_gate", "ffn_up"], None),
        "down_proj" | "output_linear" | "c_proj" => (&["ffn_down"], None),
        "per_layer_input_gate" => (&["inp_gate"], None),
        "per_layer_projection" => (&["proj"], None),
        _ => {
            let message = format!(
                "has {}, which llama.cpp does not adapt; train without it, or serve the result of loractl \
                 merge",
                module.name
            );
            return Err(FieldError::new("target_modules", message).into());
        }
    })
}

/// Interleaves the two halves of each head in the rows of `matrix`, `[heads * head_dim, cols]`: row
/// `2 j + i` of a head is row `i head_dim / 2 + j`.
fn interleave(matrix: &[f32], cols: usize, heads: usize) -> Vec<f32> {
    let rows = matrix.len() / cols.max(1);
    let half = rows / heads.max(1) / 2;
    let row = |at: usize| -> Range<usize> { at * cols..(at + 1) * cols };
    let from = |to: usize| {
        let (head, within) = (to / (2 * half), to % (2 * half));
        head * 2 * half + within % 2 * half + within / 2
    };
    (0..rows).flat_map(|to| &matrix[row(from(to))]).copied().collect()
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::Content;
    use lora_spec::{AdapterSpec, BaseLayout};

    use super::*;
    use crate::Base;

    fn adapter_of(golden: &str) -> (Base, Adapter) {
        let base = lora_test_kit::golden(format!("models/{golden}")).as_path().into();
        let base = Base::load(&base, BaseLayout::default(), &Device::Cpu).unwrap();
        let spec = AdapterSpec { r: 4, use_rslora: true, ..AdapterSpec::default() };
        let adapter = Adapter::new(&base.config, &spec, 0).unwrap();
        let params = (0..adapter.layout().len).map(|i| i as f32).collect();
        let adapter = adapter.with_params(params, None).unwrap();
        (base, adapter)
    }

    /// The tensors of a file by name, and its metadata.
    fn read(bytes: Vec<u8>) -> (Content, Cursor<Vec<u8>>) {
        let mut file = Cursor::new(bytes);
        (Content::read(&mut file).unwrap(), file)
    }

    #[test]
    fn the_text_tower_of_mistral_3_has_its_own_name() {
        let name = |class: &str, inner: &str| {
            let sizes = r#""hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100"#;
            let text = format!(r#"{{"model_type": "{inner}", {sizes}}}"#);
            let config = format!(r#"{{"architectures": ["{class}"], "text_config": {text}, {sizes}}}"#);
            GgufArchitecture::of(&ModelConfig::parse(&config).unwrap()).name
        };
        assert_eq!(name("MistralForCausalLM", "mistral"), "llama");
        assert_eq!(name("Mistral3ForConditionalGeneration", "mistral"), "mistral3");
    }

    #[test]
    fn a_file_has_every_matrix_and_the_scale() {
        for (golden, architecture) in [
            ("llama-bf16", "llama"),
            ("phi3", "phi3"),
            ("qwen3", "qwen3"),
            ("starcoder2", "starcoder2"),
            ("gemma4", "gemma4"),
        ] {
            let (base, adapter) = adapter_of(golden);
            let (content, mut file) = read(gguf_adapter(&adapter, &base.config).unwrap());
            assert_eq!(content.metadata["general.architecture"].to_string().unwrap(), architecture);
            assert_eq!(content.metadata["general.type"].to_string().unwrap(), "adapter");
            assert_eq!(content.metadata["adapter.type"].to_string().unwrap(), "lora");
            let alpha = content.metadata["adapter.lora.alpha"].to_f32().unwrap();
            assert!((f64::from(alpha) / 4.0 - adapter.scaling()).abs() < 1e-6);
            assert_eq!(content.tensor_infos.len(), 2 * adapter.layout().modules.len());
            let mut elements = 0;
            for name in content.tensor_infos.keys() {
                let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
                elements += tensor.shape().elem_count();
            }
            assert_eq!(elements, adapter.layout().len, "{golden}");
        }
    }

    #[test]
    fn a_module_that_llama_cpp_has_in_parts_is_split() {
        let (base, adapter) = adapter_of("granite4");
        let (content, mut file) = read(gguf_adapter(&adapter, &base.config).unwrap());
        let mut values = |name: &str| -> Vec<f32> {
            let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
            tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let fused =
            adapter.layout().modules.iter().find(|it| it.module.name.ends_with("0.shared_mlp.input_linear"));
        let AdaptedModule { a, b, .. } = fused.unwrap();
        let [gate, up] = ["ffn_gate", "ffn_up"].map(|name| {
            let a_of_part = values(&format!("blk.0.{name}.weight.lora_a"));
            assert_eq!(a_of_part, a.clone().map(|i| i as f32).collect::<Vec<_>>());
            values(&format!("blk.0.{name}.weight.lora_b"))
        });
        assert_eq!(gate.len(), up.len());
        assert_eq!([gate, up].concat(), b.clone().map(|i| i as f32).collect::<Vec<_>>());
    }

    #[test]
    fn a_module_without_an_effect_in_llama_cpp_is_refused() {
        let (base, adapter) = adapter_of("gemma4-shared");
        let error = gguf_adapter(&adapter, &base.config).unwrap_err().to_string();
        assert!(error.contains("per_layer_model_projection, which llama.cpp does not adapt; "), "{error}");
    }

    #[test]
    fn only_rows_of_queries_and_keys_are_interleaved() {
        let (base, adapter) = adapter_of("llama-bf16");
        let (content, mut file) = read(gguf_adapter(&adapter, &base.config).unwrap());
        let mut rows = |name: &str| -> Vec<Vec<f32>> {
            let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
            tensor.dequantize(&Device::Cpu).unwrap().to_vec2().unwrap()
        };
        let stored = |projection: &str| -> Vec<Vec<f32>> {
            let suffix = format!("layers.1.self_attn.{projection}");
            let adapted = adapter.layout().modules.iter().find(|it| it.module.name.ends_with(&suffix));
            adapted
                .unwrap()
                .b
                .clone()
                .map(|i| i as f32)
                .collect::<Vec<_>>()
                .chunks(4)
                .map(Vec::from)
                .collect()
        };
        assert_eq!(rows("blk.1.attn_v.weight.lora_b"), stored("v_proj"));
        let half = base.config.layers[1].head_dim / 2;
        for (gguf, projection) in [("attn_q", "q_proj"), ("attn_k", "k_proj")] {
            let (found, expected) = (rows(&format!("blk.1.{gguf}.weight.lora_b")), stored(projection));
            assert_eq!(found.len(), expected.len());
            for (row, values) in found.iter().enumerate() {
                let (head, at) = (row / (2 * half), row % (2 * half));
                assert_eq!(*values, expected[head * 2 * half + at % 2 * half + at / 2], "{gguf} {row}");
            }
        }
    }

    #[test]
    fn a_scale_of_zero_is_refused() {
        let (base, adapter) = adapter_of("llama-bf16");
        let params = vec![0.0; adapter.layout().len];
        let zero = Adapter::from_params(adapter.layout().clone(), params, 0.0).unwrap();
        let error = gguf_adapter(&zero, &base.config).unwrap_err().to_string();
        assert_eq!(error, "lora_alpha: is 0; it must be above 0");
    }
}
