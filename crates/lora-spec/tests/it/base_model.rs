//! `config.json`, checkpoints and target modules.

use std::fs;
use std::path::{Path, PathBuf};

use lora_spec::{
    ActivationFunction, Architecture, ModelConfig, Rope, RopeScaling, SafetensorsIndex, TargetModules,
};
use lora_test_kit::golden;
use serde_json::{Value, json};

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100,
    })
}

/// Parses a small Llama with these changes.
pub(crate) fn parse(changes: &Value) -> Result<ModelConfig, String> {
    let mut config = config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::parse(&config.to_string())
}

fn rope(config: &ModelConfig) -> Rope {
    config.ropes[config.layers[0].rope.unwrap().keys].clone()
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    config.layers.iter().map(|layer| layer.sliding_window).collect()
}

#[test]
fn transformers_4_and_5_configs_parse_to_the_same_model() {
    let read = |name: &str| ModelConfig::read(&golden(format!("models/{name}")).into()).unwrap();
    assert_eq!(read("qwen2"), read("qwen2-v4"));
    assert_eq!(read("qwen2").architecture, Architecture::Qwen2);
    assert!(read("qwen2").qkv_bias && !read("qwen2").o_bias && read("qwen2").tie_word_embeddings);
    assert!(matches!(rope(&read("llama3-rope")).scaling, RopeScaling::Llama3 { .. }));
    assert!(matches!(rope(&read("llama-linear-rope")).scaling, RopeScaling::Linear { .. }));
}

#[test]
fn sliding_windows_are_read_from_transformers_4_and_5_configs() {
    let window = ModelConfig::read(&golden("models/qwen2-window").into()).unwrap();
    assert_eq!(windows(&window), [None, Some(6), Some(6)]);
    let of = |fields: Value| windows(&parse(&fields).unwrap());
    let mistral = |fields: Value| {
        let mut mistral = json!({"architectures": ["MistralForCausalLM"]});
        mistral.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        of(mistral)
    };
    assert_eq!(mistral(json!({})), [Some(4096); 2]);
    assert_eq!(mistral(json!({"sliding_window": null})), [None; 2]);
    let types = json!({"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]});
    assert_eq!(mistral(types.clone()), [None, Some(9)]);
    // The types of blocks count in SmolLM3 whatever `use_sliding_window` says.
    let mut smollm3 = json!({"architectures": ["SmolLM3ForCausalLM"], "use_sliding_window": false});
    smollm3.as_object_mut().unwrap().extend(types.as_object().unwrap().clone());
    assert_eq!(of(smollm3), [None, Some(9)]);
    for architecture in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        let qwen = |changes: serde_json::Value| {
            let mut fields = json!({"architectures": [architecture], "num_hidden_layers": 3});
            fields.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            windows(&parse(&fields).unwrap())
        };
        let null = json!({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0});
        assert_eq!(qwen(null), [None; 3]);
        let old = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 2});
        assert_eq!(qwen(old), [None, None, Some(9)]);
        assert_eq!(
            qwen(json!({"use_sliding_window": false, "sliding_window": 9, "max_window_layers": 0})),
            [None; 3]
        );
    }
}

