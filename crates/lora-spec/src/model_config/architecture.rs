//! The supported architectures: how the `config.json` of each one differs from Llama's.

use serde_json::Value;

use super::fields::Fields;
use super::rope::RopeParameters;
use super::{ActivationFunction, LayerConfig, ModelConfig, NormPlaces, QkNorm};

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
    /// `Gemma3ForCausalLM`: Gemma 3 without its vision tower.
    Gemma3,
}

/// The supported architectures, with the names in `architectures` and in `model_type`.
const ARCHITECTURES: [(&str, &str, Architecture); 9] = [
    ("LlamaForCausalLM", "llama", Architecture::Llama),
    ("MistralForCausalLM", "mistral", Architecture::Mistral),
    ("Qwen2ForCausalLM", "qwen2", Architecture::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
    ("SmolLM3ForCausalLM", "smollm3", Architecture::SmolLm3),
    ("Olmo2ForCausalLM", "olmo2", Architecture::Olmo2),
    ("Olmo3ForCausalLM", "olmo3", Architecture::Olmo3),
    ("GraniteForCausalLM", "granite", Architecture::Granite),
    ("Gemma3ForCausalLM", "gemma3_text", Architecture::Gemma3),
];

/// The values of fields that a `config.json` need not have, where architectures differ.
pub(super) struct Defaults {
    pub(super) num_key_value_heads: Option<usize>,
    pub(super) head_dim: Option<usize>,
    /// The field of the activation.
    pub(super) hidden_act: &'static str,
    pub(super) activation: ActivationFunction,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    /// For architectures whose blocks with a window have another rotary embedding: the field of its
    /// base in Transformers 4, and the base if there is no such field.
    pub(super) sliding_rope_theta: Option<(&'static str, f64)>,
    pub(super) tie_word_embeddings: bool,
}

impl Architecture {
    /// Finds the architecture in `architectures` or, if that is missing, in `model_type`.
    pub(super) fn of(json: &Value) -> Result<Self, String> {
        let supported = || ARCHITECTURES.map(|(name, ..)| name).join(", ");
        let name = json.pointer("/architectures/0").and_then(Value::as_str);
        let model_type = json.get("model_type").and_then(Value::as_str);
        let Some(given) = name.or(model_type) else {
            return Err(format!("architectures: is missing; supported: {}", supported()));
        };
        let is_given = |(known, known_type, _): &&(&str, &str, Self)| match name {
            Some(name) => *known == name,
            None => Some(*known_type) == model_type,
        };
        ARCHITECTURES
            .iter()
            .find(is_given)
            .map(|(.., architecture)| *architecture)
            .ok_or_else(|| format!("architectures: {given} is not supported; supported: {}", supported()))
    }

    /// The defaults of Transformers' configuration class.
    pub(super) fn defaults(self) -> Defaults {
        let llama = Defaults {
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: "hidden_act",
            activation: ActivationFunction::Silu,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            sliding_rope_theta: None,
            tie_word_embeddings: false,
        };
        match self {
            Self::Llama | Self::Granite => llama,
            Self::Mistral => Defaults { num_key_value_heads: Some(8), ..llama },
            Self::Qwen2 | Self::Qwen3 => Defaults { num_key_value_heads: Some(32), ..llama },
            Self::SmolLm3 => Defaults {
                num_key_value_heads: Some(4),
                rope_theta: 2_000_000.0,
                tie_word_embeddings: true,
                ..llama
            },
            Self::Olmo2 => Defaults { rms_norm_eps: 1e-5, ..llama },
            Self::Olmo3 => Defaults {
                rms_norm_eps: 1e-5,
                rope_theta: 500_000.0,
                sliding_rope_theta: Some(("rope_theta", 500_000.0)),
                ..llama
            },
            Self::Gemma3 => Defaults {
                num_key_value_heads: Some(4),
                head_dim: Some(256),
                hidden_act: "hidden_activation",
                activation: ActivationFunction::GeluTanh,
                rope_theta: 1_000_000.0,
                sliding_rope_theta: Some(("rope_local_base_freq", 10_000.0)),
                tie_word_embeddings: true,
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
            Self::Mistral => (false, false),
            Self::Qwen2 => (true, false),
            _ => (attention_bias, attention_bias),
        };
        self.adapt_blocks(config, fields)?;
        self.read_ropes(config, fields)
    }

    fn adapt_blocks(self, config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
        match self {
            Self::Llama => Ok(()),
            Self::Mistral => {
                let window = fields.optional_count("sliding_window")?;
                let window = window.or((!fields.is_null("sliding_window")).then_some(4096));
                config.layers.iter_mut().for_each(|layer| layer.sliding_window = window);
                Ok(())
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
                let window = fields.optional_count("sliding_window")?.unwrap_or(4096);
                windows_by_type(config, fields, window, |layer| (layer + 1) % 4 != 0)
            }
            Self::Gemma3 => gemma3(config, fields),
            Self::Granite => {
                config.embedding_multiplier = fields.positive("embedding_multiplier", 1.0)?;
                config.residual_multiplier = fields.positive("residual_multiplier", 1.0)?;
                config.attention_scale = fields.positive("attention_multiplier", 1.0)?;
                config.logit_scale = 1.0 / fields.positive("logits_scaling", 1.0)?;
                Ok(())
            }
        }
    }

    /// Gives the blocks their rotary embeddings.
    fn read_ropes(self, config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
        let (positions, defaults) = (config.max_position_embeddings, self.defaults());
        let (full, sliding) = match defaults.sliding_rope_theta {
            None => {
                let rope = RopeParameters::of_model(fields.0, positions).read(defaults.rope_theta)?;
                (rope, rope)
            }
            Some((field, theta)) => {
                let of = |kind, field| RopeParameters::of_layers(fields.0, kind, field, positions);
                let full = of("full_attention", "rope_theta")?.read(defaults.rope_theta)?;
                (full, of("sliding_attention", field)?.read(theta)?)
            }
        };
        let has_rope = match self {
            Self::SmolLm3 => smollm3_has_rope(config, fields)?,
            _ => vec![true; config.layers.len()],
        };
        for (layer, has_rope) in config.layers.iter_mut().zip(has_rope) {
            let rope = if layer.sliding_window.is_some() { sliding } else { full };
            layer.rope = has_rope.then_some(rope);
        }
        Ok(())
    }
}

/// Reads the sliding windows of Qwen. Transformers 5 lists the blocks in `layer_types`. In earlier
/// versions the blocks from index `max_window_layers` have the window.
fn qwen_windows(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    if !fields.flag("use_sliding_window")?.unwrap_or(false) {
        return Ok(());
    }
    let window = fields.optional_count("sliding_window")?.unwrap_or(4096);
    let first = fields.number("max_window_layers")?.unwrap_or(28.0);
    windows_by_type(config, fields, window, |layer| layer as f64 >= first)
}

/// Gives `window` to the blocks whose type in `layer_types` is `sliding_attention`; if there are no
/// types, to those for which `has_window` holds.
fn windows_by_type(
    config: &mut ModelConfig,
    fields: Fields,
    window: usize,
    has_window: impl Fn(usize) -> bool,
) -> Result<(), String> {
    let types = fields.per_layer("layer_types", config.layers.len())?;
    for (layer, LayerConfig { sliding_window, .. }) in config.layers.iter_mut().enumerate() {
        let kind = types.map(|types| &types[layer]);
        let is_windowed = match kind.map(|kind| kind.as_str()) {
            None => has_window(layer),
            Some(Some("sliding_attention")) => true,
            Some(Some("full_attention")) => false,
            Some(_) => {
                return Err(format!(
                    "layer_types: {} is not supported; supported: \"full_attention\", \
                     \"sliding_attention\"",
                    kind.unwrap_or(&Value::Null)
                ));
            }
        };
        *sliding_window = is_windowed.then_some(window);
    }
    Ok(())
}

/// Reads what Gemma 3 has besides its rotary embeddings. Its attention has no soft cap, whatever
/// `attn_logit_softcapping` says.
fn gemma3(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    if fields.flag("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(
            "use_bidirectional_attention: must be false; a model that generates text is needed".into()
        );
    }
    if fields.get("final_logit_softcapping").is_some() {
        return Err("final_logit_softcapping: must be null; soft caps are not supported".into());
    }
    config.norms = NormPlaces::BeforeAndAfter;
    config.norm_offset = 1.0;
    config.qk_norm = QkNorm::Heads;
    config.attention_scale = 1.0 / fields.positive("query_pre_attn_scalar", 256.0)?.sqrt();
    config.embedding_multiplier = (config.hidden_size as f64).sqrt();
    let window = fields.optional_count("sliding_window")?.unwrap_or(4096);
    let pattern = fields.optional_count("sliding_window_pattern")?.unwrap_or(6);
    windows_by_type(config, fields, window, |layer| (layer + 1) % pattern != 0)
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

/// Reads the windows of SmolLM3: if there are any, the blocks without rotary embedding have them.
fn smollm3_windows(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    let has_rope = smollm3_has_rope(config, fields)?;
    let window = fields.optional_count("sliding_window")?;
    match (fields.flag("use_sliding_window")?.unwrap_or(false), window) {
        (true, Some(window)) => windows_by_type(config, fields, window, |layer| !has_rope[layer]),
        _ => Ok(()),
    }
}
