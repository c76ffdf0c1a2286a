//! Compares the floating-point operations of a plan with counts by hand.

use lora_plan::{attention_flops, row_flops};
use lora_spec::ModelConfig;

#[test]
fn a_row_takes_the_operations_of_its_products() -> Result<(), String> {
    let model = |window: &str| {
        ModelConfig::parse(&format!(
            r#"{{"architectures": ["MistralForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "vocab_size": 10, "sliding_window": {window}}}"#
        ))
    };
    // q and o of 64 x 64, k and v of 64 x 32, gate, up and down of 64 x 96, in two blocks.
    let blocks = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96);
    let (head, adapter) = (10 * 64, 1000);
    // The queries of a row of 5 tokens attend to 1 + 2 + 3 + 4 + 5 keys. Each of 64 features takes
    // 2 operations in two products of the forward pass and four of the backward pass.
    let pairs = 15;
    let attention = 2 * 12 * 64 * pairs;
    let plain = model("null")?;
    assert_eq!(attention_flops(&plain, 5), attention);
    assert_eq!(row_flops(&plain, adapter, 5), 5 * (4 * (blocks + head) + 6 * adapter) + attention);
    // With a window of 2 they attend to 1 + 2 + 2 + 2 + 2 keys.
    assert_eq!(attention_flops(&model("2")?, 5), 2 * 12 * 64 * 9);
    Ok(())
}

/// Heads of 16 features with a window of 2 in the first block, and of 32 in the second one.
#[test]
fn blocks_may_have_heads_of_their_own() -> Result<(), String> {
    let model = ModelConfig::parse(
        r#"{"architectures": ["Gemma4ForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "global_head_dim": 32, "vocab_size": 10, "sliding_window": 2, "hidden_size_per_layer_input": 0}"#,
    )?;
    assert_eq!(attention_flops(&model, 5), 12 * (64 * 9 + 128 * 15));
    Ok(())
}