/// The defaults of Transformers 5 for fields that `config.json` does not have.
#[test]
fn missing_fields_have_the_defaults_of_the_architecture() {
    for (architecture, kv_heads, eps, theta, tied) in [
        ("Llama", 32, 1e-6, 10_000.0, false),
        ("Mistral", 8, 1e-6, 10_000.0, false),
        ("Qwen2", 32, 1e-6, 10_000.0, false),
        ("Qwen3", 32, 1e-6, 10_000.0, false),
        ("SmolLM3", 4, 1e-6, 2_000_000.0, true),
        ("Olmo2", 32, 1e-5, 10_000.0, false),
        ("Olmo3", 32, 1e-5, 500_000.0, false),
        ("Granite", 32, 1e-6, 10_000.0, false),
        ("GraniteMoeHybrid", 32, 1e-6, 10_000.0, false),
        ("Gemma2", 4, 1e-6, 10_000.0, true),
        ("Gemma3", 4, 1e-6, 1_000_000.0, true),
        ("Gemma4", 4, 1e-6, 1_000_000.0, true),
        ("Phi3", 32, 1e-5, 10_000.0, false),
        ("Ministral3", 8, 1e-5, 1_000_000.0, false),
        ("Starcoder2", 2, 1e-5, 10_000.0, true),
        ("Cohere2", 32, 1e-5, 10_000.0, true),
    ] {
        let minimal = |heads: Value| {
            let mut config = config();
            config["architectures"] = json!([format!("{architecture}ForCausalLM")]);
            config["num_attention_heads"] = json!(32);
            config["head_dim"] = json!(32);
            config["num_hidden_layers"] = json!(6);
            config.as_object_mut().unwrap().remove("num_key_value_heads");
            if architecture == "Ministral3" {
                config["rope_parameters"] = json!({"rope_type": "default"});
            }
            if architecture == "Gemma4" {
                config["hidden_size_per_layer_input"] = json!(0);
            }
            if architecture == "GraniteMoeHybrid" {
                config["num_local_experts"] = json!(0);
                config["layers_block_type"] = json!(vec!["attention"; 6]);
                config["position_embedding_type"] = json!("rope");
            }
            config.as_object_mut().unwrap().extend(heads.as_object().unwrap().clone());
            ModelConfig::parse(&config.to_string()).unwrap()
        };
        let model = minimal(json!({}));
        // Every sixth block of Gemma 3 is not a local one.
        let rope = model.layers.last().unwrap().rope.or(model.layers[0].rope).unwrap();
        let rope = &model.ropes[rope.keys];
        assert_eq!(
            (model.layers[0].num_key_value_heads, model.norm_eps, rope.theta, model.tie_word_embeddings),
            (kv_heads, eps, theta, tied),
            "{architecture}"
        );
        // Transformers 4 wrote null for a key/value head for each query head.
        let null = minimal(json!({"num_key_value_heads": null}));
        assert_eq!(null.layers[0].num_key_value_heads, 32, "{architecture}");
    }
}

#[test]
fn both_activations_are_accepted_in_all_architectures() {
    for architecture in ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        for (named, expected) in [
            (json!("silu"), ActivationFunction::Silu),
            (json!("gelu_pytorch_tanh"), ActivationFunction::GeluTanh),
            (Value::Null, ActivationFunction::Silu),
        ] {
            let config = json!({"architectures": [architecture], "hidden_act": named});
            assert_eq!(parse(&config).unwrap().hidden_act, expected, "{config}");
        }
    }
}

