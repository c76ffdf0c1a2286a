//! The numbers of parameters of published models.

use lora_spec::ModelConfig;
use serde_json::json;

/// Sizes of published models: hidden size, width of the MLP, blocks, heads, key/value heads,
/// vocabulary, other fields, and the number of parameters that Transformers counts.
#[test]
fn published_models_have_their_published_parameter_counts() {
    let tied = || json!({"tie_word_embeddings": true});
    let types_of_e2b = [vec!["sliding_attention"; 4], vec!["full_attention"]].concat().repeat(7);
    for (model, class, sizes, others, parameters) in [
        ("SmolLM2-135M", "Llama", [576, 1536, 30, 9, 3, 49_152], tied(), 134_515_008),
        ("Falcon3-7B", "Llama", [3072, 23_040, 28, 12, 4, 131_072], json!({"head_dim": 256}), 7_455_550_464),
        ("Mistral-7B-v0.3", "Mistral", [4096, 14_336, 32, 32, 8, 32_768], json!({}), 7_248_023_552),
        ("Qwen2.5-0.5B", "Qwen2", [896, 4864, 24, 14, 2, 151_936], tied(), 494_032_768),
        (
            "Qwen3-0.6B",
            "Qwen3",
            [1024, 3072, 28, 16, 8, 151_936],
            json!({"head_dim": 128, "tie_word_embeddings": true}),
            596_049_920,
        ),
        ("Qwen3-8B", "Qwen3", [4096, 12_288, 36, 32, 8, 151_936], json!({"head_dim": 128}), 8_190_735_360),
        ("SmolLM3-3B", "SmolLM3", [2048, 11_008, 36, 16, 4, 128_256], json!({}), 3_075_098_624),
        ("OLMo-2-1B", "Olmo2", [2048, 8192, 16, 16, 16, 100_352], json!({}), 1_484_916_736),
        ("OLMo-3-7B", "Olmo3", [4096, 11_008, 32, 32, 32, 100_278], json!({}), 7_298_011_136),
        ("Granite-3.1-2b", "Granite", [2048, 8192, 40, 32, 8, 49_155], tied(), 2_533_531_648),
        (
            "granite-4.0-micro",
            "GraniteMoeHybrid",
            [2560, 8192, 40, 40, 8, 100_352],
            json!({"shared_intermediate_size": 8192, "num_local_experts": 0,
                "layer_types": vec!["attention"; 40], "tie_word_embeddings": true}),
            3_402_836_480,
        ),
        ("gemma-2-2b", "Gemma2", [2304, 9216, 26, 8, 4, 256_000], json!({"head_dim": 256}), 2_614_341_888),
        ("gemma-3-1b", "Gemma3", [1152, 6912, 26, 4, 1, 262_144], json!({"head_dim": 256}), 999_885_952),
        (
            "gemma-4-31b (text tower)",
            "Gemma4",
            [5376, 21_504, 60, 32, 16, 262_144],
            json!({"head_dim": 256, "attention_k_eq_v": true, "num_global_key_value_heads": 4,
                "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}),
            30_697_345_280,
        ),
        (
            "gemma-4-E2B (text tower)",
            "Gemma4",
            [1536, 6144, 35, 8, 1, 262_144],
            json!({"head_dim": 256, "num_kv_shared_layers": 20, "use_double_wide_mlp": true,
                "layer_types": types_of_e2b}),
            4_628_569_344,
        ),
        (
            "gemma-4-E4B (text tower)",
            "Gemma4",
            [2560, 10_240, 42, 8, 2, 262_144],
            json!({"num_kv_shared_layers": 18}),
            7_463_013_376,
        ),
        ("starcoder2-3b", "Starcoder2", [3072, 12_288, 30, 24, 2, 49_152], json!({}), 3_030_371_328),
        (
            "c4ai-command-r7b",
            "Cohere2",
            [4096, 14_336, 32, 32, 8, 256_000],
            json!({"sliding_window_pattern": 4}),
            8_028_033_024,
        ),
        ("Phi-4", "Phi3", [5120, 17_920, 40, 40, 10, 100_352], json!({}), 14_659_507_200),
        ("Phi-4-mini", "Phi3", [3072, 8192, 32, 24, 8, 200_064], tied(), 3_836_021_760),
        (
            "Ministral-3-8B",
            "Ministral3",
            [4096, 14_336, 34, 32, 8, 131_072],
            json!({"head_dim": 128, "rope_parameters": {"rope_type": "default"}}),
            8_489_553_920,
        ),
    ] {
        let [hidden, intermediate, layers, heads, kv_heads, vocab] = sizes;
        let mut config = json!({"architectures": [format!("{class}ForCausalLM")], "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": vocab});
        config.as_object_mut().unwrap().extend(others.as_object().unwrap().clone());
        let config = ModelConfig::parse(&config.to_string()).unwrap();
        assert_eq!(config.parameters(), parameters, "{model}");
    }
    // The text tower of gemma-3-4b, whose configuration leaves the rest to the defaults.
    let tower = json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
            "model_type": "gemma3_text", "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}});
    let tower = ModelConfig::parse(&tower.to_string()).unwrap();
    assert_eq!((tower.parameters(), tower.is_multimodal()), (3_880_263_168, true));
}
