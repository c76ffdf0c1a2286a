//! What the `config.json` of Gemma 4 says about the blocks of its text tower.

use serde_json::Value;

use super::fields::Fields;
use super::rope::RopeParameters;
use super::windows::windows_by_type;
use super::{
    LayerConfig, LayerRope, ModelConfig, NormPlaces, QkNorm, Rope, RopeScaling, check_head_dim,
    check_kv_heads,
};

/// Reads what Gemma 4 has besides its rotary embeddings.
pub(super) fn read_blocks(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    check_supported(fields)?;
    config.norms = NormPlaces::BeforeAndAfter;
    config.qk_norm = QkNorm::Heads;
    config.normalizes_values = true;
    config.scales_blocks = true;
    config.attention_scale = 1.0;
    config.embedding_multiplier = (config.hidden_size as f64).sqrt();
    if fields.get("final_logit_softcapping").is_some() {
        config.logit_softcap = Some(fields.positive("final_logit_softcapping", 0.0)?);
    }
    let window = fields.window(Some(512))?;
    let last = config.layers.len() - 1;
    windows_by_type(config, fields, window, |layer| (layer + 1) % 6 != 0 && layer != last)?;
    if config.layers[last].sliding_window.is_some() {
        return Err("layer_types: the last block must have \"full_attention\"".into());
    }
    read_heads(config, fields)?;
    read_layer_inputs(config, fields)?;
    read_kv_sources(config, fields)
}

/// Reads the embeddings of each block.
fn read_layer_inputs(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    let rows = fields.count_or("vocab_size_per_layer_input", Some(262_144))?;
    config.layer_input_size = match fields.number("hidden_size_per_layer_input")? {
        Some(0.0) => return Ok(()),
        _ => Some(fields.count_or("hidden_size_per_layer_input", Some(256))?),
    };
    match rows == config.vocab_size {
        true => Ok(()),
        false => Err(format!("vocab_size_per_layer_input: {rows} is not vocab_size {}", config.vocab_size)),
    }
}

/// Reads which blocks share the keys and values of the last earlier block of their type.
fn read_kv_sources(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    const FIELD: &str = "num_kv_shared_layers";
    let shared = match fields.number(FIELD)? {
        None | Some(0.0) => return Ok(()),
        _ => fields.count(FIELD)?,
    };
    let doubles_mlp = fields.flag("use_double_wide_mlp")?.unwrap_or(false);
    let first = config.layers.len().saturating_sub(shared);
    let (own, sharing) = config.layers.split_at_mut(first);
    for block in sharing {
        let is_full = block.sliding_window.is_none();
        let source = own.iter().rposition(|other| other.sliding_window.is_none() == is_full);
        let source = source
            .ok_or(format!("{FIELD}: {shared} blocks need an earlier block with their type of attention"))?;
        if (own[source].head_dim, own[source].num_key_value_heads)
            != (block.head_dim, block.num_key_value_heads)
        {
            return Err(format!("{FIELD}: blocks that share keys and values must have the same heads"));
        }
        block.kv_source = Some(source);
        block.values_are_keys = false;
        if doubles_mlp {
            block.intermediate_size *= 2;
        }
    }
    Ok(())
}

/// Refuses what is not supported.
fn check_supported(fields: Fields) -> Result<(), String> {
    match fields.get("use_bidirectional_attention").map(|value| (value, value.as_str())) {
        // Only tokens of images see later ones.
        None | Some((_, Some("vision"))) => {}
        Some((value, _)) => {
            return Err(format!(
                "use_bidirectional_attention: {value} is not supported; supported: null, \"vision\""
            ));
        }
    }
    if fields.flag("enable_moe_block")?.unwrap_or(false) {
        return Err("enable_moe_block: must be false; mixtures of experts are not supported".into());
    }
    Ok(())
}