#[test]
fn unsupported_settings_are_named_in_the_error() {
    let cases = [
        (
            json!({"architectures": ["MambaForCausalLM"]}),
            "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
        ),
        (
            json!({"hidden_act": "gelu"}),
            "hidden_act: \"gelu\" is not supported; supported: \"silu\", \"gelu_pytorch_tanh\"",
        ),
        (json!({"hidden_size": -1}), "hidden_size"),
        (json!({"hidden_size": null}), "hidden_size: is missing"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads: 3 does not divide"),
        (
            json!({"num_attention_heads": 7, "num_key_value_heads": 7}),
            "num_attention_heads: 7 does not divide hidden_size 64",
        ),
        (json!({"rope_scaling": {"rope_type": "mrope"}}), "rope_scaling.rope_type: \"mrope\""),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": false}}), "truncate"),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary_factor: must be 1"),
        (json!({"rope_parameters": {"full_attention": {}}}), "one rotary embedding for all blocks"),
        (
            json!({"architectures": ["Olmo3ForCausalLM"], "rope_parameters": {"rope_theta": 5.0}}),
            "rope_parameters.full_attention: is missing",
        ),
        (
            json!({"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 0}),
            "attn_logit_softcapping: 0",
        ),
        (json!({"architectures": ["Ministral3ForCausalLM"]}), "rope_parameters: is missing"),
        (json!({"architectures": ["Phi3ForCausalLM"], "resid_pdrop": 0.1}), "resid_pdrop: must be 0"),
        (
            json!({"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.2}),
            "partial_rotary_factor: 3 of the 16 features",
        ),
        (json!({"architectures": ["Gemma3ForConditionalGeneration"]}), "text_config: is missing"),
        (
            json!({"architectures": ["Gemma3ForConditionalGeneration"], "tie_word_embeddings": false,
                "text_config": {"tie_word_embeddings": true}}),
            "tie_word_embeddings: is false, and true in text_config",
        ),
        (
            json!({"architectures": ["Gemma3ForConditionalGeneration"], "is_causal": false,
                "text_config": {}}),
            "text_config.is_causal: must be true",
        ),
        (
            json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "llama"}),
            "model_type: \"llama\" is not the type of Gemma3ForConditionalGeneration, \"gemma3\"",
        ),
        (
            json!({"architectures": ["Mistral3ForConditionalGeneration"],
                "text_config": {"model_type": "x"}}),
            "text_config.architectures: x is not supported",
        ),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor: must be 1"),
        (json!({"rope_scaling": {"rope_type": "su"}}), "\"su\" is not supported; supported: default, linear"),
        (
            json!({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "linear", "factor": 2}}),
            "\"linear\" is not supported for Phi 3",
        ),
        // Phi 3 called LongRoPE so.
        (
            json!({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "yarn", "factor": 2}}),
            "rope_scaling.short_factor: must be a list of 8",
        ),
        (
            json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
            "rope_scaling.short_factor: must be a list of 8 positive numbers",
        ),
        (
            json!({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 2]}),
            "no_rope_layers: 2 is neither 0 nor 1",
        ),
        (json!({"architectures": ["GraniteForCausalLM"], "logits_scaling": 0.0}), "logits_scaling: 0"),
        (
            json!({"architectures": ["Starcoder2ForCausalLM"], "residual_dropout": 0.1}),
            "residual_dropout: must be 0; dropout of the base is not supported",
        ),
        (json!({"architectures": ["Starcoder2ForCausalLM"], "norm_epsilon": 2}), "norm_epsilon: 2 is not"),
        (json!({"architectures": ["Cohere2ForCausalLM"], "layer_norm_eps": 0}), "layer_norm_eps: 0 is not"),
        (
            json!({"architectures": ["Cohere2ForCausalLM"], "sliding_window": null}),
            "sliding_window: null is not a whole number",
        ),
        (json!({"architectures": ["Cohere2ForCausalLM"], "logit_scale": -1.0}), "logit_scale: -1"),
        (
            json!({"architectures": ["Cohere2ForCausalLM"], "sliding_window": null,
                "layer_types": ["full_attention", "sliding_attention"]}),
            "layer_types: \"sliding_attention\" needs a sliding_window",
        ),
        (json!({"is_causal": false}), "is_causal: must be true"),
        (
            json!({"architectures": ["GraniteForCausalLM"], "attention_multiplier": null}),
            "attention_multiplier: null is not a positive number",
        ),
        (
            json!({"architectures": ["GraniteMoeHybridForCausalLM"]}),
            "num_local_experts: 8 experts are not supported; supported: Granite 4 without experts (0)",
        ),
        (
            json!({"architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 0}),
            "layer_types: Mamba layers are not supported; supported: \"attention\" in all layers",
        ),
        (
            json!({"architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 0,
                "layers_block_type": ["attention", "mamba"]}),
            "layer_types: Mamba layers are not supported",
        ),
        (
            json!({"architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 0,
                "layers_block_type": ["attention", "attention"],
                "layer_types": ["full_attention", "attention"]}),
            "layers_block_type: differs from layer_types",
        ),
        (
            json!({"architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 0,
                "layer_types": ["attention", "sliding_attention"]}),
            "layer_types: \"sliding_attention\" is not supported; supported: \"attention\"",
        ),
        (
            json!({"architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 0,
                "layer_types": ["attention", "attention"], "position_embedding_type": "alibi"}),
            "position_embedding_type: \"alibi\" is not supported; supported: \"rope\", \"nope\"",
        ),
        (json!({"rope_parameters": {"rope_type": "linear"}}), "rope_parameters.factor"),
        (
            json!({"architectures": ["Gemma3ForCausalLM"],
                "rope_scaling": {"type": "linear", "factor": 8}}),
            "rope_scaling.type: Transformers 5 does not read it here; name it rope_type",
        ),
        (
            json!({"architectures": ["Olmo3ForCausalLM"], "rope_theta": 10_000}),
            "rope_theta: Transformers 5 uses it for blocks without a window only, and 500000",
        ),
        (
            json!({"architectures": ["Olmo3ForCausalLM"], "rope_theta": 20_000, "rope_parameters":
                {"full_attention": {"rope_theta": 2e4}, "sliding_attention": {"rope_type": "default"}}}),
            "rope_theta: Transformers 5 uses it for blocks without a window only",
        ),
        (
            json!({"per_layer_config": {"1": {"rms_norm_eps": 0.1}}}),
            "per_layer_config: is supported for Gemma 4",
        ),
        (json!({"num_hidden_layers": 16_777_216}), "num_hidden_layers: 16777216 is more than 10000"),
        (json!({"transformers_weights": "a.safetensors"}), "transformers_weights: \"a.safetensors\" is not"),
        (json!({"rope_scaling": {"rope_type": "yarn"}}), "rope_scaling.factor"),
        (json!({"rope_scaling": "linear"}), "rope_scaling: must be a JSON object"),
        (json!({"rope_scaling": {"rope_type": 5}}), "rope_scaling.rope_type: must be a text"),
        (
            json!({"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_theta": 1e4}}),
            "rope_scaling.factor: must be a positive number",
        ),
        (
            json!({"model_type": "granite"}),
            "model_type: \"granite\" is not the type of LlamaForCausalLM, \"llama\"",
        ),
        (
            json!({"architectures": ["Gemma3ForCausalLM"], "sliding_window": null,
                "layer_types": ["full_attention", "sliding_attention"]}),
            "layer_types: \"sliding_attention\" needs a sliding_window",
        ),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "quantization_config.quant_method: \"gptq\"",
        ),
        (
            json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true,
                "layer_types": ["full_attention"]}),
            "layer_types",
        ),
    ];
    for (changes, expected) in cases {
        let error = parse(&changes).unwrap_err();
        assert!(error.contains(expected), "{changes}: {error}");
    }
    assert!(ModelConfig::parse("{\n broken").unwrap_err().starts_with("line 2: "));
    for number in ["NaN", "Infinity", "-Infinity"] {
        let error = ModelConfig::parse(&format!("{{\n\"a\": {number}}}")).unwrap_err();
        let name = number.trim_start_matches('-');
        assert_eq!(error, format!("line 2: {name} is not a number of JSON"));
    }
}

