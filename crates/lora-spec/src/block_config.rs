//! The description of a decoder block: its modules with their names and shapes, and the settings of
//! its computation.
//!
//! The checks of a base's files, the sizes of weights in the plan, and the model follow this
//! description. A property in which architectures differ is a field here, so that no other code
//! depends on the architecture.

use crate::{
    ActivationFunction, LayerConfig, LayerRope, MlpModules, ModelConfig, NormKind, NormPlaces, QkNorm,
};

/// A decoder block: `h = x + m attn_out_norm(attn(attn_norm(x)))`, then
/// `s layer_input(h + m mlp_out_norm(mlp(mlp_norm(h))))`, without what it does not have. In a
/// parallel block the input of the MLP is that of attention, `attn_norm(x)`.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockConfig {
    /// The norm before attention.
    pub attn_norm: Option<NormModule>,
    /// Attention.
    pub attn: AttentionConfig,
    /// The norm after attention.
    pub attn_out_norm: Option<NormModule>,
    /// The norm before the MLP.
    pub mlp_norm: Option<NormModule>,
    /// The MLP.
    pub mlp: MlpConfig,
    /// The norm after the MLP.
    pub mlp_out_norm: Option<NormModule>,
    /// Whether attention and the MLP have the same input.
    pub is_parallel: bool,
    /// Factor `m` of what is added to the residual stream.
    pub residual_multiplier: f64,
    /// What adds the block's own embedding of the tokens.
    pub layer_input: Option<LayerInputConfig>,
    /// Name of the tensor `[1]` with the factor `s` of the output.
    pub output_scale: Option<String>,
}

/// Grouped-query attention (arXiv 2305.13245).
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Queries `[heads * head_dim, hidden]`, keys and values `[kv_heads * head_dim, hidden]`: a
    /// module for each, or one for all three. No module for the values if they are the keys, and
    /// none for both if they are those of `kv_source`.
    pub qkv_proj: Vec<LinearModule>,
    /// Whether the outputs of the keys' projection, before the norm, are the values too.
    pub values_are_keys: bool,
    /// Index of the block whose keys and values, after the norms and the rotary embedding, this
    /// block shares.
    pub kv_source: Option<usize>,
    /// Whether later blocks share the keys and values of this block.
    pub is_kv_source: bool,
    /// Output: `[hidden, heads * head_dim]`.
    pub o_proj: LinearModule,
    /// The norm of queries before the rotary embedding.
    pub q_norm: Option<NormModule>,
    /// The norm of keys before the rotary embedding.
    pub k_norm: Option<NormModule>,
    /// The norm of values.
    pub v_norm: Option<NormModule>,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Number of features of a head.
    pub head_dim: usize,
    /// Factor of the products of queries and keys.
    pub scale: f64,
    /// Bound of the scores.
    pub softcap: Option<f64>,
    /// The rotary embeddings of queries and keys.
    pub rope: Option<LayerRope>,
    /// Number of positions to which a token attends, itself included; `None`: all earlier ones.
    pub sliding_window: Option<usize>,
}

/// A gated MLP (arXiv 2002.05202): `down_proj(activation(gate_proj(x)) * up_proj(x))`; or without a
/// gate, `down_proj(activation(up_proj(x)))`.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpConfig {
    /// The gate and the values that are gated, each `[intermediate, hidden]`: a module for each, or
    /// one for both. Without a gate, the module before the activation.
    pub gate_up_proj: Vec<LinearModule>,
    /// Whether there is a gate.
    pub is_gated: bool,
    /// Output: `[hidden, intermediate]`.
    pub down_proj: LinearModule,
    /// Activation of the gate.
    pub activation: ActivationFunction,
}

/// The modules that add a block's own embedding `p` of the tokens to the residual stream:
/// `h + out_norm(projection(activation(gate(h)) * p))`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInputConfig {
    /// `[features, hidden]`.
    pub gate: LinearModule,
    /// `[hidden, features]`.
    pub projection: LinearModule,
    /// The norm of the output.
    pub out_norm: NormModule,
    /// Activation of the gate.
    pub activation: ActivationFunction,
}

/// Additional embeddings, of which each block gets its own features:
/// `norm(projection(x)) + multiplier table[token]` for a token with the embedding `x`. The norm is
/// over the features of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct PerLayerEmbeddingConfig {
    /// Name of the module with the table `[vocab_size, blocks * features]`.
    pub table: String,
    /// Number of rows of the table.
    pub vocab_size: usize,
    /// `[blocks * features, hidden]`. It counts as a module of the first block.
    pub projection: LinearModule,
    /// The norm of each block's features.
    pub norm: NormModule,
    /// Factor of the table's rows.
    pub multiplier: f64,
}

/// A frozen linear module of the model, `y = x W^T + b`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearModule {
    /// Full name, such as `model.layers.0.self_attn.q_proj`. In Transformers' class it may be
    /// another one ([`ModelConfig::module_path`]).
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

/// A norm: `scale ((w + offset) x / sqrt(mean(x^2) + eps) + b)`, without the weight or the bias if
/// there is none. A LayerNorm subtracts the mean from `x` before.
#[derive(Debug, Clone, PartialEq)]
pub struct NormModule {
    /// Full name, such as `model.layers.0.input_layernorm`.
    pub name: String,
    /// RMSNorm or LayerNorm.
    pub kind: NormKind,
    /// Number of features that are normalized together, which is the length of the weight.
    pub features: usize,
    /// Whether there is a weight `w`.
    pub has_weight: bool,
    /// Whether there is a bias `b`.
    pub has_bias: bool,
    /// Epsilon.
    pub eps: f64,
    /// Number that is added to the weight.
    pub offset: f64,
    /// Factor of the output.
    pub scale: f64,
}