/// Reads the heads of each block: those of full attention are others, and with `attention_k_eq_v`
/// their values are the keys. Transformers 5 lists what differs in `per_layer_config`.
fn read_heads(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    let values_are_keys = fields.flag("attention_k_eq_v")?.unwrap_or(false);
    let (global_head_dim, global_kv_heads) = ("global_head_dim", "num_global_key_value_heads");
    let overrides = LayerOverrides::read(fields, config.layers.len())?;
    for (layer, block) in config.layers.iter_mut().enumerate() {
        let is_full = block.sliding_window.is_none();
        block.values_are_keys = values_are_keys && is_full;
        if let Some(overrides) = &overrides {
            overrides.apply(layer, block, config.num_attention_heads)?;
        } else if is_full {
            block.head_dim = fields.count_or(global_head_dim, Some(512))?;
            check_head_dim(global_head_dim, block.head_dim)?;
            if values_are_keys && let Some(kv_heads) = fields.optional_count(global_kv_heads)? {
                check_kv_heads(global_kv_heads, kv_heads, config.num_attention_heads)?;
                block.num_key_value_heads = kv_heads;
            }
        }
    }
    Ok(())
}

/// `per_layer_config`: settings of single blocks, by their index.
struct LayerOverrides<'a>(Vec<(usize, &'a Value)>);

impl<'a> LayerOverrides<'a> {
    const FIELD: &'static str = "per_layer_config";

    /// Returns none if the field is missing. If it is null, no block has settings of its own.
    fn read(fields: Fields<'a>, layers: usize) -> Result<Option<Self>, String> {
        let field = Self::FIELD;
        if fields.is_null(field) {
            return Ok(Some(Self(Vec::new())));
        }
        let Some(value) = fields.get(field) else { return Ok(None) };
        let by_layer = value.as_object().ok_or(format!("{field}: must be a JSON object"))?;
        let parse = |(key, value): (&String, &'a Value)| {
            let layer = key.parse::<usize>().ok().filter(|layer| *layer < layers);
            let layer =
                layer.ok_or(format!("{field}: {key:?} is not the index of one of {layers} blocks"))?;
            Ok((layer, value))
        };
        by_layer.iter().map(parse).collect::<Result<_, String>>().map(|list| Some(Self(list)))
    }

    fn apply(&self, layer: usize, block: &mut LayerConfig, heads: usize) -> Result<(), String> {
        let Some((_, settings)) = self.0.iter().find(|(index, _)| *index == layer) else { return Ok(()) };
        let name = format!("{}.{layer}", Self::FIELD);
        let prefix = |error: String| format!("{name}.{error}");
        let fields = Fields(settings);
        let known = ["head_dim", "num_key_value_heads"];
        let settings = settings.as_object().ok_or(format!("{name}: must be a JSON object"))?;
        for key in settings.keys() {
            if !known.contains(&key.as_str()) {
                return Err(prefix(format!("{key}: is not supported; supported: {}", known.join(", "))));
            }
        }
        block.head_dim = fields.count_or("head_dim", Some(block.head_dim)).map_err(prefix)?;
        check_head_dim("head_dim", block.head_dim).map_err(prefix)?;
        let kv_heads = fields.count_or("num_key_value_heads", Some(block.num_key_value_heads));
        block.num_key_value_heads = kv_heads.map_err(prefix)?;
        check_kv_heads("num_key_value_heads", block.num_key_value_heads, heads).map_err(prefix)
    }
}

/// Gives each block the rotary embedding of its type.
pub(super) fn read_ropes(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    let is_given = fields.get("rope_parameters").is_some();
    if fields.get("rope_scaling").is_some() {
        return Err("rope_scaling: must be null; Gemma 4 has rope_parameters".into());
    }
    for layer in 0..config.layers.len() {
        let LayerConfig { head_dim, sliding_window, .. } = config.layers[layer];
        let rope = match (is_given, sliding_window) {
            (true, window) => {
                let kind = if window.is_some() { "sliding_attention" } else { "full_attention" };
                RopeParameters::of_layers(fields.0, config, head_dim, kind, "")?.read(10_000.0)?
            }
            (false, Some(_)) => Rope::new(10_000.0, head_dim),
            (false, None) => Rope {
                scaling: RopeScaling::Proportional { factor: 1.0, rotated_pairs: head_dim / 8 },
                ..Rope::new(1_000_000.0, head_dim)
            },
        };
        let rope = config.add_rope(rope);
        config.layers[layer].rope = Some(LayerRope { queries: rope, keys: rope });
    }
    Ok(())
}