/// As in Transformers 5, whose class of the whole model ties the head.
#[test]
fn a_multimodal_model_ties_its_head_by_its_own_setting() {
    let tied = |whole: Option<bool>, text: Option<bool>| {
        let mut config = json!({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
            "vocab_size": 100, "model_type": "mistral"}});
        if let Some(whole) = whole {
            config["tie_word_embeddings"] = json!(whole);
        }
        if let Some(text) = text {
            config["text_config"]["tie_word_embeddings"] = json!(text);
        }
        ModelConfig::parse(&config.to_string()).map(|config| config.tie_word_embeddings)
    };
    for text in [None, Some(false), Some(true)] {
        assert_eq!((tied(None, text), tied(Some(true), text)), (Ok(true), Ok(true)));
    }
    assert_eq!((tied(Some(false), None), tied(Some(false), Some(false))), (Ok(false), Ok(false)));
}

#[test]
fn the_original_context_beside_ropes_by_type_has_no_effect() {
    let scaling = json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32});
    let default = json!({"rope_type": "default"});
    let config = |original: Value| {
        parse(&json!({"architectures": ["Gemma3ForCausalLM"], "original_max_position_embeddings": original,
            "rope_parameters": {"full_attention": scaling, "sliding_attention": default}}))
        .unwrap()
        .ropes
    };
    assert_eq!(config(json!(16)), config(Value::Null));
}

#[test]
fn an_adapter_in_the_directory_of_a_base_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden("models/llama-gqa/config.json"), dir.path().join("config.json")).unwrap();
    assert!(ModelConfig::read(&dir.path().into()).is_ok());
    fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    let error = ModelConfig::read(&dir.path().into()).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json: is in the directory of the base"), "{error}");
}

