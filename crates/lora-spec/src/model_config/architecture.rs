//! The supported architectures: how the `config.json` of each one differs from Llama's.

use serde_json::Value;

use super::fields::Fields;
use super::gemma4;
use super::rope::RopeParameters;
use super::windows::{qwen_windows, windows_by_type};
use super::{ActivationFunction, LayerRope, MlpModules, ModelConfig, NormKind, NormPlaces, QkNorm, Rope};

/// Supported architectures, by their class in Transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`: Llama, and models of the same shape.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM` (Qwen2 and Qwen2.5).
    Qwen2,
    /// `Qwen3ForCausalLM`.
    Qwen3,
    /// `SmolLM3ForCausalLM`.
    SmolLm3,
    /// `Olmo2ForCausalLM`.
    Olmo2,
    /// `Olmo3ForCausalLM`.
    Olmo3,
    /// `GraniteForCausalLM`: Granite 3.
    Granite,
    /// `GraniteMoeHybridForCausalLM` without Mamba layers and experts: Granite 4, dense.
    GraniteHybrid,
    /// `Gemma2ForCausalLM`.
    Gemma2,
    /// `Gemma3ForCausalLM`: Gemma 3 without its vision tower.
    Gemma3,
    /// `Gemma4ForCausalLM`: dense Gemma 4 without its other towers.
    Gemma4,
    /// `Phi3ForCausalLM`: Phi-3, Phi-3.5, Phi-4 and Phi-4-mini.
    Phi3,
    /// `Ministral3ForCausalLM`: Ministral 3 without its vision tower.
    Ministral3,
    /// `Starcoder2ForCausalLM`.
    Starcoder2,
    /// `Cohere2ForCausalLM`: Command R7B, Command A.
    Cohere2,
}

