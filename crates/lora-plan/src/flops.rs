//! Floating-point operations of training, as the model defines them.
//!
//! The counts cover matrix products; a multiplication with its addition is 2 operations. Recomputed
//! products are not counted. A token of a row of `S` tokens takes
//!
//! ```text
//! 4 N_frozen + 6 N_adapter + 6 L H D (S + 1)
//! ```
//!
//! - `N_frozen`: elements of the blocks' matrices and of the head. A tied head counts too, while
//!   the lookup of embedding rows takes no operations. The forward pass has one product, and the
//!   backward pass has one: the gradient of the input. Frozen weights have no gradient.
//! - `N_adapter`: elements of the LoRA matrices. The forward pass has one product, the backward
//!   pass two.
//! - The last term is causal attention over `L` blocks of `H` query heads of `D` features. A pair
//!   of a query and a key takes `2 D` operations a head in each of two forward products (scores,
//!   values) and four backward products (gradients of queries, keys, values and scores). A token
//!   attends to `(S + 1) / 2` keys on average, and to fewer with sliding windows.

use lora_spec::{LayerConfig, ModelConfig};

/// Returns the operations of training on one row of `seq` tokens with an adapter of `adapter`
/// parameters.
pub fn row_flops(config: &ModelConfig, adapter: u64, seq: u64) -> u64 {
    let blocks: u64 =
        config.linear_modules().iter().map(|m| m.in_features as u64 * m.out_features as u64).sum();
    let head = config.vocab_size as u64 * config.hidden_size as u64;
    seq * (4 * (blocks + head) + 6 * adapter) + attention_flops(config, seq)
}

/// Returns the operations of attention, which are part of [`row_flops`]: a third of them in the
/// forward pass, the rest in the backward pass.
pub fn attention_flops(config: &ModelConfig, seq: u64) -> u64 {
    let flops = |layer: &LayerConfig| {
        let features = (config.num_attention_heads * layer.head_dim) as u64;
        let window = layer.sliding_window.map_or(seq, |window| seq.min(window as u64));
        // The first `window` queries attend to 1, 2, ... keys, the others to `window`.
        let pairs = window * (window + 1) / 2 + (seq - window) * window;
        12 * features * pairs
    };
    config.layers.iter().map(flops).sum()
}
