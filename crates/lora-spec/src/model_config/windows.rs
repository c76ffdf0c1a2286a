//! The sliding windows of blocks.

use serde_json::Value;

use super::fields::Fields;
use super::{LayerConfig, ModelConfig};

/// Reads the sliding windows of Qwen. Transformers 5 lists the blocks in `layer_types`. In earlier
/// versions the blocks from index `max_window_layers` have the window.
pub(super) fn qwen_windows(config: &mut ModelConfig, fields: Fields) -> Result<(), String> {
    let is_used = fields.flag("use_sliding_window")?.unwrap_or(false);
    let window = if is_used { fields.window(Some(4096))? } else { None };
    let first = fields.number("max_window_layers")?.unwrap_or(28.0);
    windows_by_type(config, fields, window, |layer| window.is_some() && layer as f64 >= first)
}

/// Gives `window` to the blocks whose type in `layer_types` is `sliding_attention`; if there are no
/// types, to those for which `has_window` holds.
///
/// # Errors
/// Such a block without a window, or another type.
pub(super) fn windows_by_type(
    config: &mut ModelConfig,
    fields: Fields,
    window: Option<usize>,
    has_window: impl Fn(usize) -> bool,
) -> Result<(), String> {
    let types = fields.per_layer("layer_types", config.layers.len())?;
    for (layer, LayerConfig { sliding_window, .. }) in config.layers.iter_mut().enumerate() {
        let kind = types.map(|types| &types[layer]);
        let is_windowed = match kind.map(|kind| kind.as_str()) {
            None if window.is_none() && has_window(layer) => {
                return Err("sliding_window: null is not a whole number; some blocks have a window".into());
            }
            None => has_window(layer),
            Some(Some("sliding_attention")) if window.is_none() => {
                return Err("layer_types: \"sliding_attention\" needs a sliding_window that is used".into());
            }
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
        *sliding_window = window.filter(|_| is_windowed);
    }
    Ok(())
}
