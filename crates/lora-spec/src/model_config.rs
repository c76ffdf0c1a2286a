//! `config.json` of a base model, as Transformers 4 and 5 write it, and the modules and tensors
//! that it implies.

mod architecture;
mod fields;
mod gemma4;
mod rope;
mod windows;

use std::f64::consts::FRAC_1_SQRT_2;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

pub use self::architecture::Architecture;
use self::fields::Fields;
pub use self::rope::{PositionScaling, Rope, RopeScaling};
use crate::{BlockConfig, LinearModule, NormModule, PerLayerEmbeddingConfig, SourceDir, file_names};

/// The contents of `config.json` for a dense decoder. A property in which architectures differ is a
/// field here.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The architecture.
    pub architecture: Architecture,
    /// The name of the decoder in Transformers' class, which is that of a tower in a multimodal
    /// model. Elsewhere it is called `model`.
    pub module_root: &'static str,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Activation of the MLP's gate.
    pub hidden_act: ActivationFunction,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of rows of the embedding.
    pub vocab_size: usize,
    /// The decoder blocks, with what differs between them.
    pub layers: Vec<LayerConfig>,
    /// The rotary embeddings of the blocks.
    pub ropes: Vec<Rope>,
    /// Whether one module projects queries, keys and values (`qkv_proj`).
    pub fused_qkv: bool,
    /// The modules of the MLP.
    pub mlp_modules: MlpModules,
    /// Where the norms of a block are.
    pub norms: NormPlaces,
    /// The kind of the norms.
    pub norm_kind: NormKind,
    /// Whether norms have biases.
    pub norm_bias: bool,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Number that is added to the weights of norms.
    pub norm_offset: f64,
    /// The norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether the values of each head are normalized, without a weight.
    pub normalizes_values: bool,
    /// Whether the output of each block has a factor, the tensor `layer_scalar`.
    pub scales_blocks: bool,
    /// Number of features of each block's own embedding of the tokens.
    pub layer_input_size: Option<usize>,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Factor of the products of queries and keys.
    pub attention_scale: f64,
    /// Bound of the scores of attention, which become `c tanh(s / c)`.
    pub attention_softcap: Option<f64>,
    /// Factor of the embeddings.
    pub embedding_multiplier: f64,
    /// Factor of the outputs of attention and MLP, which are added to the residual stream.
    pub residual_multiplier: f64,
    /// Factor of the logits.
    pub logit_scale: f64,
    /// Bound of the logits, which become `c tanh(z / c)`.
    pub logit_softcap: Option<f64>,
    /// Number of positions for which the model was trained.
    pub max_position_embeddings: usize,
}

/// What differs between the blocks of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerConfig {
    /// Number of key/value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Number of features of a head; even.
    pub head_dim: usize,
    /// Whether the outputs of the keys' projection are the values too.
    pub values_are_keys: bool,
    /// Index of an earlier block whose keys and values the block shares.
    pub kv_source: Option<usize>,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of positions to which a token attends, itself included; `None`: all earlier ones.
    pub sliding_window: Option<usize>,
    /// The rotary embeddings, as indices into [`ModelConfig::ropes`]; `None`: the block has no
    /// positions.
    pub rope: Option<LayerRope>,
}

/// The rotary embeddings of a block, as indices into [`ModelConfig::ropes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerRope {
    /// That of the queries.
    pub queries: usize,
    /// That of the keys.
    pub keys: usize,
}

/// The modules of a block's MLP, by their names in the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlpModules {
    /// The gate and the gated values: a module for each, or one for both. Without a gate, the
    /// module before the activation.
    pub gate_up: &'static [&'static str],
    /// Whether there is a gate.
    pub is_gated: bool,
    /// The output.
    pub down: &'static str,
}

/// Where the norms of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlaces {
    /// Before attention and before the MLP.
    Before,
    /// After attention and after the MLP, before their outputs are added to the residual stream.
    After,
    /// Before and after attention and the MLP.
    BeforeAndAfter,
    /// Before attention and the MLP, which have the same input and run side by side.
    Parallel,
}

/// The kind of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm (arXiv 1910.07467).
    Rms,
    /// LayerNorm (arXiv 1607.06450).
    Layer,
}

/// The norm of queries and keys before the rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// There is none.
    None,
    /// Each head is normalized.
    Heads,
    /// All heads are normalized together.
    All,
}