/// The supported architectures, with the names in `architectures` and in `model_type`.
const ARCHITECTURES: [(&str, &str, Architecture); 16] = [
    ("LlamaForCausalLM", "llama", Architecture::Llama),
    ("MistralForCausalLM", "mistral", Architecture::Mistral),
    ("Qwen2ForCausalLM", "qwen2", Architecture::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
    ("SmolLM3ForCausalLM", "smollm3", Architecture::SmolLm3),
    ("Olmo2ForCausalLM", "olmo2", Architecture::Olmo2),
    ("Olmo3ForCausalLM", "olmo3", Architecture::Olmo3),
    ("GraniteForCausalLM", "granite", Architecture::Granite),
    ("GraniteMoeHybridForCausalLM", "granitemoehybrid", Architecture::GraniteHybrid),
    ("Gemma2ForCausalLM", "gemma2", Architecture::Gemma2),
    ("Gemma3ForCausalLM", "gemma3_text", Architecture::Gemma3),
    ("Gemma4ForCausalLM", "gemma4_text", Architecture::Gemma4),
    ("Phi3ForCausalLM", "phi3", Architecture::Phi3),
    ("Ministral3ForCausalLM", "ministral3", Architecture::Ministral3),
    ("Starcoder2ForCausalLM", "starcoder2", Architecture::Starcoder2),
    ("Cohere2ForCausalLM", "cohere2", Architecture::Cohere2),
];

/// The values of fields that a `config.json` need not have, where architectures differ.
pub(super) struct Defaults {
    pub(super) vocab_size: Option<usize>,
    /// The field of the MLP's width, and its default.
    pub(super) intermediate_size: (&'static str, Option<usize>),
    pub(super) max_position_embeddings: usize,
    pub(super) num_attention_heads: Option<usize>,
    pub(super) num_key_value_heads: Option<usize>,
    pub(super) head_dim: Option<usize>,
    /// The field of the activation.
    pub(super) hidden_act: &'static str,
    pub(super) activation: ActivationFunction,
    /// The field of the norms' epsilon, and its default.
    pub(super) norm_eps: (&'static str, f64),
    pub(super) rope_theta: f64,
    /// For architectures whose blocks with a window have another rotary embedding: the field of its
    /// base in Transformers 4, and the base if there is no such field.
    pub(super) sliding_rope_theta: Option<(&'static str, f64)>,
    pub(super) tie_word_embeddings: bool,
}

/// Classes with a vision tower beside a text tower, with their `model_type` and that of the text
/// tower if `text_config` does not name it.
const MULTIMODAL: [(&str, &str, &str); 3] = [
    ("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text"),
    ("Gemma4ForConditionalGeneration", "gemma4", "gemma4_text"),
    ("Mistral3ForConditionalGeneration", "mistral3", "mistral"),
];

/// Whether `json` describes this class, by `architectures` or, if that is missing, by `model_type`.
///
/// # Errors
/// `model_type`, by which Transformers chooses the class, is that of another one.
fn is_class(json: &Value, class: &str, class_type: &str) -> Result<bool, String> {
    let model_type = json.get("model_type").and_then(Value::as_str);
    let Some(given) = json.pointer("/architectures/0").and_then(Value::as_str) else {
        return Ok(model_type == Some(class_type));
    };
    match model_type {
        Some(model_type) if given == class && model_type != class_type => Err(format!(
            "model_type: {model_type:?} is not the type of {class}, {class_type:?}; correct one of them"
        )),
        _ => Ok(given == class),
    }
}

/// Returns the configuration of the text tower if `json` describes a multimodal model.
pub(super) fn text_config(json: &Value) -> Result<Option<Value>, String> {
    let mut default_type = None;
    for (class, class_type, text_type) in MULTIMODAL {
        if is_class(json, class, class_type)? {
            default_type = Some(text_type);
        }
    }
    let Some(default_type) = default_type else { return Ok(None) };
    let mut text = json.get("text_config").cloned().unwrap_or(Value::Null);
    let Value::Object(fields) = &mut text else { return Err("text_config: is missing".into()) };
    fields.remove("architectures");
    fields.entry("model_type").or_insert_with(|| default_type.into());
    let ties = [json.get("tie_word_embeddings"), fields.get("tie_word_embeddings")];
    if let [Some(Value::Bool(false)), Some(Value::Bool(true))] = ties {
        return Err("tie_word_embeddings: is false, and true in text_config; make them equal".into());
    }
    // The class of the whole model ties the head, by its own setting, whose default is true.
    fields.insert(
        "tie_word_embeddings".into(),
        json.get("tie_word_embeddings").cloned().unwrap_or(true.into()),
    );
    for key in ["quantization_config", "is_causal"] {
        if let Some(value) = json.get(key) {
            fields.entry(key).or_insert_with(|| value.clone());
        }
    }
    Ok(Some(text))
}

impl Architecture {
    /// Finds the architecture in `architectures` or, if that is missing, in `model_type`.
    pub(super) fn of(json: &Value) -> Result<Self, String> {
        let supported = || {
            let text = ARCHITECTURES.iter().map(|(name, ..)| *name);
            text.chain(MULTIMODAL.iter().map(|(name, ..)| *name)).collect::<Vec<_>>().join(", ")
        };
        for (class, class_type, architecture) in ARCHITECTURES {
            if is_class(json, class, class_type)? {
                return Ok(architecture);
            }
        }
        let given = json.pointer("/architectures/0").or(json.get("model_type")).and_then(Value::as_str);
        Err(match given {
            Some(given) => format!("architectures: {given} is not supported; supported: {}", supported()),
            None => format!("architectures: is missing; supported: {}", supported()),
        })
    }

    /// The defaults of Transformers' configuration class.
    pub(super) fn defaults(self) -> Defaults {
        let llama = Defaults {
            vocab_size: None,
            intermediate_size: ("intermediate_size", None),
            max_position_embeddings: 2048,
            num_attention_heads: None,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: "hidden_act",
            activation: ActivationFunction::Silu,
            norm_eps: ("rms_norm_eps", 1e-6),
            rope_theta: 10_000.0,
            sliding_rope_theta: None,
            tie_word_embeddings: false,
        };
        match self {
            Self::Llama | Self::Granite => llama,
            Self::GraniteHybrid => Defaults {
                vocab_size: Some(32_000),
                intermediate_size: ("shared_intermediate_size", Some(1024)),
                num_attention_heads: Some(32),
                ..llama
            },
            Self::Mistral => {
                Defaults { max_position_embeddings: 4096 * 32, num_key_value_heads: Some(8), ..llama }
            }
            Self::Qwen2 => {
                Defaults { max_position_embeddings: 32_768, num_key_value_heads: Some(32), ..llama }
            }
            Self::Qwen3 => Defaults { head_dim: Some(128), ..Self::Qwen2.defaults() },
            Self::SmolLm3 => Defaults {
                max_position_embeddings: 32_768,
                num_key_value_heads: Some(4),
                rope_theta: 2_000_000.0,
                tie_word_embeddings: true,
                ..llama
            },
            Self::Olmo2 => Defaults { norm_eps: ("rms_norm_eps", 1e-5), ..llama },
            Self::Olmo3 => Defaults {
                norm_eps: ("rms_norm_eps", 1e-5),
                rope_theta: 500_000.0,
                sliding_rope_theta: Some(("rope_theta", 500_000.0)),
                ..llama
            },
            Self::Gemma2 => Defaults {
                max_position_embeddings: 8192,
                num_key_value_heads: Some(4),
                head_dim: Some(256),
                hidden_act: "hidden_activation",
                activation: ActivationFunction::GeluTanh,
                tie_word_embeddings: true,
                ..llama
            },
            Self::Gemma3 => Defaults {
                vocab_size: Some(262_208),
                max_position_embeddings: 131_072,
                num_attention_heads: Some(8),
                num_key_value_heads: Some(4),
                head_dim: Some(256),
                hidden_act: "hidden_activation",
                activation: ActivationFunction::GeluTanh,
                rope_theta: 1_000_000.0,
                sliding_rope_theta: Some(("rope_local_base_freq", 10_000.0)),
                tie_word_embeddings: true,
                ..llama
            },
            Self::Gemma4 => Defaults { vocab_size: Some(262_144), ..Self::Gemma3.defaults() },
            Self::Phi3 => {
                Defaults { max_position_embeddings: 4096, norm_eps: ("rms_norm_eps", 1e-5), ..llama }
            }
            Self::Starcoder2 => Defaults {
                vocab_size: Some(49_152),
                max_position_embeddings: 4096,
                num_attention_heads: Some(24),
                num_key_value_heads: Some(2),
                activation: ActivationFunction::GeluTanh,
                norm_eps: ("norm_epsilon", 1e-5),
                tie_word_embeddings: true,
                ..llama
            },
            Self::Cohere2 => Defaults {
                vocab_size: Some(256_000),
                max_position_embeddings: 8192,
                num_attention_heads: Some(64),
                norm_eps: ("layer_norm_eps", 1e-5),
                tie_word_embeddings: true,
                ..llama
            },
            Self::Ministral3 => Defaults {
                max_position_embeddings: 262_144,
                num_key_value_heads: Some(8),
                head_dim: Some(128),
                norm_eps: ("rms_norm_eps", 1e-5),
                rope_theta: 1_000_000.0,
                ..llama
            },
        }
    }

    /// Changes `config`, which describes a Llama, to what this architecture is.
    pub(super) fn adapt(self, config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
        let has_mlp_bias = matches!(self, Self::Llama | Self::SmolLm3 | Self::Granite);
        config.mlp_bias = has_mlp_bias && fields.flag("mlp_bias")?.unwrap_or(false);
        let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
        (config.qkv_bias, config.o_bias) = match self {
            Self::Mistral | Self::Ministral3 | Self::Phi3 => (false, false),
            Self::Qwen2 => (true, false),
            Self::Starcoder2 => {
                let has_bias = fields.flag("use_bias")?.unwrap_or(true);
                config.mlp_bias = has_bias;
                (has_bias, has_bias)
            }
            _ => (attention_bias, attention_bias),
        };
        self.adapt_blocks(config, fields)?;
        self.read_ropes(config, fields)
    }

    fn adapt_blocks(self, config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
        match self {
            Self::Llama => Ok(()),
            Self::Mistral => {
                let window = fields.window(Some(4096))?;
                windows_by_type(config, fields, window, |_| window.is_some())
            }
            Self::Qwen2 => qwen_windows(config, fields),
            Self::Qwen3 => {
                config.qk_norm = QkNorm::Heads;
                qwen_windows(config, fields)
            }
            Self::SmolLm3 => smollm3_windows(config, fields),
            Self::Olmo2 | Self::Olmo3 => {
                config.norms = NormPlaces::After;
                config.qk_norm = QkNorm::All;
                if self == Self::Olmo2 {
                    return Ok(());
                }
                let window = fields.window(Some(4096))?;
                windows_by_type(config, fields, window, |layer| (layer + 1) % 4 != 0)
            }
            Self::Gemma2 => gemma2(config, fields),
            Self::Gemma3 => gemma3(config, fields),
            Self::Gemma4 => gemma4::read_blocks(config, fields),
            Self::Phi3 => {
                check_no_dropout(fields, ["resid_pdrop", "embd_pdrop"])?;
                config.fused_qkv = true;
                config.mlp_modules = MlpModules { gate_up: &["mlp.gate_up_proj"], ..config.mlp_modules };
                let window = fields.window(None)?;
                config.layers.iter_mut().for_each(|layer| layer.sliding_window = window);
                Ok(())
            }
            Self::Ministral3 => {
                if fields.get("rope_parameters").or(fields.get("rope_scaling")).is_none() {
                    return Err("rope_parameters: is missing".into());
                }
                let window = fields.window(None)?;
                config.layers.iter_mut().for_each(|layer| layer.sliding_window = window);
                Ok(())
            }
            Self::Starcoder2 => {
                check_no_dropout(fields, ["residual_dropout", "embedding_dropout"])?;
                config.norm_kind = NormKind::Layer;
                config.norm_bias = true;
                config.mlp_modules =
                    MlpModules { gate_up: &["mlp.c_fc"], is_gated: false, down: "mlp.c_proj" };
                let window = fields.window(None)?;
                config.layers.iter_mut().for_each(|layer| layer.sliding_window = window);
                Ok(())
            }
            Self::Cohere2 => {
                config.norm_kind = NormKind::Layer;
                config.norms = NormPlaces::Parallel;
                config.logit_scale = fields.positive("logit_scale", 0.0625)?;
                let window = fields.window(Some(4096))?;
                let pattern = fields.optional_count("sliding_window_pattern")?.unwrap_or(4);
                windows_by_type(config, fields, window, |layer| (layer + 1) % pattern != 0)
            }
            Self::Granite => granite(config, fields),
            Self::GraniteHybrid => {
                granite(config, fields)?;
                check_granite_is_dense(config, fields)?;
                config.mlp_modules = MlpModules {
                    gate_up: &["shared_mlp.input_linear"],
                    down: "shared_mlp.output_linear",
                    ..config.mlp_modules
                };
                Ok(())
            }
        }
    }

    /// Gives the blocks their rotary embeddings.
    fn read_ropes(self, config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
        if self == Self::Gemma4 {
            return gemma4::read_ropes(config, fields);
        }
        if self == Self::GraniteHybrid && !granite_has_rope(fields)? {
            return Ok(());
        }
        let defaults = self.defaults();
        let (full, sliding) = match defaults.sliding_rope_theta {
            None => {
                let parameters = RopeParameters::of_model(fields.0, config, config.layers[0].head_dim);
                let rope = parameters.read(defaults.rope_theta)?;
                let rope = Rope { is_interleaved: self == Self::Cohere2, ..rope };
                let scaling = match self {
                    Self::Ministral3 => parameters.position_scaling(&rope)?,
                    _ => None,
                };
                let queries = Rope { position_scaling: scaling, ..rope.clone() };
                let rope = LayerRope { queries: config.add_rope(queries), keys: config.add_rope(rope) };
                (rope, rope)
            }
            Some((field, theta)) => {
                let head_dim = config.layers[0].head_dim;
                let of = |kind, field, theta| {
                    RopeParameters::of_layers(fields.0, config, head_dim, kind, field)?.read(theta)
                };
                let full = of("full_attention", "rope_theta", defaults.rope_theta)?;
                let of_sliding = fields.0.pointer("/rope_parameters/sliding_attention/rope_theta");
                let one_theta = field == "rope_theta" && of_sliding.is_none_or(Value::is_null);
                if one_theta && fields.number(field)?.is_some_and(|given| given != theta) {
                    return Err(format!(
                        "rope_theta: Transformers 5 uses it for blocks without a window only, and {theta} \
                         for the others; write rope_parameters, with a rope_theta for each type of block"
                    ));
                }
                let sliding = of("sliding_attention", field, theta)?;
                let (full, sliding) = (config.add_rope(full), config.add_rope(sliding));
                (LayerRope { queries: full, keys: full }, LayerRope { queries: sliding, keys: sliding })
            }
        };
        let has_rope = match self {
            Self::SmolLm3 => smollm3_has_rope(config, fields)?,
            Self::Cohere2 => config.layers.iter().map(|layer| layer.sliding_window.is_some()).collect(),
            _ => vec![true; config.layers.len()],
        };
        for (layer, has_rope) in config.layers.iter_mut().zip(has_rope) {
            let rope = if layer.sliding_window.is_some() { sliding } else { full };
            layer.rope = has_rope.then_some(rope);
        }
        Ok(())
    }
}

/// Refuses dropout of the base.
fn check_no_dropout(fields: Fields, names: [&str; 2]) -> Result<(), String> {
    for name in names {
        if fields.number(name)?.unwrap_or(0.0) != 0.0 {
            return Err(format!("{name}: must be 0; dropout of the base is not supported"));
        }
    }
    Ok(())
}

/// Reads the multipliers of Granite.
fn granite(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    config.embedding_multiplier = fields.positive("embedding_multiplier", 1.0)?;
    config.residual_multiplier = fields.positive("residual_multiplier", 1.0)?;
    config.attention_scale = fields.positive("attention_multiplier", 1.0)?;
    config.logit_scale = 1.0 / fields.positive("logits_scaling", 1.0)?;
    Ok(())
}

/// Checks that a Granite 4 has neither experts nor Mamba layers, which are the default.
fn check_granite_is_dense(config: &ModelConfig, fields: Fields) -> Result<(), String> {
    let experts = fields.number("num_local_experts")?.unwrap_or(8.0);
    if experts != 0.0 {
        return Err(format!(
            "num_local_experts: {experts} experts are not supported; supported: Granite 4 without experts (0)"
        ));
    }
    let layers = config.layers.len();
    let [types, old_types] = ["layer_types", "layers_block_type"].map(|key| fields.per_layer(key, layers));
    let (types, old_types) = (types?, old_types?);
    if types.is_some() && old_types.is_some_and(|old| Some(old) != types) {
        return Err("layers_block_type: differs from layer_types; remove one of them".into());
    }
    let mamba = || "layer_types: Mamba layers are not supported; supported: \"attention\" in all layers";
    let types = types.or(old_types).ok_or_else(mamba)?;
    match types.iter().find(|kind| !matches!(kind.as_str(), Some("attention" | "full_attention"))) {
        None => Ok(()),
        Some(kind) if matches!(kind.as_str(), Some("mamba" | "linear_attention")) => Err(mamba().into()),
        Some(kind) => Err(format!("layer_types: {kind} is not supported; supported: \"attention\"")),
    }
}

/// Reads whether Granite 4 has a rotary embedding.
fn granite_has_rope(fields: Fields) -> Result<bool, String> {
    const FIELD: &str = "position_embedding_type";
    match fields.get(FIELD).map(|kind| (kind, kind.as_str())) {
        Some((_, Some("rope"))) => Ok(true),
        None | Some((_, Some("nope"))) => Ok(false),
        Some((kind, _)) => Err(format!("{FIELD}: {kind} is not supported; supported: \"rope\", \"nope\"")),
    }
}

/// Reads what Gemma 2 has besides its rotary embedding: every second block has a window, and scores
/// and logits have bounds.
fn gemma2(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    gemma(config, fields)?;
    let softcap = |key: &str, default: f64| match fields.is_null(key) {
        true => Ok(None),
        false => fields.positive(key, default).map(Some),
    };
    config.attention_softcap = softcap("attn_logit_softcapping", 50.0)?;
    config.logit_softcap = softcap("final_logit_softcapping", 30.0)?;
    let window = fields.window(Some(4096))?;
    windows_by_type(config, fields, window, |layer| layer % 2 == 0)
}

/// Reads what Gemma 3 has besides its rotary embeddings. Its attention has no soft cap, whatever
/// `attn_logit_softcapping` says.
fn gemma3(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    gemma(config, fields)?;
    config.qk_norm = QkNorm::Heads;
    if fields.get("final_logit_softcapping").is_some() {
        config.logit_softcap = Some(fields.positive("final_logit_softcapping", 0.0)?);
    }
    let window = fields.window(Some(4096))?;
    let pattern = fields.optional_count("sliding_window_pattern")?.unwrap_or(6);
    windows_by_type(config, fields, window, |layer| (layer + 1) % pattern != 0)
}

/// Reads what Gemma 2 and 3 have in common.
fn gemma(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    if fields.flag("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(
            "use_bidirectional_attention: must be false; a model that generates text is needed".into()
        );
    }
    config.norms = NormPlaces::BeforeAndAfter;
    config.norm_offset = 1.0;
    config.attention_scale = 1.0 / fields.positive("query_pre_attn_scalar", 256.0)?.sqrt();
    config.embedding_multiplier = (config.hidden_size as f64).sqrt();
    Ok(())
}

/// Reads which blocks of SmolLM3 have a rotary embedding.
fn smollm3_has_rope(config: &ModelConfig, fields: Fields) -> Result<Vec<bool>, String> {
    let layers = config.layers.len();
    let Some(listed) = fields.per_layer("no_rope_layers", layers)? else {
        let interval = fields.optional_count("no_rope_layer_interval")?.unwrap_or(4);
        return Ok((1..=layers).map(|number| number % interval != 0).collect());
    };
    let has_rope = |flag: &Value| match flag.as_u64() {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => Err(format!("no_rope_layers: {flag} is neither 0 nor 1")),
    };
    listed.iter().map(has_rope).collect()
}

/// Reads the windows of SmolLM3. `use_sliding_window` only decides which blocks have the window if
/// they are not listed: those without rotary embedding.
fn smollm3_windows(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    let has_rope = smollm3_has_rope(config, fields)?;
    let is_used = fields.flag("use_sliding_window")?.unwrap_or(false);
    let window = fields.window(None)?;
    windows_by_type(config, fields, window, |layer| window.is_some() && is_used && !has_rope[layer])
}