impl NormModule {
    /// Whether the factors of the features are others than the weight.
    pub fn has_own_factors(&self) -> bool {
        !self.has_weight || self.offset != 0.0 || self.scale != 1.0
    }
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
        let norm = |name: &str, features| NormModule {
            name: format!("model.layers.{layer}.{name}"),
            kind: model.norm_kind,
            features,
            has_weight: true,
            has_bias: model.norm_bias,
            eps: model.norm_eps,
            offset: model.norm_offset,
            scale: 1.0,
        };
        let LayerConfig {
            num_key_value_heads: kv_heads,
            head_dim,
            values_are_keys,
            kv_source,
            intermediate_size,
            sliding_window,
            rope,
        } = model.layers[layer];
        let (hidden, heads) = (model.hidden_size, model.num_attention_heads);
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let qk_norm = |name: &str, features| match model.qk_norm {
            QkNorm::None => None,
            QkNorm::Heads => Some(norm(name, head_dim)),
            QkNorm::All => Some(norm(name, features)),
        };
        let without_weight = |name: &str| NormModule { has_weight: false, ..norm(name, head_dim) };
        let residual_norm = |name: &str| Some(norm(name, hidden));
        let [attn_norm, attn_out_norm, mlp_norm, mlp_out_norm] = match model.norms {
            NormPlaces::Before => {
                [residual_norm("input_layernorm"), None, residual_norm("post_attention_layernorm"), None]
            }
            NormPlaces::Parallel => [residual_norm("input_layernorm"), None, None, None],
            NormPlaces::After => [
                None,
                residual_norm("post_attention_layernorm"),
                None,
                residual_norm("post_feedforward_layernorm"),
            ],
            NormPlaces::BeforeAndAfter => [
                residual_norm("input_layernorm"),
                residual_norm("post_attention_layernorm"),
                residual_norm("pre_feedforward_layernorm"),
                residual_norm("post_feedforward_layernorm"),
            ],
        };
        let qkv_proj = if kv_source.is_some() {
            vec![linear("self_attn.q_proj", hidden, q, model.qkv_bias)]
        } else if model.fused_qkv {
            vec![linear("self_attn.qkv_proj", hidden, q + 2 * kv, model.qkv_bias)]
        } else {
            let mut modules = vec![
                linear("self_attn.q_proj", hidden, q, model.qkv_bias),
                linear("self_attn.k_proj", hidden, kv, model.qkv_bias),
            ];
            if !values_are_keys {
                modules.push(linear("self_attn.v_proj", hidden, kv, model.qkv_bias));
            }
            modules
        };
        let MlpModules { gate_up, is_gated, down } = model.mlp_modules;
        let gate_up_width = if is_gated { 2 * intermediate_size / gate_up.len() } else { intermediate_size };
        let gate_up_proj =
            gate_up.iter().map(|name| linear(name, hidden, gate_up_width, model.mlp_bias)).collect();
        Self {
            attn_norm,
            attn: AttentionConfig {
                qkv_proj,
                o_proj: linear("self_attn.o_proj", q, hidden, model.o_bias),
                q_norm: qk_norm("self_attn.q_norm", q),
                k_norm: qk_norm("self_attn.k_norm", kv).filter(|_| kv_source.is_none()),
                v_norm: (model.normalizes_values && kv_source.is_none())
                    .then(|| without_weight("self_attn.v_norm")),
                values_are_keys,
                kv_source,
                is_kv_source: model.layers.iter().any(|other| other.kv_source == Some(layer)),
                heads,
                kv_heads,
                head_dim,
                scale: model.attention_scale,
                softcap: model.attention_softcap,
                rope,
                sliding_window,
            },
            attn_out_norm,
            mlp_norm,
            mlp: MlpConfig {
                gate_up_proj,
                is_gated,
                down_proj: linear(down, intermediate_size, hidden, model.mlp_bias),
                activation: model.hidden_act,
            },
            mlp_out_norm,
            is_parallel: model.norms == NormPlaces::Parallel,
            residual_multiplier: model.residual_multiplier,
            layer_input: model.layer_input_size.map(|features| LayerInputConfig {
                gate: linear("per_layer_input_gate", hidden, features, false),
                projection: linear("per_layer_projection", features, hidden, false),
                out_norm: norm("post_per_layer_input_norm", hidden),
                activation: model.hidden_act,
            }),
            output_scale: model.scales_blocks.then(|| format!("model.layers.{layer}.layer_scalar")),
        }
    }

    /// Iterates over the linear modules in the order of computation.
    pub fn into_linear_modules(self) -> impl Iterator<Item = LinearModule> {
        let AttentionConfig { qkv_proj, o_proj, .. } = self.attn;
        let MlpConfig { gate_up_proj, down_proj, .. } = self.mlp;
        let layer_input = self.layer_input.map(|input| [input.gate, input.projection]);
        let all = qkv_proj.into_iter().chain([o_proj]).chain(gate_up_proj).chain([down_proj]);
        all.chain(layer_input.into_iter().flatten())
    }

    /// Iterates over the norms in the order of computation.
    pub fn norms(&self) -> impl Iterator<Item = &NormModule> {
        let AttentionConfig { q_norm, k_norm, v_norm, .. } = &self.attn;
        let Self { attn_norm, attn_out_norm, mlp_norm, mlp_out_norm, .. } = self;
        let layer_input = self.layer_input.as_ref().map(|input| &input.out_norm);
        let all = [attn_norm, q_norm, k_norm, v_norm, attn_out_norm, mlp_norm, mlp_out_norm];
        all.into_iter().flatten().chain(layer_input)
    }
}