/// Activation of the MLP's gate, by Transformers' `hidden_act`. Other names are those of the same
/// functions in Transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum ActivationFunction {
    /// `silu`: `x sigmoid(x)`.
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    /// `gelu_pytorch_tanh`: `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`.
    #[serde(
        rename = "gelu_pytorch_tanh",
        alias = "gelu_new",
        alias = "gelu_fast",
        alias = "gelu_accurate",
        alias = "gelu_python_tanh"
    )]
    GeluTanh,
}

/// An error in a `config.json`.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {message}", name = name.display())]
pub struct ModelConfigError {
    /// Name of the file.
    pub name: PathBuf,
    /// The field, why it is invalid, and what would be right.
    pub message: String,
}

/// Blocks of the largest model that is read; real models have about a hundred.
const MAX_LAYERS: usize = 10_000;

/// The error of an invalid `config.json`. Python writes numbers that JSON does not have.
fn invalid_json(text: &str, error: &serde_json::Error) -> String {
    let (line, column) = (error.line(), error.column());
    let rest = text.lines().nth(line.saturating_sub(1)).and_then(|text| text.get(column.saturating_sub(1)..));
    let python = ["NaN", "Infinity"].into_iter();
    let found = rest.and_then(|rest| python.clone().find(|name| rest.starts_with(name)));
    match found {
        Some(name) => format!("line {line}: {name} is not a number of JSON"),
        None => format!("line {line}: {error}"),
    }
}

impl ModelConfig {
    /// Reads `config.json` in the directory of a base model.
    ///
    /// # Errors
    /// The directory does not exist, or the file cannot be read or is not supported.
    pub fn read(base: &SourceDir) -> Result<Self, ModelConfigError> {
        let file = base.file(file_names::MODEL_CONFIG);
        let fail = |message: String| ModelConfigError { name: file.name().to_owned(), message };
        if !base.exists() {
            return Err(ModelConfigError {
                name: base.name().to_owned(),
                message: "model.base is not a directory".into(),
            });
        }
        let text = file.read_to_string().map_err(|e| fail(e.to_string()))?;
        let adapter = base.file(file_names::ADAPTER_CONFIG);
        if !adapter.is_absent() {
            let message = "is in the directory of the base: Transformers would load this adapter with it; \
                           move it away, or merge it (loractl merge)";
            return Err(ModelConfigError { name: adapter.name().to_owned(), message: message.into() });
        }
        Self::parse(&text).map_err(fail)
    }

