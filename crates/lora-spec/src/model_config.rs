//! `config.json` of a base model, as Transformers 4 and 5 write it, and the modules and tensors
//! that it implies.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use crate::{BlockConfig, LinearModule, NormModule, SourceDir, file_names};

/// The contents of `config.json` for a dense decoder of the Llama family.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The architecture.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Activation of the MLP's gate.
    pub hidden_act: ActivationFunction,
    /// Number of decoder blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key/value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Number of features of a head; even.
    pub head_dim: usize,
    /// Number of rows of the embedding.
    pub vocab_size: usize,
    /// RMSNorm's epsilon.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Number of positions for which the model was trained.
    pub max_position_embeddings: usize,
    /// For each block, the number of positions to which a token attends, itself included; `None`:
    /// all earlier ones.
    pub sliding_windows: Vec<Option<usize>>,
}

/// Supported architectures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM` (Qwen2 and Qwen2.5).
    Qwen2,
}

const ARCHITECTURES: [(&str, Architecture); 2] =
    [("LlamaForCausalLM", Architecture::Llama), ("Qwen2ForCausalLM", Architecture::Qwen2)];

/// Activation of the MLP's gate, by Transformers' `hidden_act`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum ActivationFunction {
    /// `silu`: `x sigmoid(x)`.
    #[serde(rename = "silu")]
    Silu,
    /// `gelu_pytorch_tanh`: `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`.
    #[serde(rename = "gelu_pytorch_tanh")]
    GeluTanh,
}

/// Rotary position embedding (RoFormer, arXiv 2104.09864).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Scaling of the frequencies for longer contexts.
    pub scaling: RopeScaling,
}

/// Context extension of the rotary frequencies, by Transformers' `rope_type`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// `default`: no scaling.
    None,
    /// `linear`: every frequency is divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// `llama3`: low frequencies are divided by `factor`, high frequencies are kept, and a ramp is
    /// between them (Llama 3.1).
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Frequencies with wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Frequencies with wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the original model.
        original_max_position_embeddings: f64,
    },
}

/// An error in a `config.json`.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {message}", path = path.display())]
pub struct ModelConfigError {
    /// Name of the file.
    pub path: PathBuf,
    /// The field, why it is invalid, and what would be right.
    pub message: String,
}

impl ModelConfig {
    /// Reads `config.json` in the directory of a base model.
    ///
    /// # Errors
    /// The directory does not exist, or the file cannot be read or is not supported.
    pub fn read(base: &SourceDir) -> Result<Self, ModelConfigError> {
        let file = base.file(file_names::MODEL_CONFIG);
        let fail = |message: String| ModelConfigError { path: file.name().to_owned(), message };
        if !base.exists() {
            return Err(ModelConfigError {
                path: base.name().to_owned(),
                message: "model.base is not a directory".into(),
            });
        }
        let text = std::fs::read_to_string(file.path()).map_err(|e| fail(e.to_string()))?;
        Self::parse(&text).map_err(fail)
    }

    /// Parses the text of a `config.json`. An error names the field.
    pub fn parse(text: &str) -> Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|e| format!("line {}: {e}", e.line()))?;
        let fields = Fields(&json);
        let architecture = architecture(&json)?;
        if let Some(quantization) = fields.get("quantization_config") {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or_default();
            if method != "bitsandbytes" {
                return Err(format!(
                    "quantization_config.quant_method: {method:?} is not supported; \
                     supported: \"bitsandbytes\", or a dense base"
                ));
            }
        }
        let hidden_act = match fields.get("hidden_act") {
            None => ActivationFunction::Silu,
            Some(named) => ActivationFunction::deserialize(named).map_err(|_| {
                format!("hidden_act: {named} is not supported; supported: \"silu\", \"gelu_pytorch_tanh\"")
            })?,
        };
        if fields.number("attention_dropout")?.unwrap_or(0.0) != 0.0 {
            return Err("attention_dropout: must be 0; dropout of attention weights is not supported".into());
        }
        let hidden_size = fields.count("hidden_size")?;
        let num_attention_heads = fields.count("num_attention_heads")?;
        let num_key_value_heads =
            fields.optional_count("num_key_value_heads")?.unwrap_or(num_attention_heads);
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(format!(
                "num_key_value_heads: {num_key_value_heads} does not divide \
                 num_attention_heads {num_attention_heads}"
            ));
        }
        let head_dim = match fields.optional_count("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            None => {
                return Err(format!(
                    "num_attention_heads: {num_attention_heads} does not divide hidden_size {hidden_size}"
                ));
            }
        };
        if head_dim % 2 != 0 {
            return Err(format!("head_dim: {head_dim} is odd; it must be even for rotary embeddings"));
        }
        let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
        let (qkv_bias, o_bias) = match architecture {
            Architecture::Llama => (attention_bias, attention_bias),
            Architecture::Qwen2 => (true, false),
        };
        let rms_norm_eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(format!("rms_norm_eps: {rms_norm_eps} is not between 0 and 1"));
        }
        let num_hidden_layers = fields.count("num_hidden_layers")?;
        Ok(Self {
            architecture,
            sliding_windows: match architecture {
                Architecture::Llama => vec![None; num_hidden_layers],
                Architecture::Qwen2 => qwen2_windows(&fields, num_hidden_layers)?,
            },
            hidden_size,
            intermediate_size: fields.count("intermediate_size")?,
            hidden_act,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.count("vocab_size")?,
            rms_norm_eps,
            rope: rope(&json)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias,
            o_bias,
            mlp_bias: architecture == Architecture::Llama && fields.flag("mlp_bias")?.unwrap_or(false),
            max_position_embeddings: fields.optional_count("max_position_embeddings")?.unwrap_or(2048),
        })
    }

    /// Returns the number of positions to which a token of block `layer` attends, itself included;
    /// `None`: all earlier ones.
    pub fn sliding_window(&self, layer: usize) -> Option<usize> {
        self.sliding_windows.get(layer).copied().flatten()
    }

    /// Iterates over the descriptions of the decoder blocks.
    pub fn blocks(&self) -> impl Iterator<Item = BlockConfig> {
        (0..self.num_hidden_layers).map(|layer| BlockConfig::new(self, layer))
    }

    /// Describes the norm after the last block.
    pub fn final_norm(&self) -> NormModule {
        self.norm("model.norm".into())
    }

    /// Describes a norm of the residual stream.
    pub(crate) fn norm(&self, name: String) -> NormModule {
        NormModule { name, features: self.hidden_size, eps: self.rms_norm_eps }
    }

    /// Returns the linear modules of the decoder blocks, in the order of computation.
    pub fn linear_modules(&self) -> Vec<LinearModule> {
        self.blocks().flat_map(BlockConfig::into_linear_modules).collect()
    }

    /// Returns the name and shape of every tensor that the checkpoint must have.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden])];
        for module in self.linear_modules() {
            tensors.push((format!("{}.weight", module.name), vec![module.out_features, module.in_features]));
            if module.bias {
                tensors.push((format!("{}.bias", module.name), vec![module.out_features]));
            }
        }
        let norm = |module: &NormModule| (format!("{}.weight", module.name), vec![module.features]);
        for block in self.blocks() {
            tensors.extend(block.norms().map(norm));
        }
        tensors.push(norm(&self.final_norm()));
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        tensors
    }

    /// Returns the number of parameters of the base model. A tied head is not counted a second
    /// time.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(|(_, shape)| shape.iter().map(|&d| d as u64).product::<u64>()).sum()
    }
}