#[test]
fn target_modules_resolve_as_in_peft() {
    let cases: Vec<Value> = serde_json::from_slice(&fs::read(golden("targets.json")).unwrap()).unwrap();
    let mut compared = 0;
    for case in cases {
        let model =
            ModelConfig::read(&golden("models").join(case["model"].as_str().unwrap()).into()).unwrap();
        let targets: TargetModules = serde_json::from_value(case["target_modules"].clone()).unwrap();
        let resolved =
            targets.resolve(&model).map(|modules| modules.into_iter().map(|m| m.name).collect::<Vec<_>>());
        let expected: Option<Vec<String>> = serde_json::from_value(case["resolved"].clone()).unwrap();
        match expected {
            // This project does not adapt the head. A name without a match is an error, even if
            // another name matches.
            Some(names) if names.iter().any(|n| n == "lm_head") => {
                assert!(resolved.is_err() || !resolved.unwrap().contains(&"lm_head".into()), "{case}");
            }
            Some(names) => {
                if let Ok(resolved) = &resolved {
                    assert_eq!(*resolved, names, "{case}");
                    compared += 1;
                }
            }
            None => assert!(resolved.is_err(), "{case}"),
        }
    }
    assert!(compared >= 5, "only {compared} cases were compared");
}

#[test]
fn an_unknown_target_module_error_lists_the_existing_ones() {
    let model = parse(&json!({})).unwrap();
    for targets in [TargetModules::Names(vec!["qproj".into()]), TargetModules::Pattern("nothing".into())] {
        let error = targets.resolve(&model).unwrap_err().to_string();
        assert!(error.starts_with("adapter.target_modules: ") && error.contains("q_proj, k_proj"), "{error}");
    }
    let error = TargetModules::Pattern("(".into()).resolve(&model).unwrap_err().to_string();
    assert!(error.contains("regular expression"), "{error}");
}

/// Copies a golden base in 3 shards to `dir`, and returns the path of the second shard.
fn sharded(dir: &Path) -> PathBuf {
    for entry in fs::read_dir(golden("models/llama-linear-rope")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    dir.join("model-00002-of-00003.safetensors")
}

#[test]
fn corrupt_safetensors_errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let shard = sharded(dir.path());
    let open = || SafetensorsIndex::open(&dir.path().into()).map_err(|e| e.to_string());
    let config = ModelConfig::read(&dir.path().into()).unwrap();
    open().unwrap().check(&config).unwrap();

    let bytes = fs::read(&shard).unwrap();
    for cut in [0, 5, 60, bytes.len() - 1] {
        fs::write(&shard, &bytes[..cut]).unwrap();
        let error = open().unwrap_err();
        assert!(error.contains("model-00002-of-00003.safetensors: is truncated"), "{cut}: {error}");
    }
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&shard, huge).unwrap();
    assert!(open().unwrap_err().contains("is not a safetensors file"));
    fs::remove_file(&shard).unwrap();
    assert!(
        open()
            .unwrap_err()
            .contains("names model-00002-of-00003.safetensors, which is not in this directory")
    );

    fs::write(&shard, &bytes).unwrap();
    let deeper = ModelConfig { layers: vec![config.layers[0]; 9], ..config.clone() };
    assert!(open().unwrap().check(&deeper).unwrap_err().to_string().contains("is missing"));
    let mut wider = config;
    wider.layers[0].intermediate_size = 7;
    assert!(open().unwrap().check(&wider).unwrap_err().to_string().contains("config.json requires [7,"));

    fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    assert!(open().unwrap_err().contains("contains neither model.safetensors nor"));
}

#[test]
fn tensors_that_the_model_does_not_have_are_refused() {
    let dir = golden("models/qwen2").into();
    let index = SafetensorsIndex::open(&dir).unwrap();
    let config = ModelConfig::read(&dir).unwrap();
    index.check(&config).unwrap();
    // As Llama the model would have no biases.
    let without_biases = ModelConfig { qkv_bias: false, ..config.clone() };
    let error = index.check(&without_biases).unwrap_err().to_string();
    let expected = "k_proj.bias is not part of the model that config.json describes";
    assert!(error.contains(expected), "{error}");
    // Frequencies of rotary embeddings are not part of the decoder.
    let mut more = index;
    let entry = more.tensors["model.norm.weight"].clone();
    more.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), entry.clone());
    more.check(&config).unwrap();
    more.tensors.insert("model.layers.9.mlp.up_proj.weight".into(), entry);
    assert!(
        more.check(&config).unwrap_err().to_string().contains("model.layers.9.mlp.up_proj.weight is not")
    );
}
