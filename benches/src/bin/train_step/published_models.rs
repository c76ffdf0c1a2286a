//! The published models whose shapes are measured.

use std::fs;

use anyhow::{Context as _, Result, anyhow};
use lora_spec::ModelConfig;

/// Those fields of the published `config.json` that the shapes or the computation depend on.
const PUBLISHED_CONFIGS: [(&str, &str); 4] = [
    ("smollm2-135m", include_str!("../../../models/smollm2-135m.json")),
    ("llama-3.2-1b", include_str!("../../../models/llama-3.2-1b.json")),
    ("llama-3.1-8b", include_str!("../../../models/llama-3.1-8b.json")),
    ("qwen2.5-7b", include_str!("../../../models/qwen2.5-7b.json")),
];

/// Returns the configuration of a published model by its name, or of any `config.json` by its path.
pub(crate) fn model_config(model: &str) -> Result<ModelConfig> {
    let published = PUBLISHED_CONFIGS.iter().find(|(name, _)| *name == model);
    let text = match published {
        Some((_, text)) => (*text).to_owned(),
        None => fs::read_to_string(model).with_context(|| {
            let names = PUBLISHED_CONFIGS.map(|(name, _)| name).join(", ");
            format!("--model {model}: must be {names}, or the path of a config.json")
        })?,
    };
    ModelConfig::parse(&text).map_err(|error| anyhow!("--model {model}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_models_have_their_published_sizes() {
        let parameters = |model| model_config(model).unwrap().parameters();
        assert_eq!(parameters("smollm2-135m"), 134_515_008);
        assert_eq!(parameters("llama-3.2-1b"), 1_235_814_400);
        assert_eq!(parameters("llama-3.1-8b"), 8_030_261_248);
        assert_eq!(parameters("qwen2.5-7b"), 7_615_616_512);
    }

    #[test]
    fn an_unknown_model_lists_the_known_ones() {
        let error = format!("{:#}", model_config("llama-9").unwrap_err());
        assert!(
            error.starts_with(
                "--model llama-9: must be smollm2-135m, llama-3.2-1b, llama-3.1-8b, qwen2.5-7b, or"
            ),
            "{error}"
        );
    }
}
