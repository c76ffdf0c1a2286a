//! Operations of training: those that the model asks for.
//!
//! Counted are the products of matrices, a multiplication with its addition as 2 operations; recomputation is not counted,
//! whoever recomputes. A token of a row of `S` costs
//!
//! ```text
//! 4 N_frozen + 6 N_adapter + 6 L H D (S + 1)
//! ```
//!
//! - `N_frozen`: elements of the blocks' matrices and of the head (also where it is the embedding, whose rows are looked up and
//!   cost nothing). Forward one product, backward one: the gradient of the input. No gradient of the weights.
//! - `N_adapter`: elements of the LoRA matrices. Forward one product, backward two.
//! - The last term is causal attention over `L` blocks of `H` query heads of `D` features: a query and a key that it sees cost
//!   `2 D` operations a head in each of two products forward (scores, values) and four backward (gradients of queries, keys,
//!   values and scores), and a token sees `(S + 1) / 2` keys in the mean. Windows make it see fewer.

use crate::ModelConfig;

/// Operations of training on one row of `seq` tokens with an adapter of `adapter` parameters.
pub fn row_flops(config: &ModelConfig, adapter: u64, seq: u64) -> u64 {
    let blocks: u64 =
        config.linear_modules().iter().map(|m| m.in_features as u64 * m.out_features as u64).sum();
    let head = config.vocab_size as u64 * config.hidden_size as u64;
    seq * (4 * (blocks + head) + 6 * adapter) + attention_flops(config, seq)
}

/// What of [`row_flops`] is attention's: a third in the forward pass, the rest in the backward pass.
pub fn attention_flops(config: &ModelConfig, seq: u64) -> u64 {
    let features = (config.num_attention_heads * config.head_dim) as u64;
    let pairs = |layer| {
        let window = config.sliding_window(layer).map_or(seq, |window| seq.min(window as u64));
        // The first `window` queries see 1, 2, ... keys, the others `window`.
        window * (window + 1) / 2 + (seq - window) * window
    };
    (0..config.num_hidden_layers).map(|layer| 12 * features * pairs(layer)).sum()
}