    /// Parses the text of a `config.json`. An error names the field.
    pub fn parse(text: &str) -> Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|error| invalid_json(text, &error))?;
        if let Some(file) = json.get("transformers_weights").filter(|file| !file.is_null()) {
            return Err(format!(
                "transformers_weights: {file} is not supported; name the file {} and remove the key",
                file_names::MODEL_WEIGHTS
            ));
        }
        match architecture::text_config(&json)? {
            None => Self::from_json(&json),
            Some(tower) => {
                let tower = Self::from_json(&tower).map_err(|error| format!("text_config.{error}"))?;
                Ok(Self { module_root: "model.language_model", ..tower })
            }
        }
    }

    fn from_json(json: &Value) -> Result<Self, String> {
        let fields = Fields(json);
        let architecture = Architecture::of(json)?;
        let defaults = architecture.defaults();
        if let Some(quantization) = fields.get("quantization_config") {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or_default();
            if method != "bitsandbytes" {
                return Err(format!(
                    "quantization_config.quant_method: {method:?} is not supported; \
                     supported: \"bitsandbytes\", or a dense base"
                ));
            }
        }
        let field = defaults.hidden_act;
        let hidden_act = match fields.get(field) {
            None => defaults.activation,
            Some(named) => ActivationFunction::deserialize(named).map_err(|_| {
                format!("{field}: {named} is not supported; supported: \"silu\", \"gelu_pytorch_tanh\"")
            })?,
        };
        if fields.number("attention_dropout")?.unwrap_or(0.0) != 0.0 {
            return Err("attention_dropout: must be 0; dropout of attention weights is not supported".into());
        }
        if fields.flag("is_causal")? == Some(false) {
            return Err("is_causal: must be true; attention to later tokens is not supported".into());
        }
        if architecture != Architecture::Gemma4 && fields.get("per_layer_config").is_some() {
            return Err("per_layer_config: is supported for Gemma 4 only".into());
        }
        let layers = fields.count("num_hidden_layers")?;
        if layers > MAX_LAYERS {
            return Err(format!("num_hidden_layers: {layers} is more than {MAX_LAYERS}"));
        }
        let hidden_size = fields.count("hidden_size")?;
        let num_attention_heads = fields.count_or("num_attention_heads", defaults.num_attention_heads)?;
        // Transformers 4 writes null where there is a key/value head for each query head.
        let num_key_value_heads = match fields.optional_count("num_key_value_heads")? {
            Some(heads) => heads,
            None if fields.is_null("num_key_value_heads") => num_attention_heads,
            None => defaults.num_key_value_heads.unwrap_or(num_attention_heads),
        };
        check_kv_heads("num_key_value_heads", num_key_value_heads, num_attention_heads)?;
        let head_dim = match fields.optional_count("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            None => {
                return Err(format!(
                    "num_attention_heads: {num_attention_heads} does not divide hidden_size {hidden_size}"
                ));
            }
        };
        check_head_dim("head_dim", head_dim)?;
        let (eps_field, default_eps) = defaults.norm_eps;
        let norm_eps = fields.number(eps_field)?.unwrap_or(default_eps);
        if !(norm_eps > 0.0 && norm_eps < 1.0) {
            return Err(format!("{eps_field}: {norm_eps} is not between 0 and 1"));
        }
        let max_position_embeddings =
            fields.count_or("max_position_embeddings", Some(defaults.max_position_embeddings))?;
        let (width, default_width) = defaults.intermediate_size;
        let layer = LayerConfig {
            num_key_value_heads,
            head_dim,
            values_are_keys: false,
            kv_source: None,
            intermediate_size: fields.count_or(width, default_width)?,
            sliding_window: None,
            rope: None,
        };
        let mut config = Self {
            architecture,
            module_root: "model",
            hidden_size,
            hidden_act,
            num_attention_heads,
            vocab_size: fields.count_or("vocab_size", defaults.vocab_size)?,
            layers: vec![layer; layers],
            ropes: Vec::new(),
            fused_qkv: false,
            mlp_modules: MlpModules {
                gate_up: &["mlp.gate_proj", "mlp.up_proj"],
                is_gated: true,
                down: "mlp.down_proj",
            },
            norms: NormPlaces::Before,
            norm_kind: NormKind::Rms,
            norm_bias: false,
            norm_eps,
            norm_offset: 0.0,
            qk_norm: QkNorm::None,
            normalizes_values: false,
            scales_blocks: false,
            layer_input_size: None,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            attention_scale: 1.0 / (head_dim as f64).sqrt(),
            attention_softcap: None,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
            max_position_embeddings,
        };
        architecture.adapt(&mut config, fields)?;
        Ok(config)
    }

    /// Returns the index of a rotary embedding, which is added if it is new.
    fn add_rope(&mut self, rope: Rope) -> usize {
        let known = self.ropes.iter().position(|known| *known == rope);
        known.unwrap_or_else(|| {
            self.ropes.push(rope);
            self.ropes.len() - 1
        })
    }

    /// Iterates over the descriptions of the decoder blocks.
    pub fn blocks(&self) -> impl Iterator<Item = BlockConfig> {
        (0..self.layers.len()).map(|layer| BlockConfig::new(self, layer))
    }

    /// Describes the norm after the last block. The factor of the logits is part of it.
    pub fn final_norm(&self) -> NormModule {
        NormModule {
            name: "model.norm".into(),
            kind: self.norm_kind,
            features: self.hidden_size,
            has_weight: true,
            has_bias: self.norm_bias,
            eps: self.norm_eps,
            offset: self.norm_offset,
            scale: self.logit_scale,
        }
    }

    /// Describes the embeddings of the blocks.
    pub fn per_layer_embedding(&self) -> Option<PerLayerEmbeddingConfig> {
        let features = self.layer_input_size?;
        let hidden = self.hidden_size as f64;
        Some(PerLayerEmbeddingConfig {
            table: "model.embed_tokens_per_layer".into(),
            vocab_size: self.vocab_size,
            projection: LinearModule {
                name: "model.per_layer_model_projection".into(),
                layer: 0,
                in_features: self.hidden_size,
                out_features: self.layers.len() * features,
                bias: false,
            },
            norm: NormModule {
                name: "model.per_layer_projection_norm".into(),
                kind: NormKind::Rms,
                features,
                has_weight: true,
                has_bias: false,
                // The projection's output has the factor `1 / sqrt(hidden)`, which changes only
                // epsilon.
                eps: self.norm_eps * hidden,
                offset: 0.0,
                scale: FRAC_1_SQRT_2,
            },
            multiplier: (features as f64).sqrt() * FRAC_1_SQRT_2,
        })
    }

    /// Returns the linear modules of the embeddings and the decoder blocks, in the order of
    /// computation.
    pub fn linear_modules(&self) -> Vec<LinearModule> {
        let of_embedding = self.per_layer_embedding().map(|embedding| embedding.projection);
        of_embedding.into_iter().chain(self.blocks().flat_map(BlockConfig::into_linear_modules)).collect()
    }

    /// Whether Transformers ignores a tensor of a base: the keys and values of a block that shares
    /// those of another one.
    pub(crate) fn ignores(&self, tensor: &str) -> bool {
        let mut sharing = self.layers.iter().enumerate().filter(|(_, layer)| layer.kv_source.is_some());
        sharing.any(|(layer, _)| {
            let module = tensor.strip_prefix(&format!("model.layers.{layer}.self_attn."));
            let names = ["k_proj.", "v_proj.", "k_norm.", "v_norm."];
            module.is_some_and(|module| names.iter().any(|name| module.starts_with(name)))
        })
    }

    /// Whether the decoder is the text tower of a multimodal model.
    pub fn is_multimodal(&self) -> bool {
        self.module_root != "model"
    }

    /// Returns the name of a module in Transformers' class.
    pub fn module_path(&self, module: &LinearModule) -> String {
        format!("{}{}", self.module_root, module.name.strip_prefix("model").unwrap_or(&module.name))
    }

    /// Returns the name and shape of every tensor that the base's files must have.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let scales = self.blocks().filter_map(|block| block.output_scale).map(|name| (name, vec![1]));
        self.parameter_tensors().into_iter().chain(scales).collect()
    }

    /// Returns the name and shape of every tensor that Transformers counts as a parameter.
    fn parameter_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden])];
        for module in self.linear_modules() {
            tensors.push((format!("{}.weight", module.name), vec![module.out_features, module.in_features]));
            if module.bias {
                tensors.push((format!("{}.bias", module.name), vec![module.out_features]));
            }
        }
        let norm = |module: &NormModule| {
            let tensors = [("weight", module.has_weight), ("bias", module.has_bias)].into_iter();
            let existing = tensors.filter(|(_, exists)| *exists);
            existing
                .map(|(part, _)| (format!("{}.{part}", module.name), vec![module.features]))
                .collect::<Vec<_>>()
        };
        for block in self.blocks() {
            tensors.extend(block.norms().flat_map(norm));
        }
        tensors.extend(norm(&self.final_norm()));
        if let Some(embedding) = self.per_layer_embedding() {
            let shape = vec![embedding.vocab_size, embedding.projection.out_features];
            tensors.push((format!("{}.weight", embedding.table), shape));
            tensors.extend(norm(&embedding.norm));
        }
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        tensors
    }

    /// Returns the number of parameters of the base model. A tied head is not counted a second
    /// time.
    pub fn parameters(&self) -> u64 {
        self.parameter_tensors()
            .iter()
            .map(|(_, shape)| shape.iter().map(|&d| d as u64).product::<u64>())
            .sum()
    }
}

/// Checks that a number of key/value heads divides that of the query heads.
fn check_kv_heads(field: &str, kv_heads: usize, heads: usize) -> Result<(), String> {
    match heads.is_multiple_of(kv_heads) {
        true => Ok(()),
        false => Err(format!("{field}: {kv_heads} does not divide num_attention_heads {heads}")),
    }
}

/// Checks that rotary embeddings can rotate the features of a head in pairs.
fn check_head_dim(field: &str, head_dim: usize) -> Result<(), String> {
    match head_dim.is_multiple_of(2) {
        true => Ok(()),
        false => Err(format!("{field}: {head_dim} is odd; it must be even for rotary embeddings")),
    }
}