fn architecture(json: &Value) -> Result<Architecture, String> {
    let supported = || ARCHITECTURES.map(|(name, _)| name).join(", ");
    let name = json.pointer("/architectures/0").and_then(Value::as_str);
    let by_type = match json.get("model_type").and_then(Value::as_str) {
        Some("llama") => Some("LlamaForCausalLM"),
        Some("qwen2") => Some("Qwen2ForCausalLM"),
        other => other,
    };
    let Some(name) = name.or(by_type) else {
        return Err(format!("architectures: is missing; supported: {}", supported()));
    };
    ARCHITECTURES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, architecture)| *architecture)
        .ok_or_else(|| format!("architectures: {name} is not supported; supported: {}", supported()))
}

/// Reads the sliding windows of the blocks. Transformers 5 lists the blocks in `layer_types`. In
/// earlier versions the blocks from index `max_window_layers` have the window.
fn qwen2_windows(fields: &Fields, layers: usize) -> Result<Vec<Option<usize>>, String> {
    if !fields.flag("use_sliding_window")?.unwrap_or(false) {
        return Ok(vec![None; layers]);
    }
    let window = fields.optional_count("sliding_window")?.unwrap_or(4096);
    let Some(types) = fields.get("layer_types") else {
        let first = fields.number("max_window_layers")?.unwrap_or(28.0);
        return Ok((0..layers).map(|layer| (layer as f64 >= first).then_some(window)).collect());
    };
    let types = types.as_array().filter(|types| types.len() == layers);
    let types = types.ok_or(format!("layer_types: must be a list of {layers}, one for each block"))?;
    let window_of = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => Ok(Some(window)),
        _ => Err(format!(
            "layer_types: {kind} is not supported; supported: \"full_attention\", \"sliding_attention\""
        )),
    };
    types.iter().map(window_of).collect()
}

/// Reads the rotary embedding: from `rope_parameters` (Transformers 5), or from `rope_theta` and
/// `rope_scaling` (Transformers 4).
fn rope(json: &Value) -> Result<Rope, String> {
    let given = |key: &str| json.get(key).filter(|v| !v.is_null());
    let (field, parameters) = match given("rope_parameters") {
        Some(parameters) => ("rope_parameters", parameters),
        None => ("rope_scaling", given("rope_scaling").unwrap_or(&Value::Null)),
    };
    let number = |key: &str| -> Result<f64, String> {
        let value = parameters.get(key).and_then(Value::as_f64);
        value.filter(|v| v.is_finite() && *v > 0.0).ok_or(format!("{field}.{key}: must be a positive number"))
    };
    let theta = match parameters.get("rope_theta").or_else(|| given("rope_theta")) {
        None => 10_000.0,
        Some(theta) => theta.as_f64().filter(|t| *t > 0.0).ok_or("rope_theta: must be a positive number")?,
    };
    let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).and_then(Value::as_str);
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")?,
        },
        other => {
            return Err(format!(
                "{field}.rope_type: {other:?} is not supported; supported: default, linear, llama3"
            ));
        }
    };
    Ok(Rope { theta, scaling })
}

/// Typed access to the fields of a JSON object. A field with the value null counts as missing.
struct Fields<'a>(&'a Value);

impl Fields<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn count(&self, key: &str) -> Result<usize, String> {
        self.optional_count(key)?.ok_or_else(|| format!("{key}: is missing"))
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>, String> {
        self.get(key)
            .map(|v| {
                let count = v.as_u64().filter(|c| (1..=1 << 24).contains(c));
                let message = || format!("{key}: {v} is not a whole number from 1 to {}", 1 << 24);
                count.map(|c| c as usize).ok_or_else(message)
            })
            .transpose()
    }

    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        self.get(key).map(|v| v.as_f64().ok_or_else(|| format!("{key}: {v} is not a number"))).transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.get(key)
            .map(|v| v.as_bool().ok_or_else(|| format!("{key}: {v} is neither true nor false")))
            .transpose()
    }
}
