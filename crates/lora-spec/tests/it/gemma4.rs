//! `config.json` of Gemma 4, whose blocks differ.

use lora_spec::{ModelConfig, Rope, RopeScaling, SafetensorsIndex};
use lora_test_kit::golden;
use serde_json::{Value, json};

use crate::base_model::parse;

/// `config.json` of a dense Gemma 4 with two blocks.
fn gemma4(changes: &Value) -> Result<ModelConfig, String> {
    let mut fields = json!({"architectures": ["Gemma4ForCausalLM"], "hidden_size_per_layer_input": 0});
    fields.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    parse(&fields)
}

#[test]
fn blocks_of_gemma_4_have_heads_of_two_sizes() {
    let heads = |changes: Value| {
        let layers = gemma4(&changes).unwrap().layers;
        layers.iter().map(|layer| (layer.head_dim, layer.num_key_value_heads)).collect::<Vec<_>>()
    };
    // Key/value heads of their own need values that are the keys.
    assert_eq!(heads(json!({"num_global_key_value_heads": 1})), [(256, 4), (512, 4)]);
    let shared = json!({"attention_k_eq_v": true, "num_global_key_value_heads": 1, "global_head_dim": 64});
    assert_eq!(heads(shared.clone()), [(256, 4), (64, 1)]);
    let of_layers = json!({"per_layer_config": {"01": {"head_dim": 64, "num_key_value_heads": 2}}});
    assert_eq!(heads(of_layers), [(256, 4), (64, 2)]);
    assert_eq!(heads(json!({"per_layer_config": null})), [(256, 4); 2]);

    let blocks: Vec<_> = gemma4(&shared).unwrap().blocks().collect();
    assert!(!blocks[0].attn.values_are_keys && blocks[1].attn.values_are_keys);
    assert_eq!(blocks[0].attn.qkv_proj.len() - blocks[1].attn.qkv_proj.len(), 1);
    assert_eq!((blocks[0].attn.sliding_window, blocks[1].attn.sliding_window), (Some(512), None));
    // A quarter of the pairs of the larger heads are rotated.
    let ropes = gemma4(&json!({})).unwrap().ropes;
    let full = RopeScaling::Proportional { factor: 1.0, rotated_pairs: 64 };
    assert_eq!(ropes, [Rope::new(1e4, 256), Rope { scaling: full, ..Rope::new(1e6, 512) }]);
}

#[test]
fn blocks_of_gemma_4_share_the_keys_and_values_of_their_type() {
    let dir = golden("models/gemma4-shared").into();
    let config = ModelConfig::read(&dir).unwrap();
    let sharing: Vec<_> =
        config.layers.iter().map(|layer| (layer.kv_source, layer.intermediate_size)).collect();
    assert_eq!(sharing, [(None, 20), (None, 20), (None, 20), (Some(1), 40), (Some(2), 40)]);
    // The files may have the keys and values of these blocks, which Transformers ignores.
    let mut index = SafetensorsIndex::open(&dir).unwrap();
    let entry = index.tensors["model.norm.weight"].clone();
    for name in ["k_proj.weight", "v_proj.weight", "k_norm.weight"] {
        index.tensors.insert(format!("model.layers.4.self_attn.{name}"), entry.clone());
    }
    index.check(&config).unwrap();
    index.tensors.insert("model.layers.2.self_attn.k_proj.bias".into(), entry);
    let error = index.check(&config).unwrap_err().to_string();
    assert!(error.contains("layers.2.self_attn.k_proj.bias is not part"), "{error}");
}

#[test]
fn unsupported_settings_of_gemma_4_are_named_in_the_error() {
    let alternating = ["sliding_attention", "full_attention"].repeat(2);
    for (changes, expected) in [
        (
            json!({"hidden_size_per_layer_input": null}),
            "vocab_size_per_layer_input: 262144 is not vocab_size 100",
        ),
        (json!({"hidden_size_per_layer_input": -1}), "hidden_size_per_layer_input: -1 is not a whole number"),
        (json!({"num_kv_shared_layers": 2}), "num_kv_shared_layers: 2 blocks need an earlier block"),
        (json!({"num_kv_shared_layers": 0.5}), "num_kv_shared_layers: 0.5 is not a whole number"),
        (
            json!({"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                "per_layer_config": {"3": {"head_dim": 64}},
                "layer_types": alternating}),
            "num_kv_shared_layers: blocks that share keys and values must have the same heads",
        ),
        (json!({"enable_moe_block": true}), "enable_moe_block: must be false; mixtures of experts are not"),
        (
            json!({"use_bidirectional_attention": "all"}),
            "use_bidirectional_attention: \"all\" is not supported; supported: null, \"vision\"",
        ),
        (
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "layer_types: the last block must have \"full_attention\"",
        ),
        (
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
            "rope_scaling: must be null; Gemma 4 has rope_parameters",
        ),
        (json!({"rope_parameters": {"full_attention": {}}}), "rope_parameters.sliding_attention: is missing"),
        (json!({"global_head_dim": 33}), "global_head_dim: 33 is odd"),
        (
            json!({"attention_k_eq_v": true, "num_global_key_value_heads": 3}),
            "num_global_key_value_heads: 3 does not divide",
        ),
        (json!({"per_layer_config": []}), "per_layer_config: must be a JSON object"),
        (json!({"per_layer_config": {"2": {}}}), "per_layer_config: \"2\" is not the index of one of 2"),
        (json!({"per_layer_config": {"1": 5}}), "per_layer_config.1: must be a JSON object"),
        (
            json!({"per_layer_config": {"1": {"sliding_window": 5}}}),
            "per_layer_config.1.sliding_window: is not supported; supported: head_dim, num_key_value_heads",
        ),
        (
            json!({"per_layer_config": {"1": {"num_key_value_heads": 3}}}),
            "per_layer_config.1.num_key_value_heads: 3 does not divide",
        ),
        (json!({"sliding_window": null}), "sliding_window: null is not a whole number"),
        (json!({"per_layer_config": {"1": {"head_dim": 0}}}), "per_layer_config.1.head_dim: 0 is not"),
    ] {
        let error = gemma4(&changes).unwrap_err();
        assert!(error.contains(expected), "{changes}: {error}");
    }
}
