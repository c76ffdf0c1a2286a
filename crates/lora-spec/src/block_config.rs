//! The description of a decoder block: its modules with their names and shapes, and the settings of
//! its computation.
//!
//! The checks of a checkpoint, the sizes of weights in the plan, and the model follow this
//! description. A property in which architectures differ is a field here, so that no other code
//! depends on the architecture. The plan of activations (`lora-plan`, `model_footprint.rs`) has the
//! two norms of this block in its formula.

use crate::{ActivationFunction, ModelConfig};

/// A decoder block: `h = x + attn(input_norm(x))`, then `h + mlp(post_attention_norm(h))`.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockConfig {
    /// The norm before attention.
    pub input_norm: NormModule,
    /// Attention.
    pub attn: AttentionConfig,
    /// The norm before the MLP.
    pub post_attention_norm: NormModule,
    /// The MLP.
    pub mlp: MlpConfig,
}

/// Grouped-query attention (arXiv 2305.13245) with rotary embeddings of queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Queries: `[heads * head_dim, hidden]`.
    pub q_proj: LinearModule,
    /// Keys: `[kv_heads * head_dim, hidden]`.
    pub k_proj: LinearModule,
    /// Values: `[kv_heads * head_dim, hidden]`.
    pub v_proj: LinearModule,
    /// Output: `[hidden, heads * head_dim]`.
    pub o_proj: LinearModule,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Number of features of a head.
    pub head_dim: usize,
    /// Number of positions to which a token attends, itself included; `None`: all earlier ones.
    pub sliding_window: Option<usize>,
}

/// A gated MLP (arXiv 2002.05202): `down_proj(activation(gate_proj(x)) * up_proj(x))`.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpConfig {
    /// The gate: `[intermediate, hidden]`.
    pub gate_proj: LinearModule,
    /// The values that are gated: `[intermediate, hidden]`.
    pub up_proj: LinearModule,
    /// Output: `[hidden, intermediate]`.
    pub down_proj: LinearModule,
    /// Activation of the gate.
    pub activation: ActivationFunction,
}

/// A frozen linear module of the model, `y = x W^T + b`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearModule {
    /// Full name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Index of its decoder block.
    pub layer: usize,
    /// Width of `x`.
    pub in_features: usize,
    /// Width of `y`.
    pub out_features: usize,
    /// Whether the module has a bias `b`.
    pub bias: bool,
}

/// An RMSNorm.
#[derive(Debug, Clone, PartialEq)]
pub struct NormModule {
    /// Full name, such as `model.layers.0.input_layernorm`.
    pub name: String,
    /// Number of elements of the weight.
    pub features: usize,
    /// Epsilon.
    pub eps: f64,
}

impl BlockConfig {
    /// Describes block `layer` of `model`.
    pub(crate) fn new(model: &ModelConfig, layer: usize) -> Self {
        let linear = |name: &str, in_features, out_features, bias| LinearModule {
            name: format!("model.layers.{layer}.{name}"),
            layer,
            in_features,
            out_features,
            bias,
        };
        let norm = |name: &str| model.norm(format!("model.layers.{layer}.{name}"));
        let (hidden, intermediate) = (model.hidden_size, model.intermediate_size);
        let (heads, kv_heads) = (model.num_attention_heads, model.num_key_value_heads);
        let (q, kv) = (heads * model.head_dim, kv_heads * model.head_dim);
        Self {
            input_norm: norm("input_layernorm"),
            attn: AttentionConfig {
                q_proj: linear("self_attn.q_proj", hidden, q, model.qkv_bias),
                k_proj: linear("self_attn.k_proj", hidden, kv, model.qkv_bias),
                v_proj: linear("self_attn.v_proj", hidden, kv, model.qkv_bias),
                o_proj: linear("self_attn.o_proj", q, hidden, model.o_bias),
                heads,
                kv_heads,
                head_dim: model.head_dim,
                sliding_window: model.sliding_window(layer),
            },
            post_attention_norm: norm("post_attention_layernorm"),
            mlp: MlpConfig {
                gate_proj: linear("mlp.gate_proj", hidden, intermediate, model.mlp_bias),
                up_proj: linear("mlp.up_proj", hidden, intermediate, model.mlp_bias),
                down_proj: linear("mlp.down_proj", intermediate, hidden, model.mlp_bias),
                activation: model.hidden_act,
            },
        }
    }

    /// Returns the linear modules in the order of computation.
    pub fn into_linear_modules(self) -> [LinearModule; 7] {
        let AttentionConfig { q_proj, k_proj, v_proj, o_proj, .. } = self.attn;
        let MlpConfig { gate_proj, up_proj, down_proj, .. } = self.mlp;
        [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    }

    /// Returns the norms in the order of computation.
    pub fn norms(&self) -> [&NormModule; 2] {
        [&self.input_norm, &self.post_attention_norm]
    }
}
